"Predictions: those of the learner, of any image in any batch, in any number of threads, without fastai."
import gc, io, os, shutil, threading
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from PIL import Image

from mutate import mutated
from serving import make, spread
from skin_lesions.bundle import save_bundle, update_bundle
from skin_lesions.classes import HAM10000, ISIC2019, MELANOMA
from skin_lesions.data import ham10000_dataloaders
from skin_lesions.learner import two_stage_learner
from skin_lesions.ood import fit_ood
from skin_lesions.predict import load_predictor
from skin_lesions.predictions import check_predictions, get_predictions
from skin_lesions.readers import read_metadata
from skin_lesions.synthetic import draw_non_lesion

CODES = list(HAM10000)
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::PIL.Image.DecompressionBombWarning')


@pytest.fixture(scope='module')
def meta(sample):
    meta = read_metadata(sample)
    return meta.assign(is_valid=meta.groupby('dx').cumcount() % 5 == 0)


@pytest.fixture(scope='module')
def learn(meta): return make(meta)


@pytest.fixture(scope='module')
def bundle(learn, tmp_path_factory): return save_bundle(learn, tmp_path_factory.mktemp('bundle')/'b')


def numbers(table): return table[CODES].to_numpy(float)


def same(learn, predictor, meta, tol=1e-5):
    a, b = get_predictions(learn, meta), predictor.predict(meta, progress=False)
    assert list(a.image_id) == list(b.image_id) and b.problem.isna().all()
    assert np.ptp(numbers(a), axis=0).max() > .2, 'all images alike: the comparison shows nothing'
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


@pytest.mark.parametrize('views', [None, 'dihedral', 'multicrop'])
def test_folded_batchnorm_changes_nothing(views, meta, tmp_path):
    "A mean of two networks with an out-of-distribution score, against the network as it is, view by view; also with other weights"
    from skin_lesions.networks import EnsembleNet
    from skin_lesions.ood import answer_with_score
    from skin_lesions.predict import Predictor
    from skin_lesions.views import average_probabilities, dihedral_views
    learn, other = make(meta), make(meta, 'one')
    one = load_predictor(save_bundle(learn, tmp_path/'one'), device='cpu')
    view = {k: one.record[k] for k in ('side', 'preprocess', 'crop', 'normalization')}
    both = load_predictor(save_bundle(EnsembleNet([learn.model, other.model]), tmp_path/'b', classes=one.classes, view=view, ood=fit_ood(learn)), device='cpu')
    images = [both.prepare(p, views) for p in meta.path[:3]]
    def slowly(x): return answer_with_score(lambda *i: both.network(*i), None, x)[0], answer_with_score(both.network.classifier, both.ood, both.network.normalize(x))[1]
    def expected():
        if views is None: return slowly(torch.stack(images))
        looks = [[slowly(v) for v in (dihedral_views(x[None]) if views == 'dihedral' else x.split(1))] for x in images]
        return (np.concatenate([average_probabilities([p for p, _ in look]) for look in looks]),
                np.array([np.mean([s for _, s in look]) for look in looks]))
    def norms(net): return sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    for _ in range(2):
        (p, scores), (p_slow, scores_slow) = both.answer(images, views=views), expected()
        assert np.ptp(p, axis=0).max() > 1e-3
        np.testing.assert_allclose(p, p_slow, atol=1e-5)
        np.testing.assert_allclose(scores, scores_slow, rtol=1e-4)
        folded = both.network.fast(torch.stack(images).reshape(-1, 3, *both.size))
        assert norms(folded) == 0 < norms(both.model) and both.network.classifier is both.model
        before = p
        with torch.no_grad(): both.model.members[0].head1[-1].bias.add_(2.)
    assert np.abs(before-both.answer(images, views=views)[0]).max() > .05, 'the second copy has the new weights'


