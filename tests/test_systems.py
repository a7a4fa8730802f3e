"Windows, Apple's GPUs and other ways to start processes, imitated: what works on Linux alone is noticed."
import ctypes, errno, fcntl, os, pickle, sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skin_lesions.data import ham10000_dataloaders
from skin_lesions.readers import read_metadata
from skin_lesions.split import split_by_lesion

TINY = 'test_efficientnet'


@pytest.fixture(scope='module')
def meta(sample): return split_by_lesion(read_metadata(sample))


def locking(descriptor, mode, n):
    "`msvcrt.locking` on a file of this system: one byte; it gives up with an error"
    assert n == 1 and os.lseek(descriptor, 0, os.SEEK_CUR) == 0, 'Windows locks bytes from where the file stands'
    try: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError: raise OSError(errno.EDEADLK, 'Resource deadlock avoided')


@pytest.fixture
def windows(monkeypatch):
    "What Windows refuses: syncing a file that is open for reading, opening folders, links, `fcntl`, `mallopt`"
    fsync, opened, cdll = os.fsync, os.open, ctypes.CDLL

    def sync(f):
        descriptor = f if isinstance(f, int) else f.fileno()
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY: raise OSError(errno.EBADF, 'Bad file descriptor')
        fsync(descriptor)

    def open_file(path, *args, **kwargs):
        if os.path.isdir(path): raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return opened(path, *args, **kwargs)

    def library(name, *args, **kwargs):
        if name is None: raise TypeError("LoadLibrary() argument 1 must be str, not None")
        return cdll(name, *args, **kwargs)
    monkeypatch.setattr(os, 'fsync', sync)
    monkeypatch.setattr(os, 'open', open_file)
    monkeypatch.setattr('ctypes.CDLL', library)
    monkeypatch.delattr(os, 'link')
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    monkeypatch.setitem(sys.modules, 'msvcrt', SimpleNamespace(LK_LOCK=1, LK_NBLCK=2, locking=locking))


def test_the_imitation_refuses(windows, tmp_path):
    (tmp_path/'a').write_text('a')
    with open(tmp_path/'a', 'rb') as f, pytest.raises(OSError, match='Bad file'): os.fsync(f.fileno())
    with pytest.raises(PermissionError): os.open(tmp_path, os.O_RDONLY)


def test_everything_that_writes_does_so_on_windows(windows, meta, tmp_path, quick_reports):
    from skin_lesions.bundle import save_bundle
    from skin_lesions.cache import resize_cache
    from skin_lesions.core import read_json, reuse_memory, write_json
    from skin_lesions.experiments import append_result, read_results
    from skin_lesions.learner import lesion_learner
    from skin_lesions.predict import load_predictor
    from skin_lesions.predictions import get_predictions, isic_submission, read_predictions, save_predictions
    from skin_lesions.report import html_report
    from skin_lesions.resume import ResumeCallback
    from skin_lesions.stream import write_shards
    for i in range(2): write_json(dict(i=i), tmp_path/'a.json')
    assert read_json(tmp_path/'a.json') == dict(i=1) and not reuse_memory()
    cache = resize_cache(meta, 32, folder=tmp_path/'cache', show=False)
    dls = ham10000_dataloaders(meta, 32, bs=32, arch=TINY, cache=cache, num_workers=0, device='cpu')
    learn = lesion_learner(dls, TINY, pretrained=False)
    for epochs in (2, 2): # the second time from a state
        with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=ResumeCallback(tmp_path/'state', minutes=0))
    for name in ('bundle', 'bundle.zip'):
        for overwrite in (False, True): save_bundle(learn, tmp_path/name, overwrite=overwrite)
    table = get_predictions(learn)
    found = load_predictor(tmp_path/'bundle', 'cpu').predict(list(table.image_id.map(dict(zip(meta.image_id, meta.path))))[:3], progress=False)
    assert len(found) == 3
    assert len(read_predictions(save_predictions(table, tmp_path/'p.csv'))) == len(isic_submission(table, tmp_path/'s.csv').read_text().splitlines())-1
    html_report(table, tmp_path/'report.html')
    write_shards(list(meta.path[:4]), tmp_path/'shards')
    run = dict(recipe='a', split='lesion', fold=0, folds=5, seed=0, scale='tiny', digest='x', name='a')
    assert append_result(tmp_path/'results', run) and not append_result(tmp_path/'results', run) and len(read_results(tmp_path/'results')) == 1


def test_a_lock_of_windows_is_one(windows, tmp_path):
    from skin_lesions.core import file_lock
    with file_lock(tmp_path/'lock') as had:
        assert had
        with file_lock(tmp_path/'lock', wait=False) as second: assert not second
    with file_lock(tmp_path/'lock', wait=False) as again: assert again


