"One look: the report, the gallery and the app take their colours and pieces from one sheet, and numbers have one form."
import ast, re
from pathlib import Path

import pytest

from skin_lesions.style import DARK, LIGHT, PIECE_STYLE, color_variables, html_page, interval_text, number_text, percent_text

PACKAGE = Path(__file__).resolve().parent.parent/'skin_lesions'


def test_no_module_has_colours_or_rules_of_its_own():
    "CSS stands in `style`; colours of plots in matplotlib's calls are no CSS"
    for path in PACKAGE.glob('*.py'):
        if path.stem in ('style', '_modidx'): continue
        texts = [n.value for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        found = [t for t in texts if re.search(r'[.\w]+ *\{[^}]*\b(color|background|border|font|margin)\b[^}]*:', t)]
        assert not found, f'{path.name}: {found[0][:200]}'


def test_scores_become_text_in_one_place():
    definitions = {(p.stem, n.name) for p in PACKAGE.glob('*.py') for n in ast.walk(ast.parse(p.read_text(encoding='utf-8')))
                   if isinstance(n, ast.FunctionDef) and n.name in ('number_text', 'interval_text', 'percent_text')}
    assert {m for m, _ in definitions} == {'style'} and len(definitions) == 3


@pytest.mark.parametrize('value, text', [(0., '0.000'), (1, '1.000'), (float('nan'), '–'), (None, '–')])
def test_numbers(value, text): assert number_text(value) == text and interval_text(value, 0, 1) == (text if text == '–' else f'{text} (0.000 to 1.000)')


def test_a_chance_is_never_rounded_to_certainty():
    for k in range(1, 10_000):
        assert percent_text(k/10_000) not in ('0 %', '100 %')


def test_both_schemes_name_the_same_colours_and_all_that_is_used():
    assert set(LIGHT) == set(DARK) >= set(re.findall(r'var\(--sl-(\w+)\)', PIECE_STYLE))
    assert not re.findall(r'#[0-9a-fA-F]{3,6}\b', PIECE_STYLE.replace('#fff', '')), 'a colour that does not turn dark'
    assert color_variables('a', 'b').count('{') == 2


def test_a_page_escapes_and_loads_nothing():
    page = html_page('</title><script>', 'a < b')
    assert '<script' not in page and 'a &lt; b' in page and not re.search(r'https?:|url\(|@import', page)


def test_a_number_keeps_its_unit_and_an_interval_its_ends():
    space = '\N{NO-BREAK SPACE}'
    page = html_page('t', 'recall 0.582 (0.513 to 0.658), under 1 %, 95 %; from 2 to 3, (as it is said to be)')
    assert f'recall 0.582 (0.513{space}to{space}0.658), under 1{space}%, 95{space}%; from 2 to 3, (as it is said to be)' in page
