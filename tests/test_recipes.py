"Recipes: the paper's figures are those of its tables, every recipe is sound at every scale, and a digest tells trainings apart."
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from skin_lesions import recipes
from skin_lesions.recipes import ABLATIONS, PAPER_RECIPES, RECIPES, SCALES, Recipe, at_scale, find_recipe, recipe_digest, training_config, with_changes

FIGURES = { # of the paper's tables
    'resnet50_gamma0': (.748, .422), 'resnet50_gamma1': (.540, .561), 'resnet50_gamma1.5': (.549, .560), 'resnet50_gamma2': (.534, .531),
    'resnet50_gamma5': (.521, .525), 'resnet50_pretrained_gamma0': (.862, .753), 'resnet50_pretrained_gamma1': (.843, .727),
    'efficientnet_mixup': (.901, .800), 'two_stage_efficientnet_mixup': (.905, .806), 'rotation_sequential': (.753, .452), 'restoration_sequential': (.782, .541)}


def test_every_figure_of_the_paper_is_there():
    assert {n: (r.paper_accuracy, r.paper_recall) for n, r in RECIPES.items() if r.paper_recall is not None} == FIGURES


def test_the_paper_s_confusion_matrix_and_test_images():
    "Its numbers give the best row's, and its classes are those of a stratified fifth of HAM10000"
    rows, best = recipes.PAPER_CONFUSION, RECIPES['two_stage_efficientnet_mixup']
    right, sums = [row[i] for i, row in enumerate(rows)], [sum(row) for row in rows]
    assert sums == [65, 103, 220, 23, 223, 1341, 28] and sums == [round(n/5) for n in (327, 514, 1099, 115, 1113, 6705, 142)]
    assert round(sum(right)/sum(sums), 3) == best.paper_accuracy and round(sum(r/n for r, n in zip(right, sums))/7, 3) == best.paper_recall
    assert recipes.PAPER_TEST == dict(recipe=best.name, images=1511, accuracy=.891, average_recall=.784)


def test_the_paper_s_protocol():
    "Constant rate of 1e-3, 20 epochs also where pretext and diagnosis are trained at once, α = 1 for networks from random weights"
    for r in PAPER_RECIPES.values():
        assert (r.schedule, r.lr, r.epochs, r.pretext_epochs) == ('flat', 1e-3, 20, 30), r.name
        if not r.pretrained and r.name != 'alpha_inverse': assert r.alpha is None and r.factors is None, r.name
        assert (r.mixup == .7) == ('mixup' in r.name)
    assert PAPER_RECIPES['rotation_sequential'].arch.startswith('tf_efficientnet')
    two_stage = PAPER_RECIPES['two_stage_efficientnet_mixup']
    assert (two_stage.factors, two_stage.combine, two_stage.stages) == ({'nv': .5}, 'paper', 2) # a discount on nevi, hard routing
    assert {n for n, r in PAPER_RECIPES.items() if r.arch == 'tf_efficientnet_b7'} == {'efficientnet_mixup', 'two_stage_efficientnet_mixup', 'rotation_sequential', 'rotation_simultaneous'}
    assert {n for n, r in PAPER_RECIPES.items() if r.pretrained} == {n for n in PAPER_RECIPES if 'pretrained' in n or 'mixup' in n}
    assert {n: (r.pretext, r.joint, r.patch, r.gamma) for n, r in PAPER_RECIPES.items() if r.pretext} == {
        'rotation_sequential': ('rotation', False, 8, 1.), 'rotation_simultaneous': ('rotation', True, 8, 1.), 'restoration_sequential': ('restoration', False, 8, 1.),
        'restoration_sequential_patch16': ('restoration', False, 16, 1.), 'restoration_simultaneous': ('restoration', True, 8, 1.)}


@pytest.mark.parametrize('scale', SCALES)
def test_every_recipe_at_every_scale(scale):
    for name in RECIPES:
        r = at_scale(name, scale)
        assert Recipe.from_dict(json.loads(json.dumps(r.as_dict()))) == r
        assert len(r.steps) == len(RECIPES[name].steps) and all(size >= 8 and epochs >= 1 for size, epochs in r.steps)
        assert r.name == name


def test_the_digest_sees_every_field_that_is_trained():
    other = dict(name='x', about='x', arch='resnet18', pretrained=False, stages=2, first='mel', shared=False, combine='paper', loss='logit_adjusted', gamma=2., alpha='sqrt',
                 factors={'nv': .5}, tau=.5, mixup=.7, sampling='sqrt', augment='strong', crop='resize', min_scale=.5, patient=True, pretext='rotation', patch=4, clean=0.,
                 encoder='resnet18', steps=((64, 1),), pretext_epochs=1, lr=.1, lr_factor=.5, schedule='flat', bs=8, ema=True, teachers=('flat',), rule='prior', views='dihedral',
                 base='flat', paper_accuracy=.5, paper_recall=.5, joint=True)
    assert set(other) == {f.name for f in fields(Recipe)}
    plain = find_recipe('base')
    for name, value in other.items():
        changed = replace(plain, **({name: value} | (dict(pretext='restoration') if name == 'joint' else {})))
        assert (recipe_digest(changed) == recipe_digest(plain)) == (name in recipes.NOT_TRAINED), name


def test_recipes_of_one_table_train_differently():
    for group in (PAPER_RECIPES, ABLATIONS):
        digests = [recipe_digest(r) for r in group.values()]
        assert len(set(digests)) == len(digests)


def test_choices_are_those_of_the_rooms():
    "The names that a recipe accepts, without importing them"
    from skin_lesions.data import CROPS, WEIGHT_KINDS
    from skin_lesions.decide import RULES
    from skin_lesions.networks import COMBINE
    from skin_lesions.views import VIEWS
    c = recipes.CHOICES
    assert set(c['crop']) == set(CROPS) and set(c['combine']) == set(COMBINE) and set(c['rule']) == set(RULES)
    assert set(c['alpha'])-{None} == set(WEIGHT_KINDS) == set(c['sampling'])-{None}
    assert set(c['views'])-{None} == set(VIEWS)-{None}


def test_changes_from_texts_are_those_from_values():
    for texts, values in (({'size': '96'}, {'size': 96}), ({'mixup': 'none'}, {'mixup': None}), ({'patient': 'yes'}, {'patient': True}),
                          ({'teachers': 'flat,base'}, {'teachers': ('flat', 'base')}), ({'steps': '64x2'}, {'steps': ((64, 2),)})):
        assert training_config(with_changes('best', texts)) == training_config(with_changes('best', values))


def test_results_in_the_repository_are_of_recipes_as_they_are(repo):
    "Each kept run has its table, and most are of recipes that have not changed since"
    from skin_lesions.experiments import is_current, read_results, run_predictions
    folder = Path(repo)/'benchmarks'/'results'/'experiments'
    lines = read_results(folder)
    assert lines and all(is_current(l) for l in lines)
    assert all(len(run_predictions(folder, l)) == l['n_valid'] for l in lines)
