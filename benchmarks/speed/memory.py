"""Memory of a training process with 1,000, 10,000 and 100,000 images, from files and from the cache.

    python benchmarks/speed/memory.py

What belongs to the process alone (Linux), after the same number of steps. The images are links to a few synthetic
ones, which makes no difference to a DataLoader and saves disk space. Pages of the cache's file that the system keeps
in memory do not count: the system can drop them.
"""
import argparse, os, subprocess, sys, tempfile
from pathlib import Path

import pandas as pd
from sides import report

STEPS = 14


def linked(folder, sources, n):
    "A folder with `n` names for a few files; a frame of them"
    from skin_lesions.classes import HAM10000
    folder.mkdir()
    paths = [folder/f'ISIC_{i:07d}.jpg' for i in range(n)]
    for i, p in enumerate(paths): os.link(sources[i % len(sources)], p)
    codes, lesions = list(HAM10000), [f'HAM_{i:07d}' for i in range(n)]
    columns = dict(image_id=[p.stem for p in paths], path=[str(p) for p in paths],
                   dx=[codes[i % len(codes)] for i in range(n)], lesion_id=lesions, group=lesions,
                   age=50., sex='female', site='back', is_valid=[i >= n - 64 for i in range(n)])
    return pd.DataFrame(columns)


def train(csv, cache):
    "In a process of its own: some steps, then its memory in MB"
    import warnings
    warnings.filterwarnings('ignore')
    import psutil
    from fastai.callback.core import Callback, CancelEpochException
    from skin_lesions.cache import resize_cache
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner

    class FewSteps(Callback):
        def after_batch(self):
            if self.training and self.iter >= STEPS: raise CancelEpochException

    meta = pd.read_csv(csv)
    images = resize_cache(meta, 96, folder=cache, show=False) if cache else None
    dls = ham10000_dataloaders(meta, 96, bs=32, num_workers=0, cache=images)
    learn = lesion_learner(dls, pretrained=False, cbs=FewSteps())
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    print(psutil.Process().memory_full_info().uss/2**20)


def megabytes(csv, cache):
    "The memory of a training in a process of its own, MB"
    command = [sys.executable, '-W', 'ignore', __file__, '--train', str(csv), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    return float(done.stdout.split()[-1])


def main(args):
    from skin_lesions.synthetic import synthetic_dataset
    used = {}
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        sources = sorted((synthetic_dataset(tmp/'few', 60, seed=0)).rglob('*.jpg'))
        for n in args.images:
            linked(tmp/f'{n}', sources, n).to_csv(tmp/f'{n}.csv', index=False)
            for where, cache in (('from files', ''), ('from the cache', tmp/f'cache-{n}')):
                used[where, n] = megabytes(tmp/f'{n}.csv', cache)
                print(f'{n:,} images {where}: {used[where, n]:.0f} MB', flush=True)
    least = args.images[0]
    for where in ('from files', 'from the cache'):
        for n in args.images[1:]:
            ratio = used[where, n]/used[where, least]
            both = dict(ours=used[where, n], theirs=used[where, least])
            found = both | dict(ratio=ratio, lowest=ratio, highest=ratio, pairs=1)
            report(f'memory of a training {where}, {n:,} images', f'{least:,} images', '<= 1.1', 'MB', found)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--images', type=int, nargs='+', default=[1_000, 10_000, 100_000])
    parser.add_argument('--train', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train: train(*args.train)
    else: main(args)
