"""What an image of the same lesion in training is worth on HAM10000: nearest neighbours, with and without the lesion.

    python benchmarks/split_leak.py --data HAM10000

For page 91. Each image goes once through EfficientNet-Lite0 with ImageNet weights. The image whose features are nearest
names the class: once among all other images (a split by image, at its limit of one validation image), once among images
of other lesions (a split by lesion). Same images, same features; only images of the lesion itself are missing.
The result goes to benchmarks/results/split_leak.json, with paired intervals over lesions.
"""
import argparse, datetime, json, platform
from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(__file__).resolve().parent/'results'


def features_of(meta, size, bs):
    "Each image as the body of the network sees it: [n, features], standardised"
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner
    from skin_lesions.ood import get_features
    sides = meta.assign(is_valid=np.arange(len(meta)) % 5 == 0) # any two sides: nothing is trained
    dls = ham10000_dataloaders(sides, size=size, bs=bs, num_workers=0)
    features = get_features(lesion_learner(dls, 'tf_efficientnet_lite0', pretrained=True), meta)[:, :1280]
    return (features-features.mean(0))/(features.std(0)+1e-6)


def nearest(features, groups, block=500):
    "For each image the nearest of all others, and the nearest of another lesion"
    squares, found = (features**2).sum(1), ([], [])
    for i in range(0, len(features), block):
        rows = slice(i, i+block)
        distance = squares - 2*features[rows]@features.T # up to what is the same for all
        distance[np.arange(len(distance)), np.arange(i, i+len(distance))] = np.inf
        found[0].append(distance.argmin(1))
        distance[groups[rows, None] == groups[None]] = np.inf
        found[1].append(distance.argmin(1))
    return tuple(np.concatenate(f) for f in found)


def table_of(meta, neighbours):
    "A predictions table: all probability to the class of the neighbour"
    from skin_lesions.classes import HAM10000, with_classes
    called = meta.dx.to_numpy()[neighbours]
    ones = {c: (called == c).astype(float) for c in HAM10000}
    return with_classes(meta[['image_id', 'dx', 'group']].assign(**ones), HAM10000)


def judged(tables):
    "Scores of both tables and their paired difference"
    from skin_lesions.bootstrap import average_recall_interval, compare_tables
    from skin_lesions.evaluate import class_scores, scores
    image, lesion = tables
    sides = {name: scores(t) | average_recall_interval(t)._asdict() | dict(recall=class_scores(t).recall.to_dict())
             for name, t in zip(('all other images', 'other lesions'), tables)}
    keep = ('n_images', 'n_lesions', 'accuracy', 'average_recall', 'low', 'high', 'recall')
    return {n: {k: s[k] for k in keep} for n, s in sides.items()} | dict(difference=compare_tables(lesion, image))


def main(args):
    from skin_lesions.core import versions
    from skin_lesions.readers import read_metadata
    meta = read_metadata(args.data)
    groups, several = pd.factorize(meta.group)[0], meta.group.duplicated(keep=False).to_numpy()
    tables = [table_of(meta, n) for n in nearest(features_of(meta, args.size, args.bs), groups)]
    some = [t[several].reset_index(drop=True) for t in tables]
    found = dict(date=datetime.date.today().isoformat(), machine=f'CPU, {platform.machine()}', versions=versions(),
                 body='tf_efficientnet_lite0 with ImageNet weights, as it is', size=args.size,
                 interval='95 %, bootstrap over lesions drawn class by class, 1,000 draws, with half lesions (page 59)',
                 **{'all images': judged(tables), 'lesions with several images': judged(some)})
    Path(args.out).write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default=None, help='folder of HAM10000; without it, the usual places are searched')
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--bs', type=int, default=128)
    parser.add_argument('--out', default=RESULTS/'split_leak.json')
    main(parser.parse_args())
