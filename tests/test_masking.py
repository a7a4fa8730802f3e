"""Masked image modelling end to end: what is masked, what the loss counts, the same masks in every validation, a training that was cut."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback

TINY = 'test_efficientnet'
CPU = dict(num_workers=0, device='cpu')


@pytest.fixture(scope='module')
def lesions(tmp_path_factory):
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    from skin_lesions.synthetic import synthetic_ham10000
    root = synthetic_ham10000(tmp_path_factory.mktemp('masking')/'sample', 60, size=(96, 72), show=False)
    return root, split_by_lesion(read_metadata(root))


def quietly(learn, epochs=1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-3, **kwargs)


def learner(dls, seed=1, **kwargs):
    "`dls` may be a function, whose loaders are seeded too"
    from fastai.torch_core import set_seed
    from skin_lesions.masking import masked_learner
    set_seed(seed, reproducible=True)
    return masked_learner(dls() if callable(dls) else dls, TINY, **kwargs)


@pytest.mark.parametrize('seed', range(6))
def test_the_ratio_is_exact_and_patches_are_whole(seed):
    from skin_lesions.masking import draw_masks, pixel_masks
    rng = np.random.default_rng(seed)
    patch, rows, cols = map(int, rng.integers((1, 1, 1), (40, 9, 9)))
    n = int(rng.integers(rows*cols+1))
    masks = draw_masks(7, (rows*patch, cols*patch), patch, n/(rows*cols), generator=torch.Generator().manual_seed(seed))
    pixels = pixel_masks(masks, patch)
    assert masks.shape == (7, rows, cols) and (masks.flatten(1).sum(1) == n).all()
    assert pixels.shape == (7, 1, rows*patch, cols*patch)
    np.testing.assert_array_equal(pixels[:, 0], np.kron(masks.numpy(), np.ones((patch, patch), bool)))


def test_a_ratio_between_patches_is_rounded_up():
    from skin_lesions.masking import draw_masks
    assert [int(draw_masks(1, (128, 128), 32, r).sum()) for r in (0, .01, .0625, .07, .6, .999, 1)] == [0, 1, 1, 2, 10, 16, 16]


@pytest.mark.parametrize('fraction', [0., .3, 1.])
def test_the_loss_is_that_of_masked_pixels(fraction):
    "Against NumPy, with nonsense outside the masks; none and all masked too"
    from skin_lesions.masking import MaskedL1Loss
    rng = np.random.default_rng(1)
    pred, target = rng.normal(size=(2, 5, 3, 12, 12)).astype(np.float32)
    mask = rng.random((5, 1, 12, 12)) < fraction
    where = np.broadcast_to(mask, pred.shape)
    expected = np.abs(pred-target)[where].mean() if mask.any() else 0
    garbage = np.where(where, pred, np.nan)
    tensors = [torch.from_numpy(v) for v in (garbage, target, mask)]
    assert MaskedL1Loss()(*tensors).item() == pytest.approx(expected, rel=1e-5)
    of_images = MaskedL1Loss('none')(*tensors).numpy()
    np.testing.assert_allclose(of_images, [np.abs(p-t)[w].mean() if w.any() else 0 for p, t, w in zip(pred, target, where)], rtol=1e-5)
    x = torch.from_numpy(pred).requires_grad_()
    MaskedL1Loss()(x, *tensors[1:]).backward()
    sign = np.sign(pred-target)*where/max(1, where.sum())
    np.testing.assert_allclose(x.grad, sign, atol=1e-7)


SMALL_SWIN = dict(img_size=64, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=2)


@pytest.mark.parametrize('arch,kwargs,unused', [
    (TINY, {}, ''), ('mobilenetv3_small_050', {}, 'conv_head'), ('regnetx_002', {}, ''), ('test_convnext', {}, 'head'),
    ('test_vit', {}, ''), ('swin_tiny_patch4_window7_224', SMALL_SWIN, '')])
def test_the_gradient_reaches_what_moves(arch, kwargs, unused):
    "Two sides of different length where the network takes them: rows and columns are not exchanged"
    from skin_lesions.masking import MaskedL1Loss, MaskedNet, draw_masks, masked_splitter, pixel_masks
    from skin_lesions.networks import create_body
    size = (64, 64) if kwargs else (64, 96)
    body = create_body(arch, pretrained=False, **kwargs).train()
    net = MaskedNet(body, size)
    assert body.training and not any(m._forward_pre_hooks for m in body.modules())
    x, mask = torch.randn(2, 3, *size), pixel_masks(draw_masks(2, size, 16), 16)
    MaskedL1Loss()(net(x, mask), x, mask).backward()
    with_gradient = {name for name, p in net.named_parameters() if p.grad is not None}
    learns = {id(p) for part in masked_splitter(net) for p in part}
    assert with_gradient == {name for name, p in net.named_parameters() if id(p) in learns}
    left = set(body.state_dict())-set(net.body_state())
    assert {name.split('.')[0] for name in left} == ({unused} if unused else set())
    # an answer that differs in the lower right of the image only
    net.eval()
    with torch.no_grad():
        bright = net(x, mask)
        net.decoder[0].bias += 1
        assert torch.allclose(net(x, mask)-bright, torch.ones(()), atol=1e-4)


def test_errors_name_what_to_change(lesions):
    from skin_lesions.masking import MaskedNet, mask_patch, masked_learner
    from skin_lesions.networks import create_body
    from skin_lesions.pretext import pretext_dataloaders
    dls = pretext_dataloaders(lesions[1], 64, bs=8, arch=TINY, **CPU)
    for wrong, message in ((dict(patch=24), '64x64 pixels are not made of whole patches of 24'), (dict(patch=0), 'patch must be'), (dict(patch=True), 'patch must be'),
                           (dict(ratio=-.1), 'ratio must be'), (dict(ratio=0), 'masks 0 of the 16 .* nothing to fill in'), (dict(ratio=1.), 'masks 16 of the 16 .* nothing to see')):
        with pytest.raises(ValueError, match=message): masked_learner(dls, TINY, **wrong)
    with pytest.raises(ValueError, match='multiples of 32'): MaskedNet(create_body(TINY, pretrained=False), (80, 64))
    with pytest.raises(ValueError, match='97x97 pixels .* another size'): mask_patch((97, 97))


class Keep(Callback):
    "The mask of each validation image, by what the image is"
    order = 50
    def before_fit(self): self.epochs = []
    def before_validate(self): self.epochs.append({})
    def after_pred(self):
        if self.training: return
        x, mask = self.learn.yb
        keys = x.mean((1, 2, 3)).mul(1e4).round().long().tolist()
        assert not set(keys) & set(self.epochs[-1])
        self.epochs[-1] |= dict(zip(keys, mask[:, 0].numpy()))


def kept_masks(dls, epochs=1):
    keep = Keep()
    quietly(learner(dls), epochs, cbs=keep)
    return keep.epochs


def same_masks(a, b): return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_an_image_keeps_its_validation_mask(lesions, tmp_path):
    "Over epochs, batch sizes and data-loading workers, from a frame and streamed"
    from skin_lesions.pretext import pretext_dataloaders
    from skin_lesions.stream import stream_dataloaders, write_list
    meta = lesions[1]
    write_list(meta.path, tmp_path/'list.txt')
    def framed(bs, **kw): return pretext_dataloaders(meta, 64, bs=bs, arch=TINY, lighting=0, **(CPU | kw))
    def streamed(bs, **kw):
        return stream_dataloaders(tmp_path/'list.txt', 64, bs=bs, valid=tmp_path/'list.txt', arch=TINY, block=7, **(CPU | kw))
    for make, n in ((framed, meta.is_valid.sum()), (streamed, len(meta))):
        first, second = kept_masks(make(8), 2)
        assert len(first) == n and same_masks(first, second)
        assert len({m.tobytes() for m in first.values()}) > n//2 # an image has its own
        for other in (make(5), make(8, num_workers=2)): assert same_masks(kept_masks(other)[0], first)


def test_ranks_share_the_validation_set(lesions, tmp_path):
    "The places that the ranks give are all places once, and those of the images that they load"
    from skin_lesions.distributed import rank_loader
    from skin_lesions.pretext import pretext_dataloaders
    from skin_lesions.stream import stream_dataloaders, write_list
    meta = lesions[1]
    write_list(meta.path, tmp_path/'list.txt')
    framed = pretext_dataloaders(meta.assign(is_valid=np.arange(len(meta)) > 5), 32, bs=4, arch=TINY, **CPU).valid
    streamed = stream_dataloaders(tmp_path/'list.txt', 32, bs=4, valid=tmp_path/'list.txt', arch=TINY, block=7, **CPU).valid
    for whole in (framed, streamed):
        images = torch.cat([b[0] for b in whole])
        for ranks in (1, 2, 3):
            seen = []
            for rank in range(ranks):
                dl = rank_loader(whole, rank, ranks, equal=False)
                for i, (x, *_) in enumerate(dl):
                    places = [int(p) for p in dl.batch_places(i)]
                    assert torch.equal(x, images[places])
                    seen += places
            assert sorted(seen) == list(range(len(images)))


class Cut(Callback):
    "Killed in the second epoch"
    order = 200
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.learn.train_iter == self.at: raise InterruptedError('cut')


@pytest.mark.parametrize('source', ['frame', 'stream'])
def test_a_training_that_was_cut_goes_on(source, lesions, tmp_path):
    "Weights, losses and masks are those of a training that was not cut"
    from skin_lesions.pretext import pretext_dataloaders
    from skin_lesions.resume import ResumeCallback
    from skin_lesions.stream import stream_dataloaders, write_list
    meta = lesions[1]
    write_list(meta.path, tmp_path/'list.txt')
    def loaders():
        if source == 'frame': return pretext_dataloaders(meta, 32, bs=8, arch=TINY, **CPU)
        return stream_dataloaders(tmp_path/'list.txt', 32, bs=8, valid=tmp_path/'list.txt', arch=TINY, block=7, buffer=9, **CPU)
    def train(folder, seed, *cbs):
        # everything random is set anew: the cut training brings its own state back
        learn, keep = learner(loaders, seed), Keep()
        quietly(learn, 3, cbs=[ResumeCallback(tmp_path/folder, minutes=0), keep, *cbs])
        return learn, keep.epochs[-1]
    whole, masks = train('whole', 1)
    n = len(whole.dls.train)
    with pytest.raises(InterruptedError): train('cut', 1, Cut(n+2))
    again, masks_again = train('cut', 99)
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values()): assert torch.equal(a, b), name
    np.testing.assert_array_equal([v[:2] for v in whole.recorder.values], [v[:2] for v in again.recorder.values])
    assert same_masks(masks, masks_again)


def test_no_label_is_needed_and_any_class_set_takes_the_body(lesions):
    from skin_lesions.classes import ISIC2019, MALIGNANT
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner, two_stage_learner
    from skin_lesions.masking import masked_learner
    from skin_lesions.pretext import pretext_dataloaders, transfer_body
    root, meta = lesions
    folder, labelled = root/'HAM10000_images_part_1', []
    quietly(learner(pretext_dataloaders(folder, 32, bs=8, arch=TINY, **CPU)))
    # the images of labelled loaders serve, and their labels change nothing
    for codes in (ISIC2019.codes, ISIC2019.codes[::-1]):
        other = meta.assign(dx=np.resize(codes, len(meta)))
        labelled.append(learner(lambda: ham10000_dataloaders(other, 32, bs=8, arch=TINY, classes=ISIC2019, augment=False, **CPU)))
        quietly(labelled[-1])
    for a, b in zip(labelled[0].model.parameters(), labelled[1].model.parameters()): assert torch.equal(a, b)
    for classes, make in ((ISIC2019, two_stage_learner), (MALIGNANT, lesion_learner)):
        dls = ham10000_dataloaders(meta.assign(dx=np.resize(classes.codes, len(meta))), 32, bs=8, arch=TINY, classes=classes, **CPU)
        learn = make(dls, TINY, pretrained=False)
        assert transfer_body(labelled[0], learn, show=False).kept == ()
        for k, v in labelled[0].model.body.state_dict().items(): assert torch.equal(learn.model.body.state_dict()[k], v)
        quietly(learn)
    assert type(masked_learner(folder, TINY, size=32, bs=8).model).__name__ == 'MaskedNet'


def test_layers_after_the_pooling_stay_the_classifiers(lesions):
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner
    from skin_lesions.masking import MaskedNet
    from skin_lesions.networks import create_body
    from skin_lesions.pretext import transfer_body
    learn = lesion_learner(ham10000_dataloaders(lesions[1], 64, bs=8, arch='test_convnext', **CPU), 'test_convnext', pretrained=False)
    with torch.no_grad(): learn.model.body.head.norm.weight.fill_(.5)
    moved = transfer_body(MaskedNet(create_body('test_convnext', pretrained=False), (64, 64)), learn, show=False)
    assert moved.kept and all(name.startswith('head.') for name in moved.kept)
    assert (learn.model.body.head.norm.weight == .5).all()


def test_recipe_and_start(lesions, tmp_path):
    "`train_run` pretrains, and `compare_pretraining` knows the start; a second call finds the pretext"
    import json
    from skin_lesions.experiments import compare_pretraining
    from skin_lesions.recipes import at_scale, find_recipe, with_changes
    recipe = find_recipe('masking')
    assert (recipe.pretext, recipe.patch, recipe.pretrained, recipe.base) == ('masking', 32, False, 'scratch')
    for wrong in (dict(joint=True), dict(encoder=TINY)):
        with pytest.raises(ValueError, match='masking comes before the diagnosis'): replace(recipe, **wrong)
    kw = dict(starts=('masking',), fractions=(1.,), recipe=with_changes(at_scale('base', 'tiny'), dict(size=32, bs=16)), epochs=1, pretext_epochs=1, out=tmp_path,
              workers=0, device='cpu', cache=None, show=False, report=False)
    table = compare_pretraining(lesions[1], **kw)
    assert table.start.tolist() == ['masking'] and table.average_recall.between(0, 1).all()
    assert 0 < json.loads((tmp_path/'masking.json').read_text())['valid_loss'] < 10
    run = json.loads((tmp_path/'masking_1'/'run.json').read_text())
    assert run['recipe']['pretext'] == 'masking' and run['recipe']['patch'] == 8
    written = (tmp_path/'masking.safetensors').stat().st_mtime_ns
    assert compare_pretraining(lesions[1], **kw).equals(table) and (tmp_path/'masking.safetensors').stat().st_mtime_ns == written


def test_the_reference_is_the_mean_colour_of_what_is_seen(lesions):
    from skin_lesions.masking import reference_loss
    from skin_lesions.pretext import pretext_dataloaders
    learn = learner(pretext_dataloaders(lesions[1], 32, bs=8, arch=TINY, **CPU))
    expected = []
    for i, (x, *_) in enumerate(learn.dls.valid):
        masks = learn.mask_patches.draw(x, range(i*8, i*8+len(x)))[:, 0].numpy()
        for image, mask in zip(x.numpy(), masks):
            expected.append(np.mean([np.abs(c[mask]-c[~mask].mean()) for c in image]))
    assert reference_loss(learn) == pytest.approx(np.mean(expected), rel=1e-5)
