"""Pictures a second from a folder of JPEGs, as cameras make them and as the smaller working copies, to a table of probabilities on the processor: `load_predictor(run).predict(folder)` against a loop over `load_learner(file).predict(picture)` of plain fastai.

    HAM10000_DIR=... python benchmarks/speed/predict.py
"""
import argparse, os, tempfile, time
from pathlib import Path

import torch
from sides import Side, in_turn, report


def ours(folder, bundle, network=True):
    "The whole way; without the network, the same pictures are opened, cropped and put into batches"
    from skin_lesions.predict import load_predictor
    predictor = load_predictor(bundle)
    if not network: predictor._answers = lambda xb, patient, tta: (torch.full((len(xb), 7), 1/7).numpy(), float('nan'))
    def run():
        start = time.perf_counter()
        n = len(predictor.predict(folder, progress=False))
        return n/(time.perf_counter() - start)
    return run


def network(folder, bundle):
    "The network alone on as many pictures, in batches of 64"
    from skin_lesions.predict import load_predictor
    predictor,n = load_predictor(bundle),len(list(Path(folder).rglob('*.jpg')))
    x = torch.rand(64, 3, 128, 128)
    def run():
        start = time.perf_counter()
        for i in range(0, n, 64): predictor.probabilities(x[:n-i])
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


def main(args):
    from fastai.vision.all import CategoryBlock, ColReader, DataBlock, ImageBlock, Resize, vision_learner
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.readers import read_metadata
    from skin_lesions.learner import two_stage_learner
    from skin_lesions.bundle import save_bundle
    from skin_lesions.synthetic import synthetic_ham10000
    with tempfile.TemporaryDirectory() as tmp:
        meta = read_metadata(synthetic_ham10000(Path(tmp)/'data', n_images=60, seed=0))
        save_bundle(two_stage_learner(ham10000_dataloaders(meta, 128, bs=8, num_workers=0), pretrained=False), Path(tmp)/'bundle')
        dls = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('path'), get_y=ColReader('dx'), item_tfms=Resize(128)).dataloaders(meta, bs=8, num_workers=0)
        vision_learner(dls, 'tf_efficientnet_lite0', pretrained=False).export(Path(tmp)/'plain.pkl')
        data,n = Path(os.environ['HAM10000_DIR']),args.pictures
        for what,files in (('600x450 JPEGs', sorted((data/'original_quality').rglob('*.jpg'))), ('300x225 JPEGs', sorted(read_metadata(data).path)[:n])):
            folder = Path(tmp)/what
            folder.mkdir()
            for i in range(n): (folder/f'{i:04}.jpg').symlink_to(files[i%len(files)])
            plain = Side('predict', 'plain', folder=str(folder), exported=str(Path(tmp)/'plain.pkl'))
            for function, kwargs, row, goal in (('ours', {}, f'prediction of a folder of {n} {what}, CPU, EfficientNet-Lite0, 128 px', '>= 10'), ('ours', dict(network=False), f'of this, opening and preparing the {what}', ''), ('network', {}, f'of this, the network ({what})', '')):
                side = Side('predict', function, folder=str(folder), bundle=str(Path(tmp)/'bundle'), **kwargs)
                report(row, 'a loop with load_learner().predict', goal, 'images/s', in_turn(side, plain, args.repeats))
                side.close()
            plain.close()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--pictures', type=int, default=256, help='in a folder; the 62 of original quality come again and again')
    main(parser.parse_args())
