"""Does self-supervised pretraining help? On fold 0 of 5 of HAM10000, split by lesion.

    python benchmarks/pretraining.py --data HAM10000 --out runs/pretraining --size 128 --epochs 20

The table of `nbs/71_experiments.ipynb`. Trains EfficientNet-Lite0 from random weights, from each pretext and from
ImageNet weights, with a tenth of the labels and with all; --starts takes some of them. What is finished in --out is
kept, so a start can be added later. The table goes to benchmarks/results/pretraining.json. The paper trained its two
pretexts, rotation and restoration, for 30 epochs.
"""
import argparse, datetime, json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent/'results'
STARTS = ('scratch', 'rotation', 'restoration', 'masking', 'imagenet')
PRETEXTS = ('rotation', 'restoration', 'masking')
FRACTIONS = (.1, 1.)


def untouched_error(meta, size, workers):
    "Mean squared error of the disordered validation images as they are, to compare the restoration's with"
    import torch
    from skin_lesions.pretext import RestoreContext, pretext_dataloaders
    dls, pretext, total, n = pretext_dataloaders(meta, size, num_workers=workers), RestoreContext(), 0., 0
    pretext.generator = torch.Generator().manual_seed(pretext.seed)
    for x, in dls.valid:
        disordered, x = pretext.draw(x)
        total += float(torch.nn.functional.mse_loss(disordered, x))*len(x)
        n += len(x)
    return total/n


def mean_colour_error(recipe, meta, workers):
    "Absolute error of the mean colour of what is seen of the masked validation images, to compare the masking's with"
    from skin_lesions.experiments import start_recipe
    from skin_lesions.masking import masked_learner, reference_loss
    from skin_lesions.pretext import pretext_dataloaders
    begun = start_recipe(recipe, 'masking')
    dls = pretext_dataloaders(meta, begun.steps[0][0], begun.crop, arch=begun.arch, num_workers=workers)
    return reference_loss(masked_learner(dls, begun.arch, patch=begun.patch))


def differences(out, starts):
    "Average recall of each start less that of random weights on the same images, paired over lesions"
    from skin_lesions.evaluate import compare
    from skin_lesions.predictions import read_predictions
    rows = []
    for fraction in FRACTIONS:
        tables = {s: read_predictions(Path(out)/f'{s}_{fraction:g}'/'predictions.csv') for s in starts}
        for start in starts[1:]:
            found = compare(tables['scratch'], tables[start]).loc[('average_recall', 'all')]
            measures = {k: float(found[k]) for k in ('difference', 'low', 'high', 'p')}
            rows.append(dict(start=start, labels=fraction, **measures))
    return rows


def main(args):
    import torch
    from skin_lesions.experiments import compare_pretraining
    from skin_lesions.readers import read_metadata
    from skin_lesions.recipes import with_changes
    from skin_lesions.split import split_by_lesion
    if args.threads: torch.set_num_threads(args.threads)
    meta = split_by_lesion(read_metadata(args.data))
    valid = meta[meta.is_valid]
    epochs = {.1: args.epochs_few or args.epochs, 1.: args.epochs}
    # random weights are what the others are compared with
    starts = [s for s in STARTS if s=='scratch' or s in args.starts]
    pretext_epochs = {s: getattr(args, f'{s}_epochs') for s in PRETEXTS if s in starts}
    recipe = with_changes('weighted', dict(gamma=1., size=args.size))
    table = compare_pretraining(meta, starts, FRACTIONS, recipe=recipe, epochs=epochs, pretext_epochs=pretext_epochs,
                                seed=args.seed, out=args.out, workers=args.workers)
    pretexts = {s: json.loads((Path(args.out)/f'{s}.json').read_text()) for s in pretext_epochs}
    if 'restoration' in starts:
        pretexts['restoration']['untouched_loss'] = untouched_error(meta, args.size, args.workers)
    if 'masking' in starts: pretexts['masking']['mean_colour_loss'] = mean_colour_error(recipe, meta, args.workers)
    result = dict(date=datetime.date.today().isoformat(), data='HAM10000, fold 0 of 5 by lesion', arch=recipe.arch,
                  size=args.size, seed=args.seed, pictures=args.images, n_train=len(meta) - len(valid),
                  n_valid=len(valid), n_valid_lesions=int(valid.group.nunique()), pretexts=pretexts,
                  rows=table.to_dict('records'), differences=differences(args.out, starts))
    Path(args.result).write_text(json.dumps(result, indent=1) + '\n')
    print(table.round(3).to_string(index=False))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, help='folder of HAM10000')
    parser.add_argument('--out', required=True, help='folder of the runs')
    parser.add_argument('--size', type=int, default=128, help='pixels')
    parser.add_argument('--epochs', type=int, default=20, help='of each classifier with all labels')
    parser.add_argument('--epochs-few', type=int, help='of each one with a tenth of the labels; default as --epochs')
    parser.add_argument('--rotation-epochs', type=int, default=30)
    parser.add_argument('--restoration-epochs', type=int, default=30)
    parser.add_argument('--masking-epochs', type=int, default=30)
    parser.add_argument('--starts', nargs='+', choices=STARTS, default=list(STARTS), help='some of them; default all')
    parser.add_argument('--seed', type=int, default=42)
    parser.add_argument('--workers', type=int, default=2, help='data-loading workers')
    parser.add_argument('--threads', type=int, help='of PyTorch; without it, all')
    parser.add_argument('--images', default='as they are', help='a note on the images, for the result')
    parser.add_argument('--result', default=str(RESULTS/'pretraining.json'), help='JSON to write')
    main(parser.parse_args())
