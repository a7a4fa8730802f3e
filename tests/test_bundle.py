"Bundles: nothing in them runs, what is wrong is named, they are written whole or not at all, and hold each thing once."
import json, os, pickle, shutil, zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import Learner

from serving import make
from skin_lesions.bundle import FORMAT_VERSION, image_view, read_bundle, save_bundle, update_bundle
from skin_lesions.classes import HAM10000, ISIC2019, MELANOMA
from skin_lesions.predict import load_predictor
from skin_lesions.readers import read_metadata

CODES = list(HAM10000)


@pytest.fixture(scope='module')
def meta(sample):
    meta = read_metadata(sample)
    return meta.assign(is_valid=meta.groupby('dx').cumcount() % 5 == 0)


@pytest.fixture(scope='module')
def learn(meta): return make(meta)


@pytest.fixture(scope='module')
def bundle(learn, tmp_path_factory): return save_bundle(learn, tmp_path_factory.mktemp('bundle')/'b')


def changed(bundle, folder, **changes):
    shutil.copytree(bundle, folder)
    record = json.loads((folder/'bundle.json').read_text())
    (folder/'bundle.json').write_text(json.dumps(record | changes))
    return folder


# ---- nothing runs

class Gift:
    "Unpickling it makes a file"
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return (os.mkdir, (str(self.mark),))


def test_the_gift_would_work(tmp_path):
    pickle.loads(pickle.dumps(Gift(tmp_path/'mark')))
    assert (tmp_path/'mark').exists()


NAMES = ('model.pkl', 'export.pkl', 'model.pth', 'bundle.pkl', 'model.pt', 'pytorch_model.bin', 'model.bin', 'data.pkl', 'patient.pkl', 'calibration.pkl', 'rule.pkl', 'learner.pkl', '__init__.py', 'bundle.py')


def test_no_pickle_beside_the_files_is_opened(bundle, meta, tmp_path):
    shutil.copytree(bundle, tmp_path/'b')
    for name in NAMES:
        (tmp_path/'b'/name).write_bytes(pickle.dumps(Gift(tmp_path/'mark')) if not name.endswith('.py') else f'import os; os.mkdir({str(tmp_path/"mark")!r})'.encode())
    predictor = load_predictor(tmp_path/'b', device='cpu')
    predictor.predict(meta.path[0])
    assert not (tmp_path/'mark').exists()


@pytest.mark.parametrize('torch_format', [False, True])
@pytest.mark.parametrize('name', ['model.safetensors', 'bundle.json'])
def test_a_pickle_under_the_right_name(name, torch_format, bundle, tmp_path):
    shutil.copytree(bundle, tmp_path/'b')
    if torch_format: torch.save(Gift(tmp_path/'mark'), tmp_path/'b'/name)
    else: (tmp_path/'b'/name).write_bytes(pickle.dumps(Gift(tmp_path/'mark')))
    with pytest.raises(ValueError, match=name): load_predictor(tmp_path/'b')
    with zipfile.ZipFile(tmp_path/'b.zip', 'w') as z:
        for f in (tmp_path/'b').iterdir(): z.write(f, f.name)
    with pytest.raises(ValueError, match=name): load_predictor(tmp_path/'b.zip')
    (tmp_path/'c.zip').write_bytes((tmp_path/'b'/name).read_bytes())
    with pytest.raises(ValueError): load_predictor(tmp_path/'c.zip')
    for alone in NAMES[:4]:
        (tmp_path/alone).write_bytes((tmp_path/'b'/name).read_bytes())
        with pytest.raises(ValueError, match='is not a bundle'): load_predictor(tmp_path/alone)
    assert not (tmp_path/'mark').exists()


def test_no_unpickler_is_even_called(bundle, meta, monkeypatch):
    def never(*args, **kwargs): raise AssertionError('a pickle was opened')
    for module, name in ((pickle, 'load'), (pickle, 'loads'), (pickle, 'Unpickler'), (pickle, '_Unpickler'), (torch, 'load'), (torch.serialization, 'load')): monkeypatch.setattr(module, name, never)
    load_predictor(bundle, device='cpu').predict(list(meta.path[:3]), progress=False)


