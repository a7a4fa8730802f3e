"""What prediction sets are worth: on lesions of HAM10000 that they were not fitted on, and on another collection.

    python benchmarks/conformal.py --data HAM10000 --milk10k MILK10K
    python benchmarks/conformal.py

The first form asks the packaged network about the dermoscopic images of MILK10k that it was not trained on and the 193
validation images of the ISIC 2018 challenge (it writes benchmarks/results/conformal_tables.csv.gz); the second reads
that table. The challenge's images serve to fit thresholds here: no score of them is reported. HAM10000: out-of-fold
predictions of benchmarks/results/experiments, halves of the lesions drawn again and again. The result goes to
benchmarks/results/conformal.json, for nbs/62_conformal.ipynb.
"""
import argparse, datetime, json, warnings
from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(__file__).resolve().parent/'results'
TABLES = RESULTS/'conformal_tables.csv.gz'
RECIPE, ALPHA, BOUND = 'two_stage_weighted', .1, .05


def predicted(args):
    "Probabilities of the packaged network as the network gives them, not calibrated"
    from skin_lesions.predict import load_predictor
    predictor = load_predictor('ham10000', 'cpu')
    predictor.calibration = predictor.rule = predictor.referral = predictor.sets = None
    milk = pd.read_csv(Path(args.milk10k)/'MILK10k_part.csv')
    milk = milk.assign(dx=milk.label.str.lower(), group=milk.lesion_id, collection='milk10k',
                       path=[str(Path(args.milk10k)/'images'/f'{i}.jpg') for i in milk.image_id])
    truth = pd.read_csv(Path(args.data)/'ISIC2018_Task3_Validation_GroundTruth.csv').set_index('image')
    folder = next(Path(args.data).glob('ISIC2018_Task3_Validation_Input'))
    challenge = pd.DataFrame(dict(image_id=truth.index, dx=truth.idxmax(axis=1).str.lower().to_numpy(),
                                  group=truth.index, collection='challenge',
                                  path=[str(folder/f'{i}.jpg') for i in truth.index]))
    frame = pd.concat([milk, challenge], ignore_index=True)[['image_id', 'dx', 'group', 'collection', 'path']]
    frame = frame[~predictor.trained_on(frame)].reset_index(drop=True)
    table = predictor.predict(frame[['image_id', 'path']], progress=False, workers=0)
    assert table.problem.isna().all()
    table = table[['image_id', *predictor.codes, 'ood']].round(6)
    pd.concat([frame.drop(columns=['path', 'image_id']), table], axis=1).to_csv(TABLES, index=False)


def out_of_fold_table():
    "Predictions of three networks on the folds that they have not seen"
    from skin_lesions.classes import HAM10000, with_classes
    table = pd.read_csv(RESULTS/'experiments'/f'{RECIPE}.csv.gz', keep_default_na=False)
    table = table[(table.split == 'lesion') & (table.scale == 'reduced') & (table.views == '')].reset_index(drop=True)
    codes = list(HAM10000)
    table[codes] = table[codes].astype(float)
    table[codes] = table[codes].div(table[codes].sum(axis=1), axis=0)
    return with_classes(table[['image_id', *codes, 'dx', 'group', 'fold']], HAM10000)


def of_lesions(values, units, y, k):
    "Mean over the lesions of each class of the mean over their images, and of all"
    w = 1/np.bincount(units)[units]
    sums = [np.bincount(y, weights=w*v, minlength=k) for v in (values, np.ones(len(y)))]
    return np.append(sums[0].sum()/sums[1].sum(), sums[0]/np.maximum(sums[1], 1e-9))


def members_of(scores, p, thresholds):
    "Which classes are in each set; an empty one becomes the most probable class"
    members = scores <= np.array(thresholds)
    members[np.arange(len(p)), p.argmax(1)] |= ~members.any(1)
    return members


def thresholds_of(own, units, y, by_class, k, bound=None):
    "The thresholds of a half, as `fit_sets` makes them"
    from skin_lesions.conformal import bound_threshold, lesion_threshold
    if not by_class: return [lesion_threshold(own, units, ALPHA)]*k
    found = [lesion_threshold(own[y == c], units[y == c], ALPHA) for c in range(k)]
    if bound is not None: found[bound] = max(found[bound], bound_threshold(own[y == bound], units[y == bound], BOUND))
    return found


def halves(table, method='lac', by_class=True, bound=None, n=300, seed=42):
    "Coverage and size of sets on the other half of the lesions, over halves"
    from skin_lesions.bootstrap import labelled, units_of
    from skin_lesions.classes import classes_of
    from skin_lesions.conformal import set_scores
    (p, y, _), units, codes = labelled(table), units_of(table)[0], list(classes_of(table))
    k, rng, scores = len(codes), np.random.default_rng(seed), set_scores(p, method)
    own, found = scores[np.arange(len(y)), y], []
    for _ in range(n):
        mine = rng.permutation(units.max()+1)[units] < (units.max()+1)/2
        bounded = None if bound is None else codes.index(bound)
        thresholds = thresholds_of(own[mine], units[mine], y[mine], by_class, k, bounded)
        members, rest = members_of(scores[~mine], p[~mine], thresholds), y[~mine]
        inside = members[np.arange(len(rest)), rest]
        found.append([of_lesions(v, units[~mine], rest, k) for v in (inside, members.sum(1), members.sum(1) == 1)])
    coverage, size, alone = np.array(found).transpose(1, 0, 2)
    low, high = np.quantile(coverage, [.025, .975], axis=0)
    rows = dict(lesions=[len(np.unique(units)), *(len(np.unique(units[y == c])) for c in range(k))],
                coverage=coverage.mean(0), low=low, high=high, size=size.mean(0), alone=alone.mean(0))
    rows['reach_bound'] = (coverage >= 1-BOUND).mean(0)
    frame = pd.DataFrame(rows, index=['all', *codes])
    return frame.rename_axis('dx').reset_index().to_dict('records')


