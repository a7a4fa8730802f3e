"Views, ensembles, folds and the challenge's file: the promises of `predictions` over seeds and on real learners."
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from skin_lesions.core import CODES, ISIC_COLUMNS
from skin_lesions.predictions import (ENSEMBLES, TTA, ensemble, get_predictions, greedy_selection, isic_submission, out_of_fold, read_isic_submission)


def draw(seed, n=60, noise=1.):
    rng = np.random.default_rng(seed)
    y = np.random.default_rng(1).integers(7, size=n)
    z = 1.5*np.eye(7)[y] + noise*rng.normal(size=(n, 7))
    p = np.exp(z)/np.exp(z).sum(1, keepdims=True)
    t = pd.DataFrame(p, columns=CODES).assign(image_id=[f'I{i:03}' for i in range(n)], dx=np.array(CODES)[y], group=[f'G{i//2}' for i in range(n)])
    return t[['image_id', *CODES, 'dx', 'group']]


def numbers(t): return t[list(CODES)].to_numpy()


@pytest.mark.parametrize('seed', range(3))
def test_submission_reads_back_to_the_last_digit(seed, tmp_path):
    t = draw(seed, noise=20.)
    path = isic_submission(t, tmp_path/'new'/'s.csv')
    assert path.read_text().splitlines()[0].split(',') == ['image', *ISIC_COLUMNS]
    back = read_isic_submission(path)
    assert (numbers(back) == numbers(t)).all() and list(back.image_id) == list(t.image_id) and list(back.columns) == ['image_id', *CODES]
    raw = pd.read_csv(path)
    assert (raw.MEL == t.mel).mean() > .9 and list(raw.columns) == ['image', *ISIC_COLUMNS] # each column under its own name


def test_submission_is_atomic(tmp_path, monkeypatch):
    path = isic_submission(draw(0), tmp_path/'s.csv')
    before = path.read_bytes()
    monkeypatch.setattr(pd.DataFrame, 'to_csv', lambda self, tmp, **kw: (open(tmp, 'w').write('half'), 1/0))
    with pytest.raises(ZeroDivisionError): isic_submission(draw(1), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['s.csv']


@pytest.mark.parametrize('how', ENSEMBLES)
def test_ensembles_do_not_depend_on_the_order_of_tables_or_rows(how):
    tables = [draw(s) for s in range(4)]
    a = ensemble(tables, how)
    b = ensemble([t.sample(frac=1, random_state=i) for i, t in enumerate(tables[::-1])], how).sort_values('image_id')
    np.testing.assert_allclose(numbers(a), numbers(b), atol=1e-14)
    np.testing.assert_allclose(numbers(a).sum(1), 1, atol=1e-12)
    if how != 'rank': np.testing.assert_allclose(numbers(ensemble(tables[:1]*3, how)), numbers(tables[0]), atol=1e-14)
    np.testing.assert_allclose(numbers(ensemble(tables, how, weights=[2, 1, 0, 0])), numbers(ensemble([tables[0]]*2+[tables[1]], how)), atol=1e-14)


@pytest.mark.parametrize('seed', range(3))
def test_greedy_is_no_worse_than_the_best_table_where_it_chose(seed):
    tables = {i: draw(10*seed+i, 200, 1+i/3) for i in range(4)}
    recall = lambda t: balanced_accuracy_score(t.dx, t[list(CODES)].idxmax(axis=1))
    w = greedy_selection(tables, n=6)
    assert abs(w.sum()-1) < 1e-12 and (w >= 0).all()
    assert recall(ensemble(tables, weights=w)) >= max(map(recall, tables.values()))-1e-12
    assert greedy_selection(tables, recall, n=6).equals(w)


def test_folds_make_the_whole():
    from skin_lesions.split import lesion_folds
    whole = draw(0, 300)
    folds = lesion_folds(whole, 4).fold
    oof = out_of_fold({i: whole[folds == i] for i in range(4)}, whole)
    pd.testing.assert_frame_equal(oof.drop(columns='fold'), whole)
    assert (oof.fold == folds).all()
    with pytest.raises(ValueError, match='are in no table'): out_of_fold([whole[folds != 3]], whole)
    with pytest.raises(ValueError, match='more than one table'): out_of_fold([whole[folds == 0]]*2)
    with pytest.raises(ValueError, match='different dx'): out_of_fold([whole], whole.assign(dx=whole.dx.iloc[::-1].to_numpy()))


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
        for tta in ('dihedral', 'crops9'):
            got, want = numbers(get_predictions(learn, rows, tta=tta)), []
            for path in rows.path:
                im = Image.open(path)
                (w, h), s = im.size, 64
                if tta == 'dihedral':
                    x = tensor(im.crop(((w-s)//2, (h-s)//2, (w-s)//2+s, (h-s)//2+s)))
                    views = [torch.tensor(np.rot90(v, k, (2, 3)).copy()) for v in (x.numpy(), x.numpy()[..., ::-1]) for k in range(4)]
                else: views = [tensor(im.crop((x, y, x+s, y+s))) for y in np.linspace(0, h-s, 3).round().astype(int) for x in np.linspace(0, w-s, 3).round().astype(int)]
                want.append(mean_in_log_space(learn.model, views)[0])
            np.testing.assert_allclose(got, np.array(want), atol=1e-5)
    assert not isinstance(getattr(learn.model, 'model', None), nn.Module), 'the network is the own one again'


class TwoInputs(nn.Module):
    "Looks at the picture's corner and at two numbers of the patient"
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3*8*8+2, 7)
    def forward(self, x, patient=None): return self.linear(torch.cat([x.flatten(1), patient], 1))


def patient_of(row): return torch.tensor([row.a, row.b], dtype=torch.float32)


@pytest.mark.parametrize('tta', TTA)
def test_views_with_a_second_input(tta, tmp_path):
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
    together = numbers(get_predictions(learn, frame, bs=150, tta=tta)) # all six pictures in one batch of views
    alone = np.concatenate([numbers(get_predictions(learn, frame[i:i+1], tta=tta)) for i in range(6)])
    np.testing.assert_allclose(together, alone, atol=1e-6) # each picture met its own patient
    other = numbers(get_predictions(learn, frame.assign(a=frame.a+1), tta=tta))
    assert np.abs(other-together).max() > 1e-3
