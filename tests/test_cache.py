"""The cache when things go wrong: killed at any moment, a full or read-only disk, two processes at once, another machine's file."""
import multiprocessing, pickle, random, subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import skin_lesions.cache
from skin_lesions.cache import PixelStore, resize_cache
from skin_lesions.core import read_image
from skin_lesions.data import ham10000_dataloaders
from skin_lesions.readers import read_metadata
from skin_lesions.split import split_by_lesion
from skin_lesions.synthetic import synthetic_ham10000

FORK = multiprocessing.get_context('fork') # no imports anew

def fill_slowly(paths, folder):
    "An image at a time, so that a kill falls between writes and within them"
    append = skin_lesions.cache._append
    def one_by_one(store, pixels, index, decoded):
        for one in decoded: append(store, pixels, index, [one])
    skin_lesions.cache._append = one_by_one
    PixelStore(folder, whole).fill(paths, n_workers=1, show=False)


@pytest.fixture(scope='module')
def meta(tmp_path_factory):
    return split_by_lesion(read_metadata(synthetic_ham10000(tmp_path_factory.mktemp('synthetic')/'ham', n_images=90, seed=7, size=(300, 225))))


def whole(data): return np.asarray(read_image(data))


def size(file): return file.stat().st_size if file.exists() else 0


def test_killed_at_random_moments(meta, tmp_path):
    folder, rng, seen = tmp_path/'store', random.Random(3), []
    for _ in range(20):
        process = FORK.Process(target=fill_slowly, args=(list(meta.path), folder))
        process.start()
        enough = size(folder/'pixels.bin') + rng.randint(1, 5*202_500) # bytes of an image
        while process.is_alive() and size(folder/'pixels.bin') < enough: pass
        process.kill(); process.join()
        store = PixelStore(folder, whole)
        for p in store.rows: assert np.array_equal(store[p], whole(Path(p).read_bytes())), 'what the index speaks of is complete'
        assert len(store) >= (seen[-1] if seen else 0)
        seen.append(len(store))
    assert 0 < seen[-1] and len(set(seen)) > 3
    store = PixelStore(folder, whole)
    assert store.fill(meta.path, show=False) == len(meta) - seen[-1] and store.fill(meta.path, show=False, verify=True) == 0
    assert store.pixels_file.stat().st_size == sum(whole(Path(p).read_bytes()).nbytes for p in meta.path)


def test_cut_at_every_kind_of_place(meta, tmp_path):
    few = meta.path[:6]
    whole_store = PixelStore(tmp_path/'whole', whole); whole_store.fill(few, show=False)
    pixels, index = whole_store.pixels_file.read_bytes(), whole_store.index_file.read_bytes()
    rng = random.Random(0)
    for k in range(60):
        folder = tmp_path/f'{k}'; folder.mkdir()
        (folder/'pixels.bin').write_bytes(pixels[:rng.randint(0, len(pixels))])
        (folder/'index.jsonl').write_bytes(index[:rng.randint(0, len(index))])
        store = PixelStore(folder, whole)
        n = len(store)
        assert store.fill(few, show=False) == 6 - n
        for p in few: assert np.array_equal(store[p], whole_store[p])
        assert store.pixels_file.stat().st_size == len(pixels)


def test_two_processes_fill_one_store(meta, tmp_path):
    processes = [FORK.Process(target=fill_slowly, args=(list(meta.path), tmp_path/'store')) for _ in range(3)]
    for p in processes: p.start()
    for p in processes: p.join(); assert p.exitcode == 0
    store = PixelStore(tmp_path/'store', whole)
    assert len(store) == len(meta) and store.fill(meta.path, show=False, verify=True) == 0
    assert store.pixels_file.stat().st_size == sum(whole(Path(p).read_bytes()).nbytes for p in meta.path), 'no image twice'


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path/'disk'; folder.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(folder)], capture_output=True).returncode: pytest.skip('a small disk can be mounted only by root')
    yield folder
    subprocess.run(['umount', '-l', str(folder)])


def test_full_disk(meta, small_disk, monkeypatch):
    with pytest.raises(OSError, match='need about .* MB.*train without one: cache=None'): resize_cache(meta, 224, folder=small_disk, show=False)
    store = PixelStore(small_disk/'store', whole)
    monkeypatch.setattr(skin_lesions.cache, '_check_room', lambda *_: None) # another program takes the room meanwhile
    with pytest.raises(OSError, match='cannot be written .*No space left.*train without one: cache=None'): store.fill(meta.path, show=False, n_workers=1)
    subprocess.run(['mount', '-o', 'remount,size=200m', str(small_disk)], check=True)
    store = PixelStore(small_disk/'store', whole)
    store.fill(meta.path, show=False)
    assert len(store) == len(meta) and store.fill(meta.path, show=False, verify=True) == 0
    dls = ham10000_dataloaders(meta, 32, bs=8, num_workers=0) # training goes on uncached
    assert dls.one_batch()[0].shape == (8, 3, 32, 32)


