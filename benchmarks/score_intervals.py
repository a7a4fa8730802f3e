"""All scores of a table with their bootstrap intervals: `score_intervals` against a plain loop over the draws with scikit-learn.

    python benchmarks/score_intervals.py

The loop puts the drawn lesions' images together and calls scikit-learn for every score, as one would write it; it runs for few draws and is scaled to all of them.
"""
import argparse, os, resource, statistics, time, warnings

import numpy as np
import pandas as pd
import sklearn.metrics as skm

FREQ = np.array([327, 514, 1099, 115, 1113, 6705, 142])


def drawn_table(n_images, n_lesions, seed=42):
    "A table with the class frequencies of HAM10000, lesions of one to some images"
    from skin_lesions.core import CODES
    rng = np.random.default_rng(seed)
    classes = np.append(np.arange(7), rng.choice(7, n_lesions-7, p=FREQ/FREQ.sum()))
    lesion = np.sort(np.append(np.arange(n_lesions), rng.integers(n_lesions, size=n_images-n_lesions)))
    logits = rng.normal(size=(n_lesions, 7))[lesion] + rng.normal(size=(n_images, 7)) + np.log(FREQ/FREQ.mean())*.5
    logits[np.arange(n_images), classes[lesion]] += 2.2
    p = np.exp(logits)/np.exp(logits).sum(1, keepdims=True)
    table = pd.DataFrame(p, columns=CODES).assign(image_id=[f'I{i:06}' for i in range(n_images)])
    return table.assign(dx=np.array(CODES)[classes[lesion]], group=[f'L{g:06}' for g in lesion])


def auc_above(y, p, sensitivity=.8):
    fpr, tpr, _ = skm.roc_curve(y, p, drop_intermediate=False)
    i = np.argmax(tpr >= sensitivity)
    start = np.interp(sensitivity, tpr[i-1:i+1], fpr[i-1:i+1])
    return skm.auc(np.append(start, fpr[i:]), np.append(sensitivity, tpr[i:]))


def plain_scores(p, y):
    "The 102 scores of one draw by scikit-learn, in the order of `score_intervals`"
    again, pred = dict(zero_division=1.), p.argmax(1)
    label = np.where((p == p.max(1, keepdims=True)).sum(1) == 1, pred, 7)
    rows = []
    for c in range(7):
        true, called = y == c, p[:, c] > .5
        precision, recall, f1, _ = skm.precision_recall_fscore_support(true, pred == c, average='binary', zero_division=np.nan)
        rows.append((recall, precision, f1, skm.accuracy_score(true, called), skm.recall_score(true, called, **again), skm.recall_score(~true, ~called, **again),
                     skm.f1_score(true, called, **again), skm.precision_score(true, called, **again), skm.precision_score(~true, ~called, **again),
                     skm.roc_auc_score(true, p[:, c]), auc_above(true, p[:, c]), skm.average_precision_score(true, p[:, c])))
    by_class = np.array(rows).T
    bad, risk = np.isin(y, [0, 1, 4]), p[:, [0, 1, 4]].sum(1)
    whole = [skm.accuracy_score(y, pred), skm.balanced_accuracy_score(y, pred), np.mean([(label[y == c] == c).mean() for c in range(7)])]
    return np.concatenate([whole, np.column_stack([np.nanmean(by_class, 1), by_class]).ravel(),
                           [skm.roc_auc_score(bad, risk), auc_above(bad, risk), skm.average_precision_score(bad, risk)]])


def timed(run):
    "What it returns and its seconds"
    start = time.perf_counter()
    out = run()
    return out, time.perf_counter() - start


def main(args):
    from skin_lesions import evaluate
    from skin_lesions.core import CODES
    from skin_lesions.predictions import read_predictions
    warnings.simplefilter('ignore')
    table = read_predictions(args.table) if args.table else drawn_table(args.images, args.lesions)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    before = peak()
    cpu = time.process_time()
    fast = [timed(lambda: evaluate.score_intervals(table, args.draws)) for _ in range(args.repeats)]
    cpu = (time.process_time() - cpu)/args.repeats
    seconds, used = statistics.median(t for _, t in fast), peak() - before
    other = table.assign(**dict(zip(CODES, (table[list(CODES)]**1.1).to_numpy().T)))
    other[list(CODES)] = other[list(CODES)].div(other[list(CODES)].sum(axis=1), axis=0)
    paired = timed(lambda: evaluate.compare(table, other, args.draws))[1]
    points = timed(lambda: evaluate.operating_points(table, args.draws))[1]

    # the loop gets the same draws, so that its numbers can be held against ours
    units, _ = evaluate._lesions(table)
    score = evaluate._AllScores(table, units)
    draws = evaluate._unit_draws(score.stratum, args.draws, 42)[:args.loop]
    p, y = table[list(CODES)].to_numpy(), table.dx.map({c: i for i, c in enumerate(CODES)}).to_numpy()
    def loop():
        out = []
        for d in draws:
            rows = np.repeat(np.arange(len(table)), d[units].astype(int))
            out.append(plain_scores(p[rows], y[rows]))
        return np.stack(out, axis=1)
    slow, loop_seconds = timed(loop)
    ours = evaluate._in_draws(score, draws, len(table))
    each = loop_seconds/len(draws)
    print(f'{len(table):,} images, {len(score.stratum):,} lesions, {args.draws:,} draws, {len(ours)} scores, {os.cpu_count()} cores')
    print(f'score_intervals {seconds:.2f} s (median of {args.repeats}, {min(t for _, t in fast):.2f} to {max(t for _, t in fast):.2f}; {cpu:.2f} s of one core); {used:.0f} MB more at the peak')
    print(f'plain loop {each:.3f} s a draw ({len(draws)} draws), {each*args.draws:.0f} s for all: {each*args.draws/seconds:.0f} times as long; largest difference of a score {np.nanmax(np.abs(ours-slow)):.1e}')
    print(f'compare {paired:.2f} s, operating_points {points:.2f} s')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--images', type=int, default=10_000)
    parser.add_argument('--lesions', type=int, default=7_450)
    parser.add_argument('--draws', type=int, default=1000)
    parser.add_argument('--loop', type=int, default=5, help='draws of the plain loop')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--table', help='predictions CSV instead of a drawn table')
    main(parser.parse_args())
