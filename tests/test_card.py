"The model card: every figure is from the record, for any class set."
import json, re

import pytest

from skin_lesions.core import named_bundle
from skin_lesions.bundle import read_bundle
from skin_lesions.card import model_card
from skin_lesions.classes import CLASS_SETS


@pytest.fixture(scope='module')
def record(): return read_bundle(named_bundle('ham10000'))


def test_every_decimal_in_the_card_is_in_the_record(record):
    "No figure is typed: each number with decimals comes from the record, rounded"
    numbers = [float(n) for n in re.findall(r'-?\d+\.\d+', json.dumps(record))]
    text = model_card(record, dataset='HAM10000')
    text = text[text.index('# '):text.index('## Licence')] # header and licence have numbers of their own
    for shown in re.findall(r'(?<![\d.])(\d+\.\d+)(%?)', text):
        value, digits = float(shown[0]), len(shown[0].split('.')[1])
        known = [100*n if shown[1] else n for n in numbers]
        assert any(abs(round(n, digits) - value) < 1e-9 for n in known), shown


def test_the_packaged_card_is_that_of_its_record(record):
    assert (named_bundle('ham10000')/'README.md').read_text(encoding='utf-8') == model_card(record, dataset='HAM10000')


@pytest.mark.parametrize('name', CLASS_SETS)
def test_any_class_set(name, record):
    classes = CLASS_SETS[name]
    scores = dict(accuracy=.5, average_recall=.4, recall={c: .3 for c in classes})
    text = model_card(record | dict(classes=classes.as_dict(), scores=scores, referral=None))
    assert f'# {len(classes)} diagnoses' in text
    for c in classes: assert f'| {c} | {classes.full_name(c)} | 0.300 |' in text


def test_what_is_not_known_is_said(record):
    bare = record | dict.fromkeys(('scores', 'split', 'recipe', 'calibration', 'rule', 'referral', 'ood', 'trained_on'))
    text = model_card(bare)
    for part in ('Not measured.', 'not recorded', 'most probable class', 'Not calibrated', 'cannot tell'): assert part in text