def test_hooks_see_the_layers_of_their_own_network(bundle, meta):
    predictor, seen = load_predictor(bundle, device='cpu'), []
    plain = predictor.predict(meta.path[0], progress=False)
    hook = predictor.model.body.register_forward_hook(lambda *_: seen.append(1))
    watched = predictor.predict(meta.path[0], progress=False)
    hook.remove()
    predictor.predict(meta.path[0], progress=False)
    assert len(seen) == 1
    np.testing.assert_allclose(numbers(watched), numbers(plain), atol=1e-5)


def test_after_training_and_through_a_second_bundle(meta, tmp_path):
    learn = make(meta.iloc[:60])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    spread(learn)
    first = load_predictor(save_bundle(learn, tmp_path/'a'), device='cpu')
    second = load_predictor(save_bundle(first, tmp_path/'b.zip'), device='cpu')
    a, b = (p.predict(meta.iloc[:20], progress=False) for p in (first, second))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    same(learn, first, meta.iloc[:20])
    keys = ('network', 'side', 'crop', 'normalization', 'classes', 'trained_on', 'split', 'sha256', 'channels_last')
    assert [first.record[k] for k in keys] == [second.record[k] for k in keys]


def test_all_kinds_of_images_in_any_batches(bundle, meta, tmp_path):
    predictor = load_predictor(bundle, device='cpu')
    paths = list(meta.path[:9])
    expected = numbers(predictor.predict(paths, progress=False))
    files = [Path(p).read_bytes() for p in paths]
    for images in (files, [io.BytesIO(f) for f in files], pd.Series(paths), tuple(paths), iter(paths), [Image.open(p) for p in paths]):
        np.testing.assert_allclose(numbers(predictor.predict(images, bs=4, progress=False)), expected, atol=1e-5)
    for workers in (0, 3): np.testing.assert_allclose(numbers(predictor.predict(paths, bs=2, progress=False, workers=workers)), expected, atol=1e-5)
    arrays = [np.array(Image.open(p)) for p in paths]
    decoded = numbers(predictor.predict(arrays, progress=False))
    np.testing.assert_allclose(decoded, expected, atol=.02) # a JPEG is made smaller by its decoder
    for images in (np.stack(arrays), torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2), [Image.fromarray(a) for a in arrays],
                   [np.dstack([a, np.full_like(a[..., 0], 255)]) for a in arrays], [Image.fromarray(a).convert('RGBA') for a in arrays]):
        np.testing.assert_allclose(numbers(predictor.predict(images, bs=4, progress=False)), decoded, atol=1e-5)
    one = predictor.predict(paths[0])
    assert len(one) == 1 and one.image_id[0] == Path(paths[0]).stem
    grey = predictor.predict(Image.fromarray(arrays[0]).convert('L'))
    np.testing.assert_allclose(numbers(grey), numbers(predictor.predict(np.array(Image.fromarray(arrays[0]).convert('L')))), atol=1e-7)


