"ONNX: the file gives the predictor's probabilities, or is not written."
import importlib.util, json

import numpy as np
import pytest
import torch

from serving import each_fifth_valid, make
from skin_lesions.bundle import save_bundle
from skin_lesions.classes import HAM10000
from skin_lesions.onnx import ONNX_PACKAGES, export_onnx
from skin_lesions.predict import load_predictor
from skin_lesions.predictions import get_predictions
from skin_lesions.readers import read_metadata

CODES = list(HAM10000)


@pytest.fixture(scope='module')
def meta(sample): return each_fifth_valid(read_metadata(sample))


@pytest.fixture(scope='module')
def learn(meta): return make(meta)


@pytest.fixture(scope='module')
def bundle(learn, tmp_path_factory): return save_bundle(learn, tmp_path_factory.mktemp('bundle')/'b')


def numbers(table): return table[CODES].to_numpy(float)

needs_onnx = pytest.mark.skipif(not all(importlib.util.find_spec(p) for p in ONNX_PACKAGES), reason=f"needs the packages {', '.join(ONNX_PACKAGES)}")


@needs_onnx
@pytest.mark.parametrize('kind, more', [('one', {}), ('two', dict(combine='paper', data=dict(patient=True)))])
def test_onnx_gives_the_probabilities_of_the_predictor(kind, more, meta, tmp_path):
    import onnx, onnxruntime
    from skin_lesions.decide import fit_calibration
    learn = make(meta, kind, **more)
    save_bundle(learn, tmp_path/'b', calibration=fit_calibration(get_predictions(learn), 'stages_vector' if kind == 'two' else 'vector', first='nv' if kind == 'two' else None))
    predictor, some = load_predictor(tmp_path/'b', device='cpu'), meta[~meta.is_valid].iloc[:64]
    assert export_onnx(predictor, tmp_path/'net.onnx') <= 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path/'net.onnx'), providers=['CPUExecutionProvider'])
    assert [p.name for p in tmp_path.glob('net*')] == ['net.onnx'], 'weights outside the file'
    inputs = {'pixels': torch.stack([predictor.prepare(p) for p in some.path]).permute(0, 2, 3, 1).contiguous().numpy()}
    if predictor.patient is not None: inputs['patient'] = np.asarray(predictor.patient.encode(some), dtype=np.float32)
    table = predictor.predict(some, progress=False)
    assert len(table) == 64 and np.abs(session.run(None, inputs)[0] - numbers(table)).max() < 1e-4
    assert np.abs(session.run(None, {k: v[:5] for k, v in inputs.items()})[0] - numbers(table)[:5]).max() < 1e-4
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts['classes']) == CODES and 'not a medical device' in facts['notice'] and json.loads(facts['crop'])['size'] == [64, 64]


def write_uniform(onnx, predictor, file):
    "A graph that gives every class the same probability"
    from onnx import TensorProto, helper, numpy_helper
    names = ['pixels'] + ['patient']*(predictor.patient is not None)
    value = numpy_helper.from_array(np.array([1/7], dtype=np.float32))
    nodes = [helper.make_node('Shape', ['pixels'], ['n'], start=0, end=1), helper.make_node('Constant', [], ['classes'], value_ints=[7]),
             helper.make_node('Concat', ['n', 'classes'], ['shape'], axis=0), helper.make_node('ConstantOfShape', ['shape'], ['probabilities'], value=value)]
    given = [helper.make_tensor_value_info(name, *kind) for name, kind in zip(names, [(TensorProto.UINT8, ['n', *predictor.size, 3]), (TensorProto.FLOAT, ['n', None])])]
    graph = helper.make_graph(nodes, 'uniform', given, [helper.make_tensor_value_info('probabilities', TensorProto.FLOAT, ['n', 7])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10), str(file))


@needs_onnx
def test_onnx_that_differs_is_not_written(bundle, tmp_path, monkeypatch):
    from skin_lesions import onnx
    predictor = load_predictor(bundle, device='cpu')
    monkeypatch.setattr(onnx, '_write_onnx', write_uniform) # quicker than an export
    with pytest.raises(ValueError, match='differ from PyTorch'): export_onnx(predictor, tmp_path/'net.onnx')
    assert not list(tmp_path.iterdir())
    worst = export_onnx(predictor, tmp_path/'net.onnx', tol=1)
    assert .05 < worst < 1 and [p.name for p in tmp_path.iterdir()] == ['net.onnx']
    with pytest.raises(ValueError, match='differ from PyTorch'): export_onnx(predictor, tmp_path/'net.onnx', overwrite=True, tol=worst/2)
    with pytest.raises(FileExistsError, match='overwrite=True'): export_onnx(predictor, tmp_path/'net.onnx')
    assert (tmp_path/'net.onnx').stat().st_size


def test_without_the_onnx_packages_one_line(bundle, tmp_path, monkeypatch):
    real = importlib.import_module
    def without(name, *args):
        if name == 'onnxscript': raise ModuleNotFoundError("No module named 'onnxscript'", name='onnxscript')
        return real(name, *args)
    monkeypatch.setattr(importlib, 'import_module', without)
    with pytest.raises(ModuleNotFoundError, match=r'export_onnx needs onnx\w*: pip install onnx onnxscript onnxruntime'): export_onnx(load_predictor(bundle), tmp_path/'net.onnx')


@needs_onnx
def test_an_ensemble_goes_every_way_that_one_network_goes(learn, meta, tmp_path):
    "Bundle, prediction, several views, maps, out-of-distribution score and ONNX"
    from skin_lesions.bundle import bundle_content
    from skin_lesions.gradcam import GradCAM
    from skin_lesions.networks import EnsembleNet
    from skin_lesions.ood import fit_ood
    from skin_lesions.predict import Predictor
    other = make(meta, 'one')
    one, some = Predictor(learn.model, *bundle_content(learn), 'cpu'), meta[~meta.is_valid].iloc[:8]
    view = {k: one.record[k] for k in ('side', 'preprocess', 'crop', 'normalization')}
    save_bundle(EnsembleNet([learn.model, other.model]), tmp_path/'b', classes=one.classes, view=view, ood=fit_ood(learn))
    both = load_predictor(tmp_path/'b', device='cpu')
    two = Predictor(other.model, *bundle_content(other), 'cpu')
    each = np.stack([numbers(p.predict(some, progress=False)) for p in (one, two)])
    mean = np.sqrt(each.prod(0))
    table = both.predict(some, progress=False)
    np.testing.assert_allclose(numbers(table), mean/mean.sum(1, keepdims=True), atol=1e-5)
    assert table.ood_score.notna().all() and not np.allclose(numbers(both.predict(some, progress=False, views='dihedral')), numbers(table))
    xb = both.batch([both.prepare(p) for p in some.path])
    with GradCAM(both) as explain: maps = explain.cam(xb)
    assert maps.shape == (8, 64, 64) and [CODES[i] for i in explain.target] == [CODES[i] for i in numbers(table).argmax(1)]
    assert export_onnx(both, tmp_path/'net.onnx') <= 1e-4
    assert numbers(get_predictions(both.learner, some)).shape == (8, 7)
