"Real processes are killed at random moments; the training that goes on afterwards ends as one that was never interrupted."
import json, multiprocessing, os, random, signal, time
from functools import partial
from pathlib import Path

import pytest
import torch

from warm import ended

KILLS = int(os.environ.get('RESUME_KILLS', 3)) # 20 take a minute


def train(sample, folder, minutes, workers=0):
    "In a process of its own: the real pipeline in small, its weights and history at the end"
    os.setpgrp() # for `ended`
    torch.set_num_threads(1)
    from fastai.torch_core import set_seed
    from safetensors.torch import save_file
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import two_stage_learner
    from skin_lesions.resume import ResumeCallback
    set_seed(3, reproducible=True)
    dls = ham10000_dataloaders(sample, 32, bs=16, arch='test_efficientnet', num_workers=workers, device='cpu')
    learn = two_stage_learner(dls, 'test_efficientnet', pretrained=False)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, cbs=ResumeCallback(folder/'state', minutes=minutes))
    save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in learn.model.state_dict().items()}, folder/'end.safetensors')
    (folder/'history.json').write_text(json.dumps([[str(float(x)) for x in row] for row in learn.recorder.values]))


def start(*args):
    "A child that shares the imports of this process"
    child = multiprocessing.get_context('fork').Process(target=train, args=args)
    child.start()
    return child


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The training in one go"
    from skin_lesions.data import ham10000_dataloaders # imported before the fork
    from skin_lesions.learner import two_stage_learner
    from skin_lesions.resume import ResumeCallback
    from skin_lesions.synthetic import synthetic_ham10000
    sample = synthetic_ham10000(tmp_path_factory.mktemp('resume')/'sample', 70, size=(96, 72), show=False)
    folder = tmp_path_factory.mktemp('whole')
    began = time.monotonic()
    child = start(sample, folder, None)
    assert ended(child) == 0
    return sample, folder, time.monotonic()-began


@pytest.fixture(scope='module')
def whole_with_workers(whole, tmp_path_factory):
    "The same with two processes that read and augment the images, each with random states of its own"
    sample, folder = whole[0], tmp_path_factory.mktemp('workers')
    began = time.monotonic()
    child = start(sample, folder, None, 2)
    assert ended(child) == 0
    return sample, folder, time.monotonic()-began


@pytest.mark.parametrize('minutes,workers', [(None, 0), (0, 0), (None, 2), (0, 2)])
def test_killed_and_resumed(whole, whole_with_workers, tmp_path, minutes, workers):
    "Weights and history are those of the training in one go, to the bit, killed between epochs or within one"
    sample, folder, seconds = whole_with_workers if workers else whole
    rng, killed = random.Random(7), 0
    for _ in range(KILLS if not workers or 'RESUME_KILLS' in os.environ else 2):
        child = start(sample, tmp_path, minutes, workers)
        time.sleep(rng.uniform(.1, .6)*seconds)
        if child.is_alive(): os.kill(child.pid, signal.SIGKILL)
        assert ended(child) in (0, -signal.SIGKILL)
        killed += child.exitcode != 0
    assert killed
    child = start(sample, tmp_path, minutes, workers)
    assert ended(child) == 0
    for name in ('end.safetensors', 'history.json'): assert (tmp_path/name).read_bytes() == (folder/name).read_bytes(), name
    assert sorted(p.name for p in (tmp_path/'state').iterdir()) == ['previous.safetensors', 'state.safetensors']


def test_command_line_resumes(tmp_path, sample, small, processes):
    "Killed while it trains, then --resume; another setting is refused by name"
    command = ['-m', 'skin_lesions.cli', 'train', '--data', sample, '--out', 'run', *small, '--set', 'epochs=3']
    with open(tmp_path/'log', 'w') as log: child = processes.start(*command, cwd=tmp_path, out=log, err=log)
    state = tmp_path/'run'/'state'
    for _ in range(4000): # a busy machine imports for minutes
        if any(state.rglob('state.safetensors')) or child.poll() is not None: break
        time.sleep(.1)
    child.kill()
    child.wait()
    assert any(state.rglob('state.safetensors')) and not (tmp_path/'run'/'report.html').exists()
    other = processes.run(*command, '--set', 'lr=.1', '--resume', cwd=tmp_path)
    assert other.returncode == 2 and 'lr was 0.001 and is 0.1' in other.stderr, other.stderr
    done = processes.run(*command, '--resume', cwd=tmp_path)
    assert done.returncode == 0, done.stdout+done.stderr
    assert (tmp_path/'run'/'report.html').is_file() and not state.exists()
    history = (tmp_path/'run'/'history.csv').read_text().strip().splitlines()
    assert [row.split(',')[0] for row in history] == ['epoch', '0', '1', '2']


