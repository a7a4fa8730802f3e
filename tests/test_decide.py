"Calibration, decision rules and referral: best fits, guards, JSON, and what is promised over seeds."
import json, warnings

import numpy as np
import pandas as pd
import pytest

from skin_lesions.classes import HAM10000, ISIC2019, MELANOMA, from_codes, with_classes
from skin_lesions.core import NOTICE
from skin_lesions.decide import (CALIBRATIONS, RULES, advise, brier_score, calibration_report, compare_rules, crossfit,
                                 decide_table, decision_rule, expected_calibration_error, fit_calibration, fit_decisions,
                                 fit_referral,
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


def test_json_decides_alike_in_another_process(warm_python, tmp_path):
    t, new = draw(shift=np.linspace(-1, 1, 7)), draw(seed=1)
    objects = [*(fit_calibration(t, m) for m in CALIBRATIONS), *(decision_rule(r, t) for r in RULES), fit_referral(t), fit_referral(t, .8, 'uncertainty')]
    answer = lambda o: next(np.asarray(getattr(o, f)(new)).tolist() for f in ('calibrate', 'decide', 'refer') if hasattr(o, f))
    (tmp_path/'o.json').write_text(json.dumps([o.as_dict() for o in objects], allow_nan=False))
    new.to_pickle(tmp_path/'t.pkl')
    done = warm_python('''
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


def any_table(classes, seed=0, n=160, name='L'):
    "Predictions of an overconfident network for any class set, two images a lesion"
    rng = np.random.default_rng(seed)
    y = rng.integers(len(classes), size=n//2).repeat(2)
    z = 3*(1.5*np.eye(len(classes))[y]+rng.normal(size=(n, len(classes))))
    p = np.exp(z)/np.exp(z).sum(1, keepdims=True)
    table = pd.DataFrame(p, columns=list(classes)).assign(image_id=[f'{name}{seed}-{i}' for i in range(n)], dx=np.array(list(classes))[y])
    return with_classes(table.assign(group=[f'{name}{seed}-{i//2}' for i in range(n)]), classes)


@pytest.mark.parametrize('classes, first', [(ISIC2019, 'mel'), (MELANOMA, None), (from_codes('abc', malignant='c'), 'b')])
def test_any_class_set_from_fit_to_file_to_table(classes, first):
    fitted = fit_decisions(any_table(classes), first=first, n=50)
    new = any_table(classes, 1)
    again = [from_dict(json.loads(json.dumps(o.as_dict(), allow_nan=False))) for o in fitted[:3]]
    table = decide_table(new, *again)
    pd.testing.assert_frame_equal(table, decide_table(new, *fitted[:3]))
    assert set(table.decision) <= set(classes.codes) and table.refer.dtype == bool and again == list(fitted[:3])
    assert expected_calibration_error(table) < expected_calibration_error(new)
    assert fitted.measured['decided']['average_recall'] > 1.5/len(classes) and fitted.measured['parts'] >= 3
    with pytest.raises(ValueError, match='is for the classes'): fitted.calibration.calibrate(any_table(['x', 'y'], 2))


def test_nothing_that_was_measured_saw_the_lesion(monkeypatch):
    "Every calibration, rule and threshold that decides a part was fitted on other lesions, and every rule on probabilities calibrated by others"
    from skin_lesions import decide
    table, decided = any_table(ISIC2019, n=160), []
    original = decide.decide_table
    def watched(part, calibration=None, rule=None, referral=None, **kwargs):
        for o in (calibration, rule, referral): assert o.fitted_on is None or not o.fitted_on.seen(part).any()
        decided.extend(part.image_id)
        return original(part, calibration, rule, referral, **kwargs)
    monkeypatch.setattr(decide, 'decide_table', watched)
    fit_decisions(table, first='nv', n=20)
    assert sorted(decided) == sorted(table.image_id)


def test_without_malignancy_there_is_no_referral_and_an_error_says_so():
    table = any_table(['a', 'b', 'c'])
    fitted = fit_decisions(table, n=20)
    assert fitted.referral is None and fitted.measured['referral'] is None and 'refer' not in decide_table(any_table(['a', 'b', 'c'], 1), *fitted[:3])
    for call in (lambda: fit_referral(table), lambda: brier_score(table, of='malignant'), lambda: decision_rule('cost', table)):
        with pytest.raises(ValueError, match='it is not known which diagnoses'): call()


def test_images_without_a_decision_say_why():
    table = any_table(MELANOMA, n=12)
    fitted = fit_decisions(any_table(MELANOMA, 3), n=20)
    table['ood'] = [i == 0 for i in range(12)]
    table['problem'] = ['' if i != 1 else 'cannot be decoded' for i in range(12)]
    table.loc[1, list(MELANOMA)] = np.nan
    out = decide_table(table, *fitted[:3])
    assert out.decision.isna().tolist() == out.refer.isna().tolist() == [True, True]+[False]*10
    assert out.reason[:2].tolist() == ['does not look like a dermatoscopic image', 'cannot be decoded'] and out.reason[2:].isna().all()
    assert out.loc[0, list(MELANOMA)].notna().all() and out.loc[1, list(MELANOMA)].isna().all() and out.columns[-1] == 'problem'
    nothing = decide_table(table[1:2], *fitted[:3])
    assert nothing.decision.isna().all() and nothing.reason.tolist() == ['cannot be decoded']


def test_words_agree_with_the_row():
    "Over many rows: never an all-clear for what is referred or not answered, the risk is the sum of the malignant ones, and no code stands for a name"
    from skin_lesions.classes import HAM10000
    from skin_lesions.decide import answer_in_words, decide_table, fit_referral
    from prediction_tables import synthetic_table
    table = synthetic_table(60)
    referral = fit_referral(table, .9)
    decided = decide_table(table.drop(columns=['dx', 'group']), referral=referral, ood=table.index % 7 == 0, overlap='ignore')
    seen = set()
    for row, (_, r) in zip(decided.to_dict('records'), decided.iterrows()):
        said = answer_in_words(r, HAM10000, referral=referral)
        assert said == answer_in_words(row, HAM10000, referral=referral), 'a dict is a row too'
        seen.add((said.warn, bool(said.finding)))
        for one in (said, answer_in_words(r, HAM10000)): assert str(one).count('threshold of referral') <= 1, 'said once'
        if not said.finding: assert said.risk is None and 'all-clear' not in str(said) and 'Suggests' not in str(said)
        else:
            assert abs(said.risk-sum(row[c] for c in HAM10000.malignant)) < 1e-12
            assert HAM10000.full_name(row['decision']) in said.finding and said.warn == row['refer'] == ('dermatologist' in said.advice)
    assert seen == {(True, True), (False, True), (True, False)}


def test_a_referral_of_all_of_few_is_not_sure():
    "Every malignant lesion of few was referred: the sensitivity is 1, and its interval says how few they are"
    from skin_lesions.classes import classes_of
    from skin_lesions.decide import Referral, referral_report
    from prediction_tables import synthetic_table
    few, many = synthetic_table(25), synthetic_table(500)
    lows = []
    for table in (few, many):
        codes = classes_of(table).codes
        report = referral_report(table, Referral('risk', 0., .95, 1., codes, classes_of(table).malignant), 300)
        assert report.sensitivity == report.high == 1 and report.low < 1
        lows.append(report.low)
    assert lows[0] < .93 < lows[1]


def test_one_warning_names_all_parts_that_saw_the_images():
    from skin_lesions.conformal import fit_sets
    t, other = draw(seed=1), draw(seed=2)
    calibration, rule, sets = fit_calibration(t, 'temperature'), decision_rule('prior', t), fit_sets(t)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        decide_table(t, calibration, rule, sets=sets)
    assert len(said) == 1, said
    assert str(said[0].message).startswith(f'{len(t)} of {len(t)} images are of lesions that this calibration, this rule and this prediction set were fitted on')
    fresh = other.assign(image_id='new '+other.image_id, group='new '+other.group)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        decided = decide_table(fresh, calibration, rule, sets=sets)
    assert list(decided.set) == list(sets.sets(decide_table(fresh, calibration, rule)).set)
    with pytest.raises(ValueError, match='this rule was fitted on'): decide_table(t, None, rule, overlap='raise')
