"The report: one file without scripts, whatever the names in it."
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from skin_lesions.benefit import decision_curve, per_thousand
from skin_lesions.classes import HAM10000, ISIC2019, MELANOMA, map_classes, with_classes
from skin_lesions.evaluate import scores
from skin_lesions.report import html_report
from prediction_tables import synthetic_table


class Tags(HTMLParser):
    "The tags of a page, which must nest"
    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert not self.open
    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ('meta', 'img'): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag


def page(table, tmp_path, **kwargs):
    "The text of a report, checked to be one file"
    text = html_report(table, tmp_path/'r.html', **kwargs).read_text(encoding='utf-8')
    for tag, attrs in Tags(text).seen:
        assert tag not in ('script', 'link', 'iframe', 'object', 'a', 'form')
        assert not any(name.startswith('on') for name in attrs)
        if 'src' in attrs: assert attrs['src'].startswith('data:image/png;base64,')
    assert not re.search(r'https?:|url\(|@import', text)
    return text.replace('\N{NO-BREAK SPACE}', ' ')


@pytest.mark.parametrize('evil', ['"><script>alert(1)</script>', "'><img src=x onerror=alert(1)>", '</style><script>x</script>', '&lt;b&gt; & "'])
def test_names_from_outside_do_no_harm(evil, tmp_path, no_figures):
    table = synthetic_table(30)
    table = table.assign(group=table.group.where(table.index > 0, evil), image_id=table.image_id.where(table.index > 0, evil))
    meta = table[['image_id']].assign(sex=np.where(table.index % 2, evil, 'female'), age=50.)
    with no_figures(): text = page(table, tmp_path, run={evil: evil, 'split': evil, 'arguments': {evil: [evil]}}, meta=meta, title=evil)
    assert '<script' not in text and '<img src=x' not in text


@pytest.mark.parametrize('classes', [ISIC2019, MELANOMA], ids=lambda c: c.name)
def test_any_class_set_and_its_decision(classes, tmp_path):
    table = synthetic_table(40, classes=classes)
    text = page(table.assign(decision=table.dx), tmp_path)
    assert '1.000' in text and f"{scores(table)['accuracy']:.3f}" in text # the decision is right; the most probable class is beside it
    for c in classes: assert classes.full_name(c) in text


def test_a_mapping_is_named(tmp_path, no_figures):
    with no_figures(): text = page(map_classes(synthetic_table(40, classes=ISIC2019), 'HAM10000'), tmp_path)
    assert 'Diagnoses mapped: ISIC2019 to HAM10000' in text


def test_a_report_that_fails_leaves_the_old_one(tmp_path, no_figures):
    table = synthetic_table(30)
    with no_figures(): before = html_report(table, tmp_path/'r.html').read_bytes()
    with pytest.raises(ValueError, match='sum to'): html_report(table.assign(nv=.9), tmp_path/'r.html')
    with pytest.raises(ValueError, match='history lacks'): html_report(table, tmp_path/'r.html', history=pd.DataFrame({'epoch': [0]}))
    assert (tmp_path/'r.html').read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ['r.html']


def test_worst_errors_show_the_images_of_this_disk(tmp_path, no_figures):
    "Malignant called benign first; images stay in their files, none is in the page, and a browser shows them"
    import shutil
    from PIL import Image
    from skin_lesions.report import worst_errors
    table = synthetic_table(60, skill=.8)
    worst, shown = worst_errors(table, 100), worst_errors(table)
    missed = worst.missed.to_numpy()
    assert missed.any() and not missed.all() and (np.diff(missed.astype(int)) <= 0).all()
    assert worst.true[missed].isin(HAM10000.malignant).all() and not worst.called[missed].isin(HAM10000.malignant).any()
    for part in (worst[missed], worst[~missed]): assert (np.diff(part.p_true) >= 0).all()
    (tmp_path/'data & more').mkdir()
    paths = {i: tmp_path/'data & more'/f'{i} ä#.png' for i in table.image_id}
    for path in paths.values(): Image.new('RGB', (9, 9), 'brown').save(path)
    meta = table[['image_id']].assign(path=[str(paths[i]) for i in table.image_id])
    report = html_report(table, tmp_path/'run'/'r.html', meta=meta)
    text = report.read_text(encoding='utf-8')
    assert 'image/jpeg' not in text and str(tmp_path) not in text, 'no photograph, and no path of this machine'
    found = re.findall(r'src="(?!data:)([^"]*)"', text)
    assert len(found) == len(shown) and all(f.startswith('../data') for f in found)
    with no_figures(): assert 'file:' not in html_report(table, tmp_path/'run'/'plain.html').read_text(encoding='utf-8')
    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if browser is None: pytest.skip('no Chromium on this machine')
    api = pytest.importorskip('playwright.sync_api')
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    with api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=browser, args=['--no-sandbox'])
        for width, scheme in ((1280, 'light'), (390, 'dark')):
            page = chromium.new_context(viewport=dict(width=width, height=800), color_scheme=scheme).new_page()
            page.goto(report.as_uri())
            assert page.evaluate('[...document.images].every(i => i.naturalWidth > 0)'), 'all are shown'
            assert page.evaluate('document.documentElement.scrollWidth') <= width
            assert not [(v['id'], v['nodes'][0]['html'][:200]) for v in axe.run(page).response['violations']]
        chromium.close()