@pytest.mark.parametrize('where', [dict(body_kwargs=dict(checkpoint_path='FILE')), dict(body_kwargs=dict(pretrained_cfg=dict(file='FILE'))), dict(body_kwargs=dict(weights='FILE')),
                                   dict(body_kwargs=dict(pretrained=True)), dict(arch='local-dir:FILE'), dict(arch='hf-hub:somebody/gift'), dict(network='os.system'), dict(network='Sequential'),
                                   dict(body_kwargs=dict(pretrained_cfg_overlay=dict(url='http://localhost/x')))])
def test_the_configuration_opens_no_file_and_no_address(where, bundle, tmp_path):
    torch.save(Gift(tmp_path/'mark'), tmp_path/'gift.pth')
    where = json.loads(json.dumps(where).replace('FILE', str(tmp_path/'gift.pth')))
    config = read_bundle(bundle)['network']
    with pytest.raises(ValueError): load_predictor(changed(bundle, tmp_path/'b', network=config | where))
    assert not (tmp_path/'mark').exists()



# ---- each fault has its name

def resaved(bundle, folder, change):
    "The bundle with other tensors, and a checksum that fits them"
    import hashlib
    from safetensors.torch import load_file, save_file
    shutil.copytree(bundle, folder)
    state = load_file(bundle/'model.safetensors')
    change(state)
    save_file(state, folder/'model.safetensors')
    record = json.loads((folder/'bundle.json').read_text())
    record['sha256'] = hashlib.sha256((folder/'model.safetensors').read_bytes()).hexdigest()
    (folder/'bundle.json').write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('head1.1.bias'), 'missing: head1.1.bias'),
    (lambda s: s.update(extra=torch.zeros(1)), 'not in the network: extra'),
    (lambda s: s.update({'head1.1.bias': s['head1.1.bias'][:-1]}), r'other shape: head1.1.bias \(511,\) instead of \(512,\)'),
    (lambda s: s.update({'head1.1.bias': s['head1.1.bias'].half()}), 'other type: head1.1.bias torch.float16 instead of torch.float32')])
def test_tensors_that_do_not_fit(change, message, bundle, tmp_path):
    with pytest.raises(ValueError, match=message): load_predictor(resaved(bundle, tmp_path/'b', change))


def test_one_flipped_bit_in_the_tensors(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path/'b')
    data = bytearray((bundle/'model.safetensors').read_bytes())
    data[-1000] ^= 1
    (tmp_path/'b'/'model.safetensors').write_bytes(data)
    with pytest.raises(ValueError, match='model.safetensors has the checksum'): load_predictor(tmp_path/'b')
    (tmp_path/'b'/'model.safetensors').write_bytes(data[:-1000])
    with pytest.raises(ValueError, match='model.safetensors holds no tensors'): load_predictor(tmp_path/'b')


@pytest.mark.parametrize('changes, message', [
    (dict(format_version=2), 'format version 2.*reads up to 1.*pip install -U'), (dict(format_version=1.5), 'format_version must be'), (dict(format='other'), 'not the record of a bundle'),
    (dict(network={'network': 'LessonNet'}), "unknown network 'LessonNet'; did you mean 'LesionNet'"), (dict(network={'network': 'TwoStageNet'}), 'TwoStageNet'), (dict(network=None), "'network' must be"),
    (dict(classes=CODES[:6]), "'classes' must be"), (dict(crop=dict(name='rendom', size=[64, 64])), "unknown crop 'rendom'"), (dict(crop=dict(name='random', size=[64, 64], zoom=2)), 'zoom'),
    (dict(normalization=dict(mean=[0, 0, 0], std=[1, 1, 0])), 'std > 0'), (dict(preprocess=[dict(name='Sharpen')]), 'Sharpen|preprocess'), (dict(sha256='1'*64), 'checksum'),
    (dict(calibration=dict(kind='spell')), 'calibration|spell'), (dict(rule=[1]), "'rule' must be")])
