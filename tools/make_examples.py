"""The example tables of `skin_lesions.examples`, from the results in benchmarks and HAM10000's metadata.

    python tools/make_examples.py --data HAM10000

No image enters them. Probabilities are whole numbers of 1/10,000, results are copied as they are.
"""
import argparse, json, lzma
from pathlib import Path

import pandas as pd

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO/'benchmarks'/'results'
TABLES = REPO/'skin_lesions'/'tables'


def write_csv(frame, path):
    "A compressed CSV whose bytes depend on the frame alone"
    path.write_bytes(lzma.compress(frame.to_csv(index=False, lineterminator='\n').encode()))


def metadata_table(data):
    "HAM10000's metadata and the source of each image, without images"
    meta = pd.read_csv(data/'HAM10000_metadata.csv').rename(columns={'localization': 'site'})
    sources = data/'HAM10000_sources.csv' # the newer metadata of the Dataverse have it as a column
    if sources.is_file(): meta = meta.merge(pd.read_csv(sources).rename(columns={'dataset': 'source'}), on='image_id')
    else: meta = meta.rename(columns={'dataset': 'source'})
    columns = ['image_id', 'lesion_id', 'dx', 'dx_type', 'age', 'sex', 'site', 'source']
    return meta[columns].sort_values([*columns[2:], *columns[1::-1]]) # rows that are alike compress well


def predictions_table(name, folds):
    "What the networks of an experiment predict for the folds that they were not trained on"
    from skin_lesions.classes import HAM10000
    table = pd.read_csv(RESULTS/'experiments'/f'{name}.csv.gz', dtype={'views': str})
    table = table[(table.split == 'lesion') & (table.scale == 'reduced') & table.views.isna() & table.fold.isin(folds)]
    table[[*HAM10000.codes]] = (table[[*HAM10000.codes]]*10_000).round().astype(int)
    return table[['fold', 'image_id', *HAM10000.codes]].sort_values(['fold', 'image_id'])


def main(args):
    from skin_lesions.examples import EXAMPLES, RESULT_NAMES
    TABLES.mkdir(exist_ok=True)
    if args.data: write_csv(metadata_table(Path(args.data)), TABLES/'ham10000.csv.xz')
    for name, example in EXAMPLES.items():
        write_csv(predictions_table(name, example['folds']), TABLES/f'{name}.csv.xz')
    for name in RESULT_NAMES:
        results = json.loads((RESULTS/f'{name}.json').read_text())
        (TABLES/f'{name}.json').write_text(json.dumps(results, separators=(',', ':'))+'\n')
    print(f"{sum(f.stat().st_size for f in TABLES.iterdir())/1000:.0f} kB")


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data', help='folder of HAM10000; without it, its metadata table stays as it is')
    main(parser.parse_args())
