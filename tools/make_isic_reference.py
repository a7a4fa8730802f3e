"""Make the reference values of the official scorer, tests/data/isic_*: predictions tables, what `isic-challenge-scoring` says of them, and a submission that it accepts.

The package needs pandas 2 on Python 3.11, so it has an environment of its own:

    python3.11 -m venv isic && isic/bin/pip install isic-challenge-scoring==5.6.0 'pandas<3'
    isic/bin/python tools/make_isic_reference.py

This script imports nothing of skin_lesions. The same versions write the same files.
"""
import argparse, importlib.metadata, json, math, tempfile, warnings
from pathlib import Path

import numpy as np
import pandas as pd

CODES = ['akiec', 'bcc', 'bkl', 'df', 'mel', 'nv', 'vasc']
ISIC = ['MEL', 'NV', 'BCC', 'AKIEC', 'BKL', 'DF', 'VASC'] # the challenge's order of columns
FREQ = np.array([327, 514, 1099, 115, 1113, 6705, 142])/10015
UNSCORED = 'ISIC_0035068'


# the tables ------------------------------------------------------------------------------------------------------------------------------

def table_of(p, y, ids=None):
    "A predictions table"
    out = pd.DataFrame(p, columns=CODES)
    out.insert(0, 'image_id', [f'ISIC_{i:07}' for i in range(len(out))] if ids is None else ids)
    return out.assign(dx=np.array(CODES)[y])


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e/e.sum(1, keepdims=True)


def random_table(n, seed, skill=1.5, digits=4, freq=FREQ):
    "All classes are there; `skill` is what the logit of the true class has more"
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(7), rng.choice(7, n-7, p=freq)])
    x = rng.normal(size=(n, 7))*1.5
    x[np.arange(n), y] += skill
    return softmax(x).round(digits), rng.permutation(y) if skill == 0 else y


def cases():
    "Name -> table"
    rng = np.random.default_rng(0)
    even = np.full(7, 1/7)
    out = {'random': table_of(*random_table(90, 1)), 'no skill': table_of(*random_table(60, 2, skill=0, freq=even)), 'skilled': table_of(*random_table(60, 3, skill=4, freq=even))}
    p, y = random_table(50, 4)
    out['sum is not 1'] = table_of(rng.random((50, 7)).round(3), y)
    out['quarters'] = table_of(rng.integers(0, 5, (60, 7))/4, random_table(60, 5, freq=even)[1])
    halves = np.zeros((40, 7))
    for row in halves: row[rng.choice(7, 2, replace=False)] = .5
    out['halves'] = table_of(halves, random_table(40, 6, freq=even)[1])
    out['one decimal'] = table_of(*random_table(60, 7, digits=1, freq=even))
    out['constant columns'] = table_of(np.tile([.05, .1, .15, .2, .05, .4, .05], (21, 1)), np.arange(21)%7)
    out['all equal'] = table_of(np.full((21, 7), .125), np.arange(21)%7)
    p, y = random_table(30, 8, freq=even)
    out['one column constant'] = table_of(np.where(np.arange(7) == 5, .3, p), y)
    out['perfect'] = table_of(np.eye(7)[np.arange(21)%7], np.arange(21)%7)
    out['all wrong'] = table_of(np.eye(7)[(np.arange(21)+1)%7], np.arange(21)%7)
    p, y = random_table(30, 9, freq=even)
    out['around one half'] = table_of(np.where(p > .4, .5+rng.integers(-1, 2, p.shape)*2.**-52, p*.5), y)
    p, y = random_table(30, 10, freq=even)
    out['nearly tied'] = table_of(.125+(rng.integers(0, 4, p.shape)+2*np.eye(7)[y])*2.**-50, y)
    # sensitivity hits .8 exactly: 5 or 10 images a class
    y = np.repeat(np.arange(7), [5, 10, 5, 10, 5, 20, 5])
    out['sensitivity of exactly .8'] = table_of(softmax(rng.normal(size=(60, 7))+2*np.eye(7)[y]).round(2), y)
    # the image that does not count; in order, since the package leaves the weights as they stand when it sorts the rows
    ids = [f'ISIC_{i:07}' for i in range(35058, 35098)]
    out['an image without weight'] = table_of(*random_table(40, 11, freq=even), ids)
    p, y = random_table(40, 12)
    y = np.where(y == 3, 5, y)
    y[10] = 3
    out['a class only in the image without weight'] = table_of(p, y, ids)
    assert ids[10] == UNSCORED
    # classes that are not there
    p, y = random_table(40, 13, freq=even)
    out['a class is absent'] = table_of(p, np.where(y == 3, 5, y))
    out['five classes are absent'] = table_of(p, np.where(y < 3, 4, 5))
    out['one class only'] = table_of(p, np.full(40, 5))
    out['one image'] = table_of(p[:1], [4])
    # rows in no order
    t = table_of(*random_table(30, 14, freq=even))
    out['rows in no order'] = t.assign(image_id=rng.permutation(t.image_id))
    return out


# what the package says -------------------------------------------------------------------------------------------------------------------

def write_truth(table, path):
    pd.DataFrame({'image': table.image_id} | {c: (table.dx == c.lower()).astype(float) for c in ISIC}).to_csv(path, index=False)


def write_submission(table, path):
    "As the challenge wants it: image, then the seven columns in its order"
    table.rename(columns={'image_id': 'image'} | {c.lower(): c for c in ISIC})[['image', *ISIC]].to_csv(path, index=False, lineterminator='\n')


