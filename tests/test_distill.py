"Distillation: a student on any class set gets nearer to its teacher, and the learner is as it was afterwards."
import numpy as np
import pandas as pd
import pytest
import torch

from skin_lesions.classes import HAM10000, MELANOMA
from skin_lesions.distill import Distill


@pytest.mark.parametrize('classes', [HAM10000, MELANOMA], ids=lambda s: s.name)
def test_a_student_learns_what_no_label_says(classes, tmp_path):
    from fastai.torch_core import set_seed
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner
    from skin_lesions.readers import read_csv_dataset
    from skin_lesions.split import split_by_lesion
    from skin_lesions.synthetic import synthetic_dataset
    folder = synthetic_dataset(tmp_path/'data', 64, classes=classes, size=(80, 64))
    meta = split_by_lesion(read_csv_dataset(folder/'HAM10000_metadata.csv', classes=classes))
    dls = ham10000_dataloaders(meta, 32, bs=16, arch='test_efficientnet', num_workers=0, device='cpu')
    teaching = np.linspace(1, 3, len(classes))/np.linspace(1, 3, len(classes)).sum()
    teacher = pd.DataFrame(np.tile(teaching, (len(meta), 1)), columns=list(classes)).assign(image_id=meta.image_id.to_numpy())
    set_seed(1)
    learn = lesion_learner(dls, 'test_efficientnet', pretrained=False)
    loss = learn.loss_func
    with learn.no_bar(), learn.no_logging():
        before = learn.get_preds()[0].mean(0)
        learn.fit_one_cycle(8, 5e-3, cbs=Distill(teacher, weight=1.))
        after = learn.get_preds()[0].mean(0)
    teaching = torch.tensor(teaching).float()
    assert (after-teaching).abs().sum() < .6*(before-teaching).abs().sum() + .05
    assert learn.loss_func is loss
