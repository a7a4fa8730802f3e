"""What each part of the packaged network's recipe brings, and what a network is worth where it was not trained.

    HAM10000_DIR=... python benchmarks/variants.py --milk10k MILK10K --out runs/variants --pack
    python benchmarks/variants.py

Trainings on the table of `joined.py`, fold 0 held out. Each is the recipe `ham10000` with its first step alone (10
epochs at 128 pixels) and one thing changed: the random seed, the augmentation, one stage, averaged weights (a moving
average, the last three epochs), patient data, a pretext first, or the images: without one source, from one source only,
without a second fold. `full` has the whole recipe, and so have those named after it: other seeds, a third step at 288
pixels from where a seed ended, networks without a second fold, and `distilled`, which learns from these. `soup` and
`mean` are of networks without a second fold, of which none has seen fold 0. The lesions held out are the same for all;
networks without a source also answer for all of its images. The first form trains what is not finished in --out (on a
GPU a minute or two each; --only takes some of them) and adds the predictions to variants.csv.xz; the second reads it.
Differences from `base`, or what COMPARED names, are paired over lesions. Nothing is chosen on MILK10k's lesions for
judging.
"""
import argparse, os
from copy import deepcopy
from dataclasses import replace
from datetime import date
from pathlib import Path

import pandas as pd
from fastai.callback.core import Callback
from skin_lesions.architectures import read_weights
from skin_lesions.soup import average_weights

RESULTS = Path(__file__).resolve().parent/'results'
TABLES = RESULTS/'variants.csv.xz'
SOURCES = ('rosendahl', 'vidir_modern', 'vidir_molemax', 'vienna_dias', 'MILK10k')
SHORT, WHOLE = ((128, 10),), dict(steps=None)
# by name: fields of the recipe, and how it is trained
VARIANTS = dict(
    base={}, seed43=dict(seed=43), seed44=dict(seed=44), no_camera=dict(augment='standard'), ema=dict(ema=True),
    last_three=dict(last=3), one_stage=dict(stages=1), patient=dict(patient=True),
    rotation=dict(pretext='rotation', pretext_epochs=10), restoration=dict(pretext='restoration', pretext_epochs=10),
    **{f'without_{source}': dict(without=source) for source in SOURCES},
    **{f'only_{source}': dict(only=source) for source in SOURCES if source != 'vienna_dias'},
    **{f'fold{k}_left_out_too': dict(second=k) for k in (1, 2, 3)},
    full=WHOLE, full_seed43=WHOLE | dict(seed=43), full_seed44=WHOLE | dict(seed=44),
    # each step halves the learning rate, as the recipe's own two do
    **{f'288px_seed{s}': dict(steps=((288, 3),), lr=2.5e-4, seed=s, after=f'full_seed{s}') for s in (43, 44)},
    **{f'full_fold{k}_left_out_too': WHOLE | dict(second=k) for k in (1, 2, 3)},
    distilled=WHOLE | dict(teachers=tuple(f'full_fold{k}_left_out_too' for k in (1, 2, 3))))
MEMBERS = [name for name in VARIANTS if name.startswith('fold')]
FULL_MEMBERS = VARIANTS['distilled']['teachers']
HOW = ('without', 'only', 'second', 'seed', 'last', 'after', 'teachers')
COMPARED = {'288px_seed43': 'full_seed43', '288px_seed44': 'full_seed44', 'full_soup': 'full', 'full_mean': 'full',
            'full_mean_views': 'full_mean', 'distilled': 'full_mean', 'distilled_views': 'distilled'}


def recipe_of(name):
    "The recipe of a variant"
    from skin_lesions.recipes import find_recipe
    whole, changes = find_recipe('ham10000'), {k: v for k, v in VARIANTS[name].items() if k not in HOW}
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


class LastEpochs(Callback):
    "Leave the mean of the weights after the last epochs in the network"
    def __init__(self, epochs): self.epochs, self.kept = epochs, []

    def after_epoch(self):
        if self.epoch >= self.n_epoch - self.epochs: self.kept.append(deepcopy(self.model))

    def after_fit(self):
        if hasattr(self.learn, 'gather_preds'): return
        if len(self.kept) != self.epochs:
            raise ValueError(f'not all of the last {self.epochs} epochs are known: train again')
        self.model.load_state_dict(average_weights(self.kept).state_dict())


class StartFrom(Callback):
    "Begin at the weights of a finished run, heads too"
    order = 90 # before a killed training's state is read

    def __init__(self, run): self.file = Path(run)/'model.safetensors'

    def before_fit(self):
        if hasattr(self.learn, 'gather_preds'): return
        weights = read_weights(self.file)
        self.model.load_state_dict({k: weights[k].to(v.dtype) for k, v in self.model.state_dict().items()})


def callbacks_of(name, out):
    "What a variant's training is given beside its recipe"
    variant = VARIANTS[name]
    last = [LastEpochs(variant['last'])] if 'last' in variant else []
    return last + ([StartFrom(Path(out)/variant['after'])] if 'after' in variant else [])


