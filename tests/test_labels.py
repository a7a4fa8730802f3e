"Suspect labels: by the definition, with missing classes, without the library; the gallery and the command"
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from skin_lesions.classes import HAM10000, with_classes
from skin_lesions.labels import suspect_gallery, suspect_labels
from skin_lesions.predictions import save_predictions

CODES = list(HAM10000)


def predictions(seed, n=210, classes=7, sharp=3.):
    "Labels, a twentieth of them exchanged, and probabilities that follow what was true"
    rng = np.random.default_rng(seed)
    true = np.arange(n) % classes
    logits = rng.normal(size=(n, 7))
    logits[np.arange(n), true] += sharp
    p = np.exp(logits)/np.exp(logits).sum(1, keepdims=True)
    label = true.copy()
    label[:n//20] = (label[:n//20]+1) % classes
    table = pd.DataFrame(p, columns=CODES).assign(image_id=[f'i{k:04d}' for k in range(n)], dx=np.array(CODES)[label])
    return with_classes(table, HAM10000)


def by_definition(table):
    "Suspects and suggestions, image by image, from the classes that have images"
    present = [c for c in CODES if (table.dx == c).any()]
    rows = [{c: row[c]/sum(row[k] for k in present) for c in present} for row in table.to_dict('records')]
    means = {c: np.mean([row[c] for row, dx in zip(rows, table.dx) if dx == c]) for c in present}
    suggested = {}
    for row, dx, name in zip(rows, table.dx, table.image_id):
        able = [c for c in present if row[c] >= means[c]]
        suggested[name] = max(able, key=row.get) if able else dx
    return suggested


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('classes', [7, 3])
def test_by_definition(seed, classes):
    pytest.importorskip('cleanlab')
    table = predictions(seed, classes=classes)
    found, expected = suspect_labels(table), by_definition(table)
    labels = dict(zip(table.image_id, table.dx))
    assert dict(zip(found.image_id, found.suggested)) == expected
    assert set(found.image_id[found.suspect]) == {i for i, c in expected.items() if c != labels[i]}
    assert found.suspect.is_monotonic_decreasing and found.p_label[found.suspect].is_monotonic_increasing
    exchanged = set(table.image_id[:210//20])
    assert len(exchanged & set(found.image_id[found.suspect])) >= 4


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, 'cleanlab.filter', None)
    with pytest.raises(ModuleNotFoundError, match='pip install cleanlab'): suspect_labels(predictions(0))


def test_errors(tmp_path):
    pytest.importorskip('cleanlab')
    table = predictions(0)
    with pytest.raises(ValueError, match='at least two classes'): suspect_labels(table[table.dx == 'nv'])
    with pytest.raises(ValueError, match='scores need labels'): suspect_labels(table.drop(columns='dx'))
    with pytest.raises(ValueError, match='suspect_labels makes them'): suspect_gallery(table, tmp_path/'x.html')


def test_gallery_links_and_escapes(tmp_path):
    pytest.importorskip('cleanlab')
    found = suspect_labels(predictions(1))
    meta = found[['image_id']].assign(path=str(tmp_path/'image.jpg'))
    found.loc[0, 'image_id'] = '<script>'
    page = suspect_gallery(found, tmp_path/'labels.html', meta).read_text(encoding='utf-8')
    assert page.count('<img') == found.suspect.sum()-1 and '<script' not in page and 'data:image' not in page
    assert '<img' not in suspect_gallery(found, tmp_path/'names.html').read_text(encoding='utf-8')


def test_the_command(tmp_path, capsys):
    pytest.importorskip('cleanlab')
    from skin_lesions.cli import main
    save_predictions(predictions(2), tmp_path/'table.csv')
    assert main(['audit', str(tmp_path/'table.csv'), '--labels', '--out', str(tmp_path/'out')]) == 0
    written = pd.read_csv(tmp_path/'out'/'labels.csv')
    assert f'{written.suspect.sum()} of 210 labels deserve a second look' in capsys.readouterr().out
    assert {p.name for p in Path(tmp_path/'out').iterdir()} == {'labels.csv', 'labels.html'}
    assert main(['audit', 'a', 'b', '--labels']) == 2
    assert 'one run folder or predictions table' in capsys.readouterr().err
