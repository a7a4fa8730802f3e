"""Whole epochs on a GPU from the cache: this library's learner with its defaults against two others.

    HAM10000_DIR=... python benchmarks/speed/gpu.py

In images a second. The others are plain fastai in float32 with its own loader, and the same network fed random tensors
that are already on the GPU. Without a GPU it says so and measures nothing.
"""
import argparse, os, tempfile, time

from sides import Side, in_turn, report


def one_epoch(learn, n):
    "A function that trains for an epoch; images a second"
    import torch
    def run():
        torch.cuda.synchronize()
        start = time.perf_counter()
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        torch.cuda.synchronize()
        return n/(time.perf_counter() - start)
    return run


def frame(n):
    "`n` training images of HAM10000 and a batch for validation"
    from skin_lesions.readers import read_metadata
    meta = read_metadata(os.environ['HAM10000_DIR']).sample(n + 64, random_state=0).reset_index(drop=True)
    return meta.assign(is_valid=meta.index >= n)


def repeat_one_batch(dls, bs, size):
    "Feed the training a random batch on the GPU, as often as its loader has batches"
    import torch
    from fastai.torch_core import TensorCategory
    from fastai.vision.core import TensorImage
    images = TensorImage(torch.randn(bs, 3, size, size, device='cuda'))
    labels = TensorCategory(torch.randint(0, len(dls.vocab), (bs,), device='cuda'))

    class OneBatch:
        def __init__(self, dl): self.dl = dl
        def __getattr__(self, name): return getattr(self.dl, name)
        def __len__(self): return len(self.dl)
        def __iter__(self): return iter([(images, labels)]*len(self))

    dls.loaders[0] = OneBatch(dls.loaders[0])


def ours(arch, size, bs, n, cache, resident=False):
    from skin_lesions.cache import resize_cache
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner
    meta = frame(n)
    images = resize_cache(meta, size, folder=cache, show=False)
    dls = ham10000_dataloaders(meta, size, bs=bs, arch=arch, cache=images)
    learn = lesion_learner(dls, arch, pretrained=False)
    if resident: repeat_one_batch(dls, bs, size)
    return one_epoch(learn, n)


def plain(arch, size, bs, n):
    from fastai.vision.all import (CategoryBlock, ColReader, ColSplitter, DataBlock, ImageBlock, Normalize, Resize,
                                   accuracy, aug_transforms, imagenet_stats, vision_learner)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('path'), get_y=ColReader('dx'),
                      splitter=ColSplitter(), item_tfms=Resize(size),
                      batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)])
    dls = block.dataloaders(frame(n), bs=bs)
    return one_epoch(vision_learner(dls, arch, pretrained=False, metrics=accuracy), n)


def measure(arch, size, cache, args):
    "One network at one size against both others"
    import torch
    common = dict(arch=arch, size=size, bs=args.bs, n=args.images)
    what = f'GPU epochs from the cache, {arch}, {size} px ({torch.cuda.get_device_name()})'
    us = Side('gpu', 'ours', cache=cache, **common)
    others = (('plain fastai, float32', '>= 3', dict(name='plain', **common)),
              ('random tensors on the GPU', '>= .9', dict(name='ours', cache=cache, resident=True, **common)))
    for against, goal, kwargs in others:
        them = Side('gpu', **kwargs)
        report(what, against, goal, 'images/s', in_turn(us, them, args.repeats))
        them.close()
    us.close()


def main(args):
    import torch
    if not torch.cuda.is_available(): return print('no GPU here: nothing measured')
    with tempfile.TemporaryDirectory() as cache:
        for arch in ('tf_efficientnet_lite0', 'resnet50'):
            for size in (128, 224): measure(arch, size, cache, args)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--bs', type=int, default=128, help='images in a batch')
    parser.add_argument('--images', type=int, default=5120, help='of an epoch')
    parser.add_argument('--repeats', type=int, default=3, help='pairs')
    main(parser.parse_args())