def test_faults_of_the_record(changes, message, bundle, tmp_path):
    with pytest.raises(ValueError, match=message): load_predictor(changed(bundle, tmp_path/'b', **changes))


def test_missing_files_and_broken_json(bundle, tmp_path):
    for name in ('model.safetensors', 'bundle.json'):
        shutil.copytree(bundle, tmp_path/name)
        (tmp_path/name/name).unlink()
        with pytest.raises(FileNotFoundError, match=f'has no {name}'): load_predictor(tmp_path/name)
    for text in ('{"format":', '', '[]', 'null', '{}', '['*100_000, '\xff\xfe'):
        folder = tmp_path/'json'
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bundle, folder)
        (folder/'bundle.json').write_bytes(text.encode('latin-1'))
        with pytest.raises(ValueError, match='bundle.json'): load_predictor(folder)
    with pytest.raises(FileNotFoundError, match='no bundle at'): load_predictor(tmp_path/'nowhere')
    record = json.loads((bundle/'bundle.json').read_text())
    for key in ('network', 'classes', 'side', 'crop', 'normalization', 'preprocess', 'sha256', 'patient', 'calibration', 'rule', 'channels_last', 'trained_on', 'dtype'):
        (folder/'bundle.json').write_text(json.dumps({k: v for k, v in record.items() if k != key}))
        with pytest.raises(ValueError, match=f"has no '{key}'"): load_predictor(folder)


def test_what_a_bundle_cannot_hold_is_refused_when_it_is_made(meta, tmp_path):
    from fastai.vision.all import BCEWithLogitsLossFlat, Transform, xresnet18
    learn = make(meta)
    class Odd(Transform):
        order = 50
    learn.dls.add_tfms([Odd()], 'after_batch')
    with pytest.raises(ValueError, match='Odd'): save_bundle(learn, tmp_path/'a')
    other = Learner(make(meta).dls, xresnet18(n_out=7))
    with pytest.raises(ValueError, match='got XResNet'): save_bundle(other, tmp_path/'a')
    with pytest.raises(ValueError, match='softmax'): save_bundle(make(meta, loss_func=BCEWithLogitsLossFlat()), tmp_path/'a')
    assert not (tmp_path/'a').exists() and not list(tmp_path.iterdir())



# ---- written whole or not at all

@pytest.mark.parametrize('step', ['replace', 'rename', 'fsync'])
@pytest.mark.parametrize('target', ['new', 'old', 'old.zip'])
def test_a_crash_while_writing(step, target, learn, bundle, tmp_path, monkeypatch):
    old = tmp_path/target
    if target == 'old': shutil.copytree(bundle, old)
    if target == 'old.zip': save_bundle(learn, old)
    before = {p.name: p.read_bytes() for p in old.iterdir()} if old.is_dir() else old.read_bytes() if old.exists() else None
    def crash(*args, **kwargs): raise OSError('disk full')
    monkeypatch.setattr(os, step, crash)
    try: save_bundle(learn, old, overwrite=True, scores=dict(accuracy=.5))
    except OSError: pass
    monkeypatch.undo()
    if old.exists():
        record = read_bundle(old)
        assert load_predictor(old, device='cpu') and record['scores'] in (None, dict(accuracy=.5))
        if record['scores'] is None: assert before == ({p.name: p.read_bytes() for p in old.iterdir()} if old.is_dir() else old.read_bytes())
    assert {p.name for p in tmp_path.iterdir()} <= {target}, 'something temporary is left'


