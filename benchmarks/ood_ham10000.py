"""How well the out-of-distribution score tells synthetic non-lesions and photographs from held-out lesions of HAM10000.

    HAM10000_DIR=... python benchmarks/ood_ham10000.py BUNDLE --fold 0 --photographs FOLDER

For a trained network, with the baselines beside it. The bundle's network must not have been trained on that fold.
Fitted on 2,000 training images, limit set on half of the held-out lesions, measured on the other half. FOLDER holds the
unpacked source packages that photographs.json names, with the photographs in them.
"""
import argparse, io, json, os
from datetime import date
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent


def jpeg(x, quality):
    "An image after JPEG compression"
    Image.fromarray(x).save(file := io.BytesIO(), 'JPEG', quality=quality)
    return np.asarray(Image.open(file))


def blurred(x): return cv2.GaussianBlur(x, (0, 0), 2*x.shape[0]/450)
def grey(x): return np.repeat(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None], 3, 2)
def scaled(x, factors): return np.clip(x*np.array(factors), 0, 255).astype(np.uint8)


def middle(x, zoom):
    "The middle of an image"
    h, w = x.shape[0], x.shape[1]
    top, left = (h - round(h/zoom))//2, (w - round(w/zoom))//2
    return x[top:h-top, left:w-left]


# names are keys of the results file
CHANGES = {
    'as they are': lambda x: x,
    'JPEG of quality 20': lambda x: jpeg(x, 20),
    'blurred, sigma 2 px of 450': blurred,
    '20 % brighter': lambda x: scaled(x, 1.2),
    '20 % darker': lambda x: scaled(x, .8),
    'bluer, blue and red by 10 %': lambda x: scaled(x, [.9, 1, 1.1]),
    'grey': grey,
    'middle, enlarged twice': lambda x: middle(x, 2),
    'rotated by 90 degrees': lambda x: np.rot90(x).copy(),
}


def parts_of(args):
    "Held-out images for the limit, those to measure on (other lesions), and the training images"
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    meta = split_by_lesion(read_metadata(os.environ['HAM10000_DIR']), fold=args.fold)
    valid, training = meta[meta.is_valid], meta[~meta.is_valid]
    groups = sorted(valid.group.unique())
    of_limit = valid.group.isin(np.random.default_rng(args.seed).permutation(groups)[:len(groups)//2])
    return [part.reset_index(drop=True) for part in (valid[of_limit], valid[~of_limit], training)]


def photographs_in(folder):
    "Paths of the photographs, and how many there are by package"
    if not folder: return [], {}
    names = json.loads((HERE/'photographs.json').read_text())
    files = [Path(folder)/package/name for package, of_package in names.items() for name in of_package]
    return files, {package: len(of_package) for package, of_package in names.items()}


def answering(learn):
    "A function: images as a frame or a list of arrays -> features and logits"
    from skin_lesions.ood import keep_features
    def answers(items):
        if isinstance(items, list): items = pd.DataFrame({'path': [Image.fromarray(x) for x in items]})
        net = learn.model.eval()
        with torch.no_grad(), keep_features(net) as features:
            logits = [net(batch[0]) for batch in learn.dls.test_dl(items, bs=64)]
        return torch.cat(features).numpy(), torch.cat(logits).numpy()
    return answers


def scores_of(ood, train_features):
    "Functions of features and logits by the score's name"
    from skin_lesions.ood import energy_score, neighbour_score, probability_score
    n = ood.n_last
    return {'distance': lambda f, logits: ood.score(f), 'last features': lambda f, logits: ood.parts(f)['last'],
            'texture': lambda f, logits: ood.parts(f)['texture'],
            'neighbour': lambda f, logits: neighbour_score(f[:, :n], train_features[:, :n]),
            'energy': lambda f, logits: energy_score(logits),
            'probability': lambda f, logits: probability_score(logits)}


def detection_of(score, inside, outside, groups):
    "How well a score tells each kind of non-lesion from lesions"
    from skin_lesions.ood import detection
    lesions, others = score(*inside), {kind: score(*answers) for kind, answers in outside.items()}
    pooled = {'drawn': np.concatenate([s for kind, s in others.items() if kind != 'photographs'])}
    if 'photographs' in others: pooled['photographs'] = others['photographs']
    found = {kind: detection(lesions, s, groups).round(4).to_dict() for kind, s in pooled.items()}
    kinds = {kind: round(float(detection(lesions, s, groups, n=200).auroc), 4) for kind, s in others.items()}
    return found | dict(kinds=kinds)


def main(args):
    from skin_lesions.core import read_image
    from skin_lesions.ood import fit_ood, get_features
    from skin_lesions.predict import load_predictor
    from skin_lesions.synthetic import NON_LESIONS, draw_non_lesion
    limit_part, measured, training = parts_of(args)
    learn = load_predictor(args.bundle, 'cpu').learner
    answers = answering(learn)
    ood = fit_ood(learn, rate=args.rate, train=training, valid=get_features(learn, limit_part, bs=64))
    inside = answers(measured)
    some_training = training.sample(min(2000, len(training)), random_state=args.seed).reset_index(drop=True)
    train_features = answers(some_training)[0]
    synthetic = {kind: [draw_non_lesion(kind, i, size=(300, 225)) for i in range(args.n)] for kind in NON_LESIONS}
    outside = {kind: answers(images) for kind, images in synthetic.items()}
    files, packages = photographs_in(args.photographs)
    if files: outside['photographs'] = answers([np.asarray(read_image(f)) for f in files])
    table = {name: detection_of(score, inside, outside, measured.group)
             for name, score in scores_of(ood, train_features).items()}

    def flagged(features): return round(float(ood.is_ood(ood.score(features)).mean()), 4)
    some = [np.asarray(read_image(f)) for f in measured.drop_duplicates('group').path[:args.changed]]
    changed = {name: flagged(answers([change(x) for x in some])[0]) for name, change in CHANGES.items()}
    found = dict(date=date.today().isoformat(), network=args.network, fold=args.fold, seed=args.seed, rate=args.rate,
                 images_for_limit=len(limit_part), images_measured=len(measured),
                 lesions_measured=measured.group.nunique(), drawn_of_each_kind=args.n, photographs=packages,
                 detection=table,
                 flagged={'lesions': flagged(inside[0])} | {k: flagged(o[0]) for k, o in outside.items()},
                 images_changed=len(some), flagged_changed=changed)
    Path(args.out).write_text(json.dumps(found, indent=1) + '\n')
    print(json.dumps(found, indent=1))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('bundle', help='name or folder')
    parser.add_argument('--fold', type=int, default=0, help='that the network was not trained on')
    parser.add_argument('--rate', type=float, default=.01, help='fraction of lesions to flag by mistake')
    parser.add_argument('--n', type=int, default=100, help='synthetic images of each kind')
    parser.add_argument('--photographs', help='folder with the packages of photographs.json; without it, none')
    parser.add_argument('--changed', type=int, default=500, help='lesions of which changed images are measured')
    parser.add_argument('--seed', type=int, default=42)
    parser.add_argument('--network', default='two-stage EfficientNet-Lite0, 128 px, 20 epochs', help='for the result')
    parser.add_argument('--out', default=str(HERE/'results'/'ood.json'), help='JSON to write')
    main(parser.parse_args())