def report_rows(table, members):
    "`set_report` of a table with given sets"
    from skin_lesions.classes import classes_of
    from skin_lesions.conformal import set_report
    codes = np.array(list(classes_of(table)))
    found = table.assign(set=['|'.join(codes[row]) for row in members])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return set_report(found, 500).drop(columns=['size_low', 'size_high']).reset_index().to_dict('records')


def elsewhere(n=50, seed=42):
    "Sets of the packaged network on MILK10k, fitted on HAM10000's challenge, on 100 images of MILK10k, and on half"
    from cross_collection import packaged_classes
    from skin_lesions.classes import with_classes
    from skin_lesions.conformal import fit_sets, set_members
    tables, classes = pd.read_csv(TABLES), packaged_classes()
    codes = list(classes)
    tables[codes] = tables[codes].div(tables[codes].sum(axis=1), axis=0)
    milk, challenge = (tables[tables.collection == c].reset_index(drop=True) for c in ('milk10k', 'challenge'))
    known, outside = (with_classes(milk[milk.dx.isin(codes) == yes].drop(columns='collection').reset_index(drop=True),
                                   classes) for yes in (True, False))
    challenge = with_classes(challenge.drop(columns='collection'), classes)
    rng, result = np.random.default_rng(seed), {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for by_class in (True, False):
            key = 'by class' if by_class else 'all together'
            sets = fit_sets(challenge.drop(columns='ood'), ALPHA, by_class=by_class)
            rows = report_rows(known, set_members(sets.sets(known)))
            size = set_members(sets.sets(outside.drop(columns='dx'))).sum(1)
            result[f'HAM10000, {key}'] = dict(rows=rows, always=list(sets.always), outside=dict(
                lesions=len(outside), size=float(size.mean()), alone=float((size == 1).mean()),
                ood=float(outside.ood.astype(bool).mean())))
            for name, m in (('100 images of MILK10k', 100), ('half of MILK10k', len(known)//2)):
                result[f'{name}, {key}'] = refitted(known, m, by_class, n, rng)
    return result


def refitted(known, m, by_class, n, rng):
    "Mean coverage and size on the rest, over draws of the images that the sets are fitted on"
    from skin_lesions.classes import classes_of
    from skin_lesions.conformal import fit_sets, set_members
    found, always, codes = [], [], list(classes_of(known))
    for _ in range(n):
        mine = np.isin(np.arange(len(known)), rng.permutation(len(known))[:m])
        sets, rest = fit_sets(known[mine], ALPHA, by_class=by_class), known[~mine]
        members, y = set_members(sets.sets(rest)), rest.dx.map(codes.index).to_numpy()
        inside = members[np.arange(len(y)), y]
        units = np.arange(len(y)) # one image a lesion
        found.append([of_lesions(v, units, y, len(codes)) for v in (inside, members.sum(1), members.sum(1) == 1)])
        always.append(len(sets.always))
    coverage, size, alone = np.array(found).transpose(1, 0, 2)
    low, high = np.quantile(coverage, [.025, .975], axis=0)
    rows = dict(coverage=coverage.mean(0), low=low, high=high, size=size.mean(0), alone=alone.mean(0))
    frame = pd.DataFrame(rows, index=['all', *codes]).rename_axis('dx').reset_index()
    return dict(rows=frame.to_dict('records'), always_mean=float(np.mean(always)))


def main(args):
    if args.milk10k: predicted(args)
    table = out_of_fold_table()
    found = {f'{method}, by class': halves(table, method) for method in ('lac', 'aps', 'raps')}
    found['lac, all together'] = halves(table, by_class=False)
    found[f'lac, by class, mel missed in {BOUND:.0%} at most'] = halves(table, bound='mel')
    folds = sorted(int(f) for f in table.fold.unique())
    about = dict(date=datetime.date.today().isoformat(), alpha=ALPHA, recipe=RECIPE, folds=folds,
                 images=len(table), lesions=int(table.group.nunique()), halves=300)
    result = about | dict(ham10000=found, milk10k=elsewhere())
    (RESULTS/'conformal.json').write_text(json.dumps(result, indent=1, default=float) + '\n')
    for name, rows in (*found.items(), *((k, v['rows']) for k, v in result['milk10k'].items())):
        print(name, pd.DataFrame(rows).round(3).to_string(index=False), sep='\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', help='folder of HAM10000, with the validation images of the challenge')
    parser.add_argument('--milk10k', help='folder of the part of MILK10k; without it, the stored table is read')
    main(parser.parse_args())
