"""Copy finished runs of `skin_lesions paper` to where page 70 reads them: the results file, and each run's predictions with five digits; no networks.

    python benchmarks/paper_results.py EXPERIMENTS
"""
import argparse
from pathlib import Path

from skin_lesions.core import CODES, atomic_path
from skin_lesions.experiments import RESULTS, append_result, read_results, run_folder
from skin_lesions.predictions import read_predictions


def main(args):
    for line in read_results(args.experiments):
        table = read_predictions(run_folder(args.experiments, line)/'predictions.csv')
        to = run_folder(args.to, line)/'predictions.csv'
        to.parent.mkdir(parents=True, exist_ok=True)
        short = table.round({c: args.digits for c in CODES})
        assert (short[list(CODES)].to_numpy().argmax(1) == table[list(CODES)].to_numpy().argmax(1)).all(), f"{line['run']}: {args.digits} digits are too few to tell the most probable class"
        with atomic_path(to) as tmp: short.to_csv(tmp, index=False)
        print(line['row'], line['split'], 'added' if append_result(args.to, line) else 'was there')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('experiments', help='the folder given to skin_lesions paper as --out')
    parser.add_argument('--to', default=str(Path(__file__).parent.parent/'nbs'/'results'/'paper'))
    parser.add_argument('--digits', type=int, default=5)
    main(parser.parse_args())
