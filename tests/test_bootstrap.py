"Intervals over lesions: the draws, the p by hand, and how often an interval holds the truth."
import numpy as np
import pandas as pd
import pytest

from skin_lesions import bootstrap
from skin_lesions.classes import ISIC2019
from prediction_tables import synthetic_table


def test_draws_are_the_same_in_blocks(monkeypatch):
    "Blocks draw what all units of a stratum and all draws at once would"
    def at_once(stratum, n, seed):
        rng, draws = np.random.default_rng(seed), np.zeros((n, len(stratum)), dtype=np.float32)
        for s in np.unique(stratum):
            units = np.flatnonzero(stratum == s)
            picked = rng.integers(len(units), size=(n, len(units)))
            for row, p in zip(draws, picked): row[units] = np.bincount(p, minlength=len(units))
        return draws
    stratum = np.random.default_rng(0).permutation(np.repeat([0, 1, 4, 5], [1, 7, 33, 500]))
    for block in (1, 1000, 10**6):
        monkeypatch.setattr(bootstrap, '_BLOCK', block)
        np.testing.assert_array_equal(bootstrap.unit_draws(stratum, 50, 3), at_once(stratum, 50, 3))


def test_p_by_hand():
    "Twice the fraction of draws on the smaller side, the table itself counted there too; draws of exactly 0 are on both sides"
    nan = np.nan
    drawn = np.array([[1, 1, 1, 1., 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, -1], [-1, -1, -1, -1, -1, -1, -1, -1, 0], [0]*9, [1, -1, 1, -1, 1, -1, 1, -1, 1], [1, 1, 1, nan, nan, nan, nan, nan, nan], [nan]*9])
    np.testing.assert_allclose(bootstrap.two_sided(drawn), [2*1/10, 2*2/10, 2*2/10, 1, 1, 2*1/4, nan])


def coverage(recalls, lesions, n_tables=600, n=300):
    "Fraction of simulated tables whose interval holds the true average recall; lesions of one to three images, all right or all wrong"
    rng, inside = np.random.default_rng(0), 0
    dx = np.repeat(np.arange(len(lesions)), lesions)
    draws = bootstrap.unit_draws(dx, n, 0)
    for i in range(n_tables):
        images, right = rng.integers(1, 4, len(dx)), rng.random(len(dx)) < np.array(recalls)[dx]
        total = np.eye(len(lesions))[dx]*images[:, None]
        hits = total*right[:, None]
        value, drawn = hits.sum(0)/total.sum(0), bootstrap.recall_draws(hits, total, draws, i).T
        low, high = bootstrap.average_recall_ends(value, drawn, lesions)
        inside += low <= np.mean(recalls) <= high
    return inside/n_tables


@pytest.mark.parametrize('lesions', [[15, 20, 40, 60, 70, 80, 150], [8]*7, [5]*7], ids=['as in a fold', 'few', 'fewest'])
@pytest.mark.parametrize('recalls', [[.5, .6, .7, .75, .8, .85, .9], [.95]*7], ids=['fair', 'good'])
def test_the_interval_of_average_recall_holds_the_truth(lesions, recalls):
    "The mean of draws with half lesions holds it about eight times in ten where all classes are good and have few lesions"
    assert coverage(recalls, lesions, n_tables=400) >= .93


def test_a_perfect_class_with_few_lesions_is_not_sure():
    table = synthetic_table(60)
    perfect = bootstrap.class_recall_intervals(table.assign(decision=table.dx))
    assert (perfect.recall == 1).all() and (perfect.high == 1).all()
    assert (perfect.low[perfect.units < 5] < .8).all() and perfect.low['nv'] > .9
    assert perfect.low.sort_values().index.tolist() == perfect.units.sort_values().index.tolist() or perfect.low.corr(perfect.units, method='spearman') > .9


def test_seeds_and_folds_are_averaged():
    seeds = [synthetic_table(80, noise=i) for i in range(3)]
    alone = [bootstrap.average_recall_interval(t, 50).value for t in seeds]
    assert bootstrap.average_recall_interval(seeds, 50).value == pytest.approx(np.mean(alone))
    first, second = seeds[0][seeds[0].index % 2 == 0], seeds[0][seeds[0].index % 2 == 1]
    assert bootstrap.average_recall_interval([first, second], 50) == bootstrap.average_recall_interval(pd.concat([first, second]), 50)
    found = bootstrap.compare_tables(seeds[:2], seeds[2:], n=50)
    assert found['difference'] == pytest.approx(alone[2]-np.mean(alone[:2]))


def test_eight_classes_have_eight_rows():
    assert list(bootstrap.class_recall_intervals(synthetic_table(100, classes=ISIC2019), 20).index) == list(ISIC2019.codes)


@pytest.mark.parametrize('lesions', [5, 10, 20, 50, 150])
def test_the_interval_of_a_recall_near_one_holds_the_truth(lesions):
    "The plain bootstrap of 20 lesions with a recall of .95 holds it about six times in ten"
    rng, draws, recall, inside = np.random.default_rng(1), bootstrap.unit_draws(np.zeros(lesions, int), 400, 0), .95, []
    for seed in range(400):
        images = rng.integers(1, 4, lesions)
        hits = (rng.random(lesions) < recall)*images
        kinds = []
        for half in (seed, None):
            low, high = np.quantile(bootstrap.recall_draws(hits[:, None], images[:, None], draws, half), [.025, .975])
            kinds.append(min(low, hits.sum()/images.sum()) <= recall <= max(high, hits.sum()/images.sum()))
        inside.append(kinds)
    half, plain = np.mean(inside, axis=0)
    assert half >= (.93 if lesions < 150 else .92) and (lesions > 20 or plain < .8)


@pytest.mark.parametrize('steps', [1, 3, 16])
def test_a_curve_in_blocks_of_steps_is_the_curve(monkeypatch, steps):
    "Whatever the number of steps at a time, with ties, draws without positives or negatives, and half lesions"
    rng = np.random.default_rng(3)
    n = 60
    units, true, score = np.arange(n)//2, rng.random(n) < .3, rng.integers(0, 12, n)/12
    draws = rng.integers(0, 3, (n//2, 25)).astype(float)
    draws[np.isin(np.arange(n//2), units[true]), 0] = 0
    draws[:, 1] = 0
    half = rng.random((4, 25))
    whole = bootstrap.rank_scores(bootstrap.rank_curve(score, true, units, n//2), draws, half=half)
    monkeypatch.setattr(bootstrap, '_STEPS', steps)
    curve = bootstrap.rank_curve(score, true, units, n//2)
    np.testing.assert_allclose(bootstrap.rank_scores(curve, draws, half=half), whole, atol=1e-12)
    ends = np.append(score, [2, -1, 2, -1]), np.append(true, [True, True, False, False]), np.append(units, n//2+np.arange(4))
    counts = bootstrap.rank_counts(bootstrap.rank_curve(*ends, n//2+4), np.vstack([draws, half]))
    area = (counts.positives*(counts.false_positives-counts.negatives/2)).sum(0)/(counts.n_positives*counts.n_negatives)
    np.testing.assert_allclose(whole[1, 0], 1-area, atol=1e-12)
    assert np.isnan(whole[0, :2, :2]).all() and (whole[0, 2, :2] == 0).all() and not np.isnan(whole[1]).any()
    assert not np.isnan(whole[0, :, 2:]).any()
