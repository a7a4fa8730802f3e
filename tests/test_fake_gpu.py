"A rehearsal on a GPU that is not there: its tensors have shape, type and device and no values; those of the CPU are real."
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import TensorImage
from fasttransform import Pipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from skin_lesions.classes import HAM10000
from skin_lesions.data import lesion_augmentation
from skin_lesions.distill import Distill, DistillationLoss
from skin_lesions.ema import EMA
from skin_lesions.gradcam import METHODS, GradCAM
from skin_lesions.inference import AnswerNet
from skin_lesions.losses import FocalLossFlat, LogitAdjustedLossFlat, TwoStageFocalLoss
from skin_lesions.masking import MaskedL1Loss, MaskedNet, MaskPatches
from skin_lesions.metrics import AverageRecall, ClassRecall, StageOneAUC, StageTwoRecall
from skin_lesions.mixup import MixUp
from skin_lesions.networks import LesionNet, TwoStageNet, create_body
from skin_lesions.ood import answer_with_score, get_features, keep_features
from skin_lesions.predict import Predictor
from skin_lesions.pretext import (CallbackValue, JointRestoration, JointRestorationNet, JointRotation, JointRotationNet, PredictRotation, RestorationNet,
                                  RestoreContext, rotate_images, swap_patches)
from skin_lesions.speed import ReuseMemory

CODES = list(HAM10000)

def timm_body(): return create_body('test_efficientnet', pretrained=False)


def _arrived(fake):
    "What the CPU gets from the fake GPU: some numbers"
    with unset_fake_temporarily():
        return torch.rand(fake.shape, dtype=fake.dtype) if fake.is_floating_point() else torch.zeros(fake.shape, dtype=fake.dtype)


class FakeGPU(TorchDispatchMode):
    "Operations on the CPU are real, those on the GPU are fake, and `copies` notes what goes from one to the other"
    def __init__(self, device):
        super().__init__()
        self.device, self.copies = device, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        asked = kwargs.get('device')
        if not any(isinstance(t, FakeTensor) for t in tensors) and (asked is None or torch.device(asked).type == 'cpu'):
            with unset_fake_temporarily(): return func(*args, **kwargs)
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        # a single number of the CPU may be used as it is
        devices = {t.device.type for t in tensors+results if t.dim() or '_to_copy' in str(func)}
        if len(devices) > 1: self.copies.append('to the CPU' if any(t.device.type == 'cpu' for t in results) else 'to the GPU')
        return tree_map_only(FakeTensor, lambda t: _arrived(t) if t.device.type == 'cpu' else t, out)

    def images(self, n=4, size=32): return torch.randn(n, 3, size, size, device=self.device)
    def labels(self, n=4): return torch.randint(len(CODES), (n,), device=self.device)

    @contextmanager
    def alone(self):
        "Nothing in the block goes between CPU and GPU"
        self.copies.clear()
        yield
        assert not self.copies


# PyTorch refuses to go backward through a GPU that is not there; the meta device stands in for it where gradients are needed
@contextmanager
def fake_gpu(device='cuda'):
    with FakeTensorMode(allow_non_fake_inputs=True), FakeGPU(device) as gpu: yield gpu


