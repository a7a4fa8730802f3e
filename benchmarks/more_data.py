"""What MILK10k's images in the training bring, and what they cost on HAM10000: the recipe `best` without and with them.

    python benchmarks/more_data.py --without runs/best_fold0 --with runs/best_joined_fold0 --milk10k MILK10K
    python benchmarks/more_data.py

Both networks held out the same lesions of HAM10000 (fold 0), and neither has seen the quarter of MILK10k's lesions that
`joined.py` keeps for judging. The first form also asks them about that quarter. Probabilities of squamous cell
carcinoma, which HAM10000 does not have, are added to those of actinic keratosis and Bowen's disease. Writes
benchmarks/results/more_data.csv.gz (predictions) and more_data.json; the second form reads the former.
"""
import argparse, json
from datetime import date
from pathlib import Path

import pandas as pd

from skin_lesions.classes import HAM10000, class_map, with_classes
from skin_lesions.core import write_json
from skin_lesions.evaluate import compare

RESULTS = Path(__file__).parent/'results'
SIDES = ('without', 'with')
SCORES = dict(accuracy=('accuracy', 'all'), average_recall=('recall', 'macro'), macro_auc=('auc', 'macro'),
              auc_malignant=('auc', 'malignant'))


def seven(table):
    "Probabilities of HAM10000's diagnoses"
    table = table.copy()
    if 'sccka' in table: table['akiec'] = table.akiec + table.sccka
    return table[['image_id', *HAM10000, 'dx', 'group']]


def asked(run, milk10k):
    "What the network of a run says of MILK10k's lesions for judging that have one of the seven diagnoses"
    from joined import judging
    from skin_lesions.predict import load_predictor
    meta = judging(milk10k)
    meta = meta.assign(dx=meta.dx.map(class_map('MILK10K', HAM10000)))
    meta = meta[meta.dx.notna()].reset_index(drop=True)
    table = load_predictor(run, 'cpu').predict(meta.drop(columns='dx'), progress=False)
    return table.assign(dx=meta.dx.to_numpy(), group=meta.group.to_numpy())


def tables_of(args):
    "One table of all predictions, with the side and the collection"
    from skin_lesions.predictions import read_predictions
    ham = {side: read_predictions(getattr(args, side)/'predictions.csv') for side in SIDES}
    ham['with'] = ham['with'][ham['with'].image_id.isin(ham['without'].image_id)]
    parts = [seven(ham[side]).assign(side=side, collection='HAM10000') for side in SIDES]
    parts += [seven(asked(getattr(args, side), args.milk10k)).assign(side=side, collection='MILK10k') for side in SIDES]
    return pd.concat(parts, ignore_index=True)


def differences(table):
    "Each score without and with, and the difference with its interval over lesions"
    sides = [with_classes(table[table.side == s].drop(columns=['side', 'collection']).reset_index(drop=True), HAM10000)
             for s in SIDES]
    found = compare(*sides)
    rows = {name: {k: round(float(found.loc[row, k]), 4) for k in ('a', 'b', 'difference', 'low', 'high')}
            for name, row in SCORES.items()}
    return dict(images=len(sides[0]), lesions=int(sides[0].group.nunique()), scores=rows)


def main(args):
    stored = RESULTS/'more_data.csv.gz'
    if args.without:
        packed = dict(index=False, float_format='%.5f', compression=dict(method='gzip', mtime=0))
        tables_of(args).to_csv(stored, **packed)
    table = pd.read_csv(stored, dtype=dict(group=str))
    found = {name: differences(part) for name, part in table.groupby('collection')}
    write_json(dict(date=date.today().isoformat(), recipe='best', fold=0, seed=42, collections=found),
               RESULTS/'more_data.json')
    for name, part in found.items(): print(name, part['images'], pd.DataFrame(part['scores']).T.to_string(), sep='\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--without', type=Path, help='run of `best` on HAM10000, fold 0')
    parser.add_argument('--with', type=Path, help='run of `best` on the joined table, fold 0')
    parser.add_argument('--milk10k', help='folder of MILK10k')
    main(parser.parse_args())
