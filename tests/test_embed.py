"Frozen features and probes: the cache, what it is keyed by, and the probes against plain scikit-learn."
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from skin_lesions import embed as rooms
from skin_lesions.bundle import bundle_content, image_view, save_bundle
from skin_lesions.classes import HAM10000, class_set, with_classes
from skin_lesions.embed import (Embedder, Features, FeatureStore, crt_probe, embed_images, knn_probe, probe, read_features,
                                save_features)
from skin_lesions.networks import LesionNet, TwoStageNet, create_body
from skin_lesions.predict import Predictor
from skin_lesions.predictions import check_predictions, read_predictions, save_predictions
from skin_lesions.soup import classifier_inputs, logits_from_inputs, retrain_classifier
from skin_lesions.split import lesion_folds, split_by_lesion
from skin_lesions.synthetic import synthetic_ham10000

CODES = list(HAM10000)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    files = [folder/f'{i}.png' for i in range(11)]
    for f in files: Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(f)
    return files


@pytest.fixture(scope='module')
def embedder():
    torch.manual_seed(0)
    return Embedder('test_efficientnet', 32, pretrained=False, device='cpu')


def counted(monkeypatch, embedder):
    "How many images go through the network"
    seen, call = [], Embedder.__call__
    monkeypatch.setattr(Embedder, '__call__', lambda self, batch: (seen.append(len(batch)), call(self, batch))[1])
    return seen


def artificial(seed=0, n=240, d=12, signal=2., classes=7):
    "Features with a direction for each class, two images a lesion"
    rng = np.random.default_rng(seed)
    y = np.arange(n)//2 % classes
    x = rng.normal(size=(n, d))*np.linspace(.5, 3, d)+rng.normal(size=d)
    x[np.arange(n), y] += signal
    frame = pd.DataFrame(dict(image_id=[f'i{i:03d}' for i in range(n)], dx=np.array(CODES)[y], group=[f'g{i//2}' for i in range(n)]))
    return Features(with_classes(frame, HAM10000), x.astype(np.float32), dict(network='none', at='body'), pd.DataFrame(columns=['image_id', 'problem']))


# ---- features

def test_a_second_time_nothing_is_computed(images, embedder, tmp_path, monkeypatch):
    first = embed_images(images, embedder, cache=tmp_path, bs=4, show=False)
    seen = counted(monkeypatch, embedder)
    again = embed_images(images, embedder, cache=tmp_path, show=False)
    assert not seen and np.array_equal(first.x, again.x)
    renamed = tmp_path/'other.png'
    renamed.write_bytes(images[0].read_bytes())
    assert np.array_equal(embed_images([renamed], embedder, cache=tmp_path, show=False).x, first.x[:1]) and not seen
    Image.new('RGB', (50, 60), (9, 9, 9)).save(renamed)
    assert not np.array_equal(embed_images([renamed], embedder, cache=tmp_path, show=False).x, first.x[:1]) and seen == [1]


@pytest.mark.parametrize('change', ['weights', 'size', 'crop', 'timm', 'at'])
def test_the_cache_knows_what_features_depend_on(change, images, tmp_path, monkeypatch):
    def made(size=32, **kwargs):
        torch.manual_seed(0)
        return Embedder('test_efficientnet', size, pretrained=False, device='cpu', **kwargs)
    one = made()
    if change == 'weights': (other := made()).net.conv_stem.weight.data[0, 0, 0, 0] += 1e-3; other.settings = rooms._settings(other)
    elif change == 'size': other = made(40)
    elif change == 'crop': other = made(crop='resize')
    elif change == 'timm': monkeypatch.setattr(rooms.timm, '__version__', '0'); other = made()
    else: other = one; other.settings = one.settings | dict(at='head')
    embed_images(images[:3], one if change != 'at' else made(), cache=tmp_path, show=False)
    seen = counted(monkeypatch, other)
    embed_images(images[:3], other, cache=tmp_path, show=False)
    assert seen == [3] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('cut', [1, 20, 41, 42, 60])
def test_a_kill_while_writing(cut, tmp_path):
    "Whatever is cut off the index or the rows, what is left is right, and the store goes on"
    rng, n = np.random.default_rng(cut), 5
    x, digests = rng.normal(size=(4, n)).astype(np.float32), [f'{i:032x}' for i in range(4)]
    for name in ('index_file', 'rows_file'):
        store = FeatureStore(tmp_path/name, dict(a=1), n)
        store.add(digests[:2], x[:2])
        store.add(digests[2:], x[2:])
        file = getattr(store, name)
        file.write_bytes(file.read_bytes()[:-cut])
        again = FeatureStore(tmp_path/name, dict(a=1), n)
        assert 0 < len(again) < 4
        again.add(digests, x)
        last = FeatureStore(tmp_path/name, dict(a=1), n)
        assert all(np.array_equal(last.get(d), row) for d, row in zip(digests, x))


