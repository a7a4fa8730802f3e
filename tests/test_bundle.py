"Bundles: nothing in them runs, what is wrong is named, and the probabilities are those of the Learner."
import importlib.util, json, os, pickle, shutil, time, zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import RandomResizedCrop
from PIL import Image

from skin_lesions.core import CODES
from skin_lesions.data import ham10000_dataloaders
from skin_lesions.readers import read_metadata
from skin_lesions.learner import lesion_learner, two_stage_learner
from skin_lesions.onnx import ONNX_PACKAGES
from skin_lesions.onnx import export_onnx
from skin_lesions.predict import load_predictor
from skin_lesions.bundle import read_bundle, save_bundle, update_bundle
from skin_lesions.predictions import check_predictions, get_predictions

CODES = list(CODES)


@pytest.fixture(scope='module')
def meta(sample):
    meta = read_metadata(sample)
    return meta.assign(is_valid=meta.groupby('dx').cumcount() % 5 == 0)


def make(meta, kind='two', size=64, crop='random', arch='test_efficientnet', data=None, **kwargs):
    "A learner with random weights whose answers differ from picture to picture"
    torch.manual_seed(0); np.random.seed(0)
    dls = ham10000_dataloaders(meta, size, crop, 8, arch=arch, num_workers=0, device='cpu', **(data or {}))
    learn = (two_stage_learner if kind == 'two' else lesion_learner)(dls, arch, pretrained=False, alpha=None, **kwargs)
    spread(learn)
    return learn


def spread(learn):
    "Give the last layers outputs of mean 0 and deviation 1 over some pictures"
    batches = [learn.dls.train.one_batch()[:-1] for _ in range(4)]
    with torch.no_grad():
        for b in batches: learn.model.train()(*b) # batch statistics
        learn.model.eval()
        for last in (getattr(learn.model, n)[-1] for n in ('head', 'head1', 'head2') if hasattr(learn.model, n)):
            kept = []
            hook = last.register_forward_hook(lambda m, i, o: kept.append(o))
            for b in batches: learn.model(*b)
            hook.remove()
            mean, std = torch.cat(kept).mean(0), torch.cat(kept).std(0)
            last.weight.div_(std[:, None]); last.bias.sub_(mean).div_(std)


@pytest.fixture(scope='module')
def learn(meta): return make(meta)


@pytest.fixture(scope='module')
def bundle(learn, tmp_path_factory): return save_bundle(learn, tmp_path_factory.mktemp('bundle')/'b')


def changed(bundle, folder, **changes):
    shutil.copytree(bundle, folder)
    record = json.loads((folder/'bundle.json').read_text())
    (folder/'bundle.json').write_text(json.dumps(record | changes))
    return folder


def numbers(table): return table[CODES].to_numpy(float)


def same(learn, predictor, meta, tol=1e-5):
    a, b = get_predictions(learn, meta), predictor.predict(meta, progress=False)
    assert list(a.image_id) == list(b.image_id) and b.problem.isna().all()
    assert np.ptp(numbers(a), axis=0).max() > .2, 'all pictures alike: the comparison shows nothing'
    assert np.abs(numbers(a) - numbers(b)).max() < tol


# ---- the same probabilities

@pytest.mark.parametrize('kind, crop, channels_last, more', [
    ('two', 'random', True, {}), ('two', 'resize', False, dict(shared=False)), ('one', 'window', True, {}), ('one', 'random', False, dict(hidden=(), ps=0.)),
    ('two', 'random', False, dict(combine='paper'))])
def test_the_probabilities_of_the_learner(kind, crop, channels_last, more, meta, tmp_path):
    learn = make(meta, kind, crop=crop, channels_last=channels_last, **more)
    predictor = load_predictor(save_bundle(learn, tmp_path/'b'), device='cpu')
    assert predictor.record['channels_last'] is channels_last
    same(learn, predictor, meta[meta.is_valid])
    assert [p.stride() for p in learn.model.parameters()] == [p.stride() for p in predictor.model.parameters()]


