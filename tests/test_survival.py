"Processes are killed, disks are full, folders vanish: what was there before is still there and whole, and the error says what to do."
import multiprocessing, os, random, shutil, signal, subprocess, sys, time

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from warm import ended
from skin_lesions.cli import main
from skin_lesions.classes import HAM10000
from skin_lesions.data import ham10000_dataloaders
from skin_lesions.readers import read_metadata
from skin_lesions.report import html_report
from skin_lesions.learner import lesion_learner
from skin_lesions.predict import load_predictor
from skin_lesions.bundle import save_bundle
from skin_lesions.predictions import get_predictions, read_predictions, save_predictions
from skin_lesions.resume import ResumeCallback, read_state, write_state

KILLS = int(os.environ.get('SURVIVAL_KILLS', 6)) # 20 take half a minute


@pytest.fixture(scope='module')
def meta(sample):
    meta = read_metadata(sample)
    return meta.assign(is_valid=meta.groupby('dx').cumcount() % 5 == 0)


@pytest.fixture(scope='module')
def two(meta):
    "Two networks that differ in every weight"
    learners = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        dls = ham10000_dataloaders(meta.iloc[:40], 32, bs=8, arch='test_efficientnet', num_workers=0, device='cpu')
        learners.append(lesion_learner(dls, 'test_efficientnet', pretrained=False, alpha=None))
        with torch.no_grad():
            for p in learners[-1].model.parameters(): p.add_(seed+1)
    return learners


def a_table(i): return pd.DataFrame(np.roll(np.eye(7), i, 1).repeat(40, 0), columns=list(HAM10000)).assign(image_id=[f'{i}_{k}' for k in range(280)])


# ---- killed while writing

def write_over_and_over(two, folder):
    "In a process of its own: bundles, zipped bundles and tables of two kinds, one over the other"
    torch.set_num_threads(1)
    for i in range(10**6):
        save_bundle(two[i % 2], folder/'bundle', overwrite=True, scores=dict(network=i % 2))
        save_bundle(two[i % 2], folder/'bundle.zip', overwrite=True, scores=dict(network=i % 2))
        save_predictions(a_table(i % 2), folder/'predictions.csv')


def test_killed_while_writing(two, tmp_path):
    "SIGKILL at random moments: a bundle and a table are the old or the new one, never a mixture and never broken"
    rng, bias = random.Random(5), [next(l.model.parameters()).flatten()[0].item() for l in two]
    assert bias[0] != bias[1]
    seen, asides = set(), 0
    save_bundle(two[0], tmp_path/'bundle', scores=dict(network=0)); save_bundle(two[0], tmp_path/'bundle.zip', scores=dict(network=0)); save_predictions(a_table(0), tmp_path/'predictions.csv')
    for _ in range(KILLS):
        child = multiprocessing.get_context('fork').Process(target=write_over_and_over, args=(two, tmp_path))
        child.start()
        time.sleep(rng.uniform(.05, .8))
        assert child.is_alive()
        os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        for name in ('bundle', 'bundle.zip'):
            predictor = load_predictor(tmp_path/name, device='cpu')
            which = predictor.record['scores']['network']
            assert next(predictor.model.parameters()).flatten()[0].item() == bias[which], name
            seen.add(which)
        table = read_predictions(tmp_path/'predictions.csv')
        assert len(table) == 280 and table.image_id.str[0].nunique() == 1 and (table[list(HAM10000)].to_numpy() == a_table(int(table.image_id[0][0]))[list(HAM10000)].to_numpy()).all()
        asides += len(list((tmp_path/'bundle').glob('model-*')))
    assert seen == {0, 1}
    save_bundle(two[0], tmp_path/'bundle', overwrite=True)
    assert sorted(p.name for p in (tmp_path/'bundle').iterdir() if not p.name.startswith('.')) == ['bundle.json', 'model.safetensors']
    for p in (tmp_path/'bundle').iterdir():
        if p.name.startswith('.'): os.utime(p, (0, 0)) # an hour later, the halves that were never finished go too
    save_bundle(two[0], tmp_path/'bundle', overwrite=True)
    assert sorted(p.name for p in (tmp_path/'bundle').iterdir()) == ['bundle.json', 'model.safetensors']


