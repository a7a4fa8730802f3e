"""Geometric against arithmetic averages of networks, on the stored predictions of HAM10000.

    python benchmarks/averaging.py

Recipes of page 71 that were trained on the same folds are averaged image by image. Every network has been trained
without the lesions that it predicts, and nothing is chosen here. Adds no network; writes
benchmarks/results/averaging.json.
"""
import argparse, json
from datetime import date
from pathlib import Path

from skin_lesions.evaluate import compare
from skin_lesions.posthoc import pooled_predictions

RESULTS = Path(__file__).resolve().parent/'results'
SCORES = {('average_recall', 'all'): 'average recall', ('accuracy', 'all'): 'accuracy', ('auc', 'macro'): 'macro AUC'}
GROUPS = {
    'two networks of one stage': ('base', 'weighted'),
    'one stage and two stages': ('base', 'two_stage'),
    'seven networks': ('160px', 'all_changes', 'base', 'sampling', 'two_stage', 'two_stage_weighted', 'weighted')}


def differences(recipes, draws):
    "Geometric less arithmetic average, paired over lesions"
    by_mean = {how: pooled_predictions(RESULTS/'experiments', recipes, 'reduced', how=how)
               for how in ('arithmetic', 'geometric')}
    found = compare(*by_mean.values(), draws, seed=42).loc[list(SCORES)].round(5)
    found = found.rename(columns=dict(a='arithmetic', b='geometric')).drop(columns='p')
    rows = dict(zip(SCORES.values(), found.to_dict('records')))
    table = by_mean['arithmetic']
    return dict(recipes=list(recipes), images=len(table), lesions=int(table.group.nunique()), scores=rows)


def main(args):
    record = dict(date=date.today().isoformat(), data='HAM10000, folds 0, 1 and 2 of 5 by lesion, scale reduced',
                  seeds=[42], interval='95 %, bootstrap over lesions', draws=args.draws,
                  groups={name: differences(recipes, args.draws) for name, recipes in GROUPS.items()})
    (RESULTS/'averaging.json').write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
    for name, group in record['groups'].items(): print(name, group['scores'])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--draws', type=int, default=1000)
    main(parser.parse_args())
