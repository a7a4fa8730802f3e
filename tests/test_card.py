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
    text = model_card(record)
    text = text[text.index('# '):text.index('## Licence')] # header and licence have numbers of their own
    for shown in re.findall(r'(?<![\d.])(-?\d+\.\d+)(%?)', text):
        value, digits = float(shown[0]), len(shown[0].split('.')[1])
        known = [100*n if shown[1] else n for n in numbers]
        assert any(abs(round(n, digits) - value) < 1e-9 for n in known), shown


def test_the_packaged_card_is_that_of_its_record(record):
    assert (named_bundle('ham10000')/'README.md').read_text(encoding='utf-8') == model_card(record)


def test_views_have_intervals_of_their_own(record):
    ends = dict(macro_auc=.958, macro_auc_low=.951, macro_auc_high=.963)
    seen = dict(name='dihedral', value=.67, low=.65, high=.69, gain=dict(difference=.01, low=-.01, high=.02), **ends)
    text = model_card(record | dict(scores=record['scores'] | dict(views=seen)))
    assert 'average recall 0.670 (0.650 to 0.690)' in text and 'macro AUC 0.958 (0.951 to 0.963)' in text


def test_whose_images_they_were(record):
    "The collections that the record names, with their owners"
    scores = record['scores']
    text = model_card(record | dict(scores=scores | dict(dataset='HAM10000 and MILK10k')))
    assert '| HAM10000 and MILK10k |' in text and 'ViDIR Group' in text and 'MILK study team' in text
    text = model_card(record | dict(scores=scores | dict(dataset='HAM10000')))
    assert '| HAM10000 |' in text and 'ViDIR Group' in text and 'MILK study team' not in text
    assert 'CC BY-NC' not in model_card(record | dict(scores=scores | dict(dataset='ours')), license='mit')


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


def test_the_first_table_has_the_collection_itself_and_others(record):
    "Average recall by the rule, macro AUC and referral with intervals; another collection in a row below"
    decided = dict(average_recall=.75, low=.7, high=.8, accuracy=.7, classes={})
    referral = dict(asked=.95, reached=.95, referred=.4, sensitivity=.94, sensitivity_low=.92, sensitivity_high=.96,
                    specificity=.61, specificity_low=.59, specificity_high=.63)
    scores = dict(n_images=2004, accuracy=.8, average_recall=.7, macro_auc=.96, macro_auc_low=.95, macro_auc_high=.97, decided=decided,
                  parts=5, referral=referral, error_of_probabilities=.06, error_of_calibrated=.02)
    other = dict(name='elsewhere', images=1048, average_recall=.4, average_recall_low=.35, average_recall_high=.45, outside_ood=.08)
    text = model_card(record | dict(scores=scores | dict(collections=[other])), dataset='HAM10000')
    rows = [line.split(' | ') for line in text[text.index('## At a glance'):text.index('## Use')].splitlines() if line.startswith('| ')]
    table = dict(zip(rows[0][2:], zip(rows[2][2:], rows[3][2:])))
    assert table['average recall by the rule'] == ('0.750 (0.700 to 0.800)', '0.400 (0.350 to 0.450)')
    assert table['macro AUC'] == ('0.960 (0.950 to 0.970)', 'not measured')
    assert table['malignant referred'][0] == '0.940 (0.920 to 0.960)' and table['benign not referred'][0] == '0.610 (0.590 to 0.630)'
    assert [r[:2] for r in rows[2:]] == [['| HAM10000', '2,004'], ['| elsewhere', '1,048']]
    assert 'At a glance' not in model_card(record | dict(scores=scores | dict(decided=None)))