@pytest.fixture(autouse=True)
def fake_tensors_in_fastai(monkeypatch):
    "A fake tensor cannot change its type, and a module cannot change the place of its parameters: new ones are put there"
    ordinary, move = Tensor.as_subclass, nn.Module.to
    def as_subclass(self, kind):
        if not isinstance(self, FakeTensor): return self if issubclass(kind, FakeTensor) else ordinary(self, kind)
        with torch._C.DisableTorchFunctionSubclass(): out = self.view(self.shape)
        if issubclass(kind, TensorImage): out.__class__ = FakeImage
        return out
    def to(self, *args, **kwargs):
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is None or device.type == 'cpu': return move(self, *args, **kwargs)
        for module in self.modules():
            for name, p in module._parameters.items():
                if p is not None and not isinstance(p, FakeTensor): module._parameters[name] = nn.Parameter(p.detach().to(device), requires_grad=p.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None: module._buffers[name] = buffer.to(device)
        return self
    monkeypatch.setattr(Tensor, 'as_subclass', as_subclass)
    monkeypatch.setattr(nn.Module, 'to', to)


class FakeImage(TensorImage, FakeTensor):
    "An image of fastai on the fake GPU; what is made of it is one too"
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass(): out = func(*args, **(kwargs or {}))
        if type(out) is FakeTensor: out.__class__ = cls
        return out


@contextmanager
def half_precision():
    "What `torch.autocast('cuda')` does where there is a GPU"
    before = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
    torch.set_autocast_dtype('cuda', torch.bfloat16)
    torch.set_autocast_enabled('cuda', True)
    try: yield
    finally:
        torch.set_autocast_enabled('cuda', before[0])
        torch.set_autocast_dtype('cuda', before[1])
        torch.clear_autocast_cache()


class SmallBody(nn.Sequential):
    "What a body of timm has, in few layers: each fake operation takes milliseconds"
    arch, n_features = 'small', 8
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def network(device='cuda', kind=LesionNet, bodies=1, n_patient=0, body=SmallBody, **kwargs):
    with torch.device(device):
        bodies = [body() for _ in range(bodies)]
        if kind is TwoStageNet: kwargs = dict(n_out=len(CODES), first=CODES.index('nv')) | kwargs
        else: kwargs = dict(n_out=len(CODES)) | kwargs
        return kind(*bodies, n_patient=n_patient, **kwargs)


NETWORKS = {'one stage': dict(), 'two stages': dict(kind=TwoStageNet), 'two bodies': dict(kind=TwoStageNet, bodies=2),
            'hard routing': dict(kind=TwoStageNet, combine='paper')}


class LeftBehind(nn.Module):
    "A loss as it should not be: its weights stay on the CPU"
    def __init__(self):
        super().__init__()
        self.weights = torch.ones(len(CODES))
    def forward(self, pred, targ): return -(self.weights*pred.log_softmax(-1)).mean()


def test_the_rehearsal_finds_what_it_looks_for():
    with fake_gpu() as gpu:
        pred = torch.randn(4, len(CODES), device='cuda')
        with pytest.raises(RuntimeError, match='same device'): LeftBehind()(pred, gpu.labels())
        with pytest.raises(DataDependentOutputException): pred.sum().item()
        with pytest.raises(DataDependentOutputException): bool((pred > 0).all())
        with pytest.raises(AssertionError), gpu.alone(): pred.add(torch.tensor(.5).to(pred))
        with pytest.raises(AssertionError), gpu.alone(): pred.cpu()
        with pytest.raises(AssertionError), gpu.alone(): pred[torch.tensor([1, 0])]
        with gpu.alone(): pred + torch.ones(3, 1, device='cuda')[:1]
        on_cpu = torch.ones(3) + 1
        assert type(on_cpu) is Tensor and on_cpu.tolist() == [2, 2, 2] and type(pred.cpu()) is Tensor
    with fake_gpu('meta') as gpu, pytest.raises(RuntimeError, match='same device'):
        LeftBehind()(torch.randn(4, len(CODES), device='meta'), gpu.labels())


ALPHA = dict.fromkeys(CODES, 2.)
LOSSES = [FocalLossFlat(1.5, ALPHA, vocab=CODES), FocalLossFlat(0.), FocalLossFlat(2., .5, reduction='none'), TwoStageFocalLoss((1., 2.), ALPHA, vocab=CODES),
          LogitAdjustedLossFlat(ALPHA, vocab=CODES), DistillationLoss(FocalLossFlat(1., ALPHA, vocab=CODES))]


@pytest.mark.parametrize('loss', LOSSES, ids=lambda loss: type(loss).__name__)
def test_losses(loss):
    with fake_gpu() as gpu:
        loss.to('cuda')
        teacher = (torch.rand(4, len(CODES), device='cuda'),) if isinstance(loss, DistillationLoss) else ()
        for dtype in (torch.float32, torch.bfloat16):
            pred = torch.randn(4, len(CODES), device='cuda', dtype=dtype)
            with gpu.alone(): hard, soft = (loss(pred, y, *teacher) for y in (gpu.labels(), pred.float().softmax(-1)))
            assert hard.device.type == soft.device.type == 'cuda' and hard.dtype == soft.dtype == torch.float32
        with gpu.alone(): assert loss.activation(pred).shape == pred.shape and loss.decodes(pred).shape == (4,)


@pytest.mark.parametrize('kind,n_patient,body', [(kind, n, SmallBody) for kind in NETWORKS for n in (0, 5)] + [('one stage', 0, timm_body)])
def test_networks(kind, n_patient, body):
    with fake_gpu() as gpu:
        net = network(n_patient=n_patient, body=body, **NETWORKS[kind])
        assert {p.device.type for p in net.state_dict().values()} == {'cuda'}
        patient = (torch.randn(4, 5, device='cuda'),) if n_patient else ()
        for mode in (True, False):
            with gpu.alone(): out = net.train(mode)(gpu.images(), *patient)
            assert out.shape == (4, len(CODES)) and out.device.type == 'cuda'
        with half_precision(), gpu.alone(): assert net(gpu.images(), *patient).dtype == (torch.bfloat16 if kind == 'one stage' else torch.float32)


def test_batch_augmentations():
    with fake_gpu() as gpu:
        tfms = [*lesion_augmentation(max_saturation=.2, erase=1.), Normalize.from_stats(torch.zeros(3, device='cuda'), torch.ones(3, device='cuda'), cuda=False)]
        x = TensorImage(torch.rand(4, 3, 32, 32, device='cuda'))
        for split in (0, 1):
            out = Pipeline(tfms, split_idx=split)(x)
            # fastai's flips take their table of corners to the GPU, and nothing is read back
            assert set(gpu.copies) <= {'to the GPU'}
            assert isinstance(out, TensorImage) and out.device.type == 'cuda' and out.shape == x.shape


def test_pretexts():
    with fake_gpu() as gpu:
        rotation, restoration = PredictRotation(), RestoreContext()
        x = gpu.images(size=64)
        # numbers are drawn on the CPU, so that validation is the same everywhere; one copy takes them to the GPU
        rotated, k = rotation.draw(x)
        assert rotated.device.type == k.device.type == 'cuda' and gpu.copies == ['to the GPU']
        gpu.copies.clear()
        for grid in (True, False):
            restoration.grid = grid
            disordered, target = restoration.draw(x)
            assert disordered.device.type == 'cuda' and target.shape == x.shape and gpu.copies == ['to the GPU']*2
            gpu.copies.clear()
        with gpu.alone():
            assert JointRotation().losses(torch.randn(4, 6, device='cuda'), k).shape == (4,)
            assert JointRestoration().losses(x, target).shape == (4,)


def test_masks():
    "Drawn on the CPU, so that validation is the same everywhere; they go to the GPU once, as patches"
    with fake_gpu() as gpu:
        with torch.device('cuda'): net = MaskedNet(timm_body(), (64, 64))
        x = gpu.images(size=64)
        for places in (None, range(4)):
            gpu.copies.clear()
            mask = MaskPatches(16).draw(x, places)
            assert mask.device.type == 'cuda' and mask.shape == (4, 1, 64, 64) and gpu.copies == ['to the GPU']
        with gpu.alone():
            filled = net(x, mask)
            assert filled.device.type == 'cuda' and filled.shape == x.shape
            assert MaskedL1Loss()(filled, x, mask).shape == () and MaskedL1Loss('none')(filled, x, mask).shape == (4,)


@pytest.mark.parametrize('pretext,kind', [('rotation', 'one stage'), ('rotation', 'two bodies'), ('restoration', 'two stages')])
def test_joint_networks(pretext, kind):
    with fake_gpu() as gpu:
        with torch.device('cuda'):
            classifier = network(**NETWORKS[kind])
            net = JointRotationNet(classifier) if pretext == 'rotation' else JointRestorationNet(RestorationNet(timm_body(), (64, 64)), classifier)
        x = gpu.images(size=64)
        shape = (4, 6) if pretext == 'rotation' else x.shape
        with gpu.alone():
            assert net.train()(x).shape == (4, len(CODES)) and net.take().shape == shape
            assert net.eval()(x).device.type == 'cuda' and net.pretext(x).shape == shape


def test_angles_and_images_are_rotated_in_float32_under_half_precision():
    with fake_gpu() as gpu, half_precision():
        asked = []
        class Look(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                asked.extend(t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
                return func(*args, **(kwargs or {}))
        with Look(): rotate_images(gpu.images(size=64), torch.zeros(4, device='cuda'))
        assert asked and torch.bfloat16 not in asked
    # the same on a CPU with numbers
    x, degrees = torch.randn(2, 3, 64, 64), torch.tensor([0., 300.])
    with torch.autocast('cpu', dtype=torch.bfloat16): under = rotate_images(x, degrees)
    assert torch.equal(under, rotate_images(x, degrees))


@pytest.mark.parametrize('kind', NETWORKS)
def test_gradcam(kind):
    with fake_gpu('meta') as gpu:
        net, x = network('meta', **NETWORKS[kind]), gpu.images(size=64)
        stages = [('one', None), ('one', 'rest'), ('two', None), ('two', 'mel')] if kind != 'one stage' else []
        for method in METHODS[:1] if stages else METHODS:
            with GradCAM(net, method=method, classes=CODES) as cam:
                for stage, target in [(None, None), (None, ['mel', 'nv', 'bcc', 'df']), *stages]:
                    maps = cam.cam(x, target, stage=stage)
                    assert maps.shape == (4, 64, 64) and maps.device == cam.output.device == x.device
                if stages:
                    with pytest.raises(ValueError, match='stage two does not know'): cam.cam(x, 'nv', stage='two')


@pytest.mark.filterwarnings('ignore:.*(no|only) image') # the labels that arrive are all of one class
def test_metrics_count_on_the_cpu():
    with fake_gpu() as gpu:
        learn = SimpleNamespace(dls=SimpleNamespace(vocab=CODES), to_detach=Learner.to_detach.__get__(object()),
                                pred=torch.randn(64, len(CODES), device='cuda'), y=gpu.labels(64))
        for metric in (AverageRecall(), ClassRecall('akiec'), StageOneAUC('akiec'), StageTwoRecall('nv')):
            gpu.copies.clear()
            metric.accumulate(learn)
            assert isinstance(metric.value, float) and gpu.copies == ['to the CPU']*2 # predictions and labels


class Batches(list):
    "Batches that are on the GPU already, as a DataLoader of fastai"
    bs, n_inp, after_batch = 4, 1, Pipeline([])
    def __init__(self, batches, frame):
        super().__init__(batches)
        self.dataset, self._DataLoader__idxs = SimpleNamespace(items=frame, vocab=CODES), range(len(frame))
        self.vocab = CODES
    def to(self, device): return self


class WatchStep(Callback):
    "Nothing goes between CPU and GPU in forward pass, loss, backward pass and step; fastai's `Recorder` reads the loss afterwards"
    order = 100
    def __init__(self, gpu): self.gpu, self.watched = gpu, 0
    def before_batch(self): self.gpu.copies.clear()
    def after_step(self):
        assert not self.gpu.copies
        self.watched += 1


def _learner(gpu, net, loss, cbs=(), metrics=(), n=2):
    frame = pd.DataFrame({'image_id': [f'i{k}' for k in range(8)]})
    batches = Batches([(gpu.images(size=64), gpu.labels()) for _ in range(n)], frame)
    return Learner(DataLoaders(batches, batches, device=torch.device(gpu.device)), net, loss, metrics=list(metrics),
                   cbs=[ReuseMemory(), *cbs, WatchStep(gpu)])


TEACHER = pd.DataFrame({'image_id': [f'i{k}' for k in range(8)]} | dict.fromkeys(CODES, 1/7))
CBS = {'plain': [], 'drawn mixUp': [MixUp(alpha=.4)], 'mixUp and teacher': [MixUp(.7), Distill(TEACHER)]}


@pytest.mark.filterwarnings('ignore:.*no image of')
@pytest.mark.parametrize('kind,cbs', [('one stage', 'plain'), ('one stage', 'drawn mixUp'), ('two stages', 'mixUp and teacher'), ('two bodies', 'drawn mixUp')])
def test_training(kind, cbs):
    with fake_gpu('meta') as gpu:
        loss = FocalLossFlat(1., ALPHA, vocab=CODES) if kind == 'one stage' else TwoStageFocalLoss(1., ALPHA, vocab=CODES)
        learn = _learner(gpu, network('meta', **NETWORKS[kind]), loss, CBS[cbs], [accuracy, AverageRecall(), StageTwoRecall('nv')])
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        assert learn.watch_step.watched == 2 and len(learn.recorder.values[0]) == 5


@pytest.mark.filterwarnings('ignore:.*no image of')
@pytest.mark.parametrize('pretext', ['rotation', 'masking', 'joint rotation', 'joint restoration'])
def test_training_of_pretexts(pretext):
    with fake_gpu('meta') as gpu:
        with torch.device('meta'):
            if pretext == 'rotation': net, cb = nn.Sequential(SmallBody(), nn.Linear(8, 6)), PredictRotation()
            elif pretext == 'masking': net, cb = MaskedNet(timm_body(), (64, 64)), MaskPatches(16)
            elif pretext == 'joint rotation': net, cb = JointRotationNet(network('meta')), JointRotation()
            else: net, cb = JointRestorationNet(nn.Conv2d(3, 3, 1), network('meta')), JointRestoration()
        metrics = [CallbackValue(cb, 'class_loss'), CallbackValue(cb, 'pretext_loss')] if 'joint' in pretext else []
        learn = _learner(gpu, net, MaskedL1Loss() if pretext == 'masking' else FocalLossFlat(), [cb], metrics, n=1)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        assert learn.watch_step.watched == 1 and len(learn.recorder.values[0]) == 2+len(metrics)


def test_moving_average(monkeypatch):
    "The average follows the weights on the GPU, and takes their place there"
    generator = torch.Generator
    monkeypatch.setattr(torch, 'Generator', lambda device=None: generator()) # timm makes one on the device
    with fake_gpu() as gpu:
        learn = SimpleNamespace(model=network())
        cb = EMA()
        cb.learn = learn
        cb.before_fit()
        with gpu.alone():
            for _ in range(2): cb.after_step()
            cb.before_validate()
            cb.before_epoch()
            cb.after_fit()
        assert {t.device.type for t in cb.average.ema.module.state_dict().values()} == {'cuda'}


class Asked(nn.Module):
    "A network that notes in which type its body computes"
    def __init__(self, net):
        super().__init__()
        self.net, self.body, self.dtypes = net, net.body, []
        self.body.register_forward_hook(lambda body, inputs, out: self.dtypes.append(out.dtype))
    def forward(self, *inputs): return self.net(*inputs)


@pytest.mark.parametrize('views', [None, 'dihedral', 'multicrop'])
@pytest.mark.parametrize('n_patient', [0, 5])
def test_scoring_is_float32_under_half_precision(views, n_patient):
    with fake_gpu() as gpu, half_precision(), torch.no_grad():
        net, x = Asked(network(n_patient=n_patient).eval()), gpu.images(10)
        patient = (torch.randn(1 if views == 'multicrop' else 10, 5, device='cuda'),) if n_patient else ()
        assert net(x, *(p.expand(10, 5) for p in patient)).dtype == torch.bfloat16 # what it must not do
        net.dtypes.clear()
        answer = AnswerNet(net, FocalLossFlat(), len(CODES), views)(x, *patient)
        assert answer.device.type == 'cpu' and answer.dtype == torch.float64 and answer.shape == (1 if views == 'multicrop' else 10, len(CODES))
        assert set(net.dtypes) == {torch.float32}


@pytest.mark.parametrize('shared', [True, False])
def test_predictor_is_float32_under_half_precision(shared, monkeypatch):
    monkeypatch.setattr('skin_lesions.predict.usable_device', torch.device) # which would say that there is no GPU
    with fake_gpu() as gpu, half_precision():
        net = Asked(network('cpu', kind=TwoStageNet, bodies=1 if shared else 2).eval())
        record = dict(classes=HAM10000.as_dict(), crop=dict(name='resize', size=[32, 32]), side=None, normalization=dict(mean=[.5]*3, std=[.2]*3),
                      patient=None, preprocess=[], calibration=None, rule=None, referral=None, sets=None, ood=None)
        predictor = Predictor(net, record, device='cuda')
        pixels = [torch.zeros(3, 32, 32, dtype=torch.uint8)]*2
        for views in (None, 'dihedral'):
            p, scores = predictor.answer(pixels, views=views)
            assert p.shape == (2, len(CODES)) and p.dtype == np.float64 and scores is None
        assert set(net.dtypes) == {torch.float32}
        # the features that an out-of-distribution score sees
        with keep_features(net, texture=False) as features: answer_with_score(net, None, gpu.images())
        assert features[0].dtype == torch.float32 and features[0].device.type == 'cuda'


def test_features_of_the_out_of_distribution_score_are_float32_under_half_precision():
    with fake_gpu() as gpu, half_precision():
        net = Asked(network())
        with torch.no_grad(): assert net(gpu.images()).dtype == torch.bfloat16 # what it must not do
        net.dtypes.clear()
        dls = SimpleNamespace(device=torch.device('cuda'), n_inp=1, test_dl=lambda items, **kwargs: [(gpu.images(),)]*2)
        features = get_features(SimpleNamespace(model=net, dls=dls), None)
        assert features.shape == (8, 8) and features.dtype == np.float32 and set(net.dtypes) == {torch.float32}
