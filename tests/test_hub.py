"Bundles on the hub, through huggingface_hub itself against a small server on this machine."
import base64, hashlib, json, pickle, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip('huggingface_hub')


class Repos:
    "Repositories as lists of commits, and the requests that came"
    def __init__(self): self.commits, self.private, self.asked = {}, {}, []

    def commit(self, repo, files):
        known = self.commits.setdefault(repo, [])
        known.append((hashlib.sha1(f'{repo}{len(known)}'.encode()).hexdigest(), (known[-1][1] if known else {}) | files))
        return known[-1][0]

    def at(self, repo, revision):
        known = self.commits.get(repo, [])
        return known[-1] if revision == 'main' and known else next((c for c in known if c[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    repos = None
    def log_message(self, *args): pass

    def answer(self, body=b'', status=200, **headers):
        if not isinstance(body, bytes): body = json.dumps(body).encode()
        self.send_response(status)
        for k, v in {'Content-Length': len(body), **headers}.items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def do_POST(self):
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.repos.asked.append(('POST', path, self.headers.get('authorization')))
        if path == '/api/validate-yaml': return self.answer(dict(errors=[], warnings=[]))
        if path == '/api/repos/create':
            asked_for = json.loads(body); repo = f"{asked_for['organization']}/{asked_for['name']}"
            self.repos.private.setdefault(repo, asked_for.get('private', asked_for.get('visibility') == 'private')); self.repos.commits.setdefault(repo, [])
            return self.answer(dict(url=f"http://{self.headers['Host']}/{repo}", id=repo, name=repo))
        repo, what = '/'.join(path.split('/')[3:5]), path.split('/')[5]
        if what == 'preupload': return self.answer(dict(files=[dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in json.loads(body)['files']]))
        lines = [json.loads(l) for l in body.decode().splitlines() if l.strip()]
        oid = self.repos.commit(repo, {l['value']['path']: base64.b64decode(l['value']['content']) for l in lines if l['key'] == 'file'})
        return self.answer(dict(success=True, commitOid=oid, commitUrl=f"http://{self.headers['Host']}/{repo}/commit/{oid}", hookOutput=''))

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.repos.asked.append((self.command, path, self.headers.get('authorization')))
        parts = path.strip('/').split('/')
        if parts[:2] == ['api', 'models']:
            repo, revision = '/'.join(parts[2:4]), parts[5] if parts[4:5] == ['revision'] else 'main'
            found = self.repos.at(repo, revision)
            if not found: return self.answer(dict(error='Repository not found'), 404, X_Error_Code='RepoNotFound')
            return self.answer(dict(id=repo, sha=found[0], private=True, tags=[], siblings=[dict(rfilename=n, size=len(b), blobId=hashlib.sha1(b).hexdigest()) for n, b in found[1].items()]))
        repo, revision, name = '/'.join(parts[:2]), parts[3], '/'.join(parts[4:])
        found = self.repos.at(repo, revision)
        if not found or name not in found[1]: return self.answer(dict(error='Entry not found'), 404, X_Error_Code='EntryNotFound')
        return self.answer(found[1][name], ETag=f'"{hashlib.sha1(found[1][name]).hexdigest()}"', X_Repo_Commit=found[0])

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A hub without anything in it, which huggingface_hub asks"
    from huggingface_hub import HfApi
    import skin_lesions.hub as ours
    repos = Repos()
    server = ThreadingHTTPServer(('127.0.0.1', 0), type('Hub', (Handler,), dict(repos=repos)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    repos.url = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setattr(ours, '_api', lambda token=None: HfApi(endpoint=repos.url, token=token or 'hf_test', library_name='skin_lesions'))
    for name in ('http_proxy', 'https_proxy', 'all_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'): monkeypatch.delenv(name, raising=False)
    repos.stop = server.shutdown
    yield repos
    server.shutdown(); server.server_close()


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    "A small bundle with scores, without training"
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.readers import read_metadata
    from skin_lesions.learner import two_stage_learner
    from skin_lesions.bundle import save_bundle
    from skin_lesions.synthetic import synthetic_dataset
    folder = tmp_path_factory.mktemp('hub')
    meta = read_metadata(synthetic_dataset(folder/'sample', 56, seed=1, size=(96, 72)))
    meta['is_valid'] = [i % 3 == 0 for i in range(len(meta))]
    learn = two_stage_learner(ham10000_dataloaders(meta, 64, bs=4, arch='test_efficientnet', num_workers=0, device='cpu'), 'test_efficientnet', pretrained=False)
    return save_bundle(learn, folder/'bundle', scores=dict(accuracy=.5, average_recall=.25, macro_auc=None, average_recall_95_low=.125, average_recall_95_high=.375, n_images=7, n_lesions=7))


def test_there_and_back(hub, bundle, tmp_path):
    "Private by default, one commit, the same bytes back; a pinned commit stays, and opens again when the hub is gone"
    from huggingface_hub import ModelCard
    from skin_lesions.hub import fetch_bundle, from_hub, push_to_hub
    first = push_to_hub(bundle, 'owner/lesions', dataset='HAM10000', token='hf_mine')
    (oid, files), = hub.commits['owner/lesions']
    assert first == f'hf://owner/lesions@{oid}' and hub.private == {'owner/lesions': True}
    assert {a for m, p, a in hub.asked if m == 'POST'} == {'Bearer hf_mine'}
    assert set(files) == {'model.safetensors', 'bundle.json', 'README.md'} and files['model.safetensors'] == (bundle/'model.safetensors').read_bytes()
    (tmp_path/'card.md').write_bytes(files['README.md'])
    data = ModelCard.load(tmp_path/'card.md').data
    assert data.license == 'cc-by-nc-4.0' and [(r.metric_type, r.metric_value, r.dataset_name) for r in data.eval_results] == [('accuracy', .5, 'HAM10000'), ('recall', .25, 'HAM10000')]
    assert b'0.250 (0.125 to 0.375)' in files['README.md'] and b'CC BY-NC' in files['README.md']
    hub.commit('owner/lesions', {'bundle.json': b'{}'})
    with pytest.raises(ValueError, match='not the record of a bundle'): from_hub('owner/lesions', cache_dir=tmp_path/'cache')
    predictor = from_hub(first, device='cpu', cache_dir=tmp_path/'cache')
    assert predictor.hub == first and predictor.record['scores']['accuracy'] == .5
    assert not [p for m, p, a in hub.asked if m != 'POST' and 'README' in p]
    hub.stop()
    folder, where = fetch_bundle(first, cache_dir=tmp_path/'cache')
    assert where == first and (folder/'bundle.json').read_bytes() == files['bundle.json']


def test_a_stranger_is_refused_before_anything_is_fetched(hub, bundle, tmp_path):
    from huggingface_hub.errors import RepositoryNotFoundError
    from skin_lesions.hub import from_hub
    class Gift:
        def __reduce__(self): return (Path.touch, (tmp_path/'owned',))
    good, gift = {n: (bundle/n).read_bytes() for n in ('model.safetensors', 'bundle.json')}, pickle.dumps(Gift())
    for i, name in enumerate(('pytorch_model.bin', 'learn.pkl', 'sub/handler.py')):
        hub.commit(f'mallory/{i}', good | {name: gift})
        with pytest.raises(ValueError, match='Nothing was fetched'): from_hub(f'mallory/{i}', cache_dir=tmp_path/'cache')
    assert not [p for m, p, a in hub.asked if '/resolve/' in p]
    hub.commit('mallory/weights', good | {'model.safetensors': gift})
    with pytest.raises(ValueError, match="safetensors' format"): from_hub('mallory/weights', cache_dir=tmp_path/'cache')
    with pytest.raises(RepositoryNotFoundError): from_hub('mallory/nowhere', cache_dir=tmp_path/'cache')
    assert not (tmp_path/'owned').exists()


def test_from_the_command_line(hub, bundle, tmp_path, monkeypatch, capsys):
    from skin_lesions import cli
    from skin_lesions.hub import push_to_hub
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'cache')) # not the user's
    where = push_to_hub(bundle, 'owner/lesions', dataset='HAM10000')
    image = next((bundle.parent/'sample').rglob('*.jpg'))
    assert cli.main(['predict', str(image), '--bundle', where, '--out', str(tmp_path/'table.csv'), '--quiet']) == 0
    assert image.stem in (tmp_path/'table.csv').read_text()
    assert cli.main(['predict', str(image), '--bundle', 'hf://lesions', '--quiet']) == 2 and 'not a repository on the hub' in capsys.readouterr().err
