"Many pictures in one call and many threads at once: the same tables, flat memory, nothing left open. `SKIN_LESIONS_LOAD=10000` makes it ten thousand pictures."
import gc, os, threading
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mutate import mutated
from skin_lesions.core import CODES
from skin_lesions.data import ham10000_dataloaders
from skin_lesions.readers import read_metadata
from skin_lesions.learner import two_stage_learner
from skin_lesions.synthetic import draw_non_lesion
from skin_lesions.ood import fit_ood
from skin_lesions.predict import load_predictor
from skin_lesions.bundle import save_bundle

N, CODES = int(os.environ.get('SKIN_LESIONS_LOAD', 2000)), list(CODES)
PROC = Path('/proc/self')
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::PIL.Image.DecompressionBombWarning')


@pytest.fixture(scope='module')
def predictor(sample, tmp_path_factory):
    torch.manual_seed(0)
    meta = read_metadata(sample)
    dls = ham10000_dataloaders(meta.assign(is_valid=[i % 4 == 0 for i in range(len(meta))]), 32, bs=16, arch='test_efficientnet', num_workers=0, device='cpu')
    learn = two_stage_learner(dls, 'test_efficientnet', pretrained=False, alpha=None)
    with torch.no_grad():
        learn.model.train()
        for _ in range(4): learn.model(dls.train.one_batch()[0]) # batch statistics, so that answers differ
        learn.model.eval()
    return load_predictor(save_bundle(learn, tmp_path_factory.mktemp('load')/'b', ood=fit_ood(learn, n=60)), device='cpu')


@pytest.fixture(scope='module')
def files(sample, tmp_path_factory):
    "Fifty pictures of 300 x 225, 200 KB each when decoded, and ten broken files"
    from PIL import Image
    folder, out = tmp_path_factory.mktemp('files'), []
    for i, path in enumerate(sorted(Path(sample).rglob('ISIC_*.jpg'))[:50]):
        with Image.open(path) as im: im.resize((300, 225)).save(folder/f'{i:02}.jpg')
        out.append(folder/f'{i:02}.jpg')
    broken = [d for k, d in mutated(120, seed=1) if k in ('truncated', 'wrong_type', 'zero_bytes')][:10]
    for i, data in enumerate(broken):
        (folder/f'broken{i}.jpg').write_bytes(data)
        out.append(folder/f'broken{i}.jpg')
    return out


def memory(): return int((PROC/'statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20
def still_open():
    "Open files, pipes and sockets by what they are, and running threads"
    gc.collect() # what earlier tests left for the collector is closed now, not in the middle of this one
    found = Counter(threading.enumerate())
    for fd in (PROC/'fd').iterdir() if PROC.exists() else ():
        try: found[os.readlink(fd)] += 1
        except FileNotFoundError: pass # the handle that lists the folder
    return found


@pytest.mark.skipif(not (PROC/'statm').exists(), reason='memory and handles are read from /proc')
@pytest.mark.parametrize('workers', [0, 4])
def test_many_pictures_in_one_call(predictor, files, workers):
    n, seen = N if workers else N//4, {}
    once = predictor.predict(files, bs=len(files), progress=False, workers=0)
    before = still_open()
    def stream():
        for i in range(n):
            if i in (n//4, n-1): seen[i] = memory()
            yield files[i % len(files)]
    table = predictor.predict(stream(), bs=len(files), progress=False, workers=workers)
    assert not still_open() - before
    grown = seen[n-1] - seen[n//4]
    print(f'{n} pictures, {workers} threads: {seen[n//4]:.0f} MB after {n//4}, {seen[n-1]:.0f} MB at the end')
    assert grown < 40, f'{grown:.0f} MB more after {n} pictures than after {n//4}'
    assert len(table) == n and table.image_id.is_unique
    whole = n - n % len(files) # full batches are bitwise the same
    expected = pd.concat([once]*(n//len(files)), ignore_index=True)
    pd.testing.assert_frame_equal(table.head(whole).drop(columns='image_id'), expected.drop(columns='image_id'), check_exact=True)
    np.testing.assert_allclose(table[CODES][whole:], once[CODES][:n-whole], atol=1e-6)


def test_sixteen_threads_give_what_one_gives(predictor, files):
    "Each with its own pictures, so that a picture in the wrong thread would show; half of them look eight times"
    jobs = [([*files[i::16], draw_non_lesion('text', i, size=(90, 70))], 'dihedral' if i % 2 else None) for i in range(16)]
    ask = lambda job: predictor.predict(job[0], bs=2, progress=False, tta=job[1], workers=2)
    alone = [ask(j) for j in jobs]
    before, start, found = still_open(), threading.Barrier(16), [[] for _ in jobs]
    def work(i):
        start.wait()
        for _ in range(3): found[i].append(ask(jobs[i]))
    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not still_open() - before
    for a, tables in zip(alone, found):
        assert len(tables) == 3
        for t in tables: pd.testing.assert_frame_equal(t, a, check_exact=True)
    assert len({round(float(a.nv.dropna().sum()), 6) for a in alone}) > 8 # answers do differ from thread to thread
    assert not predictor.model.body._forward_hooks


@pytest.mark.skipif(not (PROC/'fd').exists(), reason='handles are read from /proc')
def test_a_file_left_open_and_a_thread_left_running_are_noticed(files):
    before, done = still_open(), threading.Event()
    with open(files[0], 'rb'):
        assert still_open() - before == Counter([str(files[0])])
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert still_open() - before == Counter([thread])
    done.set(); thread.join()
    assert not still_open() - before
