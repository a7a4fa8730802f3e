"Crops and views of one image: fastai's pixels without fastai."
import numpy as np
import pytest
from PIL import Image

from skin_lesions.views import (VALIDATION_CROPS, VIEWS, answer_of_views, average_probabilities, dihedral_views, n_crops, repeat_inputs,
                                validation_crop, view_images)


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize('crop', VALIDATION_CROPS)
@pytest.mark.parametrize('size', [64, 128, (96, 128)])
def test_the_pixels_are_fastai_s(crop, size):
    from fastai.vision.all import PILImage, RandomCrop, RandomResizedCrop, Resize
    transform = dict(random=RandomResizedCrop(size, min_scale=.35), resize=Resize(size, method='squish'), window=RandomCrop(size))[crop]
    for shape in ((600, 450), (450, 600), (100, 100), (31, 200)):
        image = noise(*shape)
        np.testing.assert_array_equal(np.array(validation_crop(image, crop, size)), np.array(transform(PILImage(image), split_idx=1)))


@pytest.mark.parametrize('crop', VALIDATION_CROPS)
@pytest.mark.parametrize('views', [None, *VIEWS])
def test_views_have_the_size_of_the_network(crop, views):
    for shape in ((60, 45), (20, 90), (8, 8)):
        images = view_images(noise(*shape), views, crop, (24, 32))
        assert len(images) == n_crops(views) and {im.size for im in images} == {(32, 24)}


def test_equal_answers_stay():
    p = np.random.default_rng(0).dirichlet(np.ones(8), 5)
    for how in ('geometric', 'arithmetic'): np.testing.assert_allclose(average_probabilities([p]*9, how), p, rtol=1e-12)
    sure = np.eye(2)[[0, 1]]
    np.testing.assert_allclose(average_probabilities(sure[:,None]), [[.5, .5]]) # a 0 is not final


@pytest.mark.parametrize('n, size', [(1, (9, 9)), (3, (9, 9)), (11, (9, 9)), (1, (6, 9)), (3, (6, 9))])
def test_views_that_go_together_are_those_that_go_alone(n, size):
    "Also where a rotation has other sides, and with a further input for each image; eight images at a time at most, or those that were given"
    import torch
    from torch.nn.functional import adaptive_avg_pool2d
    torch.manual_seed(n)
    x, rows, weight, batches = torch.rand(n, 3, *size), torch.rand(n, 2), torch.randn(12, 5), []
    def probabilities(x, rows): return (adaptive_avg_pool2d(x, (2, 2)).flatten(1)@weight+rows.sum(1, keepdim=True)*torch.arange(5)).softmax(1).numpy()
    def look(x):
        batches.append(len(x))
        return probabilities(x, repeat_inputs(rows, len(x), 'dihedral'))
    alone = average_probabilities([probabilities(v, rows) for v in dihedral_views(x)])
    np.testing.assert_allclose(answer_of_views(look, x, 'dihedral'), alone, rtol=1e-5)
    assert sum(batches) == 8*n and max(batches) <= max(8, n)
