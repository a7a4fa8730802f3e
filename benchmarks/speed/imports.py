"""Seconds that `import skin_lesions.learner` takes in a fresh interpreter, against `import fastai.vision.all`.

    python benchmarks/speed/imports.py
"""
import argparse, subprocess, sys, time

from sides import in_turn, report


def importing(module):
    "A function that imports a module in a fresh interpreter; seconds"
    def run():
        start = time.perf_counter()
        subprocess.run([sys.executable, '-W', 'ignore', '-c', f'import {module}'], check=True)
        return time.perf_counter() - start
    return run


def main(args):
    pairs = in_turn(importing('skin_lesions.learner'), importing('fastai.vision.all'), args.repeats)
    report('import skin_lesions.learner', 'import fastai.vision.all', '<= 1.1', 's', pairs)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--repeats', type=int, default=5, help='pairs')
    main(parser.parse_args())
