"""Cost of the pretexts, as ratios measured in one run.

    python benchmarks/speed/pretext.py [--threads 1]

1. `disorder_context` on a batch of 64 at 128 pixels, 20 swaps, against the algorithm written line by line (each image, each swap, each pixel), and against the same with one slice a patch.
2. A training step of each pretext against the plain training step of the same network: rotation against EfficientNet-Lite0 with six outputs, restoration against the U-Net fed the images as they are.
"""
import argparse, statistics, time

import torch
from torch.nn import functional as F


def seconds(f, n):
    "Median time of a call after one to warm up"
    f()
    times = []
    for _ in range(n):
        start = time.perf_counter(); f(); times.append(time.perf_counter()-start)
    return statistics.median(times)


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


def disorder():
    from skin_lesions.pretext import disorder_context, draw_swaps, swap_patches
    x = torch.randn(64, 3, 128, 128)
    for grid in (True, False):
        swaps = draw_swaps(64, (128, 128), 8, 20, grid)
        assert torch.equal(swap_patches(x, swaps, 8, grid), by_pixel(x, swaps, 8))
        ours = seconds(lambda: disorder_context(x, 8, 20, grid), 20)
        for name, loop, n in (('pixel loop', by_pixel, 1), ('slice loop', by_slice, 5)):
            slow = seconds(lambda: loop(x, draw_swaps(64, (128, 128), 8, 20, grid), 8), n)
            print(f"disorder_context, {'grid' if grid else 'anywhere':8}  {name}: {slow/ours:7.1f} times as long")


def steps():
    from skin_lesions.networks import LesionNet, create_body
    from skin_lesions.pretext import PredictRotation, RestorationNet, RestoreContext
    x, k = torch.randn(64, 3, 128, 128), torch.randint(6, (64,))
    def step(net, loss, draw):
        opt = torch.optim.Adam(net.parameters())
        def f():
            a, b = draw(x)
            opt.zero_grad(); loss(net(a), b).backward(); opt.step()
        return f
    rotation, restoration = PredictRotation(6), RestoreContext(8, 20)
    body = lambda: create_body(pretrained=False)
    rows = (('rotation', LesionNet(body(), 6, (), 0.), F.cross_entropy, lambda x: (x, k), rotation.draw),
            ('restoration', RestorationNet(body(), (128, 128)), F.mse_loss, lambda x: (x, x), restoration.draw))
    for name, net, loss, plain, draw in rows:
        net = net.to(memory_format=torch.channels_last)
        a, b = step(net, loss, plain), step(net, loss, draw)
        a(); b()
        pairs = []
        for _ in range(3): # alternating, so that other work on the machine meets both
            start = time.perf_counter(); a(); middle = time.perf_counter(); b(); end = time.perf_counter()
            pairs.append((end-middle)/(middle-start))
        print(f"{name}: a pretext step takes {statistics.median(pairs):.2f} of the plain step of the same network")


if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--threads', type=int, default=1)
    torch.set_num_threads(p.parse_args().threads)
    disorder(); steps()
