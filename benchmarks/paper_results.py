"""Pack finished runs of `skin_lesions paper` into where pages 71 and 72 read them.

    python benchmarks/paper_results.py EXPERIMENTS --views dihedral --recipes base weighted

The results file, and one compressed table of predictions for each recipe; no networks.
"""
import argparse
from pathlib import Path

from skin_lesions.experiments import pack_runs, read_results
from skin_lesions.posthoc import predict_views
from skin_lesions.recipes import recipe_names
from skin_lesions.views import VIEWS


def main(args):
    again = recipe_names(args.recipes) if args.recipes else []
    for line in read_results(args.experiments):
        if line['split'] == 'lesion' and line['recipe'] in again:
            predict_views(args.experiments, line, args.views, 'cpu')
    print('packed:', ', '.join(pack_runs(args.experiments, args.to, digits=args.digits)))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('experiments', help='the folder given to skin_lesions paper as --out')
    parser.add_argument('--to', default=str(Path(__file__).resolve().parent/'results'/'experiments'))
    parser.add_argument('--digits', type=int, default=5, help='of the probabilities, at least')
    parser.add_argument('--views', choices=[v for v in VIEWS if v], default='dihedral',
                        help='views of each image, where the networks predict again')
    parser.add_argument('--recipes', nargs='+', help='whose networks predict again, on the split by lesion')
    main(parser.parse_args())
