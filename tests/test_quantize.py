"Int8: what is written has scores that hold, says that it is int8, and is used; all else is refused."
import importlib.util, json, logging, shutil

import numpy as np
import pandas as pd
import pytest
import torch

from serving import each_fifth_valid
from skin_lesions.classes import HAM10000
from skin_lesions.engine import engine_file, with_engine
from skin_lesions.onnx import ONNX_PACKAGES
from skin_lesions.predict import load_predictor
from skin_lesions.quantize import LIMITS, CalibrationReader, calibration_inputs, check_limits, quantize, write_int8
from skin_lesions.readers import read_metadata

CODES = list(HAM10000)
WIDE = dict(macro_auc=.2, average_recall=.5)
pytestmark = pytest.mark.skipif(not all(importlib.util.find_spec(p) for p in ONNX_PACKAGES), reason=f"needs the packages {', '.join(ONNX_PACKAGES)}")


@pytest.fixture(scope='module')
def meta(sample): return each_fifth_valid(read_metadata(sample))


@pytest.fixture(scope='module')
def plain(engine_files): return load_predictor(engine_files/'b', device='cpu')


@pytest.fixture(scope='module')
def written(plain, meta, engine_files, tmp_path_factory):
    "A file that was let through, and its record; the graph of float32 lies in a cache of the module's own"
    folder = tmp_path_factory.mktemp('int8')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SKIN_LESIONS_CACHE', str(folder/'cache'))
        engine_file(plain).parent.mkdir(parents=True)
        shutil.copy(engine_files/'net.onnx', engine_file(plain))
        yield folder/'net.onnx', quantize(plain, meta[~meta.is_valid][:24], meta[meta.is_valid], folder/'net.onnx', limits=WIDE)


def test_int8_is_close_and_says_what_it_is(plain, written, meta):
    import onnx
    file, record = written
    fast, some = with_engine(plain, file=file), meta[meta.is_valid]
    a, b = (p.predict(some, progress=False) for p in (plain, fast))
    change = np.abs(a[CODES].to_numpy(float) - b[CODES].to_numpy(float))
    assert 1e-5 < change.max() == pytest.approx(record['largest_change'], abs=1e-3) and change.mean() < .05
    assert a[CODES].corrwith(b[CODES]).min() > .9, 'another network'
    model = onnx.load(str(file))
    facts = {p.key: p.value for p in model.metadata_props}
    assert json.loads(facts['int8']) == record == json.loads(file.with_suffix('.json').read_text()) and fast.network.precision == 'int8'
    assert record['n_images'] == len(some) and record['calibration_images'] == 24 and set(record) >= {'float32', 'int8', 'flags_changed'}
    kept = {t.name: t.data_type for t in model.graph.initializer}
    assert sum(kind == onnx.TensorProto.INT8 for kind in kept.values()) > 5, 'no weights of eight bits'
    assert with_engine(plain).network.precision == 'float32'


def test_scores_that_do_not_hold_are_refused(plain, written, meta, tmp_path):
    with pytest.raises(ValueError, match='too much: macro_auc .* nothing was written'):
        quantize(plain, meta[~meta.is_valid][:2], meta[meta.is_valid], tmp_path/'net.onnx', limits=dict(macro_auc=-1.))
    assert not list(tmp_path.iterdir())


def test_the_limits_are_those_that_the_page_names():
    record = dict(n_images=9, float32=dict(macro_auc=.9, average_recall=.7), int8=dict(macro_auc=.899, average_recall=.695))
    assert LIMITS == dict(macro_auc=.002, average_recall=.01)
    check_limits(record, LIMITS)
    for name, value in (('macro_auc', .8975), ('macro_auc', float('nan')), ('average_recall', .715)):
        with pytest.raises(ValueError, match=name): check_limits(record | dict(int8=record['int8'] | {name: value}), LIMITS)


