"DataLoaders: any class set, the same pixels on both sides, and fastai's own doors."
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import fastai.callback.progress, fastai.vision.learner # Learner.no_bar, plot_top_losses of images
import torch
from fastai.data.all import DataLoaders
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from PIL import Image
from torch import nn

from skin_lesions.classes import HAM10000, ISIC2019, MELANOMA, class_set, classes_of, map_classes
from skin_lesions.core import ImageError
from skin_lesions.data import class_weights, ham10000_dataloaders
from skin_lesions.readers import read_metadata
from skin_lesions.split import split_by_lesion

OWN = class_set(['z', 'a', 'm']) # not in the order of the alphabet


@pytest.fixture(scope='module')
def meta(sample): return split_by_lesion(read_metadata(sample))


def in_set(meta, classes):
    "The same images with the diagnoses of another set"
    if classes == OWN: return map_classes(meta, OWN, {c: OWN.codes[i % 3] for i, c in enumerate(HAM10000)})
    return meta if classes == HAM10000 else map_classes(meta, classes)


def small_learner(dls):
    "A network of one layer"
    n_out = len(dls.vocab)
    return Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, n_out)), CrossEntropyLossFlat())


@pytest.mark.parametrize('classes', [HAM10000, ISIC2019, MELANOMA, OWN], ids=lambda s: s.name)
def test_any_class_set_goes_through_fastai(meta, classes, tmp_path):
    "Training, prediction, interpretation, export: codes stay codes"
    frame = in_set(meta, classes)
    dls = ham10000_dataloaders(frame, 32, bs=16, num_workers=0, device='cpu')
    assert dls.class_set == classes and list(dls.vocab) == list(classes) and dls.c == len(classes)
    learn = small_learner(dls)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    _, y = learn.get_preds(dl=dls.test_dl(frame.iloc[:9], with_labels=True, num_workers=0))
    assert [dls.vocab[i] for i in y] == frame.dx[:9].tolist()
    for item in (frame.path[0], Path(frame.path[0]), frame.iloc[0]):
        with learn.no_bar(): code, i, p = learn.predict(item)
        assert str(code) in classes and classes.codes[int(i)] == str(code) and p.shape == (len(classes),)
    with learn.no_bar(): interp = ClassificationInterpretation.from_learner(learn)
    assert interp.confusion_matrix().sum() == frame.is_valid.sum()
    interp.show_results([0, 1, 2])
    interp.plot_top_losses(2)
    learn.export(tmp_path/'learner.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'learner.pkl')
    assert classes_of(again.dls) == classes


def test_training_and_validation_images_are_read_in_the_same_way(meta, tmp_path):
    "The same files on both sides give the same pixels before the crop, JPEG or not"
    dls = ham10000_dataloaders(meta, 64, bs=8, num_workers=0, augment=False)
    for path in meta.path[:3]:
        train, valid = (np.asarray(ds.tls[0].tfms(path)) for ds in (dls.train_ds, dls.valid_ds))
        np.testing.assert_array_equal(train, valid)
        Image.open(path).save(tmp_path/'same.png')
        png = np.asarray(dls.valid_ds.tls[0].tfms(tmp_path/'same.png'))
        assert png.shape == valid.shape and np.abs(png.astype(int)-valid).mean() < 1


def test_a_frame_with_a_fault_is_refused_before_anything_is_read(meta):
    no_files = meta.assign(path='nowhere.jpg')
    for value, message in (('mell', "did you mean 'mel'"), (None, 'no diagnosis in 1 row')):
        with pytest.raises(ValueError, match=message):
            ham10000_dataloaders(no_files.assign(dx=meta.dx.where(meta.index != 3, value)), 32, num_workers=0)
    with pytest.raises(ValueError, match='unknown diagnosis of MELANOMA'): ham10000_dataloaders(no_files, classes=MELANOMA)


def test_a_split_of_one_s_own_that_leaks_is_used_with_a_warning(meta):
    leaky = meta.assign(is_valid=meta.index % 2 == 0)
    leaky.attrs.pop('split')
    with pytest.warns(UserWarning, match='show a lesion that is also in training'): dls = ham10000_dataloaders(leaky, 32, num_workers=0)
    assert len(dls.valid_ds) == leaky.is_valid.sum()


def test_classes_without_a_training_image_do_not_stop_the_default_sampling(meta):
    eight = map_classes(meta, ISIC2019)
    dls = ham10000_dataloaders(eight, 32, bs=8, num_workers=0)
    assert np.isfinite(dls.train.wgts).all() and dls.train.wgts.sum() == pytest.approx(1)
    with pytest.raises(ValueError, match='no training image of scc'): class_weights(eight)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('kind', ['truncated', 'text', 'empty'])
def test_training_stops_with_the_file_and_the_reason(kind, workers, meta, tmp_path):
    "In this process, and in a data-loading worker"
    if workers and kind != 'truncated': pytest.skip('one kind is enough with workers')
    path, data = tmp_path/'bad.jpg', Path(meta.path[0]).read_bytes()
    path.write_bytes(dict(truncated=data[:len(data)//2], text=b'not an image', empty=b'')[kind])
    last = meta.index[~meta.is_valid][-1]
    broken = meta.assign(path=meta.path.where(meta.index != last, str(path)))
    dls = ham10000_dataloaders(broken, 32, bs=7, sampling=None, num_workers=workers, device='cpu')
    learn = small_learner(dls)
    with pytest.raises(ImageError) as e, learn.no_bar(): learn.fit(2)
    assert str(e.value).startswith(f'{path}: ') and 'Traceback' not in str(e.value)


def test_a_batch_of_ham10000(real):
    xb, yb = ham10000_dataloaders(read_metadata(real), 128, bs=16, num_workers=0).one_batch()
    assert xb.shape == (16, 3, 128, 128) and xb.std() > .1


@pytest.mark.parametrize('size', [(64, 96), [64, 96], '64', 64.5, 4, True, None])
@pytest.mark.parametrize('crop', ['random', 'resize', 'window'])
def test_a_size_is_the_side_of_a_square(size, crop, meta):
    from skin_lesions.cache import resize_cache
    from skin_lesions.pretext import pretext_dataloaders
    for make in (ham10000_dataloaders, pretext_dataloaders, resize_cache):
        with pytest.raises(ValueError, match='size must be one whole number of pixels'): make(meta, size, crop)
