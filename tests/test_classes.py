"Sets of diagnoses: they travel with tables, and one is read in another without losing probability"
import json, pickle

import numpy as np
import pandas as pd
import pytest

from skin_lesions.classes import (CLASS_SETS, HAM10000, ISIC2019, MALIGNANT, MELANOMA, MILK10K, ClassSet, check_diagnoses, class_map,
                                  class_set, classes_of, map_classes, with_classes)


def table_of(classes, n=20, seed=0):
    p = np.random.default_rng(seed).dirichlet(np.ones(len(classes)), n)
    names = [f'image {i}' for i in range(n)]
    return with_classes(pd.DataFrame(p, columns=list(classes)).assign(image_id=names, dx=[list(classes)[i % len(classes)] for i in range(n)]), classes)


@pytest.mark.parametrize('name', CLASS_SETS)
def test_a_set_survives_json_and_every_common_operation_on_a_frame(name):
    classes = CLASS_SETS[name]
    assert ClassSet.from_dict(json.loads(json.dumps(classes.as_dict()))) == classes
    table = table_of(classes)
    parts = (table[5:], table.assign(fold=1), pd.concat([table, table]), table.sort_values('image_id'), table.drop(columns='dx'))
    assert all(classes_of(part) == classes for part in parts)
    json.dumps(table.attrs)
    assert table.dx.attrs['classes'] is table.attrs['classes'], 'pandas copies attrs deeply with each column, which took a fifth of a training'
    assert type(pickle.loads(pickle.dumps(table)).attrs['classes']) is dict, 'whoever unpickles a frame needs no class of ours'


@pytest.mark.parametrize('source, target', [(ISIC2019, HAM10000), (HAM10000, MALIGNANT), (ISIC2019, MALIGNANT), (MILK10K, MELANOMA), (MILK10K, HAM10000)],
                         ids=lambda s: s.name)
def test_a_map_keeps_probability(source, target):
    table = table_of(source)
    mapped = map_classes(table, target)
    p = mapped[list(target)].to_numpy()
    np.testing.assert_allclose(p.sum(1), 1)
    codes = class_map(source, target)
    kept = table[table.dx.map(codes).notna()]
    total = sum(kept[c] for c in source if codes[c] is not None)
    for code in target:
        expected = sum((kept[c] for c in source if codes[c] == code), start=0*total)/total
        np.testing.assert_allclose(mapped[code], expected)
    assert classes_of(mapped) == target and source.name in mapped.attrs['mapping']


def test_every_spelling_of_the_challenges_is_known():
    for label, code in (('NV', 'nv'), ('AKIEC', 'akiec'), ('Melanocytic nevi', 'nv'), ('basal cell carcinoma', 'bcc')): assert HAM10000.code_of(label) == code
    assert ISIC2019.code_of('AK') == 'ak' and ISIC2019.code_of('SCC') == 'scc'


def test_a_misspelt_diagnosis_names_its_rows_and_the_nearest_code():
    meta = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(9)], dx=['nv']*7 + ['nvv', 'mel']))
    with pytest.raises(ValueError, match="'nvv'; did you mean 'nv'.*first: i7"): check_diagnoses(meta)


def test_own_sets(tmp_path):
    (tmp_path/'own.csv').write_text('code,malignant\na,yes\nb,\n')
    own = class_set(tmp_path/'own.csv')
    assert own.codes == ('a', 'b') and own.malignant == ('a',) and not own.knows_malignancy
    with pytest.raises(ValueError, match='malignant must be yes, no or blank'):
        (tmp_path/'own.csv').write_text('code,malignant\na,perhaps\nb,no\n')
        class_set(tmp_path/'own.csv')
