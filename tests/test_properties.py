"Tables that people hand in: whatever stands in the file, it is read rightly or refused with the file, the line and the reason."
import csv, io, os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image

from skin_lesions.core import CODES, ISIC_COLUMNS
from skin_lesions.dataset import read_challenge
from skin_lesions.readers import read_metadata
from skin_lesions.report import html_report
from skin_lesions.evaluate import scores
from skin_lesions.predictions import check_predictions, isic_submission, read_isic_submission, read_predictions, save_predictions

CODES, COLUMNS = list(CODES), ['lesion_id', 'image_id', 'dx', 'dx_type', 'age', 'sex', 'localization']
IDS = ['ISIC_0000001', 'ISIC_0000002', 'été', '日本', 'a b', 'x;y', 'NA', '007', 'null']
quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
MANY = 1_000_000 if os.environ.get('SKIN_LESIONS_MILLION') else 10_000


@pytest.fixture(scope='module')
def ham(tmp_path_factory):
    "A folder with the images of `IDS` and no table"
    folder = tmp_path_factory.mktemp('ham')
    for i in IDS: Image.new('RGB', (2, 2)).save(folder/f'{i}.jpg')
    return folder


def put(folder, data, name='HAM10000_metadata.csv'):
    (folder/name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder/name


# ages as they stand in a file and what they mean
AGES = st.one_of(st.integers(0, 120).map(lambda a: (str(a), float(a))), st.sampled_from([('', np.nan), ('unknown', np.nan), ('NA', np.nan), ('45.0', 45.)]))
WORDS = st.sampled_from(['female', 'male', 'lower extremity', 'Rücken', 'a, b', 'x;y', 'say "x"'])
ROW = st.fixed_dictionaries(dict(lesion_id=st.sampled_from(['HAM_1', 'HAM_2', 'läsion']), dx=st.sampled_from(CODES), dx_type=WORDS, age=AGES, sex=WORDS, localization=WORDS))
STYLE = st.fixed_dictionaries(dict(separator=st.sampled_from(',;\t'), encoding=st.sampled_from(['utf-8', 'utf-8-sig', 'utf-16']), end=st.sampled_from(['\n', '\r\n', '\r']), quote=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
                                   columns=st.permutations([*COLUMNS, 'source']), blank=st.sampled_from(['', ' ', 'separators']), upper=st.booleans(), last=st.booleans()))


def written(rows, style):
    "A table in some program's way"
    out = io.StringIO()
    writer = csv.DictWriter(out, style['columns'], delimiter=style['separator'], quoting=style['quote'], lineterminator=style['end'], restval='-', extrasaction='ignore')
    writer.writeheader()
    for row in rows:
        writer.writerow(row | dict(age=row['age'][0], dx=row['dx'].upper() if style['upper'] else row['dx']))
        out.write((style['separator']*(len(style['columns'])-1) if style['blank'] == 'separators' else style['blank']) + style['end'])
    text = out.getvalue() if style['last'] else out.getvalue().rstrip('\r\n' + style['separator'] + ' ') + style['end']
    return text.encode(style['encoding'])


@quick
@given(rows=st.lists(ROW, min_size=1, max_size=len(IDS)), ids=st.permutations(IDS), style=STYLE)
def test_metadata_is_read_whatever_program_wrote_it(ham, rows, ids, style):
    rows = [r | dict(image_id=i) for r, i in zip(rows, ids)]
    put(ham, written(rows, style | dict(last=True)))
    meta = read_metadata(ham)
    expected = pd.DataFrame(rows).sort_values('image_id').reset_index(drop=True)
    assert meta.image_id.tolist() == expected.image_id.tolist()
    for c in ('dx', 'lesion_id', 'sex', 'localization'): assert meta[c].tolist() == expected[c].tolist(), c
    np.testing.assert_array_equal(meta.age, [a for _, a in expected.age])
    assert all(Path(p).stem == i for p, i in zip(meta.path, meta.image_id))


FAULTS = { # what is wrong -> a row of fields made from a good one, and what the error says of it
    'code': (lambda r: [*r[:2], 'melanom', *r[3:]], 'unknown diagnosis code'), 'no code': (lambda r: [*r[:2], '', *r[3:]], 'unknown diagnosis code'),
    'image_id': (lambda r: [r[0], ' ', *r[2:]], 'no image_id'), 'lesion_id': (lambda r: ['', *r[1:]], 'no lesion_id'), 'twice': (lambda r: [r[0], IDS[0], *r[2:]], 'repeated image_id'),
    'age text': (lambda r: [*r[:4], 'old', *r[5:]], 'age is no number'), 'age comma': (lambda r: [*r[:4], '"45,5"', *r[5:]], 'age is no number'), 'age inf': (lambda r: [*r[:4], 'inf', *r[5:]], 'age is no number'),
    'age -1': (lambda r: [*r[:4], '-1', *r[5:]], 'from 0 to 130'), 'age 450': (lambda r: [*r[:4], '450', *r[5:]], 'from 0 to 130'), 'short': (lambda r: r[:5], '5 fields, the header has 7'), 'long': (lambda r: [*r, 'x'], '8 fields, the header has 7'),
    'quote': (lambda r: [*r[:6], '"back'], 'quote|unexpected end'), 'latin-1': (lambda r: [*r[:6], b'R\xfccken'], 'UTF-8'), 'NUL': (lambda r: [*r[:6], 'ba\0ck'], 'NUL')}


@quick
@given(fault=st.sampled_from(sorted(FAULTS)), n=st.integers(2, len(IDS)-1), at=st.integers(1, 100), blanks=st.integers(0, 3), bom=st.booleans())
def test_a_fault_is_named_with_its_line(ham, fault, n, at, blanks, bom):
    rows = [['HAM_1', i, 'nv', 'histo', '45', 'male', 'back'] for i in IDS[:n]]
    at = 1 + at % (n-1)
    make, said = FAULTS[fault]
    rows[at] = make(rows[at])
    lines = [b','.join(f if isinstance(f, bytes) else f.encode() for f in r) for r in [COLUMNS, *rows]]
    lines[1:1] = [b'']*blanks # blank lines count
    file = put(ham, (b'\xef\xbb\xbf' if bom else b'') + b'\n'.join(lines) + b'\n')
    with pytest.raises(ValueError) as e: read_metadata(ham)
    assert str(file) in str(e.value) and f'line {at+2+blanks}' in str(e.value), str(e.value)
    assert any(s in str(e.value) for s in said.split('|')), str(e.value)


@pytest.mark.parametrize('n', [0, MANY])
def test_metadata_of_no_rows_and_of_many(ham, n):
    "`SKIN_LESIONS_MILLION=1` makes it a million"
    put(ham, ','.join(COLUMNS) + '\n' + ''.join(f'HAM_{i//2},NEW_{i},nv,histo,{i%90},male,back\n' for i in range(n)))
    if n == 0:
        with pytest.raises(ValueError, match='has a header but no rows'): read_metadata(ham)
        return
    with pytest.raises(FileNotFoundError, match=f'{n} of {n} images are not in'): read_metadata(ham)
    with open(ham/'HAM10000_metadata.csv', 'a') as f: f.write('HAM_0,007,mel,histo,50,male,back\n')
    with pytest.warns(UserWarning, match=f'{n} of {n+1} images'): meta = read_metadata(ham, missing='drop')
    assert meta[['image_id', 'dx', 'age']].values.tolist() == [['007', 'mel', 50.]]
    with open(ham/'HAM10000_metadata.csv', 'a') as f: f.write('HAM_0,007,mel,histo,50,male,back\n')
    with pytest.raises(ValueError, match=rf'repeated image_id in 2 rows: line {n+2} \(007\), line {n+3} \(007\)'): read_metadata(ham)


ANYTHING = st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda t: t.encode('utf-8', 'surrogatepass')),
                     st.text(alphabet='a1.,;\t"\'\n\r \0é', max_size=200).map(lambda t: (','.join(COLUMNS) + '\n' + t).encode()))


