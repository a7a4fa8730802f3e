"The package's bundle: killed at random moments, the same call ends with the weights of a training that was never killed."
import multiprocessing, os, random, signal, time

import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file

from skin_lesions.recipes import with_changes

KILLS = int(os.environ.get('REPRODUCE_KILLS', 2))
TINY = dict(arch='test_efficientnet', pretrained=False, size=32, epochs=3, bs=16)


@pytest.fixture(scope='module')
def sample(tmp_path_factory):
    from skin_lesions.synthetic import synthetic_dataset
    return synthetic_dataset(tmp_path_factory.mktemp('reproduce')/'sample', 80, size=(96, 72), show=False)


def go(out, sample):
    "In a process of its own"
    from skin_lesions.reproduce import reproduce_bundle
    torch.set_num_threads(1)
    reproduce_bundle(sample, out, with_changes('ham10000', TINY), workers=0, device='cpu', cache=None, minutes=0, show=False, report=False)
    os._exit(0)


def start(*args):
    child = multiprocessing.get_context('fork').Process(target=go, args=args)
    child.start()
    return child


def test_kills(sample, tmp_path):
    whole, killed, rng = tmp_path/'whole', tmp_path/'killed', random.Random(0)
    began, child = time.monotonic(), start(whole, sample)
    child.join(300)
    assert child.exitcode == 0
    seconds, kills = time.monotonic()-began, 0
    for _ in range(KILLS):
        child = start(killed, sample)
        time.sleep(rng.uniform(.1, .5)*seconds)
        if child.is_alive(): os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        kills += child.exitcode != 0
    assert kills
    child = start(killed, sample)
    child.join(300)
    assert child.exitcode == 0
    a, b = (load_file(o/'model.safetensors') for o in (whole, killed))
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    a, b = (pd.read_csv(o/'held_out_predictions.csv') for o in (whole, killed))
    pd.testing.assert_frame_equal(a, b)
    assert not list(killed.rglob('state')) and (killed/'README.md').read_text() == (whole/'README.md').read_text()


def test_no_bundle_in_the_package(tmp_path, capsys, monkeypatch):
    from PIL import Image
    from skin_lesions import predict
    from skin_lesions.cli import main
    Image.new('RGB', (64, 48)).save(tmp_path/'a.png')
    if not (predict.Path(predict.__file__).parent/'bundles'/'ham10000'/'bundle.json').is_file():
        assert main(['predict', str(tmp_path/'a.png')]) == 2
        assert 'reproduce-bundle' in capsys.readouterr().err
    asked = []
    class Fake:
        recipe_views = None
        def predict(self, images, *args, **kwargs): asked.append(images); raise ValueError('asked')
    image = tmp_path/'a.png'
    monkeypatch.chdir(tmp_path)
    (tmp_path/'run').mkdir()
    monkeypatch.setattr('skin_lesions.cli.open_bundle', lambda bundle, *args: asked.append(bundle) or Fake())
    for args in ([image], ['--bundle', 'run', '--quiet', image], [image, image, '--bundle', 'run']): main(['predict', *map(str, args)])
    assert asked == ['ham10000', [image], 'run', [image], 'run', [image, image]]


def test_two_collections_with_a_split_of_their_own(tmp_path):
    "Networks of the joined frame's own split; scores by collection, also on the card; what was held out was not trained on"
    from skin_lesions.bundle import read_bundle
    from skin_lesions.readers import join_collections, read_metadata
    from skin_lesions.reproduce import reproduce_bundle
    from skin_lesions.split import split_by_lesion
    from skin_lesions.synthetic import synthetic_dataset
    frames = {}
    for i, name in enumerate(('one', 'two')):
        meta = read_metadata(synthetic_dataset(tmp_path/name, 80, size=(96, 72), seed=i, show=False))
        frames[name] = meta.assign(image_id=name + meta.image_id.astype(str), group=name + meta.group.astype(str))
    meta = split_by_lesion(join_collections(frames), fold=1, k=3)
    options = dict(workers=0, device='cpu', cache=None, minutes=0, show=False, report=False)
    found = reproduce_bundle(meta, tmp_path/'bundle', with_changes('ham10000', TINY | dict(epochs=1)), network='mean', split='own', **options)
    held = pd.read_csv(tmp_path/'bundle'/'held_out_predictions.csv')
    assert set(held.image_id) == set(meta.image_id[meta.is_valid])
    assert {r['collection'] for r in found['subgroups']['collection']} == {'one', 'two'}
    assert sum(r['images'] for r in found['subgroups']['collection']) == found['n_images'] == len(held)
    assert found['measured_on'].startswith("held-out lesions of the data set's own split")
    assert '| one |' in (tmp_path/'bundle'/'README.md').read_text()
