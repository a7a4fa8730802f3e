"""Pictures a second from a folder of JPEGs to a table of probabilities on the processor: `load_predictor(run).predict(folder)` against a loop over `load_learner(file).predict(picture)` of plain fastai.

    HAM10000_DIR=... python benchmarks/speed_predict.py
"""
import argparse, os, tempfile, time
from pathlib import Path

from sides import Side, in_turn, report


def ours(folder, bundle):
    from skin_lesions.predict import load_predictor
    predictor = load_predictor(bundle)
    def run():
        start = time.perf_counter()
        n = len(predictor.predict(folder, progress=False))
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
    from skin_lesions.dataset import read_metadata
    from skin_lesions.learner import two_stage_learner
    from skin_lesions.predict import save_bundle
    from skin_lesions.synthetic import synthetic_ham10000
    folder = str(Path(os.environ['HAM10000_DIR'])/'original_quality')
    with tempfile.TemporaryDirectory() as tmp:
        meta = read_metadata(synthetic_ham10000(Path(tmp)/'data', n_images=60, seed=0))
        save_bundle(two_stage_learner(ham10000_dataloaders(meta, 128, bs=8, num_workers=0), pretrained=False), Path(tmp)/'bundle')
        dls = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('path'), get_y=ColReader('dx'), item_tfms=Resize(128)).dataloaders(meta, bs=8, num_workers=0)
        vision_learner(dls, 'tf_efficientnet_lite0', pretrained=False).export(Path(tmp)/'plain.pkl')
        sides = [Side('speed_predict', 'ours', folder=folder, bundle=str(Path(tmp)/'bundle')), Side('speed_predict', 'plain', folder=folder, exported=str(Path(tmp)/'plain.pkl'))]
        report('prediction of a folder of 600x450 JPEGs, CPU, EfficientNet-Lite0, 128 px', 'a loop with load_learner().predict', '>= 10', 'images/s', in_turn(*sides, args.repeats))
        for s in sides: s.close()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--repeats', type=int, default=3)
    main(parser.parse_args())
