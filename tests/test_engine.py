"An engine gives PyTorch's answers through the same predictor, and no file serves another network."
import importlib, importlib.util

import numpy as np
import pytest
import torch

from serving import each_fifth_valid
from skin_lesions import engine
from skin_lesions.classes import HAM10000
from skin_lesions.engine import engine_difference, engine_file, with_engine
from skin_lesions.onnx import ONNX_PACKAGES
from skin_lesions.ood import keep_features
from skin_lesions.predict import half_difference, load_predictor
from skin_lesions.readers import read_metadata

CODES = list(HAM10000)
needs_onnx = pytest.mark.skipif(not all(importlib.util.find_spec(p) for p in ONNX_PACKAGES), reason=f"needs the packages {', '.join(ONNX_PACKAGES)}")


@pytest.fixture(scope='module')
def meta(sample): return each_fifth_valid(read_metadata(sample))


@pytest.fixture(scope='module')
def bundle(engine_files): return engine_files/'b'


@pytest.fixture(scope='module')
def pair(bundle, engine_files):
    "A predictor, the same with an engine, and the engine's file"
    plain, file = load_predictor(bundle, device='cpu'), engine_files/'net.onnx'
    return plain, with_engine(plain, file=file), file


def numbers(table): return table[CODES].to_numpy(float)


@needs_onnx
@pytest.mark.parametrize('views', [None, 'dihedral', 'multicrop'])
def test_an_engine_gives_the_whole_table_of_the_predictor(pair, meta, views):
    plain, fast, _ = pair
    some = meta[~meta.is_valid].iloc[:5]
    a, b = (p.predict(some, progress=False, views=views) for p in (plain, fast))
    assert list(a) == list(b) and a.decision.equals(b.decision) and np.ptp(numbers(a), axis=0).max() > 1e-3
    np.testing.assert_allclose(numbers(b), numbers(a), atol=1e-4)
    np.testing.assert_allclose(b.ood_score.astype(float), a.ood_score.astype(float), rtol=1e-3)
    assert engine_difference(fast) < 1e-4 and plain.network.classifier is plain.model


@needs_onnx
def test_what_an_engine_cannot_do_goes_on_with_pytorch_or_says_so(pair, tmp_path, meta):
    plain, fast, file = pair
    assert fast.learner.model is plain.model
    xb = torch.stack([fast.prepare(p) for p in meta.path[:2]])
    assert torch.equal(fast.batch(list(xb)), plain.batch(list(xb)))
    with keep_features(fast.network) as kept: fast.network(xb, torch.zeros(2, plain.patient.n))
    assert [tuple(k.shape) for k in kept] == [(2, plain.ood.n_features)]
    with pytest.raises(ValueError, match='runs on the CPU'): fast.network.to(torch.device('cuda'))
    with pytest.raises(ValueError, match='come from an engine'): half_difference(fast, list(meta.path[:2]))


@needs_onnx
def test_a_mean_of_networks_has_an_engine(mean_files, meta):
    "The whole table, its out-of-distribution score and the calibration of the mean; and a graph of one member is not that of the mean"
    mean, file = load_predictor(mean_files/'b', device='cpu'), mean_files/'net.onnx'
    fast, some = with_engine(mean, file=file), meta[~meta.is_valid].iloc[:3]
    for views in (None, 'dihedral'):
        a, b = (p.predict(some, progress=False, views=views) for p in (mean, fast))
        assert np.ptp(numbers(a), axis=0).max() > 1e-3 and a.decision.equals(b.decision)
        np.testing.assert_allclose(numbers(b), numbers(a), atol=1e-3)
        np.testing.assert_allclose(b.ood_score.astype(float), a.ood_score.astype(float), rtol=1e-3)
    with torch.no_grad(): mean.model.members[1].head[-1].bias.add_(1e-3)
    with pytest.raises(ValueError, match='graph of another network'): with_engine(mean, file=file)


@needs_onnx
def test_a_graph_serves_its_own_network_alone(pair, bundle, tmp_path):
    _, _, file = pair
    other = load_predictor(bundle, device='cpu')
    other.model.head1[-1].bias.data += 1e-3
    with pytest.raises(ValueError, match='graph of another network'): with_engine(other, file=file)
    (tmp_path/'torn.onnx').write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match='torn.onnx is no graph'): with_engine(pair[0], file=tmp_path/'torn.onnx')


@needs_onnx
def test_the_cache_makes_a_graph_once_and_again_where_it_is_damaged(pair, tmp_path, monkeypatch):
    plain, _, file = pair
    monkeypatch.setenv('SKIN_LESIONS_CACHE', str(tmp_path))
    made = []
    def copied(predictor, path):
        made.append(path)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file.read_bytes())
        return path
    monkeypatch.setattr(engine, 'write_engine', copied)
    with_engine(plain)
    with_engine(plain)
    assert made == [engine_file(plain)] and made[0].is_relative_to(tmp_path)
    made[0].write_bytes(b'torn')
    with_engine(plain)
    assert len(made) == 2


@needs_onnx
def test_an_engine_that_differs_is_not_given(pair):
    with pytest.raises(ValueError, match='more than -1'): with_engine(pair[0], file=pair[2], tol=-1)


def test_without_the_packages_one_line(bundle, monkeypatch):
    real = importlib.import_module
    def without(name, *args):
        if name == 'onnxruntime': raise ModuleNotFoundError("No module named 'onnxruntime'", name='onnxruntime')
        return real(name, *args)
    monkeypatch.setattr(importlib, 'import_module', without)
    with pytest.raises(ModuleNotFoundError, match=r'an engine needs onnx\w*: pip install onnx onnxscript onnxruntime'): with_engine(load_predictor(bundle, device='cpu'))
