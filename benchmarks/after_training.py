"""What can be had from trained networks without another epoch: views, rule, τ-normalisation, cRT, soup and mean.

    python benchmarks/after_training.py runs/fold0 runs/fold1 --data HAM10000 --other MILK10k_part.csv --work runs/after

Each run folder is of one recipe and seed with another fold held out. What has a setting (τ, the penalty of cRT) takes
for each fold the one that is best on the other folds, so no lesion is judged by a setting chosen on it. Soup and mean
have no lesion of HAM10000 that is new to all their members; they are judged on another collection, beside the single
networks. Intervals are over lesions, differences are paired.
"""
import argparse, json, platform
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from skin_lesions.bootstrap import average_recall_interval
from skin_lesions.bundle import bundle_content
from skin_lesions.classes import classes_of, map_classes, with_classes
from skin_lesions.core import write_json
from skin_lesions.evaluate import compare, scores
from skin_lesions.networks import EnsembleNet
from skin_lesions.posthoc import decide_out_of_fold
from skin_lesions.predict import Predictor, load_predictor
from skin_lesions.predictions import read_predictions, save_predictions
from skin_lesions.readers import read_csv_dataset, read_metadata
from skin_lesions.soup import (average_weights, classifier_inputs, image_batches, logits_from_inputs,
                               retrain_classifier, tau_normalize)

TAUS = (0., .25, .5, .75, 1.)
PENALTIES = (.001, .01, .1, 1.)


def balanced(table):
    "Average recall of the most probable class"
    codes = list(classes_of(table))
    guess = np.array(codes)[table[codes].to_numpy().argmax(1)]
    return np.mean([(guess[table.dx==c]==c).mean() for c in codes if (table.dx==c).any()])


def kept(file, make):
    "A table that is made once"
    if not file.exists(): save_predictions(make(), file)
    return read_predictions(file)


def features(predictor, images, file):
    "What the last layers see of images, made once"
    if not file.exists(): np.savez(file, **classifier_inputs(predictor.model, image_batches(predictor, images)))
    with np.load(file) as found: return dict(found)


def from_features(net, inputs, table):
    "A predictions table of a changed network"
    codes = list(classes_of(table))
    probabilities = dict(zip(codes, logits_from_inputs(net, inputs).exp().numpy().T))
    return with_classes(table[['image_id', 'dx', 'group']].assign(**probabilities), classes_of(table))


def changed_tables(run, meta, work):
    "The held-out predictions of one run, plain, with views and with each setting"
    predictor,split = load_predictor(run, 'cpu'),pd.read_csv(run/'split.csv', dtype={'image_id': str, 'group': str})
    paths = meta.set_index('image_id').path
    valid,train = (split[split.is_valid==side].assign(path=lambda t: t.image_id.map(paths)) for side in (True, False))
    plain = read_predictions(run/'predictions.csv')
    valid = valid.set_index('image_id').loc[plain.image_id].reset_index()
    name = run.name
    rows = valid[['image_id', 'path', 'dx', 'group']]
    def views(): return predictor.predict(rows, views='dihedral', progress=False)[list(plain.columns)]
    tables = dict(plain=plain, views=kept(work/f'{name}_views.csv', views))
    seen = features(predictor, valid.path, work/f'{name}_held_out.npz')
    learned = features(predictor, train.path, work/f'{name}_training.npz')
    codes,net = list(classes_of(plain)),predictor.model
    targets = train.dx.map({c: i for i,c in enumerate(codes)}).to_numpy()
    for tau in TAUS: tables['tau', tau] = from_features(tau_normalize(net, tau), seen, plain)
    for C in PENALTIES: tables['crt', C] = from_features(retrain_classifier(net, learned, targets, C), seen, plain)
    return tables


