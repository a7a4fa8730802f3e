"What a split keeps apart, and what it says of itself."
import warnings

import numpy as np
import pandas as pd
import pytest

from skin_lesions.classes import HAM10000, ISIC2019, MELANOMA, class_set, with_classes
from skin_lesions.readers import read_metadata
from skin_lesions.split import (challenge_validation, describe_split, leak_report, lesion_folds, split_by_fold,
    split_by_image, split_by_lesion)

COUNTS = dict(nv=6705, mel=1113, bkl=1099, bcc=514, akiec=327, vasc=142, df=115)


def made_up(classes, seed, n=400):
    "A table of lesions with one to four images"
    rng = np.random.default_rng(seed)
    codes = list(class_set(classes))
    dx = np.concatenate([np.repeat(codes, 6), rng.choice(codes, n)])
    rows = [(f'L{i:04}', code) for i, code in enumerate(dx) for _ in range(rng.integers(1, 5))]
    meta = pd.DataFrame(rows, columns=['lesion_id', 'dx'])
    meta.insert(0, 'image_id', [f'I{i:05}' for i in rng.permutation(len(meta))])
    return with_classes(meta.assign(group=meta.lesion_id), classes)


@pytest.mark.parametrize('classes', [HAM10000, ISIC2019, MELANOMA, class_set(['z', 'a', 'm'])])
@pytest.mark.parametrize('seed', range(2))
def test_no_group_is_on_both_sides(classes, seed):
    meta = made_up(classes, seed)
    folds = lesion_folds(meta, 5, seed)
    assert (folds.groupby('group').fold.nunique() == 1).all()
    assert (pd.crosstab(folds.dx, folds.fold) > 0).all(axis=None)
    for fold in range(5):
        split = split_by_lesion(meta, fold=fold, seed=seed)
        described = describe_split(split)
        assert described['valid_fraction_with_group_in_training'] == 0
        assert described['rule'] == f'by lesion, fold {fold} of 5' and described['seed'] == seed
        assert list(described['valid_counts']) == list(classes)
        assert split_by_fold(folds, fold).is_valid.tolist() == split.is_valid.tolist()


def test_the_rule_stays_with_the_frame_and_its_numbers_are_those_of_the_rows():
    meta = split_by_image(made_up(HAM10000, 0), show=False)
    some = meta[meta.dx != 'nv'].reset_index(drop=True)
    described = describe_split(some)
    assert described['rule'].startswith('by image, 20%')
    assert described['valid_images'] == some.is_valid.sum() and 'nv' not in described['valid_counts']
    leaked = some[some.is_valid].group.isin(set(some[~some.is_valid].group)).mean()
    assert described['valid_fraction_with_group_in_training'] == pytest.approx(leaked, abs=1e-4) and leaked > .5


def test_two_tables_as_training_and_validation_must_share_nothing():
    meta, other = made_up(HAM10000, 0), made_up(HAM10000, 1)
    other = other.assign(image_id='V'+other.image_id, lesion_id='V'+other.lesion_id, group='V'+other.group)
    both = challenge_validation(meta, other)
    assert both.is_valid.sum() == len(other) and both.image_id.is_monotonic_increasing
    for column in ('image_id', 'lesion_id', 'group'):
        shared = other.copy()
        shared.loc[shared.index[0], column] = meta[column].iloc[0]
        with pytest.raises(ValueError, match=f"share 1 values of '{column}'"): challenge_validation(meta, shared)


def test_images_that_are_their_own_groups_are_split_with_a_warning():
    meta = made_up(HAM10000, 0)
    meta = meta.assign(group=meta.image_id)
    meta.attrs['group'] = 'image'
    with pytest.warns(UserWarning, match='each image is its own group'): split = split_by_lesion(meta)
    assert describe_split(split)['rule'].startswith('by image') and describe_split(split)['unit'] == 'image'


@pytest.fixture(scope='module')
def real_meta(real): return read_metadata(real)


def test_the_paper_s_split_leaks_and_the_default_does_not(real_meta):
    def overall(meta): return leak_report(meta, show=False).leaked['all']
    leaks = [overall(split_by_image(real_meta, seed=s, show=False)) for s in range(10)]
    assert abs(sum(leaks)/len(leaks) - .389) < .01, leaks
    for fold in range(5): assert overall(split_by_lesion(real_meta, fold=fold)) == 0


def test_folds_cover_every_image_once_and_hold_every_class(real_meta):
    folds = lesion_folds(real_meta)
    table = pd.crosstab(folds.fold, folds.dx)
    assert table.sum().to_dict() == COUNTS
    assert (table/table.mean() - 1).abs().max().max() < .1


def test_the_challenge_s_validation_set_shares_nothing(real, real_meta):
    both = challenge_validation(real_meta, read_metadata(real, part='validation'))
    assert both.is_valid.sum() == 193 and len(both) == 10_208
