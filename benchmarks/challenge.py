"""The packaged network on the 193 validation images of the ISIC 2018 challenge, which nothing was chosen on.

    HAM10000_DIR=... python benchmarks/challenge.py

One look for a network, a second one is refused. Adds to benchmarks/results/challenge.json.
"""
import argparse, json, os
from datetime import date
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).resolve().parent/'results'


def validation_images(challenge):
    "The validation images; raises where a lesion of them is among the training images"
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import challenge_validation
    data = os.environ['HAM10000_DIR']
    valid = read_metadata(challenge or data, part='validation')
    both = challenge_validation(read_metadata(data), valid)
    return both[both.is_valid].reset_index(drop=True)


def measures(table, predictor):
    "Scores of a table by its decision, and what it refers and calls out-of-distribution"
    from skin_lesions.bootstrap import average_recall_interval, class_recall_intervals
    from skin_lesions.decide import expected_calibration_error
    from skin_lesions.evaluate import scores
    interval, found = average_recall_interval(table), scores(table)
    out = dict(accuracy=found['accuracy'], average_recall=interval.value, low=interval.low, high=interval.high,
               macro_auc=found['macro_auc'], calibration_error=float(expected_calibration_error(table)),
               recall=class_recall_intervals(table).recall.to_dict())
    if predictor.referral is not None:
        refer = pd.Series(predictor.referral.refer(table), index=table.index)
        malignant = table.dx.isin(predictor.classes.malignant)
        out |= dict(referred=float(refer.mean()), malignant_referred=float(refer[malignant].mean()))
    if 'ood' in table: out['unusual'] = float(table.ood.astype(bool).mean())
    return out


def look(bundle, valid):
    "What the network answers, by its most probable class and as the bundle decides"
    from skin_lesions.predict import load_predictor
    from skin_lesions.predictions import without_decisions
    found = {}
    for reading in ('most probable class', 'calibrated, decided by the rule'):
        predictor = load_predictor(bundle, 'cpu')
        if reading == 'most probable class': predictor.calibration = predictor.rule = predictor.referral = None
        table = predictor.predict(valid, progress=False)
        if table.problem.notna().any(): raise SystemExit(f'images cannot be read: {table.problem.dropna().iloc[0]}')
        table = without_decisions(table).drop(columns='problem')
        # the rule decides all images, also those that look out-of-distribution
        if predictor.rule is not None: table['decision'] = predictor.rule.decide(table)
        found[reading] = measures(table, predictor)
        print(reading, found[reading])
    return found


def network_name(bundle, record):
    "The network in a few words"
    from skin_lesions.recipes import Recipe
    if not record['recipe']: return bundle
    recipe = Recipe.from_dict(record['recipe'])
    return f'{recipe.arch}, {recipe.stages} stages, {recipe.size} pixels, {recipe.epochs} epochs'


def main(args):
    from skin_lesions.core import BUNDLE_NAMES, named_bundle
    from skin_lesions.bundle import read_bundle
    valid, out = validation_images(args.challenge), Path(args.out)
    record = read_bundle(named_bundle(args.bundle) if args.bundle in BUNDLE_NAMES else args.bundle)
    looks = json.loads(out.read_text())['looks'] if out.is_file() else []
    before = [seen['date'] for seen in looks if seen['sha256'] == record['sha256']]
    if before: raise SystemExit(f'this network was looked at on {before[0]}: {out}')
    counts = valid.dx.value_counts().sort_index().to_dict()
    new = dict(date=date.today().isoformat(), bundle=args.bundle, sha256=record['sha256'],
               network=network_name(args.bundle, record), images=len(valid), groups=int(valid.group.nunique()),
               counts=counts, readings=look(args.bundle, valid))
    out.write_text(json.dumps(dict(looks=[*looks, new]), indent=1) + '\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--bundle', default='ham10000', help='name or folder')
    parser.add_argument('--challenge', help='folder of the validation images; without it, HAM10000_DIR')
    parser.add_argument('--out', default=str(RESULTS/'challenge.json'), help='JSON to add to')
    main(parser.parse_args())
