"Two real processes train together over gloo: the same images, metrics, gradients and files as one, and no one waits for another that has failed."
import csv, json, multiprocessing, os, pickle, shutil, socket, sys, time, warnings

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip('accelerate')
TINY = 'test_efficientnet'


def run_ranks(func, *args, n=2, timeout=240):
    "Call `func` in `n` connected forks of this process; what each returned, or its error as text"
    from skin_lesions.distributed import ranks
    ctx = multiprocessing.get_context('fork')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]

    def work(rank, queue):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        torch.set_num_threads(1)
        try:
            with ranks(): result = func(*args)
        except Exception as e: result = e
        queue.put((rank, pickle.dumps(f'{type(result).__name__}: {result}' if isinstance(result, Exception) else result)))

    queue = ctx.Queue()
    children = [ctx.Process(target=work, args=(i, queue)) for i in range(n)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # Python warns of forks in a process with threads
        for c in children: c.start()
    out = {}
    try:
        for _ in children:
            rank, result = queue.get(timeout=timeout)
            out[rank] = pickle.loads(result)
        for c in children: c.join(60)
    finally:
        for c in children: c.kill()
    assert all(c.exitcode == 0 for c in children)
    for result in out.values(): assert not isinstance(result, str), result
    return [out[i] for i in range(n)]


@pytest.fixture(scope='module')
def lesions(tmp_path_factory):
    import accelerate, fastai.callback.schedule, torch._dynamo # before the forks, each of which would import them
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    from skin_lesions.synthetic import synthetic_ham10000
    root = synthetic_ham10000(tmp_path_factory.mktemp('distributed')/'sample', 75, size=(96, 72), show=False)
    return root, split_by_lesion(read_metadata(root))


def learner(meta, bs, plain, seed=3, **kwargs):
    "Two stages with focal loss and class weights; `plain` has nothing that differs between one process and two"
    from fastai.optimizer import SGD
    from fastai.torch_core import set_seed
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import two_stage_learner
    set_seed(seed)
    warnings.simplefilter('ignore') # rare classes are missing in so few images
    kwargs = dict(sampling=None) | kwargs
    dls = ham10000_dataloaders(meta, 32, 'resize' if plain else 'random', bs=bs, arch=TINY, augment=not plain, num_workers=0,
                               device='cpu', **kwargs)
    settings = dict(ps=0., opt_func=SGD) if plain else dict(mixup=.7)
    return two_stage_learner(dls, TINY, pretrained=False, alpha='sqrt', gamma=2., **settings)


def watcher(frozen):
    from fastai.callback.core import Callback
    class Watch(Callback):
        "Keep the first gradients, the names of the images of each epoch, and BatchNorm's statistics if they are frozen"
        def __init__(self): self.grads, self.images = None, []
        def before_train(self): self.images.append([])
        def before_batch(self):
            if frozen:
                for m in self.learn.model.modules():
                    if isinstance(m, torch.nn.modules.batchnorm._BatchNorm): m.eval()
            if not self.training: return
            dl = self.learn.dls.train
            self.images[-1].append(dl.dataset.items.image_id.iloc[dl._DataLoader__idxs[self.iter*dl.bs:(self.iter+1)*dl.bs]].tolist())
        def before_step(self):
            if self.grads is None: self.grads = [p.grad.clone() for p in self.learn.model.parameters()]
    return Watch()


def weights(learn): return {k: v.detach().clone() for k, v in learn.model.state_dict().items()}
def history(learn): return np.array([[float(v) for v in row] for row in learn.recorder.values])


def fitted(learn, epochs=2, lr=.02, cbs=None):
    from skin_lesions.distributed import distributed
    from skin_lesions.predictions import get_predictions
    with distributed(learn), learn.no_bar(), learn.no_logging():
        learn.fit(epochs, lr, cbs=cbs)
        record, table = history(learn), get_predictions(learn)
    assert type(learn.model).__name__ != 'DistributedDataParallel' and 'rank_of' not in vars(learn.dls.train)
    return weights(learn), record, table


def same(a, b, **kw):
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(b[k], a[k], msg=lambda m: f'{k}: {m}', **kw)


def plain_training(meta, bs, sampling, frozen=True):
    watch = watcher(frozen)
    return *fitted(learner(meta, bs, True, sampling=sampling), cbs=watch), watch.grads, watch.images


def test_as_one_process_with_the_joined_batch(lesions):
    "Images, gradients, weights, losses and metrics; once in order of shuffling, once drawn by class weight"
    meta = lesions[1]
    def both(): return [plain_training(meta, 8, s) for s in (None, 'inverse')]
    first, second = run_ranks(both)
    n = int((~meta.is_valid).sum())
    assert meta.is_valid.sum()%2 == 1 # does not divide evenly
    for sampling, a, b in zip((None, 'inverse'), first, second):
        one = plain_training(meta, 16, sampling)
        for mine in (a, b):
            same(one[0], mine[0], rtol=1e-3, atol=5e-4) # rounding may put a unit on the other side of a ReLU; the first gradients are compared more strictly
            np.testing.assert_allclose(mine[1], one[1], rtol=1e-4)
            pd.testing.assert_frame_equal(mine[2], one[2], rtol=1e-3)
            for g, h in zip(one[3], mine[3]): torch.testing.assert_close(h, g, rtol=1e-4, atol=1e-6)
        for joined, x, y in zip(one[4], a[4], b[4]):
            assert [p+q for p, q in zip(x, y)] == joined and len(x) == len(y) == n//16
            if sampling is None: assert len(set(sum(joined, []))) == n//16*16
        assert a[4][0] != a[4][1]


def test_metrics_are_of_all_images(lesions):
    "The last row of the history against the scores of the table of all predictions"
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    from skin_lesions.classes import HAM10000
    meta, CODES = lesions[1], HAM10000.codes
    def train(): return fitted(learner(meta, 8, False))
    first, second = run_ranks(train)
    same(first[0], second[0], rtol=0, atol=0) # BatchNorm's statistics too
    np.testing.assert_array_equal(first[1], second[1])
    table = first[2]
    assert table.image_id.tolist() == meta.image_id[meta.is_valid].tolist()
    true, p = table.dx, table[list(CODES)].to_numpy()
    called = np.array(CODES)[p.argmax(1)]
    loss, accuracy, recall, auc, six = first[1][-1][1:]
    others = true != 'nv'
    called6 = np.array([c for c in CODES if c != 'nv'])[np.delete(p, CODES.index('nv'), 1).argmax(1)]
    expected = (true == called).mean(), balanced_accuracy_score(true, called), roc_auc_score(~others, p[:, CODES.index('nv')]), balanced_accuracy_score(true[others], called6[others])
    np.testing.assert_allclose([accuracy, recall, auc, six], expected, rtol=1e-5)


def test_mixup_focal_and_random_numbers(lesions, tmp_path, monkeypatch):
    "Repeatable, different on each rank, and the same after an interruption between epochs"
    from fastai.callback.core import Callback
    from fastai.callback.progress import CSVLogger
    from skin_lesions.distributed import gather, this_rank
    from skin_lesions import resume
    from skin_lesions.resume import ResumeCallback
    meta = lesions[1]

    class Interrupt(Callback):
        order = 100
        def after_epoch(self):
            if self.epoch == 0: raise InterruptedError('stopped')

    class Drawn(Callback):
        def __init__(self): self.numbers = []
        def before_batch(self): self.numbers.append((np.random.get_state()[1][:3].tolist(), torch.get_rng_state().sum().item()))

    def train():
        if not this_rank(): # slow to write: the other rank waits with its next fit
            write = resume._second_name
            monkeypatch.setattr(resume, '_second_name', lambda *files: time.sleep(.5) or write(*files))
            save = resume.save
            monkeypatch.setattr(resume, 'save', lambda *args, **kwargs: time.sleep(.5) or save(*args, **kwargs))
        drawn = Drawn()
        learn = learner(meta, 8, False)
        learn.path = tmp_path
        one = fitted(learn, cbs=[drawn, CSVLogger()])
        two = fitted(learner(meta, 8, False), cbs=ResumeCallback(tmp_path/'whole'))
        learn = learner(meta, 8, False)
        try: fitted(learn, cbs=[ResumeCallback(tmp_path/'cut'), Interrupt()])
        except InterruptedError: pass
        assert type(learn.model).__name__ == 'TwoStageNet'
        gone_on = fitted(learner(meta, 8, False, seed=99), cbs=ResumeCallback(tmp_path/'cut'))
        try: fitted(learner(meta, 8, False), cbs=ResumeCallback(tmp_path/'cut' if this_rank() else tmp_path/'elsewhere'))
        except ValueError as e: assert 'folder that all of them see' in str(e), e
        else: raise AssertionError('different states')
        return one, two, gone_on, gather(drawn.numbers)

    for one, two, gone_on, numbers in run_ranks(train):
        same(one[0], two[0], rtol=0, atol=0)
        same(one[0], gone_on[0], rtol=0, atol=0)
        np.testing.assert_array_equal(one[1], gone_on[1])
        assert all(a != b for a, b in zip(*numbers))
    assert sorted(p.name for p in (tmp_path/'cut').iterdir()) == ['previous.safetensors', 'state.safetensors']
    rows = list(csv.reader((tmp_path/'history.csv').open()))
    assert [r[0] for r in rows] == ['epoch', '0', '1'] # written once


def test_pretexts(lesions, tmp_path):
    "Alone and joint, from a frame and streamed; every streamed image once an epoch, on one rank"
    from skin_lesions import stream
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.distributed import distributed
    from skin_lesions.masking import masked_learner
    from skin_lesions.pretext import joint_restoration_learner, joint_rotation_learner, pretext_dataloaders, restoration_learner, rotation_learner
    meta = lesions[1]
    stream.write_list(meta.path, tmp_path/'list.txt')

    def train():
        warnings.simplefilter('ignore')
        kw, seen, was = dict(num_workers=0, device='cpu'), [], stream.open_image
        labelled = ham10000_dataloaders(meta, 32, bs=8, arch=TINY, augment=False, **kw)
        streamed = stream.stream_dataloaders(tmp_path/'list.txt', 32, bs=8, arch=TINY, block=7, valid_pct=.1, drop_last=False, **kw)
        framed = pretext_dataloaders(meta, 32, bs=8, arch=TINY, **kw)
        learners = [rotation_learner(streamed, TINY), masked_learner(framed, TINY), restoration_learner(framed, TINY),
                    joint_rotation_learner(labelled, TINY, pretrained=False), joint_restoration_learner(labelled, TINY, TINY, pretrained=False)]
        stream.open_image = lambda item: seen.append(item) or was(item)
        out = []
        for learn in learners:
            with distributed(learn), learn.no_bar(), learn.no_logging(): learn.fit(1)
            out.append((weights(learn), history(learn)))
        return out, seen, streamed.train.n, streamed.valid.n

    (a, seen, n_train, n_valid), (b, seen2, *_) = run_ranks(train)
    for (w, h), (w2, h2) in zip(a, b):
        same(w, w2, rtol=0, atol=0)
        np.testing.assert_array_equal(h, h2)
        assert np.isfinite(h).all()
    both = seen+seen2
    assert len(both) == len(set(both)) and n_train+n_valid == len(meta) and len(meta)-len(both) <= 1


def test_a_rank_that_fails(lesions):
    "The others do not wait: on rank 0's work all get its error, in training the others lose the connection and say so"
    from fastai.callback.core import Callback
    from skin_lesions.distributed import distributed, on_rank0, over_ranks, this_rank
    meta = lesions[1]

    class Fail(Callback):
        def before_batch(self):
            if this_rank() == 1 and self.iter == 1: os._exit(7)

    def fail(queue_of_said):
        said = []
        for call in (lambda: on_rank0(lambda: 1/0), lambda: over_ranks(lambda part: part.no_such_column, meta.head(1))):
            try: call()
            except (ZeroDivisionError, AttributeError) as e: said.append((type(e).__name__, e.said_by))
        learn = learner(meta, 8, True)
        try:
            with distributed(learn), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Fail())
        except ConnectionError as e: said.append(str(e))
        queue_of_said.put(said)

    said = multiprocessing.get_context('fork').Queue()
    child = multiprocessing.get_context('fork').Process(target=run_ranks, args=(fail, said), kwargs=dict(timeout=100)) # it ends with an error of its own: its ranks return nothing
    child.start()
    errors = said.get(timeout=90)
    child.kill()
    assert errors[:2] == [('ZeroDivisionError', 0), ('AttributeError', 0)] and 'rank 0 lost the connection' in errors[2], errors


