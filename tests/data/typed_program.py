"A user's program; mypy reads it in tests/test_package.py, nobody runs it."
from pathlib import Path

import pandas as pd

from skin_lesions.classes import ClassSet, class_set
from skin_lesions.evaluate import class_scores, scores
from skin_lesions.predict import Predictor, load_predictor
from skin_lesions.predictions import read_predictions
from skin_lesions.recipes import Recipe, find_recipe
from skin_lesions.train import train_run


def predicted(folder: Path) -> pd.DataFrame:
    predictor: Predictor = load_predictor('ham10000')
    return predictor.predict(folder, views='dihedral')


def trained(meta: pd.DataFrame, out: Path) -> Path:
    recipe: Recipe = find_recipe('best')
    return train_run(recipe, meta, out, fold=0)


def judged(run: Path) -> float:
    classes: ClassSet = class_set('HAM10000')
    table = read_predictions(run/'predictions.csv', classes)
    print(class_scores(table))
    return scores(table)['average_recall']
