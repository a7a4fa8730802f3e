"""What hair removal and colour constancy cost an image, as a ratio to decoding it.

    python benchmarks/speed/preprocess.py --images FOLDER

Same JPEGs, one thread, alternately in one process.
"""
import argparse, os, statistics, time


def seconds(run, items):
    "Seconds for all items"
    start = time.perf_counter()
    for item in items: run(item)
    return time.perf_counter() - start


def decode(path):
    import numpy as np
    from PIL import Image
    return np.asarray(Image.open(path).convert('RGB'))


def describe(files, images):
    "Print which images are measured"
    from skin_lesions.preprocess import hair_mask
    sizes = sorted({image.shape[1::-1] for image in images})
    hairy = sum(hair_mask(image).any() for image in images)
    kilobytes = statistics.mean(os.path.getsize(f) for f in files)/1024
    print(f"{len(files)} images of {', '.join(f'{w}x{h}' for w, h in sizes)} pixels, mean file {kilobytes:.0f} KB; "
          f"hair found in {hairy}")


def main(args):
    import cv2
    from skin_lesions.core import image_files
    from skin_lesions.preprocess import RemoveHair, ShadesOfGray
    cv2.setNumThreads(1)
    files = image_files(args.images)[:args.n]
    images = [decode(f) for f in files]
    describe(files, images)
    steps = {'hair removal': RemoveHair().apply, 'shades of gray': ShadesOfGray().apply}
    rounds = [(seconds(decode, files), *(seconds(run, images) for run in steps.values()))
              for _ in range(args.repeats + 1)][1:]
    def milliseconds(i): return statistics.median(r[i] for r in rounds)/len(files)*1e3
    print(f"decoding: {milliseconds(0):.2f} ms an image (median of {args.repeats} rounds)")
    for i, name in enumerate(steps, 1):
        ratios = sorted(r[i]/r[0] for r in rounds)
        print(f"{name}: {milliseconds(i):.2f} ms an image, {statistics.median(ratios):.2f} times decoding "
              f"(ratio from {ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--images', required=True, help='folder of JPEGs as users have them')
    parser.add_argument('--n', type=int, default=200, help='at most so many images')
    parser.add_argument('--repeats', type=int, default=7, help='rounds')
    main(parser.parse_args())
