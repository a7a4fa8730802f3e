"""This library: train on the rows of split.csv with its defaults, write the probabilities of the validation images, and a bundle."""
import sys

import pandas as pd
from skin_lesions.cache import resize_cache
from skin_lesions.data import ham10000_dataloaders
from skin_lesions.learner import two_stage_learner
from skin_lesions.bundle import save_bundle
from skin_lesions.predictions import get_predictions, save_predictions
from fastai.torch_core import set_seed

size, epochs = int(sys.argv[1]), int(sys.argv[2])
set_seed(42)
meta = pd.read_csv('split.csv')
learn = two_stage_learner(ham10000_dataloaders(meta, size, cache=resize_cache(meta, size, folder='cache', show=False)))
with learn.no_bar(): learn.fit_one_cycle(epochs, 1e-3)
save_predictions(get_predictions(learn), 'predictions.csv')
save_bundle(learn, 'bundle')
