"""This library with the paper's settings: train on the rows of split.csv, write the probabilities of the validation
images, and a bundle."""
from fastai.vision.all import *
from skin_lesions.all import *
import sys

size, epochs = int(sys.argv[1]), int(sys.argv[2])
set_seed(42)
meta = pd.read_csv('split.csv')
cache = resize_cache(meta, size, folder='cache', show=False)
dls = ham10000_dataloaders(meta, size, sampling=None, cache=cache)
learn = two_stage_learner(dls, **paper_settings())
with learn.no_bar(): learn.fit_one_cycle(epochs, 1e-3)
save_predictions(get_predictions(learn), 'predictions.csv')
save_bundle(learn, 'bundle')
