"""Cost of the pretexts, as ratios measured in one run.

    python benchmarks/speed/pretext.py [--threads 1]

1. `disorder_context` on a batch of 64 at 128 pixels, 20 swaps, against the algorithm written line by line (each image,
   each swap, each pixel), and against the same with one slice a patch.
2. A training step of each pretext against the plain training step of the same network: rotation against
   EfficientNet-Lite0 with six outputs, restoration against the U-Net fed the images as they are.
"""
import argparse, statistics, time

import torch
from torch.nn import functional as F

PATCH, SWAPS, ANGLES = 8, 20, 6


def seconds(f):
    "Seconds of one call"
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def in_turn(a, b, repeats):
    "Median of the time of `b` in that of `a`, pair by pair; the first pair warms up"
    pairs = [(seconds(a), seconds(b)) for _ in range(repeats + 1)][1:]
    return statistics.median(second/first for first, second in pairs)


def by_pixel(x, swaps, patch):
    "Algorithm 1, line by line"
    x = x.clone()
    for image, pairs in zip(x, swaps.tolist()):
        for (y1, x1), (y2, x2) in pairs:
            for i in range(patch):
                for j in range(patch):
                    a, b = image[:, y1+i, x1+j].clone(), image[:, y2+i, x2+j].clone()
                    image[:, y1+i, x1+j], image[:, y2+i, x2+j] = b, a
    return x


def by_slice(x, swaps, patch):
    "The same with a slice for a patch"
    x = x.clone()
    for image, pairs in zip(x, swaps.tolist()):
        for (y1, x1), (y2, x2) in pairs:
            a = image[:, y1:y1+patch, x1:x1+patch].clone()
            image[:, y1:y1+patch, x1:x1+patch] = image[:, y2:y2+patch, x2:x2+patch]
            image[:, y2:y2+patch, x2:x2+patch] = a
    return x


def disorder(args):
    "`disorder_context` against both loops"
    from skin_lesions.pretext import disorder_context, draw_swaps, swap_patches
    size = args.size, args.size
    x = torch.randn(args.bs, 3, *size)
    for grid in (True, False):
        swaps = draw_swaps(args.bs, size, PATCH, SWAPS, grid)
        assert torch.equal(swap_patches(x, swaps, PATCH, grid), by_pixel(x, swaps, PATCH))
        for name, loop, repeats in (('pixel loop', by_pixel, 1), ('slice loop', by_slice, args.repeats)):
            def ours(): disorder_context(x, PATCH, SWAPS, grid)
            def theirs(): loop(x, draw_swaps(args.bs, size, PATCH, SWAPS, grid), PATCH)
            ratio = in_turn(ours, theirs, repeats)
            print(f"disorder_context, {'grid' if grid else 'anywhere':8}  {name}: {ratio:7.1f} times as long")


def training_step(net, loss, make_batch, x):
    "A function that makes a batch of images and takes a step"
    opt = torch.optim.Adam(net.parameters())
    def run():
        inputs, targets = make_batch(x)
        opt.zero_grad()
        loss(net(inputs), targets).backward()
        opt.step()
    return run


def steps(args):
    "A step of each pretext against the plain step of the same network"
    from skin_lesions.networks import LesionNet, create_body
    from skin_lesions.pretext import PredictRotation, RestorationNet, RestoreContext
    size = args.size, args.size
    x, angles = torch.randn(args.bs, 3, *size), torch.randint(ANGLES, (args.bs,))
    rotation = LesionNet(create_body(pretrained=False), ANGLES, (), 0.)
    restoration = RestorationNet(create_body(pretrained=False), size)
    rows = (('rotation', rotation, F.cross_entropy, lambda x: (x, angles), PredictRotation(ANGLES).draw),
            ('restoration', restoration, F.mse_loss, lambda x: (x, x), RestoreContext(PATCH, SWAPS).draw))
    for name, net, loss, plain, pretext in rows:
        net = net.to(memory_format=torch.channels_last)
        ratio = in_turn(training_step(net, loss, plain, x), training_step(net, loss, pretext, x), args.repeats)
        print(f'{name}: a pretext step takes {ratio:.2f} of the plain step of the same network')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--threads', type=int, default=1, help='of PyTorch')
    parser.add_argument('--bs', type=int, default=64, help='images in a batch')
    parser.add_argument('--size', type=int, default=128, help='side of the images, pixels')
    parser.add_argument('--repeats', type=int, default=5, help='pairs')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disorder(args)
    steps(args)