def test_a_file_that_was_not_compared_or_answers_otherwise_is_refused(plain, written, meta, tmp_path):
    import onnx
    raw = write_int8(plain, meta[~meta.is_valid][:2], tmp_path/'raw.onnx')
    with pytest.raises(ValueError, match='raw.onnx is int8 and was not compared'): with_engine(plain, file=raw)
    file, record = written
    model = onnx.load(str(file))
    shifted = record | dict(examples=[[p + .1 for p in row] for row in record['examples']])
    for p in model.metadata_props:
        if p.key == 'int8': p.value = json.dumps(shifted)
    onnx.save(model, str(tmp_path/'moved.onnx'))
    with pytest.raises(ValueError, match='on this CPU differ by up to 0.1'): with_engine(plain, file=tmp_path/'moved.onnx')


def test_calibration_images(plain, meta, written, tmp_path):
    some = meta[~meta.is_valid][:3]
    (tmp_path/'torn.jpg').write_bytes(b'torn')
    with pytest.raises(ValueError, match='2 calibration images cannot be used.*torn.jpg.*gone.jpg'):
        calibration_inputs(plain, [some.path.iloc[0], tmp_path/'torn.jpg', tmp_path/'gone.jpg'])
    with pytest.raises(ValueError, match='no calibration image'): calibration_inputs(plain, [])
    found = calibration_inputs(plain, some)
    np.testing.assert_array_equal(np.concatenate([x['patient'] for x in found]), plain.patient.encode(some).astype('float32'))
    assert calibration_inputs(plain, list(some.path))[0]['patient'].shape == (1, plain.patient.n)
    reader = CalibrationReader(found)
    assert [reader.get_next() is None for _ in range(4)] == [False]*3 + [True]
    with pytest.raises(ValueError, match='3 held-out images are calibration images too'): quantize(plain, some, meta, tmp_path/'net.onnx')
    with pytest.raises(FileExistsError, match='overwrite=True'): quantize(plain, some, meta, written[0])


def test_logging_is_as_before(plain, written, meta, tmp_path, caplog):
    before = logging.root.manager.disable
    write_int8(plain, meta[:1], tmp_path/'x.onnx')
    assert logging.root.manager.disable == before and not [r for r in caplog.records if r.name == 'root']


def test_unlabelled_images_do_not_serve(plain, written, tmp_path, meta):
    with pytest.raises(ValueError, match="lacks column 'dx'"): quantize(plain, meta[:2], pd.DataFrame(dict(path=meta.path[2:5])), tmp_path/'n.onnx')


def test_a_mean_of_networks_becomes_int8(meta, mean_files, tmp_path, monkeypatch):
    "Its record says what changes, the file is used, and the probabilities are near those in float32"
    import onnx
    monkeypatch.setenv('SKIN_LESIONS_CACHE', str(tmp_path/'cache'))
    predictor, some = load_predictor(mean_files/'b', device='cpu'), meta[meta.is_valid]
    engine_file(predictor).parent.mkdir(parents=True)
    shutil.copy(mean_files/'net.onnx', engine_file(predictor))
    record = quantize(predictor, meta[~meta.is_valid][:12], some, tmp_path/'net.onnx', limits=WIDE)
    fast = with_engine(predictor, file=tmp_path/'net.onnx')
    a, b = (p.predict(some, progress=False)[CODES].to_numpy(float) for p in (predictor, fast))
    assert 1e-5 < np.abs(a-b).max() == pytest.approx(record['largest_change'], abs=1e-3) and np.abs(a-b).mean() < .05
    assert set(record['float32']) == set(record['int8']) == {'macro_auc', 'average_recall'} and fast.network.precision == 'int8'
    kinds = [t.data_type for t in onnx.load(str(tmp_path/'net.onnx')).graph.initializer]
    def weights(net): return sum(isinstance(m, torch.nn.Conv2d) for m in net.modules())
    assert kinds.count(onnx.TensorProto.INT8) >= weights(predictor.model), 'a member stayed in float32'
