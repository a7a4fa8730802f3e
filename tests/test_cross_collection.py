"Across collections: diagnoses mapped or counted apart, intervals against slow loops, and clear errors."

import numpy as np
import pandas as pd
import pytest

from skin_lesions.bootstrap import unit_draws, units_of
from skin_lesions.classes import HAM10000, MILK10K, with_classes
from skin_lesions.cross_collection import calibration_interval, collection_row, cross_table, plot_cross_table, predict_collection
from skin_lesions.decide import DecisionRule, decide_table, expected_calibration_error, fit_referral
from prediction_tables import synthetic_table


class Answers:
    "Stands for a `Predictor`: probabilities from the number in the image's path"
    classes, rule = HAM10000, DecisionRule('argmax')
    def __init__(self, bad=()): self.bad, self.referral = set(bad), fit_referral(synthetic_table(80, seed=3))
    def predict(self, images, progress=False, **options):
        assert 'dx' not in images
        table = synthetic_table(200, seed=1, most=1).iloc[:len(images)].drop(columns=['dx', 'group']).assign(image_id=images.image_id.to_numpy())
        table['group'] = images.group.to_numpy()
        table['ood'] = np.arange(len(table)) % 4 == 0
        table['problem'] = [f'{i} is torn' if i in self.bad else None for i in table.image_id]
        table.loc[table.problem.notna(), list(HAM10000)] = np.nan
        return decide_table(with_classes(table, HAM10000), None, self.rule, self.referral)


@pytest.fixture
def meta():
    dx = np.resize(list(MILK10K), 66)
    return with_classes(pd.DataFrame(dict(image_id=[f'm{i}' for i in range(66)], path='x', dx=dx, group=[f'g{i//2}' for i in range(66)])), MILK10K)


def test_diagnoses_without_a_class_are_kept_apart_and_all_images_decided(meta):
    table = predict_collection(Answers(), meta)
    assert table.image_id.tolist() == meta.image_id.tolist()
    has_class = meta.dx.isin(list(HAM10000)).to_numpy()
    assert (table.dx[has_class] == meta.dx[has_class]).all() and table.dx[~has_class].isna().all()
    assert table.outside[has_class].isna().all() and (table.outside[~has_class] == meta.dx[~has_class]).all()
    assert table.decision.notna().all() and table.refer.notna().all() and table.ood.any() # also where it looks out-of-distribution
    own = predict_collection(Answers(), meta, dict(sccka='akiec', ben_oth=None, inf=None, mal_oth=None))
    assert (own.dx[meta.dx.to_numpy() == 'sccka'] == 'akiec').all()


def test_images_that_cannot_be_read_are_counted_and_named(meta):
    with pytest.warns(UserWarning, match=r'2 of 66 images cannot be read and are left out: m3 \(m3 is torn\), m7'):
        table = predict_collection(Answers(bad=['m3', 'm7']), meta)
    assert len(table) == 64 and not {'m3', 'm7'} & set(table.image_id) and table.dx.notna().sum() == 64-table.outside.notna().sum()
    with pytest.raises(ValueError, match='none of 66 images can be read'): predict_collection(Answers(bad=meta.image_id), meta)


def test_classes_that_do_not_match_are_named(meta):
    with pytest.raises(ValueError, match='no entry for wart'):
        predict_collection(Answers(), with_classes(meta.assign(dx='wart'), ['wart', 'nv']))
    with pytest.raises(ValueError, match='no image of .* has a diagnosis that the network knows'):
        predict_collection(Answers(), meta.assign(dx='sccka'))
    with pytest.raises(ValueError, match="lacks column 'dx'"): predict_collection(Answers(), meta.drop(columns='dx'))
    own = with_classes(meta.assign(dx='nv'), ['nv', 'mel']) # a set that is a part of the network's needs no map
    assert (predict_collection(Answers(), own).dx == 'nv').all()


def test_the_calibration_error_and_its_interval_are_those_of_a_loop():
    table = synthetic_table(60, seed=4)
    units, _ = units_of(table)
    draws = unit_draws(np.zeros(units.max()+1, int), 40, 9)
    value, low, high = calibration_interval(table, draws, units)
    assert value == pytest.approx(expected_calibration_error(table))
    slow = []
    for draw in draws.astype(int):
        rows = np.concatenate([np.flatnonzero(units == u) for u in range(len(draw)) for _ in range(draw[u])])
        again = table.iloc[rows].assign(image_id=[f'{i}' for i in range(len(rows))]).reset_index(drop=True)
        slow.append(expected_calibration_error(with_classes(again, HAM10000)))
    expected = np.quantile(slow, [.025, .975])
    assert [low, high] == pytest.approx([min(expected[0], value), max(expected[1], value)])


def test_a_row_counts_as_by_hand(meta):
    from skin_lesions.evaluate import score_intervals
    table = predict_collection(Answers(), meta)
    row, inside = collection_row(table, 100), table[table.dx.notna()].reset_index(drop=True)
    assert (row['images'], row['outside'], row['lesions']) == (len(inside), 66-len(inside), inside.group.nunique())
    found = score_intervals(with_classes(inside, HAM10000), 100, warn=False)
    for name, index in (('accuracy', ('accuracy', 'all')), ('average_recall', ('average_recall', 'all')), ('macro_auc', ('auc', 'macro')), ('malignant_auc', ('auc', 'malignant'))):
        assert [row[name], row[f'{name}_low'], row[f'{name}_high']] == pytest.approx(found.loc[index, ['value', 'low', 'high']].tolist())
    outside = table[table.outside.notna()]
    assert row['outside_ood'] == pytest.approx(outside.ood.mean()) and row['inside_ood'] == pytest.approx(inside.ood.mean())
    assert row['outside_referred'] == pytest.approx(outside.refer.astype(float).mean())
    assert row['malignant_referred'] == pytest.approx(inside.refer[inside.dx.isin(HAM10000.malignant)].astype(float).mean())
    for name in ('outside_ood', 'malignant_referred', 'inside_referred'): assert row[f'{name}_low'] <= row[name] <= row[f'{name}_high']


def test_a_table_of_tables():
    tables = {('a', 'x'): synthetic_table(50, seed=1), ('a', 'y'): synthetic_table(60, seed=2), ('b', 'y'): synthetic_table(60, seed=2, noise=1)}
    frame = cross_table(tables, 50)
    assert list(zip(frame.trained, frame.tested)) == list(tables)
    pd.testing.assert_series_equal(frame.iloc[1].drop(['trained', 'tested']), pd.Series(collection_row(tables['a', 'y'], 50)), check_names=False, check_dtype=False)
    assert 'inside_referred' not in frame # nothing is known of it
    ax = plot_cross_table(frame)
    assert len(ax.texts) == 3 and [t.get_text() for t in ax.get_yticklabels()] == ['a', 'b']
    with pytest.raises(ValueError, match='unknown score'): plot_cross_table(frame, 'refer')


def test_wrong_tables():
    table, other = synthetic_table(30), synthetic_table(30, classes=MILK10K)
    for wrong in ({}, [table]):
        with pytest.raises(ValueError, match='expected a dict'): cross_table(wrong)
    with pytest.raises(ValueError, match='pairs'): cross_table({'a': table})
    with pytest.raises(ValueError, match="bring the tables into one set with map_classes"): cross_table({('a', 'b'): table, ('a', 'c'): other})
    with pytest.raises(ValueError, match='a on b: .*dx'): cross_table({('a', 'b'): table.drop(columns='dx')})
    with pytest.raises(ValueError, match='at least 1 draw'): collection_row(table, 0)
