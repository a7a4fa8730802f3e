"""What hair removal and colour constancy cost an image, as a ratio to decoding it: same JPEGs, one thread, each in turn in one process.

    python benchmarks/speed/preprocess.py --images FOLDER
"""
import argparse, os, statistics, time


def timed(run, items):
    "Seconds for all items"
    start = time.perf_counter()
    for item in items: run(item)
    return time.perf_counter() - start


def main(args):
    import cv2
    import numpy as np
    from PIL import Image
    from skin_lesions.core import image_files
    from skin_lesions.preprocess import RemoveHair, ShadesOfGray, hair_mask
    cv2.setNumThreads(1)
    files = image_files(args.images)[:args.n]
    def decode(path): return np.asarray(Image.open(path).convert('RGB'))
    pictures = [decode(f) for f in files]
    sizes = sorted({p.shape[1::-1] for p in pictures})
    hairy = sum(hair_mask(p).any() for p in pictures)
    print(f"{len(files)} images of {', '.join(f'{w}x{h}' for w, h in sizes)} pixels, mean file {statistics.mean(os.path.getsize(f) for f in files)/1024:.0f} KB; hair found in {hairy}")
    steps = {'hair removal': RemoveHair().apply, 'shades of gray': ShadesOfGray().apply}
    times = [(timed(decode, files), *(timed(run, pictures) for run in steps.values())) for _ in range(args.repeats + 1)][1:]
    print(f"decoding: {statistics.median(t[0] for t in times)/len(files)*1e3:.2f} ms an image (median of {args.repeats} rounds)")
    for i, name in enumerate(steps, 1):
        ratios = sorted(t[i]/t[0] for t in times)
        print(f"{name}: {statistics.median(t[i] for t in times)/len(files)*1e3:.2f} ms an image, {statistics.median(ratios):.2f} times decoding (ratio from {ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--images', required=True, help='folder of JPEGs as users have them')
    parser.add_argument('--n', type=int, default=200, help='at most so many images')
    parser.add_argument('--repeats', type=int, default=7)
    main(parser.parse_args())