def chosen_elsewhere(runs, kind, settings):
    "The tables of all folds, each with the setting that is best on the others; and which"
    picked = []
    for i,own in enumerate(runs):
        others = [t for j,t in enumerate(runs) if j!=i]
        best = max(settings, key=lambda s: np.mean([balanced(t[kind, s]) for t in others]))
        picked.append((best, own[kind, best]))
    return pooled([table for _,table in picked]), [s for s,_ in picked]


def pooled(tables): return with_classes(pd.concat(tables, ignore_index=True), classes_of(tables[0]))


def measured(table, base):
    "Scores of a table, its rule, and the paired difference from the plain networks"
    found = scores(table)
    interval = average_recall_interval(table)
    result = {k: round(float(found[k]), 4) for k in ('accuracy', 'average_recall', 'macro_auc') if k in found}
    result['interval'] = [round(float(v), 4) for v in (interval.low, interval.high)]
    rule = decide_out_of_fold(table.drop(columns=[c for c in ('decision',) if c in table]))
    by_rule = average_recall_interval(rule)
    ends = [round(float(v), 4) for v in (by_rule.low, by_rule.high)]
    result['rule'] = dict(average_recall=round(float(by_rule.value), 4), interval=ends)
    if base is not None:
        row = compare(base, table).loc[('recall', 'macro')]
        result['difference'] = [round(float(row[k]), 4) for k in ('difference', 'low', 'high')]
    return result


def joined(predictors, net, meta):
    first = predictors[0]
    view = {k: first.record[k] for k in ('side', 'preprocess', 'crop', 'normalization')}
    record,_ = bundle_content(net, classes=first.classes, view=view, trained_on=meta)
    return Predictor(net, record, device='cpu')


def on_other(args, meta, target):
    "Soup and mean beside the single networks, on lesions that none of them has seen"
    predictors = [load_predictor(run, 'cpu') for run in args.runs]
    columns = dict(label_col='label', image_col='image_id', group_col='lesion_id')
    other = read_csv_dataset(args.other, classes='MILK10K', folder=args.other.parent/'images', **columns)
    other,some = map_classes(other, target),meta.sample(min(args.n_norm, len(meta)), random_state=42)
    nets = [q.model for q in predictors]
    together = dict(soup=average_weights(nets, image_batches(predictors[0], some.path)),
                    soup_without_recalibration=average_weights(nets), mean=EnsembleNet(nets))
    candidates = dict(zip([run.name for run in args.runs], predictors))
    candidates |= {name: joined(predictors, net, meta) for name,net in together.items()}
    def table_of(q): return q.predict(other, progress=False)[['image_id', *target, 'dx', 'group']]
    tables = {name: kept(args.work/f'other_{name}.csv', lambda q=q: table_of(q)) for name,q in candidates.items()}
    first = next(iter(tables))
    found = {name: measured(t, None if name==first else tables[first]) for name,t in tables.items()}
    return found | dict(images=len(tables[first]))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='+', type=Path)
    p.add_argument('--data')
    p.add_argument('--other', type=Path)
    p.add_argument('--work', type=Path, required=True)
    p.add_argument('--n-norm', type=int, default=2000)
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'after_training.json')
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    meta = read_metadata(args.data)
    runs = [changed_tables(run, meta, args.work) for run in args.runs]
    base = pooled([r['plain'] for r in runs])
    result = dict(date=date.today().isoformat(), machine=platform.machine(), runs=[r.name for r in args.runs],
                  images=len(base), lesions=int(base.group.nunique()), own={})
    result['own']['plain'] = measured(base, None)
    result['own']['views'] = measured(pooled([r['views'] for r in runs]), base)
    for kind,settings in dict(tau=TAUS, crt=PENALTIES).items():
        table,picked = chosen_elsewhere(runs, kind, settings)
        result['own'][kind] = measured(table, base) | dict(settings=picked)
    if args.other: result['other'] = on_other(args, meta, classes_of(base))
    write_json(result, args.out)
    print(json.dumps(result, indent=1))


if __name__=='__main__': main()
