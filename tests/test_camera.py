"Other cameras: each image by its own numbers, the same on every run of a seed, and no change where none is asked for."
import numpy as np
import pytest
import torch

from skin_lesions.camera import add_noise, blur, change_colours, colour_matrix, jpeg, random_camera, random_colours


@pytest.fixture
def x(): return torch.rand(6, 3, 24, 40, generator=torch.Generator().manual_seed(0))


def test_each_image_by_its_own_numbers(x):
    gains, saturation = torch.linspace(.9, 1.1, 18).view(6, 3), torch.linspace(.7, 1.4, 6)
    hue, gamma = torch.linspace(-5, 5, 6), torch.linspace(.8, 1.3, 6)
    together = change_colours(x, gains, saturation, hue, gamma)
    for i in range(6):
        one = slice(i, i+1)
        torch.testing.assert_close(together[one], change_colours(x[one], gains[one], saturation[one], hue[one], gamma[one]))


def test_a_turn_of_the_hue_keeps_lightness_and_distance_from_grey():
    m = colour_matrix(torch.ones(1, 3).double(), torch.ones(1).double(), torch.tensor([40.]).double())[0]
    light = torch.tensor([.299, .587, .114]).double()
    torch.testing.assert_close(light@m, light, atol=1e-3, rtol=0)
    around = torch.linalg.matrix_power(m, 9) # 360 degrees
    torch.testing.assert_close(around, torch.eye(3).double(), atol=1e-6, rtol=0)


def test_values_stay_between_0_and_1_and_sizes_stay(x):
    torch.manual_seed(1)
    for changed in (random_colours(x, 3.), random_camera(x, 3., p=1.), blur(x, 5.), add_noise(x, .5), jpeg(x, 5)):
        assert changed.shape == x.shape and changed.dtype == x.dtype and changed.min() >= -1e-6 and changed.max() <= 1+1e-6


def test_a_seed_decides(x):
    def draw(seed):
        torch.manual_seed(seed)
        return random_camera(x, p=.5)
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


def test_training_images_change_and_validation_images_do_not(tmp_path):
    from skin_lesions.data import ham10000_dataloaders, lesion_augmentation
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    from skin_lesions.synthetic import synthetic_ham10000
    meta = split_by_lesion(read_metadata(synthetic_ham10000(tmp_path/'sample', 60, size=(96, 72), show=False)))
    def batches(camera):
        torch.manual_seed(0); np.random.seed(0)
        tfms = lesion_augmentation(0., 0., camera=camera)
        dls = ham10000_dataloaders(meta, 32, bs=8, augment=False, batch_tfms=tfms, num_workers=0, device='cpu')
        return dls.valid.one_batch()[0], dls.after_batch
    plain, with_camera = batches(0.), batches(1.)
    assert torch.equal(plain[0], with_camera[0])
    names = [type(t).__name__ for t in with_camera[1].fs]
    assert names.index('OtherCamera') < names.index('Normalize') and 'OtherCamera' not in [type(t).__name__ for t in plain[1].fs]


def test_wrong_numbers(x):
    for call, message in ((lambda: blur(x, -1), 'sigma must be 0 or more, got -1'), (lambda: jpeg(x, 101), 'from 1 to 100, got 101'),
                          (lambda: add_noise(x, -.1), 'sigma must be'), (lambda: random_camera(x, -1), 'strength must be 0 or more, got -1')):
        with pytest.raises(ValueError, match=message): call()
