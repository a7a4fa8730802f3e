"""Is the map on the lesion? A trained run on its own validation images, with HAM10000's lesion masks.

    python benchmarks/gradcam_overlap.py --run runs/two_stages --data HAM10000

The table of `nbs/51_cam_checks.ipynb`. The maps explain the predicted class. The result goes to
benchmarks/results/gradcam_overlap.json: overlap by class and for right and wrong predictions, two baselines, intervals
over lesions, sanity checks.
"""
import argparse, datetime, json, platform
from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(__file__).resolve().parent/'results'
BASELINES = (('energy', 'lesion_area', 'uniform'), ('energy', 'energy_gaussian', 'Gaussian'),
             ('pointing', 'lesion_area', 'uniform'), ('pointing', 'pointing_gaussian', 'Gaussian'))


def validation_images(run, data):
    "The metadata of the images that the run was validated on"
    from skin_lesions.readers import read_metadata
    split = pd.read_csv(run/'split.csv')
    meta = read_metadata(data)
    return meta[meta.image_id.isin(split.image_id[split.is_valid])].reset_index(drop=True)


def differences(table):
    "Right minus wrong, plain and within classes, with intervals"
    from skin_lesions.cam_checks import right_wrong_difference
    measures = {'energy': table.energy, 'energy minus lesion area': table.energy - table.lesion_area,
                'energy minus Gaussian': table.energy - table.energy_gaussian, 'pointing': table.pointing}
    rows = []
    for name, values in measures.items():
        for by_class in (False, True):
            row = right_wrong_difference(table.assign(measure=values), 'measure', by_class=by_class)
            rows.append(dict(measure=name + (', within classes' if by_class else ''), **row))
    return rows


def mean_over_lesions(values, units, draws):
    "The mean of numbers with its bootstrap interval over lesions"
    known, n = ~np.isnan(values), units.max() + 1
    sums, counts = np.bincount(units[known], values[known], n), np.bincount(units[known], minlength=n)
    low, high = np.quantile((draws@sums)/(draws@counts), [.025, .975])
    return dict(value=float(values[known].mean()), low=float(low), high=float(high))


def against_baselines(table, n=1000, seed=42):
    "Mean of the map's measure minus the baseline's, with a bootstrap interval over lesions"
    units = pd.factorize(table.group)[0]
    k = units.max() + 1
    draws = np.random.default_rng(seed).multinomial(k, np.full(k, 1/k), size=n)
    rows = []
    for measure, baseline, name in BASELINES:
        values = (table[measure] - table[baseline]).to_numpy(float)
        rows.append(dict(difference=f'{measure} minus {name}', **mean_over_lesions(values, units, draws)))
    return rows


def paired(table, against, n=1000, seed=42):
    "The energy of the contrast's maps minus that of the classes' maps, over images where both have one"
    units = pd.factorize(table.group)[0]
    k = units.max() + 1
    draws = np.random.default_rng(seed).multinomial(k, np.full(k, 1/k), size=n)
    return mean_over_lesions((against.energy - table.energy).to_numpy(float), units, draws)


def sanity(predictor, meta, n):
    "Cascading randomisation and deletion and insertion on the first `n` images, one class after another"
    from skin_lesions.cam_checks import curve_areas, deletion_insertion, randomization_check
    from skin_lesions.gradcam import GradCAM, image_inputs
    ordered = meta.assign(k=meta.groupby('dx').cumcount()).sort_values(['k', 'dx'])
    chosen = ordered.head(n).reset_index(drop=True)
    xb, _ = image_inputs(predictor, chosen)
    randomization = randomization_check(predictor, xb, steps=26)
    areas = curve_areas(deletion_insertion(predictor, xb, GradCAM(predictor).cam(xb)))
    return dict(images=len(chosen), randomization=randomization.to_dict('records'), areas=areas.to_dict())


def map_of(predictor, meta):
    "The layer that is explained and the size of its map"
    from skin_lesions.gradcam import GradCAM, image_inputs
    explain = GradCAM(predictor)
    size = list(explain.cam(image_inputs(predictor, meta.head(1))[0], resize=False).shape[1:])
    return dict(layer=next(iter(explain.layers.values())), map_size=size)


def run_settings(record):
    "What the results file says of the training"
    recipe = record['recipe']
    size, epochs = recipe['steps'][-1][0], sum(n for _, n in recipe['steps'])
    settings = dict(model='two-stage' if recipe['stages'] == 2 else 'one-stage', size=size, epochs=epochs)
    settings |= {k: recipe[k] for k in ('arch', 'crop', 'bs', 'lr', 'gamma', 'alpha', 'mixup')}
    asked = {k: record['asked'][k] for k in ('seed', 'fold', 'folds', 'split')}
    return settings | asked | dict(weights=record['weights'])


