"Files from strangers, at every door: nothing in them runs, nothing is written outside its place, nothing grows unseen, and the error names the file."
import ast, csv, json, os, pickle, random, re, shutil, stat, struct, zipfile
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from skin_lesions.cli import main, read_patients, read_split
from skin_lesions.cache import resize_cache
from skin_lesions.classes import HAM10000
from skin_lesions.data import ham10000_dataloaders
from skin_lesions.dataset import _unzip
from skin_lesions.readers import read_metadata
from skin_lesions.report import html_report
from skin_lesions.experiments import compare_pretraining
from skin_lesions.gradcam import gradcam_folder
from skin_lesions.learner import lesion_learner
from skin_lesions.architectures import read_weights
from skin_lesions.predict import load_predictor
from skin_lesions.bundle import read_bundle, save_bundle
from skin_lesions.predictions import get_predictions, isic_submission, read_isic_submission, read_predictions, save_predictions, write_csv
from skin_lesions.recipes import with_changes
from skin_lesions.resume import read_state, write_state


@pytest.fixture(scope='module')
def learn(sample):
    meta = read_metadata(sample).iloc[:40]
    torch.manual_seed(0)
    dls = ham10000_dataloaders(meta.assign(is_valid=np.arange(40) % 4 == 0), 32, bs=10, arch='test_efficientnet', num_workers=0, device='cpu')
    return lesion_learner(dls, 'test_efficientnet', pretrained=False, alpha=None)


@pytest.fixture(scope='module')
def table(learn): return get_predictions(learn)


# ---- nothing runs

class Gift:
    "Unpickling it makes a folder"
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return (os.mkdir, (str(self.mark),))


def as_pickle(mark, file): file.write_bytes(pickle.dumps(Gift(mark)))
def as_torch(mark, file): torch.save(dict(state_dict=Gift(mark)), file)
def as_old_torch(mark, file): torch.save(Gift(mark), file, _use_new_zipfile_serialization=False)
def as_numpy(mark, file):
    with open(file, 'wb') as f: np.save(f, np.array([Gift(mark)], dtype=object), allow_pickle=True)


@pytest.mark.parametrize('open_it', [lambda f: pickle.loads(f.read_bytes()), lambda f: torch.load(f, weights_only=False), lambda f: np.load(f, allow_pickle=True)], ids=['pickle', 'torch', 'numpy'])
def test_the_gifts_would_work(open_it, tmp_path, request):
    plant = dict(pickle=as_pickle, torch=as_torch, numpy=as_numpy)[request.node.callspec.id]
    plant(tmp_path/'mark', tmp_path/'gift')
    open_it(tmp_path/'gift')
    assert (tmp_path/'mark').is_dir()


def a_train(f, sample, small, out='new'): return ['train', '--data', str(sample), '--out', str(f.parent/out), '--no-check', *small, '--set', 'epochs=1', '--pretrained-weights', str(f)]


def through_main(args, capsys):
    "The command line turns errors into a status and a line; here it is an error again"
    status = main(args)
    if status: raise ValueError(capsys.readouterr().err)


TINY = with_changes('quick', dict(arch='test_efficientnet', pretrained=False, size=32, bs=8))

