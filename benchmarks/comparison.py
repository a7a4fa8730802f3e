"""The same job three ways: plain fastai by hand, scdiag (the nearest other installable public project), this library.

    HAM10000_DIR=... python benchmarks/comparison.py --scdiag ENVIRONMENT

The job: HAM10000, one fold by lesion held out, EfficientNet-Lite0 with ImageNet weights, the same few epochs, to a
table of the held-out images' probabilities. Each side is a process of its own, one after the other. Two baselines need
no program: every image a nevus, and guessing. All scores are computed here, from the probabilities. The result goes to
benchmarks/results/comparison.json.
"""
import argparse, importlib.metadata, json, os, platform, subprocess, sys, tempfile, time
from datetime import date
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
PROGRAMS = HERE/'comparison'
ARCH = 'tf_efficientnet_lite0'
FILES = dict(by_hand=('by_hand.py',), skin_lesions=('with_skin_lesions.py',),
             scdiag=('with_scdiag.sh', 'with_scdiag.py'))


def lines_of(file):
    "Lines that a user writes: no blank ones, no comments, no docstring"
    text = file.read_text()
    if text.startswith('"""'): text = text.split('"""', 2)[2]
    lines = [line.strip() for line in text.splitlines()]
    return sum(bool(line) and not line.startswith('#') for line in lines)


def some_lesions(meta, n_images):
    "About so many images, by lesion"
    groups = meta.group.drop_duplicates().sample(frac=1, random_state=0)
    chosen = groups[:round(len(groups)*n_images/len(meta))]
    return meta[meta.group.isin(chosen)].reset_index(drop=True)


def link_images(meta, folder):
    "Folders of links by split and diagnosis"
    for r in meta.itertuples():
        link = folder/('test' if r.is_valid else 'train')/r.dx/f'{r.image_id}.jpg'
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(r.path).resolve())


def save_weights(folder):
    "The ImageNet weights in each side's form"
    import torch
    from skin_lesions.networks import create_body
    body = create_body(ARCH)
    state, head = body.state_dict(), dict(weight=torch.zeros(1000, body.n_features), bias=torch.zeros(1000))
    torch.save(state | {f'classifier.{k}': v for k, v in head.items()}, folder/'timm.pth')
    torch.save({'model_state_dict': {f'model.{k}': v for k, v in state.items()}}, folder/'scdiag.pt')


def prepare(folder, n_images):
    "split.csv, the images and the weights"
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    meta = split_by_lesion(read_metadata(os.environ['HAM10000_DIR']), fold=0)
    if n_images: meta = some_lesions(meta, n_images)
    meta[['image_id', 'path', 'dx', 'group', 'is_valid']].to_csv(folder/'split.csv', index=False)
    link_images(meta, folder/'images')
    save_weights(folder)
    return meta


def commands(args, folder):
    "Command and further environment of each side"
    python = [sys.executable, '-W', 'ignore']
    sides = dict(by_hand=([*python, PROGRAMS/'by_hand.py', args.size, args.epochs, folder/'timm.pth'], {}),
                 skin_lesions=([*python, PROGRAMS/'with_skin_lesions.py', args.size, args.epochs], {}))
    if args.scdiag:
        path = f"{Path(args.scdiag)/'bin'}:{os.environ['PATH']}"
        command = ['bash', '-eu', PROGRAMS/'with_scdiag.sh', args.size, args.epochs, folder/'scdiag.pt', PROGRAMS]
        sides['scdiag'] = command, dict(PATH=path, HF_HUB_OFFLINE='1', HF_HOME=str(folder/'hf'))
    return {name: side for name, side in sides.items() if not args.only or name in args.only}


