"""What each part of the packaged network's recipe brings, and what a network is worth where it was not trained.

    HAM10000_DIR=... python benchmarks/variants.py --milk10k MILK10K --out runs/variants
    python benchmarks/variants.py

Trainings on the table of `joined.py`, fold 0 held out. Each is the recipe `ham10000` with its first step alone (10
epochs at 128 pixels) and one thing changed: the random seed, the augmentation, one stage, averaged weights, patient
data, or the images: without one source, from one source only, without a second fold. `soup` and `mean` are of the
networks without a second fold, of which none has seen fold 0. `full` has the whole recipe. The lesions held out are the
same for all; networks without a source also answer for all of its images. The first form trains what is not finished in
--out (on a GPU a minute or two each; --only takes some of them) and packs the predictions; the second reads
variants.csv.xz. Differences from `base` are paired over lesions. Nothing is chosen on MILK10k's lesions for judging.
"""
import argparse, os
from dataclasses import replace
from datetime import date
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).resolve().parent/'results'
TABLES = RESULTS/'variants.csv.xz'
SOURCES = ('rosendahl', 'vidir_modern', 'vidir_molemax', 'vienna_dias', 'MILK10k')
SHORT = ((128, 10),)
# by name: fields of the recipe, and how it is trained
VARIANTS = dict(
    base={}, seed43=dict(seed=43), seed44=dict(seed=44), no_camera=dict(augment='standard'), ema=dict(ema=True),
    one_stage=dict(stages=1), patient=dict(patient=True),
    **{f'without_{source}': dict(without=source) for source in SOURCES},
    **{f'only_{source}': dict(only=source) for source in SOURCES if source != 'vienna_dias'},
    **{f'fold{k}_left_out_too': dict(second=k) for k in (1, 2, 3)}, full=dict(steps=None))
MEMBERS = [name for name in VARIANTS if name.startswith('fold')]
TRAINED_ON = ('without', 'only', 'second')


def recipe_of(name):
    "The recipe of a variant"
    from skin_lesions.recipes import find_recipe
    whole, changes = find_recipe('ham10000'), {k: v for k, v in VARIANTS[name].items() if k not in TRAINED_ON}
    changes.pop('seed', None)
    steps = changes.pop('steps', SHORT) or whole.steps
    return replace(whole, name=name, about=f'{name}, of the packaged network', steps=steps, **changes)


def sources_of(meta):
    "The source of each image: that of HAM10000, or MILK10k"
    file = Path(os.environ['HAM10000_DIR'])/'HAM10000_sources.csv'
    return meta.image_id.map(pd.read_csv(file).set_index('image_id').dataset).fillna('MILK10k')


def images_of(name, meta):
    "The table of a variant, with `is_valid`"
    variant, source = VARIANTS[name], sources_of(meta)
    held_out = meta.fold == 0
    if 'without' in variant: held_out |= source == variant['without']
    train = ~held_out & ~meta.group.isin(meta.group[held_out])
    if 'only' in variant: train &= source == variant['only']
    if 'second' in variant: train &= meta.fold != variant['second']
    frame = meta[held_out | train].reset_index(drop=True)
    frame['is_valid'] = (held_out[held_out | train]).to_numpy()
    frame.attrs = dict(meta.attrs)
    return frame


def train(name, meta, args):
    "The run folder of a variant; what is finished stays"
    from skin_lesions.train import train_run
    recipe = recipe_of(name)
    if args.epochs: recipe = replace(recipe, steps=tuple((size, args.epochs) for size, _ in recipe.steps))
    return train_run(recipe, images_of(name, meta), Path(args.out)/name, split='own', resume=True,
                     seed=VARIANTS[name].get('seed', 42), cache=args.cache, workers=args.workers, device=args.device,
                     report=False)


