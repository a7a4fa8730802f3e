"Grad-CAM end to end: another implementation, learners of both kinds, nothing left behind, a folder with what folders have in them."
import copy, importlib.util, re, shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ARCHS = ('test_resnet', 'test_efficientnet', 'test_convnext')


def network(kind, arch, seed=0, **kw):
    from skin_lesions.networks import LesionNet, TwoStageNet, create_body
    torch.manual_seed(seed)
    body = create_body(arch, pretrained=False)
    net = LesionNet(body, 7, hidden=(16,)) if kind == 'one' else TwoStageNet(body, n_out=7, first=5, hidden=(16,), **kw)
    for p in net.parameters():
        if p.ndim == 1: p.data += .2*torch.randn_like(p)
    return net.eval()


@pytest.fixture
def x(): return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope='module')
def package():
    # a development environment must have it, elsewhere the comparison is skipped
    if importlib.util.find_spec('nbdev') is None: pytest.importorskip('pytorch_grad_cam', reason='the package grad-cam is a development requirement')
    import pytorch_grad_cam
    return pytorch_grad_cam


class Stage(nn.Module):
    "One stage's scores alone, for the other implementation"
    def __init__(self, net, stage): super().__init__(); self.net, self.stage = net, stage
    def forward(self, x):
        s, z = self.net.stages(x)
        return torch.stack([-s, s], 1) if self.stage == 'one' else z


def theirs(package, net, layer, x, numbers, name='GradCAM'):
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    net = copy.deepcopy(net)
    with getattr(package, name)(model=net, target_layers=[net.get_submodule(layer)]) as cam: return cam(input_tensor=x, targets=[ClassifierOutputTarget(int(c)) for c in numbers])


def check_same(ours, other):
    "Correlation of each map; where ours is all zero theirs is too. Returns how many were compared"
    r = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(ours.numpy(), other) if a.std() > 0]
    assert min(r, default=1) >= .999, r
    for a, b in zip(ours.numpy(), other): assert a.std() > 0 or np.abs(b).max() == 0
    return len(r)


@pytest.mark.parametrize('method, name', [('gradcam', 'GradCAM'), ('hirescam', 'HiResCAM')])
@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('kind', ['one', 'two'])
def test_agrees_with_the_other_implementation(package, kind, arch, method, name, x):
    from skin_lesions.gradcam import GradCAM
    net, compared = network(kind, arch), 0
    explain = GradCAM(net, method=method)
    for first in range(7):
        numbers = [(first+i) % 7 for i in range(len(x))]
        ours = explain.cam(x, numbers)
        compared += check_same(ours, theirs(package, net, next(iter(explain.layers.values())), x, numbers, name))
    assert compared >= 5, compared


@pytest.mark.parametrize('stage, target, column', [('one', 'nv', 1), ('one', 'rest', 0), ('two', 'mel', 4), ('two', 'vasc', 5)])
def test_stages_agree_with_the_other_implementation(package, stage, target, column, x):
    from skin_lesions.gradcam import GradCAM
    net = network('two', 'test_resnet', seed=5)
    x = torch.cat([x, x.flip(3)*2])
    ours = GradCAM(net, 'body.layer3', classes='HAM10000').cam(x, target, stage=stage)
    assert check_same(ours, theirs(package, Stage(net, stage), 'net.body.layer3', x, [column]*len(x)))


@pytest.mark.parametrize('arch', ARCHS)
def test_a_training_step_before_and_after_is_the_same(arch, x):
    "The gradients of a step that is under way survive, and the next step is the one that would have come"
    from skin_lesions.gradcam import GradCAM
    net = network('two', arch).train()
    net(x).sum().backward()
    before = {n: (p.grad.clone() if p.grad is not None else None) for n, p in net.named_parameters()}
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    with GradCAM(net) as explain:
        for stage in (None, 'one', 'two'): explain.cam(x, stage=stage)
    assert all(m.training for m in net.modules())
    for n, p in net.named_parameters(): assert (p.grad is None) if before[n] is None else torch.equal(p.grad, before[n]), n
    for n, b in net.named_buffers(): assert torch.equal(b, buffers[n]), n
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())


def test_an_exception_leaves_nothing_behind(x):
    from skin_lesions.gradcam import GradCAM
    net = network('two', 'test_resnet').train()
    with pytest.raises(KeyError):
        with GradCAM(net) as explain:
            explain.cam(x)
            raise KeyError('in the block')
    with pytest.raises(RuntimeError): GradCAM(net).cam(torch.randn(2, 5, 64, 64)) # five channels
    assert net.training and torch.is_grad_enabled() and not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize('seed', range(4))