def test_after_training_and_through_a_second_bundle(meta, tmp_path):
    learn = make(meta.iloc[:60])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    spread(learn)
    first = load_predictor(save_bundle(learn, tmp_path/'a'), device='cpu')
    second = load_predictor(save_bundle(first.learner, tmp_path/'b.zip'), device='cpu')
    a, b = (p.predict(meta.iloc[:20], progress=False) for p in (first, second))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    same(learn, first, meta.iloc[:20])
    keys = ('network', 'crop', 'normalization', 'classes', 'sha256', 'channels_last')
    assert [first.record[k] for k in keys] == [second.record[k] for k in keys]


def test_all_kinds_of_pictures_in_any_batches(bundle, meta, tmp_path):
    predictor = load_predictor(bundle, device='cpu')
    paths = list(meta.path[:9])
    expected = numbers(predictor.predict(paths, progress=False))
    arrays = [np.array(Image.open(p)) for p in paths]
    many = (arrays, [Image.fromarray(a) for a in arrays], [torch.tensor(a).permute(2, 0, 1) for a in arrays], np.stack(arrays), iter(arrays), [Path(p).read_bytes() for p in paths],
            [np.dstack([a, np.full_like(a[..., 0], 255)]) for a in arrays], [Image.fromarray(a).convert('RGBA') for a in arrays])
    for images in many: np.testing.assert_allclose(numbers(predictor.predict(images, bs=4, progress=False)), expected, atol=1e-5)
    for workers in (0, 3): np.testing.assert_allclose(numbers(predictor.predict(paths, bs=2, progress=False, workers=workers)), expected, atol=1e-5)
    one = predictor.predict(paths[0])
    assert len(one) == 1 and one.image_id[0] == Path(paths[0]).stem
    grey = predictor.predict(Image.fromarray(arrays[0]).convert('L'))
    np.testing.assert_allclose(numbers(grey), numbers(predictor.predict(np.array(Image.fromarray(arrays[0]).convert('L')))), atol=1e-7)


def test_pictures_of_many_sizes_in_threads(learn, bundle, tmp_path, monkeypatch):
    "fastai's crop remembers the size of the last picture; threads must not see each other's"
    original = RandomResizedCrop.before_call
    def slow(self, b, split_idx):
        original(self, b, split_idx)
        time.sleep(.003) # time for another thread to put its size there
    monkeypatch.setattr(RandomResizedCrop, 'before_call', slow)
    rng = np.random.default_rng(0)
    for i in range(60): Image.fromarray(rng.integers(0, 256, (*rng.integers(30, 300, 2), 3), dtype=np.uint8)).save(tmp_path/f'{i:02}.png')
    a, b = get_predictions(learn, tmp_path), load_predictor(bundle, device='cpu').predict(tmp_path, bs=16, progress=False, workers=8)
    assert np.abs(numbers(a) - numbers(b)).max() < 1e-5


def test_unreadable_files_are_rows(bundle, meta, tmp_path):
    good = Path(shutil.copy(meta.path[0], tmp_path/'a.jpg'))
    (tmp_path/'b.jpg').write_text('no picture')
    (tmp_path/'c.jpg').write_bytes(good.read_bytes()[:3000])
    (tmp_path/'d.png').write_bytes(b'')
    Image.new('I;16', (20, 20)).save(tmp_path/'e.png')
    (tmp_path/'f').mkdir(); shutil.copy(good, tmp_path/'f'/'a.jpg')
    predictor = load_predictor(bundle, device='cpu')
    for bs in (1, 2, 64):
        table = predictor.predict(tmp_path, bs=bs, progress=False)
        assert list(table.problem.isna()) == [True, False, False, False, False, True]
        assert table.image_id.is_unique
        assert 'not an image of a kind' in table.problem[1] and 'truncated' in table.problem[2] and '8 bits' in table.problem[4]
        assert np.isnan(numbers(table[table.problem.notna()])).all()
        check_predictions(table[table.problem.isna()])
    assert predictor.predict(tmp_path/'b.jpg').problem[0]
    assert predictor.predict([tmp_path/'gone.jpg', 3, np.zeros((4, 4, 2), np.uint8)], progress=False).problem.notna().all()


