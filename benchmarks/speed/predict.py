"""Images a second from a folder of JPEGs to a table of probabilities on the CPU: a bundle against plain fastai.

    HAM10000_DIR=... python benchmarks/speed/predict.py

`load_predictor(run).predict(folder)` against a loop over `load_learner(file).predict(image)` of plain fastai, for
JPEGs as cameras make them and for the smaller working copies.
"""
import argparse, os, tempfile, time
from pathlib import Path

from sides import Side, in_turn, report

ARCH = 'tf_efficientnet_lite0'


def ours(folder, bundle, network=True):
    "The whole way; without the network, the same images are opened, cropped and put into batches"
    import numpy as np
    import torch
    from skin_lesions.predict import load_predictor
    predictor = load_predictor(bundle, 'cpu')
    n_classes = len(predictor.codes)

    def constant(images, patient=None, views=None):
        return np.full((len(torch.stack(list(images))), n_classes), 1/n_classes), None

    if not network: predictor.answer = constant
    def run():
        start = time.perf_counter()
        n = len(predictor.predict(folder, progress=False))
        return n/(time.perf_counter() - start)
    return run


def network(folder, bundle):
    "The network alone on as many images, in batches of 64"
    import torch
    from skin_lesions.predict import load_predictor
    predictor = load_predictor(bundle, 'cpu')
    n = len(list(Path(folder).rglob('*.jpg')))
    pixels = torch.randint(256, (64, 3, *predictor.size), dtype=torch.uint8)
    def run():
        start = time.perf_counter()
        for i in range(0, n, 64): predictor.answer(pixels[:n-i])
        return n/(time.perf_counter() - start)
    return run


def plain(folder, exported):
    from fastai.learner import load_learner
    learn = load_learner(exported)
    files = sorted(Path(folder).rglob('*.jpg'))
    def run():
        start = time.perf_counter()
        with learn.no_bar(), learn.no_logging():
            for f in files: learn.predict(f)
        return len(files)/(time.perf_counter() - start)
    return run


def save_networks(tmp):
    "An untrained network as a bundle, and one of plain fastai exported"
    from fastai.vision.all import CategoryBlock, ColReader, DataBlock, ImageBlock, Resize, vision_learner
    from skin_lesions.bundle import save_bundle
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import two_stage_learner
    from skin_lesions.readers import read_metadata
    from skin_lesions.synthetic import synthetic_dataset
    meta = read_metadata(synthetic_dataset(tmp/'data', 60, seed=0))
    dls = ham10000_dataloaders(meta, 128, bs=8, arch=ARCH, num_workers=0)
    save_bundle(two_stage_learner(dls, ARCH, pretrained=False), tmp/'bundle')
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('path'), get_y=ColReader('dx'),
                      item_tfms=Resize(128))
    vision_learner(block.dataloaders(meta, bs=8, num_workers=0), ARCH, pretrained=False).export(tmp/'plain.pkl')


def measure(folder, tmp, n, what, repeats):
    "The whole prediction of a folder and its two parts, each against plain fastai"
    rows = (('ours', {}, f'prediction of a folder of {n} {what}, CPU, EfficientNet-Lite0, 128 px', '>= 10'),
            ('ours', dict(network=False), f'of this, opening and preparing the {what}', ''),
            ('network', {}, f'of this, the network ({what})', ''))
    them = Side('predict', 'plain', folder=str(folder), exported=str(tmp/'plain.pkl'))
    for function, kwargs, row, goal in rows:
        us = Side('predict', function, folder=str(folder), bundle=str(tmp/'bundle'), **kwargs)
        report(row, 'a loop with load_learner().predict', goal, 'images/s', in_turn(us, them, repeats))
        us.close()
    them.close()


def main(args):
    from skin_lesions.readers import read_metadata
    data, n = Path(os.environ['HAM10000_DIR']), args.images
    sources = {'600x450 JPEGs': sorted((data/'original_quality').rglob('*.jpg')),
               '300x225 JPEGs': sorted(read_metadata(data).path)[:n]}
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        save_networks(tmp)
        for what, files in sources.items():
            folder = tmp/what
            folder.mkdir()
            for i in range(n): (folder/f'{i:04}.jpg').symlink_to(files[i % len(files)])
            measure(folder, tmp, n, what, args.repeats)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--repeats', type=int, default=3, help='pairs')
    parser.add_argument('--images', type=int, default=256, help='in a folder; originals come repeatedly')
    main(parser.parse_args())
