"Experiments: recipes with every value of every field run at scale tiny; killed at random moments, the results are complete, without doubles, and those of runs that were never killed."
import json, multiprocessing, os, random, signal, time

import numpy as np
import pandas as pd
import pytest
import torch

KILLS = int(os.environ.get('EXPERIMENT_KILLS', 3))
SOME = ('alpha_inverse', 'rotation', 'restoration_simultaneous')
NAMED = (*SOME, 'base', 'two_stage', 'two_stage_efficientnet_mixup', 'restoration_sequential', 'all_changes', '224px', 'distilled') # a test below or a student asks for it
QUICK = dict(scale='tiny', workers=0, device='cpu', report=False)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    from skin_lesions.synthetic import synthetic_dataset
    return synthetic_dataset(tmp_path_factory.mktemp('experiments')/'sample', 80, size=(96, 72), show=False)


def traits(name):
    "What a training at scale tiny does: the value of each field, and of a number that it is not 0"
    from skin_lesions.recipes import at_scale, training_config
    return {(field, str(bool(v) if isinstance(v, (int, float)) else v)) for field, v in training_config(at_scale(name, 'tiny')).items()}


def chosen():
    "Recipes that between them have every trait of every recipe; of the others, each adds the most"
    from skin_lesions.recipes import ABLATIONS, BEST_RECIPES, PAPER_RECIPES
    names = list(NAMED)
    of = {name: traits(name) for name in (*PAPER_RECIPES, *ABLATIONS, *BEST_RECIPES)}
    missing = set().union(*of.values()).difference(*(of[name] for name in names))
    while missing:
        names.append(max(of, key=lambda name: len(of[name] & missing)))
        missing -= of[names[-1]]
    return [name for name in of if name in names] # teachers before students


@pytest.fixture(scope='module')
def finished(data, tmp_path_factory):
    "Recipes by lesion, two by image as well, never interrupted"
    from skin_lesions.experiments import run_recipe
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp('finished')
    kw = dict(data=data, out=out, **QUICK)
    lines = {name: run_recipe(name, **kw) for name in chosen()}
    for name in ('alpha_inverse', 'two_stage_efficientnet_mixup'): run_recipe(name, split='image', **kw)
    return out, lines


def test_recipes_run(finished):
    from skin_lesions.experiments import ablation, read_results, recipe_table, show_table
    from skin_lesions.recipes import PAPER_RECIPES, RECIPES
    out, lines = finished
    assert {l['recipe'] for l in read_results(out)} == set(lines)
    for name, l in lines.items():
        assert 0 <= l['average_recall'] <= 1 and l['weights'] == 'random' and l['n_valid'] == 16 and l['leaked'] == 0, name
        assert l['config']['gamma'] == RECIPES[name].gamma and len(l['history']) == len(RECIPES[name].steps)
    found = recipe_table(out, 'paper', 'tiny')
    assert list(found.index) == list(PAPER_RECIPES) and found.image_runs.sum() == 2
    assert found.lesion_runs.fillna(0).tolist() == [name in lines for name in PAPER_RECIPES]
    assert found.leak.notna().sum() == 2 and found.paper_accuracy.notna().sum() == 11
    assert (show_table(found)['by image: accuracy'] == '–').sum() == len(PAPER_RECIPES)-2
    compared = [name for name in RECIPES if {name, RECIPES[name].base} <= set(lines)]
    changes = ablation(out, compared, 'tiny')
    assert len(compared) > 5 and list(changes.index) == compared
    assert changes.difference.notna().all() and (changes.low <= changes.difference+1e-9).all() and (changes.difference <= changes.high+1e-9).all()


def test_a_line_can_be_made_again_from_the_predictions(finished):
    "The scores in the line, by hand from the table beside it"
    from skin_lesions.classes import HAM10000
    from skin_lesions.experiments import run_folder
    out, lines = finished
    codes = list(HAM10000.codes)
    for name in ('restoration_sequential', 'distilled'):
        t = pd.read_csv(run_folder(out, lines[name])/'predictions.csv')
        most_probable = np.array(codes)[t[codes].to_numpy().argmax(1)]
        assert lines[name]['accuracy'] == pytest.approx((most_probable == t.dx).mean())
        assert lines[name]['average_recall'] == pytest.approx(np.mean([(most_probable[t.dx == c] == c).mean() for c in codes]))


def command(sample, out, recipes=SOME):
    "In a process of its own"
    from skin_lesions.experiments import run_recipe
    torch.set_num_threads(1)
    for name in recipes:
        try: run_recipe(name, sample, out=out, minutes=0, **QUICK)
        except BlockingIOError: pass # the other process has it
    os._exit(0)


def start(*args):
    child = multiprocessing.get_context('fork').Process(target=command, args=args)
    child.start()
    return child


def lines_of(out): return [json.loads(l) for l in (out/'results.jsonl').read_text().splitlines()]


def same_predictions(out, finished):
    from skin_lesions.experiments import run_folder
    other, other_lines = finished
    for l in lines_of(out):
        a, b = run_folder(out, l)/'predictions.csv', run_folder(other, other_lines[l['recipe']])/'predictions.csv'
        assert a.read_bytes() == b.read_bytes(), l['recipe']


def test_killed_at_random_moments(data, finished, tmp_path):
    rng, killed = random.Random(3), 0
    for _ in range(KILLS):
        child = start(data, tmp_path)
        time.sleep(rng.uniform(.3, 4))
        if child.is_alive(): os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        assert child.exitcode in (0, -signal.SIGKILL)
        killed += child.exitcode != 0
    assert killed
    child = start(data, tmp_path)
    child.join(300)
    assert child.exitcode == 0
    assert sorted(l['recipe'] for l in lines_of(tmp_path)) == sorted(SOME)
    same_predictions(tmp_path, finished)
    assert not list(tmp_path.glob('runs/*/state')) and not list(tmp_path.glob('runs/*/.*-*'))


def test_two_processes_share_a_folder(data, finished, tmp_path):
    children = [start(data, tmp_path, r) for r in (SOME[:2], SOME[:2][::-1])]
    for c in children: c.join(300)
    assert [c.exitcode for c in children] == [0, 0]
    child = start(data, tmp_path, SOME[:2]) # what each left to the other
    child.join(300)
    assert child.exitcode == 0
    assert sorted(l['recipe'] for l in lines_of(tmp_path)) == sorted(SOME[:2])
    same_predictions(tmp_path, finished)


def test_many_writers_of_one_file(tmp_path):
    "Lines of several processes at once: none is lost, none torn, none double"
    from skin_lesions.experiments import append_result, read_results
    def write(k):
        for i in range(20): append_result(tmp_path, dict(recipe='x', split='lesion', fold=0, folds=5, seed=i, scale='tiny', digest='d', by=k, filler='y'*2000))
    children = [multiprocessing.get_context('fork').Process(target=write, args=(k,)) for k in range(4)]
    for c in children: c.start()
    for c in children: c.join(120)
    assert [c.exitcode for c in children] == [0]*4
    assert sorted(l['seed'] for l in read_results(tmp_path)) == list(range(20))


def test_packed_runs_read_as_the_folders_do(finished, tmp_path):
    "The same tables and intervals from the packed results as from the run folders"
    from skin_lesions.experiments import pack_runs, recipe_table
    out, _ = finished
    pack_runs(out, tmp_path)
    before, after = (recipe_table(o, 'paper', 'tiny').select_dtypes('number') for o in (out, tmp_path))
    pd.testing.assert_frame_equal(before, after, check_exact=True)
