"""Plain fastai: train on the rows of split.csv, write the probabilities of the validation images."""
from fastai.vision.all import *
import sys

size, epochs, weights = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
set_seed(42)
df = pd.read_csv('split.csv')
block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('path'), get_y=ColReader('dx'),
                  splitter=ColSplitter('is_valid'), item_tfms=Resize(size),
                  batch_tfms=aug_transforms(flip_vert=True, max_rotate=180.))
dls = block.dataloaders(df, bs=64, num_workers=2)
overlay = dict(file=weights)
learn = vision_learner(dls, 'tf_efficientnet_lite0', metrics=accuracy, pretrained_cfg_overlay=overlay)
learn.unfreeze()
with learn.no_bar(): learn.fit_one_cycle(epochs, 1e-3)
p, _ = learn.get_preds()
table = pd.DataFrame(p.numpy(), columns=list(dls.vocab))
table.insert(0, 'image_id', df.image_id[df.is_valid].to_numpy())
table.to_csv('predictions.csv', index=False)
