"""What decision rules, calibration, test-time augmentation and an ensemble of folds bring on HAM10000. The table of `nbs/63_decide.ipynb`.

    python benchmarks/decisions.py --data HAM10000 --out runs/decisions --size 128 --epochs 20

Fold 0 of 5, split by lesion, is for the report alone. Four two-stage networks are trained on the other folds, each without one of them, which is its validation set. Calibration and the exponent of the
prior are fitted on the out-of-fold predictions of folds 1 to 4, for test-time augmentation on those with the same augmentation, and never on fold 0. A single network's figures are the mean of the four.
What is finished in --out is kept. The result goes to benchmarks/results/decisions.json.
"""
import argparse, datetime, json
from pathlib import Path

import numpy as np
import torch

VIEWS = (None, 'dihedral')


def fold_tables(a, meta, fold):
    "Predictions of the network that has not seen `fold`, on that fold and on fold 0, without and with test-time augmentation"
    from fastai.torch_core import set_seed
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import two_stage_learner
    from skin_lesions.predictions import get_predictions, read_predictions, save_predictions
    files = {(part, tta): Path(a.out)/f'fold{fold}_{part}_{tta}.csv' for part in ('valid', 'test') for tta in VIEWS}
    if not all(f.is_file() for f in files.values()):
        set_seed(a.seed)
        inner = meta[meta.fold!=0].reset_index(drop=True)
        dls = ham10000_dataloaders(inner.assign(is_valid=inner.fold==fold), a.size, num_workers=a.workers)
        learn = two_stage_learner(dls)
        weights = Path(a.out)/f'fold{fold}.pth'
        if weights.is_file(): learn.model.load_state_dict(torch.load(weights, weights_only=True))
        else:
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a.epochs)
            torch.save(learn.model.state_dict(), weights)
        for (part, tta), file in files.items(): save_predictions(get_predictions(learn, meta[meta.fold==(fold if part=='valid' else 0)], tta=tta), file)
    return {key: read_predictions(file) for key, file in files.items()}


def row(name, tables, n_draws=1000):
    "Scores of one answer, or the mean of those of several networks, with the interval of the first where there is one"
    from skin_lesions.bootstrap import average_recall_interval
    from skin_lesions.evaluate import scores
    from skin_lesions.decide import expected_calibration_error
    found = [scores(t) for t in tables]
    mean = lambda key: float(np.mean([f[key] for f in found]))
    intervals = [average_recall_interval(t, n_draws) for t in tables]
    return dict(answer=name, networks=len(tables), accuracy=mean('accuracy'), average_recall=mean('average_recall'), low=float(np.mean([i.low for i in intervals])), high=float(np.mean([i.high for i in intervals])),
                macro_auc=mean('macro_auc'), ece=float(np.mean([expected_calibration_error(t) for t in tables])))


def decided(table, rule):
    "A table that is sure of what the rule decides, for scores that read the most probable class"
    from skin_lesions.core import CODES
    codes = rule.decide(table)
    return table.assign(**{c: (codes==c).astype(float) for c in CODES})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True)
    p.add_argument('--out', required=True)
    p.add_argument('--size', type=int, default=128)
    p.add_argument('--epochs', type=int, default=20)
    p.add_argument('--seed', type=int, default=42)
    p.add_argument('--workers', type=int, default=2)
    p.add_argument('--threads', type=int)
    p.add_argument('--pictures', default='as they are', help='a note on the pictures, for the result')
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import lesion_folds
    Path(a.out).mkdir(parents=True, exist_ok=True)
    meta = lesion_folds(read_metadata(a.data), 5, a.seed)
    folds = {f: fold_tables(a, meta, f) for f in range(1, 5)}
    report(a, meta, folds)


def report(a, meta, folds):
    from skin_lesions.decide import compare_rules, decision_rule, fit_calibration, fit_referral, referral_report
    from skin_lesions.bootstrap import average_recall_interval
    from skin_lesions.predictions import ensemble, out_of_fold
    rows, rules, referrals = [], [], []
    for tta in VIEWS:
        label = '' if tta is None else f', {tta}'
        oof = out_of_fold({f: t['valid', tta] for f, t in folds.items()}).drop(columns='fold')
        tests = [t['test', tta] for t in folds.values()]
        together = ensemble(tests, 'geometric')
        rows += [row(f'single network{label}', tests), row(f'ensemble of four folds{label}', [together])]
        for method in ('temperature', 'stages', 'stages_vector'):
            fitted = fit_calibration(oof, method)
            rows += [row(f'single network{label}, calibrated: {method}', [fitted.calibrate(t) for t in tests]), row(f'ensemble of four folds{label}, calibrated: {method}', [fitted.calibrate(together)])]
        fitted = fit_calibration(oof, 'stages_vector')
        calibrated, test = fitted.calibrate(oof), fitted.calibrate(together)
        chosen = {'argmax': decision_rule('argmax'), 'prior': decision_rule('prior', calibrated), 'cost': decision_rule('cost', calibrated), 'paper': decision_rule('paper', calibrated)}
        found = compare_rules(test, chosen)
        for rule, fitted_rule in chosen.items():
            interval = average_recall_interval(decided(test, fitted_rule))
            found.loc[rule, ['low', 'high']] = interval.low, interval.high
        found.insert(0, 'answer', f'ensemble of four folds{label}, calibrated: stages_vector')
        rules += found.reset_index(names='rule').to_dict('records')
        for by in ('risk', 'uncertainty'): referrals.append({'answer': f'ensemble of four folds{label}', 'by': by, **referral_report(test, fit_referral(calibrated, .95, by)).to_dict()})
    result = dict(date=datetime.date.today().isoformat(), data='HAM10000, report on fold 0 of 5 by lesion', arch='tf_efficientnet_lite0, two stages', size=a.size, epochs=a.epochs, seed=a.seed, pictures=a.pictures,
                  n_test=int((meta.fold==0).sum()), n_test_lesions=int(meta[meta.fold==0].group.nunique()), rows=rows, rules=rules, referrals=referrals)
    file = Path(__file__).parents[1]/'benchmarks'/'results'/'decisions.json'
    file.write_text(json.dumps(result, indent=1, default=float) + '\n')
    import pandas as pd
    for part in (rows, rules, referrals): print(pd.DataFrame(part).round(3).to_string(index=False))


if __name__=='__main__': main()
