"""Pictures a second that a data loader brings, with no network behind it, against plain fastai's `DataBlock` with `Resize(128)` and two workers.

    HAM10000_DIR=... python benchmarks/speed/loader.py

The first epoch reads the 62 JPEGs of 600x450 pixels in original quality, over and over; the epochs after it take other pictures of HAM10000 from the cache. A time includes the start of the workers.
"""
import argparse, os, tempfile, time
from pathlib import Path

import pandas as pd
from sides import Side, in_turn, report


def frame(folder, n):
    "Rows for `n` training images and one batch for validation, from the files of a folder over and over"
    files = sorted(map(str, Path(folder).rglob('*.jpg')))
    paths = [files[i % len(files)] for i in range(n + 64)]
    return pd.DataFrame(dict(path=paths, dx='nv', is_valid=[False]*n + [True]*64))


def epoch(dl):
    "A function that goes through a loader once; images a second"
    def run():
        start = time.perf_counter()
        n = sum(len(batch[0]) for batch in dl)
        return n/(time.perf_counter() - start)
    return run


def plain(folder, n, augment=False):
    from fastai.vision.all import CategoryBlock, ColReader, ColSplitter, DataBlock, ImageBlock, Normalize, Resize, aug_transforms, imagenet_stats
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('path'), get_y=ColReader('dx'), splitter=ColSplitter(), item_tfms=Resize(128),
                      batch_tfms=[*(aug_transforms(flip_vert=True, max_rotate=180.) if augment else []), Normalize.from_stats(*imagenet_stats)])
    return epoch(block.dataloaders(frame(folder, n), bs=64, num_workers=2).train)


def ours(folder, n, augment=False, cache=None):
    from skin_lesions.cache import resize_cache
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.core import reuse_memory
    meta = frame(folder, n)
    if cache is None: return epoch(ham10000_dataloaders(meta, 128, augment=augment, num_workers=2).train)
    reuse_memory() # as in a training
    return epoch(ham10000_dataloaders(meta, 128, augment=augment, num_workers=0, cache=resize_cache(meta, 128, folder=cache, show=False)).train)


def main(args):
    data = Path(os.environ['HAM10000_DIR'])
    original = str(data/'original_quality')
    with tempfile.TemporaryDirectory() as cache:
        sides = {}
        def side(function, *key, **kwargs):
            if (function, *key) not in sides: sides[(function, *key)] = Side('loader', function, **kwargs)
            return sides[(function, *key)]
        files = dict(folder=original, n=args.images)
        cached = dict(folder=str(data/'HAM10000_images_part_1'), n=args.images, cache=cache)
        report('first epoch from 600x450 JPEGs, two workers', 'plain fastai', '>= 1.5', 'images/s', in_turn(side('ours', 'files', **files), side('plain', 'files', **files), args.repeats))
        report('first epoch with batch augmentation, two workers', 'plain fastai with batch augmentation', '', 'images/s',
               in_turn(side('ours', 'files, augmented', augment=True, **files), side('plain', 'files, augmented', augment=True, **files), args.repeats))
        report('later epochs with the cache, one process', 'plain fastai', '>= 10', 'images/s', in_turn(side('ours', 'cache', **cached), side('plain', 'files', **files), args.repeats))
        report('later epochs with the cache and batch augmentation, one process', 'plain fastai', '>= 5', 'images/s', in_turn(side('ours', 'cache, augmented', augment=True, **cached), side('plain', 'files', **files), args.repeats))
        report('later epochs with the cache and batch augmentation, one process', 'plain fastai with batch augmentation', '>= 5', 'images/s',
               in_turn(side('ours', 'cache, augmented', **cached), side('plain', 'files, augmented', **files), args.repeats))
        for s in sides.values(): s.close()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--images', type=int, default=2048, help='of an epoch')
    parser.add_argument('--repeats', type=int, default=3)
    main(parser.parse_args())
