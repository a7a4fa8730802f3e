"""scdiag 0.1.0: write the probabilities of images/test. Its own scdiag-infer does not load the weights of a timm
network and answers with an untrained one, so they are loaded here."""
import csv, sys
from pathlib import Path

import torch
from scdiag.infer import open_image, predict_single
from scdiag.model_utils import build_val_transform, load_model_for_inference

size = int(sys.argv[1])
model, processor = load_model_for_inference('timm:tf_efficientnet_lite0', 'run_best.pt', device='cpu',
                                            model_kwargs=dict(pretrained=False), image_size=size)
saved = torch.load('run_best.pt', weights_only=True)['model_state_dict']
loaded = all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
print('note: the checkpoint was loaded by scdiag itself:', loaded)
model.load_state_dict(saved)
transform = build_val_transform(processor, size)
names = [model.config.id2label[str(i)] for i in range(7)]
with open('predictions.csv', 'w', newline='') as f:
    out = csv.writer(f)
    out.writerow(['image_id', *names])
    for path in sorted(Path('images/test').glob('*/*.jpg')):
        p = predict_single(model, transform, open_image(str(path)), 'cpu')[0].tolist()
        out.writerow([path.stem, *p])
