"The moving average in a real training: what is validated, saved, and left in the network."
import torch

from skin_lesions.ema import EMA


def test_a_lesion_learner_ends_with_the_average_and_get_preds_uses_it(sample):
    from fastai.torch_core import set_seed
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    dls = ham10000_dataloaders(split_by_lesion(read_metadata(sample)), 32, bs=32, arch='test_efficientnet', num_workers=0, device='cpu')
    set_seed(1)
    learn = lesion_learner(dls, 'test_efficientnet', pretrained=False)
    ema = EMA(.9)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2, cbs=ema)
        recorded = learn.recorder.values[-1][1]
        own, average = learn.model.state_dict(), ema.average.ema.module.state_dict()
        for k in own: torch.testing.assert_close(own[k], average[k], rtol=0, atol=0)
        loss = learn.validate()[0]
    assert abs(loss-recorded) < 1e-4, 'the last epoch was validated with the average'
