"""Tables of collections as other programs write them: read rightly, or refused with the file, the line and the reason."""
import csv, io, os, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image

from skin_lesions.classes import CLASS_SETS, HAM10000, ISIC2019, MILK10K, class_set, classes_of
from skin_lesions.dataset import META_COLUMNS
from skin_lesions.readers import READERS, archive_code, find_collection, read_csv_dataset, read_metadata

CODES = list(HAM10000)
SEVEN = list(HAM10000.challenge_columns.values())
COLUMNS = ['lesion_id', 'image_id', 'dx', 'dx_type', 'age', 'sex', 'localization']
IDS = ['ISIC_0000001', 'ISIC_0000002', 'été', '日本', 'a b', 'x;y', 'NA', '007', 'null']
quick = settings(max_examples=40, deadline=None, derandomize=True,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
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
    assert meta.dx.tolist() == expected.dx.tolist() and meta.lesion_id.tolist() == expected.lesion_id.tolist()
    for ours, theirs in (('sex', 'sex'), ('site', 'localization')): assert meta[ours].tolist() == expected[theirs].str.lower().tolist()
    np.testing.assert_array_equal(meta.age, [a for _, a in expected.age])
    assert all(Path(p).stem == i for p, i in zip(meta.path, meta.image_id))


FAULTS = { # what is wrong -> a row of fields made from a good one, and what the error says of it
    'code': (lambda r: [*r[:2], 'melanom', *r[3:]], 'unknown diagnosis of HAM10000'), 'no code': (lambda r: [*r[:2], '', *r[3:]], 'no dx'),
    'image_id': (lambda r: [r[0], ' ', *r[2:]], 'no image_id'), 'lesion_id': (lambda r: ['', *r[1:]], 'no lesion_id'), 'twice': (lambda r: [r[0], IDS[0], *r[2:]], 'repeated image_id'),
    'age text': (lambda r: [*r[:4], 'old', *r[5:]], 'age is no number'), 'age comma': (lambda r: [*r[:4], '"45,5"', *r[5:]], 'age is no number'), 'age inf': (lambda r: [*r[:4], 'inf', *r[5:]], 'age is no number'),
    'age -1': (lambda r: [*r[:4], '-1', *r[5:]], 'from 0 to 130'), 'age 450': (lambda r: [*r[:4], '450', *r[5:]], 'from 0 to 130'), 'short': (lambda r: r[:5], '5 fields, the header has 7'), 'long': (lambda r: [*r, 'x'], '8 fields, the header has 7'),
    'quote': (lambda r: [*r[:6], '"back'], 'quote|unexpected end'), 'latin-1': (lambda r: [*r[:6], b'R\xfccken'], 'UTF-8'), 'NUL': (lambda r: [*r[:6], 'ba\0ck'], 'NUL')}


@quick
@given(fault=st.sampled_from(sorted(FAULTS)), n=st.integers(2, len(IDS)-1), at=st.integers(1, 100), blanks=st.integers(0, 3), bom=st.booleans())
def test_a_fault_is_named_with_its_line(ham, fault, n, at, blanks, bom):
    rows = [['HAM_1', i, 'nv', 'histo', '45', 'male', 'back'] for i in IDS[:n]]
    at = 1 + at % (n-1)
    make, expected_words = FAULTS[fault]
    rows[at] = make(rows[at])
    lines = [b','.join(f if isinstance(f, bytes) else f.encode() for f in r) for r in [COLUMNS, *rows]]
    lines[1:1] = [b'']*blanks # blank lines count
    file = put(ham, (b'\xef\xbb\xbf' if bom else b'') + b'\n'.join(lines) + b'\n')
    with pytest.raises(ValueError) as e: read_metadata(ham)
    assert str(file) in str(e.value) and f'line {at+2+blanks}' in str(e.value), str(e.value)
    assert any(s in str(e.value) for s in expected_words.split('|')), str(e.value)


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
    file = put(folder, '\n'.join([','.join(['image', *SEVEN]), *(','.join([f'ISIC_{i:07}', *r]) for i, r in enumerate(hot))]), 'ISIC2018_Task3_Validation_GroundTruth.csv')
    good = [sorted({'0.0': '0', '1.0': '1'}.get(v, v) for v in r) == ['0']*6 + ['1'] for r in hot]
    if all(good):
        expected_words = [SEVEN[[float(v) for v in r].index(1)].lower() for r in hot]
        assert read_metadata(folder, part='validation').dx.tolist() == expected_words
    else:
        with pytest.raises(ValueError) as e: read_metadata(folder, part='validation')
        assert str(file) in str(e.value) and 'line ' in str(e.value)


def images(folder, names, suffix='.jpg'):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names: Image.new('RGB', (4, 4)).save(folder/f'{name}{suffix}')


def test_every_reader_gives_the_same_frame(tmp_path):
    "Columns, order, groups and class set, whichever collection it is"
    tables = dict(
        isic2019=('ISIC_2019_Training_GroundTruth.csv', 'image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\nb,0,1,0,0,0,0,0,0,0\na,0,0,0,0,0,0,0,1,0\n'),
        isic2020=('train.csv', 'image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target\n'
                               'b,IP_1,male,45.0,torso,unknown,benign,0\na,IP_1,female,,,melanoma,malignant,1\n'),
        isic_archive=('metadata.csv', 'isic_id,diagnosis_1,diagnosis_3\nb,Benign,Nevus\na,Malignant,"Melanoma, NOS"\n'),
        pad_ufes_20=('metadata.csv', 'patient_id,lesion_id,gender,age,region,diagnostic,img_id\nP1,1,FEMALE,50,FACE,NEV,b.jpg\nP2,1,,,,MEL,a.jpg\n'),
        milk10k=('part.csv', 'image_id,lesion_id,label,skin_tone_class,age\nb,IL_1,NV,3,50.0\na,IL_2,SCCKA,4,\n'))
    for name, (file, text) in tables.items():
        images(tmp_path/name/'images', 'ab')
        put(tmp_path/name, text, file)
        assert find_collection(tmp_path/name) == (name, tmp_path/name)
        meta = read_metadata(tmp_path/name)
        assert tuple(meta.columns)[:8] == META_COLUMNS and meta.image_id.tolist() == ['a', 'b'] and list(meta.index) == [0, 1]
        assert set(meta.dx) <= set(classes_of(meta)) and meta.group.notna().all() and meta.age.dtype == float
        assert meta.attrs['group'] in ('lesion', 'patient', 'image') and meta.attrs['collection'] == READERS[name].about
        assert all(Path(p).is_file() for p in meta.path) and (meta.sex == meta.sex.str.lower()).all()
        put(tmp_path/name, text.replace(',', ', ').replace('\n', '\r\n'), file) # blanks after commas
        pd.testing.assert_frame_equal(read_metadata(tmp_path/name), meta)


def test_groups_join_patients_lesions_and_duplicates(tmp_path):
    images(tmp_path/'images', 'abcdef')
    rows = ['a,P1,L1', 'b,P1,L2', 'c,,L2', 'd,P2,', 'e,,', 'f,,L3']
    put(tmp_path, '\n'.join(['isic_id,patient_id,lesion_id,diagnosis_1,diagnosis_3', *(r+',Benign,Nevus' for r in rows)]), 'metadata.csv')
    meta = read_metadata(tmp_path)
    assert meta.group.tolist() == [meta.group[0]]*3 + ['P2', 'e', 'L3'] and meta.attrs['group'] == 'patient'
    assert meta.lesion_id.tolist() == ['L1', 'L2', 'L2', 'd', 'e', 'L3']


@pytest.mark.parametrize('classes', [s for s in CLASS_SETS if s not in ('MELANOMA', 'MALIGNANT')])
def test_a_csv_finds_its_class_set_by_any_spelling(tmp_path, classes):
    "Codes, codes in capitals, and full names"
    known = class_set(classes)
    images(tmp_path/'images', known.codes)
    for spelled in (known.codes, [c.upper() for c in known], [known.full_name(c) for c in known]):
        lines = [f'"{c}","{label}"' for c, label in zip(known, spelled)]
        put(tmp_path, '\n'.join(['image,label', *lines]), 'own.csv')
        meta = read_csv_dataset(tmp_path/'own.csv', classes=classes)
        assert meta.dx.tolist() == meta.image_id.tolist() and classes_of(meta) == known
        assert set(known) <= set(read_csv_dataset(tmp_path/'own.csv').dx) or classes != 'HAM10000'


def test_a_misspelt_label_of_a_csv_is_refused_and_an_unknown_set_is_taken(tmp_path):
    images(tmp_path/'images', [f'i{i}' for i in range(20)])
    labels = ['mel', 'nv']*9 + ['nv', 'mell']
    put(tmp_path, '\n'.join(['image,label', *(f'i{i},{label}' for i, label in enumerate(labels))]), 'own.csv')
    with pytest.raises(ValueError, match=r"line 21 \(i19\): unknown diagnosis of HAM10000 'mell'; did you mean 'mel'"): read_csv_dataset(tmp_path/'own.csv')
    put(tmp_path, '\n'.join(['image,label', *(f'i{i},{"wart" if i%2 else "nv"}' for i in range(20))]), 'own.csv')
    assert list(classes_of(read_csv_dataset(tmp_path/'own.csv'))) == ['nv', 'wart']


@pytest.mark.parametrize('term,expected', [('Nevus, Reed', 'nv'), ('Melanoma Invasive', 'mel'), ('Squamous cell carcinoma in situ', 'scc'),
    ('Flat melanotic pigmentations - not melanocytic nevus', None), ('Malignant melanocytic proliferations (Melanoma)', 'mel'),
    ('Solar or actinic keratosis', 'ak'), ('Lichen planus like keratosis', 'bkl'), ('Hemangioma', 'vasc'), ('Clear cell acanthoma', None)])
def test_terms_of_the_archive(term, expected): assert archive_code(term, ISIC2019) == expected


def test_a_table_of_your_own_beside_a_collection_is_not_taken_for_it(tmp_path):
    images(tmp_path, ['a'])
    put(tmp_path, 'image,dx\na,mel\n', 'mine.csv')
    assert read_metadata(tmp_path/'mine.csv').dx.tolist() == ['mel']
    with pytest.raises(FileNotFoundError, match='read_csv_dataset'): read_metadata(tmp_path)


def test_kaggle_s_copy_of_every_image_in_two_folders(tmp_path):
    for folder in ('ham10000_images_part_1', 'HAM10000_images_part_1', 'HAM10000_images_part_1/HAM10000_images_part_1'): images(tmp_path/folder, ['ISIC_1'])
    put(tmp_path, ','.join(COLUMNS) + '\nHAM_1,ISIC_1,nv,histo,50.0,male,back\n')
    put(tmp_path, 'pixel0000,pixel0001,label\n1,2,3\n', 'hmnist_8_8_L.csv') # pixels, not metadata
    assert read_metadata(tmp_path).path.tolist() == [str(tmp_path/'HAM10000_images_part_1'/'ISIC_1.jpg')]


def test_counts_and_groups_of_ham10000(real):
    meta = read_metadata(real)
    counts = dict(nv=6705, mel=1113, bkl=1099, bcc=514, akiec=327, vasc=142, df=115)
    assert len(meta) == 10_015 and meta.dx.value_counts().to_dict() == counts
    assert meta.lesion_id.nunique() == 7470 and meta.group.nunique() == 7452
    assert (meta.age.isna().sum(), (meta.sex == 'unknown').sum()) == (57, 57) and 'dx_type' not in meta
    assert len(read_metadata(real, part='validation')) == 193


def test_the_part_of_milk10k_beside_ham10000(real):
    folder = real.parent/'milk10k'
    if not folder.is_dir(): pytest.skip('no milk10k beside HAM10000')
    meta = read_metadata(folder)
    assert len(meta) == 2410 and classes_of(meta) == MILK10K and meta.attrs['group'] == 'lesion'
    assert meta.dx.value_counts().head(3).to_dict() == dict(bcc=1404, sccka=297, bkl=237)
    assert meta.group.nunique() == 2410 and set(meta.skin_type) <= {'unknown', *'012345'}
    seven = read_metadata(folder, classes='HAM10000')
    assert classes_of(seven) == HAM10000 and len(seven) == 2410 - (297 + 34 + 27 + 4)


def test_one_spelling_of_a_site_in_frames_encoder_and_results(tmp_path, repo):
    "MILK10k's words and HAM10000's give one row of a table by site, and one number of a patient"
    import json
    from skin_lesions.dataset import site_name
    from skin_lesions.patient import PatientEncoder
    frames = {}
    for name, sites in dict(one=['lower extremity', 'head/neck', 'back'], other=['lower_extremity', 'head_neck_face', 'Back']).items():
        (tmp_path/name).mkdir()
        for i in range(3): Image.new('RGB', (8, 8)).save(tmp_path/name/f'{name}{i}.png')
        (tmp_path/name/'t.csv').write_text('image_id,dx,age,sex,site\n' + ''.join(f'{name}{i},nv,40,male,{s}\n' for i, s in enumerate(sites)))
        frames[name] = read_metadata(tmp_path/name/'t.csv')
    assert frames['one'].site.tolist() == frames['other'].site.tolist() == ['lower extremity', 'head/neck', 'back']
    for train, other in (('one', 'other'), ('other', 'one')):
        encoder = PatientEncoder.fit(frames[train])
        assert (encoder.encode(frames['one']) == encoder.encode(frames['other'])).all()
    rows = [dict(age=40, sex='male', site=s) for s in ('lower extremity', 'Lower_Extremity')]
    assert encoder.encode_row(rows[0]) == encoder.encode_row(rows[1]), 'as somebody writes it beside an image'
    card = json.loads((repo/'skin_lesions'/'bundles'/'ham10000'/'bundle.json').read_text())['scores']['subgroups']['site']
    measured = json.loads((repo/'benchmarks'/'results'/'cross_collection.json').read_text())['subgroups_of_milk10k']['site']
    for sites in ([r['site'] for r in card], [r['subgroup'] for r in measured]): assert sites == [site_name(s) for s in sites] and len(set(sites)) == len(sites)
