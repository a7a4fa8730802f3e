"""How well do probes on frozen ImageNet features tell the diagnoses of HAM10000? Fold 0 by lesion, with a control.

    python benchmarks/embed.py --data HAM10000 --cache FOLDER
"""
import argparse, json, platform
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
from skin_lesions.bootstrap import average_recall_interval
from skin_lesions.embed import Embedder, embed_images, knn_probe, probe
from skin_lesions.evaluate import compare, scores
from skin_lesions.readers import read_metadata
from skin_lesions.split import split_by_lesion

RESULTS = Path(__file__).parent/'results'


def row(table):
    "Scores of a table"
    interval, found = average_recall_interval(table), scores(table, warn=False)
    return dict(average_recall=round(interval.value, 4), low=round(interval.low, 4), high=round(interval.high, 4),
                accuracy=round(float(found['accuracy']), 4), macro_auc=round(float(found['macro_auc']), 4),
                chosen=table.attrs['chosen'][0])


def exchanged(features, seed=0):
    "Features with the diagnoses of the training lesions dealt to other ones"
    train = features.frame[~features.frame.is_valid]
    dx = train.groupby('group').dx.first()
    other = dict(zip(dx.index, np.random.default_rng(seed).permutation(dx)))
    return replace(features, frame=features.frame.assign(dx=features.frame.group.map(other).fillna(features.frame.dx)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='folder of HAM10000')
    parser.add_argument('--cache', type=Path, help='folder that keeps the features')
    parser.add_argument('--size', type=int, default=128)
    args = parser.parse_args()
    meta = split_by_lesion(read_metadata(args.data))
    embed = Embedder('tf_efficientnet_lite0', args.size, device='cpu')
    features = embed_images(meta, embed, cache=args.cache)
    linear, near = probe(features), knn_probe(features)
    control = probe(exchanged(features), penalties=[linear.attrs['chosen'][0]])
    difference = compare(near, linear).loc[('average_recall', 'all')]
    result = dict(date=str(date.today()), machine=f'{platform.machine()}, CPU', network='tf_efficientnet_lite0',
                  size=args.size,
                  split='by lesion, fold 0 of 5, seed 42', interval='95 %, bootstrap over lesions', images=len(linear),
                  lesions=int(linear.group.nunique()), unreadable=len(features.unreadable),
                  rows={'linear probe': row(linear), 'nearest neighbours': row(near), 'labels exchanged': row(control)},
                  linear_minus_neighbours={k: round(float(difference[k]), 4) for k in ('difference', 'low', 'high')})
    (RESULTS/'embed.json').write_text(json.dumps(result, indent=1)+'\n')
    print(json.dumps(result, indent=1))


if __name__ == '__main__': main()
