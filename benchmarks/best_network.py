"""What the recipe `best` reaches on held-out lesions: the predictions of its finished runs, kept, and their scores.

    python benchmarks/best_network.py runs/fold0 runs/fold1
    python benchmarks/best_network.py

Each run held another fold by lesion out. Calibration and rule are fitted on other lesions than they are judged on.
Writes benchmarks/results/best.csv.gz (predictions) and benchmarks/results/best.json (scores, with intervals over
lesions). Without runs it scores the stored predictions again.
"""
import argparse, json
from datetime import date
from pathlib import Path

import pandas as pd

from skin_lesions.classes import HAM10000, classes_of, with_classes
from skin_lesions.core import write_json
from skin_lesions.decide import fit_decisions
from skin_lesions.evaluate import score_intervals
from skin_lesions.predictions import read_predictions

RESULTS = Path(__file__).parent/'results'


def pooled(runs):
    "The held-out predictions of all runs, with the fold"
    tables = []
    for run in runs:
        record = json.loads((run/'run.json').read_text())
        tables.append(read_predictions(run/'predictions.csv').assign(fold=record['asked']['fold']))
    return with_classes(pd.concat(tables, ignore_index=True), classes_of(tables[0]))


def one_score(table):
    "The scores of a table that a reader asks for first, with intervals"
    found,rows = score_intervals(table),dict(accuracy=('accuracy', 'all'), average_recall=('recall', 'macro'))
    rows |= dict(macro_auc=('auc', 'macro'), auc_malignant=('auc', 'malignant'))
    return {name: {k: round(float(found.loc[row, k]), 4) for k in ('value', 'low', 'high')} for name,row in rows.items()
            if row in found.index}


def keep(table):
    "Store the predictions"
    columns = ['image_id', 'fold', *HAM10000, 'dx', 'group']
    packed = dict(index=False, float_format='%.5f', compression=dict(method='gzip', mtime=0))
    table[columns].to_csv(RESULTS/'best.csv.gz', **packed)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='*', type=Path)
    args = p.parse_args()
    if args.runs:
        table,recipe = pooled(args.runs),json.loads((args.runs[0]/'run.json').read_text())['recipe']
        keep(table)
    else:
        stored = pd.read_csv(RESULTS/'best.csv.gz', dtype=dict(group=str))
        table,recipe = with_classes(stored, HAM10000),json.loads((RESULTS/'best.json').read_text())['recipe']
    each = {int(fold): one_score(with_classes(part.reset_index(drop=True), HAM10000))
            for fold,part in table.groupby('fold')}
    measured = fit_decisions(table.drop(columns='fold'), first='nv').measured
    about = dict(date=date.today().isoformat(), recipe=recipe, seed=42, images=len(table),
                 lesions=table.group.nunique())
    write_json(about | dict(pooled=one_score(table), folds=each, decided=measured), RESULTS/'best.json')


if __name__=='__main__': main()
