"""Write a small bundle of today's format version with everything that a bundle can hold, and its answers.

    python tools/make_format_bundle.py tests/bundles

Run it once when `skin_lesions.bundle.FORMAT_VERSION` grows and before the change, so that the tests go on reading what was written.
"""
import sys, tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from skin_lesions.bundle import FORMAT_VERSION, save_bundle
from skin_lesions.conformal import fit_sets
from skin_lesions.data import ham10000_dataloaders
from skin_lesions.decide import fit_decisions
from skin_lesions.inference import learner_probabilities
from skin_lesions.learner import two_stage_learner
from skin_lesions.ood import fit_ood
from skin_lesions.predict import load_predictor
from skin_lesions.predictions import get_predictions
from skin_lesions.readers import read_metadata
from skin_lesions.split import split_by_lesion
from skin_lesions.synthetic import synthetic_dataset

PATIENT = dict(age=50, sex='female', site='back')


def images(n=6):
    "Blobs on skin that depend on nothing but their number; the last is no skin"
    y,x = np.mgrid[:72, :96]
    made = []
    for i in range(n):
        blob = np.exp(-((x - 44 - i)**2 + (y - 36)**2*(1 + i/4))/(2*(9 + 2*i)**2))[...,None]
        made.append(np.uint8(np.array([205, 160, 140])*(1 - blob) + np.array([90 + 15*i, 60, 50])*blob))
    made[-1] = np.uint8(127.5 + 100*np.sin(x/2)[...,None]*np.array([1, -1, .3]))
    return made


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        meta = split_by_lesion(read_metadata(synthetic_dataset(Path(tmp)/'data', 240, size=(96, 72), show=False)))
        dls = ham10000_dataloaders(meta, 32, bs=16, arch='test_efficientnet', num_workers=0, device='cpu', patient=True)
        learn = two_stage_learner(dls, 'test_efficientnet', pretrained=False, hidden=(8,), body_kwargs=dict(channel_multiplier=.1))
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
        table = get_predictions(learn)
        decided = fit_decisions(table, first='nv')
        parts = dict(calibration=decided.calibration, rule=decided.rule, referral=decided.referral, sets=fit_sets(table, .2))
        file = save_bundle(learn, folder/f'format_{FORMAT_VERSION}.zip', ood=fit_ood(learn), half=True, **parts)
    answers = [load_predictor(file, 'cpu').predict(image, PATIENT) for image in images()]
    pd.concat(answers).to_csv(file.with_suffix('.csv'), index=False, float_format='%.6f')
    print(file, file.stat().st_size)


if __name__=='__main__': main(Path(sys.argv[1]))