def test_product_is_the_sum_of_both_stages_maps(seed, x):
    "Before ReLU, the gradient of log P(mel) is -sigmoid(s) times stage one's plus stage two's: checked on the weights"
    from skin_lesions.gradcam import GradCAM
    net = network('two', 'test_resnet', seed=seed).double()
    x = x.double()
    feature = net.body.forward_features(x).detach().requires_grad_()
    pooled = net.body.forward_head(feature)
    s, z = net.head1(pooled).squeeze(1), net.head2(pooled)
    g = lambda y: torch.autograd.grad(y.sum(), feature, retain_graph=True)[0].mean((2, 3))
    weight = -s.sigmoid()[:, None]*g(s) + g(z[:, 4]) - sum(z.softmax(1)[:, i:i+1].detach()*g(z[:, i]) for i in range(6))
    expected = (weight[:, :, None, None]*feature).sum(1).relu()
    torch.testing.assert_close(GradCAM(net).cam(x, 4, raw=True, resize=False), expected.detach(), rtol=1e-6, atol=1e-12)


def test_an_activation_that_works_in_place_changes_nothing(x):
    from skin_lesions.gradcam import GradCAM
    net = network('one', 'test_resnet', seed=2)
    layer = 'body.layer3.0.bn1'
    assert any(getattr(m, 'inplace', False) for m in net.body.layer3.modules()), 'the network has no in-place activation'
    ours = [GradCAM(net, layer).cam(x, c) for c in range(7)]
    for m in net.modules():
        if hasattr(m, 'inplace'): m.inplace = False
    other = [GradCAM(net, layer).cam(x, c) for c in range(7)]
    torch.testing.assert_close(ours, other)
    out = []
    handle = net.get_submodule(layer).register_forward_hook(lambda m, i, o: out.append(o))
    score = net(x)[:, 4].sum()
    handle.remove()
    g, = torch.autograd.grad(score, out[0])
    slow = (g.mean((2, 3), keepdim=True)*out[0]).sum(1).relu().detach()
    torch.testing.assert_close(GradCAM(net, layer).cam(x, 4, raw=True, resize=False), slow)


def test_very_sure_networks_still_have_a_map(x):
    from skin_lesions.gradcam import GradCAM
    net = network('two', 'test_resnet')
    plain = GradCAM(net).cam(x, 5)
    net.head1[-1].bias.data += 60 # log P(nv) = -1e-26: float32 probabilities are exactly 1
    torch.testing.assert_close(GradCAM(net).cam(x, 5), plain, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope='module')
def learn(sample):
    from fastai.torch_core import set_seed
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import two_stage_learner
    set_seed(42)
    return two_stage_learner(ham10000_dataloaders(sample, 64, bs=16, arch='test_resnet', num_workers=0), 'test_resnet', pretrained=False)


def test_folder_and_gallery(learn, sample, tmp_path):
    from skin_lesions.gradcam import gradcam_folder
    images = sorted(sample.rglob('*.jpg'))[:20]
    (tmp_path/'in'/'sub').mkdir(parents=True)
    for p in images: shutil.copy(p, tmp_path/'in')
    shutil.copy(images[0], tmp_path/'in'/'sub'/images[0].name)
    shutil.copy(images[1], tmp_path/'in'/'<script>alert(1)&.jpg')
    (tmp_path/'in'/'empty.jpg').write_bytes(b'')
    (tmp_path/'in'/'half.jpg').write_bytes(images[2].read_bytes()[:2000])
    learn.model.train()
    n, unreadable = gradcam_folder(learn, tmp_path/'in', tmp_path/'out', bs=7, limit=10, show=False)
    assert learn.model.training
    assert n == 22 and sorted(Path(p).name for p in unreadable) == ['empty.jpg', 'half.jpg']
    assert len(list((tmp_path/'out').glob('*.png'))) == 22
    page = (tmp_path/'out'/'gallery.html').read_text()
    assert 'The first 10 of 22 images' in page and page.count('<img ') == 10 and '<script' not in page and '&lt;script&gt;' in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_larger_folder_needs_no_more_memory(learn, sample, tmp_path):
    "Only a batch is held: maps and images of earlier batches are gone"
    import gc, weakref
    from skin_lesions.gradcam import stream_cams
    files, seen = sorted(sample.rglob('*.jpg'))[:40], []
    for batch in stream_cams(learn, files, bs=8):
        seen.append(weakref.ref(batch.cams))
        del batch
        gc.collect()
        assert sum(r() is not None for r in seen) <= 1
    assert len(seen) == 5