def answers(name, run, args):
    "What a network answers for the lesions held out and for MILK10k's lesions for judging"
    from joined import CLASSES, judging
    from skin_lesions.classes import class_set, map_classes
    from skin_lesions.predict import load_predictor
    from skin_lesions.predictions import read_predictions
    own, file = read_predictions(run/'predictions.csv'), run/'judging.csv'
    codes = [c for c in own if c not in ('image_id', 'dx', 'group')]
    if not file.is_file():
        meta = map_classes(judging(args.milk10k), class_set(CLASSES))
        meta = meta[meta.dx.notna()].reset_index(drop=True)
        if args.images: meta = meta.iloc[:args.images]
        table = load_predictor(run, args.device).predict(meta.drop(columns='dx'), progress=False)
        table = table.assign(dx=meta.dx.to_numpy(), group=meta.group.to_numpy())
        table[['image_id', *codes, 'dx', 'group']].to_csv(file, index=False)
    judged = pd.read_csv(file, dtype=dict(group=str))
    parts = [own.assign(part='held out'), judged.assign(part='MILK10k, for judging')]
    return pd.concat(parts, ignore_index=True)[['image_id', *codes, 'dx', 'group', 'part']].assign(variant=name)


def together(meta, args):
    "Soup and mean of the networks without a second fold: what they answer for the lesions held out"
    from skin_lesions.bundle import bundle_content
    from skin_lesions.networks import EnsembleNet
    from skin_lesions.predict import Predictor, load_predictor
    from skin_lesions.soup import average_weights, image_batches
    members = [load_predictor(Path(args.out)/name, 'cpu') for name in MEMBERS]
    frame = images_of('base', meta)
    some = frame[~frame.is_valid].sample(min(2000, int((~frame.is_valid).sum())), random_state=42)
    nets, first = [m.model for m in members], members[0]
    view = {k: first.record[k] for k in ('side', 'preprocess', 'crop', 'normalization')}
    parts = []
    for name, net in dict(soup=average_weights(nets, image_batches(first, some.path)), mean=EnsembleNet(nets)).items():
        record, _ = bundle_content(net, classes=first.classes, view=view, trained_on=frame)
        rows = frame[frame.is_valid].reset_index(drop=True)
        table = Predictor(net, record, device='cpu').predict(rows.drop(columns='dx'), progress=False)
        table = table.assign(dx=rows.dx.to_numpy(), group=rows.group.to_numpy(), part='held out', variant=name)
        parts.append(table[['image_id', *first.codes, 'dx', 'group', 'part', 'variant']])
    return parts


def run_all(args):
    "Train and ask the variants, and pack what they answer"
    from joined import joined
    meta = joined(os.environ['HAM10000_DIR'], args.milk10k)
    if args.images:
        few = meta.groupby(['collection', 'fold', 'dx'], group_keys=False).head(args.images).reset_index(drop=True)
        few.attrs, meta = meta.attrs, few
    tables = []
    for name in args.only or VARIANTS:
        tables.append(answers(name, train(name, meta, args), args))
        print('finished:', name, flush=True)
    if args.only: return
    table = pd.concat([*tables, *together(meta, args)], ignore_index=True)
    source = dict(zip(meta.image_id, sources_of(meta)))
    table['source'] = table.image_id.map(source).fillna('MILK10k')
    table.to_csv(TABLES, index=False, float_format='%.4f', compression=dict(method='xz', preset=9))


def stored():
    "The packed predictions: by variant and part"
    from skin_lesions.classes import class_set, with_classes
    from joined import CLASSES
    table, classes = pd.read_csv(TABLES, dtype=dict(group=str)), class_set(CLASSES)
    table = table[table.dx.notna()]
    common = set(table.image_id[(table.variant == 'base') & (table.part == 'held out')])
    table.loc[(table.part == 'held out') & ~table.image_id.isin(common), 'part'] = 'source left out'
    parts = {}
    for key, rows in table.groupby(['variant', 'part'], sort=False):
        parts[key] = with_classes(rows.drop(columns=['variant', 'part']).reset_index(drop=True), classes)
    return parts


def part_of(table, rows):
    "Some rows of a table"
    from skin_lesions.classes import classes_of, with_classes
    return with_classes(table[rows].reset_index(drop=True), classes_of(table))


def seven(table):
    "HAM10000 has no squamous cell carcinoma: its probability counts as actinic keratosis and Bowen's disease"
    from skin_lesions.classes import HAM10000, with_classes
    return with_classes(table.assign(akiec=table.akiec + table.sccka).drop(columns='sccka'), HAM10000)


def collections(parts, name):
    "The tables of a variant by collection: HAM10000's lesions held out, and MILK10k's for judging"
    own = parts[name, 'held out']
    tables = dict(HAM10000=seven(part_of(own, own.source != 'MILK10k')))
    judged = parts.get((name, 'MILK10k, for judging'))
    return tables if judged is None else tables | dict(MILK10k=judged)


