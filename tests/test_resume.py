"Real processes are killed at random moments; the training that goes on afterwards ends as one that was never interrupted."
import json, multiprocessing, os, random, signal, subprocess, sys, time

import pytest
import torch

KILLS = int(os.environ.get('RESUME_KILLS', 4)) # 20 take a minute


def train(sample, folder, minutes, workers=0):
    "In a process of its own: the real pipeline in small, its weights and history at the end"
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
    child.join(300)
    assert child.exitcode == 0
    return sample, folder, time.monotonic()-began


@pytest.fixture(scope='module')
def whole_with_workers(whole, tmp_path_factory):
    "The same with two processes that read and augment the images, each with random states of its own"
    sample, folder = whole[0], tmp_path_factory.mktemp('workers')
    began = time.monotonic()
    child = start(sample, folder, None, 2)
    child.join(300)
    assert child.exitcode == 0
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
        child.join(60)
        assert child.exitcode in (0, -signal.SIGKILL)
        killed += child.exitcode != 0
    assert killed
    child = start(sample, tmp_path, minutes, workers)
    child.join(300)
    assert child.exitcode == 0
    for name in ('end.safetensors', 'history.json'): assert (tmp_path/name).read_bytes() == (folder/name).read_bytes(), name
    assert sorted(p.name for p in (tmp_path/'state').iterdir()) == ['previous.safetensors', 'state.safetensors']


def test_command_line_resumes(tmp_path, sample, small):
    "Killed while it trains, then --resume; another setting is refused by name"
    command = [sys.executable, '-W', 'ignore', '-m', 'skin_lesions.cli', 'train', '--data', str(sample), '--out', 'run', *small, '--set', 'epochs=3']
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    state = tmp_path/'run'/'state'
    for _ in range(4000): # a busy machine imports for minutes
        if any(state.rglob('state.safetensors')) or child.poll() is not None: break
        time.sleep(.1)
    child.kill()
    child.wait()
    assert any(state.rglob('state.safetensors')) and not (tmp_path/'run'/'report.html').exists()
    other = subprocess.run([*command, '--set', 'lr=.1', '--resume'], cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode == 2 and 'lr was 0.001 and is 0.1' in other.stderr, other.stderr
    done = subprocess.run([*command, '--resume'], cwd=tmp_path, capture_output=True, text=True)
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
