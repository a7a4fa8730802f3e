"Net benefit, counts and costs: loops, identities, a simulation, intervals over lesions, and the command."
import numpy as np
import pandas as pd
import pytest

from skin_lesions.benefit import (COUNTS, Reader, at_prevalence, decision_curve, expected_costs, malignancy_cases, net_benefit, outcome_costs,
                                  per_thousand)
from skin_lesions.classes import HAM10000, MELANOMA, from_codes, map_classes, with_classes
from prediction_tables import synthetic_table

BAD = list(HAM10000.malignant)


def truth(table): return table[BAD].sum(axis=1).to_numpy(), table.dx.isin(BAD).to_numpy()


@pytest.mark.parametrize('seed', range(3))
def test_net_benefit_by_a_loop(seed):
    "One image a lesion, at the table's own prevalence: the counts of Vickers and Elkin"
    table = synthetic_table(200, seed=seed, most=1, skill=2)
    p, bad = truth(table)
    curve = decision_curve(table, thresholds=(.05, .2, .5), n=50)
    for t, r in zip(curve.threshold, curve.itertuples()):
        tp = sum(b for q, b in zip(p, bad) if q >= t)
        fp = sum(not b for q, b in zip(p, bad) if q >= t)
        assert np.isclose(r.net_benefit, tp/len(p)-fp/len(p)*t/(1-t))
        assert np.isclose(r.treat_all, bad.mean()-(1-bad.mean())*t/(1-t)) and np.isclose(r.gain, r.net_benefit-max(r.treat_all, 0))
        assert r.low <= r.net_benefit <= r.high and np.isclose(r.gain_high-r.gain_low, r.high-r.low)


def test_limits():
    "A perfect network finds all, a useless one is worth no more than treating all or none"
    table = synthetic_table(300, seed=1, most=1)
    sure = table.copy()
    sure[list(HAM10000)] = (sure.dx.to_numpy()[:, None] == np.array(list(HAM10000))).astype(float)
    perfect = decision_curve(sure, .05, (.01, .1, .5), n=20)
    assert np.allclose(perfect.net_benefit, .05) and (perfect.high <= .05+1e-12).all() and (perfect.low < .05).all(), 'few lesions are not sure'
    blind = table.assign(**{c: float((table.dx == c).mean()) for c in HAM10000})
    assert (decision_curve(blind, .05, (.01, .04, .06, .5), n=20).gain.round(9) <= 0).all()
    assert net_benefit(1., 1., .2, .3) == .2 and net_benefit(0., 1., .2, .3) == 0


def test_prevalence_is_that_of_a_resampled_table():
    "Benign lesions three times: the same as stating their prevalence"
    table = synthetic_table(300, seed=2, most=1, skill=2)
    p, bad = truth(table)
    benign = table[~bad]
    more = pd.concat([table, *[benign.assign(image_id=benign.image_id+f'-{i}', group=benign.group+f'-{i}') for i in (1, 2)]], ignore_index=True)
    prevalence = bad.sum()/(bad.sum()+3*(~bad).sum())
    moved = at_prevalence(truth(more)[0], prevalence, bad.mean())
    called, sick = moved >= .1, truth(more)[1]
    by_hand = (called & sick).mean()-(called & ~sick).mean()/9
    assert np.isclose(decision_curve(table, prevalence, (.1,), n=5).net_benefit[0], by_hand)
    assert np.isclose(malignancy_cases(table).prevalence, bad.mean())
    q = at_prevalence(at_prevalence(p, .02, .3), .3, .02)
    np.testing.assert_allclose(q, p, atol=1e-9)


def test_a_lesion_counts_once():
    "Copies of an image change nothing"
    table = synthetic_table(150, seed=3, most=1)
    some = table[table.index % 4 == 0]
    copies = pd.concat([table, *[some.assign(image_id=some.image_id+f'-{i}') for i in range(5)]], ignore_index=True)
    a, b = (per_thousand(t, .04, .1, n=100) for t in (table, copies))
    pd.testing.assert_frame_equal(a, b)


def test_intervals_are_over_lesions_and_shrink_with_them():
    few, many = (per_thousand(synthetic_table(n, seed=4, skill=2), .04, .05, n=300).loc[('network', 'found')] for n in (60, 1500))
    assert few.high-few.low > 2*(many.high-many.low) > 0
    assert few.low <= few.value <= few.high


def test_a_simulation_with_a_reader():
    "Lesions at a stated prevalence, one image of each, and a reader who tosses coins"
    table, reader, rng = synthetic_table(400, seed=5, skill=2), Reader(.8, .6), np.random.default_rng(0)
    p, bad = truth(table)
    refer = at_prevalence(p, .1, malignancy_cases(table).prevalence) >= .05
    fractions = {b: pd.Series(refer[bad == b]).groupby(table.group[bad == b].to_numpy()).mean().to_numpy() for b in (True, False)}
    n = 200_000
    sick = rng.random(n) < .1
    chance = np.where(sick, rng.choice(fractions[True], n), rng.choice(fractions[False], n))
    referred = rng.random(n) < chance
    biopsied = referred & (rng.random(n) < np.where(sick, .8, .4))
    said = per_thousand(table, .1, .05, reader=reader, n=5).value['network']
    simulated = dict(referred=referred, biopsied=biopsied, found=biopsied & sick, needless=biopsied & ~sick, missed=sick & ~biopsied,
                     missed_by_network=sick & ~referred, missed_by_reader=sick & referred & ~biopsied)
    assert list(simulated) == list(COUNTS)
    for name, hits in simulated.items():
        assert abs(1000*hits.mean()-said[name]) < 5*1000*np.sqrt(hits.mean()/n), name