def test_images_of_many_sizes_in_threads(learn, bundle, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(60): Image.fromarray(rng.integers(0, 256, (*rng.integers(30, 300, 2), 3), dtype=np.uint8)).save(tmp_path/f'{i:02}.png')
    a, b = get_predictions(learn, tmp_path), load_predictor(bundle, device='cpu').predict(tmp_path, bs=16, progress=False, workers=8)
    assert np.abs(numbers(a) - numbers(b)).max() < 1e-5


def test_unreadable_files_are_rows(bundle, meta, tmp_path):
    good = Path(shutil.copy(meta.path[0], tmp_path/'a.jpg'))
    (tmp_path/'b.jpg').write_text('no image')
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
    for views in ('dihedral', 'multicrop', 'crops9'):
        expected, ours = get_predictions(learn, some, views=views), predictor.predict(some, views=views, bs=20, progress=False)
        np.testing.assert_allclose(numbers(ours), numbers(expected), atol=1e-5)


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
    by_name = predictor.predict(list(some.path), some.sample(frac=1, random_state=0)[['image_id', 'age', 'sex', 'site']], progress=False)
    np.testing.assert_allclose(numbers(by_name), ours, atol=1e-6)
    by_row = predictor.predict([Image.open(p) for p in some.path], some[['age', 'sex', 'site']], progress=False)
    np.testing.assert_allclose(numbers(by_row), ours, atol=1e-6)
    one = predictor.predict(some.path[0], dict(some.loc[0, ['age', 'sex', 'site']]))
    np.testing.assert_allclose(numbers(one)[0], ours[0], atol=1e-6)
    with pytest.warns(UserWarning, match='unknown'): unknown = predictor.predict(some.path[0])
    np.testing.assert_allclose(numbers(unknown), numbers(predictor.predict(some.path[0], dict(age=None))), atol=1e-7)
    with pytest.raises(ValueError, match='2 rows for 3'): predictor.predict(list(some.path[:3]), some[['age']].head(2), progress=False)
    assert get_predictions(predictor.learner, some.head(3)).shape[0] == 3


def test_a_pretext_network(meta, tmp_path):
    pretext = pytest.importorskip('skin_lesions.pretext')
    torch.manual_seed(0)
    dls = ham10000_dataloaders(meta, 64, 'random', 8, arch='test_efficientnet', num_workers=0, device='cpu')
    learn = pretext.joint_restoration_learner(dls, 'test_efficientnet', 'test_efficientnet', pretrained=False)
    learn.model.eval()
    predictor = load_predictor(save_bundle(learn, tmp_path/'b'), device='cpu')
    learn = Learner(dls, learn.model, loss_func=CrossEntropyLossFlat())
    a, b = get_predictions(learn, meta.iloc[:9]), predictor.predict(meta.iloc[:9], progress=False)
    assert predictor.record['network']['network'] == 'JointRestorationNet' and np.abs(numbers(a) - numbers(b)).max() < 1e-5


def test_calibration_rule_and_referral_travel(learn, meta, tmp_path):
    from skin_lesions.decide import decision_rule, fit_calibration, fit_referral
    valid, new = get_predictions(learn), meta[~meta.is_valid].head(12)
    raw = load_predictor(save_bundle(learn, tmp_path/'raw'), device='cpu').predict(new, progress=False).drop(columns=['problem', 'decision'])
    for method in ('temperature', 'stages_vector'):
        calibration = fit_calibration(valid, method, first='nv' if 'stages' in method else None)
        rule, referral = decision_rule('cost', valid), fit_referral(calibration.calibrate(valid, overlap='ignore'), .8)
        folder = save_bundle(learn, tmp_path/method, calibration=calibration, rule=rule, referral=referral)
        table, by_hand = load_predictor(folder, device='cpu').predict(new, progress=False), calibration.calibrate(raw)
        np.testing.assert_allclose(numbers(table), numbers(by_hand), atol=1e-9)
        assert list(table.decision) == list(rule.decide(by_hand)) and list(table.refer) == list(referral.refer(by_hand))
    update_bundle(folder, calibration=False, rule=False, referral=False)
    pd.testing.assert_frame_equal(load_predictor(folder, device='cpu').predict(new, progress=False).drop(columns=['problem', 'decision']), raw)


def test_grad_cam_of_a_predictor(learn, bundle, meta, tmp_path):
    from skin_lesions.gradcam import GradCAM, gradcam_folder
    predictor = load_predictor(bundle, device='cpu')
    xb = predictor.batch([predictor.prepare(p) for p in meta.path[:3]])
    maps = []
    for of in (learn, predictor.learner, predictor.model):
        with GradCAM(of, classes=CODES) as cam: maps.append(cam.cam(xb, 'mel'))
    torch.testing.assert_close(maps[0], maps[1]); torch.testing.assert_close(maps[0], maps[2])
    n, bad = gradcam_folder(predictor.learner, list(meta.path[:2]), tmp_path/'maps', show=False)
    assert n == 2 and not bad


# ---- any class set

@pytest.mark.parametrize('classes', [ISIC2019, MELANOMA], ids=lambda c: c.name)
def test_other_class_sets_from_training_to_decision(classes, sample, tmp_path):
    "Eight classes and two: learner, bundle, calibration, rule, score, and back"
    from skin_lesions.classes import classes_of, with_classes
    from skin_lesions.decide import decision_rule, fit_calibration
    from skin_lesions.ood import fit_ood
    meta = read_metadata(sample)
    dx = [list(classes)[i % len(classes)] for i in range(len(meta))]
    meta = with_classes(meta.assign(dx=dx, is_valid=np.arange(len(meta)) // len(classes) % 4 == 0), classes)
    learn = make(meta, 'two' if len(classes) > 2 else 'one')
    valid = get_predictions(learn)
    calibration = fit_calibration(valid, 'vector')
    rule = decision_rule('prior', calibration.calibrate(valid, overlap='ignore'))
    predictor = load_predictor(save_bundle(learn, tmp_path/'b', calibration=calibration, rule=rule, ood=fit_ood(learn, n=60)), device='cpu')
    assert predictor.classes == classes
    new = meta[~meta.is_valid].head(10)
    table, raw = predictor.predict(new, progress=False), get_predictions(learn, new)
    np.testing.assert_allclose(table[list(classes)], calibration.calibrate(raw)[list(classes)], atol=1e-6)
    assert classes_of(table) == classes and set(table.decision.dropna()) <= set(classes)
    assert table.decision.isna().equals(table.ood.astype(bool)) and np.isfinite(table.ood_score).all()


def test_what_is_not_a_list_is_not_one(bundle, meta):
    predictor = load_predictor(bundle, device='cpu')
    for odd in (7, dict(a=meta.path[0]), {meta.path[0]}):
        with pytest.raises(TypeError, match='is not an image'): predictor.predict(odd)
    with open(meta.path[0], 'rb') as f: assert len(predictor.predict(f)) == 1


def test_copies_in_a_folder_count_once(bundle, meta, tmp_path):
    "Kaggle's HAM10000 has each folder twice, in capitals and small letters"
    for folder in ('HAM10000_images_part_1', 'ham10000_images_part_1', 'other'):
        (tmp_path/folder).mkdir(exist_ok=True)
        for p in meta.path[:3]: shutil.copy(p, tmp_path/folder)
    assert len(load_predictor(bundle, device='cpu').predict(tmp_path, progress=False)) == 6


def test_training_images_are_known_by_their_hashes(bundle, meta):
    predictor = load_predictor(bundle, device='cpu')
    trained = set(meta.group[~meta.is_valid])
    assert list(predictor.trained_on(meta)) == [g in trained for g in meta.group]
    assert list(predictor.trained_on(meta.image_id)) == list(~meta.is_valid)
    text = b''.join((bundle/f).read_bytes() for f in ('model.safetensors', 'bundle.json'))
    assert not any(i.encode() in text for i in meta.image_id)


# ---- many images, many threads. `SKIN_LESIONS_LOAD=10000` makes it ten thousand images

N = int(os.environ.get('SKIN_LESIONS_LOAD', 2000))
PROC = Path('/proc/self')
@pytest.fixture(scope='module')
def loaded(sample, tmp_path_factory):
    torch.manual_seed(0)
    meta = read_metadata(sample)
    dls = ham10000_dataloaders(meta.assign(is_valid=[i % 4 == 0 for i in range(len(meta))]), 32, bs=16, arch='test_efficientnet', num_workers=0, device='cpu')
    learn = two_stage_learner(dls, 'test_efficientnet', pretrained=False)
    with torch.no_grad():
        learn.model.train()
        for _ in range(4): learn.model(dls.train.one_batch()[0]) # batch statistics, so that answers differ
        learn.model.eval()
    return load_predictor(save_bundle(learn, tmp_path_factory.mktemp('load')/'b', ood=fit_ood(learn, n=60)), device='cpu')


@pytest.fixture(scope='module')
def files(sample, tmp_path_factory):
    "Fifty images of 300 x 225, 200 KB each when decoded, and ten broken files"
    from PIL import Image
    folder, out = tmp_path_factory.mktemp('files'), []
    for i, path in enumerate(sorted(Path(sample).rglob('ISIC_*.jpg'))[:50]):
        with Image.open(path) as im: im.resize((300, 225)).save(folder/f'{i:02}.jpg')
        out.append(folder/f'{i:02}.jpg')
    broken = [d for k, d in mutated(120, seed=1) if k in ('truncated', 'wrong_type', 'zero_bytes')][:10]
    for i, data in enumerate(broken):
        (folder/f'broken{i}.jpg').write_bytes(data)
        out.append(folder/f'broken{i}.jpg')
    return out


def memory(): return int((PROC/'statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20
def still_open():
    "Open files, pipes and sockets by what they are, and running threads"
    gc.collect() # what earlier tests left for the collector is closed now, not in the middle of this one
    found = Counter(threading.enumerate())
    for fd in (PROC/'fd').iterdir() if PROC.exists() else ():
        try: found[os.readlink(fd)] += 1
        except FileNotFoundError: pass # the handle that lists the folder
    return found


@pytest.mark.skipif(not (PROC/'statm').exists(), reason='memory and handles are read from /proc')
@pytest.mark.parametrize('workers', [0, 4])
def test_many_images_in_one_call(loaded, files, workers):
    n, seen = N if workers else N//4, {}
    once = loaded.predict(files, bs=len(files), progress=False, workers=0)
    before = still_open()
    def stream():
        for i in range(n):
            if i in (n//4, n-1): seen[i] = memory()
            yield files[i % len(files)]
    table = loaded.predict(stream(), bs=len(files), progress=False, workers=workers)
    assert not still_open() - before
    grown = seen[n-1] - seen[n//4]
    print(f'{n} images, {workers} threads: {seen[n//4]:.0f} MB after {n//4}, {seen[n-1]:.0f} MB at the end')
    assert grown < 40, f'{grown:.0f} MB more after {n} images than after {n//4}'
    assert len(table) == n and table.image_id.is_unique
    whole = n - n % len(files) # full batches are bitwise the same
    expected = pd.concat([once]*(n//len(files)), ignore_index=True)
    pd.testing.assert_frame_equal(table.head(whole).drop(columns='image_id'), expected.drop(columns='image_id'), check_exact=True)
    np.testing.assert_allclose(table[CODES][whole:], once[CODES][:n-whole], atol=1e-6)


def test_sixteen_threads_give_what_one_gives(loaded, files):
    "Each with its own images, so that an image in the wrong thread would show; half of them look eight times"
    jobs = [([*files[i::16], draw_non_lesion('text', i, size=(90, 70))], 'dihedral' if i % 2 else None) for i in range(16)]
    ask = lambda job: loaded.predict(job[0], bs=2, progress=False, views=job[1], workers=2)
    alone = [ask(j) for j in jobs]
    before, start, found = still_open(), threading.Barrier(16), {}
    def work(i):
        start.wait()
        found[i] = ask(jobs[i])
    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not still_open() - before
    for i, a in enumerate(alone): pd.testing.assert_frame_equal(found[i], a, check_exact=True)
    assert len({round(float(a.nv.dropna().sum()), 6) for a in alone}) > 8 # answers do differ from thread to thread
    assert not loaded.model.body._forward_hooks


@pytest.mark.skipif(not (PROC/'fd').exists(), reason='handles are read from /proc')
def test_a_file_left_open_and_a_thread_left_running_are_noticed(files):
    before, done = still_open(), threading.Event()
    with open(files[0], 'rb'):
        assert still_open() - before == Counter([str(files[0])])
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert still_open() - before == Counter([thread])
    done.set(); thread.join()
    assert not still_open() - before
