"""Pretexts end to end: from a folder without labels to a classifier, files that load elsewhere, and the disorder's properties over many seeds."""

import numpy as np
import pytest
import torch

TINY = 'test_efficientnet'


@pytest.fixture(scope='module')
def lesions(tmp_path_factory):
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    from skin_lesions.synthetic import synthetic_ham10000
    root = synthetic_ham10000(tmp_path_factory.mktemp('pretext')/'sample', 70, size=(96, 72), show=False)
    return root, split_by_lesion(read_metadata(root))


def quietly(learn, *args):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(*args)


@pytest.mark.parametrize('kind', ['rotation', 'restoration'])
def test_from_unlabelled_folder_to_classifier(lesions, kind):
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import two_stage_learner
    from skin_lesions.predictions import get_predictions
    from skin_lesions.pretext import pretext_dataloaders, restoration_learner, rotation_learner, transfer_body
    root, meta = lesions
    dls = pretext_dataloaders(root/'HAM10000_images_part_1', 32, bs=16, arch=TINY, num_workers=0, device='cpu')
    pretext = {'rotation': rotation_learner, 'restoration': restoration_learner}[kind](dls, TINY)
    quietly(pretext, 1)
    labelled = ham10000_dataloaders(meta, 32, bs=16, arch=TINY, num_workers=0, device='cpu')
    learn = two_stage_learner(labelled, TINY, pretrained=False)
    assert transfer_body(pretext, learn, show=False).moved>50
    quietly(learn, 1)
    assert len(get_predictions(learn))==meta.is_valid.sum()


def test_worker_processes(lesions):
    "Transforms and files reach the loader's workers, and the error of a broken file comes back with its name"
    from skin_lesions.pretext import pretext_dataloaders
    root, meta = lesions
    dls = pretext_dataloaders(meta, 32, bs=16, num_workers=2, device='cpu')
    assert dls.one_batch()[0].shape==(16, 3, 32, 32)
    broken = root/'broken.jpg'
    broken.write_bytes(b'no image')
    frame = meta.copy()
    frame.loc[frame.index[~frame.is_valid][1:], 'path'] = str(broken)
    with pytest.raises(Exception, match='broken.jpg'): pretext_dataloaders(frame, 32, bs=16, num_workers=2, device='cpu').one_batch()
    broken.unlink()