def test_test_time_augmentation_is_that_of_the_learner(learn, bundle, meta):
    predictor = load_predictor(bundle, device='cpu')
    some = meta[meta.is_valid].iloc[:6]
    for tta in ('dihedral', 'multicrop', 'crops9'):
        assert np.abs(numbers(get_predictions(learn, some, tta=tta)) - numbers(predictor.predict(some, tta=tta, bs=20, progress=False))).max() < 1e-5


def test_preprocessing_travels(meta, tmp_path):
    preprocess = pytest.importorskip('skin_lesions.preprocess')
    learn = make(meta, data=dict(item_tfms=[preprocess.ShadesOfGray()]))
    predictor = load_predictor(save_bundle(learn, tmp_path/'b'), device='cpu')
    assert [p['name'] for p in predictor.record['preprocess']] == ['ShadesOfGray']
    same(learn, predictor, meta[meta.is_valid].iloc[:10])
    plain = make(meta)
    assert np.abs(numbers(get_predictions(plain, meta.iloc[:10])) - numbers(predictor.predict(meta.iloc[:10], progress=False))).max() > 1e-4


def test_patient_data_travels(meta, tmp_path):
    learn = make(meta, data=dict(patient=True))
    predictor = load_predictor(save_bundle(learn, tmp_path/'b'), device='cpu')
    some = meta[meta.is_valid].reset_index(drop=True)
    same(learn, predictor, some)
    ours = numbers(predictor.predict(some, progress=False))
    by_name = predictor.predict(list(some.path), some.sample(frac=1, random_state=0)[['image_id', 'age', 'sex', 'localization']], progress=False)
    np.testing.assert_allclose(numbers(by_name), ours, atol=1e-6)
    by_row = predictor.predict([Image.open(p) for p in some.path], some[['age', 'sex', 'localization']], progress=False)
    np.testing.assert_allclose(numbers(by_row), ours, atol=1e-6)
    one = predictor.predict(some.path[0], dict(some.loc[0, ['age', 'sex', 'localization']]))
    np.testing.assert_allclose(numbers(one)[0], ours[0], atol=1e-6)
    with pytest.warns(UserWarning, match='unknown'): unknown = predictor.predict(some.path[0])
    np.testing.assert_allclose(numbers(unknown), numbers(predictor.predict(some.path[0], dict(age=None))), atol=1e-7)
    with pytest.raises(ValueError, match='2 rows for 3'): predictor.predict(list(some.path[:3]), some[['age']].head(2), progress=False)
    assert get_predictions(predictor.learner, some.head(3)).shape[0] == 3


def test_a_pretext_network(meta, tmp_path):
    pretext = pytest.importorskip('skin_lesions.pretext')
    torch.manual_seed(0)
    dls = ham10000_dataloaders(meta, 64, 'random', 8, arch='test_efficientnet', num_workers=0, device='cpu')
    learn = pretext.joint_restoration_learner(dls, 'test_efficientnet', 'test_efficientnet', pretrained=False, alpha=None)
    learn.model.eval()
    predictor = load_predictor(save_bundle(learn, tmp_path/'b'), device='cpu')
    learn = Learner(dls, learn.model, loss_func=CrossEntropyLossFlat())
    a, b = get_predictions(learn, meta.iloc[:9]), predictor.predict(meta.iloc[:9], progress=False)
    assert predictor.record['network']['network'] == 'JointRestorationNet' and np.abs(numbers(a) - numbers(b)).max() < 1e-5


