"What a Learner says: views of real learners and of networks with a second input, against one view at a time."
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from skin_lesions.classes import HAM10000
from skin_lesions.predictions import get_predictions
from skin_lesions.views import VIEWS

CODES = list(HAM10000.codes)


def numbers(t): return t[CODES].to_numpy()


def mean_in_log_space(model, views, *rest):
    logs = [model(v, *rest).double().log_softmax(1) for v in views]
    return torch.stack(logs).mean(0).softmax(1).numpy()


@pytest.mark.parametrize('make', ['lesion_learner', 'two_stage_learner'])
def test_views_of_real_learners(make, sample):
    "One- and two-stage networks, dihedral and crops, against one view at a time"
    import skin_lesions.learner as L
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    meta = split_by_lesion(read_metadata(sample), k=2)
    arch = 'test_efficientnet'
    dls = ham10000_dataloaders(meta, 64, crop='window', bs=8, arch=arch, num_workers=0, device='cpu')
    torch.manual_seed(42)
    learn = getattr(L, make)(dls, arch, pretrained=False, alpha=None)
    rows = meta[meta.is_valid].head(3)
    learn.model.eval()
    mean, std = [torch.tensor(v).view(3, 1, 1) for v in ([t for t in dls.after_batch.fs if type(t).__name__ == 'Normalize'][0].mean.flatten().tolist(),
                                                         [t for t in dls.after_batch.fs if type(t).__name__ == 'Normalize'][0].std.flatten().tolist())]
    tensor = lambda im: ((torch.tensor(np.array(im)).permute(2, 0, 1)/255-mean)/std)[None]
    with torch.no_grad():
        for views in ('dihedral', 'crops9'):
            got, want = numbers(get_predictions(learn, rows, views=views)), []
            for path in rows.path:
                im = Image.open(path)
                (w, h), s = im.size, 64
                if views == 'dihedral':
                    x = tensor(im.crop(((w-s)//2, (h-s)//2, (w-s)//2+s, (h-s)//2+s)))
                    seen = [torch.tensor(np.rot90(v, k, (2, 3)).copy()) for v in (x.numpy(), x.numpy()[..., ::-1]) for k in range(4)]
                else: seen = [tensor(im.crop((x, y, x+s, y+s))) for y in np.linspace(0, h-s, 3).round().astype(int) for x in np.linspace(0, w-s, 3).round().astype(int)]
                want.append(mean_in_log_space(learn.model, seen)[0])
            np.testing.assert_allclose(got, np.array(want), atol=1e-5)
    assert not isinstance(getattr(learn.model, 'model', None), nn.Module), 'the network is the own one again'


class TwoInputs(nn.Module):
    "Looks at the image's corner and at two numbers of the patient"
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3*8*8+2, 7)
    def forward(self, x, patient=None): return self.linear(torch.cat([x.flatten(1), patient], 1))


def patient_of(row): return torch.tensor([row.a, row.b], dtype=torch.float32)


@pytest.mark.parametrize('views', VIEWS)
def test_views_with_a_second_input(views, tmp_path):
    from fastai.vision.all import CategoryBlock, ColReader, ColSplitter, CrossEntropyLossFlat, DataBlock, ImageBlock, Learner, RandomCrop, TransformBlock
    rng = np.random.default_rng(42)
    rows = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path/f'{i}.png')
        rows.append(dict(image_id=str(i), path=str(tmp_path/f'{i}.png'), dx=CODES[i], a=float(i), b=-i/2, is_valid=i > 2))
    frame = pd.DataFrame(rows)
    block = DataBlock((ImageBlock, TransformBlock, CategoryBlock(vocab=list(CODES))), n_inp=2, get_x=[ColReader('path'), patient_of], get_y=ColReader('dx'),
                      splitter=ColSplitter(), item_tfms=RandomCrop(8))
    torch.manual_seed(42)
    learn = Learner(block.dataloaders(frame, bs=3, num_workers=0, device='cpu'), TwoInputs(), loss_func=CrossEntropyLossFlat())
    together = numbers(get_predictions(learn, frame, bs=150, views=views)) # all six images in one batch of views
    alone = np.concatenate([numbers(get_predictions(learn, frame[i:i+1], views=views)) for i in range(6)])
    np.testing.assert_allclose(together, alone, atol=1e-6) # each image met its own patient
    other = numbers(get_predictions(learn, frame.assign(a=frame.a+1), views=views))
    assert np.abs(other-together).max() > 1e-3
