"Losses: cross-entropy as the limit for every class set and first class, finite gradients, and no fastai."
import pytest
import torch
import torch.nn.functional as F

from skin_lesions.classes import CLASS_SETS
from skin_lesions.losses import FocalLossFlat, LogitAdjustedLossFlat, TwoStageFocalLoss

FIRSTS = [(name, code) for name, classes in CLASS_SETS.items() if len(classes) > 2 for code in classes]


def batch(n_classes, seed=0, n=40):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, n_classes, generator=gen, dtype=torch.float64)*3, torch.randint(n_classes, (n,), generator=gen)


@pytest.mark.parametrize('name, first', FIRSTS)
def test_two_stages_without_focus_are_cross_entropy(name, first):
    classes = CLASS_SETS[name]
    x, t = batch(len(classes))
    w = torch.linspace(.5, 2, len(classes), dtype=torch.float64)
    loss = TwoStageFocalLoss(0., dict(zip(classes, w.tolist())), 'none', vocab=classes, first=first)
    torch.testing.assert_close(loss(x, t), F.cross_entropy(x, t, weight=w, reduction='none'))


@pytest.mark.parametrize('gamma', [0, .5, 2])
@pytest.mark.parametrize('name, first', FIRSTS[::5])
def test_stages_are_binary_and_multiclass_focal_losses(name, first, gamma):
    "Against one-stage losses: of two classes, and of the others alone"
    classes = CLASS_SETS[name]
    i = classes.index(first)
    x, t = batch(len(classes), 1)
    others = torch.cat([x[:, :i], x[:, i+1:]], 1)
    one, two = TwoStageFocalLoss(gamma, vocab=classes, first=first, reduction='none').stages(x, t)
    pair = torch.stack([x[:, i], others.logsumexp(1)], 1)
    torch.testing.assert_close(one, FocalLossFlat(gamma, reduction='none')(pair, (t != i).long()))
    rest = t != i
    numbers = t[rest]-(t[rest] > i).long()
    torch.testing.assert_close(two[rest], FocalLossFlat(gamma, reduction='none')(others[rest], numbers))
    assert (two[~rest] == 0).all()


@pytest.mark.parametrize('n_classes', [2, 3, 8, 11])
def test_gradients_are_finite_where_a_probability_is_zero_or_one(n_classes):
    names = [f'c{i}' for i in range(n_classes)]
    losses = [FocalLossFlat(g) for g in (0, .3, 1, 5)] + [LogitAdjustedLossFlat(range(1, n_classes+1))]
    if n_classes > 2: losses += [TwoStageFocalLoss(g, vocab=names, first='c1') for g in (0, .3, 1, 5)]
    sure = torch.eye(n_classes).repeat(n_classes, 1)
    targets = torch.arange(n_classes).repeat_interleave(n_classes)
    for logits in (sure*1e4, sure.log(), -sure*1e4):
        for loss in losses:
            x = logits.clone().requires_grad_()
            value = loss(x, targets)
            value.backward()
            assert torch.isfinite(value) and torch.isfinite(x.grad).all(), loss
