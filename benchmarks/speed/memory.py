"""Memory of a training process with 1,000, 10,000 and 100,000 images, from files and from the cache: what belongs to the process alone (Linux), after the same number of steps.

    python benchmarks/speed/memory.py

The images are links to a few drawn ones, which is all the same to a loader and spares the disk. Pages of the cache's file that the system keeps in memory are its to drop, and do not count.
"""
import argparse, json, os, subprocess, sys, tempfile
from pathlib import Path

import pandas as pd
from sides import report


def linked(folder, sources, n):
    "A folder with `n` names for a few files; a frame of them"
    folder.mkdir()
    paths = [folder/f'ISIC_{i:07d}.jpg' for i in range(n)]
    for i, p in enumerate(paths): os.link(sources[i % len(sources)], p)
    return pd.DataFrame(dict(image_id=[p.stem for p in paths], path=[str(p) for p in paths], dx=[('nv', 'mel', 'bkl', 'bcc', 'akiec', 'vasc', 'df')[i % 7] for i in range(n)],
                             lesion_id=[f'HAM_{i:07d}' for i in range(n)], group=[f'HAM_{i:07d}' for i in range(n)], age=50., sex='female', localization='back', is_valid=[i >= n - 64 for i in range(n)]))


def train(csv, cache):
    "In a process of its own: some steps, then its memory in MB"
    import warnings; warnings.filterwarnings('ignore')
    import psutil
    from fastai.callback.core import Callback, CancelEpochException
    from skin_lesions.cache import resize_cache
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner
    class Some(Callback):
        def after_batch(self):
            if self.training and self.iter >= 14: raise CancelEpochException
    meta = pd.read_csv(csv)
    dls = ham10000_dataloaders(meta, 96, bs=32, num_workers=0, cache=resize_cache(meta, 96, folder=cache, show=False) if cache else None)
    learn = lesion_learner(dls, pretrained=False, cbs=Some())
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    print(psutil.Process().memory_full_info().uss/2**20)


def main(args):
    from skin_lesions.synthetic import synthetic_ham10000
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        synthetic_ham10000(tmp/'few', n_images=60, seed=0)
        sources = sorted((tmp/'few').rglob('*.jpg'))
        found = {}
        for n in args.images:
            linked(tmp/f'{n}', sources, n).to_csv(tmp/f'{n}.csv', index=False)
            for cache in ('', str(tmp/f'cache-{n}')):
                out = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--train', str(tmp/f'{n}.csv'), cache], capture_output=True, text=True)
                if out.returncode: sys.exit(out.stderr)
                found[bool(cache), n] = float(out.stdout.split()[-1])
                print(f"{n:,} images {'from the cache' if cache else 'from files'}: {found[bool(cache), n]:.0f} MB", flush=True)
        for cache in (False, True):
            for n in args.images[1:]:
                ratio = found[cache, n]/found[cache, args.images[0]]
                report(f"memory of a training {'from the cache' if cache else 'from files'}, {n:,} images", f'{args.images[0]:,} images', '<= 1.1', 'MB', dict(ours=found[cache, n], theirs=found[cache, args.images[0]], ratio=ratio, lowest=ratio, highest=ratio, pairs=1))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--images', type=int, nargs='+', default=[1_000, 10_000, 100_000])
    parser.add_argument('--train', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    train(*args.train) if args.train else main(args)
