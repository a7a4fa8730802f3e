"""Whole epochs on a GPU from the cache: the learner of this library with its defaults against plain fastai in float32 with its own loader, and against the same network fed random tensors that are already on the GPU.

    HAM10000_DIR=... python benchmarks/speed/gpu.py

Without a GPU it says so and measures nothing.
"""
import argparse, os, tempfile, time
from pathlib import Path

from sides import Side, in_turn, report


def one_epoch(learn, n):
    import torch
    def run():
        torch.cuda.synchronize()
        start = time.perf_counter()
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        torch.cuda.synchronize()
        return n/(time.perf_counter() - start)
    return run


def frame(n):
    from skin_lesions.readers import read_metadata
    meta = read_metadata(os.environ['HAM10000_DIR']).sample(n + 64, random_state=0).reset_index(drop=True)
    return meta.assign(is_valid=meta.index >= n)


def ours(arch, size, bs, n, cache, resident=False):
    import torch
    from skin_lesions.cache import resize_cache
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner
    meta = frame(n)
    dls = ham10000_dataloaders(meta, size, bs=bs, arch=arch, cache=resize_cache(meta, size, folder=cache, show=False))
    learn = lesion_learner(dls, arch, pretrained=False)
    if resident:
        from fastai.vision.core import TensorImage
        from fastai.torch_core import TensorCategory
        class Same:
            "The same random batch, as often as the loader has batches"
            def __init__(self, dl): self.dl, self.batch = dl, (TensorImage(torch.randn(bs, 3, size, size, device='cuda')), TensorCategory(torch.randint(0, 7, (bs,), device='cuda')))
            def __getattr__(self, name): return getattr(self.dl, name)
            def __len__(self): return len(self.dl)
            def __iter__(self): return iter([self.batch]*len(self))
        dls.loaders[0] = Same(dls.loaders[0])
    return one_epoch(learn, n)


def plain(arch, size, bs, n):
    from fastai.vision.all import CategoryBlock, ColReader, ColSplitter, DataBlock, ImageBlock, Normalize, Resize, accuracy, aug_transforms, imagenet_stats, vision_learner
    dls = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('path'), get_y=ColReader('dx'), splitter=ColSplitter(), item_tfms=Resize(size),
                    batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)]).dataloaders(frame(n), bs=bs)
    return one_epoch(vision_learner(dls, arch, pretrained=False, metrics=accuracy), n)


def main(args):
    import torch
    if not torch.cuda.is_available(): return print('no GPU here: nothing measured')
    with tempfile.TemporaryDirectory() as cache:
        for arch in ('tf_efficientnet_lite0', 'resnet50'):
            for size in (128, 224):
                common = dict(arch=arch, size=size, bs=args.bs, n=args.images)
                us = Side('gpu', 'ours', cache=cache, **common)
                for against, goal, other in (('plain fastai, float32', '>= 3', Side('gpu', 'plain', **common)), ('random tensors on the GPU', '>= .9', Side('gpu', 'ours', cache=cache, resident=True, **common))):
                    report(f'GPU epochs from the cache, {arch}, {size} px ({torch.cuda.get_device_name()})', against, goal, 'images/s', in_turn(us, other, args.repeats))
                    other.close()
                us.close()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--bs', type=int, default=128)
    parser.add_argument('--images', type=int, default=5120)
    parser.add_argument('--repeats', type=int, default=3)
    main(parser.parse_args())
