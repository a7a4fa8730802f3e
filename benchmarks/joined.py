"""The network in the package: the mean of four, trained on HAM10000 and three quarters of MILK10k's lesions.

    HAM10000_DIR=... python benchmarks/joined.py --milk10k MILK10K --out runs/bundle

The table has five folds by lesion; the last quarter of MILK10k's lesions is for judging. HAM10000's folds are those of
HAM10000 alone, so that networks trained on the joined table are judged on the same held-out lesions as those trained on
HAM10000 only. At 224 pixels an epoch takes half an hour of a CPU core; on a GPU all four networks take minutes.
Afterwards packaged.py puts the bundle into the package.
"""
import argparse, hashlib, os
from pathlib import Path

import pandas as pd

from skin_lesions.classes import class_set, map_classes
from skin_lesions.readers import join_collections, read_csv_dataset, read_metadata
from skin_lesions.split import lesion_folds
from skin_lesions.train import FOLDS, SPLIT_SEED

CLASSES = 'HAM10000_SCC' # the seven, and squamous cell carcinoma


def read_milk10k(folder):
    "The part of MILK10k with its own diagnoses"
    folder = Path(folder)
    columns = dict(image_col='image_id', label_col='label', group_col='lesion_id')
    return read_csv_dataset(folder/'MILK10k_part.csv', **columns, classes='MILK10K', folder=folder/'images',
                            missing='drop')


def for_judging(lesions):
    "Which lesions no network is trained on: a quarter, by a hash of their id"
    return lesions.astype(str).map(lambda lesion: int(hashlib.sha256(lesion.encode()).hexdigest(), 16) % 4 == 0)


def dealt(meta, classes=CLASSES):
    "The images of the diagnoses in a class set, with a column `fold`"
    mapped = map_classes(meta, class_set(classes))
    known = mapped[mapped.dx.notna()].reset_index(drop=True)
    known.attrs = mapped.attrs
    return lesion_folds(known, FOLDS, SPLIT_SEED)


def joined(ham10000, milk10k):
    "The table to train on"
    milk = read_milk10k(milk10k)
    train = milk[~for_judging(milk.group)].reset_index(drop=True)
    train.attrs = milk.attrs
    ham = lesion_folds(read_metadata(ham10000), FOLDS, SPLIT_SEED)
    return join_collections(dict(HAM10000=ham, MILK10k=dealt(train)), CLASSES)


def judging(milk10k):
    "The lesions of MILK10k that no network is trained on, with their own diagnoses"
    milk = read_milk10k(milk10k)
    kept = milk[for_judging(milk.group)].reset_index(drop=True)
    kept.attrs = milk.attrs
    return kept


def main(args):
    from skin_lesions.reproduce import reproduce_bundle
    meta = joined(os.environ['HAM10000_DIR'], args.milk10k)
    reproduce_bundle(meta, args.out, 'ham10000', folds=args.folds, network='mean', split='own')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--milk10k', required=True, help='folder of MILK10k')
    parser.add_argument('--out', default='runs/bundle', help='folder of the bundle')
    parser.add_argument('--folds', type=int, nargs='+', default=[0, 1, 2, 3],
                        help='which networks are averaged; the weights of four take 40 MB')
    main(parser.parse_args())
