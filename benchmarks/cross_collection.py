"""Networks against the collections that they are tested on.

    HAM10000_DIR=... python benchmarks/cross_collection.py --milk10k MILK10K
    HAM10000_DIR=... python benchmarks/cross_collection.py --milk10k MILK10K --kept

The first form asks the packaged network about those of MILK10k's dermoscopic images that it was not trained on and
writes benchmarks/results/milk10k_packaged.csv.gz (probabilities as the network gives them, not calibrated; minutes).
The second reads that table. Both take the four sources of HAM10000, and MILK10k's lesions that were trained on, from
the held-out predictions of the bundle's folds (packaged_held_out.csv.gz), calibrated and decided cross-fitted.
Networks without a source are in variants.py. Writes benchmarks/results/cross_collection.json, for
nbs/76_cross_collection.ipynb.
"""
import argparse, json, os
from datetime import date
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).resolve().parent/'results'
MILK10K = RESULTS/'milk10k_packaged.csv.gz'
HELD_OUT = RESULTS/'packaged_held_out.csv.gz'
ONE, ALL = 'one network of a fold', 'packaged network'


def packaged_classes():
    "The class set of the packaged network"
    from skin_lesions.bundle import read_bundle
    from skin_lesions.classes import ClassSet
    from skin_lesions.core import named_bundle
    return ClassSet.from_dict(read_bundle(named_bundle('ham10000'))['classes'])


def ask(folder, threads=None):
    "What the packaged network answers for MILK10k, not calibrated; `dx` in MILK10k's own codes"
    import torch
    from skin_lesions.predict import load_predictor
    from skin_lesions.readers import read_metadata
    if threads: torch.set_num_threads(threads)
    meta, predictor = read_metadata(folder), load_predictor('ham10000', 'cpu')
    meta = meta[~predictor.trained_on(meta)].reset_index(drop=True)
    predictor.calibration = predictor.rule = predictor.referral = predictor.sets = None
    table = predictor.predict(meta.drop(columns='dx'), progress=False, workers=threads)
    bad = table.problem.dropna()
    if len(bad): raise SystemExit(f'{len(bad)} images cannot be read, the first: {bad.iloc[0]}')
    table['dx'] = meta.dx.to_numpy()
    table[['image_id', 'dx', 'group', *predictor.codes, 'ood', 'ood_score']].round(6).to_csv(MILK10K, index=False)


def with_decisions(table, calibration, rule, referral):
    "Calibrated, and decided and referred whatever `ood` says"
    from skin_lesions.robustness import decide_all
    if calibration is not None: table = calibration.calibrate(table, overlap='ignore')
    return decide_all(table.assign(problem=None), rule, referral).drop(columns='problem')


def packaged_on_milk10k():
    "The packaged network on MILK10k, with its own calibration, rule and referral"
    from skin_lesions.classes import class_map, with_classes
    from skin_lesions.predict import load_predictor
    predictor = load_predictor('ham10000', 'cpu')
    table = pd.read_csv(MILK10K)
    inside = table.dx.map(class_map('MILK10K', predictor.classes)).astype(object)
    table = table.assign(outside=table.dx.where(inside.isna(), None), dx=inside.where(inside.notna(), None))
    parts = predictor.calibration, predictor.rule, predictor.referral
    return with_decisions(with_classes(table, predictor.classes), *parts), predictor.record['sha256']


def subgroups(table, folder):
    "Average recall of the decisions on MILK10k by skin tone, age, sex and anatomical site; None without its metadata"
    from skin_lesions.classes import with_classes
    from skin_lesions.evaluate import scores_by
    from skin_lesions.readers import read_metadata
    if folder is None: return None
    meta = read_metadata(folder)
    inside = with_classes(table[table.dx.notna()].reset_index(drop=True), packaged_classes())
    meta['skin_type'] = pd.Categorical(meta.skin_type, [*'012345', 'unknown'], ordered=True)
    columns = ('skin_type', 'age_band', 'sex', 'site')
    frames = {by: scores_by(inside, meta, by).reset_index(names='subgroup') for by in columns}
    def records(frame): return json.loads(frame.astype({'subgroup': str}).round(5).to_json(orient='records'))
    return {by: records(frame) for by, frame in frames.items()}


def crossfitted(table):
    "Calibrated, decided and referred by fits on other lesions"
    from skin_lesions.decide import crossfit, decision_rule, fit_calibration, fit_referral
    def fit(part):
        calibration = fit_calibration(part, 'stages_vector', first='nv')
        ready = calibration.calibrate(part, overlap='ignore')
        rule, referral = decision_rule('prior', ready), fit_referral(ready, .95)
        return lambda rest: with_decisions(rest, calibration, rule, referral)
    return crossfit(table, fit)


def sources():
    "The source of each image of HAM10000, in few letters"
    return pd.read_csv(Path(os.environ['HAM10000_DIR'])/'HAM10000_sources.csv').set_index('image_id').dataset


def held_out_tables():
    "Held-out predictions of the networks of the folds, by source"
    from skin_lesions.classes import with_classes
    classes = packaged_classes()
    table = with_classes(pd.read_csv(HELD_OUT, dtype=dict(group=str)), classes)
    table, source = crossfitted(table), table.image_id.map(sources()).fillna('MILK10k')
    parts = {'HAM10000': source != 'MILK10k'} | {name: source == name for name in sorted(source.unique())}
    return {(ONE, name): with_classes(table[rows].reset_index(drop=True), classes) for name, rows in parts.items()}


def main(args):
    from skin_lesions.cross_collection import cross_table
    if args.milk10k and not args.kept: ask(args.milk10k, args.threads)
    tables = held_out_tables()
    milk, sha256 = packaged_on_milk10k()
    tables[ALL, 'MILK10k'] = milk
    frame = cross_table(tables, args.draws)
    about = dict(date=date.today().isoformat(), seed=42, interval=f'95 %, bootstrap over lesions, {args.draws} draws',
                 sha256=sha256,
                 subgroups_of_milk10k=subgroups(milk, args.milk10k),
                 rows=json.loads(frame.round(5).to_json(orient='records')))
    Path(args.result).write_text(json.dumps(about, indent=1)+'\n')
    print(frame.round(3).T.to_string())


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--milk10k', help='folder of MILK10k; without it, the last run is read, without subgroups')
    parser.add_argument('--kept', action='store_true', help='read the predictions of the last run')
    parser.add_argument('--draws', type=int, default=1000, help='of the intervals')
    parser.add_argument('--threads', type=int, help='of PyTorch; without it, all')
    parser.add_argument('--result', default=str(RESULTS/'cross_collection.json'), help='JSON to write')
    main(parser.parse_args())
