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
