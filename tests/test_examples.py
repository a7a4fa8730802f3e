"The tables in the package are those of benchmarks and of HAM10000, and an installed package reads them"
import json, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from skin_lesions.classes import HAM10000, classes_of
from skin_lesions.examples import EXAMPLES, RESULT_NAMES, TABLES, example_metadata, example_predictions, example_results
from skin_lesions.split import lesion_folds

RESULTS = Path(__file__).resolve().parent.parent/'benchmarks'/'results'


@pytest.mark.parametrize('name', EXAMPLES)
def test_predictions_are_those_of_the_experiment(name):
    table, codes = example_predictions(name, None), list(HAM10000.codes)
    packed = pd.read_csv(RESULTS/'experiments'/f'{name}.csv.gz', dtype={'views': str})
    packed = packed[(packed.split == 'lesion') & (packed.scale == 'reduced') & (packed.seed == 42) & packed.views.isna()]
    both = table.merge(packed, on=['image_id', 'fold'], suffixes=('', '_packed'), validate='one_to_one')
    assert len(both) == len(table) > 2000 and set(table.fold) == set(EXAMPLES[name]['folds'])
    assert (both.dx == both.dx_packed).all() and (both.group == both.group_packed).all()
    assert np.abs(both[codes].to_numpy()-both[[f'{c}_packed' for c in codes]].to_numpy()).max() < 1e-4
    assert classes_of(table).codes == HAM10000.codes


def test_folds_are_those_of_the_default_split():
    fold = lesion_folds(example_metadata()).set_index('image_id').fold
    for name in EXAMPLES:
        table = example_predictions(name, None)
        assert (table.image_id.map(fold) == table.fold).all()


def test_results_are_those_of_benchmarks():
    for name in RESULT_NAMES: assert example_results(name) == json.loads((RESULTS/f'{name}.json').read_text())


def test_the_package_holds_what_is_named_and_stays_small():
    assert {f.name for f in TABLES.iterdir()} == {'README.md', 'ham10000.csv.xz', *(f'{n}.csv.xz' for n in EXAMPLES), *(f'{n}.json' for n in RESULT_NAMES)}
    assert sum(f.stat().st_size for f in TABLES.iterdir()) < 300_000


def test_metadata_are_those_of_ham10000(real):
    from skin_lesions.readers import read_metadata
    ours, theirs = example_metadata(), read_metadata(real).sort_values('image_id', ignore_index=True)
    columns = ['image_id', 'lesion_id', 'dx', 'age', 'sex', 'site', 'group']
    pd.testing.assert_frame_equal(ours[columns], theirs[columns], check_dtype=False)
