"""Does self-supervised pretraining help? The table of `nbs/71_experiments.ipynb`, on fold 0 of 5 of HAM10000, split by lesion.

    python benchmarks/pretraining.py --data HAM10000 --out runs/pretraining --size 128 --epochs 20 --pretext-epochs 30

Fits EfficientNet-Lite0 from random weights, from both pretexts and from ImageNet weights, with a tenth of the labels and with all. What is finished in --out is kept. The table goes to
benchmarks/results/pretraining.json. The paper trained its pretexts for 30 epochs.
"""
import argparse, datetime, json
from pathlib import Path

import torch


def untouched_error(meta, size, workers):
    "Mean squared error of the disordered validation images as they are, to compare the restoration's with"
    from skin_lesions.pretext import RestoreContext, pretext_dataloaders
    dls, cb, total, n = pretext_dataloaders(meta, size, num_workers=workers), RestoreContext(), 0., 0
    cb.generator = torch.Generator().manual_seed(cb.seed)
    for x, in dls.valid:
        disordered, x = cb.draw(x)
        total += float(torch.nn.functional.mse_loss(disordered, x))*len(x); n += len(x)
    return total/n


def differences(out, fractions=(.1, 1.)):
    "Average recall of each start less that of random weights on the same images, paired over lesions"
    from skin_lesions.evaluate import compare
    from skin_lesions.predictions import read_predictions
    rows = []
    for fraction in fractions:
        table = {s: read_predictions(Path(out)/f'{s}_{fraction:g}'/'predictions.csv') for s in ('scratch', 'rotation', 'restoration', 'imagenet')}
        for start in ('rotation', 'restoration', 'imagenet'):
            found = compare(table['scratch'], table[start]).loc[('average_recall', 'all')]
            rows.append(dict(start=start, labels=fraction, **{k: float(found[k]) for k in ('difference', 'low', 'high', 'p')}))
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True)
    p.add_argument('--out', required=True)
    p.add_argument('--size', type=int, default=128)
    p.add_argument('--epochs', type=int, default=20, help='of each classifier with all labels')
    p.add_argument('--epochs-few', type=int, help='of each classifier with a tenth of the labels; default as --epochs')
    p.add_argument('--rotation-epochs', type=int, default=30)
    p.add_argument('--restoration-epochs', type=int, default=30)
    p.add_argument('--seed', type=int, default=42)
    p.add_argument('--workers', type=int, default=2)
    p.add_argument('--threads', type=int)
    p.add_argument('--images', default='as they are', help='a note on the images, for the result')
    a = p.parse_args()
    from skin_lesions.experiments import compare_pretraining
    from skin_lesions.readers import read_metadata
    from skin_lesions.recipes import with_changes
    from skin_lesions.split import split_by_lesion
    if a.threads: torch.set_num_threads(a.threads)
    meta = split_by_lesion(read_metadata(a.data))
    epochs = {.1: a.epochs_few or a.epochs, 1.: a.epochs}
    pretext = dict(rotation=a.rotation_epochs, restoration=a.restoration_epochs)
    recipe = with_changes('weighted', dict(gamma=1., size=a.size))
    table = compare_pretraining(meta, recipe=recipe, epochs=epochs, pretext_epochs=pretext, seed=a.seed, out=a.out, workers=a.workers)
    pretexts = {s: json.loads((Path(a.out)/f'{s}.json').read_text()) for s in pretext}
    pretexts['restoration']['untouched_loss'] = untouched_error(meta, a.size, a.workers)
    result = dict(date=datetime.date.today().isoformat(), data='HAM10000, fold 0 of 5 by lesion', arch='tf_efficientnet_lite0', size=a.size, seed=a.seed, pictures=a.images,
                  n_train=int((~meta.is_valid).sum()), n_valid=int(meta.is_valid.sum()), n_valid_lesions=int(meta[meta.is_valid].group.nunique()), pretexts=pretexts, rows=table.to_dict('records'), differences=differences(a.out))
    file = Path(__file__).parents[1]/'benchmarks'/'results'/'pretraining.json'
    file.write_text(json.dumps(result, indent=1) + '\n')
    print(table.round(3).to_string(index=False))


if __name__=='__main__': main()
