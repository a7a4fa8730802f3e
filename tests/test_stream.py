"Streams of images: memory that does not grow with the list, and each image once whatever reads it"
import os, sys

import numpy as np
import pytest
import torch


@pytest.fixture(scope='module')
def image_paths(tmp_path_factory):
    from skin_lesions.core import image_files
    from skin_lesions.synthetic import synthetic_ham10000
    return [str(f) for f in image_files(synthetic_ham10000(tmp_path_factory.mktemp('stream')/'sample', 56, size=(96, 72), seed=5, show=False))][:40]


def resident(): return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20 # MiB


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_a_million_images_in_flat_memory(image_paths, tmp_path, monkeypatch):
    "The worker has as much after 4,000 images as after 1,000; a million paths are not held in any process"
    import skin_lesions.stream as stream
    from fastai.vision.core import PILImage
    log, count = tmp_path/'log.txt', [0]
    pixels = np.asarray(PILImage.create(image_paths[0]))

    def opened(item):
        assert isinstance(item, str)
        count[0] += 1
        if count[0] in (1000, 4000):
            with log.open('a') as f: f.write(f'{os.getpid()} {resident()}\n')
        return PILImage.create(pixels.copy())

    before = resident()
    assert stream.write_list((image_paths[i%40] for i in range(10**6)), tmp_path/'list.txt') == 10**6
    dls = stream.stream_dataloaders(tmp_path/'list.txt', 32, bs=100, num_workers=1, device='cpu')
    monkeypatch.setattr(stream, 'open_image', opened)
    assert dls.train.n+dls.valid.n == 10**6 and len(dls.train) == dls.train.n//100
    for _ in zip(range(41), dls.train): pass
    grown = resident()-before
    (pid, first), (pid2, last) = (line.split() for line in log.read_text().splitlines())
    assert pid == pid2 != str(os.getpid())
    assert abs(float(last)-float(first)) < 10, (first, last) # the images alone are 60 MiB
    assert grown < 40, grown # the paths alone would be 150 MiB


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('workers', [1, 2])
def test_each_image_once(image_paths, tmp_path, packed, workers):
    "Over two ranks with workers, by what is in the images; validation and training hold each image between them"
    from skin_lesions.stream import stream_dataloaders, write_list, write_shards
    def values(*loaders): return sorted(round(v, 2) for dl in loaders for b in dl for v in b[0].double().flatten(1).sum(1).tolist())
    write_list(image_paths, tmp_path/'list.txt')
    source = write_shards(image_paths, tmp_path/'tars', per_shard=6) if packed else tmp_path/'list.txt'
    def made(**kw): return stream_dataloaders(source, 32, 'resize', bs=4, block=6, buffer=9, lighting=0, valid_pct=.2, drop_last=False, device='cpu', **kw)
    plain = made(num_workers=0)
    everything = values(plain.train, plain.valid)
    assert len(everything) == len(set(everything)) == len(image_paths)
    ranks = [values(made(num_workers=workers).train.on_rank(r, 2, equal=False)) for r in range(2)]
    assert sorted(sum(ranks, [])+values(made(num_workers=workers).valid)) == everything
    assert min(map(len, ranks)) > 10


def test_order_changes_and_repeats(image_paths, tmp_path):
    from skin_lesions.stream import stream_dataloaders, write_list
    write_list(image_paths, tmp_path/'list.txt')
    def epochs(seed):
        dl = stream_dataloaders(tmp_path/'list.txt', 32, 'resize', bs=8, block=5, buffer=9, lighting=0, valid=tmp_path/'list.txt', num_workers=0, device='cpu', seed=seed).train
        return [torch.cat([b[0] for b in dl]).flatten(1).sum(1).tolist() for _ in range(2)]
    a, b, c = epochs(1), epochs(1), epochs(2)
    assert a == b and a[0] != a[1] and a[0] != c[0] and sorted(a[0]) == pytest.approx(sorted(c[0]))
