"A training is killed, stopped, resumed, run beside another one: its folder ends as if nothing had happened."
import multiprocessing, os, random, signal, time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from skin_lesions.recipes import at_scale
from skin_lesions.train import RUN_FILES, STATE_FOLDER, run_state, train_run
from skin_lesions.report import read_run

KILLS = int(os.environ.get('TRAIN_KILLS', 3))
QUICK = dict(workers=0, device='cpu', cache=None, show=False, report=False, minutes=0)
RECIPES = dict(
    steps=replace(at_scale('best', 'tiny'), steps=((24, 2), (32, 2)), ema=True, lr_factor=.5),
    pretext=replace(at_scale('rotation', 'tiny'), steps=((32, 2),), pretext_epochs=2),
    masking=replace(at_scale('masking', 'tiny'), steps=((32, 1),), pretext_epochs=2),
    unet=replace(at_scale('restoration_sequential', 'tiny'), steps=((32, 1),)))
KEPT = ('model.safetensors', 'predictions.csv', 'history.csv', 'split.csv') # whose bytes must be the same


@pytest.fixture(scope='module')
def meta(tmp_path_factory):
    from skin_lesions.readers import read_metadata
    from skin_lesions.synthetic import synthetic_dataset
    return read_metadata(synthetic_dataset(tmp_path_factory.mktemp('train')/'sample', 80, size=(96, 72), show=False))


def go(recipe, meta, out):
    "In a process of its own"
    torch.set_num_threads(1)
    train_run(recipe, meta, out, resume=True, **QUICK)
    os._exit(0)


def start(*args):
    child = multiprocessing.get_context('fork').Process(target=go, args=args)
    child.start()
    return child


SECONDS = {} # that a whole training of a recipe takes here


@pytest.fixture(scope='module')
def straight(meta, tmp_path_factory):
    "Run folders that were never interrupted"
    out = tmp_path_factory.mktemp('straight')
    for name, recipe in RECIPES.items():
        began, child = time.monotonic(), start(recipe, meta, out/name)
        child.join(300)
        assert child.exitcode == 0
        SECONDS[name] = time.monotonic()-began
    return {name: out/name for name in RECIPES}


def contents(folder): return {name: (folder/name).read_bytes() for name in KEPT}


@pytest.mark.parametrize('name', RECIPES)
def test_killed_at_random_moments(name, meta, straight, tmp_path):
    "Within an epoch, between steps, in the pretext, while the folder is written"
    rng, killed = random.Random(name), 0
    for _ in range(KILLS):
        child = start(RECIPES[name], meta, tmp_path/'run')
        time.sleep(rng.uniform(.1, .7)*SECONDS[name])
        if child.is_alive(): os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        killed += child.exitcode != 0
    child = start(RECIPES[name], meta, tmp_path/'run')
    child.join(300)
    assert killed and child.exitcode == 0
    assert run_state(tmp_path/'run') == 'complete' and contents(tmp_path/'run') == contents(straight[name])
    assert not (tmp_path/'run'/STATE_FOLDER).exists() and not list((tmp_path/'run').rglob('.*-*'))


def test_killed_between_the_record_and_the_end(meta, straight, tmp_path):
    "The run is complete, and its state goes with the next call"
    import shutil
    out = shutil.copytree(straight['unet'], tmp_path/'run')
    (out/STATE_FOLDER/'step0').mkdir(parents=True)
    (out/STATE_FOLDER/'step0.safetensors').write_bytes(b'half of it')
    train_run(RECIPES['unet'], meta, out, resume=True, **QUICK)
    assert run_state(out) == 'complete' and not (out/STATE_FOLDER).exists() and contents(out) == contents(straight['unet'])


def test_killed_between_steps(meta, straight, tmp_path, monkeypatch):
    "The second step begins anew from the weights of the first, which is not trained again"
    from skin_lesions import train
    out, own, sizes = tmp_path/'run', train.recipe_learner, []
    def learner(*args, size, **kwargs):
        sizes.append(size)
        if size == 32 and sizes.count(32) == 1: raise KeyboardInterrupt
        return own(*args, size=size, **kwargs)
    monkeypatch.setattr(train, 'recipe_learner', learner)
    with pytest.raises(KeyboardInterrupt): train_run(RECIPES['steps'], meta, out, **QUICK)
    assert run_state(out) == 'unfinished' and (out/STATE_FOLDER/'step0.safetensors').is_file()
    train_run(RECIPES['steps'], meta, out, resume=True, **QUICK)
    assert sizes == [24, 32, 32] and contents(out) == contents(straight['steps'])


def test_two_processes_want_one_folder(meta, straight, tmp_path):
    children = [start(RECIPES['steps'], meta, tmp_path/'run') for _ in range(2)]
    for c in children: c.join(300)
    assert sorted(c.exitcode for c in children) in ([0, 1], [0, 0]) # the second is refused, or came when all was done
    assert contents(tmp_path/'run') == contents(straight['steps'])


def test_the_folder_is_complete_and_nothing_else_is_touched(meta, tmp_path, no_figures):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='not empty'): train_run('quick', meta, tmp_path/'run', **QUICK)
    recipe = at_scale('quick', 'tiny')
    with no_figures():
        for _ in range(2): train_run(recipe, meta, tmp_path/'run', overwrite=True, **(QUICK | dict(report=True)))
    names = {p.name for p in (tmp_path/'run').iterdir() if not p.name.startswith('.')}
    assert names == {*RUN_FILES, 'notes.txt'}
    record = read_run(tmp_path/'run')
    assert record['recipe'] == recipe.as_dict() and record['split']['valid_fraction_with_group_in_training'] == 0
    split = pd.read_csv(tmp_path/'run'/'split.csv')
    assert set(split.image_id) == set(meta.image_id) and split.is_valid.sum() == record['scores']['n_images']


def test_factors_alone_are_the_weights(meta):
    "Without weights by frequency a class counts as its factor says, and the others once"
    from skin_lesions.classes import HAM10000
    from skin_lesions.learner import lesion_learner
    from skin_lesions.train import recipe_dataloaders, recipe_loss, split_images
    recipe, meta = replace(at_scale('flat', 'tiny'), alpha=None, factors={'nv': .5}), split_images(meta)
    expected = {c: .5 if c == 'nv' else 1. for c in HAM10000}
    assert recipe_loss(recipe, meta)['alpha'] == expected
    dls = recipe_dataloaders(recipe, meta, 32, num_workers=0, device='cpu')
    learn = lesion_learner(dls, 'test_efficientnet', pretrained=False, **recipe_loss(recipe, meta))
    assert dict(zip(dls.vocab, learn.loss_func.alpha.tolist())) == expected


def test_all_images_is_a_rule_and_no_mistake(meta):
    "Who trains on everything is not warned that validation images are in training; who brings such a split is"
    import warnings
    from skin_lesions.report import split_sentence
    from skin_lesions.split import describe_split, warn_if_leaking
    from skin_lesions.train import split_images
    everything = split_images(meta, fold=None)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warn_if_leaking(everything)
    assert split_sentence(describe_split(everything)).startswith(f'all images; {len(meta)} images for training, ')
    everything.attrs.pop('split')
    with pytest.warns(UserWarning, match='also in training'): warn_if_leaking(everything)
