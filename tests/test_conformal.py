"Prediction sets: the coverage that is promised, over many draws of lesions; MAPIE and slow loops where they do the same; bounds; JSON."
import json, warnings

import numpy as np
import pandas as pd
import pytest

from skin_lesions.bootstrap import units_of
from skin_lesions.classes import HAM10000, MELANOMA, classes_of, from_codes, map_classes
from skin_lesions.conformal import (SET_METHODS, PredictionSets, bound_threshold, calibrated_sets, cross_sets, fewest_lesions, fit_sets,
                                    lesion_threshold, miss_bound, set_members, set_report, set_scores)
from skin_lesions.decide import decide_table, fit_calibration
from prediction_tables import synthetic_table

CODES = list(HAM10000)
pytestmark = pytest.mark.filterwarnings('ignore:too few lesions')


def halves(table, rng):
    "Two halves of the lesions"
    lesions = table.group.unique()
    mine = table.group.isin(rng.permutation(lesions)[:len(lesions)//2])
    return table[mine].reset_index(drop=True), table[~mine].reset_index(drop=True)


@pytest.mark.parametrize('method', SET_METHODS)
def test_each_class_is_covered_over_many_halves(method):
    "The mean coverage of new lesions lies between 1-alpha and what the number of lesions allows, for each class with 20 lesions and more"
    rng, alpha = np.random.default_rng(0), .2
    table = synthetic_table(700, seed=3, skill=2)
    found = []
    for _ in range(60):
        known, new = halves(table, rng)
        found.append(set_report(fit_sets(known, alpha, method).sets(new), 1)[['coverage', 'lesions']])
    coverage = pd.concat([f.coverage for f in found], axis=1)
    for code in (c for c in CODES if table.groupby('dx').group.nunique()[c] >= 40):
        spread = coverage.loc[code].std()/np.sqrt(60)*3+.015 # of the mean over halves of one table
        assert 1-alpha-spread <= coverage.loc[code].mean(), code
        if method == 'lac': assert coverage.loc[code].mean() <= 1-alpha+1/21+spread, code


def test_the_lesion_is_the_unit():
    "Copies of an image of a lesion change nothing; copies of the images of hard lesions do, where images are the unit"
    table = synthetic_table(300, seed=1, most=1)
    hard = table[table.group.isin(table.group[:150])]
    copies = pd.concat([table, *[hard.assign(image_id=hard.image_id+f'-{i}') for i in range(4)]], ignore_index=True)
    assert fit_sets(copies).thresholds == fit_sets(table).thresholds
    with pytest.warns(UserWarning, match='over images'): alone = fit_sets(copies.drop(columns='group'))
    assert alone.thresholds != fit_sets(table).thresholds and alone.lesions[CODES.index('nv')] > fit_sets(table).lesions[CODES.index('nv')]


@pytest.mark.parametrize('seed', range(4))
def test_thresholds_by_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    units = np.sort(rng.integers(12, size=40)); scores = rng.integers(10, size=40)/10
    lesions = np.unique(units)
    for alpha in (.1, .3, .5):
        def weight_to(q): return sum(np.mean(scores[units == u] <= q) for u in lesions)
        enough = [q for q in np.unique(scores) if weight_to(q) >= (len(lesions)+1)*(1-alpha)-1e-9]
        assert lesion_threshold(scores, units, alpha) == (min(enough) if enough else np.inf)
    for x in (.2, .4):
        from math import comb
        def outside(q): return sum((scores[units == u] > q).any() for u in lesions)
        def chance(k, n=len(lesions)): return sum(comb(n, j)*x**j*(1-x)**(n-j) for j in range(k+1))
        good = [q for q in np.unique(scores) if chance(outside(q)) <= .05]
        assert bound_threshold(scores, units, x) == (min(good) if good else np.inf)


def test_a_bound_holds_with_its_confidence():
    "Over draws of lesions with several images, the miss rate is above what is promised in a fraction 1-confidence of them at most"
    rng, worse = np.random.default_rng(5), []
    for _ in range(1500):
        lesion = np.repeat(np.arange(50), 2)
        score = rng.normal(size=50)[lesion]+rng.normal(size=100)
        threshold = bound_threshold(score, lesion, .1, .9)
        new = rng.normal(size=(2000, 1))+rng.normal(size=(2000, 2))
        worse.append((new > threshold).any(1).mean() > .1)
    assert np.mean(worse) <= .1+3*np.sqrt(.09/1500)
    assert np.mean(worse) > .02, 'it is no bound for everything'


class Known:
    "An estimator whose probabilities are given: MAPIE wraps one"
    def __init__(self, n): self.classes_ = np.arange(n)
    def fit(self, X, y): return self
    def predict(self, X): return X.argmax(1)
    def predict_proba(self, X): return X
    def __sklearn_is_fitted__(self): return True
    def __sklearn_tags__(self):
        from sklearn.base import BaseEstimator, ClassifierMixin
        class Tagged(ClassifierMixin, BaseEstimator): pass
        return Tagged().__sklearn_tags__()
    def get_params(self, deep=False): return dict(n=len(self.classes_))


@pytest.mark.parametrize('alpha', [.05, .2])
def test_the_sets_of_mapie(alpha):
    "One image a lesion and one threshold: what MAPIE knows"
    pytest.importorskip('mapie')
    from mapie.classification import SplitConformalClassifier
    known, new = synthetic_table(400, seed=1, most=1, skill=2), synthetic_table(200, seed=2, most=1, skill=2)
    theirs = SplitConformalClassifier(Known(7), confidence_level=1-alpha, conformity_score='lac')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs.conformalize(known[CODES].to_numpy(), known.dx.map(CODES.index).to_numpy())
        members = theirs.predict_set(new[CODES].to_numpy())[1][:, :, 0]
    ours = set_members(fit_sets(known, alpha, by_class=False).sets(new))
    empty = ~members.any(1)
    assert (ours[~empty] == members[~empty]).all() and (ours[empty].sum(1) == 1).all()
    assert members.sum(1).max() > members.sum(1).min()


def test_the_adaptive_scores_of_mapie():
    "Before it subtracts a random part of the last probability"
    pytest.importorskip('mapie')
    from mapie.conformity_scores import APSConformityScore
    table = synthetic_table(200, seed=1)
    p, y = table[CODES].to_numpy(), table.dx.map(CODES.index).to_numpy()
    theirs = APSConformityScore().get_true_label_cumsum_proba(y, p, np.arange(7))[0]
    np.testing.assert_allclose(set_scores(p, 'aps')[np.arange(len(y)), y], theirs.ravel(), atol=1e-9)


def test_methods_by_their_definition():
    p = np.random.default_rng(0).dirichlet(np.ones(5), 30)
    def cumulated(row, c): return sum(q for q in row if q >= row[c])
    def rank(row, c): return sum(q >= row[c] for q in row)
    for c in range(5):
        np.testing.assert_allclose(set_scores(p, 'lac')[:, c], 1-p[:, c], atol=1e-11)
        np.testing.assert_allclose(set_scores(p, 'aps')[:, c], [cumulated(r, c) for r in p], atol=1e-11)
        np.testing.assert_allclose(set_scores(p, 'raps', penalty=.3, free=2)[:, c], [cumulated(r, c)+.3*max(0, rank(r, c)-2) for r in p], atol=1e-11)


def test_a_set_is_never_empty_and_holds_the_decision():
    table = synthetic_table(300, seed=4, skill=3)
    sets = fit_sets(table, .6) # most images are more unlike their class than that
    new = synthetic_table(200, seed=9, skill=.5).drop(columns=['dx', 'group'])
    members, best = set_members(sets.sets(new)), new[CODES].to_numpy().argmax(1)
    assert members.any(1).all() and (members.sum(1) == 1).sum() > 20
    raw = set_scores(new[CODES].to_numpy()) <= np.array(sets.thresholds)
    empty = ~raw.any(1)
    assert empty.sum() > 20 and (members[empty].argmax(1) == best[empty]).all() and (members[~empty] == raw[~empty]).all()
    decided = new.assign(decision='df')
    assert set_members(sets.sets(decided))[:, CODES.index('df')].all()
    again = sets.sets(sets.sets(new))
    assert list(again.columns).count('set') == 1


def test_rows_without_an_answer_have_no_set():
    table = synthetic_table(200, seed=2)
    sets = fit_sets(table)
    new = synthetic_table(10, seed=8).drop(columns=['dx', 'group'])
    new['ood'] = [i == 0 for i in range(len(new))]
    new['problem'] = ['cannot be decoded' if i == 1 else None for i in range(len(new))]
    new.loc[1, CODES] = np.nan
    found = sets.sets(decide_table(new))
    assert found.set.isna().tolist() == [True, True]+[False]*(len(new)-2) and found.columns[-1] == 'problem'
    assert sets.sets(decide_table(new[:2])).set.isna().all()


def test_few_lesions():
    "A class with too few is in every set and named; nothing at all is an error"
    table = synthetic_table(150, seed=6)
    counts = table.groupby('dx').group.nunique()
    with pytest.warns(UserWarning, match='too few lesions of .* in every set'): sets = fit_sets(table)
    assert set(sets.always) == {c for c in CODES if counts[c] < 9} and len(sets.always) > 0
    assert set_members(sets.sets(synthetic_table(50, seed=7)))[:, [CODES.index(c) for c in sets.always]].all()
    assert all(HAM10000.full_name(c) in sets.note(HAM10000) for c in sets.always) and 'Never excluded' in sets.note(HAM10000)
    with pytest.raises(ValueError, match='take 99 lesions of each class'): fit_sets(table[table.dx != 'nv'].reset_index(drop=True), .01)
    assert [fewest_lesions(a) for a in (.1, .05, .01)] == [9, 19, 99]
    absent = table[table.dx != 'df'].reset_index(drop=True)
    assert 'df' in fit_sets(absent).always


@pytest.mark.parametrize('classes', [MELANOMA, from_codes(['a b', 'c', 'd'])], ids=lambda c: c.name)
def test_other_class_sets(classes):
    known, new = synthetic_table(300, seed=1, classes=classes), synthetic_table(200, seed=2, classes=classes)
    found = PredictionSets.from_dict(json.loads(json.dumps(fit_sets(known).as_dict()))).sets(new)
    report = set_report(found, 100)
    assert list(report.index) == ['all', *classes.codes] and (report.high >= .85).all()
    with pytest.raises(ValueError, match='stands between the codes'): from_codes(['a|b', 'c'])
    with pytest.raises(ValueError, match='is for the classes'): fit_sets(known).sets(synthetic_table(30))


def test_sets_travel_with_a_table(tmp_path):
    "They survive CSV, and go when the probabilities they belong to are changed"
    from skin_lesions.predictions import read_predictions, save_predictions, without_decisions
    table = synthetic_table(300, seed=1)
    found = fit_sets(table).sets(synthetic_table(60, seed=2))
    save_predictions(found, tmp_path/'t.csv')
    back = read_predictions(tmp_path/'t.csv')
    assert back.set.tolist() == found.set.tolist() and classes_of(back) == HAM10000
    assert 'set' not in without_decisions(found) and 'set' not in map_classes(found, 'MELANOMA')
    assert 'set' not in fit_calibration(table, 'temperature').calibrate(found)


def test_calibrated_sets_cover_calibrated_tables():
    "Fitted on cross-fitted probabilities; a table that was calibrated on itself is refused by its own"
    known, new = synthetic_table(900, seed=1, skill=2), synthetic_table(600, seed=2, skill=2)
    calibration = fit_calibration(known, 'vector')
    sets = calibrated_sets(known, calibration, .2)
    new = new.assign(group='N'+new.group, image_id='N'+new.image_id)
    report = set_report(sets.sets(calibration.calibrate(new)), 300)
    assert (report.high[report.lesions >= 20] >= .8).all() and (report.low[report.lesions >= 20] <= .8+.06).all()
    assert calibrated_sets(known, None, .2) == fit_sets(known, .2)
    with pytest.raises(ValueError, match='was fitted on'): sets.sets(known, overlap='raise')
    with pytest.raises(ValueError, match="lacks column 'group'"): calibrated_sets(known.drop(columns='group'), calibration)


def test_cross_conformal_by_a_slow_loop():
    "Counts over the lesions of each fold, each with its own network's answers; one fold is split conformal"
    folds = [synthetic_table(80, seed=s, skill=2).assign(fold=s) for s in range(3)]
    folds = [f.assign(image_id=f.image_id+f'-{s}', group=f.group+f'-{s}').drop(columns='fold') for s, f in enumerate(folds)]
    new = [synthetic_table(30, seed=9, noise=n).drop(columns=['dx', 'group']) for n in range(3)]
    for by_class in (True, False):
        found = cross_sets(folds, [new[0], new[1][::-1], new[2]], .2, 'aps', by_class=by_class)
        members = set_members(found)
        for i in range(0, len(found), 7):
            for c in range(7):
                above = lesions = 0
                for fold, table in zip(folds, new):
                    mine = set_scores(table[CODES].to_numpy(), 'aps')[i, c]
                    rows = fold[fold.dx == CODES[c]] if by_class else fold
                    s = pd.Series(set_scores(rows[CODES].to_numpy(), 'aps')[np.arange(len(rows)), rows.dx.map(CODES.index)])
                    above += (s >= mine).groupby(rows.group.to_numpy()).mean().sum(); lesions += rows.group.nunique()
                inside = (above+1)/(lesions+1) > .2+1e-12
                assert members[i, c] == inside or members[i].sum() == 1
    one = cross_sets(folds[:1], new[:1], .2)
    assert one.set.tolist() == fit_sets(folds[0], .2).sets(new[0]).set.tolist()
    with pytest.raises(ValueError, match='more than one fold'): cross_sets([folds[0], folds[0].assign(image_id=folds[0].image_id+'x')], new[:2])


def test_report_counts_lesions():
    "A lesion with three images, one of them inside, counts a third"
    table = synthetic_table(60, seed=3)
    units = units_of(table)[0]
    found = table.assign(set=['nv|mel' if i % 3 else 'df' for i in range(len(table))])
    report = set_report(found, 50)
    for code in CODES:
        own = table.dx == code
        inside = pd.Series([code in s.split('|') for s in found.set])[own]
        size = found.set.str.count(r'\|')[own]+1
        assert np.isclose(report.coverage[code], inside.groupby(units[own]).mean().mean())
        assert np.isclose(report['size'][code], size.groupby(units[own]).mean().mean())
    assert report.lesions['all'] == 60
    assert miss_bound(0, 59) < .05 < miss_bound(0, 58)


def test_bad_requests():
    table = synthetic_table(200)
    for alpha in (0, 1, -1, 'a', float('nan')):
        with pytest.raises(ValueError, match='alpha must be above 0'): fit_sets(table, alpha)
    with pytest.raises(ValueError, match='confidence must be above 0'): fit_sets(table, at_most=dict(mel=.1), confidence=95)
    with pytest.raises(ValueError, match='penalty and free'): fit_sets(table, method='raps', penalty=-1)
    d = fit_sets(table).as_dict()
    for change, message in ((dict(thresholds={}), "lack 'akiec'"), (dict(alpha=2), 'alpha'), (dict(kind='rule'), "kind 'sets'"), (dict(method='x'), 'unknown kind of sets'),
                            (dict(thresholds=[1]), 'wrong kind'), (dict(at_most=dict(x=.1)), 'unknown code')):
        with pytest.raises(ValueError, match=message): PredictionSets.from_dict(d | change)


# ---- in a bundle, a prediction, a command

@pytest.fixture(scope='module')
def bundle(sample, tmp_path_factory):
    "A bundle with sets, and the sets"
    from serving import make
    from skin_lesions.bundle import save_bundle
    from skin_lesions.predictions import get_predictions
    from skin_lesions.readers import read_metadata
    meta = read_metadata(sample)
    learn = make(meta.assign(is_valid=meta.groupby('dx').cumcount() % 5 == 0))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sets = fit_sets(get_predictions(learn), .4)
    return save_bundle(learn, tmp_path_factory.mktemp('sets')/'b', sets=sets), sets


def test_a_bundle_keeps_sets_and_predicts_with_them(bundle, tmp_path, sample):
    import shutil
    from skin_lesions.bundle import read_bundle, save_bundle, update_bundle
    from skin_lesions.predict import load_predictor
    folder, sets = bundle
    predictor = load_predictor(folder, 'cpu')
    assert predictor.sets == sets and 'sets' in repr(predictor)
    assert list(read_bundle(folder)['sets']['fitted_on']) == ['ids', 'n_images', 'n_lesions'], 'hashed ids are beside the tensors'
    table = predictor.predict(sorted(sample.rglob('*.jpg'))[:5], progress=False)
    assert table.set.tolist() == sets.sets(table.drop(columns='set')).set.tolist() and all(d in s.split('|') for d, s in zip(table.decision, table.set))
    assert load_predictor(save_bundle(predictor, tmp_path/'again'), 'cpu').sets == sets
    # without them: valid, whether the key is there or not
    shutil.copytree(folder, tmp_path/'old')
    record = json.loads((tmp_path/'old'/'bundle.json').read_text())
    for change in (lambda r: r.pop('sets'), lambda r: r.update(sets=None)):
        old = json.loads(json.dumps(record)); change(old)
        (tmp_path/'old'/'bundle.json').write_text(json.dumps(old))
        plain = load_predictor(tmp_path/'old', 'cpu')
        assert plain.sets is None and 'set' not in plain.predict(next(sample.rglob('*.jpg')), progress=False)
    from dataclasses import replace
    before = (tmp_path/'old'/'bundle.json').read_bytes()
    with pytest.raises(ValueError, match="'sets' is of the classes .* the network of .* fit it on predictions of this network"):
        update_bundle(tmp_path/'old', sets=replace(sets, codes=tuple('other' if c == 'nv' else c for c in sets.codes)))
    assert (tmp_path/'old'/'bundle.json').read_bytes() == before
    update_bundle(tmp_path/'old', sets=sets)
    assert load_predictor(tmp_path/'old', 'cpu').sets == sets
    for wrong, message in ((1, "'sets' must be an object or null"), (dict(record['sets'], kind='rule'), "fitted object of kind 'rule'"), (dict(record['sets'], alpha='x'), 'alpha|float'),
                           (dict(record['sets'], free=1e400), 'wrong kind'), (dict(record['sets'], thresholds=None), 'wrong kind'), (dict(record['sets'], fitted_on=3), 'the number ids')):
        (tmp_path/'old'/'bundle.json').write_text(json.dumps(record | dict(sets=wrong)))
        with pytest.raises(ValueError, match=message): load_predictor(tmp_path/'old', 'cpu')


def test_what_people_and_programs_read(bundle, sample, capsys):
    "The same diagnoses, by their full names, in the text, the JSON, the CSV and the web demo"
    from skin_lesions.app import as_html, diagnose
    from skin_lesions.cli import main
    from skin_lesions.predict import load_predictor
    folder, sets = bundle
    image = str(sorted(sample.rglob('*.jpg'))[3])
    predictor = load_predictor(folder, 'cpu')
    row = predictor.predict(image, progress=False).iloc[0]
    names = [HAM10000.full_name(c) for c in row.set.split('|')]
    assert main(['predict', image, '--bundle', str(folder), '--json', '--device', 'cpu']) == 0
    answer = json.loads(capsys.readouterr().out)[0]
    found = answer['not_excluded']
    assert found == (' or '.join([', '.join(names[:-1]), names[-1]]) if 1 < len(names) < 7 else names[0] if len(names) == 1 else 'any of the 7 diagnoses')
    assert main(['predict', image, '--bundle', str(folder), '--device', 'cpu']) == 0
    text = capsys.readouterr().out
    assert f'Not excluded: {found}.' in text and '60 % of new lesions of each diagnosis' in text
    assert main(['predict', image, '--bundle', str(folder), '--as-csv', '--device', 'cpu']) == 0
    assert 'not_excluded' in capsys.readouterr().out.splitlines()[0]
    html = as_html(*diagnose(predictor, {'a.jpg': image}))
    assert f'Not excluded: {found}.' in html
    beside = f'(not excluded: {found})' in as_html(*diagnose(predictor, {'a.jpg': image, 'b.jpg': image}))
    assert beside == (found != answer['diagnosis']), 'the table does not say one name twice'


def test_calibrate_fits_and_removes_sets(bundle, tmp_path, capsys):
    import shutil
    from skin_lesions.cli import main
    from skin_lesions.predict import load_predictor
    from skin_lesions.predictions import save_predictions
    shutil.copytree(bundle[0], tmp_path/'b')
    table = save_predictions(synthetic_table(260, seed=2, skill=2), tmp_path/'t.csv')
    ask = ['calibrate', str(tmp_path/'b'), '--predictions', str(table), '--calibration', 'temperature']
    assert main([*ask, '--sets', '0.2', '--at-most', 'nv=0.1']) == 0
    printed = capsys.readouterr().out
    sets = load_predictor(tmp_path/'b', 'cpu').sets
    assert (sets.alpha, sets.at_most) == (.2, dict(nv=.1)) and 'may miss 20 % of the lesions' in printed and 'sets cross-fitted over' in printed
    assert main(ask) == 0 and load_predictor(tmp_path/'b', 'cpu').sets is None
    for wrong, message in ((['--at-most', 'nv=0.1'], 'give --sets too'), (['--sets', '0.2', '--at-most', 'nv'], 'CODE=FRACTION'), (['--sets', '2'], 'alpha must be'), (['--sets', '.1', '--at-most', 'x=.1'], 'unknown code')):
        capsys.readouterr()
        assert main([*ask, *wrong]) == 2 and message in capsys.readouterr().err