def test_a_disk_that_cannot_be_written(whole, tmp_path, monkeypatch):
    "The error names the folder, and the state before it stays"
    from skin_lesions import resume
    resume.write_state(tmp_path, dict(epoch=1), dict(a=torch.ones(3)))
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(resume, 'save', full)
    with pytest.raises(OSError, match='No space left on device.*state before it is intact'): resume.write_state(tmp_path, dict(epoch=2), dict(a=torch.zeros(3)))
    plain, tensors = resume.read_state(tmp_path)
    assert plain['epoch'] == 1 and torch.equal(tensors['a'], torch.ones(3)) and [p.name for p in tmp_path.iterdir()] == ['state.safetensors']


# ---- in this process

def small_training(folder, opt_func=None, cbs=()):
    "A network with noise in its images and dropout"
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.optimizer import Adam
    from fastai.torch_core import set_seed
    set_seed(3)
    data = [(torch.randn(6), torch.tensor(i % 3)) for i in range(40)]
    noisy = lambda batch: (batch[0]+.1*torch.randn_like(batch[0]), batch[1])
    dls = DataLoaders(*[DataLoader(d, bs=8, shuffle=shuffle, num_workers=0, after_batch=noisy) for d, shuffle in ((data[:24], True), (data[24:], False))], device='cpu')
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(.3), torch.nn.Linear(8, 3))
    return Learner(dls, net, loss_func=torch.nn.CrossEntropyLoss(), opt_func=opt_func or Adam, metrics=accuracy, path=folder, cbs=cbs)


def stop_at(epoch, batch):
    "What a killed process looks like from inside"
    from fastai.callback.core import Callback
    class Stop(Callback):
        order = 100
        def after_batch(self):
            if self.training and (self.epoch, self.iter) == (epoch, batch): raise KeyboardInterrupt()
    return Stop()


def small_fit(folder, *cbs, opt_func=None, minutes=None, n_epoch=4):
    from skin_lesions.resume import ResumeCallback
    learn = small_training(folder, opt_func)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n_epoch, 1e-2, cbs=[ResumeCallback(folder/'state', minutes=minutes), *cbs])
    return learn


def end_of(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}, [[float(x) for x in row] for row in learn.recorder.values]


def assert_same_end(a, b):
    (weights, history), (expected, expected_history) = end_of(a), end_of(b)
    for k, v in expected.items(): assert torch.equal(weights[k], v), k
    assert history == expected_history


@pytest.mark.parametrize('name,kw', [('AdamW', dict(weight_decay=.1)), ('AdamW', dict(amsgrad=True)), ('SGD', dict(momentum=.9, nesterov=True)), ('RMSprop', dict(momentum=.5))])
@pytest.mark.parametrize('minutes', [None, 0])
def test_optimisers_of_pytorch_go_on(name, kw, minutes, tmp_path):
    "A training in one go and one that was stopped twice end alike, to the bit"
    from fastai.optimizer import OptimWrapper
    opt_func = partial(OptimWrapper, opt=getattr(torch.optim, name), **kw)
    whole = small_fit(tmp_path/'whole', opt_func=opt_func)
    for epoch, batch in ((1, 1), (3, 0)):
        with pytest.raises(KeyboardInterrupt): small_fit(tmp_path/'stopped', stop_at(epoch, batch), opt_func=opt_func, minutes=minutes)
    went_on = small_fit(tmp_path/'stopped', opt_func=opt_func, minutes=minutes)
    assert_same_end(went_on, whole)
    state, expected = (learn.opt.opt.state_dict() for learn in (went_on, whole))
    assert state['param_groups'] == expected['param_groups'] and list(state['state']) == list(expected['state'])
    for i, values in expected['state'].items():
        for k, v in values.items(): assert torch.equal(torch.as_tensor(state['state'][i][k]), torch.as_tensor(v)), (i, k)