def teacher(name, meta, args):
    "What the mean of a variant's teachers says of its training images; None where it has no teachers"
    from skin_lesions.predict import load_predictor
    from skin_lesions.predictions import ensemble, read_predictions
    if 'teachers' not in VARIANTS[name]: return None
    images, tables = images_of(name, meta), []
    for run in (Path(args.out)/of for of in VARIANTS[name]['teachers']):
        file = run/'training.csv'
        if not file.is_file():
            asked = images[~images.is_valid].reset_index(drop=True)
            load_predictor(run, args.device).predict(asked, progress=False).to_csv(file, index=False)
        tables.append(read_predictions(file))
    return ensemble(tables, 'arithmetic')


def pretext_images(name, meta, args):
    "The images of a pretext: those to train on, and MILK10k's of other diagnoses; None where there is no pretext"
    from joined import CLASSES, for_judging, read_milk10k
    from skin_lesions.classes import class_set, map_classes
    if 'pretext' not in VARIANTS[name]: return None
    milk = read_milk10k(args.milk10k)
    others = milk[~for_judging(milk.group) & map_classes(milk, class_set(CLASSES)).dx.isna()]
    return pd.concat([images_of(name, meta), others.assign(is_valid=False)], ignore_index=True)


def train(name, meta, args):
    "The run folder of a variant; what is finished stays"
    from skin_lesions.train import run_state, train_run
    out = Path(args.out)/name
    if run_state(out) == 'complete': return out
    recipe = recipe_of(name)
    if args.epochs:
        steps = tuple((size, args.epochs) for size, _ in recipe.steps)
        recipe = replace(recipe, steps=steps, pretext_epochs=args.epochs)
    return train_run(recipe, images_of(name, meta), out, split='own', resume=True,
                     seed=VARIANTS[name].get('seed', 42), cache=args.cache, workers=args.workers, device=args.device,
                     teacher=teacher(name, meta, args), pretext_images=pretext_images(name, meta, args),
                     cbs=callbacks_of(name, args.out), report=False)


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


def asked_together(name, net, first, frame, views=None):
    "What several networks answer together for the lesions held out"
    from skin_lesions.bundle import bundle_content
    from skin_lesions.predict import Predictor
    view = {k: first.record[k] for k in ('side', 'preprocess', 'crop', 'normalization')}
    record, _ = bundle_content(net, classes=first.classes, view=view, trained_on=frame)
    rows = frame[frame.is_valid].reset_index(drop=True)
    table = Predictor(net, record, device='cpu').predict(rows.drop(columns='dx'), progress=False, views=views)
    table = table.assign(dx=rows.dx.to_numpy(), group=rows.group.to_numpy(), part='held out', variant=name)
    return table[['image_id', *first.codes, 'dx', 'group', 'part', 'variant']]


def together(members, before, meta, args):
    "Soup and mean of networks without a second fold"
    from skin_lesions.networks import EnsembleNet
    from skin_lesions.predict import load_predictor
    from skin_lesions.soup import image_batches
    members = [load_predictor(Path(args.out)/name, 'cpu') for name in members]
    frame, nets, first = images_of('base', meta), [m.model for m in members], members[0]
    some = frame[~frame.is_valid].sample(min(2000, int((~frame.is_valid).sum())), random_state=42)
    soup, mean = average_weights(nets, image_batches(first, some.path)), EnsembleNet(nets)
    yield asked_together(f'{before}soup', soup, first, frame)
    yield asked_together(f'{before}mean', mean, first, frame)
    if not before: return
    yield asked_together(f'{before}mean_views', mean, first, frame, 'dihedral')
    distilled = load_predictor(Path(args.out)/'distilled', 'cpu')
    yield asked_together('distilled_views', distilled.model, distilled, frame, 'dihedral')


def pack(tables, meta):
    "Add predictions to the packed ones; those of a variant that is there already are replaced"
    table = pd.concat(tables, ignore_index=True)
    table['source'] = table.image_id.map(dict(zip(meta.image_id, sources_of(meta)))).fillna('MILK10k')
    if TABLES.is_file():
        before = pd.read_csv(TABLES, dtype=dict(group=str))
        table = pd.concat([before[~before.variant.isin(table.variant)], table], ignore_index=True)
    table.to_csv(TABLES, index=False, float_format='%.4f', compression=dict(method='xz', preset=9))


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
    for members, before in ((MEMBERS, ''), (FULL_MEMBERS, 'full_')):
        if {table.variant[0] for table in tables} >= set(members): tables += together(members, before, meta, args)
    if args.pack: pack(tables, meta)


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
    tables = {name: collections(parts, name) for name in names if not name.startswith(('without_', 'only_'))}
    rows = {name: {where: measured(table, None if name == 'base' else tables[COMPARED.get(name, 'base')].get(where))
                   for where, table in found.items()} for name, found in tables.items()}
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
    parser.add_argument('--pack', action='store_true', help='add the predictions to the stored ones')
    parser.add_argument('--only', nargs='+', choices=VARIANTS, help='some of them')
    parser.add_argument('--cache', default='auto', help='folder for decoded images')
    parser.add_argument('--workers', type=int, help='data-loading workers')
    parser.add_argument('--device', help='cpu, cuda, ...; without it, the default device')
    parser.add_argument('--epochs', type=int, help='of each step, for a trial')
    parser.add_argument('--images', type=int, help='of each class, fold and collection, for a trial')
    args = parser.parse_args()
    if args.milk10k: run_all(args)
    if args.pack or not args.milk10k: measure()
