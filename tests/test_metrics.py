"Metrics of a learner are those of scikit-learn on all its predictions, for every class set and first class."
import warnings

import numpy as np
import pytest
import torch
import fastai.callback.progress # Learner.no_bar
from fastai.basics import DataLoader, DataLoaders, Learner
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from skin_lesions.classes import CLASS_SETS, ISIC2019, MELANOMA
from skin_lesions.losses import FocalLossFlat
from skin_lesions.metrics import AverageRecall, ClassRecall, StageOneAUC, StageTwoRecall, recall_per_class


def learner(classes, metrics, seed=0, n=120, bs=9, absent=()):
    gen = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(len(classes)), torch.randint(len(classes), (n-len(classes),), generator=gen)])
    x = torch.randn(n, len(classes), generator=gen)+2*torch.eye(len(classes))[y]
    items = [(a, b) for a, b in zip(x, y) if b not in absent]
    dls = DataLoaders(*(DataLoader(items, bs=bs, num_workers=0) for _ in range(2)))
    dls.vocab = list(classes)
    net = torch.nn.Linear(len(classes), len(classes), bias=False)
    torch.nn.init.eye_(net.weight)
    return Learner(dls, net, loss_func=FocalLossFlat(), metrics=metrics), x, y


@pytest.mark.parametrize('name', CLASS_SETS)
def test_values_are_those_of_scikit_learn(name):
    classes = CLASS_SETS[name]
    for seed, code in enumerate(dict.fromkeys((classes.codes[0], classes.first or classes.codes[1], classes.codes[-1]))):
        i = classes.index(code)
        metrics = [AverageRecall(), ClassRecall(code), StageOneAUC(code)]
        if len(classes) > 2: metrics.append(StageTwoRecall(code))
        learn, x, y = learner(classes, metrics, seed)
        with learn.no_bar(): values = learn.validate()[1:]
        rest = y != i
        others = np.delete(np.arange(len(classes)), i)
        expected = [balanced_accuracy_score(y, x.argmax(1)), (x.argmax(1) == y)[~rest].float().mean(), roc_auc_score(~rest, x.softmax(1)[:, i]),
                    balanced_accuracy_score(y[rest], others[x[rest][:, others].argmax(1)])]
        np.testing.assert_allclose(values, expected[:len(metrics)], atol=1e-3 if len(classes) > 2 else 1e-6)
        assert recall_per_class(x, y, classes)[code] == pytest.approx(values[1])


def test_the_first_class_is_that_of_the_class_set():
    for classes in (ISIC2019, MELANOMA):
        learn, *_ = learner(classes, [StageOneAUC(), StageOneAUC(classes.first)])
        with learn.no_bar(): values = learn.validate()[1:]
        assert values[0] == values[1]
    learn, *_ = learner(ISIC2019, [StageOneAUC(), StageOneAUC('mel')])
    learn.dls.vocab = [c+'_' for c in ISIC2019]
    with learn.no_bar(), pytest.raises(ValueError, match='Give first, one of ak_, bcc_'): learn.validate()
    learn.dls.class_set = ISIC2019
    learn.dls.vocab = list(ISIC2019)
    with learn.no_bar(): learn.validate()


def test_absent_classes_are_named_once_a_validation():
    learn, *_ = learner(ISIC2019, AverageRecall(), absent=[3])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        with learn.no_bar():
            for _ in range(2): learn.validate()
    assert [str(w.message) for w in caught if 'average_recall' in str(w.message)] == ['average_recall: no image of df in this set; the mean is over the other 7 classes']*2