def read(table, truth, submission):
    "The package's own reading of two files: labels, probabilities, weights. The probabilities are then put in exactly: pandas' default parser rounds the last digit"
    from isic_challenge_scoring.load_csv import parse_csv, parse_truth_csv, sort_rows, validate_rows
    with open(truth) as f: t, weights = parse_truth_csv(f)
    with open(submission) as f: p = parse_csv(f, t.columns)
    validate_rows(t, p)
    sort_rows(t), sort_rows(p)
    exact = table.set_index('image_id')[[c.lower() for c in t.columns]].loc[p.index].to_numpy(dtype=float)
    assert np.abs(exact - p.to_numpy()).max() < 1e-15
    p[:] = exact
    assert weights.index.equals(t.index) or (weights == 1).all(axis=None)
    return t, p, weights.loc[t.index]


def official(table, folder):
    "What the package says of a table: its whole answer, or where it stops with an error, the answers of its parts"
    from isic_challenge_scoring.classification import ClassificationMetric, ClassificationScore
    write_truth(table, folder/'truth.csv')
    write_submission(table, folder/'submission.csv')
    t, p, weights = read(table, folder/'truth.csv', folder/'submission.csv')
    try: return ClassificationScore(t, p, weights, ClassificationMetric.BALANCED_ACCURACY).to_dict(rocs=False)
    except ValueError as e: return {'error': f'{type(e).__name__}: {e}', **parts(t, p, weights.score_weight)}


def parts(t, p, w):
    "Each score for itself; None where the package's own function raises"
    from isic_challenge_scoring import metrics
    from isic_challenge_scoring.confusion import create_binary_confusion_matrix
    rows = {}
    ranks = {'auc': metrics.auc, 'auc_sens_80': lambda *a: metrics.auc_above_sensitivity(*a, .8), 'ap': metrics.average_precision}
    for c in t.columns:
        cm = create_binary_confusion_matrix(t[c].gt(.5).to_numpy(), p[c].gt(.5).to_numpy(), w.to_numpy(), c)
        rows[c] = {k: float(getattr(metrics, f'binary_{k}')(cm)) for k in ('accuracy', 'sensitivity', 'specificity', 'dice', 'ppv', 'npv')}
        for name, f in ranks.items():
            try: rows[c][name] = float(f(t[c], p[c], w))
            except ValueError: rows[c][name] = None
    frame = pd.DataFrame(rows).T.astype(float)
    return {'per_category': frame.to_dict(), 'macro_average': frame.mean().to_dict(),
            'aggregate': {'balanced_accuracy': float(metrics.balanced_multiclass_accuracy(t, p, w))}}


def plain(x):
    "For JSON: NaN is null"
    if isinstance(x, dict): return {k: plain(v) for k, v in x.items()}
    if isinstance(x, str) or x is None: return x
    return None if math.isnan(x) else float(x)


def refusals(table, folder):
    "Submissions that the package does not take, and what it says"
    from isic_challenge_scoring.classification import ClassificationMetric, ClassificationScore
    from isic_challenge_scoring.types import ScoreError
    score = lambda file: ClassificationScore.from_file(folder/'truth.csv', folder/file, ClassificationMetric.BALANCED_ACCURACY)
    write_truth(table, folder/'truth.csv')
    write_submission(table, folder/'good.csv')
    score('good.csv')
    good, out = pd.read_csv(folder/'good.csv'), {}
    bad = {'a column of whole numbers': good.assign(DF=0), 'a missing value': good.assign(MEL=good.MEL.where(good.index != 3)), 'a value above 1': good.assign(NV=good.NV.where(good.index != 3, 1.01)),
           'an image is missing': good[1:], 'an image twice': pd.concat([good, good[:1]]), 'no column image': good.rename(columns={'image': 'image_id'}),
           'codes as column names': good.rename(columns=str.lower), 'a column too many': good.assign(dx='nv')}
    for name, frame in bad.items():
        frame.to_csv(folder/'bad.csv', index=False)
        try: score('bad.csv')
        except ScoreError as e: out[name] = str(e)
        else: out[name] = None
    return out


def main(args):
    warnings.simplefilter('ignore')
    args.out.mkdir(exist_ok=True)
    tables, values = cases(), {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, table in tables.items():
            values[name] = plain(official(table, folder))
        refused = refusals(tables['random'], folder)
    pd.concat([t.assign(case=name) for name, t in tables.items()])[['case', 'image_id', *CODES, 'dx']].to_csv(args.out/'isic_tables.csv', index=False, lineterminator='\n')
    write_submission(tables['random'], args.out/'isic_submission.csv')
    write_truth(tables['random'], args.out/'isic_groundtruth.csv')
    versions = {p: importlib.metadata.version(p) for p in ('isic-challenge-scoring', 'scikit-learn', 'pandas', 'numpy')}
    text = json.dumps({'made_by': 'tools/make_isic_reference.py', 'versions': versions, 'refused': refused, 'values': values}, indent=0)
    (args.out/'isic_scores.json').write_text(text + '\n')
    for name, v in values.items(): print(f"{name}: {len(tables[name])} images, balanced accuracy {v['aggregate']['balanced_accuracy']}", v.get('error', ''))
    print(json.dumps(refused, indent=1))
    print(sum(f.stat().st_size for f in args.out.glob('isic_*')), 'bytes')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, default=Path(__file__).resolve().parent.parent/'tests'/'data', help='folder of the files')
    main(parser.parse_args())