def test_figure_and_text_state_one_calibration_error(tmp_path, monkeypatch):
    "The legends of the diagrams and the sentence under them; with other bins it is another number"
    from matplotlib.figure import Figure
    from skin_lesions import report
    legends, drawn = [], report.html_figure
    def with_legends(draw, size, alt, caption):
        figure = Figure()
        draw(figure)
        legends.extend(t.get_text() for ax in figure.axes if ax.get_legend() for t in ax.get_legend().get_texts())
        return drawn(draw, size, alt, caption)
    monkeypatch.setattr(report, 'html_figure', with_legends)
    text = page(synthetic_table(300), tmp_path)
    errors = [t.split()[1] for t in legends if t.startswith('ECE')]
    assert len(errors) == 2 and f"Expected calibration error of the most probable class and of malignancy: {', '.join(errors)}." in text


def test_a_table_without_an_error_has_no_section_of_errors(tmp_path, no_figures):
    table = synthetic_table(40)
    with no_figures(): text = page(table.assign(decision=table.dx), tmp_path)
    assert 'Worst errors' not in text and 'Reliability' in text and 'Risk and coverage' in text


def test_subgroups_by_skin_are_in_the_report(tmp_path, no_figures):
    table = synthetic_table(40)
    meta = table[['image_id']].assign(skin_type=['2', '4']*(len(table)//2)+['2']*(len(table) % 2), skin_tone='tan')
    with no_figures():
        page = html_report(table, tmp_path/'a.html', meta=meta).read_text()
        without = html_report(table, tmp_path/'b.html', meta=meta[['image_id']].assign(sex='male')).read_text()
    assert '>Skin type<' in page and '>Skin tone, estimated<' in page and '>tan<' in page
    assert 'Skin t' not in without


def cells(text, heading):
    "The rows of the first table after a heading"
    body = text[text.index(heading):].split('<tbody>')[1].split('</tbody>')[0]
    return [[re.sub('<[^>]*>', '', c).strip() for c in re.findall(r'<t[hd].*?</t[hd]>', row, re.S)] for row in body.split('<tr>')[1:]]


def test_the_counts_of_1000_lesions_are_those_of_benefit(tmp_path, quick_reports):
    "Row by row, with intervals, at the prevalence that is asked; what is found and what is missed are all malignant lesions"
    table = synthetic_table(120)
    text = page(table.assign(refer=table.mel > .1), tmp_path, prevalence=.05)
    rows = cells(text, 'Per 1,000 lesions, 50 of them malignant')
    assert [r[0] for r in rows] == ['everybody', '1 %', '2 %', '5 %', '10 %', 'its referral'] and rows[0][1:] == ['1,000', '50.0', '0']
    for row, threshold in zip(rows[1:], (.01, .02, .05, .1, None)):
        counts = per_thousand(table.assign(refer=table.mel > .1), .05, threshold).loc['network']
        for text, name, digits in zip(row[1:], ('referred', 'found', 'missed'), (0, 1, 1)):
            assert text == '{:.{d}f} ({:.{d}f} to {:.{d}f})'.format(*counts.loc[name], d=digits)
        assert counts.value['found']+counts.value['missed'] == pytest.approx(50)


@pytest.mark.parametrize('skill, helps', [(3., True), (0., False)])
def test_the_report_says_where_the_network_helps(skill, helps, tmp_path, quick_reports):
    "The thresholds are those at which the gain of the decision curve has an interval above nothing; guesses have none"
    table = synthetic_table(400, skill=skill)
    if not skill: table[list(HAM10000)] = 1/7
    text = page(table, tmp_path)
    curve = decision_curve(table, .03, np.linspace(.01, .15, 20).tolist())
    t = curve.threshold[curve.gain_low > 0]
    assert bool(len(t)) == helps
    assert (f'from a threshold of {100*t.min():.2g} % to one of {100*t.max():.2g} %' if helps else 'At no threshold shown') in text


def test_no_benefit_without_malignancy(tmp_path, quick_reports):
    "A set that knows none, and a table of benign lesions; lesions that are unknown do no harm"
    own = with_classes(synthetic_table(40, classes=MELANOMA).rename(columns=dict(mel='dark', other='light')).replace(dict(dx=dict(mel='dark', other='light'))), ['dark', 'light'])
    table = synthetic_table(60)
    bad = table.dx.isin(HAM10000.malignant)
    for other in (own, table[~bad]): assert 'Net benefit' not in page(other, tmp_path)
    assert 'Net benefit' in page(table.drop(columns='group'), tmp_path)
    with pytest.raises(ValueError, match='prevalence must be above 0 and below 1, got 0'): html_report(table, tmp_path/'r.html', prevalence=0)