@quick
@given(data=ANYTHING)
@example(data=(','.join(COLUMNS) + '\n' + ','*10_000).encode())
@example(data=(','.join(COLUMNS) + '\nHAM_1,"' + 'x'*200_000 + '",nv,histo,1,male,back\n').encode())
def test_anything_else_is_refused_with_its_file(ham, data):
    file = put(ham, data)
    with pytest.raises((ValueError, FileNotFoundError)) as e: read_metadata(ham)
    assert str(ham) in str(e.value) and type(e.value) in (ValueError, FileNotFoundError) and len(str(e.value)) < 2000


@quick
@given(hot=st.lists(st.lists(st.sampled_from(['0', '1', '0.0', '1.0', '0.5', '', 'x', 'nan']), min_size=7, max_size=7), min_size=1, max_size=4))
def test_the_challenge_s_labels(tmp_path_factory, hot):
    folder = tmp_path_factory.mktemp('isic', numbered=True)
    for i in range(len(hot)): Image.new('RGB', (2, 2)).save(folder/f'ISIC_{i:07}.jpg')
    file = put(folder, '\n'.join([','.join(['image', *ISIC_COLUMNS]), *(','.join([f'ISIC_{i:07}', *r]) for i, r in enumerate(hot))]), 'ISIC2018_Task3_Validation_GroundTruth.csv')
    good = [sorted({'0.0': '0', '1.0': '1'}.get(v, v) for v in r) == ['0']*6 + ['1'] for r in hot]
    if all(good):
        said = [ISIC_COLUMNS[[float(v) for v in r].index(1)].lower() for r in hot]
        assert read_challenge(folder).dx.tolist() == said
    else:
        with pytest.raises(ValueError) as e: read_challenge(folder)
        assert str(file) in str(e.value) and 'line ' in str(e.value)


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