def test_calibration_rule_and_referral_travel(learn, meta, tmp_path):
    from skin_lesions.decide import decision_rule, fit_calibration, fit_referral
    valid, new = get_predictions(learn), meta[~meta.is_valid].head(12)
    raw = load_predictor(save_bundle(learn, tmp_path/'raw'), device='cpu').predict(new, progress=False).drop(columns='problem')
    for method in ('temperature', 'stages_vector'):
        calibration = fit_calibration(valid, method)
        rule, referral = decision_rule('cost', valid), fit_referral(calibration.calibrate(valid, overlap='ignore'), .8)
        folder = save_bundle(learn, tmp_path/method, calibration=calibration, rule=rule, referral=referral)
        table, by_hand = load_predictor(folder, device='cpu').predict(new, progress=False), calibration.calibrate(raw)
        np.testing.assert_allclose(numbers(table), numbers(by_hand), atol=1e-9)
        assert list(table.decision) == list(rule.decide(by_hand)) and list(table.refer) == list(referral.refer(by_hand))
    update_bundle(folder, calibration=False, rule=False, referral=False)
    pd.testing.assert_frame_equal(load_predictor(folder, device='cpu').predict(new, progress=False).drop(columns='problem'), raw)


def test_grad_cam_of_a_predictor(learn, bundle, meta, tmp_path):
    from skin_lesions.gradcam import GradCAM, gradcam_folder
    predictor = load_predictor(bundle, device='cpu')
    xb = predictor.batch([predictor.prepare(p) for p in meta.path[:3]])
    maps = []
    for of in (learn, predictor.learner, predictor.model):
        with GradCAM(of) as cam: maps.append(cam.cam(xb, 'mel'))
    torch.testing.assert_close(maps[0], maps[1]); torch.testing.assert_close(maps[0], maps[2])
    n, bad = gradcam_folder(predictor.learner, list(meta.path[:2]), tmp_path/'maps', show=False)
    assert n == 2 and not bad


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
        with pytest.raises(ValueError, match='is no bundle'): load_predictor(tmp_path/alone)
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


@pytest.mark.parametrize('change, said', [
    (lambda s: s.pop('head1.1.bias'), 'missing: head1.1.bias'),
    (lambda s: s.update(extra=torch.zeros(1)), 'not in the network: extra'),
    (lambda s: s.update({'head1.1.bias': s['head1.1.bias'][:-1]}), r'other shape: head1.1.bias \(511,\) instead of \(512,\)'),
    (lambda s: s.update({'head1.1.bias': s['head1.1.bias'].half()}), 'other type: head1.1.bias torch.float16 instead of torch.float32')])
def test_tensors_that_do_not_fit(change, said, bundle, tmp_path):
    with pytest.raises(ValueError, match=said): load_predictor(resaved(bundle, tmp_path/'b', change))


def test_one_flipped_bit_in_the_tensors(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path/'b')
    data = bytearray((bundle/'model.safetensors').read_bytes())
    data[-1000] ^= 1
    (tmp_path/'b'/'model.safetensors').write_bytes(data)
    with pytest.raises(ValueError, match='model.safetensors has the checksum'): load_predictor(tmp_path/'b')
    (tmp_path/'b'/'model.safetensors').write_bytes(data[:-1000])
    with pytest.raises(ValueError, match='model.safetensors holds no tensors'): load_predictor(tmp_path/'b')


@pytest.mark.parametrize('changes, said', [
    (dict(format_version=2), 'format version 2.*reads up to 1.*pip install -U'), (dict(format_version=1.5), 'format_version must be'), (dict(format='other'), 'no record of a bundle'),
    (dict(network={'network': 'LessonNet'}), "unknown network 'LessonNet'; did you mean 'LesionNet'"), (dict(network={'network': 'TwoStageNet'}), 'TwoStageNet'), (dict(network=None), "'network' must be"),
    (dict(classes=CODES[:6]), "'classes' must be"), (dict(crop=dict(name='rendom', size=[64, 64])), "unknown crop 'rendom'"), (dict(crop=dict(name='random', size=[64, 64], zoom=2)), 'zoom'),
    (dict(normalization=dict(mean=[0, 0, 0], std=[1, 1, 0])), 'std > 0'), (dict(preprocess=[dict(name='Sharpen')]), 'Sharpen|preprocess'), (dict(sha256='1'*64), 'checksum'),
    (dict(calibration=dict(kind='spell')), 'calibration|spell'), (dict(rule=[1]), "'rule' must be")])
