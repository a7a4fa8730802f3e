"""Are labels that confident learning suspects more frequent without histology? On out-of-fold predictions of HAM10000.

    python benchmarks/labels.py --data HAM10000
"""
import argparse, json
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
from skin_lesions.classes import HAM10000, with_classes
from skin_lesions.labels import suspect_labels

RESULTS = Path(__file__).parent/'results'


def interval(suspect, group, n=2000, seed=42):
    "A fraction of images in draws of the lesions"
    of_lesion = pd.DataFrame(dict(k=suspect.astype(float), n=1.)).groupby(np.asarray(group)).sum()
    drawn = np.random.default_rng(seed).integers(len(of_lesion), size=(n, len(of_lesion)))
    k, total = of_lesion.k.to_numpy()[drawn].sum(1), of_lesion.n.to_numpy()[drawn].sum(1)
    return k/total


def row(dx, part):
    "Suspects of a class with and without histology, and the difference, with intervals"
    histo = part.dx_type == 'histo'
    one = interval(part.suspect[histo], part.group[histo])
    two = interval(part.suspect[~histo], part.group[~histo], seed=43)
    of_one, of_two = part.suspect[histo].mean(), part.suspect[~histo].mean()
    texts = {}
    for name, drawn, value in (('histology', one, of_one), ('without', two, of_two),
                               ('difference', two-one, of_two-of_one)):
        low, high = np.quantile(drawn, [.025, .975])
        texts[name] = f'{value:.3f} ({low:.3f} to {high:.3f})'
    return dict(dx=dx, n_histology=int(histo.sum()), n_without=int((~histo).sum()), **texts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='folder with HAM10000_metadata.csv')
    parser.add_argument('--table', type=Path, default=RESULTS/'experiments'/'all_changes.csv.gz', help='predictions')
    args = parser.parse_args()
    table = pd.read_csv(args.table)
    table = table[table.views.isna()].reset_index(drop=True)
    codes = list(HAM10000)
    table[codes] = table[codes].div(table[codes].sum(axis=1), axis=0) # rounded in the file
    found = suspect_labels(with_classes(table[['image_id', 'dx', 'group', *codes]], HAM10000))
    known = pd.read_csv(args.data/'HAM10000_metadata.csv').set_index('image_id').dx_type
    found['dx_type'] = found.image_id.map(known)
    both = [dx for dx in codes if found[found.dx == dx].dx_type.eq('histo').nunique() == 2]
    moves = found[found.suspect].groupby(['dx', 'suggested']).size().sort_values(ascending=False)
    result = dict(date=str(date.today()), table=args.table.name, n=len(found), suspects=int(found.suspect.sum()),
                  classes=[row(dx, found[found.dx == dx]) for dx in both],
                  most_frequent=[dict(dx=dx, suggested=to, n=int(n)) for (dx, to), n in moves.head(8).items()])
    (RESULTS/'labels.json').write_text(json.dumps(result, indent=1)+'\n')
    print(json.dumps(result, indent=1))


if __name__ == '__main__': main()
