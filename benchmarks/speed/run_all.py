"""All measurements of speed and memory, one after the other: a table of ratios, each from one run on this machine, written to benchmarks/results/speed.csv.

    HAM10000_DIR=... python benchmarks/speed/run_all.py
"""
import argparse, json, os, platform, subprocess, sys
from datetime import date
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
SCRIPTS = (('imports.py',), ('loader.py',), ('step.py',), ('step.py', '--gains'), ('step.py', '--two-stage'), ('predict.py',), ('memory.py',), ('gpu.py',))


def processor():
    try: return next(line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name'))
    except (OSError, StopIteration): return platform.processor()


def holds(row):
    "Whether a ratio meets its goal; empty where there is none"
    if not row['goal']: return ''
    sign, number = row['goal'].split()
    number = eval(number, {}) if '/' in number else float(number)
    return 'yes' if (row['ratio'] >= number if sign == '>=' else row['ratio'] <= number) else 'no'


def main(args):
    rows = []
    for script in SCRIPTS:
        if args.only and not any(o in ' '.join(script) for o in args.only): continue
        print('--', *script, flush=True)
        process = subprocess.Popen([sys.executable, '-W', 'ignore', str(HERE/script[0]), *script[1:]], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith('JSON '): rows.append(json.loads(line[5:]))
            else: print(line, end='', flush=True)
        if process.wait(): print(f'{script[0]} ended with exit code {process.returncode}: its rows are missing', flush=True)
    table = pd.DataFrame(rows)
    table['holds'] = table.apply(holds, axis=1)
    table['date'], table['machine'] = date.today().isoformat(), f'{os.cpu_count()} cores, {processor()}'
    file = Path(args.out)
    if args.only and file.is_file():
        old = pd.read_csv(file, keep_default_na=False)
        key = lambda t: t.what + t.against
        table = pd.concat([old[~key(old).isin(key(table))], table], ignore_index=True)
    table.to_csv(file, index=False)
    print(table[['what', 'against', 'goal', 'ratio', 'lowest', 'highest', 'holds']].to_string(index=False))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--out', default=str(HERE.parent/'results'/'speed.csv'))
    parser.add_argument('--only', nargs='+', help='parts of script names; other rows of the table are kept')
    main(parser.parse_args())