def test_without_accelerate(monkeypatch):
    from skin_lesions.distributed import start_ranks
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(ModuleNotFoundError, match='pip install accelerate'): start_ranks()


@pytest.mark.parametrize('asked', ['ACCELERATE_USE_FSDP', 'ACCELERATE_MIXED_PRECISION'])
def test_other_ways_of_the_launcher_are_refused(monkeypatch, asked):
    from skin_lesions.distributed import start_ranks
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv(asked, 'true' if 'USE' in asked else 'bf16')
    with pytest.raises(ValueError, match='launch'): start_ranks()


def test_one_process_of_several_asked_for_is_refused(monkeypatch):
    "What `accelerate launch --cpu --num_processes 2` does"
    from skin_lesions.distributed import start_ranks
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'no')
    assert start_ranks() is None # one was asked for
    monkeypatch.setenv('MASTER_PORT', '29500')
    with pytest.raises(ValueError, match='--multi_gpu --num_processes N'): start_ranks()


def train_arguments(data, small, *more): return ['train', '--data', data, '--out', 'run', *small, *more]


LAUNCH = """
import sys
from accelerate.commands import launch
from torch.distributed import run
was = run.config_from_args
def rank(*args):
    from skin_lesions.cli import main
    assert main(list(args)) == 0
def forks(args):
    config, python, command = was(args)
    assert python == sys.executable and command[:3] == ['-u', '-m', 'skin_lesions.cli']
    config.start_method = 'fork'
    return config, rank, command[3:]
run.config_from_args = forks
launch.main()
"""


