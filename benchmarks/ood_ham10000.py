"""How well the score of unusual pictures tells drawn non-lesions from held-out lesions of HAM10000, for a trained network, with the baselines beside it.

    HAM10000_DIR=... python benchmarks/ood_ham10000.py BUNDLE --fold 0

The bundle's network must not have been trained on that fold. Fitted on 2,000 training images, limit set on half of the held-out lesions, measured on the other half.
"""
import argparse, json, os
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image


def main(args):
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.dataset import read_metadata
    from skin_lesions.ood import NON_LESIONS, detection, draw_non_lesion, energy_score, fit_ood, keep_features, neighbour_score, probability_score
    from skin_lesions.predict import load_predictor
    from skin_lesions.speed import reuse_memory
    from skin_lesions.split import split_by_lesion
    reuse_memory()
    meta = split_by_lesion(read_metadata(os.environ['HAM10000_DIR']), fold=args.fold)
    groups = sorted(meta.group[meta.is_valid].unique())
    limit_on = set(np.random.default_rng(args.seed).permutation(groups)[:len(groups)//2])
    valid = meta[meta.is_valid]
    first, second = valid[valid.group.isin(limit_on)], valid[~valid.group.isin(limit_on)].reset_index(drop=True)
    kept = pd.concat([meta[~meta.is_valid], first], ignore_index=True)
    learn = Learner(ham10000_dataloaders(kept, 128, bs=64, num_workers=2), load_predictor(args.bundle, device='cpu').model, loss_func=CrossEntropyLossFlat())
    ood = fit_ood(learn, rate=args.rate)

    def answers(items):
        with torch.no_grad(), keep_features(learn.model) as found: logits = [learn.model.eval()(b[0]) for b in learn.dls.test_dl(items, bs=64)]
        return torch.cat(found).numpy(), torch.cat(logits).numpy()

    inside = answers(second)
    train = answers(kept[~kept.is_valid].sample(2000, random_state=args.seed))
    outside = {k: answers(pd.DataFrame({'path': [Image.fromarray(draw_non_lesion(k, i, size=(300, 225))) for i in range(args.n)]})) for k in NON_LESIONS}
    scores = dict(distance=lambda f, l: ood.score(f), neighbour=lambda f, l: neighbour_score(f, train[0]), energy=lambda f, l: energy_score(l), probability=lambda f, l: probability_score(l))
    table = {name: dict(all=detection(s(*inside), np.concatenate([s(*o) for o in outside.values()]), second.group).round(4).to_dict(),
                        **{k: round(float(detection(s(*inside), s(*o), second.group, n=200).auroc), 4) for k, o in outside.items()}) for name, s in scores.items()}
    flagged = {'lesions': float(ood.unusual(ood.score(inside[0])).mean()), **{k: float(ood.unusual(ood.score(o[0])).mean()) for k, o in outside.items()}}
    found = dict(date=date.today().isoformat(), network=args.network, fold=args.fold, rate=args.rate, lesions_for_limit=len(first), lesions_measured=len(second), drawn_of_each_kind=args.n, detection=table, flagged={k: round(v, 4) for k, v in flagged.items()})
    Path(args.out).write_text(json.dumps(found, indent=1) + '\n')
    print(json.dumps(found, indent=1))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('bundle')
    parser.add_argument('--fold', type=int, default=0)
    parser.add_argument('--rate', type=float, default=.01)
    parser.add_argument('--n', type=int, default=100, help='drawn pictures of each kind')
    parser.add_argument('--seed', type=int, default=42)
    parser.add_argument('--network', default='two-stage EfficientNet-Lite0, 128 px, 10 epochs')
    parser.add_argument('--out', default=str(Path(__file__).parent.parent/'nbs'/'results'/'ood.json'))
    main(parser.parse_args())