def measure(predictor, meta, record, masks, args):
    "The overlap table, and everything that is computed from maps"
    from skin_lesions.cam_checks import overlap_summary, overlap_table
    def all_of(frame, **kwargs):
        table = overlap_table(predictor, frame, masks, show=not args.quiet, **kwargs)
        return overlap_summary(table).loc['all'].to_dict()
    table, stages = overlap_table(predictor, meta, masks, show=not args.quiet), {}
    if record['recipe']['stages'] == 2:
        first = record['recipe']['first'] or predictor.classes.first
        stages = {'stage one': all_of(meta, stage='one'),
                  'stage two, no nevi': all_of(meta[meta.dx != first].reset_index(drop=True), stage='two')}
    against = overlap_table(predictor, meta, masks, show=not args.quiet, target='contrast')
    contrast = {code: overlap_summary(part).loc['all'].to_dict() for code, part in against.groupby('explained')}
    contrast = {'all': overlap_summary(against).loc['all'].to_dict()} | contrast
    layers = {layer: all_of(meta, layer=layer) for layer in args.layers}
    explained = {code: overlap_summary(part).loc['all'].to_dict() for code, part in table.groupby('explained')}
    return table, dict(by_class_explained=explained, contrast=contrast, contrast_minus_class=paired(table, against),
                       stages=stages, other_layers=layers)


def print_result(result):
    "Print the tables"
    print(pd.DataFrame(result['summary']).round(3).to_string(index=False))
    for key in ('against_baselines', 'right_minus_wrong'):
        print(pd.DataFrame(result[key]).round(3).to_string(index=False))
    parts = result['stages'] | result['other_layers'] | result['by_class_explained']
    print(pd.DataFrame(parts).T.round(3).to_string())
    print(pd.DataFrame(result['sanity']['randomization']).round(2).to_string(index=False), result['sanity']['areas'])


def main(args):
    import torch
    from skin_lesions.cam_checks import overlap_summary
    from skin_lesions.core import versions
    from skin_lesions.predict import load_predictor
    if args.threads: torch.set_num_threads(args.threads)
    run, data = Path(args.run), Path(args.data)
    record = json.loads((run/'run.json').read_text())
    predictor, meta = load_predictor(run), validation_images(run, data)
    if args.limit: meta = meta.sample(args.limit, random_state=42).sort_values('image_id').reset_index(drop=True)
    table, parts = measure(predictor, meta, record, args.masks or data/'HAM10000_segmentations', args)
    if args.table: table.to_csv(args.table, index=False)
    result = dict(date=args.date or datetime.date.today().isoformat(),
                  machine=args.machine or f'{platform.machine()}, CPU only', versions=versions(),
                  run=run_settings(record), split=record['split']['rule'], images=len(table),
                  lesions=int(table.group.nunique()), masks_missing=len(table.attrs['no_mask']),
                  unreadable=len(table.attrs['unreadable']), method='gradcam', **map_of(predictor, meta),
                  target='predicted class', accuracy=float(table.right.mean()),
                  average_recall=record.get('scores', {}).get('average_recall'),
                  summary=overlap_summary(table).rename_axis('images of').reset_index().to_dict('records'), **parts,
                  against_baselines=against_baselines(table), right_minus_wrong=differences(table),
                  interval='95 %, percentile bootstrap over lesions, 1,000 draws',
                  sanity=sanity(predictor, meta, args.sanity))
    Path(args.out).write_text(json.dumps(result, indent=1) + '\n')
    print_result(result)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--run', required=True, help='run folder of `skin_lesions train`')
    parser.add_argument('--data', required=True, help='folder of HAM10000')
    parser.add_argument('--masks', help='<image_id>_segmentation.png; without it, HAM10000_segmentations in --data')
    parser.add_argument('--out', default=str(RESULTS/'gradcam_overlap.json'), help='JSON to write')
    parser.add_argument('--table', help='CSV to write with a row an image')
    parser.add_argument('--limit', type=int, help='only so many images, at random')
    parser.add_argument('--layers', nargs='*', default=[], help='further layers to average, by name')
    parser.add_argument('--sanity', type=int, default=64, help='images for the sanity checks')
    parser.add_argument('--threads', type=int, help='of PyTorch; without it, all')
    parser.add_argument('--date', help='of the run, for the results file')
    parser.add_argument('--machine', help='what it ran on, for the results file')
    parser.add_argument('--quiet', action='store_true', help='no progress bars')
    main(parser.parse_args())
