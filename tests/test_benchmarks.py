"The scripts in benchmarks/ are not run here: they call what exists, and pages and README name scripts that exist"
import ast, importlib, importlib.util, json, os, re, subprocess, sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(str(p.relative_to(REPO)) for p in (REPO/'benchmarks').rglob('*.py'))
# of another project, and not installed here
OTHERS = ('benchmarks/comparison/with_scdiag.py',)


def imports(file):
    "Module and name of each `from skin_lesions.module import name`"
    tree = ast.parse((REPO/file).read_text())
    froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module.split('.')[0] == 'skin_lesions']
    return [(n.module, alias.name) for n in froms for alias in n.names]


@pytest.mark.parametrize('file', [f for f in SCRIPTS if f not in OTHERS])
def test_scripts_import_public_names_that_exist(file):
    for module, name in imports(file):
        assert not name.startswith('_'), f'{file} imports the private {module}.{name}'
        if name != '*': assert hasattr(importlib.import_module(module), name), f'{file}: {module} has no {name}'


def test_the_listing_needs_nothing_but_both_stars():
    "Names in the listing of page 74 come from fastai's star, this library's star, or Python"
    import builtins
    import skin_lesions.all as library
    fastai = importlib.import_module('fastai.vision.all')
    tree = ast.parse((REPO/'benchmarks'/'comparison'/'with_skin_lesions.py').read_text())
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    made = {n.id for n in names if isinstance(n.ctx, ast.Store)} | {'sys'}
    for name in {n.id for n in names} - made:
        assert hasattr(builtins, name) or name in library.__all__ or hasattr(fastai, name), name


def test_lines_of_scripts():
    lines = [(f, i, line) for f in SCRIPTS for i, line in enumerate((REPO/f).read_text().splitlines(), 1)]
    long = [f'{f}:{i}' for f, i, line in lines if len(line) > 120]
    assert not long, long


def test_readme_names_every_script_and_result():
    text = (REPO/'benchmarks'/'README.md').read_text()
    for link in re.findall(r'\]\(([^)]+)\)', text): assert (REPO/'benchmarks'/link).exists(), link
    for f in SCRIPTS:
        name = f.removeprefix('benchmarks/')
        assert f'({name})' in text or name.startswith('comparison/'), f'{name} is not in benchmarks/README.md'
    for f in (REPO/'benchmarks'/'results').glob('*.*'):
        assert f.name in text or f.name.startswith('ood_'), f'{f.name} is not in benchmarks/README.md'


def test_pages_name_scripts_that_exist():
    for page in (REPO/'nbs').glob('*.ipynb'):
        source = '\n'.join(''.join(c['source']) for c in json.loads(page.read_text())['cells'])
        for name in re.findall(r'benchmarks/[\w/.]+\.(?:py|sh|json|csv)\b', source):
            assert (REPO/name).is_file(), f'{page.name} names {name}'


def test_goals_of_ratios():
    "A goal is a decimal or a fraction; a ratio at the goal meets it"
    code = ("from run_all import holds; "
            "row = lambda goal, ratio: dict(goal=goal, ratio=ratio); "
            "assert holds(row('>= 1/1.05', 1/1.05)) == 'yes' and holds(row('>= 1.7', 1.6)) == 'no'; "
            "assert holds(row('<= 1.1', 1.1)) == 'yes' and holds(row('', 2.)) == ''")
    subprocess.run([sys.executable, '-c', code], check=True, cwd=REPO/'benchmarks'/'speed')


IN_FORKS = """
import multiprocessing, runpy, sys
def fork(method, get=multiprocessing.get_context): return get('fork')
multiprocessing.get_context = fork # the sides wait for no imports
sys.path.insert(0, '.')
runpy.run_path('serving.py', run_name='__main__')
"""


@pytest.mark.skipif(importlib.util.find_spec('onnxruntime') is None, reason='needs onnx, onnxscript and onnxruntime')
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs forks')
def test_serving_measures_its_rows(processes):
    "At small sizes: a ratio and a goal in each row, in CPU seconds where asked"
    done = processes.run('-c', IN_FORKS, '--smoke', '--cpu', '--images', '4', '--size', '64', '--repeats', '1', '--only', 'five', 'intervals',
                         cwd=REPO/'benchmarks'/'speed', timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith('JSON ')]
    assert [row['goal'] for row in rows] == ['<= 20', '<= 1', '>= 200', '>= 200']
    assert all(row['ratio'] > 0 and 'CPU s' in row['unit'] and row['pairs'] == 1 for row in rows)


def test_line_counts_of_the_comparison(tmp_path):
    "Docstrings of any length, comments and blank lines do not count"
    tree = ast.parse((REPO/'benchmarks'/'comparison.py').read_text())
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == 'lines_of')
    scope = {}
    exec(compile(ast.Module([function], []), 'comparison.py', 'exec'), scope)
    (tmp_path/'x.py').write_text('"""One\ntwo."""\nimport os\n\n# a comment\nprint(os.name)\n')
    assert scope['lines_of'](tmp_path/'x.py') == 2


@pytest.mark.parametrize('name', ['comparison', 'decisions', 'ham10000_fold0', 'split_leak'])
def test_a_result_with_intervals_says_how_they_were_made(name):
    "Runs whose predictions are not kept have the intervals of their day, and the page says so; scripts write today's method"
    record = json.loads((REPO/'benchmarks'/'results'/f'{name}.json').read_text())
    assert re.fullmatch(r'95 %, .*bootstrap over lesions.*(with|without) half lesions \(page 59\)', record['interval'])
    assert 'with half lesions (page 59)' in (REPO/'benchmarks'/f'{name}.py').read_text()
    page = dict(comparison='74_comparison', decisions='61_decide', ham10000_fold0='90_tutorial').get(name)
    if page and 'without half lesions' in record['interval']: assert 'plain percentile bootstrap' in (REPO/'nbs'/f'{page}.ipynb').read_text()
