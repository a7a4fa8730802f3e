"""How well the out-of-distribution score tells synthetic non-lesions and photographs from held-out lesions of HAM10000, for a trained network, with the baselines beside it.

    HAM10000_DIR=... python benchmarks/ood_ham10000.py BUNDLE --fold 0 --photographs FOLDER

The bundle's network must not have been trained on that fold. Fitted on 2,000 training images, limit set on half of the held-out lesions, measured on the other half.
FOLDER holds the unpacked source packages that photographs.json names, with the photographs in them.
"""
import argparse, io, json, os
from datetime import date
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image


def jpeg(x, quality):
    Image.fromarray(x).save(file := io.BytesIO(), 'JPEG', quality=quality)
    return np.asarray(Image.open(file))


def middle(x, zoom):
    h, w = x.shape[0], x.shape[1]
    top, left = (h-round(h/zoom))//2, (w-round(w/zoom))//2
    return x[top:h-top, left:w-left]


CHANGES = {'as they are': lambda x: x, 'JPEG of quality 20': lambda x: jpeg(x, 20), 'blurred, sigma 2 px of 450': lambda x: cv2.GaussianBlur(x, (0, 0), 2*x.shape[0]/450), '20 % brighter': lambda x: np.clip(1.2*x, 0, 255).astype(np.uint8),
           '20 % darker': lambda x: (.8*x).astype(np.uint8), 'bluer, blue and red by 10 %': lambda x: np.clip(x*[.9, 1, 1.1], 0, 255).astype(np.uint8), 'grey': lambda x: np.repeat(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None], 3, 2),
           'middle, enlarged twice': lambda x: middle(x, 2), 'a quarter turn': lambda x: np.rot90(x).copy()}


def main(args):
    from skin_lesions.core import read_image
    from skin_lesions.readers import read_metadata
    from skin_lesions.synthetic import NON_LESIONS, draw_non_lesion
    from skin_lesions.ood import detection, energy_score, fit_ood, get_features, keep_features, neighbour_score, probability_score
    from skin_lesions.predict import load_predictor
    from skin_lesions.core import reuse_memory
    from skin_lesions.split import split_by_lesion
    reuse_memory()
    meta = split_by_lesion(read_metadata(os.environ['HAM10000_DIR']), fold=args.fold)
    groups = sorted(meta.group[meta.is_valid].unique())
    limit_on = set(np.random.default_rng(args.seed).permutation(groups)[:len(groups)//2])
    valid = meta[meta.is_valid]
    first, second, known = (rows.reset_index(drop=True) for rows in (valid[valid.group.isin(limit_on)], valid[~valid.group.isin(limit_on)], meta[~meta.is_valid]))
    learn = load_predictor(args.bundle, device='cpu').learner
    ood = fit_ood(learn, rate=args.rate, train=known, valid=get_features(learn, first, bs=64))

    def answers(items):
        if isinstance(items, list): items = pd.DataFrame({'path': [Image.fromarray(x) for x in items]})
        with torch.no_grad(), keep_features(learn.model) as found: logits = [learn.model.eval()(b[0]) for b in learn.dls.test_dl(items, bs=64)]
        return torch.cat(found).numpy(), torch.cat(logits).numpy()

    inside, n = answers(second), ood.n_last
    train = answers(known.sample(2000, random_state=args.seed).reset_index(drop=True))
    outside = {k: answers([draw_non_lesion(k, i, size=(300, 225)) for i in range(args.n)]) for k in NON_LESIONS}
    names = json.loads(Path(__file__).with_name('photographs.json').read_text())
    photographs = [Path(args.photographs)/package/name for package, files in names.items() for name in files] if args.photographs else []
    drawn = list(outside)
    if photographs: outside['photographs'] = answers([np.asarray(read_image(f)) for f in photographs])
    scores = {'distance': lambda f, l: ood.score(f), 'last features': lambda f, l: ood.parts(f)['last'], 'texture': lambda f, l: ood.parts(f)['texture'], 'neighbour': lambda f, l: neighbour_score(f[:, :n], train[0][:, :n]),
              'energy': lambda f, l: energy_score(l), 'probability': lambda f, l: probability_score(l)}
    table = {}
    for name, s in scores.items():
        found = {'drawn': np.concatenate([s(*outside[k]) for k in drawn]), **({'photographs': s(*outside['photographs'])} if photographs else {})}
        table[name] = {k: detection(s(*inside), o, second.group).round(4).to_dict() for k, o in found.items()} | {'kinds': {k: round(float(detection(s(*inside), s(*o), second.group, n=200).auroc), 4) for k, o in outside.items()}}
    share = lambda f: round(float(ood.is_ood(ood.score(f)).mean()), 4)
    some = [np.asarray(read_image(f)) for f in second.drop_duplicates('group').path[:args.changed]]
    found = dict(date=date.today().isoformat(), network=args.network, fold=args.fold, seed=args.seed, rate=args.rate, images_for_limit=len(first), images_measured=len(second), lesions_measured=second.group.nunique(), drawn_of_each_kind=args.n, photographs={k: len(v) for k, v in names.items()} if photographs else {}, detection=table,
                 flagged={'lesions': share(inside[0]), **{k: share(o[0]) for k, o in outside.items()}}, images_changed=len(some), flagged_changed={k: share(answers([c(x) for x in some])[0]) for k, c in CHANGES.items()})
    Path(args.out).write_text(json.dumps(found, indent=1) + '\n')
    print(json.dumps(found, indent=1))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('bundle')
    parser.add_argument('--fold', type=int, default=0)
    parser.add_argument('--rate', type=float, default=.01)
    parser.add_argument('--n', type=int, default=100, help='drawn pictures of each kind')
    parser.add_argument('--photographs', help='folder with the unpacked packages of photographs.json; without it, none are measured')
    parser.add_argument('--changed', type=int, default=500, help='lesions of which changed pictures are measured')
    parser.add_argument('--seed', type=int, default=42)
    parser.add_argument('--network', default='two-stage EfficientNet-Lite0, 128 px, 20 epochs')
    parser.add_argument('--out', default=str(Path(__file__).parent.parent/'benchmarks'/'results'/'ood.json'))
    main(parser.parse_args())
