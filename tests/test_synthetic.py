"Synthetic data of any class set, from the files to a frame, DataLoaders and back; the same bytes in every process."
import hashlib

import numpy as np
import pandas as pd
import pytest

from skin_lesions.classes import HAM10000, ISIC2019, MALIGNANT, MELANOMA, PAD_UFES_20, class_set
from skin_lesions.synthetic import HAM10000_COUNTS, class_counts, draw_image, synthetic_dataset, synthetic_metadata

OWN = class_set(['wart', 'cyst', 'tag'])
SETS = (HAM10000, ISIC2019, PAD_UFES_20, MELANOMA, MALIGNANT, OWN)


@pytest.mark.parametrize('classes', SETS, ids=lambda s: s.name)
def test_a_class_set_goes_from_files_to_batches(classes, tmp_path):
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.readers import read_csv_dataset
    from skin_lesions.split import split_by_lesion
    n = 12*len(classes)
    folder = synthetic_dataset(tmp_path/'data', n, classes=classes, size=(80, 64))
    meta = read_csv_dataset(folder/'HAM10000_metadata.csv', classes=classes)
    assert meta.dx.value_counts().to_dict() == class_counts(n, classes)
    meta = split_by_lesion(meta)
    for _, part in meta.groupby('is_valid'): assert set(part.dx) == set(classes)
    dls = ham10000_dataloaders(meta, 32, bs=8, num_workers=0, device='cpu')
    assert tuple(dls.vocab) == classes.codes and dls.class_set == classes


@pytest.mark.parametrize('seed', range(3))
def test_every_lesion_has_one_diagnosis_and_one_patient(seed):
    table = synthetic_metadata(300, seed, classes=ISIC2019)
    assert (table.groupby('lesion_id')[['dx', 'sex', 'localization']].nunique() == 1).all(axis=None)
    assert table.image_id.is_unique and set(table.dx) == set(ISIC2019)


def test_the_fractions_are_those_of_ham10000():
    assert class_counts(sum(HAM10000_COUNTS.values())) == HAM10000_COUNTS


def test_codes_that_ham10000_does_not_have_look_different_from_each_other():
    "By mean colour and texture, over lesions"
    def looks(code):
        images = [draw_image(code, i, i, size=(96, 72), classes=OWN)[0][18:54, 24:72] for i in range(24)]
        return np.array([[*a.mean((0, 1)), *a.std((0, 1))] for a in images])
    looks = {c: looks(c) for c in OWN}
    for a, b in (('wart', 'cyst'), ('wart', 'tag'), ('cyst', 'tag')):
        difference = np.abs(looks[a].mean(0)-looks[b].mean(0))/np.sqrt(looks[a].var(0)/24+looks[b].var(0)/24)
        assert difference.max() > 3, (a, b, difference)


def test_another_process_draws_the_same(tmp_path, warm_python):
    "Signs of an own code must not follow Python's hash, which differs from process to process"
    code = 'import hashlib; from skin_lesions.classes import ISIC2019; from skin_lesions.synthetic import draw_image\n' \
           'print(hashlib.sha256(draw_image("scc", 3, 4, size=(96, 72), classes=ISIC2019)[0].tobytes()).hexdigest())'
    done = warm_python(code, cwd=tmp_path)
    assert done.stdout.strip() == hashlib.sha256(draw_image('scc', 3, 4, size=(96, 72), classes=ISIC2019)[0].tobytes()).hexdigest()


def test_one_diagnosis_outside_the_set_is_refused():
    with pytest.raises(ValueError, match="did you mean 'mel'"): draw_image('mell', 0, 0)
    with pytest.raises(ValueError, match='unknown diagnosis code'): draw_image('scc', 0, 0)
