"""Training steps a second on the processor, EfficientNet-Lite0 at 128 pixels, batches of 64: the learner of this library with its defaults (mixUp, focal loss) against the learner that plain fastai builds.

    python benchmarks/speed/step.py

Timed from a batch's arrival to the optimiser's step, without the loader. With `--two-stage`, the two-stage learner against the one-stage learner of this library, training and prediction; with `--gains`, the learner against itself without one of its parts.
"""
import argparse, statistics, tempfile, time

from sides import Side, in_turn, report


def timed_steps(learn, n):
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


def loaders(folder, n, plain=False):
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.readers import read_metadata
    meta = read_metadata(folder)
    meta = meta.assign(is_valid=meta.index >= n)
    if not plain: return ham10000_dataloaders(meta, 128, bs=64, num_workers=0)
    from fastai.vision.all import CategoryBlock, ColReader, ColSplitter, DataBlock, ImageBlock, Normalize, Resize, aug_transforms, imagenet_stats
    return DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('path'), get_y=ColReader('dx'), splitter=ColSplitter(), item_tfms=Resize(128),
                     batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)]).dataloaders(meta, bs=64, num_workers=0)


def plain(folder, n):
    from fastai.vision.all import accuracy, vision_learner
    return timed_steps(vision_learner(loaders(folder, n, plain=True), 'tf_efficientnet_lite0', pretrained=False, metrics=accuracy), n)


def ours(folder, n, two_stage=False, keep_memory=True, **kwargs):
    from skin_lesions.learner import lesion_learner, two_stage_learner
    from skin_lesions.speed import ReuseMemory
    learn = (two_stage_learner if two_stage else lesion_learner)(loaders(folder, n), pretrained=False, **kwargs)
    if not keep_memory: learn.remove_cb(ReuseMemory)
    return timed_steps(learn, n)


def predictions(folder, n, two_stage):
    "A function that predicts a batch and returns images/s"
    import torch
    from skin_lesions.learner import lesion_learner, two_stage_learner
    from skin_lesions.core import reuse_memory
    reuse_memory()
    net = (two_stage_learner if two_stage else lesion_learner)(loaders(folder, n), pretrained=False).model.eval()
    x = torch.randn(64, 3, 128, 128)
    @torch.inference_mode()
    def run():
        start = time.perf_counter()
        for _ in range(4): net(x)
        return 256/(time.perf_counter() - start)
    return run


def main(args):
    from skin_lesions.synthetic import synthetic_ham10000
    with tempfile.TemporaryDirectory() as folder:
        synthetic_ham10000(folder, n_images=64*args.batches + 16, seed=0)
        common = dict(folder=folder, n=64*args.batches)
        if args.two_stage: rows = [('two-stage training step', 'one-stage training step', '>= 1/1.05', 'ours', dict(two_stage=True), 'ours', {}), ('two-stage prediction', 'one-stage prediction', '>= 1/1.05', 'predictions', dict(two_stage=True), 'predictions', dict(two_stage=False))]
        elif args.gains: rows = [('CPU training step, memory kept', 'the same without ReuseMemory', '', 'ours', {}, 'ours', dict(keep_memory=False)), ('CPU training step, channels_last', 'the same without channels_last', '', 'ours', {}, 'ours', dict(channels_last=False))]
        else: rows = [('CPU training step, EfficientNet-Lite0, 128 px, batch 64', "plain fastai's vision_learner", '>= 1.7', 'ours', {}, 'plain', {})]
        for what, against, goal, a, kwargs_a, b, kwargs_b in rows:
            sides = [Side('step', a, **common, **kwargs_a), Side('step', b, **common, **kwargs_b)]
            report(what, against, goal, 'images/s', in_turn(*sides, args.repeats))
            for s in sides: s.close()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--batches', type=int, default=5)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--two-stage', action='store_true')
    parser.add_argument('--gains', action='store_true', help='what each part brings')
    main(parser.parse_args())
