"Synthetic predictions tables for the tests that judge them."
import numpy as np
import pandas as pd

from skin_lesions.classes import HAM10000, with_classes

FREQUENCIES = dict(akiec=.04, bcc=.05, bkl=.11, df=.03, mel=.12, nv=.61, vasc=.04)


def synthetic_table(n_lesions=100, seed=0, skill=1.5, most=3, noise=0, classes=HAM10000):
    "Lesions of one to `most` images; `noise` is another network of the same skill on the same images"
    rng, own, k = np.random.default_rng(seed), np.random.default_rng([seed, noise]), len(classes)
    frequency = np.array([FREQUENCIES.get(c, .1) for c in classes])
    y = np.append(np.arange(k), rng.choice(k, n_lesions-k, p=frequency/frequency.sum()))
    lesion = np.repeat(np.arange(n_lesions), rng.integers(1, most+1, n_lesions))
    x = own.normal(size=(n_lesions, k))[lesion] + own.normal(size=(len(lesion), k)) + skill*np.eye(k)[y[lesion]]
    p = np.exp(x)/np.exp(x).sum(1, keepdims=True)
    table = pd.DataFrame(p, columns=list(classes.codes)).assign(image_id=[f'I{i:05}' for i in range(len(p))])
    table = table.assign(dx=np.array(classes.codes)[y[lesion]], group=[f'L{g}' for g in lesion])
    return with_classes(table[['image_id', *classes.codes, 'dx', 'group']], classes)
