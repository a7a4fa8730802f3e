"""Training steps on the CPU, in images a second: this library's learner with its defaults against plain fastai's.

    python benchmarks/speed/step.py

EfficientNet-Lite0 at 128 pixels, batches of 64. Timed from a batch's arrival to the optimiser's step, without the
DataLoader. With `--two-stage`, the two-stage learner against the one-stage learner of this library, training and
prediction; with `--gains`, the learner against itself without one of its parts; with `--compile`, with `torch.compile`
against without, where the first pair, which compiles, does not count.
"""
import argparse, statistics, tempfile, time

from sides import Side, in_turn, report

ARCH = 'tf_efficientnet_lite0'


def timed_steps(learn):
    "A function that trains for an epoch and returns the median images/s of its steps, the first left out"
    from fastai.callback.core import Callback

    class First(Callback):
        order = -1000
        def before_batch(self): self.learn.started = time.perf_counter()

    class Last(Callback):
        order = 1000
        def after_batch(self):
            if self.training: self.learn.rates.append(len(self.xb[0])/(time.perf_counter() - self.learn.started))

    learn.add_cbs([First(), Last()])
    def run():
        learn.rates = []
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return statistics.median(learn.rates[1:])
    return run


def frame(folder, n):
    "The synthetic images, the first `n` for training"
    from skin_lesions.readers import read_metadata
    meta = read_metadata(folder)
    return meta.assign(is_valid=meta.index >= n)


def plain(folder, n, num_workers=0):
    from fastai.vision.all import (CategoryBlock, ColReader, ColSplitter, DataBlock, ImageBlock, Normalize, Resize,
                                   accuracy, aug_transforms, imagenet_stats, vision_learner)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('path'), get_y=ColReader('dx'),
                      splitter=ColSplitter(), item_tfms=Resize(128),
                      batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)])
    dls = block.dataloaders(frame(folder, n), bs=64, num_workers=num_workers)
    return timed_steps(vision_learner(dls, ARCH, pretrained=False, metrics=accuracy))


def learner(folder, n, two_stage, cache=None, **kwargs):
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner, two_stage_learner
    meta = frame(folder, n)
    if cache is not None:
        from skin_lesions.cache import resize_cache
        cache = resize_cache(meta, 128, folder=cache, show=False)
    dls = ham10000_dataloaders(meta, 128, bs=64, arch=ARCH, num_workers=0, cache=cache)
    return (two_stage_learner if two_stage else lesion_learner)(dls, ARCH, pretrained=False, **kwargs)


def ours(folder, n, two_stage=False, keep_memory=True, compiled=False, **kwargs):
    from skin_lesions.speed import ReuseMemory
    learn = learner(folder, n, two_stage, **kwargs)
    if not keep_memory: learn.remove_cb(ReuseMemory)
    if compiled: learn.model.compile(dynamic=False)
    return timed_steps(learn)


def predictions(folder, n, two_stage):
    "A function that predicts batches and returns images/s"
    import torch
    from skin_lesions.core import reuse_memory
    reuse_memory()
    net = learner(folder, n, two_stage).model.eval()
    x = torch.randn(64, 3, 128, 128)

    @torch.inference_mode()
    def run():
        start = time.perf_counter()
        for _ in range(4): net(x)
        return 256/(time.perf_counter() - start)
    return run


# what, against, goal, then function and arguments of both sides
DEFAULTS = (('CPU training step, EfficientNet-Lite0, 128 px, batch 64', "plain fastai's vision_learner", '>= 1.7',
             'ours', {}, 'plain', {}),)
TWO_STAGE = (('two-stage training step', 'one-stage training step', '>= 1/1.05',
              'ours', dict(two_stage=True), 'ours', {}),
             ('two-stage prediction', 'one-stage prediction', '>= 1/1.05',
              'predictions', dict(two_stage=True), 'predictions', dict(two_stage=False)))
GAINS = (('CPU training step, memory kept', 'the same without ReuseMemory', '',
          'ours', {}, 'ours', dict(keep_memory=False)),
         ('CPU training step, channels_last', 'the same without channels_last', '',
          'ours', {}, 'ours', dict(channels_last=False)))
COMPILED = (('CPU training step, torch.compile', 'the same without it', '>= 1.3',
             'ours', dict(compiled=True), 'ours', {}),)


def main(args):
    from skin_lesions.synthetic import synthetic_dataset
    rows = TWO_STAGE if args.two_stage else GAINS if args.gains else COMPILED if args.compile else DEFAULTS
    with tempfile.TemporaryDirectory() as folder:
        n = 64*args.batches
        synthetic_dataset(folder, n + 16, seed=0)
        for what, against, goal, our_function, our_kwargs, their_function, their_kwargs in rows:
            us = Side('step', our_function, folder=folder, n=n, **our_kwargs)
            them = Side('step', their_function, folder=folder, n=n, **their_kwargs)
            report(what, against, goal, 'images/s', in_turn(us, them, args.repeats))
            for s in (us, them): s.close()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--batches', type=int, default=5, help='of an epoch, 2 or more')
    parser.add_argument('--repeats', type=int, default=3, help='pairs')
    parser.add_argument('--two-stage', action='store_true', help='two stages against one')
    parser.add_argument('--gains', action='store_true', help='what each part brings')
    parser.add_argument('--compile', action='store_true', help='what torch.compile brings, minutes of compiling')
    main(parser.parse_args())
