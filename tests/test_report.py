"The report: one file without scripts, whatever the names in it."
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from skin_lesions.classes import ISIC2019, MELANOMA, map_classes
from skin_lesions.evaluate import scores
from skin_lesions.report import html_report
from tables import synthetic_table


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
    return text


@pytest.mark.parametrize('evil', ['"><script>alert(1)</script>', "'><img src=x onerror=alert(1)>", '</style><script>x</script>', '&lt;b&gt; & "'])
def test_names_from_outside_do_no_harm(evil, tmp_path):
    table = synthetic_table(30)
    table = table.assign(group=table.group.where(table.index > 0, evil), image_id=table.image_id.where(table.index > 0, evil))
    meta = table[['image_id']].assign(sex=np.where(table.index % 2, evil, 'female'), age=50.)
    text = page(table, tmp_path, run={evil: evil, 'split': evil, 'arguments': {evil: [evil]}}, meta=meta, title=evil)
    assert '<script' not in text and '<img src=x' not in text


@pytest.mark.parametrize('classes', [ISIC2019, MELANOMA], ids=lambda c: c.name)
def test_any_class_set_and_its_decision(classes, tmp_path):
    table = synthetic_table(40, classes=classes)
    text = page(table.assign(decision=table.dx), tmp_path)
    assert '1.000' in text and f"{scores(table)['accuracy']:.3f}" in text # the decision is right; the most probable class is beside it
    for c in classes: assert classes.full_name(c) in text


def test_a_mapping_is_named(tmp_path):
    assert 'Diagnoses mapped: ISIC2019 to HAM10000' in page(map_classes(synthetic_table(40, classes=ISIC2019), 'HAM10000'), tmp_path)


def test_a_report_that_fails_leaves_the_old_one(tmp_path):
    table = synthetic_table(30)
    before = html_report(table, tmp_path/'r.html').read_bytes()
    with pytest.raises(ValueError, match='sum to'): html_report(table.assign(nv=.9), tmp_path/'r.html')
    with pytest.raises(ValueError, match='history lacks'): html_report(table, tmp_path/'r.html', history=pd.DataFrame({'epoch': [0]}))
    assert (tmp_path/'r.html').read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ['r.html']
