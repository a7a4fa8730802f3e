"Experiments: recipes with every value of every field run at scale tiny; killed at random moments, the results are complete, without doubles, and those of runs that were never killed."
import functools, json, multiprocessing, os, random, signal, time

import numpy as np
import pandas as pd
import pytest
import torch

KILLS = int(os.environ.get('EXPERIMENT_KILLS', 3))
SOME = ('alpha_inverse', 'rotation', 'restoration_simultaneous')
SECONDS = {} # that a recipe takes here
NAMED = (*SOME, 'base', 'two_stage', 'two_stage_efficientnet_mixup', 'restoration_sequential', 'all_changes', '224px', 'distilled') # a test below or a student asks for it
QUICK = dict(scale='tiny', workers=0, device='cpu', report=False)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    from skin_lesions.synthetic import synthetic_dataset
    return synthetic_dataset(tmp_path_factory.mktemp('experiments')/'sample', 56, size=(96, 72), show=False)


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
    lines = {}
    for name in chosen():
        began, lines[name] = time.monotonic(), run_recipe(name, **kw)
        SECONDS[name] = time.monotonic()-began
    for name in ('alpha_inverse', 'two_stage_efficientnet_mixup'): run_recipe(name, split='image', **kw)
    return out, lines


def test_recipes_run(finished):
    from skin_lesions.experiments import ablation, read_results, recipe_table, show_table
    from skin_lesions.recipes import PAPER_RECIPES, RECIPES
    out, lines = finished
    assert {l['recipe'] for l in read_results(out)} == set(lines)
    for name, l in lines.items():
        assert 0 <= l['average_recall'] <= 1 and l['weights'] == 'random' and l['n_valid'] == 12 and l['leaked'] == 0, name
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
    rng, killed, seconds = random.Random(3), 0, sum(SECONDS[name] for name in SOME)
    for _ in range(KILLS):
        child = start(data, tmp_path)
        time.sleep(rng.uniform(.05, .6)*seconds)
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


def test_a_pool_of_two_processes_one_killed_and_resumed(data, finished, tmp_path):
    "The other goes on; the same call finishes what was killed, and all is as without a pool"
    import threading
    from skin_lesions.experiments import LocalPool, run_in_pool
    torch.set_num_threads(1)
    runs, options = [dict(recipe=name) for name in SOME[:2]], dict(data=data, out=tmp_path/'pool', minutes=0, **QUICK)
    pool = LocalPool(2)
    def kill_one():
        while not list((tmp_path/'pool').glob('runs/*')): time.sleep(.05)
        pool.running[0].kill()
    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    ended = dict(run_in_pool(runs, pool, every=.05, **options))
    killer.join(60)
    pool.close()
    lost, = [i for i, line in ended.items() if isinstance(line, RuntimeError)]
    assert 'status -9' in str(ended[lost]) and ended[1-lost]['new'] and len(lines_of(tmp_path/'pool')) == 1
    again = LocalPool(2)
    ended = dict(run_in_pool(runs, again, every=.05, **options))
    again.close()
    assert [ended[i]['new'] for i in (lost, 1-lost)] == [True, False] and len(lines_of(tmp_path/'pool')) == 2
    same_predictions(tmp_path/'pool', finished)


def test_a_closed_pool_ends_its_processes():
    from skin_lesions.experiments import LocalPool
    pool = LocalPool(1)
    jobs = [pool.submit(time_to_sleep) for _ in range(2)]
    while not pool.running: time.sleep(.05)
    pool.close()
    with pytest.raises(RuntimeError, match='status -15'): jobs[0].result(60)
    assert jobs[1].cancelled() and not pool.running[0].is_alive()


def time_to_sleep(): time.sleep(600)


def wait_for_a_job(file):
    from skin_lesions.experiments import _answer_job
    job = multiprocessing.get_context('fork').Process(target=_answer_job, args=(functools.partial(write_and_sleep, file), None, 1))
    job.start()
    job.join()


def write_and_sleep(file):
    file.with_suffix('.part').write_text(str(os.getpid()))
    file.with_suffix('.part').rename(file)
    time.sleep(600)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='the process that is killed is a fork of this one')
def test_no_job_outlives_the_process_that_was_killed(tmp_path):
    file = tmp_path/'pid'
    process = multiprocessing.get_context('fork').Process(target=wait_for_a_job, args=(file,))
    process.start()
    while not file.exists(): time.sleep(.05)
    job = int(file.read_text())
    os.kill(job, 0) # it runs
    process.kill()
    process.join(60)
    for _ in range(1200):
        try: os.kill(job, 0)
        except ProcessLookupError: return
        time.sleep(.05)
    pytest.fail(f'process {job} goes on')


def test_slurm_through_submitit(tmp_path, monkeypatch):
    "An executor with submitit's interface: what it is given, what it is asked for, and a job that is started again"
    import pickle, sys, types
    from skin_lesions import experiments
    made = []
    class Job:
        def __init__(self, job): self.job, self.looks = job, 0
        def done(self):
            self.looks += 1
            return self.looks > 1
        def result(self): return pickle.loads(self.job)()
    class AutoExecutor:
        def __init__(self, folder, cluster=None): made.append(dict(folder=folder, cluster=cluster))
        def update_parameters(self, **parameters): made[-1].update(parameters)
        def submit(self, job): return Job(pickle.dumps(job))
    submitit, helpers = types.ModuleType('submitit'), types.ModuleType('submitit.helpers')
    submitit.AutoExecutor, submitit.helpers, helpers.DelayedSubmission = AutoExecutor, helpers, lambda job: ('again', job)
    monkeypatch.setitem(sys.modules, 'submitit', submitit)
    monkeypatch.setitem(sys.modules, 'submitit.helpers', helpers)
    def fake(recipe, seed, out):
        if recipe == 'busy': raise BlockingIOError
        if recipe == 'bad': raise ValueError('no such recipe')
        return dict(recipe=recipe, seed=seed, out=out)
    monkeypatch.setattr(experiments, 'run_recipe', fake)
    pool = experiments.slurm_pool(tmp_path, timeout_min=5, slurm_partition='night')
    assert made == [dict(folder=str(tmp_path), cluster='slurm', name='skin_lesions', timeout_min=5, slurm_partition='night')]
    runs = [dict(recipe=name, seed=1) for name in ('base', 'busy', 'bad')]
    ended = dict(experiments.run_in_pool(runs, pool, every=.01, out='o'))
    assert ended[0] == dict(recipe='base', seed=1, out='o') and ended[1] is None and str(ended[2]) == 'no such recipe'
    job = experiments.RecipeJob(runs[0], dict(out='o'))
    assert job.checkpoint() == ('again', job)
    monkeypatch.setitem(sys.modules, 'submitit', None)
    with pytest.raises(ModuleNotFoundError, match='pip install submitit'): experiments.slurm_pool(tmp_path)


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
