"""All scores of a table with their bootstrap intervals: `score_intervals` against a plain loop over the draws.

    python benchmarks/score_intervals.py
    python benchmarks/score_intervals.py --coverage 200

The loop puts the drawn lesions' images together and calls scikit-learn for every score, as one would write it; it runs
for few draws and is scaled to all of them.
`--coverage` simulates tables with few lesions whose true scores are known, counts how often the intervals hold them,
and writes benchmarks/results/score_intervals.json.
"""
import argparse, os, resource, statistics, time, warnings
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn.metrics as skm
from skin_lesions.classes import HAM10000
from skin_lesions.synthetic import HAM10000_COUNTS

CODES = list(HAM10000)
COUNTS = np.array([HAM10000_COUNTS[c] for c in CODES])
MALIGNANT = [HAM10000.index(c) for c in HAM10000.malignant]


def synthetic_table(n_images, n_lesions, seed=42):
    "A table with the class frequencies of HAM10000, lesions of one to some images"
    k, rng = len(CODES), np.random.default_rng(seed)
    classes = np.append(np.arange(k), rng.choice(k, n_lesions - k, p=COUNTS/COUNTS.sum()))
    lesion = np.sort(np.append(np.arange(n_lesions), rng.integers(n_lesions, size=n_images - n_lesions)))
    logits = rng.normal(size=(n_lesions, k))[lesion] + rng.normal(size=(n_images, k))
    logits += np.log(COUNTS/COUNTS.mean())*.5
    logits[np.arange(n_images), classes[lesion]] += 2.2
    p = np.exp(logits)/np.exp(logits).sum(1, keepdims=True)
    table = pd.DataFrame(p, columns=CODES).assign(image_id=[f'I{i:06}' for i in range(n_images)])
    return table.assign(dx=np.array(CODES)[classes[lesion]], group=[f'L{g:06}' for g in lesion])


def auc_above(y, p, sensitivity=.8):
    "Area under the ROC curve where the sensitivity is above a limit"
    if not y.any(): return np.nan # few images may lack a class
    fpr, tpr, _ = skm.roc_curve(y, p, drop_intermediate=False)
    i = np.argmax(tpr >= sensitivity)
    start = np.interp(sensitivity, tpr[i-1:i+1], fpr[i-1:i+1])
    return skm.auc(np.append(start, fpr[i:]), np.append(sensitivity, tpr[i:]))


def class_scores(true, p, decided):
    "The scores of a class against the rest: by the decision, by a probability above one half, and by rank"
    called, one = p > .5, dict(zero_division=1.)
    precision, recall, f1, _ = skm.precision_recall_fscore_support(true, decided, average='binary',
                                                                   zero_division=np.nan)
    by_half = (skm.accuracy_score(true, called), skm.recall_score(true, called, **one),
               skm.recall_score(~true, ~called, **one), skm.f1_score(true, called, **one),
               skm.precision_score(true, called, **one), skm.precision_score(~true, ~called, **one))
    by_rank = skm.roc_auc_score(true, p), auc_above(true, p), skm.average_precision_score(true, p)
    return (recall, precision, f1, *by_half, *by_rank)


def plain_scores(p, y):
    "The scores of one draw by scikit-learn, in the order of `score_intervals`"
    decided = p.argmax(1)
    # in the official balanced accuracy a tie is wrong
    tied = (p == p.max(1, keepdims=True)).sum(1) > 1
    label = np.where(tied, -1, decided)
    by_class = np.array([class_scores(y == c, p[:, c], decided == c) for c in range(p.shape[1])]).T
    malignant, risk = np.isin(y, MALIGNANT), p[:, MALIGNANT].sum(1)
    official = np.mean([(label[y == c] == c).mean() for c in range(p.shape[1])])
    whole = [skm.accuracy_score(y, decided), skm.balanced_accuracy_score(y, decided), official]
    ranked = [skm.roc_auc_score(malignant, risk), auc_above(malignant, risk),
              skm.average_precision_score(malignant, risk)]
    with_macro = np.column_stack([np.nanmean(by_class, 1), by_class])
    return np.concatenate([whole, with_macro.ravel(), ranked])


def timed(run):
    "What it returns and its seconds"
    start = time.perf_counter()
    out = run()
    return out, time.perf_counter() - start


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024  # MB


def against_loop(table, n_draws, n_loop):
    "Scores of a few draws here and by the loop, the same draws, and the loop's seconds a draw"
    from skin_lesions.bootstrap import in_draws, labelled, unit_draws, units_of
    from skin_lesions.evaluate import AllScores
    units, _ = units_of(table)
    score = AllScores(table, units)
    draws = unit_draws(score.stratum, n_draws, 42)[:n_loop]
    p, y, _ = labelled(table)

    def loop():
        rows = (np.repeat(np.arange(len(table)), d[units].astype(int)) for d in draws)
        return np.stack([plain_scores(p[r], y[r]) for r in rows], axis=1)

    theirs, seconds = timed(loop)
    return in_draws(score, draws, len(table)), theirs, seconds/len(draws)


def sharpened(table):
    "Another table of the same images"
    p = table[CODES]**1.1
    return table.assign(**p.div(p.sum(axis=1), axis=0))


FEW = (5, 5, 10, 10, 25, 25, 60) # lesions of each class
SKILLS = (1.5, 2.5, 4.) # what the logit of the true class is raised by