def test_counts_and_costs_agree():
    table, reader = synthetic_table(300, seed=6, skill=2), Reader(.9, .7)
    counts = per_thousand(table, .03, .02, reader=reader, n=20).value
    for strategy in ('network', 'reader alone', 'everything biopsied'):
        c = counts[strategy]
        assert np.isclose(c.found+c.missed, 30) and np.isclose(c.biopsied, c.found+c.needless) and np.isclose(c.missed, c.missed_by_network+c.missed_by_reader)
    assert counts['reader alone'].missed_by_network == 0 and np.isclose(counts['everything biopsied'].biopsied, 1000)
    found = expected_costs(table, .03, outcome_costs(70, 3, .5), (.02, .3), reader=reader, n=20)
    of = lambda c: 70*c.missed+3*c.biopsied+.5*c.referred
    assert np.isclose(found.cost[0], of(counts['network'])) and np.isclose(found.refer_all[0], of(counts['reader alone'])) and np.isclose(found.refer_none[0], 70*30)
    assert (found.low <= found.cost).all() and (found.cost <= found.high).all()
    odds = pd.DataFrame([[1., 1., 0.], [0., 0., .25]], index=['malignant', 'benign'], columns=['not referred', 'not biopsied', 'biopsied'])
    assert np.isclose(expected_costs(table, .03, odds, (.2,), n=5).cost[0], 1000*(.03-decision_curve(table, .03, (.2,), n=5).net_benefit[0]))


def test_what_counts_as_malignant():
    "The class set's diagnoses, or those that are given; melanoma alone is a set of its own"
    table = synthetic_table(300, seed=7)
    alone = decision_curve(table, .02, (.1,), malignant='mel', n=5)
    two = decision_curve(map_classes(table, MELANOMA), .02, (.1,), n=5)
    assert np.isclose(alone.net_benefit[0], two.net_benefit[0]) and alone.net_benefit[0] != decision_curve(table, .02, (.1,), n=5).net_benefit[0]
    with pytest.raises(ValueError, match='not known which diagnoses'): decision_curve(with_classes(table, from_codes(list(HAM10000))))
    with pytest.raises(ValueError, match='unknown diagnosis code'): decision_curve(table, malignant=['x'])


def test_bad_requests():
    table = synthetic_table(100)
    for bad in (0, 1, 1.5, 'a', float('nan')):
        with pytest.raises(ValueError, match='prevalence must be'): per_thousand(table, bad, .1)
        with pytest.raises(ValueError, match='threshold must be'): per_thousand(table, .1, bad)
    with pytest.raises(ValueError, match='a table with the column refer'): per_thousand(table.assign(refer=None), .1)
    with pytest.raises(ValueError, match='needs malignant and benign'): decision_curve(table[table.dx == 'mel'])
    with pytest.raises(ValueError, match='finite'): expected_costs(table, .1, outcome_costs(missed=np.inf))
    with pytest.warns(UserWarning, match='over images'): decision_curve(table.drop(columns='group'), n=5)


def test_the_command(tmp_path, capsys):
    from skin_lesions.cli import main
    from skin_lesions.core import NOTICE
    from skin_lesions.predictions import save_predictions
    table = synthetic_table(300, seed=8, skill=2)
    file = str(save_predictions(table, tmp_path/'t.csv'))
    assert main(['benefit', file, '--prevalence', '0.03', '--threshold', '0.05', '--reader-sensitivity', '.9', '--reader-specificity', '.7']) == 0
    printed = capsys.readouterr()
    said = per_thousand(table, .03, .05, reader=Reader(.9, .7)).loc[('network', 'found')]
    line = next(l for l in printed.out.splitlines() if l.startswith('found'))
    assert f'{said.value:.1f} ({said.low:.1f} to {said.high:.1f})' in line and NOTICE in printed.err
    gain = decision_curve(table, .03, (.05,)).iloc[0]
    assert f'net benefit {gain.net_benefit:.4f}' in printed.out and 'prevalence 0.03' in printed.out
    for wrong, message in ((['--threshold', '.1', '--prevalence', '3'], 'prevalence must be'), (['--prevalence', '.1'], 'Give a threshold'),
                           (['--prevalence', '.1', '--threshold', '.1', '--reader-sensitivity', '.9'], 'give both')):
        assert main(['benefit', file, *wrong]) == 2 and message in capsys.readouterr().err
