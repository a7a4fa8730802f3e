"Tables that people hand in: whatever stands in the file, it is read rightly or refused with the file, the line and the reason."
import csv, io, os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from skin_lesions.core import CODES, ISIC_COLUMNS
from skin_lesions.report import html_report
from skin_lesions.evaluate import scores
from skin_lesions.predictions import check_predictions, isic_submission, read_isic_submission, read_predictions, save_predictions

CODES, COLUMNS = list(CODES), ['lesion_id', 'image_id', 'dx', 'dx_type', 'age', 'sex', 'localization']
IDS = ['ISIC_0000001', 'ISIC_0000002', 'été', '日本', 'a b', 'x;y', 'NA', '007', 'null']
quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
MANY = 1_000_000 if os.environ.get('SKIN_LESIONS_MILLION') else 10_000



def put(folder, data, name='HAM10000_metadata.csv'):
    (folder/name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder/name


ANYTHING = st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda t: t.encode('utf-8', 'surrogatepass')),
                     st.text(alphabet='a1.,;\t"\'\n\r \0é', max_size=200).map(lambda t: (','.join(COLUMNS) + '\n' + t).encode()))


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


BAD = {'NaN': ('nan', 'missing'), 'empty': ('', 'missing'), 'negative': ('-0.25', 'between 0 and 1'), 'above one': ('1.5', 'between 0 and 1'), 'infinite': ('inf', 'between 0 and 1'), 'text': ('high', 'no number'), 'comma': ('"0,5"', 'no number'),
       'underscore': ('0_1', 'no number'), 'sum': ('0.9', 'sum to')}


@quick
@given(bad=st.sampled_from(sorted(BAD)), n=st.integers(1, 6), at=st.integers(0, 5), code=st.sampled_from(CODES))
def test_a_bad_probability_is_named_with_its_row(tmp_path, bad, n, at, code):
    at, (value, said) = at % n, BAD[bad]
    rows = [[f'IMG_{i}', *['0.5' if c == ('nv' if code != 'nv' else 'mel') else '0.5' if c == code else '0' for c in CODES]] for i in range(n)]
    rows[at][1 + CODES.index(code)] = value
    for read, header in ((read_predictions, ['image_id', *CODES]), (read_isic_submission, ['image', *(c.upper() for c in CODES)])):
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


def test_the_command_names_file_and_row(tmp_path, capsys):
    from skin_lesions.cli import main
    file = put(tmp_path, ','.join(['image_id', *CODES]) + '\na,0,0,0,0,0,1,0\nb,0,0,0,0,2,1,0\n', 'p.csv')
    for args in (['evaluate', file], ['submit', file, '--out', tmp_path/'s.csv'], ['ensemble', file, file.with_name('q.csv'), '--out', tmp_path/'e.csv']):
        if args[0] == 'ensemble': (tmp_path/'q.csv').write_bytes(file.read_bytes())
        assert main([str(a) for a in args]) == 2
        said = capsys.readouterr().err
        assert str(file) in said and 'row 1 ' in said and "'b'" in said and said.count('\n') == 1, said


def test_a_patient_in_two_rows_is_refused(tmp_path):
    from skin_lesions.cli import read_patients
    put(tmp_path, 'image_id;age\n01;50\n02;60\n', 'p.csv')
    assert read_patients(tmp_path/'p.csv').values.tolist() == [['01', 50], ['02', 60]]
    put(tmp_path, 'image_id;age\n01;50\n01;60\n', 'p.csv')
    with pytest.raises(ValueError, match="p.csv: image_id '01' is in two rows"): read_patients(tmp_path/'p.csv')