@pytest.mark.parametrize('step', [1, 2, 3])
def test_a_crash_between_the_files_leaves_the_old_or_the_new(step, learn, bundle, tmp_path, monkeypatch):
    "The tensors aside, the record, the tensors in their place: after each of these steps one of the two bundles loads"
    shutil.copytree(bundle, tmp_path/'b')
    other, original, calls = load_predictor(bundle, device='cpu'), os.replace, []
    with torch.no_grad(): other.model.head1[-1].bias.add_(1)
    def crash(*args):
        calls.append(args)
        if len(calls) == step: raise OSError('power cut')
        return original(*args)
    monkeypatch.setattr(os, 'replace', crash)
    with pytest.raises(OSError, match='power cut'): save_bundle(other, tmp_path/'b', overwrite=True)
    monkeypatch.undo()
    bias = load_predictor(tmp_path/'b', device='cpu').model.head1[-1].bias
    expected = (learn if step < 3 else other).model.head1[-1].bias
    torch.testing.assert_close(bias, expected, rtol=0, atol=0)
    save_bundle(learn, tmp_path/'b', overwrite=True)
    assert sorted(p.name for p in (tmp_path/'b').iterdir()) == ['bundle.json', 'model.safetensors']
    assert (tmp_path/'b'/'model.safetensors').read_bytes() == (bundle/'model.safetensors').read_bytes()


def test_who_reads_the_old_bundle_goes_on_reading_it(learn, bundle, tmp_path):
    shutil.copytree(bundle, tmp_path/'b')
    with open(tmp_path/'b'/'bundle.json', 'rb') as f:
        save_bundle(learn, tmp_path/'b', overwrite=True, scores=dict(accuracy=.5))
        assert f.read() == (bundle/'bundle.json').read_bytes()


