"""Prediction and scores as a server or a study needs them, on the CPU, each against the plain way.

    HAM10000_DIR=... python benchmarks/speed/serving.py

A folder of 600x450 JPEGs by a predictor with onnxruntime, in float32 and in int8 (calibrated on 64 of the images, not
compared on labels, because speed does not depend on them), against the predictor as it is; five networks looking eight
times at one image against one network looking once, and against one second; answers of the web demo to sixteen
clients that ask at once, by two threads against one; intervals of all scores from 1,000 draws of 10,000 images against
loops over scikit-learn, of the same scores and of accuracy, average recall and AUCs alone, which make a few draws and
are extrapolated; and training in two processes of one thread against one process of two, and from the cache against
plain fastai with two data-loading workers. With `--cpu`, CPU seconds of the process are counted instead of seconds, for
a machine that does something else; processes that run side by side cannot be measured like that and are left out.
"""
import argparse, atexit, json, os, sys, tempfile, time, urllib.request
from pathlib import Path

from sides import Side, in_turn, report

ARCH = 'tf_efficientnet_lite0'


def clock(cpu): return time.process_time if cpu else time.perf_counter


def predictor_of(bundle, engine, folder, tmp):
    "A predictor, with onnxruntime's graph in the place of its network where one is asked for"
    from skin_lesions.core import image_files
    from skin_lesions.engine import open_session, with_engine, with_session
    from skin_lesions.predict import load_predictor
    from skin_lesions.quantize import write_int8
    os.environ['SKIN_LESIONS_CACHE'] = str(Path(tmp)/'cache')
    predictor = load_predictor(bundle, 'cpu')
    if engine == 'torch': return predictor
    if engine == 'onnxruntime': return with_engine(predictor)
    file = write_int8(predictor, image_files(folder)[:64], Path(tmp)/'int8.onnx')
    return with_session(predictor, open_session(file))


def folder(folder, bundle, tmp, engine='torch', cpu=False):
    "Images a second from a folder to a table"
    predictor, now = predictor_of(bundle, engine, folder, tmp), clock(cpu)
    def run():
        start = now()
        n = len(predictor.predict(folder, progress=False))
        return n/(now() - start)
    return run


def one_image(image, bundle, views=None, cpu=False):
    "Seconds of one image from a warm predictor on one thread"
    import torch
    torch.set_num_threads(1)
    from skin_lesions.predict import load_predictor
    predictor, now = load_predictor(bundle, 'cpu'), clock(cpu)
    def run():
        start = now()
        for _ in range(5): predictor.predict(image, views=views, progress=False)
        return (now() - start)/5
    return run


def one_second(): return lambda: 1.


def answers(images, bundle, at_once):
    "Answers a second of the web demo to sixteen clients that ask at the same time, on one thread for each call"
    import torch
    from concurrent.futures import ThreadPoolExecutor
    from skin_lesions.app import launch_app
    from skin_lesions.core import image_files
    from skin_lesions.predict import load_predictor
    torch.set_num_threads(1)
    files = image_files(images)[:16]
    app = launch_app(load_predictor(bundle, 'cpu'), port=0, at_once=at_once, per_minute=10_000, block=False)
    def run():
        with ThreadPoolExecutor(16) as clients:
            start = time.perf_counter()
            found = list(clients.map(lambda file: ask(app.local_url, file), files))
            return len(found)/(time.perf_counter() - start)
    return run


def ask(url, file):
    "Upload a photograph as a program does, ask, and wait for the answer"
    edge = 'x'*20
    head = (f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n'
            'Content-Type: image/jpeg\r\n\r\n')
    body = head.encode() + file.read_bytes() + f'\r\n--{edge}--\r\n'.encode()
    path, = json.loads(fetch(f'{url}gradio_api/upload', body, f'multipart/form-data; boundary={edge}'))
    asked = json.dumps(dict(data=[[dict(path=path, meta=dict(_type='gradio.FileData'))]])).encode()
    event = json.loads(fetch(f'{url}gradio_api/call/predict', asked, 'application/json'))['event_id']
    text = fetch(f'{url}gradio_api/call/predict/{event}')
    if not text.startswith('event: complete'): raise RuntimeError(text)
    return json.loads(text.split('data: ', 1)[1])


def fetch(url, body=None, kind=None):
    "The text that a server answers"
    headers = {} if kind is None else {'Content-Type': kind}
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=300) as r: return r.read().decode()


