"Memory that is kept, and half precision: the learners' defaults on a CPU."
import pytest
import torch

from skin_lesions.core import reuse_memory
from skin_lesions.speed import OwnMixedPrecision, ReuseMemory, best_precision


def test_kept_memory_changes_no_number():
    torch.manual_seed(0)
    net, x = torch.nn.Conv2d(3, 8, 3), torch.randn(4, 3, 64, 64)
    before = net(x)
    reuse_memory()
    assert torch.equal(net(x), before)


@pytest.mark.parametrize('capability,precision', [((7, 5), 'float16'), ((6, 0), 'float16'), ((8, 0), 'bfloat16'), ((9, 0), 'bfloat16')])
def test_precision_follows_the_gpu(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert best_precision('cuda') == precision and best_precision('cpu') == 'float32'


def test_learners_on_a_cpu_keep_memory_and_full_precision(sample):
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    dls = ham10000_dataloaders(split_by_lesion(read_metadata(sample)), 32, bs=32, arch='test_efficientnet', num_workers=0, device='cpu')
    learn = lesion_learner(dls, 'test_efficientnet', pretrained=False)
    kinds = [type(cb) for cb in learn.cbs]
    assert ReuseMemory in kinds and OwnMixedPrecision not in kinds


@pytest.mark.parametrize('where', ['batch', 'train', 'valid', 'epoch', 'fit', 'error'])
def test_half_precision_ends_with_a_cancelled_training(where, monkeypatch):
    "fastai opens autocast before a batch and closes it after the loss, which a cancelled batch never has"
    from fastai.callback import core, fp16
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    monkeypatch.setattr(fp16, 'autocast', lambda kind, dtype: torch.autocast('cpu', dtype=torch.bfloat16)) # CUDA's, here

    class Stop(core.Callback):
        order = 99
        def after_pred(self):
            assert torch.is_autocast_enabled('cpu')
            if where == 'error': raise KeyboardInterrupt()
            if self.training != (where == 'valid'): raise getattr(core, f'Cancel{where.title()}Exception')()
    data = [(torch.ones(3), torch.ones(1))]*4
    dls = DataLoaders(DataLoader(data, bs=2), DataLoader(data, bs=2), device='cpu')
    learn = Learner(dls, torch.nn.Linear(3, 1), loss_func=torch.nn.MSELoss(), cbs=OwnMixedPrecision(amp_mode=fp16.AMPMode.BF16))
    try:
        with learn.no_bar(), learn.no_logging():
            try: learn.fit(1, cbs=Stop())
            except KeyboardInterrupt: learn.fit(1) # the next one ends it
        assert not torch.is_autocast_enabled('cpu')
    finally: torch.set_autocast_enabled('cpu', False)
