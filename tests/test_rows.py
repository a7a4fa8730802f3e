"The paper's rows: every one runs at scale tiny; killed at random moments, the results are complete, without doubles, and those of a run that was never killed."
import json, multiprocessing, os, random, signal, time

import numpy as np
import pandas as pd
import pytest
import torch

KILLS = int(os.environ.get('ROWS_KILLS', 4))
ROWS = ('resnet50_gamma1', 'rotation_sequential', 'restoration_patch8', 'alpha_inverse')


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    from skin_lesions.synthetic import synthetic_ham10000
    return synthetic_ham10000(tmp_path_factory.mktemp('rows')/'sample', 80, size=(96, 72), show=False)


@pytest.fixture(scope='module')
def finished(drawn, tmp_path_factory):
    "All rows by lesion, two by image as well, never interrupted"
    from skin_lesions.experiments import ROWS, run_row
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp('finished')
    kw = dict(data=drawn, scale='tiny', out=out, num_workers=0, device='cpu')
    lines = {name: run_row(name, **kw) for name in ROWS}
    for name in ('alpha_inverse', 'two_stage_efficientnet_mixup'): run_row(name, split='image', **kw)
    return out, lines


def test_every_row_runs(finished):
    from skin_lesions.experiments import PAPER_ROWS, ROWS, ablation, read_results, show_table, table
    out, lines = finished
    assert {l['row'] for l in read_results(out)} == set(ROWS)
    for name, l in lines.items():
        assert 0 <= l['average_recall'] <= 1 and l['weights'] == 'random' and l['n_valid'] == 16 and l['leaked'] == 0, name
        assert l['config']['gamma'] == ROWS[name].gamma and l['config']['epochs'] == 1
    found = table(out, 'paper', 'tiny')
    assert list(found.index) == list(PAPER_ROWS) and (found.lesion_runs == 1).all() and found.image_runs.sum() == 2
    assert found.leak.notna().sum() == 2 and found.paper_accuracy.notna().sum() == 1
    assert (show_table(found)['by image: accuracy'] == '').sum() == 18
    changes = ablation(out, 'better', 'tiny')
    assert changes.difference.notna().all() and (changes.low <= changes.difference+1e-9).all() and (changes.difference <= changes.high+1e-9).all()


def test_a_line_can_be_made_again_from_the_predictions(finished):
    "The scores in the line, by hand from the table beside it"
    from skin_lesions.core import CODES
    from skin_lesions.experiments import run_folder
    out, lines = finished
    for name in ('restoration_patch16', 'better_distilled'):
        t = pd.read_csv(run_folder(out, lines[name])/'predictions.csv')
        said = np.array(CODES)[t[list(CODES)].to_numpy().argmax(1)]
        assert lines[name]['accuracy'] == pytest.approx((said == t.dx).mean())
        assert lines[name]['average_recall'] == pytest.approx(np.mean([(said[t.dx == c] == c).mean() for c in CODES]))


def command(sample, out, rows=ROWS):
    "In a process of its own"
    torch.set_num_threads(1)
    from skin_lesions.cli import main
    os._exit(main(['paper', '--recipe', *rows, '--split', 'lesion', '--scale', 'tiny', '--data', str(sample), '--out', str(out), '--workers', '0', '--device', 'cpu']))


def start(*args):
    child = multiprocessing.get_context('fork').Process(target=command, args=args)
    child.start()
    return child


def lines_of(out): return [json.loads(l) for l in (out/'results.jsonl').read_text().splitlines()]


def same_predictions(out, other, other_lines):
    for l in lines_of(out):
        a, b = (o/'runs'/r/'predictions.csv' for o, r in ((out, l['run']), (other, other_lines[l['row']]['run'])))
        pd.testing.assert_frame_equal(pd.read_csv(a), pd.read_csv(b), check_exact=True)


def test_killed_at_random_moments(drawn, finished, tmp_path):
    rng, killed = random.Random(3), 0
    for _ in range(KILLS):
        child = start(drawn, tmp_path)
        time.sleep(rng.uniform(.3, 2.5))
        if child.is_alive(): os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        assert child.exitcode in (0, -signal.SIGKILL)
        killed += child.exitcode != 0
    assert killed
    child = start(drawn, tmp_path)
    child.join(300)
    assert child.exitcode == 0
    assert sorted(l['row'] for l in lines_of(tmp_path)) == sorted(ROWS)
    same_predictions(tmp_path, *finished)
    assert not list(tmp_path.glob('runs/*/state')) and not list(tmp_path.glob('runs/*/.*-*'))


def test_two_processes_share_a_folder(drawn, finished, tmp_path):
    children = [start(drawn, tmp_path, r) for r in (ROWS[:3], ROWS[:3][::-1])]
    for c in children: c.join(300)
    assert [c.exitcode for c in children] == [0, 0]
    child = start(drawn, tmp_path, ROWS[:3]) # what each left to the other
    child.join(300)
    assert child.exitcode == 0
    assert sorted(l['row'] for l in lines_of(tmp_path)) == sorted(ROWS[:3])
    same_predictions(tmp_path, *finished)


def test_many_writers_of_one_file(tmp_path):
    "Lines of several processes at once: none is lost, none torn, none double"
    from skin_lesions.experiments import append_result, read_results
    def write(k):
        for i in range(20): append_result(tmp_path, dict(row='x', split='lesion', fold=0, folds=5, seed=i, scale='tiny', digest='d', by=k, filler='y'*2000))
    children = [multiprocessing.get_context('fork').Process(target=write, args=(k,)) for k in range(4)]
    for c in children: c.start()
    for c in children: c.join(120)
    assert [c.exitcode for c in children] == [0]*4
    assert sorted(l['seed'] for l in read_results(tmp_path)) == list(range(20))
