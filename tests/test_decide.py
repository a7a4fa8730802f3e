"Calibration, decision rules and referral: best fits, guards, JSON, and what is promised over seeds."
import json

import numpy as np
import pandas as pd
import pytest

from skin_lesions.classes import HAM10000, ISIC2019, MELANOMA, ClassSet, with_classes
from skin_lesions.core import NOTICE
from skin_lesions.decide import (CALIBRATIONS, RULES, advise, brier_score, calibration_report, compare_rules, crossfit,
                                 decide_table, decision_rule, expected_calibration_error, fit_calibration, fit_referral,
                                 from_dict, negative_log_likelihood, referral_report, reliability, risk_coverage)

CODES, MALIGNANT = HAM10000.codes, HAM10000.malignant
SHARES = np.array([.05, .06, .12, .03, .13, .58, .03])


def draw(n=800, seed=0, d=2., sharpen=2., shift=0., name='L'):
    "Lesions with known probabilities, sharpened: the best temperature is `sharpen`"
    rng = np.random.default_rng(seed)
    lesion = np.sort(rng.integers(n//2, size=n))
    y = rng.choice(7, size=n//2, p=SHARES)[lesion]
    z = d*(d*np.eye(7)[y]+rng.normal(size=(n, 7)))+np.log(SHARES)
    z = sharpen*(z-np.log(np.exp(z).sum(1, keepdims=True)))+np.asarray(shift)
    z -= z.max(1, keepdims=True)
    t = pd.DataFrame(np.exp(z)/np.exp(z).sum(1, keepdims=True), columns=CODES)
    return t.assign(image_id=[f'{name}{seed}-{i}' for i in range(n)], dx=np.array(CODES)[y], group=[f'{name}{seed}-{i}' for i in lesion])


def nudged(calibration):
    "Calibrations beside a fitted one"
    for i in range(len(calibration.temperatures)):
        for f in (.99, 1.01): yield from_dict({**calibration.as_dict(), 'temperatures': [t*(f if i == j else 1) for j, t in enumerate(calibration.temperatures)]})
    for c in CODES if calibration.bias else ():
        for f in (-.02, .02):
            d = calibration.as_dict()
            d['bias'][c] += f
            yield from_dict(d)


@pytest.mark.parametrize('method', CALIBRATIONS)
@pytest.mark.parametrize('seed', range(3))
def test_no_neighbour_of_a_fit_is_better(method, seed):
    t = draw(seed=seed, shift=np.linspace(-1, 1, 7))
    fit = fit_calibration(t, method)
    best = negative_log_likelihood(fit.calibrate(t, overlap='ignore'))
    assert best < negative_log_likelihood(t)
    others = [negative_log_likelihood(o.calibrate(t, overlap='ignore')) for o in nudged(fit)]
    assert min(others) > best-1e-8


@pytest.mark.parametrize('seed', range(3))
def test_temperature_is_found_and_helps_elsewhere(seed):
    fit = fit_calibration(draw(3000, seed))
    assert abs(fit.temperatures[0]-2) < .2
    report = calibration_report(draw(3000, seed+100), fit)
    for score in ('nll', 'brier', 'ece', 'ece_malignant'): assert report.loc['after', score] < report.loc['before', score]
    assert report.accuracy.nunique() == 1


def test_bins_hold_their_upper_edge():
    p = np.array([.25, .5, .75, 1.])
    t = pd.DataFrame({c: 0. for c in CODES}, index=range(4)).assign(mel=p, nv=1-p, image_id=list('abcd'), dx=['mel', 'nv', 'mel', 'mel'])
    bins = reliability(t, 'mel', 4)
    assert bins.n.tolist() == [1, 1, 1, 1] and bins.predicted.tolist() == p.tolist() and bins.observed.tolist() == [1, 0, 1, 1]
    assert abs(expected_calibration_error(t, 4, of='mel')-(.75+.5+.25+0)/4) < 1e-12
    assert abs(brier_score(t, of='mel')-(.75**2+.5**2+.25**2)/4) < 1e-12
    assert abs(brier_score(t)-2*(.75**2+.5**2+.25**2)/4) < 1e-12


@pytest.mark.parametrize('fit, report', [(fit_calibration, lambda t, o: calibration_report(t, o)), (fit_referral, lambda t, o: referral_report(t, o)),
                                         (lambda t: decision_rule('prior', t), lambda t, o: compare_rules(t, [o]))])
def test_reports_on_lesions_of_the_fit_are_refused_and_counted(fit, report):
    t, new = draw(), draw(seed=1)
    fitted = from_dict(json.loads(json.dumps(fit(t).as_dict()))) # it remembers through JSON
    with pytest.raises(ValueError, match='800 of 800 images'): report(t, fitted)
    with pytest.raises(ValueError, match='800 of 800 images'): report(t.assign(image_id='other '+t.image_id), fitted)
    some = t[t.group.isin(t.group.unique()[:3])]
    with pytest.raises(ValueError, match=f'{len(some)} of {len(some)+800} images'): report(pd.concat([new, some.assign(image_id='x'+some.image_id)]), fitted)
    report(new, fitted)


def test_json_decides_alike_in_another_process(python, tmp_path):
    t, new = draw(shift=np.linspace(-1, 1, 7)), draw(seed=1)
    objects = [*(fit_calibration(t, m) for m in CALIBRATIONS), *(decision_rule(r, t) for r in RULES), fit_referral(t), fit_referral(t, .8, 'uncertainty')]
    answer = lambda o: next(np.asarray(getattr(o, f)(new)).tolist() for f in ('calibrate', 'decide', 'refer') if hasattr(o, f))
    (tmp_path/'o.json').write_text(json.dumps([o.as_dict() for o in objects], allow_nan=False))
    new.to_pickle(tmp_path/'t.pkl')
    done = python('''
import json, sys
import numpy as np, pandas as pd
from skin_lesions.decide import from_dict
new, out = pd.read_pickle('t.pkl'), []
for d in json.load(open('o.json')):
    o = from_dict(d)
    out.append(next(np.asarray(getattr(o, f)(new)).tolist() for f in ('calibrate', 'decide', 'refer') if hasattr(o, f)))
json.dump(out, open('answers.json', 'w'))
''', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path/'answers.json').read_text()) == json.loads(json.dumps([answer(o) for o in objects]))
    assert all(t.image_id[0] not in json.dumps(o.as_dict()) for o in objects), 'no names of images in a bundle'


def test_prior_rule_raises_average_recall_elsewhere():
    gains = []
    for seed in range(5):
        valid, new = draw(2000, seed), draw(2000, seed+50)
        rows = compare_rules(new, [decision_rule('argmax'), decision_rule('prior', valid)])
        gains.append(rows.average_recall['prior']-rows.average_recall['argmax'])
        assert rows.accuracy['prior'] < rows.accuracy['argmax']
    assert min(gains) > 0 and np.mean(gains) > .03


@pytest.mark.parametrize('by', ['risk', 'uncertainty'])
def test_referral_keeps_its_sensitivity_on_average(by):
    reached, inside = [], 0
    for seed in range(12):
        valid, new = draw(1200, seed), draw(1200, seed+50)
        referral = fit_referral(valid, .9, by)
        bad = valid.dx.isin(MALIGNANT)
        assert referral.refer(valid)[bad].mean() >= .9 and referral.reached == referral.refer(valid)[bad].mean()
        r = referral_report(new, referral)
        reached.append(r.sensitivity)
        assert r.missed == round((1-r.sensitivity)*r.n_malignant) and r.low <= r.sensitivity <= r.high
    assert abs(np.mean(reached)-max(.9, referral.reached)) < .05
    assert advise(new, referral).attrs['notice'] == NOTICE == referral.as_dict()['notice']


def test_coverage_ends_at_the_error_of_all():
    t = draw()
    for by in ('risk', 'uncertainty'):
        curve = risk_coverage(t, by)
        codes = decision_rule('argmax').decide(t)
        assert abs(curve.error.iloc[-1]-(codes != t.dx).mean()) < 1e-12 and curve.coverage.iloc[-1] == 1 and curve.coverage.is_monotonic_increasing
    assert risk_coverage(t).error.head(len(t)//4).mean() < curve.error.iloc[-1]


def test_crossfit_never_uses_a_lesion_for_itself():
    t, seen = draw(), []
    def fit(train):
        def apply(part):
            assert not set(train.group) & set(part.group)
            seen.extend(part.image_id)
            return part
        return apply
    pd.testing.assert_frame_equal(crossfit(t, fit, k=3), t)
    assert sorted(seen) == sorted(t.image_id)


@pytest.mark.parametrize('change', [dict(kind='other'), dict(method='x'), dict(temperatures=[0.]), dict(temperatures=[float('nan')]), dict(temperatures='abc'), dict(temperatures=None),
                                    dict(bias={'mel': 1}), dict(bias=[0]*7), dict(fitted_on={'lesions': []}),
                                    dict(codes=None), dict(first='nv')])
def test_broken_files_get_a_value_error(change):
    with pytest.raises(ValueError): from_dict({**fit_calibration(draw()).as_dict(), **change})
