"""Does self-supervised pretraining help? On fold 0 of 5 of HAM10000, split by lesion.

    python benchmarks/pretraining.py --data HAM10000 --out runs/pretraining --size 128 --epochs 20

The table of `nbs/71_experiments.ipynb`. Trains EfficientNet-Lite0 from random weights, from both pretexts and from
ImageNet weights, with a tenth of the labels and with all. What is finished in --out is kept. The table goes to
benchmarks/results/pretraining.json. The paper trained its pretexts for 30 epochs.
"""
import argparse, datetime, json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent/'results'
STARTS = ('scratch', 'rotation', 'restoration', 'imagenet')
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


def differences(out):
    "Average recall of each start less that of random weights on the same images, paired over lesions"
    from skin_lesions.evaluate import compare
    from skin_lesions.predictions import read_predictions
    rows = []
    for fraction in FRACTIONS:
        tables = {s: read_predictions(Path(out)/f'{s}_{fraction:g}'/'predictions.csv') for s in STARTS}
        for start in STARTS[1:]:
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
    pretext_epochs = dict(rotation=args.rotation_epochs, restoration=args.restoration_epochs)
    recipe = with_changes('weighted', dict(gamma=1., size=args.size))
    table = compare_pretraining(meta, STARTS, FRACTIONS, recipe=recipe, epochs=epochs, pretext_epochs=pretext_epochs,
                                seed=args.seed, out=args.out, workers=args.workers)
    pretexts = {s: json.loads((Path(args.out)/f'{s}.json').read_text()) for s in pretext_epochs}
    pretexts['restoration']['untouched_loss'] = untouched_error(meta, args.size, args.workers)
    result = dict(date=datetime.date.today().isoformat(), data='HAM10000, fold 0 of 5 by lesion', arch=recipe.arch,
                  size=args.size, seed=args.seed, pictures=args.images, n_train=len(meta) - len(valid),
                  n_valid=len(valid), n_valid_lesions=int(valid.group.nunique()), pretexts=pretexts,
                  rows=table.to_dict('records'), differences=differences(args.out))
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
    parser.add_argument('--seed', type=int, default=42)
    parser.add_argument('--workers', type=int, default=2, help='data-loading workers')
    parser.add_argument('--threads', type=int, help='of PyTorch; without it, all')
    parser.add_argument('--images', default='as they are', help='a note on the images, for the result')
    parser.add_argument('--result', default=str(RESULTS/'pretraining.json'), help='JSON to write')
    main(parser.parse_args())
