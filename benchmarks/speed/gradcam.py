"""Grad-CAM here against the package grad-cam: same images, network, layer and classes, alternately in this process.

    python benchmarks/speed/gradcam.py

The images of a folder, as they are when opened and prepared, batch by batch. On the CPU, CPU seconds are counted.
"""
import argparse, statistics, time

import numpy as np
import torch

from sides import report


def seconds(run, cuda):
    "Seconds of one call"
    if cuda: torch.cuda.synchronize()
    now = time.perf_counter if cuda else time.process_time
    start = now()
    run()
    if cuda: torch.cuda.synchronize()
    return now() - start


def network(args):
    "An untrained network of HAM10000's classes"
    from skin_lesions.classes import HAM10000
    from skin_lesions.networks import LesionNet, TwoStageNet, create_body
    torch.manual_seed(42)
    body = create_body(args.arch, pretrained=False)
    if args.model == 'two-stage': net = TwoStageNet(body, n_out=len(HAM10000), first=HAM10000.index(HAM10000.first))
    else: net = LesionNet(body, len(HAM10000))
    net = net.to(args.device).eval()
    return net.to(memory_format=torch.channels_last) if args.channels_last else net


def correlations(ours, theirs):
    "Correlation of both maps of each image that has a map"
    pairs = [(a.ravel(), b.ravel()) for a, b in zip(ours, theirs) if a.std() and b.std()]
    return [np.corrcoef(a, b)[0, 1] for a, b in pairs]


def main(args):
    from pytorch_grad_cam import GradCAM as PackageGradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from skin_lesions.classes import HAM10000
    from skin_lesions.gradcam import GradCAM
    if args.threads: torch.set_num_threads(args.threads)
    net = network(args)
    x = torch.randn(args.bs, 3, args.size, args.size, device=args.device)
    n = args.bs*args.batches
    classes = [i % len(HAM10000) for i in range(args.bs)]
    targets = [ClassifierOutputTarget(c) for c in classes]
    with GradCAM(net) as explain:
        explain.cam(x[:1], classes[:1])
        layer = next(iter(explain.layers.values()))
    module = net.get_submodule(layer)

    # each enters its own block, so that the hooks of one are not there while the other is timed
    def run_ours():
        with GradCAM(net, layer) as explain: return [explain.cam(x, classes).cpu() for _ in range(args.batches)][-1]
    def run_package():
        with PackageGradCAM(model=net, target_layers=[module]) as explain:
            return [explain(input_tensor=x, targets=targets) for _ in range(args.batches)][-1]

    r = correlations(run_ours().numpy(), run_package())
    cuda = args.device == 'cuda'
    times = [(seconds(run_ours, cuda), seconds(run_package, cuda)) for _ in range(args.repeats + 1)][1:]
    ours, package = (statistics.median(t) for t in zip(*times))
    ratios = sorted(b/a for a, b in times)
    print(f'{args.model} {args.arch}, layer {layer}, {n} images of {args.size} pixels, {args.device}, '
          f'{torch.get_num_threads()} threads')
    print(f'here {ours:.3f} s, grad-cam {package:.3f} s: {statistics.median(ratios):.2f} times as fast '
          f'(median of {args.repeats} pairs; ratio from {ratios[0]:.2f} to {ratios[-1]:.2f})')
    print(f'smallest correlation of the maps {min(r):.6f} ({len(r)} images with a map)')
    found = dict(ours=n/ours, theirs=n/package, ratio=statistics.median(ratios), lowest=ratios[0],
                 highest=ratios[-1], pairs=args.repeats)
    what = f'Grad-CAM of {n} images, {args.model} {args.arch}, {args.size} px, {args.device}'
    report(what, 'the package grad-cam', '>= 5', 'images/s' if cuda else 'images/CPU s', found)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--arch', default='tf_efficientnet_lite0', help='timm architecture')
    parser.add_argument('--model', choices=('one-stage', 'two-stage'), default='two-stage')
    parser.add_argument('--bs', type=int, default=32, help='images in the batch')
    parser.add_argument('--batches', type=int, default=8)
    parser.add_argument('--size', type=int, default=128, help='side of the images, pixels')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--repeats', type=int, default=3, help='pairs')
    parser.add_argument('--threads', type=int, help='of PyTorch; without it, all')
    parser.add_argument('--channels-last', action='store_true', help='memory order as the learners give it')
    main(parser.parse_args())