def test_overwriting_keeps_other_files_and_needs_a_word(learn, bundle, tmp_path):
    shutil.copytree(bundle, tmp_path/'b')
    (tmp_path/'b'/'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='overwrite=True'): save_bundle(learn, tmp_path/'b')
    save_bundle(learn, tmp_path/'b', overwrite=True, scores=dict(recall=np.float32(.5), auc=float('nan')))
    assert (tmp_path/'b'/'notes.txt').read_text() == 'mine'
    assert read_bundle(tmp_path/'b')['scores'] == dict(recall=.5, auc=None)
    with pytest.raises(FileExistsError): save_bundle(learn, tmp_path/'b'/'notes.txt', overwrite=True)


def test_same_network_same_bytes(learn, tmp_path):
    save_bundle(learn, tmp_path/'a'); save_bundle(learn, tmp_path/'b')
    assert (tmp_path/'a'/'model.safetensors').read_bytes() == (tmp_path/'b'/'model.safetensors').read_bytes()


def test_the_record_says_what_it_should(bundle, meta):
    record = json.loads((bundle/'bundle.json').read_text())
    assert record['format_version'] == 1 and 'not a medical device' in record['notice'] and [d['code'] for d in record['classes']['diagnoses']] == CODES
    assert record['split']['train_images'] == int((~meta.is_valid).sum()) and sum(record['split']['valid_counts'].values()) == int(meta.is_valid.sum())
    assert 0 <= record['split']['valid_fraction_with_group_in_training'] <= 1
    assert record['versions']['torch'] and record['network']['arch'] == 'test_efficientnet' and record['crop']['size'] == [64, 64]


# ---- each thing once

def test_hashed_ids_are_kept_once_and_not_in_json(learn, meta, tmp_path):
    from skin_lesions.decide import decision_rule, fit_calibration, fit_referral
    from skin_lesions.predictions import get_predictions
    from safetensors.torch import load_file
    valid = get_predictions(learn)
    calibration = fit_calibration(valid, 'temperature')
    ready = calibration.calibrate(valid, overlap='ignore')
    folder = save_bundle(learn, tmp_path/'b', calibration=calibration, rule=decision_rule('prior', ready), referral=fit_referral(ready))
    tensors = {k: v for k, v in load_file(folder/'model.safetensors').items() if k.startswith('ids/')}
    n = int(meta.is_valid.sum())
    assert {k: len(v) for k, v in tensors.items() if k.endswith('images')} == {'ids/0/images': len(meta)-n, 'ids/1/images': n}
    record = read_bundle(folder)
    assert [record[k]['fitted_on']['ids'] for k in ('calibration', 'rule', 'referral')] == [1, 1, 1]
    predictor = load_predictor(folder, device='cpu')
    assert predictor.calibration == calibration and predictor.referral.fitted_on == calibration.fitted_on


def test_a_bundle_that_could_not_be_read_replaces_nothing(learn, bundle, tmp_path):
    shutil.copytree(bundle, tmp_path/'b')
    with pytest.raises(ValueError, match='bundle.json has .* more than the 1,048,576'):
        save_bundle(learn, tmp_path/'b', overwrite=True, scores=dict(text='x'*2**20))
    assert {p.name: p.read_bytes() for p in (tmp_path/'b').iterdir()} == {p.name: p.read_bytes() for p in bundle.iterdir()}


@pytest.mark.parametrize('classes', [ISIC2019, MELANOMA], ids=lambda c: c.name)
def test_a_plain_network_of_any_class_set(classes, tmp_path):
    from skin_lesions.classes import ClassSet
    from skin_lesions.networks import LesionNet, create_body
    net = LesionNet(create_body('test_efficientnet', pretrained=False), len(classes))
    folder = save_bundle(net, tmp_path/'b', classes=classes, view=image_view((48, 64), 'window', arch='test_efficientnet'))
    predictor = load_predictor(folder, device='cpu')
    assert predictor.classes == classes == ClassSet.from_dict(read_bundle(folder)['classes']) and predictor.size == (48, 64)
    assert predictor.training_images is None
    x = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    p = predictor.answer([predictor.prepare(x)])[0]
    pixels = torch.tensor(x[6:54, 8:72]).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(predictor.record['normalization'][k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
    with torch.no_grad(): torch.testing.assert_close(torch.tensor(p).float(), net.eval()((pixels - mean) / std).softmax(1))


def test_tensors_that_are_not_saved_are_there_after_loading(tmp_path):
    "Swin makes a table of positions while it is built, which no file holds"
    from skin_lesions.networks import LesionNet, create_body
    small = dict(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), img_size=64, window_size=2)
    net = LesionNet(create_body('swin_tiny_patch4_window7_224', pretrained=False, **small), 2).eval()
    unsaved = set(dict(net.named_buffers())) - set(net.state_dict())
    assert unsaved, 'the premise'
    folder = save_bundle(net, tmp_path/'b', classes=MELANOMA, view=image_view(64, arch='swin_tiny_patch4_window7_224'))
    loaded, x = load_predictor(folder, 'cpu').model, torch.randn(2, 3, 64, 64)
    assert not any(v.is_meta for v in loaded.state_dict().values())
    with torch.no_grad(): torch.testing.assert_close(loaded(x), net(x))


def test_the_packaged_network_holds_nothing_twice():
    from skin_lesions.core import named_bundle
    record = read_bundle(named_bundle('ham10000'))
    assert (named_bundle('ham10000')/'bundle.json').stat().st_size < 30_000
    assert record['trained_on']['n_images'] == 11791 and record['classes']['name'] == 'HAM10000_SCC'
    assert len({record[k]['fitted_on']['ids'] for k in ('calibration', 'rule', 'referral')}) == 1


@pytest.mark.parametrize('version', range(1, FORMAT_VERSION+1))
def test_every_format_ever_written_is_read(version, repo, monkeypatch):
    "`tools/make_format_bundle.py` wrote one of each with all its parts; its answers are those of then"
    monkeypatch.syspath_prepend(repo/'tools')
    from make_format_bundle import PATIENT, images
    file = repo/'tests'/'bundles'/f'format_{version}.zip'
    predictor, then = load_predictor(file, 'cpu'), pd.read_csv(file.with_suffix('.csv'))
    for part in ('patient', 'calibration', 'rule', 'referral', 'ood', 'trained_on', 'sets'): assert predictor.record[part], part
    now = pd.concat([predictor.predict(image, PATIENT) for image in images()], ignore_index=True)
    np.testing.assert_allclose(now[predictor.codes], then[predictor.codes], atol=2e-3)
    np.testing.assert_allclose(now.ood_score, then.ood_score, rtol=.02)
    assert then.ood.tolist() != [True]*len(then)
    for column in ('decision', 'refer', 'ood'): assert now[column].astype(str).tolist() == then[column].astype(str).tolist(), column
    def members(table): return [sorted(str(codes).split('|')) for codes in table.set.dropna()]
    assert members(now) == members(then)