# ---- disks

@pytest.fixture
def disk(tmp_path):
    "A function that mounts a small disk of its own"
    mounted = []
    def mount(size):
        place = tmp_path/f'disk{len(mounted)}'
        place.mkdir()
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(place)], capture_output=True, text=True) if shutil.which('mount') else None
        if done is None or done.returncode: pytest.skip(f"a small disk cannot be mounted here, that needs root: {done.stderr.strip() if done else 'no mount'}")
        mounted.append(place)
        return place
    yield mount
    for place in mounted: subprocess.run(['umount', '-l', str(place)], check=True)


def fill(disk):
    "Leave no byte free"
    with open(disk/'filler', 'wb', buffering=0) as f:
        try:
            while True: f.write(bytes(2**16))
        except OSError: pass
        try:
            while True: f.write(bytes(1))
        except OSError: pass


def read_only(disk, yes=True): subprocess.run(['mount', '-o', f"remount,{'ro' if yes else 'rw'}", str(disk)], check=True)


def everything(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.name != 'filler'}


@pytest.mark.parametrize('trouble', ['full', 'read-only'])
def test_writers_on_a_bad_disk(trouble, two, disk, no_figures):
    "State, bundle, zip, table and report: an error that says what and where, and what was there before is there to the byte"
    place = disk('24m')
    table = get_predictions(two[0])
    def report(i):
        with no_figures(): html_report(table, place/'report.html', title=f'number {i}')
    def write(i):
        yield 'state', lambda: write_state(place/'state', dict(epoch=i), dict(a=torch.full((99_999,), float(i))))
        yield 'bundle', lambda: save_bundle(two[i], place/'bundle', overwrite=True)
        yield 'bundle.zip', lambda: save_bundle(two[i], place/'bundle.zip', overwrite=True)
        yield 'predictions.csv', lambda: save_predictions(a_table(i), place/'predictions.csv')
        yield 'report.html', lambda: report(i)
    for _, f in write(0): f()
    before = everything(place)
    if trouble == 'full': fill(place)
    else: read_only(place)
    for name, f in write(1):
        with pytest.raises(OSError) as e: f()
        assert ('No space left' if trouble == 'full' else 'Read-only file system') in str(e.value), str(e.value)
        if name == 'state': assert 'state before it is intact' in str(e.value) and str(place/'state') in str(e.value)
    assert everything(place) == before
    assert read_state(place/'state')[0]['epoch'] == 0 and load_predictor(place/'bundle', device='cpu') and load_predictor(place/'bundle.zip', device='cpu')
    if trouble == 'full': (place/'filler').unlink()
    else: read_only(place, False)
    for _, f in write(1): f()
    assert read_state(place/'state')[0]['epoch'] == 1 and read_predictions(place/'predictions.csv').image_id[0] == '1_0'


def small_training(folder, *cbs):
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.torch_core import set_seed
    set_seed(3)
    x = torch.randn(64, 30); y = (x[:, 0] > 0).long()
    dls = DataLoaders.from_dsets(list(zip(x[:48], y[:48])), list(zip(x[48:], y[48:])), bs=8, num_workers=0, device='cpu')
    learn = Learner(dls, torch.nn.Sequential(torch.nn.Linear(30, 900), torch.nn.Dropout(.2), torch.nn.Linear(900, 2)), loss_func=torch.nn.CrossEntropyLoss())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, .01, cbs=[ResumeCallback(folder), *cbs])
    return learn


