"Hair and the colour of the light: what comes off, what stays, batches of other processes, exported learners and bundles."
from unittest import mock

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from skin_lesions import synthetic
from skin_lesions.preprocess import RemoveHair, ShadesOfGray, hair_mask, remove_hair

ITEM_TFMS = (RemoveHair(), ShadesOfGray(4))


@pytest.fixture(scope='module')
def meta(sample):
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    return split_by_lesion(read_metadata(sample))


def loaders(meta, **kw):
    from skin_lesions.data import ham10000_dataloaders
    return ham10000_dataloaders(meta, 64, bs=16, arch='test_efficientnet', num_workers=0, device='cpu', **kw)


def learner(dls):
    from fastai.torch_core import set_seed
    from skin_lesions.learner import lesion_learner
    set_seed(5)
    return lesion_learner(dls, 'test_efficientnet', pretrained=False)


def test_data_loading_workers_give_the_same_batches(meta):
    rows, batches = meta.iloc[:12], []
    dls = loaders(meta, item_tfms=list(ITEM_TFMS), augment=False)
    for workers in (0, 2): batches.append(dls.test_dl(rows, num_workers=workers, bs=12).one_batch()[0])
    assert torch.equal(*batches)
    plain = loaders(meta, augment=False).test_dl(rows, num_workers=0, bs=12).one_batch()[0]
    assert not torch.equal(plain, batches[0])


def test_a_learner_and_a_bundle_take_preprocessing_along(meta, tmp_path):
    from fastai.learner import load_learner
    from skin_lesions.bundle import save_bundle
    from skin_lesions.predictions import get_predictions
    from skin_lesions.predict import load_predictor
    learn = learner(loaders(meta, item_tfms=list(ITEM_TFMS)))
    learn.export(tmp_path/'learner.pkl')
    rows, codes = meta.head(8), list(learn.dls.vocab)
    table = get_predictions(learn, rows)
    pd.testing.assert_frame_equal(table, get_predictions(load_learner(tmp_path/'learner.pkl'), rows))
    predictor = load_predictor(save_bundle(learn, tmp_path/'bundle'), 'cpu')
    assert [t.as_dict() for t in predictor.preprocess] == [t.as_dict() for t in ITEM_TFMS]
    np.testing.assert_allclose(predictor.predict(rows, progress=False)[codes], table[codes], atol=1e-5)
    bare = learner(loaders(meta))
    bare.model.load_state_dict(learn.model.state_dict())
    assert not np.allclose(get_predictions(bare, rows)[codes], table[codes], atol=1e-7)


@pytest.mark.parametrize('seed', range(3))
def test_hair_comes_off_and_other_pixels_stay(seed):
    with mock.patch.object(synthetic, '_IN_THE_WAY', ()): image, _ = synthetic.draw_image('nv', seed, seed, seed=9)
    hairy, line = image.copy(), np.zeros(image.shape[:2], np.uint8)
    rng = np.random.default_rng(seed)
    for _ in range(6):
        ends = [tuple(int(v) for v in rng.uniform(0, 1, 2)*(600, 450)) for _ in range(2)]
        cv2.line(line, *ends, 255, 3)
    hairy[line > 0] = (50, 38, 34)
    mask, result = hair_mask(hairy), remove_hair(hairy)
    def error(a): return np.abs(a.astype(int)-image).mean(-1)[line > 0].mean()
    assert mask[line > 0].mean() > .9 and error(result) < .15*error(hairy)
    assert (result != hairy).any(-1)[cv2.dilate(line, np.ones((15, 15))) == 0].mean() < .002
    assert np.array_equal(result[~mask], hairy[~mask])
