"Fixtures: the repository, a synthetic sample, the real data if there is any, and the command line as a process of its own."
import os, shutil, subprocess, sys, tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import warm

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO/"tools")) # what tests share with the tools
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1') # several workers: threads of each would wait for the others' cores
os.environ['SKIN_LESIONS_CACHE'] = tempfile.mkdtemp(prefix='skin-lesions-cache-') # not the user's


LONGEST = ('cli', 'experiments', 'distributed', 'train', 'app', 'stored_tables', 'onnx', 'survival', 'predict', 'resume', 'evaluate', 'learner', 'benchmarks',
           'report', 'conformal', 'masking', 'package', 'patient', 'reproduce', 'fake_gpu', 'gradcam', 'security', 'cache', 'pretext', 'quantize', 'decide',
           'split', 'engine')


def pytest_configure(config):
    if hasattr(config.option, 'loadscopereorder'): config.option.loadscopereorder = False # xdist would take files of few tests last


def pytest_collection_modifyitems(items):
    "The longest files first, or the second of two workers waits for them in the end"
    files = [f'test_{name}.py' for name in LONGEST]
    items.sort(key=lambda item: files.index(item.path.name) if item.path.name in files else len(files))


@pytest.fixture(scope='session')
def repo(): return REPO


@pytest.fixture(scope='session')
def together(tmp_path_factory):
    "The folder of all test processes of this run; where they cannot lock files, of this one"
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if 'PYTEST_XDIST_WORKER' in os.environ and warm.fcntl else folder


@pytest.fixture(scope='session')
def once(together):
    "Make a folder in the first test process that asks for it, for all of them: `once(name, make)` calls `make(folder)`"
    def get(name, make):
        with warm.locked(together/f'{name}.lock'):
            made = together/f'{name}.made'
            if not made.exists():
                shutil.rmtree(together/name, ignore_errors=True) # of another that failed
                (together/name).mkdir()
                make(together/name)
                made.touch()
        return together/name
    return get


@pytest.fixture(scope='session')
def sample(once):
    "A synthetic data set; not to be changed"
    from skin_lesions.synthetic import synthetic_ham10000
    return once('sample', lambda folder: synthetic_ham10000(folder/'ham', n_images=160, seed=7, size=(300, 225)))/'ham'


@pytest.fixture(scope='session')
def real():
    "The folder of the real HAM10000"
    folder = os.environ.get('HAM10000_DIR')
    if not folder or not (Path(folder)/'HAM10000_metadata.csv').is_file(): pytest.skip('HAM10000_DIR names no folder with HAM10000')
    return Path(folder)


@pytest.fixture(scope='session')
def python():
    "Run Python code in a new interpreter outside the repository, for what a first import promises; returns the finished process"
    def run(code, *args, cwd, timeout=240):
        return subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    return run


class Cold:
    "Commands as new interpreters, where there is no fork; see `warm.Server`"
    def start(self, *args, cwd, out, err): return subprocess.Popen([sys.executable, '-W', 'ignore', *map(str, args)], cwd=cwd, stdout=out, stderr=err)

    def run(self, *args, cwd, timeout=400):
        return subprocess.run([sys.executable, '-W', 'ignore', *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=timeout)

    def close(self): pass


@pytest.fixture(scope='session')
def processes(together):
    "Processes of their own that have torch and fastai imported, and nothing of skin_lesions"
    server = warm.Server(together/'warm.sock') if hasattr(os, 'fork') else Cold()
    yield server
    server.close()


@pytest.fixture(scope='session')
def warm_python(processes):
    "Run Python code in a process of its own; returns the finished process"
    return partial(processes.run, '-c')


@pytest.fixture(scope='session')
def cli(processes):
    "Run `skin_lesions ...` as a process of its own; returns the finished process"
    return partial(processes.run, '-m', 'skin_lesions.cli')


def settings(**changes): return tuple(a for name, value in changes.items() for a in ('--set', f'{name}={value}'))


SMALL = ('--recipe', 'quick', *settings(arch='test_efficientnet', pretrained='no', size=32, bs=16), '--cache', 'none', '--workers', '0', '--quiet')


@pytest.fixture(scope='session')
def small():
    "Arguments of a training that takes seconds"
    return SMALL


@pytest.fixture(scope='session')
def finished_run(once, sample, cli):
    "A run folder as `skin_lesions train` leaves it; not to be changed"
    def train(folder):
        done = cli('train', '--data', sample, '--out', 'run', *SMALL, *settings(epochs=2), cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return once('finished_run', train)/'run'


@pytest.fixture(scope='session')
def engine_files(once, sample):
    "A bundle `b` and its graph `net.onnx`; exporting one takes seconds"
    pytest.importorskip('onnxscript', reason='needs onnx, onnxscript and onnxruntime')
    from serving import write_engine_files
    return once('engine', partial(write_engine_files, sample))


@pytest.fixture(scope='session')
def mean_files(once, sample):
    "A bundle `b` of the mean of two networks, and its graph `net.onnx`"
    pytest.importorskip('onnxscript', reason='needs onnx, onnxscript and onnxruntime')
    from serving import write_mean_files
    return once('mean', partial(write_mean_files, sample))


def caption_only(draw, size, alt, caption):
    from fastcore.xml import Figcaption, Figure, Img
    return Figure(Img(alt=alt), Figcaption(caption))


@pytest.fixture
def no_figures(monkeypatch):
    "Within it, reports have what is said of their figures only: drawing them takes longer than a training here"
    @contextmanager
    def within():
        with monkeypatch.context() as m:
            m.setattr('skin_lesions.report.html_figure', caption_only)
            yield
    return within


@pytest.fixture
def quick_reports(no_figures):
    "`no_figures` for a whole test"
    with no_figures(): yield
