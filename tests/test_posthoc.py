"Post-hoc evaluation of the results in the repository: what the page says can be made again from what is kept."
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope='module')
def kept(repo): return Path(repo)/'benchmarks'/'results'/'experiments'


def test_a_rule_has_not_seen_the_lesions_that_it_decides(kept):
    "With the labels of one part of the lesions changed, the decisions of that part stay"
    from skin_lesions.decide import decision_rule
    from skin_lesions.posthoc import decide_out_of_fold, pooled_predictions
    from skin_lesions.split import lesion_folds
    table = pooled_predictions(kept, 'base', 'reduced', folds=[0])
    decided, k = decide_out_of_fold(table, k=3), 3
    part = lesion_folds(table, k).fold == 1
    rule = decision_rule('prior', table[~part])
    assert decided.decision[part].tolist() == rule.decide(table[part]).tolist()


def test_the_mean_of_recipes_is_the_mean_of_their_tables(kept):
    from skin_lesions.classes import HAM10000
    from skin_lesions.posthoc import pooled_predictions
    codes, names = list(HAM10000.codes), ['base', 'weighted']
    whole = pooled_predictions(kept, names, 'reduced', folds=[0, 1]).set_index('image_id')
    alone = [pooled_predictions(kept, n, 'reduced', folds=[0, 1]).set_index('image_id').loc[whole.index, codes].to_numpy() for n in names]
    np.testing.assert_allclose(whole[codes].to_numpy(), sum(alone)/2, atol=2e-5)


def test_eight_views_are_kept_with_the_results(kept):
    from skin_lesions.posthoc import pooled_predictions
    one, eight = (pooled_predictions(kept, 'base', 'reduced', folds=[0], views=v) for v in (None, 'dihedral'))
    assert set(one.image_id) == set(eight.image_id) and (one.mel-eight.mel).abs().max() > 1e-3
