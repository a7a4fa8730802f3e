"""Grad-CAM here against the package grad-cam: one batch of 32 at 128 pixels, same network, layer and classes, both in this process in turn.

    python benchmarks/speed/gradcam.py
"""
import argparse, statistics, time

import numpy as np
import torch


def timed(run, cuda):
    "Seconds of one call"
    if cuda: torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda: torch.cuda.synchronize()
    return time.perf_counter() - start


def main(args):
    from pytorch_grad_cam import GradCAM as Package
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from skin_lesions.gradcam import GradCAM
    from skin_lesions.networks import LesionNet, TwoStageNet, create_body
    if args.threads: torch.set_num_threads(args.threads)
    torch.manual_seed(42)
    kind = TwoStageNet if args.model == 'two-stage' else LesionNet
    net = kind(create_body(args.arch, pretrained=False)).to(args.device).eval()
    if args.channels_last: net = net.to(memory_format=torch.channels_last)
    x, classes = torch.randn(args.bs, 3, args.size, args.size, device=args.device), [i % 7 for i in range(args.bs)]
    with GradCAM(net) as ours:
        first = ours.cam(x, classes)
        layer = next(iter(ours.layers.values()))
        with Package(model=net, target_layers=[net.get_submodule(layer)]) as package:
            targets = [ClassifierOutputTarget(c) for c in classes]
            theirs = package(input_tensor=x, targets=targets)
            r = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(first.cpu().numpy(), theirs) if a.std() and b.std()]
    # the hooks of one must not be there while the other is timed
    def run_ours():
        with GradCAM(net, layer) as g: g.cam(x, classes).cpu()
    def run_package():
        with Package(model=net, target_layers=[net.get_submodule(layer)]) as g: g(input_tensor=x, targets=targets)
    times = [(timed(run_ours, args.device == 'cuda'), timed(run_package, args.device == 'cuda')) for _ in range(args.repeats + 1)][1:]
    a, b = (statistics.median(t) for t in zip(*times))
    ratios = sorted(q/p for p, q in times)
    print(f'{args.model} {args.arch}, layer {layer}, {args.bs} images of {args.size} pixels, {args.device}, {torch.get_num_threads()} threads')
    print(f'here {a:.3f} s, grad-cam {b:.3f} s: {b/a:.2f} times as fast (median of {args.repeats} pairs; ratio from {ratios[0]:.2f} to {ratios[-1]:.2f}); smallest correlation of the maps {min(r):.6f} ({len(r)} images with a map)')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--arch', default='tf_efficientnet_lite0')
    parser.add_argument('--model', choices=('one-stage', 'two-stage'), default='two-stage')
    parser.add_argument('--bs', type=int, default=32)
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--threads', type=int, help='of PyTorch; without it, all')
    parser.add_argument('--channels-last', action='store_true', help="the network in channels_last memory order, as the learners have it")
    main(parser.parse_args())
