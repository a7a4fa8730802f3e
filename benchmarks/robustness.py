"""What changes of the images do to the packaged network: nine changes in five strengths, on images that are new to it.

    HAM10000_DIR=... python benchmarks/robustness.py --out runs/robustness
    HAM10000_DIR=... python benchmarks/robustness.py --out runs/robustness --data MILK10K --name milk10k --n 400

Without --data: the 193 validation images of the ISIC 2018 challenge. Nothing is chosen by what comes out, so this is no
second look in the sense of challenge.py. With --data, images of diagnoses that the network does not have are left out.
What is finished in --out is kept. Adds to benchmarks/results/robustness.json, and writes the predictions, rounded, to
benchmarks/results/robustness_NAME.csv.gz.
"""
import argparse, json, os
from datetime import date
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).resolve().parent/'results'


def images(args, classes):
    "The images to change, and what they are in words"
    from skin_lesions.readers import read_metadata
    if args.data is None:
        meta = read_metadata(os.environ['HAM10000_DIR'], part='validation')
        return meta, 'validation images of the ISIC 2018 challenge'
    meta = read_metadata(args.data, classes=classes)
    return meta, meta.attrs['collection']


def all_predictions(folder):
    "The kept tables as one: a row an image, change and strength, probabilities to four digits"
    from skin_lesions.predictions import read_predictions
    parts = []
    for file in sorted(Path(folder).glob('*.csv')):
        change, strength = (*file.stem.split('-'), '0')[:2]
        table = read_predictions(file).drop(columns=['group', 'problem', 'refer'], errors='ignore')
        parts.append(table.assign(change=change, strength=0 if change == 'none' else int(strength)))
    whole = pd.concat(parts, ignore_index=True)
    first = ['image_id', 'change', 'strength']
    return whole[[*first, *(c for c in whole if c not in first)]].round(4)


def main(args):
    import torch
    from skin_lesions.predict import load_predictor
    from skin_lesions.robustness import some_images, stress
    if args.threads: torch.set_num_threads(args.threads)
    predictor = load_predictor(args.bundle, 'cpu')
    meta, about = images(args, predictor.classes)
    seen = predictor.trained_on(meta)
    if seen.any(): raise SystemExit(f'{seen.sum()} of {len(meta)} images show lesions that the network has seen')
    if args.n: meta = some_images(meta, args.n)
    folder = Path(args.out)/args.name
    result = stress(predictor, meta, folder=folder, workers=args.threads)
    all_predictions(folder).to_csv(RESULTS/f'robustness_{args.name}.csv.gz', index=False)
    file = RESULTS/'robustness.json'
    before = json.loads(file.read_text()) if file.is_file() else {}
    entry = dict(date=date.today().isoformat(), bundle=args.bundle, sha256=predictor.record['sha256'], images=len(meta),
                 groups=int(meta.group.nunique()), about=about, counts=meta.dx.value_counts().sort_index().to_dict(),
                 seed=42, interval='95 %, bootstrap over lesions, 1000 draws',
                 rows=json.loads(result.round(5).to_json(orient='records')))
    file.write_text(json.dumps(before | {args.name: entry}, indent=1)+'\n')
    print(result.round(3).to_string(index=False))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True, help='folder of the kept predictions')
    parser.add_argument('--data', help='folder of a collection; without it, the validation images in HAM10000_DIR')
    parser.add_argument('--name', default='ham10000_validation', help='of the entry in the result')
    parser.add_argument('--n', type=int, help='images, whole lesions at random; without it, all')
    parser.add_argument('--bundle', default='ham10000', help='name or folder')
    parser.add_argument('--threads', type=int, help='of PyTorch, and threads that open images; without it, all')
    main(parser.parse_args())