# name of the file that is planted -> what a user calls; `here` is its folder with a bundle, an old run, a data set and a state in it
DOORS = {
    'bundle/model.safetensors': lambda here, **kw: load_predictor(here/'bundle'),
    'bundle/bundle.json': lambda here, **kw: read_bundle(here/'bundle'),
    'bundle.zip': lambda here, **kw: load_predictor(here/'bundle.zip'),
    'w.pth': lambda here, **kw: read_weights(here/'w.pth'),
    'w.safetensors': lambda here, **kw: read_weights(here/'w.safetensors'),
    'w.pt': lambda here, sample, small, capsys, **kw: through_main(a_train(here/'w.pt', sample, small), capsys),
    'state/state.safetensors': lambda here, **kw: read_state(here/'state'),
    'state/asked.json': lambda here, sample, small, capsys, **kw: through_main([*a_train(here/'w.pt', sample, small, 'run')[:-2], '--resume'], capsys),
    'predictions.csv': lambda here, **kw: read_predictions(here/'predictions.csv'),
    'isic.csv': lambda here, **kw: read_isic_submission(here/'isic.csv'),
    'patients.csv': lambda here, **kw: read_patients(here/'patients.csv'),
    'split.csv': lambda here, **kw: read_split(here),
    'data/HAM10000_metadata.csv': lambda here, **kw: read_metadata(here/'data'),
    'rotation.safetensors': lambda here, meta, **kw: compare_pretraining(meta, ('rotation',), (.5,), recipe=TINY, epochs=1, pretext_epochs=1, out=here, workers=0, cache=None, show=False),
    'archive.zip': lambda here, **kw: _unzip(here/'archive.zip', here/'unpacked', show=False),
}


@pytest.fixture(scope='module')
def honest(learn, table, tmp_path_factory):
    "One of everything that can be opened, to be copied"
    here = tmp_path_factory.mktemp('honest')
    save_bundle(learn, here/'bundle')
    for d in ('data/images', 'run/state'): (here/d).mkdir(parents=True)
    write_state(here/'state', dict(epoch=1), dict(a=torch.ones(3)))
    return here


@pytest.mark.parametrize('plant', [as_pickle, as_torch, as_old_torch, as_numpy])
@pytest.mark.parametrize('door', DOORS)
def test_no_gift_is_opened(door, plant, honest, sample, small, capsys, tmp_path, request):
    if door in ('w.pt', 'rotation.safetensors') and plant in (as_old_torch, as_numpy): pytest.skip('a slow door, tried with the other kinds')
    here = tmp_path/'here'
    shutil.copytree(honest, here)
    file = here/('run/'+door if door == 'state/asked.json' else door)
    plant(tmp_path/'mark', file)
    unpacked = door == 'archive.zip' and plant is as_torch # that is a zip, and nobody opens what is in it
    with nullcontext() if unpacked else pytest.raises((ValueError, OSError, zipfile.BadZipFile, pickle.UnpicklingError)) as e:
        DOORS[door](here, sample=sample, small=small, capsys=capsys, meta=read_metadata(sample).iloc[:40].assign(is_valid=np.arange(40) % 4 == 0))
    assert not (tmp_path/'mark').exists()
    if door != 'archive.zip': assert file.name in str(e.value), str(e.value)


@pytest.mark.parametrize('version, warned', [('2.4.1', True), ('2.9.1+cu128', True), ('2.10.0', False), ('2.15.0+cu130', False)])
def test_a_pytorch_with_a_known_hole_is_named(version, warned, tmp_path, monkeypatch, recwarn):
    torch.save({'w': torch.ones(2)}, tmp_path/'w.pth')
    monkeypatch.setattr(torch, '__version__', version)
    assert read_weights(tmp_path/'w.pth')['w'].tolist() == [1, 1]
    assert [str(tmp_path/'w.pth') in str(w.message) and '2.10 or later' in str(w.message) for w in recwarn] == [True]*warned


@pytest.mark.parametrize('plant', [as_pickle, as_torch, as_old_torch, as_numpy, None])
@pytest.mark.parametrize('file', ['index.jsonl', 'pixels.bin'])
def test_a_cache_from_a_stranger_is_made_anew(file, plant, sample, tmp_path):
    meta = read_metadata(sample).iloc[:4]
    honest = resize_cache(meta, 32, folder=tmp_path/'cache', show=False)
    right, folder = [np.array(honest.images[p]) for p in meta.path], honest.images.folder
    if plant is None: (folder/file).write_text('\n'.join(json.dumps(dict(path=str(p), size=1, mtime=1, digest='0', at=at, h=h, w=2, crc=0)) for p, at, h in zip(meta.path, (-1, 10**15, 0, 0), (1, 1, -3, 10**12))) + '\n')
    else: plant(tmp_path/'mark', folder/file)
    again = resize_cache(meta, 32, folder=tmp_path/'cache', show=False, verify=True)
    assert not (tmp_path/'mark').exists()
    for p, pixels in zip(meta.path, right): np.testing.assert_array_equal(again.images[p], pixels)


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call): yield node, ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