def test_read_only_disk(meta, small_disk):
    made = resize_cache(meta.iloc[:20], 32, folder=small_disk, show=False)
    subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
    again = resize_cache(meta.iloc[:20], 32, folder=small_disk, show=False) # complete: nothing is written
    assert len(again) == len(made)
    dls = ham10000_dataloaders(meta.iloc[:20], 32, bs=4, num_workers=0, cache=again)
    assert dls.one_batch()[0].shape == (4, 3, 32, 32)
    with pytest.raises(OSError, match='cannot be written .*Read-only.*another folder, or train without one: cache=None'): resize_cache(meta, 32, folder=small_disk, show=False)
    with pytest.raises(OSError, match='cannot be written .*Read-only'): resize_cache(meta, 32, folder=small_disk/'other', show=False)


def test_nothing_is_unpickled(meta, tmp_path):
    import pickle
    class Evil:
        def __reduce__(self): return (Path(tmp_path/'owned').touch, ())
    cache = resize_cache(meta.iloc[:10], 32, folder=tmp_path/'cache', show=False)
    for store in (cache.images, cache.squares):
        store.index_file.write_bytes(pickle.dumps(Evil()) + b'\n'); store.pixels_file.write_bytes(pickle.dumps(Evil()))
    again = resize_cache(meta.iloc[:10], 32, folder=tmp_path/'cache', show=False)
    assert len(again) + len(again.squares) == 10 and not (tmp_path/'owned').exists()


@pytest.mark.parametrize('row', [b'{"path": "x"}', b'[]', b'{"path": "x", "at": -30, "h": 2, "w": 2}', b'{"path": 3, "at": 0, "h": 1e9, "w": "a"}', b'{"path": "x", "at": 0, "h": -2, "w": -2, "size": 1, "mtime": 1, "digest": "", "crc": 0}'])
def test_foreign_lines_are_not_believed(meta, tmp_path, row):
    store = PixelStore(tmp_path/'store', whole); store.fill(meta.path[:3], show=False)
    with open(store.index_file, 'ab') as f: f.write(row + b'\n')
    store = PixelStore(tmp_path/'store', whole)
    assert len(store) == 3 and store.fill(meta.path[:5], show=False) == 2


IN_A_WORKER = """
import pickle, sys, torch
batches = pickle.load(open(sys.argv[1], 'rb')).d
batches.fake_l.num_workers = 0
torch.save(torch.cat([b[0].as_subclass(torch.Tensor) for b in batches]), sys.argv[2])
"""


def test_spawned_workers_read_the_cache(meta, tmp_path, warm_python):
    "A worker that is not forked gets its loader as a pickle, and nothing of this process's memory"
    cache = resize_cache(meta, 32, folder=tmp_path/'cache', show=False)
    valid = ham10000_dataloaders(meta, 32, bs=16, num_workers=1, cache=cache).valid
    (tmp_path/'loader').write_bytes(pickle.dumps(valid.fake_l))
    done = warm_python(IN_A_WORKER, tmp_path/'loader', tmp_path/'pixels', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here = [b[0] for b in ham10000_dataloaders(meta, 32, bs=16, num_workers=0, cache=cache).valid]
    torch.testing.assert_close(torch.load(tmp_path/'pixels'), torch.cat(here).as_subclass(torch.Tensor))


def test_what_changes_the_pixels_changes_the_folder(meta, tmp_path):
    "Size, crop, smallest part of the crop and preprocessing each lead to other stores"
    from skin_lesions.preprocess import ShadesOfGray
    few = meta.iloc[:6]
    settings = [dict(), dict(size=48), dict(crop='resize'), dict(crop='window'), dict(min_scale=1.), dict(item_tfms=ShadesOfGray())]
    caches = [resize_cache(few, **(dict(size=32) | s), folder=tmp_path, show=False) for s in settings]
    for k in ('images', 'squares'): assert len({getattr(c, k).folder for c in caches}) == len(settings), k
    assert len(resize_cache(few, 32, folder=tmp_path, show=False)) == len(caches[0]) # the same settings, the same folder


def test_a_cache_of_whole_images_does_not_serve_small_crops(meta, tmp_path):
    few = meta.iloc[:40]
    whole_images = resize_cache(few, 32, min_scale=1., folder=tmp_path, show=False)
    with pytest.raises(ValueError, match='the loader has min_scale=0.35'): ham10000_dataloaders(few, 32, num_workers=0, cache=whole_images)
    dls = ham10000_dataloaders(few, 32, bs=4, min_scale=1., num_workers=0, cache=whole_images)
    assert dls.one_batch()[0].shape == (4, 3, 32, 32)