def test_two_processes_share_a_store(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    one, two = (FeatureStore(tmp_path, dict(a=1), 3) for _ in range(2))
    one.add(['a'*32], x[:1])
    two.add(['b'*32, 'c'*32], x[1:3])
    one.add(['d'*32], x[3:])
    for store in (one, FeatureStore(tmp_path, dict(a=1), 3)):
        assert [store.get(c*32).tolist() for c in 'abcd'] == x.tolist()


def test_features_are_those_of_the_network(images, embedder):
    features = embed_images(images, embedder, bs=4, workers=0, show=False)
    with torch.no_grad(): x = embedder.net(embedder.pixels.normalize(torch.stack([embedder.prepare(f) for f in images])))
    np.testing.assert_allclose(features.x, x.numpy(), atol=1e-5)
    arrays = embed_images([np.asarray(Image.open(f)) for f in images], embedder, show=False)
    np.testing.assert_allclose(arrays.x, features.x, atol=1e-5)


def test_unreadable_images_are_named(images, embedder, tmp_path):
    (tmp_path/'torn.png').write_bytes(images[0].read_bytes()[:200])
    frame = pd.DataFrame(dict(path=[images[0], tmp_path/'torn.png', tmp_path/'gone.png', images[1]], dx=['nv', 'mel', 'nv', 'bcc']))
    with pytest.warns(UserWarning, match='2 of 4 images cannot be read'):
        found = embed_images(frame, embedder, cache=tmp_path/'cache', show=False)
    assert list(found.frame.dx) == ['nv', 'bcc'] and list(found.unreadable.image_id) == ['torn', 'gone']
    assert 'no such file' in found.unreadable.problem[1]


def predictor_of(net, trained_on=None):
    record, tensors = bundle_content(net.eval(), classes=HAM10000, view=image_view(32, arch='test_efficientnet'), trained_on=trained_on)
    return Predictor(net, record, tensors, 'cpu')


def body(): return create_body('test_efficientnet', pretrained=False)


@pytest.mark.parametrize('kind', ['one', 'shared', 'two_bodies'])
def test_a_trained_network(kind, images, tmp_path):
    torch.manual_seed(0)
    net = dict(one=lambda: LesionNet(body(), 7, hidden=(16,)), shared=lambda: TwoStageNet(body(), n_out=7, first=5, hidden=(16,)),
               two_bodies=lambda: TwoStageNet(body(), body(), n_out=7, first=5, hidden=(16,)))[kind]()
    predictor = predictor_of(net)
    x = predictor.batch([predictor.prepare(f) for f in images])
    bodies = [b for b in (net.body, getattr(net, 'body2', None)) if b is not None]
    with torch.no_grad(): by_hand = torch.cat([b(x) for b in bodies], 1).numpy()
    np.testing.assert_allclose(embed_images(images, predictor, show=False).x, by_hand, atol=1e-5)
    heads = embed_images(images, predictor, at='head', show=False)
    assert heads.x.shape == (11, 16 if kind == 'one' else 32)
    inputs = classifier_inputs(net, [(x,)])
    np.testing.assert_allclose(heads.x, np.concatenate(list(inputs.values()), 1), atol=1e-5)
    save_bundle(predictor, tmp_path/'bundle')
    np.testing.assert_allclose(embed_images(images, str(tmp_path/'bundle'), show=False, device='cpu').x, by_hand, atol=1e-5)


def test_features_as_a_file(tmp_path):
    features = artificial()
    features.seen = np.arange(240) % 3 == 0
    features.frame = split_by_lesion(features.frame)
    features.frame.loc[3, 'group'] = None
    read = read_features(save_features(features, tmp_path/'new'/'f.npz'))
    assert np.array_equal(read.x, features.x) and np.array_equal(read.seen, features.seen)
    pd.testing.assert_frame_equal(read.frame.fillna(''), features.frame.fillna(''), check_dtype=False)
    assert read.frame.group.isna().sum() == 1
    np.savez_compressed(tmp_path/'packed.npz', x=np.zeros(10**6))
    with pytest.raises(ValueError, match='compressed'): read_features(tmp_path/'packed.npz')
    np.savez(tmp_path/'pickled.npz', x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match='holds no features'): read_features(tmp_path/'pickled.npz')
    with pytest.raises(FileNotFoundError): read_features(tmp_path/'never.npz')


# ---- probes

@pytest.mark.parametrize('alpha', [None, 'inverse', 'sqrt'])
@pytest.mark.parametrize('d', [12, 300]) # more features than images: the fit is in the space of the rows
def test_a_probe_is_scikit_learn_s(alpha, d):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    features = artificial(n=180, d=d)
    features.frame = split_by_lesion(features.frame.iloc[np.r_[0:140, 150:180]].reset_index(drop=True))
    features = replace(features, x=features.x[np.r_[0:140, 150:180]])
    table = probe(features, alpha=alpha, penalties=[.03])
    valid = features.frame.is_valid.to_numpy()
    dx = features.frame.dx[~valid]
    n = dx.value_counts()
    weight = {None: n*0+1., 'inverse': 1/n, 'sqrt': n**-.5}[alpha]
    weight = (weight*len(dx)/(weight*n).sum()).to_dict()
    scaler = StandardScaler().fit(features.x[~valid])
    model = LogisticRegression(C=1/(.03*len(dx)), class_weight=weight, max_iter=5000, tol=1e-6).fit(scaler.transform(features.x[~valid]), dx)
    expected = model.predict_proba(scaler.transform(features.x[valid]))
    np.testing.assert_allclose(table[list(model.classes_)], expected, atol=2e-3)
    assert list(table.image_id) == list(features.frame.image_id[valid])


def test_neighbours_are_scikit_learn_s():
    from sklearn.neighbors import KNeighborsClassifier
    features = artificial()
    features.frame = split_by_lesion(features.frame)
    valid = features.frame.is_valid.to_numpy()
    table = knn_probe(features, alpha=None, neighbours=[9])
    model = KNeighborsClassifier(9, metric='cosine').fit(features.x[~valid], features.frame.dx[~valid])
    prior = features.frame.dx[~valid].value_counts(normalize=True)[model.classes_].to_numpy()
    expected = (9*model.predict_proba(features.x[valid])+prior)/10
    np.testing.assert_allclose(table[list(model.classes_)], expected, atol=1e-6)


@pytest.mark.parametrize('judge', [probe, knn_probe])
def test_out_of_fold_by_lesion(judge, tmp_path):
    features = artificial()
    table = judge(features, k=3, inner=2)
    check_predictions(table, classes=HAM10000)
    assert list(table.image_id) == list(features.frame.image_id) and (table.groupby('group').fold.nunique() == 1).all()
    assert np.array_equal(table.fold, lesion_folds(features.frame, 3).fold)
    assert np.mean(table[CODES].idxmax(axis=1) == table.dx) > .3
    read = read_predictions(save_predictions(table, tmp_path/'t.csv'))
    np.testing.assert_array_equal(read[CODES], table[CODES])


@pytest.mark.parametrize('judge', [probe, knn_probe])
def test_what_is_reported_takes_no_part_in_the_choice(judge):
    "Other diagnoses of the validation images change no probability"
    features = artificial(signal=1.)
    features.frame = split_by_lesion(features.frame)
    one = judge(features)
    wrong = features.frame.assign(dx=np.where(features.frame.is_valid, 'nv', features.frame.dx))
    two = judge(replace(features, frame=wrong))
    np.testing.assert_array_equal(one[CODES], two[CODES])
    assert one.attrs['chosen'] == two.attrs['chosen']


def test_the_penalty_is_the_best_on_inner_folds():
    features = artificial(signal=1.)
    features.frame = split_by_lesion(features.frame)
    chosen = probe(features, alpha=None, penalties=(1e-3, .1, 10.)).attrs['chosen'][0]
    train = features.frame[~features.frame.is_valid].drop(columns='is_valid').reset_index(drop=True)
    inside = replace(features, frame=train, x=features.x[~features.frame.is_valid.to_numpy()])
    def loss(penalty):
        table = probe(inside, alpha=None, penalties=[penalty], k=3)
        return -np.log(table[CODES].to_numpy()[np.arange(len(table)), table.dx.map(CODES.index)]).mean()
    assert chosen == min((1e-3, .1, 10.), key=loss)


def test_nothing_is_found_where_there_is_nothing():
    hits = [np.mean(t[CODES].idxmax(axis=1) == t.dx) for t in (probe(artificial(seed, signal=0.), penalties=[.1]) for seed in range(5))]
    assert abs(np.mean(hits)-1/7) < .05


def test_classes_without_images():
    features = artificial(classes=3)
    table = probe(features, penalties=[.1])
    assert (table[CODES[3:]] == 0).all(axis=None) and np.allclose(table[CODES].sum(axis=1), 1)
    two = artificial(classes=2)
    two = replace(two, frame=with_classes(two.frame, class_set(CODES[:2])))
    assert np.mean(probe(two)[CODES[:2]].idxmax(axis=1) == two.frame.dx) > .7


@pytest.mark.parametrize('two_stages', [False, True])
def test_crt_is_the_soup_room_s(two_stages, images):
    torch.manual_seed(0)
    net = TwoStageNet(body(), n_out=7, first=5, hidden=(12,)) if two_stages else LesionNet(body(), 7, hidden=(24,))
    predictor, features = predictor_of(net), artificial(d=24)
    features.frame = split_by_lesion(features.frame)
    features.settings = embed_images(images[:1], predictor, at='head', show=False).settings
    table, valid = crt_probe(predictor, features, Cs=[.05]), features.frame.is_valid.to_numpy()
    def inputs(x): return dict(head1=x[:, :12], head2=x[:, 12:]) if two_stages else dict(head=x)
    y = features.frame.dx.map(CODES.index).to_numpy()
    expected = logits_from_inputs(retrain_classifier(net, inputs(features.x[~valid]), y[~valid], .05), inputs(features.x[valid]))
    np.testing.assert_allclose(table[CODES], expected.softmax(1), atol=1e-6)
    other = predictor_of(LesionNet(body(), 7, hidden=(24,)))
    with pytest.raises(ValueError, match='other weights'): crt_probe(other, features)
    with pytest.raises(ValueError, match='is_valid'): crt_probe(predictor, replace(features, frame=features.frame.drop(columns='is_valid')))


def test_a_network_that_knows_the_images(images):
    features = artificial()
    known = replace(features, seen=np.arange(240) < 10)
    with pytest.warns(UserWarning, match='trained on 10 of 240 images'): probe(known, penalties=[.1])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        probe(replace(known, frame=features.frame.assign(is_valid=np.arange(240) >= 120)), penalties=[.1])


@pytest.mark.parametrize('change, message', [
    (dict(alpha='cubic'), 'kind of class weights'), (dict(alpha=dict(nv=1.)), 'lacks a weight'), (dict(penalties=[]), 'must be positive')])
def test_errors_of_probes(change, message):
    with pytest.raises(ValueError, match=message): probe(artificial(), **change)


def test_errors(images, embedder):
    with pytest.raises(ValueError, match='did you mean'): embed_images(images, 'test_eficientnet', 32)
    with pytest.raises(TypeError, match='generator'): embed_images(iter(images), embedder)
    with pytest.raises(TypeError, match='save_bundle'): Embedder(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match='bs must be'): embed_images(images, embedder, bs=0)
    bad = artificial()
    with pytest.raises(ValueError, match='not finite'): replace(bad, x=np.where(np.arange(12) == 3, np.nan, bad.x).astype(np.float32))
    with pytest.raises(ValueError, match='expected float32'): replace(bad, x=bad.x[:5])


# ---- the commands

def test_commands(tmp_path, capsys):
    from skin_lesions.cli import main
    sample = synthetic_ham10000(tmp_path/'ham', 100, size=(96, 72))
    status = main(['embed', '--data', str(sample), '--arch', 'tf_efficientnet_lite0', '--size', '32', '--out', str(tmp_path/'f.npz'),
                   '--cache', str(tmp_path/'cache'), '--no-check', '--quiet', '--device', 'cpu'])
    assert status == 0 and '100 images, 1280 features each' in capsys.readouterr().out
    assert main(['probe', str(tmp_path/'f.npz'), '--fold', '0', '--n-folds', '3', '--neighbours', '--out', str(tmp_path/'t.csv')]) == 0
    table = read_predictions(tmp_path/'t.csv')
    assert 'average recall' in capsys.readouterr().out and 20 < len(table) < 50
    assert main(['embed', '--data', str(sample), '--out', str(tmp_path/'f.csv')]) == 2
    assert main(['embed', '--data', str(sample), '--out', str(tmp_path/'f.npz'), '--arch', 'resnet18', '--bundle', str(tmp_path)]) == 2