def scores_table(n):
    "Probabilities of images, two of each lesion, that are right more often than not"
    import numpy as np
    import pandas as pd
    from skin_lesions.classes import HAM10000
    codes, rng = list(HAM10000), np.random.default_rng(42)
    dx = rng.choice(codes, n//2, p=[.03, .05, .11, .01, .11, .67, .02]).repeat(2)
    p = rng.dirichlet(np.ones(7), n) + .5*(dx[:, None] == np.array(codes))
    table = pd.DataFrame(p/p.sum(1, keepdims=True), columns=codes)
    return table.assign(image_id=[f'i{i}' for i in range(n)], dx=dx, group=[f'l{i//2}' for i in range(n)])


def intervals(n, draws, cpu=False):
    "Draws a second of this library"
    from skin_lesions.evaluate import score_intervals
    table, now = scores_table(n), clock(cpu)
    def run():
        start = now()
        score_intervals(table, n=draws)
        return draws/(now() - start)
    return run


def loop(n, draws, every=False, cpu=False):
    "Draws a second of a loop over scikit-learn, with every score, or with accuracy, average recall and AUCs"
    import warnings
    import numpy as np
    from sklearn.metrics import accuracy_score, recall_score, roc_auc_score
    from skin_lesions.classes import HAM10000
    table, now, codes = scores_table(n), clock(cpu), list(HAM10000)
    p, y = table[codes].to_numpy(), table.dx.map({c: i for i, c in enumerate(codes)}).to_numpy()
    rows, rng = np.arange(n).reshape(-1, 2), np.random.default_rng(0)
    strata = [rows[y[rows[:, 0]] == c] for c in np.unique(y)]
    if every:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from score_intervals import plain_scores
        warnings.simplefilter('ignore')  # of a class that is never called
    def run():
        start = now()
        for _ in range(draws):
            some = np.concatenate([s[rng.integers(0, len(s), len(s))].ravel() for s in strata])
            if every:
                plain_scores(p[some], y[some])
                continue
            accuracy_score(y[some], p[some].argmax(1))
            recall_score(y[some], p[some].argmax(1), average='macro')
            roc_auc_score(y[some], p[some], multi_class='ovr', labels=range(7))
        return draws/(now() - start)
    return run


def trainings(folder, n, processes, threads, learner='ours', **kwargs):
    "Images a second of as many trainings side by side"
    from multiprocessing import get_context
    context = get_context('spawn')
    pipes, workers = [], []
    for _ in range(processes):
        pipe, child = context.Pipe()
        workers.append(context.Process(target=train_alone, args=(child, folder, n, threads, learner, kwargs)))
        workers[-1].start()
        atexit.register(workers[-1].kill)
        pipes.append(pipe)
    for pipe in pipes: pipe.recv()
    def run():
        start = time.perf_counter()
        for pipe in pipes: pipe.send('run')
        for pipe in pipes: pipe.recv()
        return processes*n/(time.perf_counter() - start)
    return run


def train_alone(pipe, folder, n, threads, learner, kwargs):
    "In a process of its own: an epoch whenever asked"
    import multiprocessing
    import torch
    # data-loading workers start as the system starts them, not as this process was started
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(threads)
    import step
    run = getattr(step, learner)(folder, n, **kwargs)
    pipe.send('ready')
    while pipe.recv() == 'run':
        run()
        pipe.send('done')


def save_networks(tmp, size, arch):
    "Untrained networks as bundles: one, and five as an ensemble"
    import torch
    from skin_lesions.bundle import image_view, save_bundle
    from skin_lesions.classes import HAM10000
    from skin_lesions.data import crop_side
    from skin_lesions.networks import EnsembleNet, TwoStageNet, create_body
    nets = []
    for seed in range(5):
        torch.manual_seed(seed)
        body = create_body(arch, pretrained=False)
        nets.append(TwoStageNet(body, n_out=len(HAM10000), first=HAM10000.index(HAM10000.first)).eval())
    view = image_view(size, arch=arch, side=crop_side(size))
    save_bundle(nets[0], tmp/'one', classes=HAM10000, view=view)
    save_bundle(EnsembleNet(nets), tmp/'five', classes=HAM10000, view=view)


def images_of(tmp, args):
    "A folder of images: HAM10000's in original size, or synthetic ones for `--smoke`"
    from skin_lesions.core import image_files
    from skin_lesions.synthetic import synthetic_dataset
    if args.smoke: files = image_files(synthetic_dataset(tmp/'synthetic', 56, seed=0, size=(120, 90), show=False))
    else: files = sorted((Path(os.environ['HAM10000_DIR'])/'original_quality').rglob('*.jpg'))
    target = tmp/'images'
    target.mkdir()
    for i in range(args.images): (target/f'{i:04}.jpg').symlink_to(files[i % len(files)])
    return target


def rows_of(tmp, args):
    "what, against, goal, unit, then function and arguments of both sides"
    shared = dict(folder=str(images_of(tmp, args)), bundle=str(tmp/'one'), tmp=str(tmp), cpu=args.cpu)
    per, seconds = ('CPU s', 'CPU s') if args.cpu else ('s', 's')
    image, few = str(next((tmp/'images').iterdir())), 2 if args.smoke else 5
    n, draws = (400, 20) if args.smoke else (10_000, 1000)
    what = f'prediction of a folder of {args.images} 600x450 JPEGs, CPU, EfficientNet-Lite0, {args.size} px'
    yield (f'{what}, onnxruntime', 'the predictor as it is', '>= 1.3', f'images/{per}',
           ('folder', shared | dict(engine='onnxruntime')), ('folder', shared))
    yield (f'{what}, onnxruntime int8', 'the predictor as it is', '>= 1.8', f'images/{per}',
           ('folder', shared | dict(engine='int8')), ('folder', shared))
    yield ('five networks, eight views, one image', 'one network, one view', '<= 20', seconds,
           ('one_image', dict(image=image, bundle=str(tmp/'five'), views='dihedral', cpu=args.cpu)),
           ('one_image', dict(image=image, bundle=str(tmp/'one'), cpu=args.cpu)))
    yield ('five networks, eight views, one image, one thread', 'one second', '<= 1', seconds,
           ('one_image', dict(image=image, bundle=str(tmp/'five'), views='dihedral', cpu=args.cpu)), ('one_second', {}))
    if not args.cpu:
        served = dict(images=str(tmp/'images'), bundle=str(tmp/'one'))
        yield ('web demo, 16 clients at once, two calls at a time on a thread each', 'one call at a time', '>= 1.5',
               'answers/s', ('answers', served | dict(at_once=2)), ('answers', served | dict(at_once=1)))
    for every, what in ((True, 'the same scores'), (False, 'accuracy, average recall and AUCs only')):
        yield (f'intervals of all scores, {n:,} images, {draws:,} draws',
               f'a loop over scikit-learn, {what}, {few} draws', '>= 200', f'draws/{per}',
               ('intervals', dict(n=n, draws=draws, cpu=args.cpu)),
               ('loop', dict(n=n, draws=few, every=every, cpu=args.cpu)))
    if args.cpu or args.smoke: return
    from skin_lesions.synthetic import synthetic_dataset
    synthetic_dataset(tmp/'training', 336, seed=0, show=False)
    training = dict(folder=str(tmp/'training'), n=320)
    yield ('training in two processes of one thread', 'one process of two threads', '>= 1.3', 'images/s',
           ('trainings', training | dict(processes=2, threads=1)),
           ('trainings', training | dict(processes=1, threads=2)))
    synthetic_dataset(tmp/'large', 208, seed=0, size=(600, 450), show=False)
    training = dict(folder=str(tmp/'large'), n=192)
    yield ('images trained on both cores, 128 px, two processes of one thread from the cache',
           'plain fastai, two threads and two workers, 600x450 JPEGs', '>= 3.5', 'images/s',
           ('trainings', training | dict(processes=2, threads=1, cache=str(tmp/'resized'))),
           ('trainings', training | dict(processes=1, threads=2, learner='plain', num_workers=2)))


def main(args):
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        save_networks(tmp, args.size, 'test_efficientnet' if args.smoke else ARCH)
        for what, against, goal, unit, ours, theirs in rows_of(tmp, args):
            if args.only and not any(part in what for part in args.only): continue
            us, them = (Side('serving', name, **kwargs) for name, kwargs in (ours, theirs))
            report(what, against, goal, unit, in_turn(us, them, args.repeats))
            for side in (us, them): side.close()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--repeats', type=int, default=3, help='pairs')
    parser.add_argument('--images', type=int, default=256, help='in the folder; originals come repeatedly')
    parser.add_argument('--size', type=int, default=128, help='side that the network sees, pixels')
    parser.add_argument('--cpu', action='store_true', help='CPU seconds of the process instead of seconds')
    parser.add_argument('--only', nargs='+', help='rows whose name has one of these in it')
    parser.add_argument('--smoke', action='store_true', help='small, on synthetic images: a trial of the script')
    main(parser.parse_args())
