"""Is the map on the lesion? The table of `nbs/51_cam_checks.ipynb`: a trained run on its own validation images, with HAM10000's lesion masks.

    python benchmarks/gradcam_overlap.py --run runs/two_stages --data HAM10000

The maps explain the predicted class. The table goes to benchmarks/results/gradcam_overlap.json: overlap by class and for right and wrong predictions, two baselines, intervals over lesions, sanity checks.
"""
import argparse, datetime, json, os, platform
from pathlib import Path

import numpy as np
import pandas as pd

REPO = Path(__file__).resolve().parent.parent


def validation_images(run, data):
    "The metadata of the images that the run was validated on"
    from skin_lesions.readers import read_metadata
    split = pd.read_csv(run/'split.csv')
    meta = read_metadata(data)
    return meta[meta.image_id.isin(split.image_id[split.is_valid])].reset_index(drop=True)


def differences(table):
    "Right minus wrong, plain and within classes, with intervals"
    from skin_lesions.cam_checks import right_wrong_difference
    measures = {'energy': table.energy, 'energy minus lesion area': table.energy - table.lesion_area, 'energy minus Gaussian': table.energy - table.energy_gaussian, 'pointing': table.pointing}
    rows = []
    for name, values in measures.items():
        for by_class in (False, True):
            row = right_wrong_difference(table.assign(measure=values), 'measure', by_class=by_class)
            rows.append(dict(measure=name + (', within classes' if by_class else ''), **row))
    return rows


def against_baselines(table, n=1000, seed=42):
    "Mean of the map's measure minus the baseline's, with a bootstrap interval over lesions"
    rows = []
    units = pd.factorize(table.group)[0]
    draws = np.random.default_rng(seed).multinomial(units.max() + 1, np.full(units.max() + 1, 1/(units.max() + 1)), size=n)
    for measure, baseline, name in (('energy', 'lesion_area', 'uniform'), ('energy', 'energy_gaussian', 'Gaussian'), ('pointing', 'lesion_area', 'uniform'), ('pointing', 'pointing_gaussian', 'Gaussian')):
        d = (table[measure] - table[baseline]).to_numpy(float)
        ok = ~np.isnan(d)
        sums, counts = np.bincount(units[ok], d[ok], units.max() + 1), np.bincount(units[ok], minlength=units.max() + 1)
        low, high = np.quantile((draws@sums)/(draws@counts), [.025, .975])
        rows.append(dict(difference=f'{measure} minus {name}', value=float(d[ok].mean()), low=float(low), high=float(high)))
    return rows


def sanity(learn, meta, n):
    "Cascading randomisation and deletion and insertion on the first `n` images, a class after the other"
    from skin_lesions.gradcam import GradCAM, image_inputs
    from skin_lesions.cam_checks import curve_areas, deletion_insertion, randomization_check
    chosen = meta.assign(k=meta.groupby('dx').cumcount()).sort_values(['k', 'dx']).head(n).reset_index(drop=True)
    xb, _ = image_inputs(learn, chosen)
    cams = GradCAM(learn).cam(xb)
    return dict(images=len(chosen), randomization=randomization_check(learn, xb, steps=26).to_dict('records'), areas=curve_areas(deletion_insertion(learn, xb, cams)).to_dict())


def main(args):
    import torch
    from skin_lesions.core import versions
    from skin_lesions.predict import load_predictor
    from skin_lesions.cam_checks import overlap_summary, overlap_table
    if args.threads: torch.set_num_threads(args.threads)
    run, data = Path(args.run), Path(args.data)
    record = json.loads((run/'run.json').read_text())
    learn, meta = load_predictor(run), validation_images(run, data)
    if args.limit: meta = meta.sample(args.limit, random_state=42).sort_values('image_id').reset_index(drop=True)
    table = overlap_table(learn, meta, args.masks or data/'HAM10000_segmentations', show=not args.quiet)
    summary = overlap_summary(table)
    explained = {}
    for stage in ('one', 'two') if 'two' in record['arguments'].get('model', '') else ():
        chosen = meta if stage == 'one' else meta[meta.dx != 'nv'].reset_index(drop=True)
        row = overlap_summary(overlap_table(learn, chosen, args.masks or data/'HAM10000_segmentations', stage=stage, show=not args.quiet)).loc['all']
        explained[f'stage {stage}' + ('' if stage == 'one' else ', no nevi')] = row.to_dict()
    masks = args.masks or data/'HAM10000_segmentations'
    layers = {layer: overlap_summary(overlap_table(learn, meta, masks, layer=layer, show=not args.quiet)).loc['all'].to_dict() for layer in args.layers}
    by_explained = {c: overlap_summary(part).loc['all'].to_dict() for c, part in table.groupby('explained')}
    from skin_lesions.gradcam import GradCAM, image_inputs
    explain = GradCAM(learn)
    map_size = list(explain.cam(image_inputs(learn, meta.head(1))[0], resize=False).shape[1:])
    keep = ('model', 'arch', 'size', 'crop', 'epochs', 'bs', 'lr', 'gamma', 'alpha', 'mixup', 'seed', 'fold', 'folds', 'split')
    result = dict(date=args.date or datetime.date.today().isoformat(), machine=args.machine or f'{platform.machine()}, CPU only', versions=versions(),
                  run={k: record['arguments'][k] for k in keep if k in record['arguments']} | dict(weights=record['weights']), split=record['split']['rule'],
                  images=len(table), lesions=int(table.group.nunique()), masks_missing=len(table.attrs['no_mask']), unreadable=len(table.attrs['unreadable']),
                  method='gradcam', layer=next(iter(explain.layers.values())), map_size=map_size, target='predicted class',
                  accuracy=float(table.right.mean()), average_recall=record.get('scores', {}).get('average_recall'),
                  summary=summary.rename_axis('images of').reset_index().to_dict('records'), by_class_explained=by_explained, stages=explained, other_layers=layers,
                  against_baselines=against_baselines(table), right_minus_wrong=differences(table), interval='95 %, percentile bootstrap over lesions, 1,000 draws', sanity=sanity(learn, meta, args.sanity))
    if args.table: table.to_csv(args.table, index=False)
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + '\n')
    print(summary.round(3).to_string())
    print(pd.DataFrame(result['against_baselines']).round(3).to_string(index=False))
    print(pd.DataFrame(result['right_minus_wrong']).round(3).to_string(index=False))
    print(pd.DataFrame(explained | layers | by_explained).T.round(3).to_string())
    print(pd.DataFrame(result['sanity']['randomization']).round(2).to_string(index=False), result['sanity']['areas'])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--run', required=True, help='run folder of `skin_lesions train`')
    parser.add_argument('--data', required=True, help='folder of HAM10000')
    parser.add_argument('--masks', help='folder of <image_id>_segmentation.png; without it, HAM10000_segmentations in --data')
    parser.add_argument('--out', default=str(REPO/'benchmarks'/'results'/'gradcam_overlap.json'), help='JSON to write')
    parser.add_argument('--table', help='CSV to write with a row an image')
    parser.add_argument('--limit', type=int, help='only so many images, drawn at random')
    parser.add_argument('--layers', nargs='*', default=[], help='further layers to average, by name')
    parser.add_argument('--sanity', type=int, default=64, help='images for the sanity checks')
    parser.add_argument('--threads', type=int, help='of PyTorch; without it, all')
    parser.add_argument('--date', help='of the run, for the results file')
    parser.add_argument('--machine', help='what it ran on, for the results file')
    parser.add_argument('--quiet', action='store_true', help='no progress bars')
    main(parser.parse_args())
