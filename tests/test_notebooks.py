"Notebook hygiene: what CONTRIBUTING asks of every page."
import ast, base64, io, json, re, sys, tokenize
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent/'nbs').glob('*.ipynb'))


def outputs(nb):
    for cell in nb['cells']:
        for out in cell.get('outputs', []): yield cell, out


def text_of(out):
    data = out.get('data', {})
    return ''.join(out.get('text', [])) + ''.join(''.join(v) for k, v in data.items() if k.startswith('text/'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_page_reads_as_a_page(path):
    cells = json.loads(path.read_text())['cells']
    first = ''.join(cells[0]['source'])
    assert cells[0]['cell_type'] == 'markdown' and first.startswith('# '), 'title first'
    assert re.search(r'^> \S', first, re.M), 'then one line that says what the reader gets'
    for cell in cells:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and '#| export' in source:
            assert not re.search(r'^\s*(from|import) +(nbdev|execnb|fastcore\.test)', source, re.M), source[:80]


# Exported cells of more than 25 lines. The list can only shrink: a cell that is not long any more must leave it.
LONG_CELLS = {
    '13_patient d0f5331d', # class PatientEncoder
    '16_cache 16d171fb', # class PixelStore
    '16_cache 3c397247', # class ImageCache
    '30_networks 894bdb6d', # class TwoStageNet(ClassifierNet)
    '31_learner b9cd2ad2', # def two_stage_learner(
    '33_recipes 1d507224', # class Recipe
    '50_gradcam 26d93488', # class GradCAM
    '55_ood 6f8e5b1d', # class OODScore
    '66_predict 0f08b484', # class Predictor
    '70_train 9ab19297', # def train_run(
    '78_embed a0eff2ae', # class Embedder
    '78_embed b416a266', # class FeatureStore
}
MOST_LONG_CELLS = 20
# What the field calls otherwise (CONTRIBUTING, "Words")
WORDS = re.compile(r"""(?<!['"])\b(pictures?|processors?|in turns|body sites?|what the network says|photographs? of lesions)\b(?!['"])""", re.I)


def exported(path):
    for cell in json.loads(path.read_text())['cells']:
        source = ''.join(cell['source']).rstrip()
        if cell['cell_type'] == 'code' and re.search(r'^#\| *export', source, re.M): yield cell['id'], source


def test_exported_cells_are_short():
    found = {f'{path.stem} {cell}' for path in NOTEBOOKS for cell, source in exported(path) if source.count('\n') >= 25}
    assert found <= LONG_CELLS, f'more than 25 lines, split or unfold: {sorted(found-LONG_CELLS)}'
    assert LONG_CELLS <= found, f'short by now, take them out of the list: {sorted(LONG_CELLS-found)}'
    assert len(LONG_CELLS) <= MOST_LONG_CELLS


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_lines_fit_and_hold_one_statement(path):
    for cell, source in exported(path):
        wide = [line for line in source.split('\n') if len(line) > 120]
        assert not wide, f'{cell}: {len(wide[0])} characters: {wide[0]}'
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        assert not [t.line for t in tokens if t.type == tokenize.OP and t.string == ';'], f'{cell}: two statements in a line'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_words_are_those_of_the_field(path):
    for cell in json.loads(path.read_text())['cells']:
        word = WORDS.search(''.join(cell['source']))
        assert not word, f"{cell['id']}: {word[0]!r} in {''.join(cell['source'])[max(0, word.start()-60):word.end()+40]!r}"


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_outputs_are_clean_and_small(path):
    nb, total = json.loads(path.read_text()), 0
    for cell, out in outputs(nb):
        assert out['output_type'] != 'error', ''.join(cell['source'])[:200]
        assert out.get('name') != 'stderr', 'a warning or a progress bar in the output of: ' + ''.join(cell['source'])[:200]
        text = text_of(out)
        assert not re.search(r'(^|[\s\'"(])/(home|root|tmp|work|Users|content|kaggle/working)/', text), text[:300]
        assert '█' not in text and 'progress' not in text.lower().split(), 'a progress bar in the output of: ' + ''.join(cell['source'])[:200]
        assert not re.search(r'0x[0-9a-f]{8,}', text), text[:300]
        size = len(json.dumps(out)); total += size
        assert size < 100_000, f'an output of {size} bytes'
    assert total < 200_000


def figures_tool(repo):
    sys.path.insert(0, str(repo/'tools'))
    import figures
    return figures


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_figures_are_legible_and_small(path, repo):
    "At least 100 dots an inch, as the file itself says, and at most 50 kB: matplotlib's own resolution, unless a cell lowers it"
    assert not list(figures_tool(repo).problems(json.loads(path.read_text()))), 'run the page again without a dpi of its own, store its outputs, then python tools/figures.py'


@pytest.mark.parametrize('dpi, kind, text, wrong', [
    (100, 'png', '<Figure size 300x200 with 1 Axes>', ''), (75, 'png', '<Figure size 225x150 with 1 Axes>', 'of 75 dpi'), (None, 'png', '<Figure size 300x200 with 1 Axes>', 'of unknown dpi'),
    (72, 'jpeg', '<IPython.core.display.Image object>', 'of 72 dpi'), (None, 'png', '<PIL.Image.Image image mode=RGB size=300x200>', '')])
def test_a_coarse_figure_is_found(dpi, kind, text, wrong, repo):
    from PIL import Image
    file = io.BytesIO()
    Image.new('RGB', (300, 200)).save(file, kind, **dict(dpi=(dpi, dpi)) if dpi else {})
    data = {f'image/{kind}': base64.b64encode(file.getvalue()).decode(), 'text/plain': text}
    found = list(figures_tool(repo).problems({'cells': [{'id': 'a', 'outputs': [{'data': data}]}]}))
    assert (len(found) == 1 and wrong in found[0]) if wrong else not found


@pytest.mark.parametrize('noise, kind', [(0, 'png'), (6, 'jpeg')], ids=['a plot', 'as noisy as a photograph'])
def test_a_smaller_figure_keeps_its_resolution(noise, kind, repo):
    import numpy as np
    from PIL import Image
    tool, file = figures_tool(repo), io.BytesIO()
    pixels = np.linspace(50, 200, 400)[None,:,None] + noise*np.random.default_rng(0).standard_normal((250, 400, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(file, 'PNG', dpi=(100, 100), compress_level=0)
    data = {'image/png': base64.b64encode(file.getvalue()).decode(), 'text/plain': '<Figure size 400x250 with 1 Axes>'}
    notebook = {'cells': [{'id': 'a', 'outputs': [{'data': data}]}]}
    assert len(file.getvalue()) > 50_000 and 'bytes' in list(tool.problems(notebook))[0]
    tool.shrink(notebook)
    assert set(data) == {'text/plain', f'image/{kind}'} and not list(tool.problems(notebook))
    once = data[f'image/{kind}']
    assert round(Image.open(io.BytesIO(base64.b64decode(once))).info['dpi'][0]) == 100
    tool.shrink(notebook)
    assert data[f'image/{kind}'] == once, 'a second run changes nothing'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_no_machine_in_the_source(path):
    for cell in json.loads(path.read_text())['cells']:
        source = ''.join(cell['source'])
        assert not re.search(r'[\'"]/(home|root|tmp|work|Users)/', source), source[:200]
        assert 'HF_TOKEN' not in source and 'api_key' not in source


def readme_tool(repo):
    sys.path.insert(0, str(repo/'tools'))
    import readme
    return readme


def test_readme_is_the_index_page(repo):
    tool = readme_tool(repo)
    assert (repo/'README.md').read_text() == tool.readme_text(repo/'nbs'/'index.ipynb'), 'python tools/readme.py writes it'
    for name, data in tool.figures(repo/'nbs'/'index.ipynb'): assert (repo/'nbs'/'images'/name).read_bytes() == data, 'python tools/readme.py writes it'


def last_value(source):
    "What the last expression of a cell gives"
    tree, names = ast.parse(source), {}
    exec(compile(ast.Module(tree.body[:-1], []), 'cell', 'exec'), names)
    return eval(compile(ast.Expression(tree.body[-1].value), 'cell', 'eval'), names)


def test_the_readme_s_results_are_those_of_today(repo, monkeypatch):
    "The table is what its cell prints now, from the packaged network's record and from benchmarks"
    monkeypatch.chdir(repo/'nbs')
    cell = next(c for c in json.loads((repo/'nbs'/'index.ipynb').read_text())['cells'] if c['id'] == 'results')
    text = last_value(''.join(cell['source'])).data
    assert text.count('\n|') == 6 and text in (repo/'README.md').read_text(), 'run nbs/index.ipynb again and store its outputs, then python tools/readme.py'


def test_badges_are_true(repo):
    from release import settings
    cfg, text = settings(), (repo/'README.md').read_text()
    badges = re.findall(r'^\[!\[(.+?)\]\(https://img\.shields\.io/badge/(\S+?)\)\]', text, re.M)
    assert {alt for alt, _ in badges} == {f"Python {cfg['min_python']} and newer", f"fastai {re.search('fastai>=([0-9.]+)', cfg['requirements'])[1]} and newer",
                                          'Code: Apache 2.0', 'Research software, not a medical device'}
    assert cfg['license'] == 'apache2' and 'Apache License' in (repo/'LICENSE').read_text()
    for alt, url in badges: assert url.rsplit('-', 1)[0].replace('_', ' ').replace('-', ' ').lower() == alt.replace(':', '').replace(',', '').lower()


def test_every_page_is_listed(repo):
    "nbs/README.md is read from the pages, so that a new one needs no line anywhere"
    text = (repo/'nbs'/'README.md').read_text()
    assert text == readme_tool(repo).pages_text(repo/'nbs'), 'python tools/readme.py writes it'
    listed = re.findall(r'^\| \[(\d\d) .+\]\((\S+\.ipynb)\) \|', text, re.M)
    assert sorted(name for _, name in listed) == [p.name for p in NOTEBOOKS if p.name != 'index.ipynb']
    assert all(name.startswith(number) for number, name in listed)
    assert '](nbs/README.md)' in (repo/'README.md').read_text()


def test_no_photograph_in_the_repository(repo):
    assert not [p for p in repo.rglob('ISIC_00*') if '.venv' not in str(p)]


def dead_links(texts, folder):
    "Targets of relative markdown links that are not there"
    targets = {t for text in texts for t in re.findall(r'\]\((?!https?:|#|mailto:)([^)\s#]+)(?:#[^)\s]*)?\)', re.sub(r'```.*?```|`[^`]*`', '', text, flags=re.S))}
    return sorted(t for t in targets if not (folder/t).exists())


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_no_dead_link_on_a_page(path):
    texts = [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown']
    assert not dead_links(texts, path.parent)


def test_no_dead_link_in_the_texts(repo):
    files = [*repo.glob('*.md'), *repo.glob('*/README.md'), repo/'skin_lesions'/'bundles'/'ham10000'/'README.md']
    assert not {str(f): dead for f in files if (dead := dead_links([f.read_text()], f.parent))}
    assert dead_links(['[x](gone.md) and `[y](code.md)`'], repo) == ['gone.md']


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.name[:2].isdigit()], ids=lambda p: p.name)
def test_a_page_says_when_to_use_it(path):
    "One sentence: `Use this page when ...`, or `Use it ...`"
    words = '\n'.join(''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown')
    assert re.search(r'\bUse (this page|it|them)\b', words), path.name