UNSAFE = r'(c?[pP]ickle|dill|cloudpickle|joblib|marshal|shelve)\.\w+|(pd|pandas)\.read_pickle|load_learner|eval|exec|os\.(system|popen)|subprocess\.\w+|yaml\.load|shutil\.unpack_archive|.*\.extractall|tar\.extract'
HARMLESS = ('distributed.py: pickle.loads(pickle.dumps(error))', 'distributed.py: pickle.dumps(error)') # an error of this process: can it be sent to the other ranks?


def test_the_package_calls_nothing_that_unpickles_or_executes(repo):
    "Every call in the source: what could run a file's content is not there, and the two loaders that can are told not to"
    found = []
    for file in sorted((repo/'skin_lesions').glob('*.py')):
        for node, name, keywords in calls(ast.parse(file.read_text(encoding='utf-8'))):
            bad = re.fullmatch(UNSAFE, name) or name.endswith('torch.load') and keywords.get('weights_only') != 'True' or re.fullmatch('(np|numpy)\\.load', name) and keywords.get('allow_pickle', 'False') != 'False'
            if bad and f'{file.name}: {ast.unparse(node)}' not in HARMLESS: found.append(f'{file.name}:{node.lineno} {ast.unparse(node)[:80]}')
    assert not found, found


# ---- nothing grows

def header(text, said=None): return struct.pack('<Q', len(text) if said is None else said) + text.encode()