def test_a_predictor_is_explained_as_its_learner_is(learn, sample, tmp_path):
    from skin_lesions.bundle import save_bundle
    from skin_lesions.gradcam import stream_cams
    from skin_lesions.predict import load_predictor
    save_bundle(learn, tmp_path/'bundle')
    predictor = load_predictor(tmp_path/'bundle', device='cpu')
    files = sorted(sample.rglob('*.jpg'))[:3]
    ours, = stream_cams(predictor, files, target='mel')
    expected, = stream_cams(learn, files, target='mel')
    np.testing.assert_allclose(ours.images, expected.images, atol=.02)
    np.testing.assert_allclose(ours.probabilities, expected.probabilities, atol=1e-4)
    np.testing.assert_allclose(ours.cams, expected.cams, atol=1e-3)


# ---- transformers

TINY = dict(depth=2, embed_dim=32, num_heads=2, img_size=64)
SWIN = dict(img_size=64, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2))
TRANSFORMERS = dict(vit=('vit_tiny_patch16_224', TINY, 'blocks.1.norm1', 1), registers=('vit_tiny_patch16_224', TINY | dict(reg_tokens=3), 'blocks.1.norm1', 4),
                    average=('vit_tiny_patch16_224', TINY | dict(class_token=False, global_pool='avg'), 'blocks.1.norm1', 0),
                    distilled=('deit_tiny_distilled_patch16_224', TINY, 'blocks.1.norm1', 2),
                    swin=('swin_tiny_patch4_window7_224', SWIN, 'norm', None))


def transformer(kind, name, seed=0):
    from skin_lesions.networks import LesionNet, TwoStageNet, create_body
    arch, kwargs, layer, prefix = TRANSFORMERS[name]
    torch.manual_seed(seed)
    bodies = [create_body(arch, pretrained=False, **kwargs) for _ in range(2 if kind == 'two_bodies' else 1)]
    net = LesionNet(*bodies, 7, hidden=(16,)) if kind == 'one' else TwoStageNet(*bodies, n_out=7, first=5, hidden=(16,))
    for p in net.parameters(): p.data += .1*torch.randn_like(p)
    return net.eval(), f'body.{layer}', prefix


def on_grid(prefix):
    "The other implementation's own way to say how tokens lie in the image: four rows of four patches, or channels last"
    def swin(t): return t.permute(0, 3, 1, 2)
    def tokens(t): return t[:, prefix:].reshape(len(t), 4, 4, -1).transpose(2, 3).transpose(1, 2)
    return swin if prefix is None else tokens


@pytest.mark.parametrize('method, theirs_name', [('gradcam', 'GradCAM'), ('hirescam', 'HiResCAM')])
@pytest.mark.parametrize('name', TRANSFORMERS)
@pytest.mark.parametrize('kind', ['one', 'two'])
def test_transformers_agree_with_the_other_implementation(package, kind, name, method, theirs_name, x):
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from skin_lesions.gradcam import GradCAM
    (net, layer, prefix), compared = transformer(kind, name), 0
    explain = GradCAM(net, method=method)
    for first in range(7):
        numbers = [(first+i) % 7 for i in range(len(x))]
        ours = explain.cam(x, numbers)
        assert list(explain.layers.values()) == [layer]
        other = copy.deepcopy(net)
        with getattr(package, theirs_name)(model=other, target_layers=[other.get_submodule(layer)], reshape_transform=on_grid(prefix)) as cam:
            compared += check_same(ours, cam(input_tensor=x, targets=[ClassifierOutputTarget(n) for n in numbers]))
    assert compared >= 5 and ours.shape == (6, 64, 64)


@pytest.mark.parametrize('name', TRANSFORMERS)
def test_stages_of_transformers(package, name, x):
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from skin_lesions.gradcam import GradCAM
    net, layer, prefix = transformer('two_bodies', name)
    for stage, target, number, body in (('one', 5, 1, 'body'), ('two', 2, 2, 'body2')):
        ours = GradCAM(net).cam(x, target, stage=stage)
        alone = Stage(copy.deepcopy(net), stage)
        with package.GradCAM(model=alone, target_layers=[alone.net.get_submodule(layer.replace('body', body))], reshape_transform=on_grid(prefix)) as cam:
            check_same(ours, cam(input_tensor=x, targets=[ClassifierOutputTarget(number)]*len(x)))


