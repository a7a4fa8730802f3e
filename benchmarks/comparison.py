"""The same job three ways: plain fastai by hand, scdiag (the nearest other public project that can be installed), this library. Writes benchmarks/results/comparison.json.

    HAM10000_DIR=... python benchmarks/comparison.py --scdiag ENVIRONMENT

The job: HAM10000, one fold by lesion held out, EfficientNet-Lite0 with ImageNet weights, the same few epochs, to a table of the held-out images' probabilities. Each side is a process of its own, one after the other.
Two baselines stand beside it that need no program: every image a nevus, and guessing. All scores are computed here, from the probabilities.
"""
import argparse, importlib.metadata, json, os, platform, shutil, subprocess, sys, tempfile, time
from datetime import date
from pathlib import Path

import pandas as pd
import torch

HERE = Path(__file__).parent/'comparison'
CODES = ('akiec', 'bcc', 'bkl', 'df', 'mel', 'nv', 'vasc')


def lines_of(file):
    "Lines that a user writes: no blank ones, no comments, no docstring"
    text = [l.strip() for l in file.read_text().splitlines()]
    return sum(bool(l) and not l.startswith(('#', '"""')) for l in text)


def prepare(folder, args):
    "split.csv, folders of links by split and diagnosis, and the weights in each side's form"
    from skin_lesions.readers import read_metadata
    from skin_lesions.networks import create_body
    from skin_lesions.split import split_by_lesion
    meta = split_by_lesion(read_metadata(os.environ['HAM10000_DIR']), fold=0)
    if args.images:
        groups = meta.group.drop_duplicates().sample(frac=1, random_state=0)
        meta = meta[meta.group.isin(groups[:round(len(groups)*args.images/len(meta))])].reset_index(drop=True)
    meta[['image_id', 'path', 'dx', 'group', 'is_valid']].to_csv(folder/'split.csv', index=False)
    for r in meta.itertuples():
        to = folder/'images'/('test' if r.is_valid else 'train')/r.dx/f'{r.image_id}.jpg'
        to.parent.mkdir(parents=True, exist_ok=True)
        to.symlink_to(Path(r.path).resolve())
    state = create_body('tf_efficientnet_lite0').state_dict()
    torch.save(state | {'classifier.weight': torch.zeros(1000, 1280), 'classifier.bias': torch.zeros(1000)}, folder/'timm.pth')
    torch.save({'model_state_dict': {f'model.{k}': v for k, v in state.items()}}, folder/'scdiag.pt')
    return meta


def run(name, command, folder, env=None, logs=None):
    "Minutes and the table of a side, or why there is none"
    place = folder/name
    place.mkdir()
    for f in ('split.csv', 'images'): (place/f).symlink_to(folder/f)
    start = time.monotonic()
    done = subprocess.run(list(map(str, command)), cwd=place, env=os.environ | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=7200)
    minutes = (time.monotonic() - start)/60
    if logs: (Path(logs)/f'{name}.log').write_text(done.stdout)
    if done.returncode: return dict(minutes=round(minutes, 2), failed=done.stdout[-1500:])
    table = pd.read_csv(place/'predictions.csv')
    return dict(minutes=round(minutes, 2), table=table, notes=[l[6:] for l in done.stdout.splitlines() if l.startswith('note: ')])


def main(args):
    from skin_lesions.bootstrap import average_recall_interval
    from skin_lesions.evaluate import scores
    from skin_lesions.decide import expected_calibration_error
    env = Path(args.scdiag)/'bin' if args.scdiag else None
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        meta = prepare(folder, args)
        valid = meta[meta.is_valid].set_index('image_id')
        sides = dict(by_hand=(['by_hand.py'], [sys.executable, '-W', 'ignore', HERE/'by_hand.py', args.size, args.epochs, folder/'timm.pth'], {}),
                     skin_lesions=(['with_skin_lesions.py'], [sys.executable, '-W', 'ignore', HERE/'with_skin_lesions.py', args.size, args.epochs], {}))
        if env: sides['scdiag'] = (['with_scdiag.sh', 'with_scdiag.py'], ['bash', '-eu', HERE/'with_scdiag.sh', args.size, args.epochs, folder/'scdiag.pt', HERE], dict(PATH=f"{env}:{os.environ['PATH']}", HF_HUB_OFFLINE='1', HF_HOME=str(folder/'hf')))
        found = {}
        sides = {k: v for k, v in sides.items() if not args.only or k in args.only}
        for name, (files, command, more) in sides.items():
            got = run(name, command, folder, more, args.logs)
            row = dict(lines=sum(lines_of(HERE/f) for f in files), minutes=got['minutes'])
            if 'failed' in got: row['failed'] = got['failed']
            else:
                if got['notes']: row['notes'] = got['notes']
                table = got['table'].set_index('image_id').reindex(valid.index)[list(CODES)].assign(dx=valid.dx, group=valid.group).reset_index()
                interval = average_recall_interval(table)
                row |= dict(accuracy=scores(table)['accuracy'], average_recall=interval.value if hasattr(interval, 'value') else scores(table)['average_recall'], low=interval.low, high=interval.high, calibration_error=expected_calibration_error(table))
            found[name] = row
            print(name, {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    versions = {p: importlib.metadata.version(p) for p in ('fastai', 'timm', 'torch')}
    if env: versions['scdiag'] = subprocess.run([str(env/'python'), '-c', 'import importlib.metadata as m; print(m.version("scdiag"), "with torch", m.version("torch"))'], capture_output=True, text=True).stdout.strip()
    out = dict(date=date.today().isoformat(), machine=f'{os.cpu_count()} cores, {platform.machine()}', size=args.size, epochs=args.epochs, train_images=int((~meta.is_valid).sum()), valid_images=int(meta.is_valid.sum()), valid_lesions=int(valid.group.nunique()),
               whole=not args.images, nevi=float((valid.dx == 'nv').mean()), versions=versions)
    old = json.loads(Path(args.out).read_text()) if args.only and Path(args.out).is_file() else {}
    kept = old['sides'] if old and all(old[k] == out[k] for k in ('machine', 'size', 'epochs', 'train_images', 'valid_images')) else {}
    out |= dict(versions=old.get('versions', {}) | versions, sides=kept | found)
    Path(args.out).write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--scdiag', help='a virtual environment with scdiag[timm,uvito] and tensorboard, which it imports; without it, that side is left out')
    parser.add_argument('--only', nargs='+', help='names of sides; the others keep what stands in the file, if it is of the same settings')
    parser.add_argument('--logs', help="folder for each side's output")
    parser.add_argument('--size', type=int, default=64)
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--images', type=int, help='about so many, by lesion; without it, all')
    parser.add_argument('--out', default=str(Path(__file__).parent.parent/'benchmarks'/'results'/'comparison.json'))
    main(parser.parse_args())
