"""Time from pressing return to the answer, for commands in fresh processes: a ratio for each, wall and CPU.

    python benchmarks/speed/first_answer.py

`predict` with the network of the package against `python -c "import torch, timm"`, which it cannot do without; what
needs no network against `python -c pass`. `evaluate` writes its report after the scores, so its answer is its first
line. Both sides alternate in fresh processes, with compiled modules as after any first run. On a machine that does
something else, CPU seconds tell more than wall seconds. The result goes to benchmarks/results/first_answer.json.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from datetime import date
from pathlib import Path
from statistics import median

from run_all import RESULTS, cpu_name

NETWORK, NOTHING = 'import torch, timm', 'pass'
COMMANDS = [ # name, arguments, what it is compared with, goal for the ratio
    ('predict', ('predict', 'photo.png', '--device', 'cpu'), NETWORK, 1.25),
    ('help', ('--help',), NOTHING, 25), ('help of predict', ('predict', '--help'), NOTHING, 25),
    ('error', ('predict', 'nowhere.jpg'), NOTHING, 25), ('recipes', ('paper', '--list'), NOTHING, 25),
    ('evaluate', ('evaluate', 'table.csv'), NOTHING, 25)]
COMPILED = tempfile.TemporaryDirectory()


def cpu_seconds(process):
    "CPU seconds of a running process, on Linux; else NaN"
    try: fields = Path(f'/proc/{process.pid}/stat').read_text().rsplit(')', 1)[1].split()
    except OSError: return float('nan')
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def answer_of(arguments, folder):
    "Wall and CPU seconds until a fresh interpreter has ended, or for `evaluate` until its first line"
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONDONTWRITEBYTECODE'}
    env.update(PYTHONPYCACHEPREFIX=COMPILED.name, PYTHONPATH=str(RESULTS.parent.parent))
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=folder, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if 'evaluate' in arguments:
        assert process.stdout.readline().startswith('accuracy'), 'evaluate has no answer'
        seconds = time.perf_counter() - start, cpu_seconds(process)
        process.communicate()
        return seconds
    process.stdout.read()
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def prepare(folder):
    "A synthetic image and a predictions table of 2,000 images"
    import numpy as np
    import pandas as pd
    from PIL import Image
    from skin_lesions.classes import HAM10000
    from skin_lesions.synthetic import draw_image
    Image.fromarray(draw_image('nv', 0, 0)[0]).save(folder/'photo.png')
    rng = np.random.default_rng(42)
    table = pd.DataFrame(rng.dirichlet(np.ones(7), 2000).round(6), columns=list(HAM10000))
    table.insert(0, 'image_id', [f'ISIC_{i:07d}' for i in range(2000)])
    table['dx'], table['group'] = rng.choice(list(HAM10000), 2000), [f'HAM_{i//2:07d}' for i in range(2000)]
    table.to_csv(folder/'table.csv', index=False)


def measured(arguments, against, goal, pairs, folder):
    "Medians of both sides, and the median, lowest and highest ratio of the pairs; the first pair compiles"
    sides = ('-m', 'skin_lesions.cli', *arguments), ('-c', against)
    runs = [[answer_of(side, folder) for side in sides] for _ in range(pairs + 1)][1:]
    row = dict(command=' '.join(('skin_lesions', *arguments)), against=f'python -c "{against}"', goal=goal)
    for i, kind in enumerate(('wall', 'cpu')):
        ours, theirs = ([run[side][i] for run in runs] for side in range(2))
        ratios = sorted(a/b for a, b in zip(ours, theirs))
        row[kind] = dict(ours=round(median(ours), 3), theirs=round(median(theirs), 3), ratio=round(median(ratios), 3),
                         lowest=round(ratios[0], 3), highest=round(ratios[-1], 3))
    return row | dict(holds=row['cpu']['ratio'] <= goal)


def main(args):
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name, arguments, against, goal in COMMANDS:
            if args.only and name not in args.only: continue
            pairs = args.pairs if against == NETWORK else 3*args.pairs
            rows[name] = row = measured(arguments, against, goal, pairs, folder)
            print(f"{row['command']}: {row['cpu']['ours']} s CPU, {row['cpu']['ratio']} times {row['against']} "
                  f"(wall {row['wall']['ours']} s, {row['wall']['ratio']} times); goal {goal}", flush=True)
    import torch
    result = dict(date=date.today().isoformat(), machine=f'{os.cpu_count()} cores, {cpu_name()}', pairs=args.pairs,
                  load_average=round(os.getloadavg()[0], 1) if hasattr(os, 'getloadavg') else None,
                  python=sys.version.split()[0], torch=torch.__version__, rows=rows)
    if not args.only: Path(args.out).write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--out', default=str(RESULTS/'first_answer.json'), help='JSON to write')
    parser.add_argument('--pairs', type=int, default=3, help='pairs of each; three times as many of the quick ones')
    parser.add_argument('--only', nargs='+', help='these commands, printed and not written')
    main(parser.parse_args())
