"What the package promises as a package: imports, contents, requirements."
import ast, importlib.util, os, re, subprocess, sys, zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
NOTEBOOK = {} # by module
for notebook in sorted((REPO/'nbs').glob('*.ipynb')):
    name = re.search(r'#\| default_exp (\w+)', notebook.read_text(encoding='utf-8'))
    if name: NOTEBOOK[name[1]] = notebook.name
MODULES = list(NOTEBOOK)


ALONE = '''
import importlib, os, random, sys, traceback
import fastai.vision.all # the slow part, shared by all; the package is new to each
import numpy as np

def check(module):
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    m = importlib.import_module(f'skin_lesions.{module}')
    assert before == np.random.get_state()[1].tolist(), 'NumPy seed'
    own = [n for n in sys.modules if n.split('.')[0] in ('nbdev', 'execnb')]
    assert not own, own
    for name in m.__all__: assert hasattr(m, name), name
    random.seed(1)
    before = random.getstate() # a second time: what fastai imports draws a random number when it is first imported
    importlib.reload(m)
    assert before == random.getstate(), 'seed of random'
    assert os.listdir() == [], os.listdir()

for module in sys.argv[1:]:
    assert not any(n.split('.')[0] == 'skin_lesions' for n in sys.modules)
    if pid := os.fork(): print(module, os.waitpid(pid, 0)[1], flush=True)
    else:
        status = 1
        try: check(module); status = 0
        except BaseException: print(f'{module}:', traceback.format_exc(), file=sys.stderr, flush=True)
        finally: os._exit(status)
'''


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='each module gets a forked interpreter')
def test_a_module_alone_has_no_side_effects(warm_python, tmp_path):
    "Each module imports without the others and without nbdev, and changes no seed and no folder"
    done = warm_python(ALONE, *MODULES, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.split() == [w for m in MODULES for w in (m, '0')], done.stderr
    (tmp_path/'new').write_text('')
    assert 'AssertionError' in warm_python(ALONE, 'core', cwd=tmp_path).stderr # it can fail


# learners fit and predict without any further import from fastai
LEARNER = """from skin_lesions.learner import two_stage_learner, lesion_learner
from fastai.learner import Learner
for name in ('fit_one_cycle', 'fine_tune', 'lr_find', 'no_bar', 'predict', 'export'): assert hasattr(Learner, name), name"""

# what is done in an interpreter, step by step, and what no step up to there may import
LIGHT = [
    [('import skin_lesions.core, skin_lesions.recipes, skin_lesions.cli', 'numpy pandas fastcore tqdm torch'),
     ('import skin_lesions.views, skin_lesions.predictions, skin_lesions.bootstrap, skin_lesions.decide, skin_lesions.evaluate, skin_lesions.conformal, skin_lesions.benefit',
      'scipy sklearn matplotlib torch torchvision timm fastai'),
     ('import skin_lesions.report', 'torch torchvision timm fastai')],
    [('import skin_lesions.losses', 'timm fastai'),
     ('import skin_lesions.networks', 'torch._dynamo fastai matplotlib sklearn scipy'),
     ("import numpy as np; from skin_lesions.predict import load_predictor; load_predictor('ham10000', 'cpu').predict(np.zeros((99, 99, 3), 'uint8'))",
      'torch._dynamo fastai matplotlib sklearn scipy cv2 IPython'),
     ('import skin_lesions.cam_checks', 'fastai gradio'),
     (LEARNER, 'gradio')]]


@pytest.mark.parametrize('steps', LIGHT, ids=['tables', 'networks'])
def test_doors_stay_light(steps, python, tmp_path):
    "A command, a table and a prediction wait for no library that they do not need; a learner brings what it needs"
    check = "import sys; heavy = set('{}'.split()) & set(sys.modules); assert not heavy, ({!r}, heavy)"
    code = '\n'.join(f"{step}\n{check.format(heavy, step)}" for step, heavy in steps)
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def imports(module):
    "Rooms that a module imports, and the names it takes"
    for node in ast.walk(ast.parse((REPO/'skin_lesions'/f'{module}.py').read_text(encoding='utf-8'))):
        if not isinstance(node, ast.ImportFrom) or not node.module: continue
        if node.level or node.module.startswith('skin_lesions.'): # export makes imports relative
            yield node.module.removeprefix('skin_lesions.'), [alias.name for alias in node.names]


@pytest.mark.parametrize('module', MODULES)
def test_a_room_imports_earlier_ones_and_no_private_names(module):
    for other, names in imports(module):
        assert NOTEBOOK[other] < NOTEBOOK[module], f'{module} imports {other}'
        assert not [n for n in names if n.startswith('_')], f'{module} takes {names} from {other}'


def test_every_module_has_a_test_file():
    assert not [m for m in MODULES if not (REPO/'tests'/f'test_{m}.py').is_file()]


def test_types():
    "mypy finds nothing in the package and in a program that uses it"
    pytest.importorskip('mypy')
    done = subprocess.run([sys.executable, '-m', 'mypy', '--no-incremental', 'skin_lesions', 'tests/data/typed_program.py'], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_release_holds_the_modules_and_no_more(repo, tmp_path):
    "tools/release.py makes an sdist and a wheel of what is in the repository"
    from release import built, missing, names_in
    copy = tmp_path/'source'
    files = subprocess.run(['git', 'ls-files'], cwd=repo, capture_output=True, text=True).stdout.split('\n')
    if not any(files): pytest.skip('not a git checkout')
    if importlib.util.find_spec('pip') is None: pytest.skip('this environment has no pip')
    for f in filter(None, files):
        (copy/f).parent.mkdir(parents=True, exist_ok=True)
        if (repo/f).is_file(): (copy/f).write_bytes((repo/f).read_bytes())
    (tmp_path/'dist').mkdir()
    sdist, wheel = built(tmp_path/'dist', copy, isolated=not importlib.util.find_spec('wheel')) # installing setuptools takes as long as building
    assert missing(sdist, copy) == missing(wheel, copy) == []
    (copy/'skin_lesions'/'forgotten.py').touch()
    assert missing(wheel, copy) == ['skin_lesions/forgotten.py']
    assert not [n for n in names_in(sdist) if n.startswith(('tests/', 'benchmarks/'))]
    names = names_in(wheel)
    assert {f'skin_lesions/{m}.py' for m in MODULES} <= set(names)
    assert not [n for n in names if not n.startswith(('skin_lesions/', 'skin_lesions-'))]
    assert 'skin_lesions/py.typed' in names and not [n for n in names if n.startswith('skin_lesions/') and not n.endswith('.py') and n != 'skin_lesions/py.typed' and not n.startswith(('skin_lesions/bundles/', 'skin_lesions/tables/'))]
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith('METADATA'))).decode()
    needs = [l for l in metadata.splitlines() if l.startswith('Requires-Dist') and 'extra' not in l]
    assert any('fastai' in n for n in needs) and not any('nbdev' in n or 'plum' in n or 'fastcore' in n for n in needs)


