"""Images a second of a DataLoader without a network behind it, against plain fastai's `DataBlock` with `Resize(128)`.

    HAM10000_DIR=... python benchmarks/speed/loader.py

Plain fastai has two data-loading workers. The first epoch reads the 62 JPEGs of 600x450 pixels in original quality,
over and over; the epochs after it take other images of HAM10000 from the cache. A time includes the start of the
workers.
"""
import argparse, os, tempfile, time
from pathlib import Path

import pandas as pd
from sides import Side, in_turn, report


def frame(folder, n):
    "Rows for `n` training images and one batch for validation, from the files of a folder over and over"
    from skin_lesions.classes import HAM10000, with_classes
    files = sorted(map(str, Path(folder).rglob('*.jpg')))
    if not files: raise FileNotFoundError(f'{folder} has no JPEG; HAM10000_DIR must be the folder of HAM10000')
    paths = [files[i % len(files)] for i in range(n + 64)]
    meta = pd.DataFrame(dict(path=paths, dx=HAM10000.first, is_valid=[False]*n + [True]*64))
    return with_classes(meta, HAM10000)


def epoch(dl):
    "A function that goes through a DataLoader once; images a second"
    def run():
        start = time.perf_counter()
        n = sum(len(batch[0]) for batch in dl)
        return n/(time.perf_counter() - start)
    return run


def plain(folder, n, augment=False):
    from fastai.vision.all import (CategoryBlock, ColReader, ColSplitter, DataBlock, ImageBlock, Normalize, Resize,
                                   aug_transforms, imagenet_stats)
    augmentation = aug_transforms(flip_vert=True, max_rotate=180.) if augment else []
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('path'), get_y=ColReader('dx'),
                      splitter=ColSplitter(), item_tfms=Resize(128),
                      batch_tfms=[*augmentation, Normalize.from_stats(*imagenet_stats)])
    return epoch(block.dataloaders(frame(folder, n), bs=64, num_workers=2).train)


def ours(folder, n, augment=False, cache=None):
    from skin_lesions.cache import resize_cache
    from skin_lesions.core import reuse_memory
    from skin_lesions.data import ham10000_dataloaders
    meta = frame(folder, n)
    # each image once, as plain fastai takes them
    common = dict(augment=augment, sampling=None)
    if cache is None: return epoch(ham10000_dataloaders(meta, 128, num_workers=2, **common).train)
    reuse_memory()  # as in a training
    images = resize_cache(meta, 128, folder=cache, show=False)
    return epoch(ham10000_dataloaders(meta, 128, num_workers=0, cache=images, **common).train)


FILES, FILES_AUGMENTED = 'files', 'files, augmented'
CACHE, CACHE_AUGMENTED = 'cache', 'cache, augmented'
# what, ours, against, theirs, goal
ROWS = (
    ('first epoch from 600x450 JPEGs, two workers', FILES, 'plain fastai', FILES, '>= 1.5'),
    ('first epoch with batch augmentation, two workers', FILES_AUGMENTED,
     'plain fastai with batch augmentation', FILES_AUGMENTED, ''),
    ('later epochs with the cache, one process', CACHE, 'plain fastai', FILES, '>= 10'),
    ('later epochs with the cache and batch augmentation, one process', CACHE_AUGMENTED, 'plain fastai', FILES, '>= 5'),
    ('later epochs with the cache and batch augmentation, one process', CACHE_AUGMENTED,
     'plain fastai with batch augmentation', FILES_AUGMENTED, '>= 5'))


def main(args):
    data = Path(os.environ['HAM10000_DIR'])
    with tempfile.TemporaryDirectory() as cache:
        sources = {'files': dict(folder=str(data/'original_quality')),
                   'cache': dict(folder=str(data/'HAM10000_images_part_1'), cache=cache)}
        sides = {}

        def side(function, kind):
            if (function, kind) not in sides:
                source = sources[kind.split(',')[0]]
                sides[function, kind] = Side('loader', function, n=args.images, augment='augmented' in kind, **source)
            return sides[function, kind]

        for what, our_kind, against, their_kind, goal in ROWS:
            pairs = in_turn(side('ours', our_kind), side('plain', their_kind), args.repeats)
            report(what, against, goal, 'images/s', pairs)
        for s in sides.values(): s.close()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--images', type=int, default=2048, help='of an epoch')
    parser.add_argument('--repeats', type=int, default=3, help='pairs')
    main(parser.parse_args())
