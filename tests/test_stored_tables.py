"Every table on pages 58 and 71 to 74 is made again, byte for byte, from the tables of predictions and the measurements in `benchmarks/results`."
import os, re, sys
from pathlib import Path

import pytest

pytest.importorskip('execnb', reason='needs nbdev')
pytest.importorskip('nbdev', reason='needs nbdev')

PAGES = ('58_predictions', '71_experiments', '72_posthoc', '73_reproduce', '74_comparison')


def cells_of(page):
    "The page, its imports and the cells flagged `stored`"
    from execnb.nbio import read_nb
    nb = read_nb(page)
    flagged = [c for c in nb.cells if c.cell_type == 'code' and re.match(r'#\|\s*stored', c.source)]
    first_words = min(i for i, c in enumerate(nb.cells) if c.cell_type == 'markdown' and i > 0)
    imports = [c for c in nb.cells[:first_words] if c.cell_type == 'code' and '#| default_exp' not in c.source]
    return nb, imports, flagged


def texts(outputs):
    "What a reader sees of outputs, but for figures"
    seen = []
    for o in outputs:
        data = o.get('data', {'stream': o.get('text', '')})
        seen += [(kind, ''.join(text)) for kind, text in sorted(data.items()) if not kind.startswith('image/')]
    return [(kind, re.sub(r'<(Figure|Axes)[^>]*>', '', text)) for kind, text in seen]


@pytest.fixture
def figures_drawn_once(monkeypatch):
    "A figure that is shown is drawn, but only once: IPython draws it when a cell ends, and twice for a PNG, which `texts` leaves out"
    pylabtools, bases = pytest.importorskip('IPython.core.pylabtools'), pytest.importorskip('matplotlib.backend_bases')
    monkeypatch.setattr(pylabtools, 'print_figure', lambda fig, *args, **kwargs: fig.canvas.draw() or '')
    monkeypatch.setattr(bases.FigureCanvasBase, 'draw_idle', lambda *args, **kwargs: None)


@pytest.mark.parametrize('name', PAGES)
def test_every_table_is_made_again(name, repo, monkeypatch, figures_drawn_once):
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    monkeypatch.chdir(repo/'nbs')
    monkeypatch.syspath_prepend(str(repo))
    nb, imports, flagged = cells_of(repo/'nbs'/f'{name}.ipynb')
    assert len(flagged) >= 1
    stored, shell = [texts(c.outputs) for c in flagged], CaptureShell(mpl_format='png')
    module = re.search(r'default_exp (\w+)', '\n'.join(c.source for c in nb.cells))
    if module: shell.run(f'from skin_lesions.{module[1]} import *')
    for cell in imports:
        shell.run(cell.source)
        assert not shell.exc, (cell.source, shell.exc)
    for cell in flagged:
        shell.cell(cell)
        assert not shell.exc, (cell.source, shell.exc)
    clean_nb(nb, clean_ids=False)
    made = [texts(c.outputs) for c in flagged]
    for cell, then, now in zip(flagged, stored, made): assert now == then, cell.source
    assert any(kind == 'text/html' for out in stored for kind, _ in out)