def test_joint_learners_load_elsewhere(lesions, tmp_path, warm_python):
    "An exported joint learner gives the same answer in a fresh interpreter"
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.pretext import joint_restoration_learner, joint_rotation_learner
    meta = lesions[1]
    dls = ham10000_dataloaders(meta, 32, bs=16, arch=TINY, augment=False, num_workers=0, device='cpu')
    learners = dict(rotation=joint_rotation_learner(dls, TINY, pretrained=False), restoration=joint_restoration_learner(dls, TINY, TINY, pretrained=False))
    path = meta[meta.is_valid].path.iloc[0]
    expected = []
    for name, learn in learners.items():
        quietly(learn, 1)
        with learn.no_bar(): expected.append(learn.predict(path)[2].numpy())
        learn.path = tmp_path
        learn.export(f'{name}.pkl')
    code = ("import sys, numpy as np\nfrom fastai.learner import load_learner\n"
            "for name in ('rotation', 'restoration'):\n"
            f"    learn = load_learner({str(tmp_path)!r}+f'/{{name}}.pkl')\n"
            f"    with learn.no_bar(): print(*learn.predict({path!r})[2].tolist())\n")
    run = warm_python(code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose([list(map(float, line.split())) for line in run.stdout.strip().splitlines()], expected, atol=1e-5)


@pytest.mark.parametrize('kind', ['rotation', 'restoration'])
def test_joint_learners_of_any_class_set_have_a_loss_for_each_image(lesions, kind):
    from fastai.interpret import ClassificationInterpretation
    from skin_lesions.classes import ISIC2019, MALIGNANT
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.pretext import joint_restoration_learner, joint_rotation_learner
    meta = lesions[1]
    for classes, two_stage in ((ISIC2019, True), (MALIGNANT, False)):
        other = meta.assign(dx=np.resize(classes.codes, len(meta)))
        dls = ham10000_dataloaders(other, 32, bs=16, arch=TINY, classes=classes, augment=False, num_workers=0, device='cpu')
        kw = dict(pretrained=False, two_stage=two_stage, weight=.5)
        learn = joint_rotation_learner(dls, TINY, **kw) if kind == 'rotation' else joint_restoration_learner(dls, TINY, TINY, **kw)
        quietly(learn, 1)
        with learn.no_bar():
            p, y, losses = learn.get_preds(with_loss=True)
            total = learn.validate()[0]
            interpreted, _ = ClassificationInterpretation.from_learner(learn).top_losses(largest=False)
        assert p.shape == (len(dls.valid_ds), len(classes))
        assert losses.shape == (len(p),) and losses.mean().item() == pytest.approx(total, rel=1e-4)
        torch.testing.assert_close(interpreted, losses.sort().values, atol=1e-4, rtol=1e-4)
        # what is added to the diagnosis's loss differs from image to image
        added = losses-torch.nn.functional.nll_loss(p.log(), y, reduction='none')
        assert (added > -1e-5).all() and added.std() > 1e-4


def test_a_device_that_cannot_sample_gives_the_same_pixels(monkeypatch):
    from skin_lesions import pretext
    x, angles = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(1)), torch.tensor([15., 60., 200.])
    expected, sample, refused = pretext.rotate_images(x, angles), torch.nn.functional.grid_sample, []

    def grid_sample(*args, **kw):
        if not refused:
            refused.append(1)
            raise NotImplementedError("The operator 'aten::grid_sampler_2d' is not implemented for the MPS device")
        return sample(*args, **kw)
    monkeypatch.setattr(pretext.F, 'grid_sample', grid_sample)
    torch.testing.assert_close(pretext.rotate_images(x, angles), expected)
    assert refused
    # no other error is taken for a refusal
    refused.clear()

    def broken(*args, **kw):
        refused.append(1)
        raise RuntimeError('CUDA out of memory') if len(refused) == 1 else AssertionError('fell back to the CPU')
    monkeypatch.setattr(pretext.F, 'grid_sample', broken)
    with pytest.raises(RuntimeError, match='out of memory'): pretext.rotate_images(x, angles)


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('grid', [True, False])
def test_disorder_keeps_every_pixel(seed, grid):
    from skin_lesions.pretext import disorder_context, draw_swaps
    rng = np.random.default_rng(seed)
    h, w = map(int, rng.integers(6, 60, 2))
    patch, swaps = int(rng.integers(1, min(h, w)//2+1)), int(rng.integers(0, 30))
    x = torch.arange(2*3*h*w).view(2, 3, h, w)
    done = disorder_context(x, patch, swaps, grid, seed=seed)
    assert torch.equal(done.flatten(2).sort().values, x.flatten(2))
    assert torch.equal(done[:, 0]-x[:1, 0], done[:, 1]-x[:1, 1]) # channels move together
    a, b = draw_swaps(2, (h, w), patch, swaps, grid, torch.Generator().manual_seed(seed)).unbind(2)
    assert ((a-b).abs()>=patch).any(-1).all() and (torch.cat([a, b])>=0).all() and (torch.cat([a, b])<=torch.tensor([h-patch, w-patch])).all()


def test_no_pixels_are_kept(lesions):
    "The data loaders hold paths"
    from skin_lesions.pretext import pretext_dataloaders
    dls = pretext_dataloaders(lesions[1], 32, num_workers=0, device='cpu')
    assert all(isinstance(p, str) for p in dls.train_ds.items.path)
    assert dls.train_ds.items.memory_usage(deep=True).sum() < 2000*len(dls.train_ds)


NO_ENCODERS = {'hrnet_w18_small': 'missing the required "forward"', 'levit_128s': 'unpack', 'tresnet_m': 'channels', 'selecsls42b': 'no attribute', 'maxvit_pico_rw_256': 'divisible', 'test_vit': 'several sizes'}


@pytest.mark.parametrize('arch', NO_ENCODERS)
def test_an_architecture_that_is_no_encoder_is_told(arch, monkeypatch):
    "Whatever goes wrong inside, the error names the architecture, the reason and what serves"
    from skin_lesions.networks import create_body
    from skin_lesions.pretext import RestorationNet
    with pytest.raises(ValueError, match=f'{arch} .*{NO_ENCODERS[arch]}.*; its encoder must be a convolutional network .* such as resnet50'): RestorationNet(create_body(arch, pretrained=False), (64, 64))


def test_images_too_small_for_an_encoder_are_told():
    from skin_lesions.networks import create_body
    from skin_lesions.pretext import RestorationNet
    with pytest.raises(ValueError, match='inception_v3 for images of 64x64 pixels .*Kernel size'): RestorationNet(create_body('inception_v3', pretrained=False), (64, 64))


@pytest.mark.parametrize('arch', ['test_resnet', 'densenet121', 'regnetx_002', 'test_convnext', 'mobilenetv2_100'])
def test_the_encoder_s_parts_follow_each_other_in_the_body_too(arch):
    "What each part gives in the body is the very tensor that the next one gets"
    from skin_lesions.networks import create_body
    from skin_lesions.pretext import RestorationNet, _stages
    body, seen = create_body(arch, pretrained=False).eval(), []
    for part in _stages(body).values(): part.register_forward_hook(lambda module, x, y: seen.append((x[0], y)))
    with torch.no_grad(): body(torch.randn(1, 3, 64, 96))
    assert len(seen) == len(_stages(body)) and all(a[1] is b[0] for a, b in zip(seen, seen[1:]))
    net = RestorationNet(create_body(arch, pretrained=False), (64, 96)).eval()
    with torch.no_grad(): assert net(torch.randn(1, 3, 64, 96)).shape == (1, 3, 64, 96)


def test_copies_of_an_image_are_on_no_two_sides(lesions, tmp_path):
    "Kaggle's HAM10000 has its folders twice, one inside the other"
    import shutil
    from pathlib import Path
    from skin_lesions.pretext import pretext_dataloaders
    part = lesions[0]/'HAM10000_images_part_1'
    for folder in ('HAM10000_images_part_1', 'HAM10000_images_part_1/HAM10000_images_part_1', 'ham10000_images_part_1'):
        shutil.copytree(part, tmp_path/folder, dirs_exist_ok=True)
    dls = pretext_dataloaders(tmp_path, 32, num_workers=0, device='cpu')
    train, valid = ([Path(p).name for p in ds.items.path] for ds in (dls.train_ds, dls.valid_ds))
    assert sorted(train+valid) == sorted(p.name for p in part.glob('*.jpg'))