def test_accelerate_launch_makes_a_run(lesions, tmp_path, small, warm_python, monkeypatch):
    "The folder is that of any run: complete, written once, and `predict` opens it; ranks that wait for no imports"
    for name, value in dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore').items(): monkeypatch.setenv(name, value)
    flags = ['--multi_gpu', '--num_processes', '2', '--main_process_port', '0', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no']
    done = warm_python(LAUNCH, *flags, '-m', 'skin_lesions.cli', *train_arguments(lesions[0], small, '--set', 'epochs=2'), cwd=tmp_path)
    assert done.returncode == 0, done.stdout+done.stderr
    assert done.stdout.count('report: ') == 1 and done.stdout.count('images for training') == 1
    run = tmp_path/'run'
    record = json.loads((run/'run.json').read_text())
    assert record['processes'] == 2 and record['complete'] and record['epochs_done'] == 2
    assert sorted(p.name for p in run.iterdir() if not p.name.startswith('.')) == sorted(['model.safetensors', 'bundle.json', 'run.json', 'split.csv', 'history.csv', 'predictions.csv', 'report.html'])
    table = pd.read_csv(run/'predictions.csv')
    split = pd.read_csv(run/'split.csv')
    assert table.image_id.tolist() == split.image_id[split.is_valid].tolist()
    last = pd.read_csv(run/'history.csv').iloc[-1]
    assert last.epoch == 1 and abs(last.accuracy-record['scores']['accuracy']) < 1e-6
    image = next(lesions[0].rglob(f'{table.image_id[0]}.jpg'))
    from skin_lesions.predict import load_predictor
    torch.testing.assert_close(torch.tensor(load_predictor(run).predict(image).mel[0]), torch.tensor(table.mel[0]), rtol=1e-3, atol=1e-5)


TORCHRUN = """
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
def rank(*args):
    from skin_lesions.cli import main
    sys.exit(main(list(args)))
config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id='none', rdzv_backend='c10d', rdzv_endpoint='localhost:0', max_restarts=0, start_method='fork')
elastic_launch(config, rank)(*sys.argv[1:])
"""


def test_torchrun_ends_with_the_message(lesions, tmp_path, small, warm_python):
    "An image that a rank cannot read ends both; what torchrun does, with ranks that wait for no imports"
    data = tmp_path/'data'
    shutil.copytree(lesions[0], data)
    train = lesions[1][~lesions[1].is_valid]
    for image_id in train.image_id[:20]: next(data.rglob(f'{image_id}.jpg')).write_bytes(b'no image')
    done = warm_python(TORCHRUN, *train_arguments(data, small, '--no-check', '--set', 'epochs=1'), cwd=tmp_path)
    assert done.returncode != 0 and 'skin_lesions train: ' in done.stderr and '.jpg: not an image of a kind' in done.stderr, done.stderr
    assert 'ChildFailedError' in done.stderr and not (tmp_path/'run'/'run.json').exists(), done.stderr
