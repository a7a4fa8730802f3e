"The predictions table: files, ensembles, folds, the challenge's file."
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from sklearn.metrics import balanced_accuracy_score

from skin_lesions.classes import HAM10000, ISIC2019, classes_of, with_classes
from skin_lesions.evaluate import scores
from skin_lesions.predictions import (ENSEMBLES, check_predictions, decided_codes, ensemble, greedy_selection, isic_submission,
                                      out_of_fold, predicted_codes, read_isic_submission, read_predictions, save_predictions)
from skin_lesions.report import html_report

CODES, ISIC_COLUMNS = list(HAM10000.codes), list(HAM10000.challenge_columns.values())
MANY = 1_000_000 if os.environ.get('SKIN_LESIONS_MILLION') else 10_000
quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def draw(seed, n=60, noise=1.):
    rng = np.random.default_rng(seed)
    y = np.random.default_rng(1).integers(7, size=n)
    z = 1.5*np.eye(7)[y] + noise*rng.normal(size=(n, 7))
    p = np.exp(z)/np.exp(z).sum(1, keepdims=True)
    t = pd.DataFrame(p, columns=CODES).assign(image_id=[f'I{i:03}' for i in range(n)], dx=np.array(CODES)[y], group=[f'G{i//2}' for i in range(n)])
    return t[['image_id', *CODES, 'dx', 'group']]


def numbers(t): return t[list(CODES)].to_numpy()


@pytest.mark.parametrize('seed', range(3))
def test_submission_reads_back_to_the_last_digit(seed, tmp_path):
    t = draw(seed, noise=20.)
    path = isic_submission(t, tmp_path/'new'/'s.csv')
    assert path.read_text().splitlines()[0].split(',') == ['image', *ISIC_COLUMNS]
    back = read_isic_submission(path)
    assert (numbers(back) == numbers(t)).all() and list(back.image_id) == list(t.image_id) and list(back.columns) == ['image_id', *CODES]
    raw = pd.read_csv(path)
    assert (raw.MEL == t.mel).mean() > .9 and list(raw.columns) == ['image', *ISIC_COLUMNS] # each column under its own name


def test_submission_is_atomic(tmp_path, monkeypatch):
    path = isic_submission(draw(0), tmp_path/'s.csv')
    before = path.read_bytes()
    monkeypatch.setattr(pd.DataFrame, 'to_csv', lambda self, tmp, **kw: (open(tmp, 'w').write('half'), 1/0))
    with pytest.raises(ZeroDivisionError): isic_submission(draw(1), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['s.csv']


@pytest.mark.parametrize('how', ENSEMBLES)
def test_ensembles_do_not_depend_on_the_order_of_tables_or_rows(how):
    tables = [draw(s) for s in range(4)]
    a = ensemble(tables, how)
    b = ensemble([t.sample(frac=1, random_state=i) for i, t in enumerate(tables[::-1])], how).sort_values('image_id')
    np.testing.assert_allclose(numbers(a), numbers(b), atol=1e-14)
    np.testing.assert_allclose(numbers(a).sum(1), 1, atol=1e-12)
    if how != 'rank': np.testing.assert_allclose(numbers(ensemble(tables[:1]*3, how)), numbers(tables[0]), atol=1e-14)
    np.testing.assert_allclose(numbers(ensemble(tables, how, weights=[2, 1, 0, 0])), numbers(ensemble([tables[0]]*2+[tables[1]], how)), atol=1e-14)


@pytest.mark.parametrize('seed', range(3))
def test_greedy_is_no_worse_than_the_best_table_where_it_chose(seed):
    tables = {i: draw(10*seed+i, 200, 1+i/3) for i in range(4)}
    recall = lambda t: balanced_accuracy_score(t.dx, t[list(CODES)].idxmax(axis=1))
    w = greedy_selection(tables, n=6)
    assert abs(w.sum()-1) < 1e-12 and (w >= 0).all()
    assert recall(ensemble(tables, weights=w)) >= max(map(recall, tables.values()))-1e-12
    assert greedy_selection(tables, recall, n=6).equals(w)


def test_folds_make_the_whole():
    from skin_lesions.split import lesion_folds
    whole = draw(0, 300)
    folds = lesion_folds(whole, 4).fold
    oof = out_of_fold({i: whole[folds == i] for i in range(4)}, whole)
    pd.testing.assert_frame_equal(oof.drop(columns='fold'), whole)
    assert (oof.fold == folds).all()
    with pytest.raises(ValueError, match='are in no table'): out_of_fold([whole[folds != 3]], whole)
    with pytest.raises(ValueError, match='more than one table'): out_of_fold([whole[folds == 0]]*2)
    with pytest.raises(ValueError, match='different dx'): out_of_fold([whole], whole.assign(dx=whole.dx.iloc[::-1].to_numpy()))


# files of other people ---------------------------------------------------------------------------------------------------------------

def put(folder, data, name):
    (folder/name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder/name


ANYTHING = st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda t: t.encode('utf-8', 'surrogatepass')))
NAMES = st.one_of(st.text(st.characters(exclude_categories=['Cc', 'Cs']), min_size=1, max_size=12).filter(lambda s: s.strip()), st.sampled_from(['NA', 'nan', '1', '01', '"', 'a,b', '<b>', "x'y"]))