def test_a_layer_of_a_transformer_by_name(x):
    from skin_lesions.gradcam import GradCAM
    net, *_ = transformer('one', 'registers')
    assert GradCAM(net, 'body.patch_embed').cam(x, 1, resize=False).shape == (6, 4, 4) # patches alone, before the class token
    assert GradCAM(net, 'body.blocks.0').cam(x, 1, resize=False).shape == (6, 4, 4)
    swin, *_ = transformer('one', 'swin')
    assert GradCAM(swin, 'body.layers.0').cam(x, 1, resize=False).shape == (6, 16, 16)
    with pytest.raises(ValueError, match='is no map|within windows'): GradCAM(swin, 'body.layers.0.blocks.0.attn').cam(x, 1)


def test_behind_the_last_attention_patches_do_not_count(x):
    "Why the default layer is in front of it"
    from skin_lesions.gradcam import GradCAM
    net, *_ = transformer('one', 'vit')
    assert (GradCAM(net, 'body.norm').cam(x, 1) == 0).all() and (GradCAM(net).cam(x, 1) > 0).any()


def test_other_shapes_of_images(x):
    from skin_lesions.gradcam import GradCAM
    from skin_lesions.networks import LesionNet, create_body
    net = LesionNet(create_body('vit_tiny_patch16_224', pretrained=False, **TINY | dict(img_size=(32, 96))), 7, hidden=(16,)).eval()
    assert GradCAM(net).cam(torch.randn(2, 3, 32, 96), 1, resize=False).shape == (2, 2, 6)
    net = LesionNet(create_body('vit_tiny_patch16_224', pretrained=False, **TINY, dynamic_img_size=True), 7, hidden=(16,)).eval()
    assert GradCAM(net).cam(torch.randn(2, 3, 80, 48), 1, resize=False).shape == (2, 5, 3)


@pytest.mark.parametrize('kind', ['one-stage', 'two-stage', 'ensemble'])
def test_many_images_are_explained_by_a_folded_copy(kind):
    "The maps, classes and answers are those of the network, and follow it when its weights change"
    from skin_lesions.gradcam import GradCAM
    from skin_lesions.networks import EnsembleNet
    nets = [network('two' if kind != 'one-stage' else 'one', 'test_efficientnet', seed) for seed in range(2)]
    for net in nets:
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, .1)
                m.running_var.uniform_(.5, 2)
    net = EnsembleNet(nets).eval() if kind == 'ensemble' else nets[0].eval()
    x = torch.randn(20, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with GradCAM(net) as many, GradCAM(net) as few:
        for target in (None, 3, 'contrast'):
            cams = many.cam(x, target)
            for i in range(0, 20, 5):
                few.seen = 0
                torch.testing.assert_close(cams[i:i+5], few.cam(x[i:i+5], target), rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(many.output[i:i+5], few.output, rtol=1e-3, atol=1e-3)
        assert few.copies == {} and len(many.copies) == len(many.members)
        assert not [m for _, copy in many.copies.values() for m in copy.modules() if isinstance(m, nn.BatchNorm2d)]
        with torch.no_grad():
            for p in many.members[0].body.parameters(): p.mul_(-1)
        few.seen = 0
        changed = many.cam(x, 3)[:5]
        torch.testing.assert_close(changed, few.cam(x[:5], 3), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(changed, cams[:5], atol=1e-2)


def test_hooks_and_layers_before_a_folded_norm_see_the_network_itself():
    "A convolution whose BatchNorm would be folded into it returns something else in the copy; hooks would not be called"
    from skin_lesions.gradcam import GradCAM
    net = network('one', 'test_efficientnet').eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_var.uniform_(.2, .5)
    x = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    convolution = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)][-1]
    with GradCAM(net, convolution) as many, GradCAM(net, convolution) as few:
        torch.testing.assert_close(many.cam(x, 1)[:4], few.cam(x[:4], 1), rtol=1e-3, atol=1e-3)
        assert many.copies[0, convolution][1] is net
    calls = []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    with GradCAM(net) as explain: explain.cam(x, 1)
    handle.remove()
    assert calls and explain.copies == {}
