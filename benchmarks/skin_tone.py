"""How far the individual typology angle agrees with what people saw, and what it is in HAM10000 by source and lesion.

    HAM10000_DIR=... python benchmarks/skin_tone.py --milk10k MILK10K --masks HAM10000/HAM10000_segmentations
    HAM10000_DIR=... python benchmarks/skin_tone.py --milk10k MILK10K --masks HAM10000/HAM10000_segmentations --kept

MILK10k has a scale of its own (0 very dark to 5 very light), HAM10000 none. Spearman's rank correlation with an
interval over lesions; how far apart two photographs of one lesion are; the out-of-fold predictions of the recipe `base`
by skin tone. Writes benchmarks/results/skin_tone.json, and the angles to benchmarks/results/skin_tone.csv.gz, which
--kept reads again (2 minutes).
"""
import argparse, json, os
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(__file__).resolve().parent/'results'


def angles(args, meta, masks=None):
    "The skin tone of images: of the kept file, or measured"
    from skin_lesions.skin import SKIN_TONES, skin_tones
    if not args.kept: return skin_tones(meta, masks, show=False)
    kept = pd.read_csv(RESULTS/'skin_tone.csv.gz').set_index('image_id').loc[meta.image_id].reset_index()
    names = [name for name, _ in SKIN_TONES]+['unknown']
    return kept.assign(skin_tone=pd.Categorical(kept.skin_tone, names, ordered=True))


def rank_correlation(a, b):
    "Spearman's: the correlation of ranks, ties share theirs"
    return float(np.corrcoef(pd.Series(a).rank(), pd.Series(b).rank())[0, 1])


def correlation_interval(a, b, groups, n=2000, seed=42):
    "The correlation with its 95 % interval, groups with replacement"
    rng, (number, names) = np.random.default_rng(seed), pd.factorize(groups)
    members = pd.Series(np.arange(len(number))).groupby(number).agg(list)
    drawn = []
    for _ in range(n):
        rows = np.concatenate(members.iloc[rng.integers(len(names), size=len(names))].tolist())
        drawn.append(rank_correlation(a[rows], b[rows]))
    low, high = np.quantile(drawn, [.025, .975])
    return dict(value=rank_correlation(a, b), low=float(low), high=float(high), images=len(a), lesions=len(names))


def between_photographs(tones):
    "Standard deviation of the angle between images of one lesion, and between all images; intraclass correlation"
    known = tones[tones.ita.notna()]
    several = known[known.groupby('group').ita.transform('size') > 1]
    within = several.groupby('group').ita.agg(['var', 'size'])
    if not len(several): return None
    variance = float((within['var']*(within['size']-1)).sum()/(within['size']-1).sum())
    same = several.groupby('group').skin_tone.nunique().eq(1).mean()
    return dict(lesions=len(within), images=len(several), within=variance**.5, all=float(known.ita.std()),
                reliability=float(1-variance/known.ita.var()), same_category=float(same))


def quartiles(tones, by):
    "Images and quartiles of the angle in each part"
    parts = tones[tones.ita.notna()].groupby(by, observed=True)
    points = dict(q25=.25, median=.5, q75=.75)
    return {str(name): dict(images=len(part), **{q: float(part.ita.quantile(v)) for q, v in points.items()})
            for name, part in parts}


def counted(tones):
    "Images, those without an angle, those whose skin is bluish, and the median of the standard error"
    return dict(images=len(tones), unknown=int(tones.ita.isna().sum()), beyond_90=int((tones.ita > 90).sum()),
                error=float(tones.ita_error.median()))


def by_tone(table, meta, column):
    "Rows of `scores_by`"
    from skin_lesions.evaluate import scores_by
    found = scores_by(table, meta, column)
    return [dict(subgroup=str(name), **row) for name, row in json.loads(found.T.to_json()).items()]