def few_lesions(rng, lesions, skill, most=3):
    "A table with so many lesions of each class, of one to `most` images"
    true = np.repeat(np.arange(len(CODES)), lesions)
    lesion = np.repeat(np.arange(len(true)), rng.integers(1, most + 1, len(true)))
    logits = (rng.normal(size=(len(true), len(CODES)))[lesion] + rng.normal(size=(len(lesion), len(CODES))))/2**.5
    logits[np.arange(len(lesion)), true[lesion]] += skill
    p = np.exp(logits)/np.exp(logits).sum(1, keepdims=True)
    table = pd.DataFrame(p, columns=CODES).assign(image_id=[f'I{i}' for i in range(len(lesion))])
    return table.assign(dx=np.array(CODES)[true[lesion]], group=[f'L{g}' for g in lesion])


def true_scores(lesions, skill):
    "The scores of a table of the same class frequencies, three hundred times as large"
    from skin_lesions.bootstrap import units_of
    from skin_lesions.evaluate import AllScores, score_index
    large = few_lesions(np.random.default_rng(0), 300*np.array(lesions), skill, most=1)
    units = units_of(large)[0]
    return pd.Series(AllScores(large, units)(np.ones((len(units), 1)))[:, 0], index=score_index(HAM10000))


def held(true, low, high, value):
    "Whether an interval that is widened to its value holds the truth"
    return (np.fmin(low, value) <= true) & (true <= np.fmax(high, value))


def coverage_of(lesions, skill, n_tables, n_draws):
    "How often both kinds of intervals hold the truth, and their mean widths, a row a score"
    from skin_lesions.bootstrap import in_draws, interval_ends, unit_draws, units_of
    from skin_lesions.evaluate import AllScores, score_intervals
    true, rng, rows = true_scores(lesions, skill), np.random.default_rng(1), []
    for seed in range(n_tables):
        table = few_lesions(rng, lesions, skill)
        ours, score = score_intervals(table, n_draws, seed), AllScores(table, units_of(table)[0])
        low, high = interval_ends(in_draws(score, unit_draws(score.stratum, n_draws, seed), len(table)))
        rows.append(dict(covered=held(true, ours.low, ours.high, ours.value), width=ours.high - ours.low,
                         percentile=held(true, low, high, ours.value), percentile_width=high - low))
    return pd.DataFrame({c: np.mean([r[c] for r in rows], axis=0) for c in rows[0]}, index=true.index)


def coverage(n_tables, n_draws):
    "The coverage of each score by the lesions of the class, over three skills"
    found = pd.concat({s: coverage_of(FEW, s, n_tables, n_draws) for s in SKILLS}, names=['skill']).reset_index()
    of = dict(zip(CODES, map(str, FEW))) | dict(macro='macro', malignant='malignant', all='all')
    found['lesions'] = found.dx.map(of)
    whole = found.groupby(['score', 'lesions'], sort=False)
    table = whole[['covered', 'percentile', 'width', 'percentile_width']].mean()
    table['lowest'] = found.groupby(['score', 'lesions', 'skill']).covered.mean().groupby(['score', 'lesions']).min()
    return table.round(3).reset_index()


def write_coverage(args):
    from skin_lesions.core import write_json
    found = coverage(args.coverage, 400)
    about = dict(date=date.today().isoformat(), tables=args.coverage, draws=400, lesions=FEW, skills=SKILLS)
    write_json(about | dict(coverage=found.to_dict('list')), Path(__file__).parent/'results'/'score_intervals.json')
    print(found.to_string())


def main(args):
    if args.coverage: return write_coverage(args)
    from skin_lesions.evaluate import compare, operating_points, score_intervals
    from skin_lesions.predictions import read_predictions
    warnings.simplefilter('ignore')
    table = read_predictions(args.table) if args.table else synthetic_table(args.images, args.lesions)
    before, cpu = peak(), time.process_time()
    times = [timed(lambda: score_intervals(table, args.draws))[1] for _ in range(args.repeats)]
    cpu, used = (time.process_time() - cpu)/args.repeats, peak() - before
    seconds = statistics.median(times)
    paired = timed(lambda: compare(table, sharpened(table), args.draws))[1]
    points = timed(lambda: operating_points(table, args.draws))[1]
    ours, theirs, each = against_loop(table, args.draws, args.loop)
    print(f'{len(table):,} images, {table.group.nunique():,} lesions, {args.draws:,} draws, {len(ours)} scores, '
          f'{os.cpu_count()} cores')
    print(f'score_intervals {seconds:.2f} s (median of {args.repeats}, {min(times):.2f} to {max(times):.2f}; '
          f'{cpu:.2f} s of one core); {used:.0f} MB more at the peak')
    print(f'plain loop {each:.3f} s a draw ({args.loop} draws), {each*args.draws:.0f} s for all: '
          f'{each*args.draws/seconds:.0f} times as long')
    print(f'largest difference of a score {np.nanmax(np.abs(ours - theirs)):.1e}')
    print(f'compare {paired:.2f} s, operating_points {points:.2f} s')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--images', type=int, default=10_000)
    parser.add_argument('--lesions', type=int, default=7_450)
    parser.add_argument('--draws', type=int, default=1000)
    parser.add_argument('--loop', type=int, default=5, help='draws of the plain loop')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--coverage', type=int, default=0, help='simulated tables; 0 measures time')
    parser.add_argument('--table', help='predictions CSV instead of a synthetic table')
    main(parser.parse_args())
