"""What decision rules, calibration, test-time augmentation and an ensemble of folds bring on HAM10000.

    python benchmarks/decisions.py --data HAM10000 --out runs/decisions --size 128 --epochs 20

The table of `nbs/61_decide.ipynb`. Fold 0 of 5, split by lesion, is for the report alone. Four two-stage networks with
the paper's loss are trained on the other folds, each without one of them, which is its validation set. Calibration and
the exponent of the prior are fitted on the out-of-fold predictions of folds 1 to 4, for test-time augmentation on those
with the same views, and never on fold 0. A single network's figures are the mean of the four. What is finished in --out
is kept. The result goes to benchmarks/results/decisions.json.
"""
import argparse, datetime, json
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent/'results'
VIEWS = (None, 'dihedral')
CALIBRATIONS = ('temperature', 'stages', 'stages_vector')


def train_fold(args, meta, fold):
    "The run folder of the network that has seen neither `fold` nor fold 0"
    from skin_lesions.recipes import with_changes
    from skin_lesions.train import train_run
    recipe = with_changes('two_stage_paper_loss', dict(size=args.size, epochs=args.epochs))
    inner = meta[meta.fold != 0].reset_index(drop=True)
    inner = inner.assign(is_valid=inner.fold == fold)
    return train_run(recipe, inner, Path(args.out)/f'fold{fold}', split='own', seed=args.seed, resume=True,
                     workers=args.workers, report=False)


def predicted(run, meta, views):
    "A network's probabilities, not calibrated, kept beside it"
    from skin_lesions.predict import load_predictor
    from skin_lesions.predictions import read_predictions, save_predictions, without_decisions
    file = run/f'fold{meta.fold.iloc[0]}_{views}.csv'
    if not file.is_file():
        table = load_predictor(run).predict(meta, views=views, progress=False)
        save_predictions(without_decisions(table).drop(columns='problem'), file)
    return read_predictions(file)


def fold_tables(args, meta, fold):
    "Predictions of the network that has not seen `fold`, on that fold and on fold 0, for each kind of views"
    run = train_fold(args, meta, fold)
    parts = dict(valid=meta[meta.fold == fold].reset_index(drop=True), test=meta[meta.fold == 0].reset_index(drop=True))
    return {(part, views): predicted(run, frame, views) for part, frame in parts.items() for views in VIEWS}


def row(name, tables, n_draws=1000):
    "Scores of one answer, or the mean of those of several networks, with the mean of their intervals"
    from skin_lesions.bootstrap import average_recall_interval
    from skin_lesions.decide import expected_calibration_error
    from skin_lesions.evaluate import scores
    found = [scores(t) for t in tables]
    intervals = [average_recall_interval(t, n_draws) for t in tables]
    def mean(values): return float(np.mean(list(values)))
    means = {key: mean(f[key] for f in found) for key in ('accuracy', 'average_recall', 'macro_auc')}
    ends = dict(low=mean(i.low for i in intervals), high=mean(i.high for i in intervals))
    error = mean(expected_calibration_error(t) for t in tables)
    return dict(answer=name, networks=len(tables), **means, **ends, ece=error)


def calibration_rows(label, oof, tests, together):
    "Rows of the single networks and of their ensemble, as they are and calibrated"
    from skin_lesions.decide import fit_calibration
    single, four = f'single network{label}', f'ensemble of four folds{label}'
    rows = [row(single, tests), row(four, [together])]
    for method in CALIBRATIONS:
        fitted = fit_calibration(oof, method)
        rows += [row(f'{single}, calibrated: {method}', [fitted.calibrate(t) for t in tests]),
                 row(f'{four}, calibrated: {method}', [fitted.calibrate(together)])]
    return rows


def rule_rows(name, calibrated, test):
    "What each decision rule does to the ensemble"
    from skin_lesions.bootstrap import average_recall_interval
    from skin_lesions.decide import compare_rules, decision_rule
    rules = dict(argmax=decision_rule('argmax'), prior=decision_rule('prior', calibrated),
                 cost=decision_rule('cost', calibrated), paper=decision_rule('paper', calibrated))
    found = compare_rules(test, rules)
    for rule_name, rule in rules.items():
        interval = average_recall_interval(test.assign(decision=rule.decide(test)))
        found.loc[rule_name, ['low', 'high']] = interval.low, interval.high
    found.insert(0, 'answer', f'{name}, calibrated: stages_vector')
    return found.reset_index(names='rule').to_dict('records')


def referral_rows(name, calibrated, test):
    "What a referral of 95 % of the malignant images does to the ensemble"
    from skin_lesions.decide import fit_referral, referral_report
    reports = {by: referral_report(test, fit_referral(calibrated, .95, by)) for by in ('risk', 'uncertainty')}
    return [{'answer': name, 'by': by, **report.to_dict()} for by, report in reports.items()]


def measure(folds):
    "Rows of answers, of rules and of referrals"
    from skin_lesions.decide import fit_calibration
    from skin_lesions.predictions import ensemble, out_of_fold
    rows, rules, referrals = [], [], []
    for views in VIEWS:
        label = '' if views is None else f', {views}'
        name = f'ensemble of four folds{label}'
        oof = out_of_fold({fold: tables['valid', views] for fold, tables in folds.items()}).drop(columns='fold')
        tests = [tables['test', views] for tables in folds.values()]
        together = ensemble(tests, 'geometric')
        rows += calibration_rows(label, oof, tests, together)
        fitted = fit_calibration(oof, 'stages_vector')
        calibrated, test = fitted.calibrate(oof), fitted.calibrate(together)
        rules += rule_rows(name, calibrated, test)
        referrals += referral_rows(name, calibrated, test)
    return dict(rows=rows, rules=rules, referrals=referrals)


def main(args):
    import pandas as pd
    import torch
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import lesion_folds
    if args.threads: torch.set_num_threads(args.threads)
    meta = lesion_folds(read_metadata(args.data), 5, args.seed)
    measured = measure({fold: fold_tables(args, meta, fold) for fold in range(1, 5)})
    test = meta[meta.fold == 0]
    about = dict(date=datetime.date.today().isoformat(), data='HAM10000, report on fold 0 of 5 by lesion',
                 interval='95 %, bootstrap over lesions drawn class by class, 1,000 draws, with half lesions (page 59)',
                 arch='tf_efficientnet_lite0, two stages', size=args.size, epochs=args.epochs, seed=args.seed,
                 pictures=args.images, n_test=len(test), n_test_lesions=int(test.group.nunique()))
    Path(args.result).write_text(json.dumps(about | measured, indent=1, default=float) + '\n')
    for part in measured.values(): print(pd.DataFrame(part).round(3).to_string(index=False))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, help='folder of HAM10000')
    parser.add_argument('--out', required=True, help='folder of the runs')
    parser.add_argument('--size', type=int, default=128, help='pixels')
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--seed', type=int, default=42)
    parser.add_argument('--workers', type=int, default=2, help='data-loading workers')
    parser.add_argument('--threads', type=int, help='of PyTorch; without it, all')
    parser.add_argument('--images', default='as they are', help='a note on the images, for the result')
    parser.add_argument('--result', default=str(RESULTS/'decisions.json'), help='JSON to write')
    main(parser.parse_args())