def run(name, command, folder, env, logs):
    "Minutes and the table of a side, or why there is none"
    place = folder/name
    place.mkdir()
    for f in ('split.csv', 'images'): (place/f).symlink_to(folder/f)
    start = time.monotonic()
    done = subprocess.run(list(map(str, command)), cwd=place, env=os.environ | env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=7200)
    minutes = round((time.monotonic() - start)/60, 2)
    if logs: (Path(logs)/f'{name}.log').write_text(done.stdout)
    if done.returncode: return dict(minutes=minutes, failed=done.stdout[-1500:])
    notes = [line[6:] for line in done.stdout.splitlines() if line.startswith('note: ')]
    return dict(minutes=minutes, table=pd.read_csv(place/'predictions.csv'), notes=notes)


def row_of(name, got, valid):
    "What the page shows of a side"
    from skin_lesions.bootstrap import average_recall_interval
    from skin_lesions.classes import classes_of, with_classes
    from skin_lesions.decide import expected_calibration_error
    from skin_lesions.evaluate import scores
    row = dict(lines=sum(lines_of(PROGRAMS/f) for f in FILES[name]), minutes=got['minutes'])
    if 'failed' in got: return row | dict(failed=got['failed'])
    classes = classes_of(valid)
    p = got['table'].set_index('image_id').reindex(valid.index)[list(classes)]
    table = with_classes(p.assign(dx=valid.dx, group=valid.group).reset_index(), classes)
    interval = average_recall_interval(table)
    row |= dict(accuracy=scores(table)['accuracy'], average_recall=interval.value, low=interval.low,
                high=interval.high, calibration_error=float(expected_calibration_error(table)))
    return row | (dict(notes=got['notes']) if got['notes'] else {})


def versions_of(scdiag):
    "Versions of what was compared"
    versions = {p: importlib.metadata.version(p) for p in ('fastai', 'timm', 'torch')}
    if not scdiag: return versions
    code = 'import importlib.metadata as m; print(m.version("scdiag"), "with torch", m.version("torch"))'
    done = subprocess.run([str(Path(scdiag)/'bin'/'python'), '-c', code], capture_output=True, text=True)
    return versions | dict(scdiag=done.stdout.strip())


def kept_sides(args, about):
    "With --only, what the file says of the other sides, if it is of the same settings"
    if not args.only or not Path(args.out).is_file(): return {}, {}
    old = json.loads(Path(args.out).read_text())
    keys = ('machine', 'interval', 'size', 'epochs', 'train_images', 'valid_images')
    same = all(old[k] == about[k] for k in keys)
    return old['versions'], old['sides'] if same else {}


def main(args):
    found = {}
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        meta = prepare(folder, args.images)
        valid = meta[meta.is_valid].set_index('image_id')
        for name, (command, env) in commands(args, folder).items():
            found[name] = row_of(name, run(name, command, folder, env, args.logs), valid)
            print(name, {k: round(v, 3) if isinstance(v, float) else v for k, v in found[name].items()}, flush=True)
    about = dict(date=date.today().isoformat(), machine=f'{os.cpu_count()} cores, {platform.machine()}',
                 interval='95 %, bootstrap over lesions drawn class by class, 1,000 draws, with half lesions (page 59)',
                 size=args.size,
                 epochs=args.epochs, train_images=int((~meta.is_valid).sum()), valid_images=len(valid),
                 valid_lesions=int(valid.group.nunique()), whole=not args.images, nevi=float((valid.dx == 'nv').mean()))
    versions, sides = kept_sides(args, about)
    out = about | dict(versions=versions | versions_of(args.scdiag), sides=sides | found)
    Path(args.out).write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--scdiag', help='a virtual environment with scdiag[timm,uvito] and tensorboard, which it '
                                         'imports; without it, that side is left out')
    parser.add_argument('--only', nargs='+', choices=list(FILES), help='these sides; the others keep what is in the '
                                                                      'file, if it is of the same settings')
    parser.add_argument('--logs', help="folder for each side's output")
    parser.add_argument('--size', type=int, default=64, help='pixels')
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--images', type=int, help='about so many, by lesion; without it, all')
    parser.add_argument('--out', default=str(HERE/'results'/'comparison.json'), help='JSON to write')
    main(parser.parse_args())
