"""The tutorials as a Kaggle or Colab user runs them: the wheel of this tree, installed from a folder like Kaggle's input without a look at an index, each page in an empty folder of its own, with the environment's newest stack.

They run where the package is installed (CI's newest stack), and are left out where it is the source tree; SKIN_LESIONS_TUTORIALS=all runs them there too, from the wheel as well.
SKIN_LESIONS_TUTORIALS may also name pages: `SKIN_LESIONS_TUTORIALS='91 95'`.
"""
import os, subprocess, sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PAGES = sorted(p for p in (REPO/'nbs').glob('9*.ipynb'))
pytestmark = pytest.mark.newest
CHOSEN = os.environ.get('SKIN_LESIONS_TUTORIALS', '').split()


def from_source():
    import skin_lesions
    return REPO == Path(skin_lesions.__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def kaggle(tmp_path_factory, repo):
    "A folder like /kaggle/input: the wheel, and a synthetic sample where HAM10000 would be; and a folder with the wheel installed"
    if not CHOSEN and from_source(): pytest.skip('the package is the source tree; the tutorials run from an installed wheel, SKIN_LESIONS_TUTORIALS=all runs them here')
    root = tmp_path_factory.mktemp('kaggle')
    source,wheels = root/'source',root/'input'/'skin-lesions-wheels'
    for f in subprocess.run(['git', 'ls-files'], cwd=repo, capture_output=True, text=True, check=True).stdout.split('\n'): # building leaves files in the tree
        if not f or f.split('/')[0] in ('nbs', 'tests', 'benchmarks') or not (repo/f).is_file(): continue
        (source/f).parent.mkdir(parents=True, exist_ok=True)
        (source/f).write_bytes((repo/f).read_bytes())
    pip(['wheel', '--no-deps', '-w', wheels, source])
    pip(['install', '--no-index', '--no-deps', '--find-links', wheels, '--target', root/'site', 'skin-lesions'])
    from skin_lesions.synthetic import synthetic_ham10000
    synthetic_ham10000(root/'input'/'skin-cancer-mnist-ham10000', 100, size=(200, 150), seed=3)
    return root


def pip(args):
    done = subprocess.run([sys.executable, '-m', 'pip', *map(str, args)], capture_output=True, text=True)
    if done.returncode and 'No module named pip' in done.stderr: pytest.skip('this environment has no pip')
    assert done.returncode == 0, done.stdout + done.stderr


IN_A_FORK = '''
import sys
site, page = sys.argv[1:]
sys.path.insert(0, site) # what PYTHONPATH does for a new interpreter
import matplotlib, nbformat
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config
matplotlib.use('module://matplotlib_inline.backend_inline')
shell = InteractiveShell.instance(config=Config(HistoryManager=dict(enabled=False)))
for cell in nbformat.read(page, 4).cells:
    if cell.cell_type == 'code': shell.run_cell(cell.source, store_history=False).raise_error()
'''


def in_a_kernel(page, folder):
    "Run a page as Jupyter does; what its last cell prints"
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(page, 4)
    NotebookClient(nb, timeout=900, kernel_name='python3', resources={'metadata': {'path': str(folder)}}).execute()
    return nb.cells[-1].outputs[0]['text']


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_tutorial_runs(path, kaggle, tmp_path, monkeypatch, warm_python):
    "The offline page in a kernel of Jupyter; the others in IPython, in a process that waits for no imports but the package's"
    import nbformat
    if CHOSEN and 'all' not in CHOSEN and path.name[:2] not in CHOSEN: pytest.skip(f"SKIN_LESIONS_TUTORIALS={' '.join(CHOSEN)}")
    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        if cell.cell_type == 'code' and cell.source.startswith('#| eval: false'): cell.source = '' # installs; the wheel is there
    nb.cells.append(nbformat.v4.new_code_cell('import skin_lesions; print(skin_lesions.__file__)'))
    for name,value in dict(PYTHONPATH=str(kaggle/'site'), TUTORIAL_INPUT=str(kaggle/'input'), TMPDIR=str(tmp_path/'tmp'), SKIN_LESIONS_CACHE=str(tmp_path/'cache'), MPLBACKEND='module://matplotlib_inline.backend_inline', OMP_NUM_THREADS='1').items(): # one thread: two that wait for each other on busy cores are ten times as slow
        monkeypatch.setenv(name, value)
    monkeypatch.delenv('HAM10000_DIR', raising=False)
    folder, page = tmp_path/'working', tmp_path/path.name
    folder.mkdir(); (tmp_path/'tmp').mkdir()
    nbformat.write(nb, page)
    if path.stem == '95_kaggle_offline': printed = in_a_kernel(page, folder)
    else:
        done = warm_python(IN_A_FORK, kaggle/'site', page, cwd=folder, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        printed = done.stdout
    assert Path(printed.strip().split('\n')[-1]).is_relative_to(kaggle/'site'), 'the page ran with another copy of the package'
    assert not list(folder.iterdir()), 'the page leaves files in the working folder'


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_tutorial_has_badge_install_and_switch(path):
    import nbformat
    cells = nbformat.read(path, 4).cells
    text,code = '\n'.join(c.source for c in cells if c.cell_type == 'markdown'),[c.source for c in cells if c.cell_type == 'code']
    assert text.count('colab-badge.svg') == 1 and f'/nbs/{path.name})' in text, 'one badge, to this page'
    assert sum(c.startswith('#| eval: false\n%pip install -q') for c in code) == 1 and ' -U' not in '\n'.join(code)
    assert sum(c.count('\nREAL = ') + c.startswith('REAL = ') for c in code) == 1, 'one switch'
    versions = [c for c in cells if 'timm.__version__' in c.source]
    assert len(versions) == 1 and not versions[0].outputs, 'versions are printed and not stored'
    assert cells[-1].cell_type == 'raw' and 'skip_exec: true' in cells[-1].source, 'nbdev_test leaves the page to this file'
    assert all(len(str(data)) < 50_000*4/3 for c in cells for out in c.get('outputs', []) for kind,data in out.get('data', {}).items() if kind.startswith('image/'))
    assert path.stat().st_size < 300_000
