"""Copy finished runs of `skin_lesions paper` to where pages 71 and 72 read them: the results file, and each run's predictions with five digits or as many as tell the most probable class; no networks.

    python benchmarks/paper_results.py EXPERIMENTS --tta dihedral --rows better_base better_weighted
"""
import argparse
from pathlib import Path

from skin_lesions.core import CODES, atomic_path
from skin_lesions.experiments import append_result, read_results, row_names, run_folder
from skin_lesions.predictions import TTA, read_predictions
from skin_lesions.train import read_run


def copy(file, to, digits):
    table = read_predictions(file)
    said = lambda t: t[list(CODES)].to_numpy().argmax(1)
    short = next(t for d in range(digits, 18) if (said(t := table.round({c: d for c in CODES})) == said(table)).all()) # more digits where two classes are all but equal
    to.mkdir(parents=True, exist_ok=True)
    with atomic_path(to/file.name) as tmp: short.to_csv(tmp, index=False)


def main(args):
    again = row_names(args.rows) if args.rows else []
    for line in read_results(args.experiments):
        if line['split'] == 'lesion' and line['row'] in again: read_run(args.experiments, line, args.tta, 'cpu')
        for file in sorted(run_folder(args.experiments, line).glob('predictions*.csv')): copy(file, run_folder(args.to, line), args.digits)
        print(line['row'], line['split'], line['fold'], 'added' if append_result(args.to, line) else 'was there', flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('experiments', help='the folder given to skin_lesions paper as --out')
    parser.add_argument('--to', default=str(Path(__file__).parent.parent/'benchmarks'/'results'/'paper'))
    parser.add_argument('--digits', type=int, default=5, help='of the probabilities, at least')
    parser.add_argument('--tta', choices=TTA, default='dihedral', help='views of each picture, where the networks look again')
    parser.add_argument('--rows', nargs='+', help='whose networks look again, on the split by lesion')
    main(parser.parse_args())