def decided(table):
    "With the decisions of a rule fitted on other lesions; None where some class has a single lesion or none"
    from skin_lesions.classes import classes_of
    from skin_lesions.posthoc import decide_out_of_fold
    lesions = table.groupby('dx').group.nunique().reindex(list(classes_of(table)), fill_value=0)
    return decide_out_of_fold(table) if lesions.min() > 1 else None


def measured(table, base):
    "Scores with their intervals by the most probable class and by the rule, and the paired differences from the base"
    from skin_lesions.evaluate import compare, score_intervals
    found, by_rule = score_intervals(table, warn=False), decided(table)
    def ends(row): return [round(float(v), 4) for v in row[['value', 'low', 'high']]]
    rows = dict(accuracy=('accuracy', 'all'), average_recall=('average_recall', 'all'), macro_auc=('auc', 'macro'))
    result = dict(images=len(table), lesions=int(table.group.nunique()))
    result |= {name: ends(found.loc[index]) for name, index in rows.items()}
    if by_rule is not None:
        result['by_rule'] = ends(score_intervals(by_rule, warn=False).loc['average_recall', 'all'])
    if base is None: return result
    pairs = dict(average_recall=(base, table, ('recall', 'macro')), macro_auc=(base, table, ('auc', 'macro')))
    if by_rule is not None: pairs['by_rule'] = (decided(base), by_rule, ('recall', 'macro'))
    result['difference'] = {}
    for name, (a, b, index) in pairs.items():
        row = compare(a, b).loc[index]
        result['difference'][name] = [round(float(row[k]), 4) for k in ('difference', 'low', 'high')]
    return result


def by_source(parts):
    "What was trained on against the source of the lesions held out, as `cross_table` has it"
    import json
    from skin_lesions.cross_collection import cross_table
    def trained(name):
        if name == 'base': return 'all five'
        how, _, source = name.partition('_')
        return f'all without {source}' if how == 'without' else f'{source} only'
    tables = {}
    for name in [v for v in VARIANTS if v == 'base' or v.startswith(('without_', 'only_'))]:
        own = parts[name, 'held out']
        for source in SOURCES[:-1]: tables[trained(name), source] = part_of(own, own.source == source)
        tables[trained(name), 'MILK10k'] = parts[name, 'MILK10k, for judging']
    return json.loads(cross_table(tables).round(4).to_json(orient='records'))


def measure():
    "Write the results of the packed predictions"
    from skin_lesions.core import write_json
    parts = stored()
    names = list(dict.fromkeys(name for name, _ in parts))
    base, rows = collections(parts, 'base'), {}
    for name in names:
        if name.startswith(('without_', 'only_')): continue
        rows[name] = {where: measured(table, None if name == 'base' else base[where])
                      for where, table in collections(parts, name).items()}
    whole = {name: measured(table if name == 'without_MILK10k' else seven(table), None)
             for (name, part), table in parts.items() if part == 'source left out'}
    costs = {}
    for source in SOURCES:
        part = 'MILK10k, for judging' if source == 'MILK10k' else 'held out'
        a, b = (parts[name, part] for name in ('base', f'without_{source}'))
        a, b = (part_of(t, t.source == source) for t in (a, b))
        costs[source] = measured(b, a) if source == 'MILK10k' else measured(seven(b), seven(a))
    about = dict(date=date.today().isoformat(), machine='one NVIDIA H200', fold=0, seed=42,
                 interval='95 %, bootstrap over lesions, 1000 draws')
    write_json(about | dict(rows=rows, left_out=costs, all_of_a_source=whole, sources=by_source(parts)),
               RESULTS/'variants.json')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--milk10k', help='folder of MILK10k; without it, the stored predictions are read')
    parser.add_argument('--out', default='runs/variants', help='folder of the trainings')
    parser.add_argument('--only', nargs='+', choices=VARIANTS, help='some of them')
    parser.add_argument('--cache', default='auto', help='folder for decoded images')
    parser.add_argument('--workers', type=int, help='data-loading workers')
    parser.add_argument('--device', help='cpu, cuda, ...; without it, the default device')
    parser.add_argument('--epochs', type=int, help='of each step, for a trial')
    parser.add_argument('--images', type=int, help='of each class, fold and collection, for a trial')
    args = parser.parse_args()
    if args.milk10k: run_all(args)
    if not args.only: measure()