HEADERS = {
    'claims a huge header': header('{}', 2**62), 'claims a long header': header('{}', 2**27), 'claims a huge tensor': header('{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
    'shape overflows': header('{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}}')+bytes(8),
    'nested': header('{"a":'+'['*10**5+']'*10**5+'}'), 'overlaps': header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}')+bytes(8), 'empty': b''}


@pytest.mark.parametrize('what', HEADERS)
def test_absurd_headers_of_tensors(what, honest, tmp_path):
    shutil.copytree(honest/'bundle', tmp_path/'bundle'); shutil.copytree(honest/'state', tmp_path/'state')
    for file in ('bundle/model.safetensors', 'state/state.safetensors', 'w.safetensors'): (tmp_path/file).write_bytes(HEADERS[what])
    for f in (lambda: load_predictor(tmp_path/'bundle'), lambda: read_state(tmp_path/'state'), lambda: read_weights(tmp_path/'w.safetensors')):
        with pytest.raises(ValueError, match='safetensors'): f()


RECORDS = {'nested': lambda f: f.write_text('['*10**5+']'*10**5), 'nested in a record': lambda f: f.write_text(f.read_text().rstrip()[:-1]+',"x":'+'{"a":'*10**5+'1'+'}'*10**5+'}'),
           'huge': lambda f: os.truncate(f, 2**30), 'a long number': lambda f: f.write_text('9'*10**5), 'no object': lambda f: f.write_text('[]'), 'not UTF-8': lambda f: f.write_bytes(b'{"\xff": 1}')}


@pytest.mark.parametrize('what', RECORDS)
def test_absurd_records(what, honest, tmp_path):
    shutil.copytree(honest, tmp_path/'h')
    for file, f in (('bundle/bundle.json', lambda: load_predictor(tmp_path/'h'/'bundle')), ('bundle/bundle.json', lambda: read_bundle(tmp_path/'h'/'bundle'))):
        RECORDS[what](tmp_path/'h'/file)
        with pytest.raises(ValueError, match=file.split('/')[1]): f()
        shutil.copy(honest/file, tmp_path/'h'/file)


def test_tensors_beyond_the_limit_are_not_read(honest, tmp_path):
    shutil.copytree(honest/'bundle', tmp_path/'b')
    os.truncate(tmp_path/'b'/'model.safetensors', 5*2**30) # a hole, which takes no room
    with pytest.raises(ValueError, match=r'model.safetensors has 5,368,709,120 bytes, more than .*MOST_BYTES.*not read'): load_predictor(tmp_path/'b')


def test_zip_bombs(honest, tmp_path):
    record = (honest/'bundle'/'bundle.json').read_bytes()
    def packed(data, claim=None):
        with zipfile.ZipFile(tmp_path/'b.zip', 'w', zipfile.ZIP_DEFLATED) as z:
            z.writestr('bundle.json', record); z.writestr('model.safetensors', data)
            if claim is not None: z.filelist[1].file_size = claim
        return tmp_path/'b.zip'
    with pytest.raises(ValueError, match=r'would grow from .* to 50,000,000 bytes.*MOST_RATIO.*not unpacked'): load_predictor(packed(bytes(50_000_000)))
    with pytest.raises(ValueError, match='has 1,099,511,627,776 bytes, more than .*MOST_BYTES'): load_predictor(packed(bytes(1000), 2**40))
    with pytest.raises(ValueError, match='b.zip'): load_predictor(packed(bytes(50_000_000), 100)) # a liar: no more than it claims is unpacked
    torch.save(dict(a=torch.zeros(10**7)), tmp_path/'w.pth')
    with zipfile.ZipFile(tmp_path/'w.pth') as z, zipfile.ZipFile(tmp_path/'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as b:
        for i in z.namelist(): b.writestr(i, z.read(i))
    with pytest.raises(ValueError, match=r'bomb.pth has .* would grow to 40,'): read_weights(tmp_path/'bomb.pth')


@pytest.mark.parametrize('suffix', ['.gz', '.bz2', '.xz', '.zip'])
def test_packed_tables(suffix, table, tmp_path):
    "pandas unpacks tables by their suffix, to any size: here none is"
    file = tmp_path/f't.csv{suffix}'
    table.to_csv(file, index=False)
    for f in (read_predictions, read_isic_submission, read_patients):
        with pytest.raises(ValueError, match=re.escape(file.name)): f(file)


# ---- nothing is written elsewhere

def link(z, name, to):
    i = zipfile.ZipInfo(name); i.create_system, i.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    z.writestr(i, to)


@pytest.mark.parametrize('name', ['../evil', 'a/../../evil', 'absolute', '..\\evil', 'C:\\evil', 'C:evil', 'link'])
def test_archives_stay_in_their_folder(name, tmp_path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp('elsewhere')/'evil'
    if name == 'absolute': name = str(elsewhere)
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
        z.writestr('good.jpg', 'x')
        link(z, name, '/etc') if name == 'link' else z.writestr(name, 'x')
    (tmp_path/'un').mkdir()
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(ValueError, match='a.zip holds an unsafe entry.*nothing was unpacked'): _unzip(tmp_path/'a.zip', tmp_path/'un'/'packed', show=False)
    assert sorted(tmp_path.rglob('*')) == before and not elsewhere.exists()


def test_a_record_names_no_file_outside(honest, tmp_path):
    for i, name in enumerate(('../model', '/etc/passwd', 'x'*64, '../'*21+'a', 7, None)):
        shutil.copytree(honest/'bundle', tmp_path/str(i))
        file = tmp_path/str(i)/'bundle.json'
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(sha256=name)))
        with pytest.raises(ValueError, match='bundle.json'): load_predictor(tmp_path/str(i))


@pytest.mark.skipif(os.name == 'nt', reason='links need a right of their own on Windows')
def test_no_writing_through_a_link(learn, table, honest, tmp_path, quick_reports):
    "A folder from elsewhere may hold links to files of its next user: they are replaced, what they point at stays"
    shutil.copytree(honest, tmp_path/'h')
    victims = []
    for file in ('bundle/model.safetensors', 'bundle/bundle.json', 'state/state.safetensors', 'state/previous.safetensors', 'predictions.csv', 'report.html'):
        victim = tmp_path/f'victim{len(victims)}'
        victim.write_text('precious'); victims.append(victim)
        (tmp_path/'h'/file).unlink(missing_ok=True); (tmp_path/'h'/file).symlink_to(victim)
    save_bundle(learn, tmp_path/'h'/'bundle', overwrite=True)
    for i in (2, 3): write_state(tmp_path/'h'/'state', dict(epoch=i), dict(a=torch.ones(3)))
    save_predictions(table, tmp_path/'h'/'predictions.csv')
    html_report(table, tmp_path/'h'/'report.html')
    assert [v.read_text() for v in victims] == ['precious']*len(victims)
    assert load_predictor(tmp_path/'h'/'bundle', device='cpu') and read_state(tmp_path/'h'/'state')[0]['epoch'] == 3


# ---- pages

EVIL = ('<script>alert(1)</script>', '" onerror="alert(1)', "' onmouseover='alert(1)", '<img src=x onerror=alert(1)>', '</td></table><iframe src="javascript:alert(1)">', '&lt;script&gt;', '</style><svg onload=alert(1)>', '<!--')


class Page(HTMLParser):
    "What a browser would make of a page"
    def __init__(self, text): super().__init__(); self.tags, self.attrs, self.text = set(), [], []; self.feed(text); self.close()
    def handle_starttag(self, tag, attrs): self.tags.add(tag); self.attrs += attrs
    def handle_data(self, data): self.text.append(data)
    handle_startendtag = handle_starttag
    def safe(self):
        assert not self.tags & {'script', 'iframe', 'object', 'embed', 'form', 'base', 'link'}, self.tags
        assert not [a for a in self.attrs if a[0].startswith('on')]
        assert all(v.startswith(('data:image/', '#')) for k, v in self.attrs if k in ('src', 'href', 'xlink:href'))
        assert ('http-equiv', 'Content-Security-Policy') in self.attrs and any(k == 'content' and "default-src 'none'" in v for k, v in self.attrs)


@pytest.mark.parametrize('evil', [''.join(EVIL[:-1]), EVIL[-1]], ids=['tags', 'comment']) # a report takes seconds
def test_report_shows_texts_as_texts(evil, table, tmp_path, no_figures):
    meta = table[['image_id']].assign(sex=[evil if i % 2 else 'male' for i in range(len(table))], localization=evil, source=evil, age=50.)
    bad = table.assign(image_id=[f'{evil}{i}' for i in range(len(table))], group=[f'{evil}{i//2}' for i in range(len(table))])
    meta = meta.assign(image_id=bad.image_id)
    with no_figures():
        plain = Page(html_report(table, tmp_path/'plain.html', meta=meta.assign(image_id=table.image_id, sex='male', localization='back', source='a'), run=dict(a='b', c=dict(d='e'))).read_text(encoding='utf-8'))
    with no_figures() if evil == EVIL[-1] else nullcontext(): # once with them
        page = Page(html_report(bad, tmp_path/'r.html', meta=meta, title=evil, run={evil: evil, 'c': {evil: evil}}).read_text(encoding='utf-8'))
    page.safe()
    assert page.tags <= plain.tags, page.tags - plain.tags
    assert ''.join(page.text).count(evil) >= 4 # title, heading, arguments


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no such file names')
def test_gallery_shows_names_as_names(learn, sample, tmp_path):
    from PIL import Image
    (tmp_path/'in').mkdir()
    names = [e.replace('/', '_')+'.jpg' for e in EVIL]
    for n in names: Image.new('RGB', (40, 40), (200, 150, 130)).save(tmp_path/'in'/n)
    broken = '<b onclick=alert(1)>.jpg'
    (tmp_path/'in'/broken).write_bytes(b'not an image')
    n, unreadable = gradcam_folder(learn, tmp_path/'in', tmp_path/'out', show=False)
    assert n == len(names) and len(unreadable) == 1
    page = Page((tmp_path/'out'/'gallery.html').read_text(encoding='utf-8'))
    page.safe()
    assert {'svg', 'iframe'}.isdisjoint(page.tags) and all(name in ''.join(page.text) for name in [*names, broken])
    assert len(list((tmp_path/'out').iterdir())) == n+1


# ---- tables

def test_no_cell_is_a_formula_and_every_text_comes_back(table, tmp_path):
    "Random texts of all that is dangerous: written, no cell begins as a formula; read, each is what it was"
    rng = random.Random(3)
    pieces = ['=', '+', '-', '@', '\t', '\r', "'", "''", '"', ',', ';', 'a', '1', ' ', '\n', '=cmd|"/c calc"!A1', '＝', 'é']
    def text(): return ''.join(rng.choices(pieces, k=rng.randint(1, 6)))
    for _ in range(30):
        p = np.roll(np.array([1-6e-5, *[1e-5]*6]), 1)
        bad = pd.DataFrame([p]*20, columns=list(HAM10000)).assign(image_id=[f'{text()}{i}' for i in range(20)], group=[text() for _ in range(20)], problem=[text() for _ in range(20)])
        bad['ood_score'] = -1e-5
        file = save_predictions(bad, tmp_path/'p.csv')
        with open(file, newline='', encoding='utf-8') as f: rows = list(csv.reader(f))
        for row in rows[1:]:
            for name, cell in zip(rows[0], row):
                if name in (*HAM10000, 'ood_score'): float(cell)
                else: assert not cell or cell[0] not in '=+-@\t\r\n＝＋－＠', cell
        back = read_predictions(file)
        for c in ('image_id', 'group', 'problem'): assert list(back[c]) == list(bad[c])
        assert (back[list(HAM10000)].to_numpy() == bad[list(HAM10000)].to_numpy()).all() and (back.ood_score == -1e-5).all()
        back = read_isic_submission(isic_submission(bad, tmp_path/'i.csv'))
        assert list(back.image_id) == list(bad.image_id)
        write_csv(bad[['image_id', 'group']].assign(path='a.jpg', dx='nv', is_valid=True), tmp_path/'split.csv')
        back = read_split(tmp_path)
        assert list(back.image_id) == list(bad.image_id) and list(back.group) == list(bad.group)


# ---- what the promises rest on

def test_every_requirement_is_reviewed(repo):
    "SECURITY.md has a row for each package that a user's installation gets, with the lowest version that settings.ini allows"
    from configparser import ConfigParser
    parser = ConfigParser(delimiters=['='], comment_prefixes=['#'])
    parser.read(repo/'settings.ini', encoding='utf-8')
    asked = {re.split('[<>=]', r)[0]: (re.findall('>=([0-9.]+)', r) or ['-'])[0] for k, v in parser['DEFAULT'].items() if k == 'requirements' or k.endswith('_requirements') and k.split('_')[0] not in ('dev', 'test', 'docs') for r in v.split()}
    rows = [[c.strip() for c in line.strip('|\n ').split('|')] for line in (repo/'SECURITY.md').read_text(encoding='utf-8').splitlines() if line.startswith('| `')]
    reviewed = {r[0].strip('`'): r[1] for r in rows}
    assert all(len(r) == 4 and all(r) for r in rows)
    assert {k: reviewed.get(k) for k in asked} == asked, 'review the new requirement and give it a row in SECURITY.md'