def test_faults_of_the_record(changes, said, bundle, tmp_path):
    with pytest.raises(ValueError, match=said): load_predictor(changed(bundle, tmp_path/'b', **changes))


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
    for key in ('network', 'classes', 'crop', 'normalization', 'preprocess', 'sha256', 'patient', 'calibration', 'rule', 'channels_last'):
        (folder/'bundle.json').write_text(json.dumps({k: v for k, v in record.items() if k != key}))
        with pytest.raises(ValueError, match=f"lacks '{key}'"): load_predictor(folder)


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
    other, original, calls = load_predictor(bundle, device='cpu').learner, os.replace, []
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
    assert record['format_version'] == 1 and 'not a medical device' in record['notice'] and record['classes'] == CODES
    assert record['split']['train_images'] == int((~meta.is_valid).sum()) and sum(record['split']['valid_counts'].values()) == int(meta.is_valid.sum())
    assert 0 <= record['split']['valid_share_with_lesion_in_training'] <= 1
    assert record['versions']['torch'] and record['network']['arch'] == 'test_efficientnet' and record['crop']['size'] == [64, 64]


# ---- ONNX

needs_onnx = pytest.mark.skipif(not all(importlib.util.find_spec(p) for p in ONNX_PACKAGES), reason=f"needs the packages {', '.join(ONNX_PACKAGES)}")


@needs_onnx
@pytest.mark.parametrize('kind, more', [('one', {}), ('two', dict(combine='paper')), ('two', dict(data=dict(patient=True)))])
def test_onnx_gives_the_probabilities_of_the_predictor(kind, more, meta, tmp_path):
    import onnx, onnxruntime
    from skin_lesions.decide import fit_calibration
    learn = make(meta, kind, **more)
    save_bundle(learn, tmp_path/'b', calibration=fit_calibration(get_predictions(learn), 'stages_vector' if kind == 'two' else 'vector'))
    predictor, some = load_predictor(tmp_path/'b', device='cpu'), meta[~meta.is_valid].iloc[:64]
    assert export_onnx(predictor, tmp_path/'net.onnx') <= 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path/'net.onnx'), providers=['CPUExecutionProvider'])
    assert [p.name for p in tmp_path.glob('net*')] == ['net.onnx'], 'weights outside the file'
    inputs = {'pixels': torch.stack([predictor.prepare(p) for p in some.path]).permute(0, 2, 3, 1).contiguous().numpy()}
    if predictor.patient is not None: inputs['patient'] = np.asarray(predictor.patient.encode(some), dtype=np.float32)
    table = predictor.predict(some, progress=False)
    assert len(table) == 64 and np.abs(session.run(None, inputs)[0] - numbers(table)).max() < 1e-4
    assert np.abs(session.run(None, {k: v[:5] for k, v in inputs.items()})[0] - numbers(table)[:5]).max() < 1e-4
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said['classes']) == CODES and 'not a medical device' in said['notice'] and json.loads(said['crop'])['size'] == [64, 64]


@needs_onnx
def test_onnx_that_differs_is_not_written(bundle, tmp_path):
    predictor = load_predictor(bundle, device='cpu')
    with pytest.raises(ValueError, match='differ from PyTorch'): export_onnx(predictor, tmp_path/'net.onnx', tol=0)
    assert not list(tmp_path.iterdir())


def test_without_the_onnx_packages_one_line(bundle, tmp_path, monkeypatch):
    real = importlib.import_module
    def without(name, *args):
        if name == 'onnxscript': raise ModuleNotFoundError("No module named 'onnxscript'", name='onnxscript')
        return real(name, *args)
    monkeypatch.setattr(importlib, 'import_module', without)
    with pytest.raises(ModuleNotFoundError, match=r'export_onnx needs onnx\w*: pip install onnx onnxscript onnxruntime'): export_onnx(load_predictor(bundle), tmp_path/'net.onnx')