def test_install_lines_work_without_an_index():
    "Nothing is on an index: what installs this package names the repository, a clone or a folder of wheels; extras are ours"
    from release import settings
    from skin_lesions.core import REPOSITORY
    cfg = settings()
    assert REPOSITORY == cfg['git_url'] and f'git clone {REPOSITORY} && cd' in (REPO/'README.md').read_text(encoding='utf-8')
    files = [p for pattern in ('README.md', 'CONTRIBUTING.md', 'nbs/*.ipynb', 'skin_lesions/*.py', 'spaces/*.txt', 'docs/build.py') for p in REPO.glob(pattern)]
    lines = [(p.name, l) for p in files for l in p.read_text(encoding='utf-8').splitlines()]
    wrong = [(name, l[:150]) for name, l in lines if re.search(r"skin-lesions\[|pip install (-\S+ )*'?skin[-_]lesions\b(?!\[\w+\] @ git)", l)]
    assert not wrong, wrong
    asked = {extra for _, l in lines for extra in re.findall(r"skin_lesions\[(\w+)\]|pip install[^`]* '\.\[(\w+)\]'", l) for extra in extra if extra}
    assert asked and all(f'{extra}_requirements' in cfg for extra in asked), asked
    addresses = {a for _, l in lines for a in re.findall(r'git\+(https://[\w./-]+)', l)}
    assert addresses == {REPOSITORY}


def test_no_helper_of_the_tests_hides_a_library():
    "tests/ is on the path when tests run: a module there that is called like a library would be imported in its place, also by pandas"
    from importlib.metadata import packages_distributions
    from pandas.compat import _optional
    libraries = {*packages_distributions(), *getattr(_optional, 'VERSIONS', ()), *sys.stdlib_module_names, 'tables'}
    helpers = {p.stem for p in (REPO/'tests').glob('*.py')} - {'conftest'}
    assert len(helpers) > 50 and not helpers & libraries