def test_files_of_every_epoch_are_those_of_a_training_in_one_go(tmp_path):
    from fastai.callback.tracker import SaveModelCallback
    saving = lambda: SaveModelCallback(every_epoch=True, fname='epoch')
    small_fit(tmp_path/'whole', saving())
    files = {p.name: torch.load(p, weights_only=True) for p in (tmp_path/'whole'/'models').iterdir()}
    assert sorted(files) == [f'epoch_{i}.pth' for i in range(4)]
    with pytest.raises(KeyboardInterrupt): small_fit(tmp_path/'stopped', saving(), stop_at(2, 1))
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path/'stopped'/'models').iterdir()}
    assert sorted(before) == ['epoch_0.pth', 'epoch_1.pth']
    small_fit(tmp_path/'stopped', saving())
    small_fit(tmp_path/'stopped', saving()) # nothing is left to do
    for name, was in before.items(): assert ((tmp_path/'stopped'/'models'/name).stat().st_mtime_ns, (tmp_path/'stopped'/'models'/name).read_bytes()) == was
    for name, weights in files.items():
        there = torch.load(tmp_path/'stopped'/'models'/name, weights_only=True)
        for k, v in weights.items(): assert torch.equal(there[k], v), (name, k)


def test_as_a_learner_s_own_callback_it_leaves_everything_else_alone(sample, tmp_path):
    "What fastai does between trainings works, writes no state, and the next training begins or goes on"
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner
    from skin_lesions.resume import STATE, ResumeCallback
    dls = ham10000_dataloaders(sample, 32, bs=32, arch='test_efficientnet', num_workers=0, device='cpu')
    learn = lesion_learner(dls, 'test_efficientnet', pretrained=False, path=tmp_path, cbs=ResumeCallback(tmp_path/'state'))
    path = dls.valid_ds.items.path.iloc[0]

    def everything():
        with learn.no_bar(), learn.no_logging():
            assert len(learn.validate()) == 3 and learn.tta(n=1)[0].shape == learn.get_preds()[0].shape
            assert learn.summary().startswith('LesionNet') and learn.predict(path)[0] in dls.vocab
            learn.lr_find(num_it=12, show_plot=False)
    everything()
    assert not (tmp_path/'state'/STATE).exists()
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    written = (tmp_path/'state'/STATE).read_bytes()
    everything()
    assert (tmp_path/'state'/STATE).read_bytes() == written
    weights = end_of(learn)[0]
    with learn.no_bar(), learn.no_logging(): learn.fit(2) # two epochs are done
    assert all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())
    learn.export(tmp_path/'learner.pkl')
    assert (tmp_path/'learner.pkl').is_file()


@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='only Linux says which files are mapped')
def test_no_state_stays_mapped(tmp_path):
    "Windows replaces no file of which a part is mapped into the memory of a process"
    with pytest.raises(KeyboardInterrupt): small_fit(tmp_path, stop_at(2, 1))
    mapped = []
    from fastai.callback.core import Callback
    class Look(Callback):
        def after_step(self): mapped.append('state.safetensors' in Path('/proc/self/maps').read_text())
    small_fit(tmp_path, Look())
    assert mapped and not any(mapped)


@pytest.mark.parametrize('system', ['has no links', 'refuses links'])
def test_a_state_is_kept_without_links(system, tmp_path, monkeypatch):
    from skin_lesions.resume import PREVIOUS, read_state, write_state
    if system == 'has no links': monkeypatch.delattr(os, 'link')
    else:
        def refuse(*args): raise OSError(1, 'Operation not permitted')
        monkeypatch.setattr(os, 'link', refuse)
    for i in range(3): write_state(tmp_path, dict(epoch=i), dict(a=torch.full((2,), float(i))))
    (tmp_path/'state.safetensors').write_bytes(b'torn')
    with pytest.warns(UserWarning, match='state before it'): plain, tensors = read_state(tmp_path)
    assert plain['epoch'] == 1 and tensors['a'].tolist() == [1, 1] and (tmp_path/PREVIOUS).is_file()


def test_random_numbers_of_apple_s_gpus_go_on_too(tmp_path, monkeypatch):
    "An imitated device whose generator is a number"
    generator = dict(state=torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch.mps, 'get_rng_state', lambda: generator['state'])
    monkeypatch.setattr(torch.mps, 'set_rng_state', lambda state: generator.update(state=state))
    with pytest.raises(KeyboardInterrupt): small_fit(tmp_path, stop_at(1, 1))
    generator['state'] = torch.tensor([99], dtype=torch.uint8)
    small_fit(tmp_path)
    assert generator['state'].tolist() == [7]
