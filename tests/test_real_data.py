"HAM10000 itself, where `HAM10000_DIR` names it: counts, groups, leaks, one batch."
import pandas as pd
import pytest

COUNTS = dict(nv=6705, mel=1113, bkl=1099, bcc=514, akiec=327, vasc=142, df=115)


@pytest.fixture(scope='module')
def meta(real):
    from skin_lesions.readers import read_metadata
    return read_metadata(real)


def test_counts_and_groups(meta):
    assert len(meta) == 10_015 and meta.dx.value_counts().to_dict() == COUNTS
    assert meta.lesion_id.nunique() == 7470 and meta.group.nunique() == 7452
    assert (meta.age.isna().sum(), (meta.sex == 'unknown').sum()) == (57, 57)
    assert 'dx_type' not in meta


def test_the_paper_s_split_leaks_and_the_default_does_not(meta):
    from skin_lesions.split import leak_report, split_by_image, split_by_lesion
    overall = lambda m: leak_report(m, show=False).leaked['all']
    leaks = [overall(split_by_image(meta, seed=s, show=False)) for s in range(10)]
    assert abs(sum(leaks)/len(leaks) - .389) < .01, leaks
    for fold in range(5): assert overall(split_by_lesion(meta, fold=fold)) == 0


def test_folds_cover_every_image_once_and_hold_every_class(meta):
    from skin_lesions.split import lesion_folds
    folds = lesion_folds(meta)
    assert folds.groupby('group').fold.nunique().max() == 1
    table = pd.crosstab(folds.fold, folds.dx)
    assert table.sum().to_dict() == COUNTS
    assert (table/table.mean() - 1).abs().max().max() < .1


def test_challenge_validation_set_shares_nothing(real, meta):
    from skin_lesions.dataset import read_challenge
    from skin_lesions.split import challenge_validation
    both = challenge_validation(meta, read_challenge(real))
    assert both.is_valid.sum() == 193 and len(both) == 10_208


def test_a_batch(meta):
    from skin_lesions.data import ham10000_dataloaders
    xb, yb = ham10000_dataloaders(meta, 128, bs=16, num_workers=0).one_batch()
    assert xb.shape == (16, 3, 128, 128) and xb.std() > .1
