"""All measurements of speed and memory, one after the other: a table of ratios, each from one run on this machine.

    HAM10000_DIR=... python benchmarks/speed/run_all.py

The table goes to benchmarks/results/speed.csv.
"""
import argparse, json, os, platform, shlex, subprocess, sys
from datetime import date
from fractions import Fraction
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent/'results'
SCRIPTS = (('imports.py',), ('loader.py',), ('step.py',), ('step.py', '--gains'), ('step.py', '--two-stage'),
           ('step.py', '--compile'), ('predict.py',), ('serving.py',), ('gradcam.py', '--threads', '1'),
           ('memory.py',), ('gpu.py',))
SHOWN = ['what', 'against', 'goal', 'ratio', 'lowest', 'highest', 'holds']


def cpu_name():
    "The CPU's name"
    try: return next(line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name'))
    except (OSError, StopIteration): return platform.processor()


def number(text):
    "A decimal, or a fraction such as 1/1.05"
    top, _, bottom = text.partition('/')
    return float(Fraction(top)/Fraction(bottom or '1'))


def holds(row):
    "Whether a ratio meets its goal; empty where there is none"
    if not row['goal']: return ''
    sign, goal = row['goal'].split()
    reached = row['ratio'] >= number(goal) if sign == '>=' else row['ratio'] <= number(goal)
    return 'yes' if reached else 'no'


def rows_of(script):
    "Run a script, show what it prints, and collect its rows"
    command = [sys.executable, '-W', 'ignore', str(HERE/script[0]), *script[1:]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    rows = []
    for line in process.stdout:
        if line.startswith('JSON '): rows.append(json.loads(line[5:]))
        else: print(line, end='', flush=True)
    if process.wait():
        print(f'{script[0]} ended with exit code {process.returncode}: its other rows are missing', flush=True)
    return rows


def key(table): return table.what + ' | ' + table.against


def main(args):
    rows = []
    for script in SCRIPTS:
        if args.only and not any(part in ' '.join(script) for part in args.only): continue
        print('--', *script, flush=True)
        rows += rows_of((*script, *shlex.split(args.arguments)))
    if not rows: sys.exit('nothing was measured; the table stays as it is')
    table = pd.DataFrame(rows)
    table['holds'] = table.apply(holds, axis=1)
    table['date'], table['machine'] = date.today().isoformat(), f'{os.cpu_count()} cores, {cpu_name()}'
    file = Path(args.out)
    if args.only and file.is_file():
        old = pd.read_csv(file, keep_default_na=False)
        table = pd.concat([old[~key(old).isin(key(table))], table], ignore_index=True)
    table.to_csv(file, index=False)
    print(table[SHOWN].to_string(index=False))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--out', default=str(RESULTS/'speed.csv'), help='CSV to write')
    parser.add_argument('--only', nargs='+', help='parts of script names; other rows of the table are kept')
    parser.add_argument('--arguments', default='', help="further arguments of each script, such as '--cpu'")
    main(parser.parse_args())