@st.composite
def tables(draw, labelled=None):
    ids = draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    raw = np.array(draw(st.lists(st.lists(st.floats(0, 1), min_size=7, max_size=7), min_size=len(ids), max_size=len(ids)))) + 1e-9
    table = pd.DataFrame(raw/raw.sum(1, keepdims=True), columns=CODES)
    table.insert(0, 'image_id', ids)
    if labelled or labelled is None and draw(st.booleans()):
        table['dx'] = draw(st.lists(st.sampled_from(CODES), min_size=len(ids), max_size=len(ids)))
        table['group'] = draw(st.lists(NAMES, min_size=len(ids), max_size=len(ids)))
    return table


@quick
@given(table=tables(), order=st.permutations(CODES), separator=st.sampled_from(',;\t'), bom=st.booleans())
def test_predictions_come_back_as_they_were(tmp_path, table, order, separator, bom):
    again = read_predictions(save_predictions(table, tmp_path/'p.csv'))
    assert list(again.image_id) == list(table.image_id) and (again[CODES].to_numpy() == table[CODES].to_numpy()).all()
    for c in ('dx', 'group'): assert c not in table or list(again[c]) == list(table[c])
    others = [c for c in table if c not in CODES]
    shuffled = table.iloc[::-1][[*order, *others]] # columns go by name, not by place
    shuffled.to_csv(tmp_path/'q.csv', sep=separator, index=False, encoding='utf-8-sig' if bom else 'utf-8')
    again = read_predictions(tmp_path/'q.csv')
    assert list(again.image_id) == list(table.image_id)[::-1] and (again[CODES].to_numpy() == table[CODES].to_numpy()[::-1]).all()
    submitted = read_isic_submission(isic_submission(table, tmp_path/'s.csv'))
    assert list(submitted.image_id) == list(table.image_id) and (submitted[CODES].to_numpy() == table[CODES].to_numpy()).all()


def test_files_as_people_write_them(tmp_path):
    "Blanks after commas, names of files for images, and confidences in a challenge that do not sum to 1"
    table = draw(0, 8)
    confidences = numbers(table)*np.linspace(.2, .9, 8)[:, None]
    order = [CODES.index(c) for c in HAM10000.challenge_columns]
    rows = [', '.join([f'{name}{suffix}', *map(repr, map(float, p))]) for name, suffix, p in zip(table.image_id, ['.jpg', '.JPG', '.webp', '.bmp']*2, confidences[:, order])]
    found = read_isic_submission(put(tmp_path, '\n'.join([', '.join(['image', *ISIC_COLUMNS]), *rows]), 's.csv'))
    assert list(found.image_id) == list(table.image_id) and (found[list(HAM10000.challenge_columns)].to_numpy() == confidences[:, order]).all()
    assert list(predicted_codes(found)) == list(predicted_codes(table)), 'the largest confidence decides'
    with pytest.raises(ValueError, match='sum to'): save_predictions(found, tmp_path/'p.csv')
    rows = [', '.join([name, *map(repr, map(float, p))]) for name, p in zip(table.image_id, numbers(table))]
    found = read_predictions(put(tmp_path, '\n'.join([', '.join(['image_id', *CODES]), *rows]), 't.csv'))
    assert list(found.image_id) == list(table.image_id) and (numbers(found) == numbers(table)).all()


BAD = {'NaN': ('nan', 'missing'), 'empty': ('', 'missing'), 'negative': ('-0.25', 'between 0 and 1'), 'above one': ('1.5', 'between 0 and 1'), 'infinite': ('inf', 'between 0 and 1'), 'text': ('high', 'no number'), 'comma': ('"0,5"', 'no number'),
       'underscore': ('0_1', 'no number'), 'sum': ('0.9', 'sum to')}