def test_a_wait_for_windows_lock_goes_on_after_it_gave_up(windows, tmp_path, monkeypatch):
    from skin_lesions.core import file_lock
    tries = []

    def busy_at_first(descriptor, mode, n):
        tries.append(mode)
        if len(tries) < 3: raise OSError(errno.EDEADLK, 'Resource deadlock avoided') # after ten seconds
    monkeypatch.setattr(sys.modules['msvcrt'], 'locking', busy_at_first)
    with file_lock(tmp_path/'lock') as had: assert had and tries == [1, 1, 1]


# ---- workers that are not forked: Windows, macOS, and Linux from Python 3.14 on

def loaders(meta, tmp_path):
    from skin_lesions.cache import resize_cache
    from skin_lesions.distributed import rank_loader
    from skin_lesions.inference import view_dataloader
    from skin_lesions.preprocess import RemoveHair
    from skin_lesions.pretext import pretext_dataloaders
    from skin_lesions.stream import stream_dataloaders, write_list
    kw = dict(bs=8, arch=TINY, num_workers=2, device='cpu')
    dls = ham10000_dataloaders(meta, 32, **kw)
    yield 'training', dls.train
    yield 'validation', dls.valid
    yield 'each once', ham10000_dataloaders(meta, 32, sampling=None, **kw).train
    yield 'patients', ham10000_dataloaders(meta, 32, patient=True, **kw).train
    yield 'preprocessing', ham10000_dataloaders(meta, 32, item_tfms=RemoveHair(), **kw).train
    yield 'cache', ham10000_dataloaders(meta, 32, cache=resize_cache(meta, 32, folder=tmp_path, show=False), **kw).train
    yield 'files', dls.test_dl(list(meta.path[:4]))
    yield 'views', view_dataloader(dls.valid, 'crops9')
    yield 'pretext', pretext_dataloaders(meta, 32, **kw).train
    write_list(list(meta.path), tmp_path/'images.txt')
    yield 'stream', stream_dataloaders(tmp_path/'images.txt', 32, block=40, **kw).train
    for i in range(2): yield f'rank {i}', rank_loader(dls.train, i, 2)
    yield 'rank, pretext', rank_loader(pretext_dataloaders(meta, 32, **kw).valid, 0, 2, equal=False)


def test_every_loader_reaches_workers_that_are_not_forked(meta, tmp_path):
    "They get it as a pickle; what comes back gives batches of the same shapes"
    for name, dl in loaders(meta, tmp_path):
        again = pickle.loads(pickle.dumps(dl.fake_l)).d
        assert type(again).__mro__[1:] == type(dl).__mro__[1:] and again.bs == dl.bs, name
        assert len(again) == len(dl), name
        again.fake_l.num_workers = 0
        batch = next(iter(again))
        assert [tuple(t.shape)[1:] for t in batch] == [tuple(t.shape)[1:] for t in dl.one_batch()], name


# ---- Apple's GPUs

class NoDoubles(TorchDispatchMode):
    "Apple's GPUs hold no float64; not every operation can be imitated there, so that a rule for all GPUs is tried on another kind"
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type == self.kind and t.dtype == torch.float64: raise TypeError(f"Cannot convert a Tensor to float64 dtype ({func})")
        return out


@pytest.fixture(params=['mps', 'cuda'])
def gpu(request):
    "Tensors without numbers on an imitated device"
    with FakeTensorMode(allow_non_fake_inputs=True), NoDoubles(request.param): yield torch.device(request.param)


only_cuda = pytest.mark.parametrize('gpu', ['cuda'], indirect=True)


def test_the_imitated_device_has_no_doubles(gpu):
    with pytest.raises(TypeError, match='float64'): torch.ones(2, device=gpu).double()


def test_pretexts_need_no_doubles(gpu):
    from skin_lesions.pretext import rotate_images
    x = torch.ones(2, 3, 64, 64, device=gpu)
    assert rotate_images(x, torch.tensor([10., 20.])).device.type == gpu.type


@only_cuda
def test_two_stages_are_read_without_doubles(gpu):
    from skin_lesions.networks import join_stages, route_stages
    s, z = torch.ones(2, device=gpu), torch.ones(2, 6, device=gpu)
    assert join_stages(s, z, 5).dtype == route_stages(s, z, 5).dtype == torch.float32


def test_the_fastest_device_is_taken(monkeypatch):
    from skin_lesions.predict import usable_device
    has = dict(cuda=False, mps=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has['cuda'])
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: has['mps'])
    for change, expected in (({}, 'cpu'), (dict(mps=True), 'mps'), (dict(cuda=True), 'cuda')):
        has.update(change)
        assert usable_device().type == expected


def test_half_precision_is_cuda_s(monkeypatch):
    from skin_lesions.speed import best_precision
    assert best_precision('mps') == 'float32'


def test_a_device_without_autocast_computes_in_full_precision(monkeypatch):
    from skin_lesions.networks import full_precision
    monkeypatch.setattr(torch.amp, 'is_autocast_available', lambda kind: False)
    with full_precision('mps'): pass