@pytest.mark.parametrize('trouble', ['full', 'read-only'])
def test_a_training_on_a_bad_disk(trouble, disk, tmp_path):
    "It stops, says where the last good state is, and goes on to the same end once there is room"
    from fastai.callback.core import Callback
    place = disk('4m')
    class Trouble(Callback):
        order = 50
        def before_train(self):
            if self.epoch == 2: fill(place) if trouble == 'full' else read_only(place)
    whole = small_training(tmp_path/'whole')
    with pytest.raises(OSError, match='cannot be written to .*; the state before it is intact. Free some space'): small_training(place/'state', Trouble())
    assert read_state(place/'state')[0]['epoch'] == 2
    if trouble == 'full': (place/'filler').unlink()
    else: read_only(place, False)
    again = small_training(place/'state')
    for a, b in zip(whole.model.parameters(), again.model.parameters()): assert torch.equal(a, b)
    assert whole.recorder.values == again.recorder.values


def test_command_line_on_a_read_only_disk(disk, sample, small, capsys):
    place = disk('1m')
    read_only(place)
    assert main(['train', '--data', str(sample), '--out', str(place/'run'), *small, '--set', 'epochs=1']) == 2
    said = capsys.readouterr().err
    assert 'Read-only file system' in said and str(place/'run') in said


# ---- the data goes away

def command_line(args, errors):
    "In a process of its own, which shares the imports of this one"
    os.setpgrp() # for `ended`
    torch.set_num_threads(1)
    with open(errors, 'w') as sys.stderr: status = main(args)
    os._exit(status)


def test_a_disk_that_is_full_after_the_last_epoch(tmp_path, sample, small, capsys, monkeypatch, no_figures):
    "The training is not lost: --resume makes the rest of the run folder, with the same weights"
    from skin_lesions import train
    args = ['train', '--data', str(sample), '--out', str(tmp_path/'run'), '--no-check', *small, '--set', 'epochs=1']
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(train, 'save_predictions', full)
        assert main(args) == 2
    said, weights = capsys.readouterr().err, load_file(tmp_path/'run'/'model.safetensors')
    assert 'No space left on device' in said and f"The training is complete, its state is in {tmp_path/'run'/'state'}" in said and '--resume' in said
    with no_figures(): assert main([*args, '--resume']) == 0
    again = load_file(tmp_path/'run'/'model.safetensors') # with what was fitted after the failure
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert (tmp_path/'run'/'report.html').is_file() and not (tmp_path/'run'/'state').exists()


def test_the_data_folder_vanishes_in_mid_epoch(tmp_path, sample, small, capsys, no_figures):
    "The error names a file and the folder of the state; with the data back, --resume ends as if nothing had happened"
    data = shutil.copytree(sample, tmp_path/'data')
    args = ['train', '--data', str(data), '--out', str(tmp_path/'run'), '--no-check', *small, '--set', 'epochs=6', '--workers', '2'] # two processes read the images
    child = multiprocessing.get_context('fork').Process(target=command_line, args=(args, tmp_path/'errors.txt'))
    child.start()
    state = tmp_path/'run'/'state'/'step0'/'state.safetensors'
    for _ in range(6000):
        if state.is_file() or not child.is_alive(): break
        time.sleep(.02)
    data.rename(tmp_path/'elsewhere')
    ended(child)
    complained = (tmp_path/'errors.txt').read_text()
    assert child.exitcode == 2 and '.jpg' in complained and f"state is in {state.parent}" in complained and '--resume' in complained and 'Traceback' not in complained, complained
    assert 1 <= read_state(state.parent)[0]['epoch'] < 6
    capsys.readouterr()
    assert main([*args, '--resume']) == 2
    assert 'no such file or folder' in capsys.readouterr().err and state.is_file()
    (tmp_path/'elsewhere').rename(data)
    with no_figures(): assert main([*args, '--resume']) == 0
    history = pd.read_csv(tmp_path/'run'/'history.csv')
    assert list(history.epoch) == list(range(6)) and history.train_loss.notna().all()
    assert (tmp_path/'run'/'report.html').is_file() and not state.parent.exists()