@quick
@given(bad=st.sampled_from(sorted(BAD)), n=st.integers(1, 6), at=st.integers(0, 5), code=st.sampled_from(CODES))
def test_a_bad_probability_is_named_with_its_row(tmp_path, bad, n, at, code):
    at, (value, said) = at % n, BAD[bad]
    rows = [[f'IMG_{i}', *['0.5' if c == ('nv' if code != 'nv' else 'mel') else '0.5' if c == code else '0' for c in CODES]] for i in range(n)]
    rows[at][1 + CODES.index(code)] = value
    for read, header in ((read_predictions, ['image_id', *CODES]), (read_isic_submission, ['image', *(c.upper() for c in CODES)])):
        if bad == 'sum' and header[0] == 'image': continue # confidences of a challenge need not sum to 1
        file = put(tmp_path, '\n'.join(','.join(r) for r in [header, *rows]) + '\n', 'p.csv')
        with pytest.raises(ValueError) as e: read(file)
        assert str(file) in str(e.value) and f'row {at} ' in str(e.value) and said in str(e.value), str(e.value)


@quick
@given(table=tables(labelled=True), fault=st.sampled_from(['class', 'id', 'twice', 'code', 'columns', 'rows']))
def test_a_table_with_a_fault_reaches_no_score(tmp_path, table, fault):
    table = pd.concat([table, table.head(1).assign(image_id='one more')], ignore_index=True) if 'one more' not in set(table.image_id) else table
    if fault == 'class': table, said = table.drop(columns='df'), "'df'"
    elif fault == 'id': table.loc[table.index[-1], 'image_id'] = ' '; said = 'no image_id'
    elif fault == 'twice': table.loc[table.index[-1], 'image_id'] = table.image_id.iloc[0]; said = f'row {len(table)-1} '
    elif fault == 'code': table.loc[table.index[-1], 'dx'] = 'melanoma'; said = f'row {len(table)-1} '
    elif fault == 'columns': table, said = pd.concat([table, table[['mel']]], axis=1), "two columns 'mel'"
    else: table, said = table.head(0), 'empty'
    for use in (check_predictions, scores, lambda t: html_report(t, tmp_path/'r.html'), lambda t: save_predictions(t, tmp_path/'p.csv')):
        with pytest.raises(ValueError) as e: use(table)
        assert said in str(e.value), str(e.value)
    assert not (tmp_path/'r.html').exists() and not (tmp_path/'p.csv').exists()


@quick
@given(data=st.one_of(ANYTHING, st.text(alphabet='a1.,;"\n e-', max_size=200).map(lambda t: (','.join(['image_id', *CODES]) + '\n' + t).encode())))
@example(data=(','.join(['image_id', *CODES]) + '\n').encode())
@example(data=(','.join(['image_id', *CODES]) + '\na,0,0,0,0,0,1,0,\nb,0,0,0,0,0,1,0,\n').encode())
def test_any_other_file_is_no_predictions_table(tmp_path, data):
    file = put(tmp_path, data, 'p.csv')
    for read in (read_predictions, read_isic_submission):
        try: check_predictions(read(file))
        except ValueError as e: assert str(file) in str(e) and len(str(e)) < 2000


def test_a_million_predictions(tmp_path):
    p = np.random.default_rng(0).dirichlet(np.ones(7), MANY)
    table = pd.DataFrame(p, columns=CODES)
    table.insert(0, 'image_id', [f'ISIC_{i}' for i in range(MANY)])
    again = read_predictions(save_predictions(table, tmp_path/'p.csv'))
    assert len(again) == MANY and (again[CODES].to_numpy() == p).all()


@given(seed=st.integers(0, 1000))
@quick
def test_the_largest_confidence_is_the_decision(seed, tmp_path):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(8, .2), size=20).round(rng.integers(1, 6))
    p[p.sum(1) == 0, 0] = 1
    table = pd.DataFrame(p/p.sum(1, keepdims=True), columns=list(ISIC2019.codes)).assign(image_id=[str(i) for i in range(20)])
    table = with_classes(table.assign(decision=rng.choice([*ISIC2019.codes, None], 20)), ISIC2019)
    written = read_isic_submission(isic_submission(table, tmp_path/'s.csv'))
    assert classes_of(written) == ISIC2019
    known = table.decision.notna()
    assert list(predicted_codes(written)[known]) == list(table.decision[known]) and list(predicted_codes(written)) == list(decided_codes(table))