def milk10k(args):
    "The agreement with MILK10k's scale"
    from skin_lesions.readers import read_metadata
    meta = read_metadata(args.milk10k)
    tones = angles(args, meta).assign(group=meta.group, scale=meta.skin_type)
    known = tones[tones.ita.notna() & (tones.scale != 'unknown')]
    scale = known.scale.astype(float).to_numpy()
    sure = ((known.ita < 90) & (known.ita > -90) & (known.ita_error < 5)).to_numpy()
    crossed = pd.crosstab(known.scale, known.skin_tone)
    values, groups = known.ita.to_numpy(), known.group.to_numpy()
    return tones, dict(**counted(tones), correlation=correlation_interval(values, scale, groups),
                       correlation_of_sure=correlation_interval(values[sure], scale[sure], groups[sure]),
                       by_scale=quartiles(known, 'scale'), crossed=json.loads(crossed.T.to_json()),
                       spread=float(known.ita.std()))


def ham10000(args):
    "HAM10000's angles, by source and lesion"
    from skin_lesions.readers import read_metadata
    from skin_lesions.skin import skin_tones
    from skin_lesions.split import lesion_folds
    meta = read_metadata(os.environ['HAM10000_DIR'])
    if args.fold is not None: meta = lesion_folds(meta, 5, 42).query('fold==@args.fold').reset_index(drop=True)
    sources = pd.read_csv(Path(os.environ['HAM10000_DIR'])/'HAM10000_sources.csv').set_index('image_id').dataset
    tones = angles(args, meta, args.masks).assign(group=meta.group, source=meta.image_id.map(sources))
    ring = skin_tones(meta.iloc[::5].reset_index(drop=True), show=False)
    both = tones.merge(ring, on='image_id', suffixes=('', '_ring')).dropna(subset=['ita', 'ita_ring'])
    difference = (both.ita_ring-both.ita)
    counts = tones.skin_tone.value_counts(sort=False).astype(int).to_dict()
    return tones, dict(fold=args.fold, **counted(tones), counts=counts, by_source=quartiles(tones, 'source'),
                       photographs=between_photographs(tones), photographs_of_source=
                       {name: between_photographs(part) for name, part in tones.groupby('source')},
                       ring=dict(images=len(both), median=float(difference.median()), deviation=float(difference.std()),
                                 correlation=rank_correlation(both.ita, both.ita_ring)))


def out_of_fold_scores(tones, name='base'):
    "Average recall of a recipe's out-of-fold predictions by skin tone"
    from skin_lesions.classes import HAM10000, with_classes
    table = pd.read_csv(RESULTS/'experiments'/f'{name}.csv.gz')
    table = table[(table.split == 'lesion') & (table.scale == 'reduced') & table.views.isna()]
    table = table[table.image_id.isin(tones.image_id)].drop_duplicates('image_id')
    table = with_classes(table[['image_id', 'dx', 'group', *HAM10000.codes]].reset_index(drop=True), HAM10000)
    return dict(recipe=name, images=len(table), rows=by_tone(table, tones, 'skin_tone'))


def main(args):
    tones, milk = milk10k(args)
    ham_tones, ham = ham10000(args)
    columns = ['image_id', 'ita', 'ita_error', 'skin_tone']
    both = pd.concat([ham_tones[columns], tones[columns]]).round(2)
    if not args.kept: both.to_csv(RESULTS/'skin_tone.csv.gz', index=False)
    about = dict(date=date.today().isoformat(), interval='95 %, bootstrap over lesions, 2000 draws', seed=42)
    result = dict(**about, milk10k=milk, ham10000=ham, out_of_fold=out_of_fold_scores(ham_tones))
    (RESULTS/'skin_tone.json').write_text(json.dumps(result, indent=1, allow_nan=False)+'\n')
    print(json.dumps(result, indent=1)[:6000])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--milk10k', required=True, help='folder of MILK10k')
    parser.add_argument('--masks', help="folder of HAM10000's lesion masks; without it, the ring along the border")
    parser.add_argument('--fold', type=int, default=0, help='of HAM10000, five by lesion, whose images are looked at')
    parser.add_argument('--kept', action='store_true', help='read the angles of the last run')
    main(parser.parse_args())
