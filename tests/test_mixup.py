"mixUp in the library's own learners: what it does to a training, and that two mixes do not meet."
import warnings

import pytest
import torch
from fastai.callback.mixup import CutMix, MixUp as FastaiMixUp

from skin_lesions.mixup import MixUp

TINY = 'test_efficientnet'


@pytest.fixture(scope='module')
def meta(sample):
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    return split_by_lesion(read_metadata(sample))


def learner(meta, **kwargs):
    from fastai.torch_core import set_seed
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import two_stage_learner
    set_seed(3)
    warnings.simplefilter('ignore') # rare classes are missing in so few images
    dls = ham10000_dataloaders(meta, 32, bs=16, arch=TINY, num_workers=0, device='cpu')
    return two_stage_learner(dls, TINY, pretrained=False, **kwargs)


def trained(learn, *cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=list(cbs))
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def test_a_weight_of_one_is_training_without(meta):
    torch.testing.assert_close(trained(learner(meta), MixUp(1.)), trained(learner(meta), MixUp(1.)), rtol=0, atol=0)
    assert not torch.equal(trained(learner(meta), MixUp(.7)), trained(learner(meta), MixUp(1.)))


@pytest.mark.parametrize('other', [lambda: FastaiMixUp(.4), CutMix, lambda: MixUp(.5)])
def test_a_second_mix_is_refused(meta, other):
    learn = learner(meta, mixup=.7)
    with pytest.raises(ValueError, match='two callbacks that mix images'): trained(learn, other())
    trained(learn) # the other one is gone again


@pytest.mark.parametrize('alpha', [None, .4])
def test_validation_and_prediction_see_plain_images(meta, alpha):
    learn = learner(meta)
    with learn.no_bar(): plain = learn.validate(), learn.get_preds()[0]
    learn.add_cb(MixUp(alpha=alpha))
    with learn.no_bar(): mixed = learn.validate(), learn.get_preds()[0]
    assert list(plain[0]) == list(mixed[0]) and torch.equal(plain[1], mixed[1])
