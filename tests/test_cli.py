"The command line as a user meets it: a process, files, exit codes, errors."
import functools, io, json, os, re, shutil, signal, subprocess, sys, time, warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

CODES = ['akiec', 'bcc', 'bkl', 'df', 'mel', 'nv', 'vasc']
RUN_FILES = {'model.safetensors', 'bundle.json', 'run.json', 'split.csv', 'history.csv', 'predictions.csv', 'report.html'}


@pytest.fixture
def call(capsys, no_figures):
    "Run `skin_lesions ...` in this process: quick, with reports without figures; returns exit status, standard output and error stream"
    def run(*args, figures=False):
        from skin_lesions.cli import main
        with nullcontext() if figures else no_figures():
            try: status = main([str(a) for a in args])
            except SystemExit as stop: status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err
    return run


# ---- the parser

def test_help_and_wrong_arguments_load_nothing_heavy(python, tmp_path):
    (tmp_path/'table.csv').write_text('image_id\n'); (tmp_path/'a.jpg').touch()
    done = python('''
import contextlib, io, sys
from skin_lesions.cli import COMMANDS, main
commands = [func.__name__.replace('_', '-') for func in COMMANDS]
calls = [['--help'], ['--version'], *([c, '--help'] for c in commands), ['trian'], ['train', '--out'], ['paper', '--list'], ['predict'],
         ['predict', 'no.jpg'], ['predict', 'a.jpg', '--bundle', 'none'], ['app', '--bundle', 'none'], ['app', '--host', 'no host'], ['train', '--out', 'run', '--csv', 'no.csv'],
         ['train', '--out', 'run', '--recipe', 'bst'], ['train', '--out', 'run', '--set', 'size'], ['evaluate', 'table.csv', '--data', '.'],
         ['evaluate', 'table.csv', '--part', 'test'], ['stress', 'ham10000', '--only', 'blurr'], ['ensemble', 'a', 'a', '--out', 'b'], ['ensemble', 'a', 'b', '--out', 'c', '--greedy', '--out-of-fold']]
for call in calls:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
        try: status = main(call)
        except SystemExit as stop: status = stop.code
    expected = 0 if call[-1] in ('--help', '--version', '--list') else 2
    assert status==expected, (call, status, error.getvalue())
    heavy = {'torch', 'fastai', 'timm', 'matplotlib', 'sklearn', 'scipy', 'pandas', 'numpy', 'fastcore'} & set(sys.modules)
    assert not heavy, (call, heavy)
''', cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# what is wrong with a command, and a part of what is said; nothing is imported for the first ones, pandas for the others
KNOWN_AT_ONCE = [
    ('train --csv ok.csv --out run --fold 7', '--fold must be 0 to 4'), ('train --csv ok.csv --out run --fold 2 --n-folds 1', '--n-folds must be 2'),
    ('train --csv ok.csv --out run --pretrained-weights no.pth', 'no weights at no.pth'), ('train --csv ok.csv --out run --cache file', '--cache file is a file'),
    ('train --out run --label-col dx', 'give --csv too'), ('evaluate ham10000 --csv ok.csv --out folder', 'is a folder'), ('evaluate ham10000 --audit no --csv ok.csv', '--audit no'),
    ('evaluate ham10000 --prevalence 3', '--prevalence must be'), ('embed --csv ok.csv --out f.npz --arch resnet18 --bundle ham10000', '--arch and --bundle'), ('probe no.npz', 'no features at no.npz'),
    ('predict a.jpg --patients no.csv', '--patients no.csv'), ('predict a.jpg --out file/x.csv', 'nothing can be written'), ('predict a.jpg --gradcam file', '--gradcam file is a file'),
    ('predict a.jpg --engine onnxruntime --graph no.onnx', '--graph no.onnx'), ('gradcam a.jpg --out file', 'is a file'), ('gradcam a.jpg --out maps --patients no.csv', '--patients no.csv'),
    ('gradcam a.jpg --out maps --target mell', "did you mean 'mel'"), ('embed --csv ok.csv --out f.npz --arch resnet5o', "did you mean 'resnet50'"),
    ('calibrate folder --predictions no.csv', 'no.csv does not exist'), ('calibrate folder --at-most mel', 'give --sets too'), ('calibrate folder --sets .1 --at-most mel', 'CODE=FRACTION'),
    ('ensemble ok.csv a.jpg --out file/x.csv', 'nothing can be written'), ('submit ok.csv --out folder', 'is a folder'), ('export-onnx no --out x.onnx', 'no does not exist'),
    ('export-onnx ham10000 --out ok.csv', '--overwrite'), ('quantize no --images a.jpg --out x.onnx', 'no does not exist'), ('quantize ham10000 --images a.jpg --out x.onnx', '--data or --csv'),
    ('sign no --key file', 'no is no folder'), ('verify folder --key no', '--key no'), ('app --port 0 --max-mb 0', 'max_mb must be'), ('app --port 0 --max-images 100', 'not above per_minute'),
    ('paper --data no', '--data no'), ('paper --fold 9', '--fold must be'), ('paper --out file/x', 'nothing can be written'), ('reproduce-bundle --data no', '--data no'),
    ('demo --out file/x', 'nothing can be written'), ('audit a.jpg --features file/x', 'nothing can be written')]
KNOWN_FROM_A_TABLE = [(f'{command} {where}', said) for command in ('train --out run', 'evaluate ham10000', 'stress ham10000', 'embed --out f.npz', 'quantize ham10000 --images a.jpg --out x.onnx')
                      for where, said in (('--csv bare.csv', '--label-col'), ('--csv ok.csv --image-col nono', "lacks column 'nono'"), ('--csv ok.csv --group-col nono', "lacks column 'nono'"),
                                          ('--csv ok.csv --classes NOPE', "unknown class set 'NOPE'"), ('--csv ok.csv --classes MELANOMA', 'line 2'), ('--data folder', 'no known collection'))]
KNOWN_FROM_A_TABLE += [('train --csv ok.csv --out file/run', 'nothing can be written'), ('stress ham10000 --csv ok.csv --out file', 'is a file'),
                       ('embed --csv ok.csv --out file/f.npz', 'nothing can be written'), ('benefit no.csv --prevalence .1', 'no.csv does not exist')]


def test_what_is_known_from_a_name_or_a_header_is_said_before_anything_is_loaded(python, tmp_path):
    "No network, and no library that takes seconds, for an error in an option"
    (tmp_path/'bare.csv').write_text('image_id,foo\na,b\n'); (tmp_path/'ok.csv').write_text('image_id,dx\na,bkl\n')
    for name in ('a.jpg', 'file'): (tmp_path/name).touch()
    (tmp_path/'folder').mkdir()
    done = python(f"""
import contextlib, io, sys
from skin_lesions.cli import main
def check(commands, heavy):
    for command, said in commands:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error: status = main(command.split())
        assert status==2 and said in error.getvalue(), (command, status, error.getvalue())
        assert not heavy & set(sys.modules), (command, heavy & set(sys.modules))
slow = {{'torch', 'fastai', 'timm', 'matplotlib', 'sklearn', 'scipy'}}
check({KNOWN_AT_ONCE!r}, slow | {{'pandas', 'numpy'}})
check({KNOWN_FROM_A_TABLE!r}, slow)
""", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.jpg', 'bare.csv', 'file', 'folder', 'ok.csv'], 'nothing else is left behind'


def test_one_flag_has_one_meaning():
    "An option of one name has values of one kind in all commands, and where it says what the data or the bundle is, one text"
    import inspect
    from typing import get_args, get_origin
    from fastcore.docments import docments
    from skin_lesions.cli import COMMANDS
    kinds = {}
    for func in COMMANDS:
        for name, param in inspect.signature(func).parameters.items():
            kind = get_args(param.annotation)[0] if get_origin(param.annotation) is tuple else param.annotation
            kinds.setdefault(name, set()).add(kind)
    # the views of predict are the same, and one or auto: it has a default of its own
    several = {name: kind for name, kind in kinds.items() if len(kind) > 1}
    assert set(several) <= {'views'} and len({frozenset(get_args(k)) - {'auto', 'one'} for k in several.get('views', ())}) <= 1
    for name in ('views', 'patients', 'bundle', 'device', 'n_folds', 'set_', 'csv', 'part'):
        texts = {docments(func)[name].split(';')[0].split(',')[0] for func in COMMANDS if name in inspect.signature(func).parameters
                 and inspect.signature(func).parameters[name].annotation is not bool and inspect.signature(func).parameters[name].kind is inspect.Parameter.KEYWORD_ONLY}
        assert len(texts) == 1, (name, texts)


def test_choices_are_the_library_s():
    from typing import get_args
    from skin_lesions import cli
    from skin_lesions.gradcam import METHODS, STAGES
    from skin_lesions.recipes import CHOICES, SCALES
    from skin_lesions.robustness import CHANGES
    from skin_lesions.views import VIEWS
    kinds = cli.gradcam.__annotations__
    assert get_args(cli.Views) == (*VIEWS, 'recipe') and get_args(cli.Scale) == tuple(SCALES) and get_args(cli.Rule) == CHOICES['rule']
    assert get_args(kinds['method']) == METHODS and get_args(kinds['stage']) == STAGES
    assert get_args(cli.Change) == tuple(CHANGES)


def test_an_architecture_that_timm_has_is_not_refused_before_timm_is_asked():
    "Any name and any older one; what is offered for a wrong one is what timm itself would offer"
    import timm
    from timm.models._registry import _model_entrypoints
    from skin_lesions.architectures import check_arch
    from skin_lesions.cli import check_known_arch
    names = [*timm.list_models()[::300], *sorted(set(_model_entrypoints)-set(timm.list_models()))[::60], 'resnet50.a1_in1k']
    assert len(names) > 8
    for name in [*names, 'hf-hub:timm/resnet18.a1_in1k']: check_known_arch(name)
    said = []
    for check in (check_known_arch, check_arch):
        with pytest.raises(ValueError) as e: check('tf_efficientnet_light0')
        said.append(str(e.value))
    assert said[0] == said[1] and 'tf_efficientnet_lite0' in said[0]


def test_an_abbreviated_flag_is_refused(call):
    status, _, error = call('train', '--ou', 'run')
    assert status == 2 and '--out' in error


def test_paper_hands_its_runs_to_a_pool(call, tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor
    from skin_lesions import experiments
    closed = []
    class Pool(ThreadPoolExecutor):
        def close(self): closed.append(self._max_workers)
    def fake(recipe, seed, **options):
        if seed == 2: raise ValueError('the disk is full')
        if seed == 3: raise BlockingIOError
        return dict(accuracy=.5, average_recall=.4, new=True)
    monkeypatch.setattr(experiments, 'LocalPool', Pool)
    monkeypatch.setattr(experiments, 'run_recipe', fake)
    run = ('paper', '--recipe', 'base', '--split', 'lesion', '--out', tmp_path)
    status, printed, error = call(*run, '--seed', 1, 2, 3, '--jobs', 2)
    assert status == 1 and closed == [2] and '[1/3] base, by lesion, fold 0, seed 1: accuracy 0.500' in printed
    assert 'seed 2: the disk is full' in error and '1 runs failed' in error and '1 runs are with other processes' in error
    assert call(*run, '--seed', 1)[0] == 0 and closed == [2], 'one after another needs no pool'
    status, _, error = call(*run, '--slurm', 'timeout_min')
    assert status == 2 and 'KEY=VALUE' in error
    given = {}
    monkeypatch.setattr(experiments, 'slurm_pool', lambda folder, **parameters: given.update(parameters, folder=folder) or ThreadPoolExecutor(1))
    assert call(*run, '--seed', 1, '--slurm', 'timeout_min=600', '--slurm', 'slurm_partition=night')[0] == 0
    assert given == dict(timeout_min=600, slurm_partition='night', folder=tmp_path/'slurm')


def test_the_paper_s_recipes_are_listed(call):
    status, listed, _ = call('paper', '--recipe', 'all', '--list')
    from skin_lesions.recipes import RECIPES
    assert len({line.index(RECIPES[line.split()[0]].about) for line in listed.splitlines()}) == 1, 'one column'
    assert status == 0 and 'two_stage_efficientnet_mixup' in listed and listed.splitlines()[0].startswith('best ')


# ---- train

def test_train_writes_a_complete_run(finished_run):
    assert {p.name for p in finished_run.iterdir() if not p.name.startswith('.')} == RUN_FILES
    record = json.loads((finished_run/'run.json').read_text())
    table, split = pd.read_csv(finished_run/'predictions.csv'), pd.read_csv(finished_run/'split.csv')
    assert set(table.image_id) == set(split.image_id[split.is_valid])
    np.testing.assert_allclose(table[CODES].sum(axis=1), 1, atol=1e-5)
    by_hand = np.mean([(table[table.dx == c][CODES].to_numpy().argmax(1) == CODES.index(c)).mean() for c in CODES])
    assert record['scores']['average_recall'] == pytest.approx(by_hand, abs=1e-9)
    assert not set(split.group[split.is_valid]) & set(split.group[~split.is_valid])
    assert len(pd.read_csv(finished_run/'history.csv')) == 2
    assert record['versions']['torch'] and record['complete'] and record['recipe']['arch'] == 'test_efficientnet'


def test_report_needs_no_other_file_and_no_network(finished_run):
    text = (finished_run/'report.html').read_text()
    assert 'not a medical device' in text
    assert 'by lesion, fold 0 of 5' in text and '&quot;rule&quot;' not in text and '"rule"' not in text
    assert 'src="data:image/png;base64,' in text or '<svg' in text
    for outside in ('src="http', "src='http", '<link', '@import', '<script src'): assert outside not in text


def test_same_seed_same_result(sample, finished_run, call, small, tmp_path):
    assert call('train', '--data', sample, '--out', tmp_path/'again', *small, '--set', 'epochs=2')[0] == 0
    a, b = pd.read_csv(finished_run/'predictions.csv'), pd.read_csv(tmp_path/'again'/'predictions.csv')
    pd.testing.assert_frame_equal(a, b, rtol=1e-5, atol=1e-6)


def test_ctrl_c_keeps_what_was_learnt(sample, processes, small, tmp_path):
    command = ['-m', 'skin_lesions.cli', 'train', '--data', sample, '--out', 'run', *small, '--set', 'epochs=400']
    with open(tmp_path/'log', 'w') as log: process = processes.start(*command, cwd=tmp_path, out=log, err=log)
    for _ in range(4000): # a busy machine imports for minutes
        histories = list((tmp_path/'run').rglob('*.csv'))
        if process.poll() is not None or any(len(f.read_text().splitlines()) > 3 for f in histories): break # the third row: two epochs are done
        time.sleep(.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, (tmp_path/'log').read_text()
    log = (tmp_path/'log').read_text()
    assert 'what was learnt so far is in' in log and 'Traceback' not in log
    record = json.loads((tmp_path/'run'/'run.json').read_text())
    assert not record['complete'] and record['epochs_done'] >= 2


@pytest.mark.parametrize('change, expected', [
    ('gamma=-1', 'gamma'),
    ('arch=efficientnet_lite_O', 'did you mean'),
    ('epochs=0', 'epochs'),
    ('mixup=1.5', '1.5'),
    ('size=0', 'size'),
    ('bs=0', 'bs'),
    ('stages=3', 'stages'),
    ('archh=x', "did you mean 'arch'"),
    ('size', 'FIELD=VALUE'),
])
def test_a_wrong_recipe_gets_one_clear_line(change, expected, sample, call, small, tmp_path):
    status, _, error = call('train', '--data', sample, '--out', tmp_path/'run', '--no-check', *small, '--set', change)
    assert status == 2 and expected in error and error.count('\n') == 1, error


def test_factors_without_class_weights(sample, call, small, tmp_path):
    status, _, error = call('train', '--data', sample, '--out', tmp_path/'run', *small, '--set', 'alpha=none', '--set', 'factors=nv=.5', '--set', 'epochs=1')
    assert status == 0, error
    recipe = json.loads((tmp_path/'run'/'run.json').read_text())['recipe']
    assert (recipe['alpha'], recipe['factors']) == (None, {'nv': .5})


@pytest.mark.parametrize('flags, expected', [
    (('--fold', '9'), 'fold'),
    (('--pretrained-weights', 'nowhere.pth'), 'no weights at'),
    (('--csv', 'x.csv'), 'x.csv'),
    (('--part', 'tset'), 'tset'),
])
def test_wrong_options_get_one_clear_line(flags, expected, sample, call, small, tmp_path):
    status, _, error = call('train', '--data', sample, '--out', tmp_path/'run', '--no-check', *small, *flags)
    assert status == 2 and expected in error and error.count('\n') == 1, error


def test_an_error_in_a_real_process_is_no_traceback(sample, cli, small, tmp_path):
    done = cli('train', '--data', sample, '--out', 'run', *small, '--set', 'gamma=-1', cwd=tmp_path)
    assert done.returncode == 2 and 'gamma' in done.stderr and 'Traceback' not in done.stderr, done.stderr


def test_bad_folders(call, small, sample, tmp_path):
    (tmp_path/'empty').mkdir()
    status, _, error = call('train', '--data', tmp_path/'empty', '--out', tmp_path/'run', *small)
    assert status == 2 and str(tmp_path/'empty') in error
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'thesis.txt').write_text('mine')
    status, _, error = call('train', '--data', sample, '--out', tmp_path/'full', *small)
    assert status == 2 and 'not empty' in error and 'overwrite' in error
    assert (tmp_path/'full'/'thesis.txt').read_text() == 'mine'


def test_a_text_file_named_jpg(call, small, sample, finished_run, tmp_path):
    data = tmp_path/'data'
    shutil.copytree(sample, data)
    bad = next(data.rglob('*.jpg'))
    bad.write_text('not an image')
    status, _, error = call('train', '--data', data, '--out', tmp_path/'run', *small)
    assert status == 2 and bad.name in error, error
    status, _, error = call('predict', bad, '--bundle', finished_run)
    assert status == 2 and bad.name in error, error
    assert call('train', '--data', data, '--out', tmp_path/'run2', '--drop-bad', *small, '--set', 'epochs=1')[0] == 0
    assert bad.stem not in set(pd.read_csv(tmp_path/'run2'/'split.csv').image_id)


def test_a_table_of_one_s_own_trains_and_is_scored(sample, call, small, tmp_path):
    "Eight classes of another set, the table's own column of folds"
    from skin_lesions.readers import read_metadata
    meta = read_metadata(sample)
    own = pd.DataFrame(dict(file=meta.path, label=meta.dx.map({'akiec': 'ak'}).fillna(meta.dx), patient=meta.group, fold=pd.factorize(meta.group)[0] % 3))
    own.to_csv(tmp_path/'own.csv', index=False)
    columns = ('--csv', tmp_path/'own.csv', '--image-col', 'file', '--label-col', 'label', '--group-col', 'patient', '--classes', 'ISIC2019')
    status, printed, error = call('train', *columns, '--fold-col', 'fold', '--fold', 1, '--out', tmp_path/'run', *small, '--set', 'epochs=1')
    assert status == 0, error
    record = json.loads((tmp_path/'run'/'run.json').read_text())
    assert record['classes'] == ['ak', 'bcc', 'bkl', 'df', 'mel', 'nv', 'scc', 'vasc']
    split = pd.read_csv(tmp_path/'run'/'split.csv')
    assert split.is_valid.sum() == (own.fold == 1).sum()
    status, again, error = call('evaluate', tmp_path/'run', *columns, '--quiet')
    assert status == 0 and again.splitlines()[0] == printed.splitlines()[0], error


# ---- audit

@pytest.fixture
def other_names(sample, tmp_path):
    "Two images of the sample under other names, one mirrored, and a file that is no image"
    from PIL import Image, ImageOps
    files = sorted(Path(sample).rglob('ISIC*.jpg'))[:2]
    folder = tmp_path/'others'
    folder.mkdir()
    for i, change in enumerate((ImageOps.mirror, lambda image: image)):
        change(Image.open(files[i])).save(folder/f'other_{i}.png')
    (folder/'bad.jpg').write_bytes(b'no image')
    return folder


def test_audit_names_pairs_and_bad_files(call, sample, other_names, tmp_path):
    status, printed, error = call('audit', other_names, sample, '--out', tmp_path/'audit', '--features', tmp_path/'features', '--quiet')
    assert status == 0 and printed.startswith('compared 2 images with') and '1 unreadable files left out' in error and 'bad.jpg' in error
    pairs = pd.read_csv(tmp_path/'audit'/'overlap.csv')
    first = pairs[pairs.same].drop_duplicates('image_a')
    expected = [p.stem for p in sorted(Path(sample).rglob('ISIC*.jpg'))[:2]]
    assert sorted(zip(first.image_a, first.image_b)) == [('other_0', expected[0]), ('other_1', expected[1])]
    assert (tmp_path/'audit'/'overlap.html').read_text().count('<img') == 2*len(pairs)
    assert any((tmp_path/'features').rglob('*.npy'))


@pytest.mark.parametrize('args, message', [
    (['a', 'a', 'a'], 'audit compares one collection with itself or two with each other, got 3'),
    (['nowhere'], 'nowhere does not exist; give a folder of images')])
def test_audit_errors(call, args, message):
    status, _, error = call('audit', *args)
    assert status == 2 and message in error


def test_evaluate_says_which_images_were_trained_on(call, finished_run, tmp_path):
    from PIL import Image, ImageOps
    split = pd.read_csv(finished_run/'split.csv')
    seen = split[split.is_valid].path.iloc[0]
    (tmp_path/'training').mkdir()
    ImageOps.mirror(Image.open(seen)).save(tmp_path/'training'/'renamed.png')
    status, _, error = call('evaluate', finished_run, '--audit', tmp_path/'training', '--out', tmp_path/'r.html', '--quiet')
    assert status == 0 and 'scored images show a photograph of' in error and Path(seen).stem in error
    status, _, error = call('evaluate', finished_run/'predictions.csv', '--audit', tmp_path/'training')
    assert status == 2 and 'has no images that --audit could compare' in error
    status, _, error = call('evaluate', finished_run, '--audit', tmp_path/'nowhere')
    assert status == 2 and 'nowhere: no such file' in error


# ---- evaluate

def test_evaluate_prints_what_train_printed(finished_run, call, tmp_path):
    record = json.loads((finished_run/'run.json').read_text())
    status, printed, error = call('evaluate', finished_run, '--out', tmp_path/'r.html', figures=True)
    assert (status, error) == (0, '')
    assert f"average recall {record['scores']['average_recall']:.3f}" in printed
    assert (tmp_path/'r.html').stat().st_size > 10_000
    status, table_printed, _ = call('evaluate', finished_run/'predictions.csv', '--out', tmp_path/'t.html')
    assert status == 0 and table_printed.splitlines()[:2] == printed.splitlines()[:2]


def test_evaluate_leaves_out_what_was_trained_on(sample, finished_run, call, tmp_path):
    status, printed, error = call('evaluate', finished_run, '--data', sample, '--out', tmp_path/'r.html', '--quiet')
    split = pd.read_csv(finished_run/'split.csv')
    assert status == 0 and f'{(~split.is_valid).sum()} of {len(split)} images left out' in error, error
    # the same for a bundle that was copied alone
    (tmp_path/'b').mkdir()
    for name in ('model.safetensors', 'bundle.json'): shutil.copy(finished_run/name, tmp_path/'b')
    status, alone, error = call('evaluate', tmp_path/'b', '--data', sample, '--out', tmp_path/'r.html', '--quiet')
    assert status == 0 and alone == printed and 'images left out' in error


@pytest.mark.parametrize('given', [(), ('--data',)], ids=['own', 'data'])
def test_evaluate_shows_the_worst_errors_from_the_disk(given, sample, finished_run, call, tmp_path):
    from urllib.parse import unquote
    report = tmp_path/'my reports'/'r.html'
    status, _, error = call('evaluate', finished_run, *given, *([sample] if given else []), '--out', report, '--quiet')
    assert status == 0, error
    shown = [report.parent/unquote(src) for src in re.findall('<img[^>]* src="(?!data:)(.*?)"', report.read_text())]
    table = pd.read_csv(finished_run/'predictions.csv')
    wrong = set(table.image_id[np.array(CODES)[table[CODES].to_numpy().argmax(1)] != table.dx])
    assert len(shown) == min(12, len(wrong)) > 0 and {p.stem for p in shown} <= wrong
    assert all(p.is_file() and p.resolve().is_relative_to(sample.resolve()) for p in shown)


def test_evaluate_states_the_prevalence_of_net_benefit(finished_run, call, tmp_path):
    status, _, error = call('evaluate', finished_run, '--out', tmp_path/'r.html', '--prevalence', '.08', '--quiet')
    assert status == 0 and 'Per 1,000 lesions, 80 of them malignant' in (tmp_path/'r.html').read_text(), error
    status, _, error = call('evaluate', finished_run, '--out', tmp_path/'r.html', '--prevalence', '8', '--quiet')
    assert status == 2 and '--prevalence must be above 0 and below 1, got 8' in error


def test_train_answers_about_a_folder_before_it_imports_fastai(python, sample, tmp_path):
    for folder in ('empty', 'full'): (tmp_path/folder).mkdir()
    (tmp_path/'full'/'thesis.txt').touch()
    done = python("""
import sys
from skin_lesions.cli import main
assert main(['train', '--data', 'empty', '--out', 'run']) == 2
assert main(['train', '--data', sys.argv[1], '--out', 'full']) == 2
assert not {'fastai', 'torch'} & set(sys.modules)
""", sample, cwd=tmp_path)
    assert done.returncode == 0 and 'no known collection in empty' in done.stderr, done.stderr
    assert 'full exists and is not empty' in done.stderr and '--resume' in done.stderr and '--overwrite' in done.stderr


def test_resume_says_where_nothing_is_left_and_what_differs(sample, finished_run, call, small, tmp_path):
    run = Path(shutil.copytree(finished_run, tmp_path/'run'))
    status, printed, error = call('train', '--data', sample, '--out', run, *small, '--set', 'epochs=2', '--resume')
    assert status == 0 and 'nothing is left to train' in error and printed.startswith('accuracy'), error
    status, _, error = call('train', '--data', sample, '--out', run, *small, '--set', 'epochs=3', '--resume')
    assert status == 2 and re.search(r'was 2 epochs at \d+ pixels and is 3 epochs at', error), error


def test_evaluate_after_calibrate_goes_by_the_rule(sample, finished_run, call, tmp_path):
    "Printed scores, report and the challenge's score are those of the decisions, which differ from the most probable diagnoses"
    from skin_lesions.bundle import update_bundle
    from skin_lesions.evaluate import isic_scores, scores
    from skin_lesions.predict import load_predictor
    from skin_lesions.predictions import isic_submission, read_isic_submission, read_predictions, without_decisions
    from skin_lesions.readers import read_metadata
    run = Path(shutil.copytree(finished_run, tmp_path/'run'))
    assert call('calibrate', run, '--rule', 'prior')[0] == 0
    # the network has hardly learnt and names one class; a prior of its usual answer lets all be named
    fitted = load_predictor(run)
    usual = fitted.calibration.calibrate(read_predictions(run/'predictions.csv'), overlap='ignore')[CODES].median()
    update_bundle(run, rule=replace(fitted.rule, prior=(usual/usual.sum()).to_dict(), t=1.))
    status, printed, error = call('evaluate', run, '--data', sample, '--out', tmp_path/'r.html', '--quiet')
    assert status == 0, error
    split = pd.read_csv(run/'split.csv')
    meta = read_metadata(sample)
    table = load_predictor(run).predict(meta[meta.image_id.isin(split.image_id[split.is_valid])], progress=False)
    decided = table.decision.where(table.decision.notna(), np.array(CODES)[table[CODES].to_numpy().argmax(1)])
    by_hand = np.mean([(decided[table.dx == c] == c).mean() for c in CODES if (table.dx == c).any()])
    most_probable = scores(without_decisions(table), warn=False)['average_recall']
    assert abs(by_hand-most_probable) > .001, 'the rule changes the score here'
    assert f'average recall {by_hand:.3f}' in printed and f'average recall {most_probable:.3f}' not in printed.split('\n')[0]
    assert f'{by_hand:.3f}' in (tmp_path/'r.html').read_text(encoding='utf-8')
    assert isic_scores(table).balanced_accuracy == pytest.approx(by_hand)
    submitted = read_isic_submission(isic_submission(table, tmp_path/'s.csv')).assign(dx=table.dx.to_numpy())
    assert isic_scores(submitted).balanced_accuracy == pytest.approx(by_hand)


@pytest.mark.parametrize('part', ['validation', 'test'])
def test_evaluate_on_a_part_of_the_challenge(sample, finished_run, call, tmp_path, part):
    "A bundle against the folder that the organisers hand out"
    from skin_lesions.classes import HAM10000
    from skin_lesions.readers import read_metadata
    meta = read_metadata(sample).groupby('dx').head(2)
    names = [f'ISIC_{34600+i:07}' for i in range(len(meta))]
    for kind, some in (('Validation', slice(0, None, 2)), ('Test', slice(1, None, 2))):
        folder, columns = tmp_path/'data'/f'ISIC2018_Task3_{kind}_Input', list(HAM10000.challenge_columns.values())
        folder.mkdir(parents=True)
        for name, path in zip(names[some], meta.path[some]): shutil.copy(path, folder/f'{name}.jpg')
        hot = [[float(HAM10000.challenge_columns[dx] == c) for c in columns] for dx in meta.dx[some]]
        truth = pd.DataFrame(hot, columns=columns)
        truth.insert(0, 'image', names[some])
        (tmp_path/'data'/f'ISIC2018_Task3_{kind}_GroundTruth').mkdir()
        truth.to_csv(tmp_path/'data'/f'ISIC2018_Task3_{kind}_GroundTruth'/f'ISIC2018_Task3_{kind}_GroundTruth.csv', index=False)
    (tmp_path/'bundle').mkdir()
    for name in ('model.safetensors', 'bundle.json'): shutil.copy(finished_run/name, tmp_path/'bundle')
    status, printed, error = call('evaluate', tmp_path/'bundle', '--data', tmp_path/'data', '--part', part, '--out', tmp_path/'r.html', '--quiet')
    assert status == 0 and f'{len(meta)//2} images' in printed, printed + error
    assert (tmp_path/'r.html').is_file()


def test_evaluate_with_views_predicts_the_validation_images(finished_run, call, tmp_path):
    status, printed, error = call('evaluate', finished_run, '--views', 'dihedral', '--out', tmp_path/'r.html', '--quiet')
    assert status == 0 and f"{len(pd.read_csv(finished_run/'predictions.csv'))} images" in printed, error


# ---- predict

def test_predict_gives_the_run_s_own_probabilities(sample, finished_run, call, tmp_path):
    table = pd.read_csv(finished_run/'predictions.csv').set_index('image_id')
    (tmp_path/'new').mkdir()
    ids = list(table.index[:5])
    for i in ids: shutil.copy(next(sample.rglob(f'{i}.jpg')), tmp_path/'new')
    status, printed, error = call('predict', tmp_path/'new', '--bundle', finished_run, '--out', tmp_path/'out.csv')
    assert status == 0 and 'not a medical device' in error and 'not a medical device' not in printed, error
    found = pd.read_csv(tmp_path/'out.csv').set_index('image_id')
    np.testing.assert_allclose(found.loc[ids, CODES], table.loc[ids, CODES], atol=1e-5)
    files = sorted((tmp_path/'new').iterdir())
    status, one, error = call('predict', files[0], '--bundle', finished_run)
    assert one.count('%  ') == 7 and 'melanoma' in one and 'FutureWarning' not in error
    assert call('predict', *files, '--bundle', finished_run, '--out', tmp_path/'files.csv')[0] == 0
    assert (tmp_path/'files.csv').read_text() == (tmp_path/'out.csv').read_text()


def test_predict_takes_an_engine(call, finished_run, sample, tmp_path, monkeypatch):
    from skin_lesions import engine
    given, file = [], next(sample.rglob('*.jpg'))
    record = dict(n_images=50, float32=dict(macro_auc=.9), int8=dict(macro_auc=.899))
    def with_engine(predictor, file):
        given.append((predictor.device.type, file))
        predictor.network.int8 = record if file else None
        return predictor
    monkeypatch.setattr(engine, 'with_engine', with_engine)
    run, graph = ('predict', file, '--bundle', finished_run), tmp_path/'net.onnx'
    graph.touch()
    status, _, error = call(*run, '--engine', 'onnxruntime')
    assert status == 0 and 'int8' not in error and given == [('cpu', None)]
    status, _, error = call(*run, '--engine', 'onnxruntime', '--graph', graph)
    assert status == 0 and given[1:] == [('cpu', str(graph))]
    assert 'int8: against float32 on 50 labelled images, macro auc 0.900 -> 0.899' in error
    assert call(*run)[0] == 0 and len(given) == 2
    status, _, error = call(*run, '--graph', graph)
    assert status == 2 and '--engine onnxruntime' in error


def test_quantize_compares_on_the_run_s_own_validation_images(call, finished_run, sample, tmp_path, monkeypatch):
    from skin_lesions import quantize
    given, image = [], next(sample.rglob('*.jpg'))
    def fake(predictor, images, held_out, file, **options):
        given.append((list(map(str, images)), set(held_out.image_id), file, options['overwrite']))
        return dict(n_images=9, float32=dict(macro_auc=.9), int8=dict(macro_auc=.899), decisions_changed=.02, flags_changed=.01)
    monkeypatch.setattr(quantize, 'quantize', fake)
    run = ('quantize', finished_run, '--images', image, '--out', tmp_path/'net.onnx', '--quiet')
    status, printed, error = call(*run)
    assert status == 0 and 'macro auc on 9 images: float32 0.9000, int8 0.8990' in printed and '2.0%' in printed, error
    assert given == [([str(image)], set(pd.read_csv(finished_run/'predictions.csv').image_id), str(tmp_path/'net.onnx'), False)]
    status, _, error = call('quantize', 'ham10000', *run[2:])
    assert status == 2 and '--data or --csv' in error and len(given) == 1


def test_an_out_of_distribution_image_is_named(sample, finished_run, call, tmp_path):
    from PIL import Image
    from skin_lesions.synthetic import draw_non_lesion
    (tmp_path/'new').mkdir()
    for kind in ('noise', 'text'): Image.fromarray(draw_non_lesion(kind, 0, size=(300, 225))).save(tmp_path/'new'/f'{kind}.png')
    lesion = pd.read_csv(finished_run/'predictions.csv').image_id[0]
    shutil.copy(next(sample.rglob(f'{lesion}.jpg')), tmp_path/'new')
    status, _, error = call('predict', tmp_path/'new', '--bundle', finished_run, '--out', tmp_path/'out.csv', '--gradcam', tmp_path/'maps', '--quiet')
    assert status == 0 and '2 of 3 images do not look like dermatoscopic images, their probabilities mean nothing: noise, text' in error, error
    assert {p.name for p in (tmp_path/'maps').iterdir()} == {'gallery.html', 'noise_gradcam.png', 'text_gradcam.png', f'{lesion}_gradcam.png'}
    gallery = (tmp_path/'maps'/'gallery.html').read_text()
    assert gallery.count('does not look like a dermatoscopic image') == 2
    table = pd.read_csv(tmp_path/'out.csv').set_index('image_id')
    assert table.ood.to_dict() == {'noise': True, 'text': True, lesion: False}
    status, printed, error = call('predict', tmp_path/'new'/'noise.png') # the network of the package, which decides and refers
    assert status == 0 and printed.startswith('This does not look like a dermatoscopic image.') and 'mean nothing for this image' in printed, error
    assert 'Suggests' not in printed and 'refer' not in printed


def test_names_that_the_output_cannot_write(finished_run, sample, tmp_path, monkeypatch):
    "A Windows shell that is sent to a file writes in a code page of 256 characters; Linux is told to"
    (tmp_path/'new').mkdir()
    shutil.copy(next(sample.rglob('*.jpg')), tmp_path/'new'/'ä中.jpg')
    monkeypatch.chdir(tmp_path)
    for name in ('stdout', 'stderr'): monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), 'cp1252'))
    from skin_lesions.cli import main
    status, printed = main(['predict', 'new', '--bundle', str(finished_run), '--out', '中.csv']), sys.stdout.buffer
    sys.stdout.flush()
    assert status == 0 and printed.getvalue().decode('cp1252').startswith('1 predictions: \\u4e2d.csv')
    assert list(pd.read_csv(tmp_path/'中.csv', encoding='utf-8').image_id) == ['ä中']


def test_predict_names_unreadable_files_and_goes_on(sample, call, finished_run, tmp_path):
    (tmp_path/'in').mkdir()
    shutil.copy(next(sample.rglob('*.jpg')), tmp_path/'in'); (tmp_path/'in'/'bad.jpg').write_text('not an image')
    status, _, error = call('predict', tmp_path/'in', '--bundle', finished_run, '--out', tmp_path/'o.csv', '--quiet')
    assert status == 0 and '1 of 2 images left out: bad.jpg: not an image' in error, error
    assert len(pd.read_csv(tmp_path/'o.csv')) == 1
    status, printed, error = call('predict', tmp_path/'in', '--bundle', finished_run, '--quiet')
    lines = printed.splitlines()
    bad, = [line for line in lines if line.startswith(str(tmp_path/'in'/'bad.jpg'))]
    assert status == 0 and len(lines) == 2 and 'cannot be used' in bad, 'which of the two is said, though one is answered'


def test_a_reason_is_said_once_for_all_its_files():
    from skin_lesions.cli import reasons_by_file
    assert reasons_by_file(['a.heic: needs a package: pip', 'b.dcm: empty', 'c.heic: needs a package: pip']) == 'a.heic, c.heic: needs a package: pip; b.dcm: empty'


def test_predict_answers_for_programs_and_through_a_pipe(call, tmp_path, monkeypatch):
    "JSON and CSV with file, full names and rounded numbers; patterns, names and an image through standard input; no file is skipped silently"
    from PIL import Image
    from skin_lesions.classes import HAM10000
    from skin_lesions import cli
    from skin_lesions.decide import answer_in_words
    from skin_lesions.predict import load_predictor
    from skin_lesions.synthetic import draw_image
    monkeypatch.setattr(cli, 'open_bundle', functools.cache(cli.open_bundle)) # four networks, read once for all calls
    for name in ('pillow_heif', 'pydicom'): monkeypatch.setitem(sys.modules, name, None) # not installed
    folder = tmp_path/'in'; folder.mkdir()
    for i in range(2): Image.fromarray(draw_image('nv', i, i, size=(300, 225))[0]).save(folder/f'{i}.png')
    (folder/'phone.HEIC').write_bytes(b'\0\0\0\x18ftypheic' + bytes(99)); (folder/'scan.dcm').write_bytes(bytes(128) + b'DICM' + bytes(9))
    warnings.simplefilter('default') # whatever those who came before have set
    frames = [Image.new('L', (60, 45), v) for v in (0, 99)]
    frames[0].save(folder/'moving.gif', save_all=True, append_images=frames[1:]); (folder/'raw.NEF').touch()
    status, printed, error = call('predict', folder, '--json', '--device', 'cpu')
    found = json.loads(printed)
    assert status == 0 and [Path(r['file']).name for r in found] == ['0.png', '1.png', 'moving.gif', 'phone.HEIC', 'scan.dcm']
    assert 'moving.gif: several images in one file' in error and 'kinds that are not read' in error and 'raw.NEF' in error
    found.pop(2)
    assert '3 of 5 images left out' in error and 'pip install pillow-heif' in found[2]['note'] and 'pip install pydicom' in found[3]['note']
    packaged = load_predictor('ham10000', 'cpu')
    expected, classes = packaged.predict(folder/'1.png'), packaged.classes
    p = expected.loc[0, list(classes)].astype(float)
    assert found[1]['probabilities'] == {classes.full_name(c): round(p[c], 4) for c in classes}
    views = packaged.predict(folder/'1.png', views=packaged.recipe_views)
    words, alone = (answer_in_words(table.iloc[0], classes, referral=packaged.referral, sets=packaged.sets) for table in (expected, views))
    assert (found[1]['finding'], found[1]['advice']) == (words.finding, words.advice), 'the words of the web demo'
    single = call('predict', folder/'1.png')[1]
    assert single.startswith(f'{alone}\n\n'), 'a single image is looked at in several views'
    lines = call('predict', folder, '--device', 'cpu')[1].splitlines()
    assert [l.split('  ')[-1].strip() for l in lines if 'moving.gif' not in l] == [r['finding'] or r['advice'] for r in found]
    assert found[1]['malignant'] == round(p[list(classes.malignant)].sum(), 4) and found[1]['decision'] == expected.decision[0]
    status, printed, _ = call('predict', folder/'*.png', '--as-csv')
    table = pd.read_csv(io.StringIO(printed))
    assert table.file.tolist() == [r['file'] for r in found[:2]] and table.melanoma.tolist() == [r['probabilities']['melanoma'] for r in found[:2]]
    through = lambda data: monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=io.BytesIO(data)))
    through(''.join(f"{r['file']}\n" for r in found[:2]).encode())
    assert call('predict', '-', '--as-csv')[1] == printed
    through((folder/'1.png').read_bytes())
    assert call('predict', '-')[1] == single
    through(b'')
    assert call('predict', '-')[0] == 2
    through((folder/'1.png').read_bytes())
    assert 'save it and name it' in call('predict', '-', '--gradcam', tmp_path/'maps')[2] and not (tmp_path/'maps').exists()
    assert 'no device cuda:77' in call('predict', folder/'1.png', '--device', 'cuda:77')[2] and 'unknown device' in call('predict', folder/'1.png', '--device', 'gpu')[2]


def warns(
    *,
    overwrite:bool=False, # replace a file
)->int:
    "Warn, then fail"
    warnings.warn('a.csv exists; overwrite=True replaces it')
    warnings.warn('call another function', FutureWarning)
    raise ValueError('give overwrite=')


def test_warnings_and_errors_speak_to_someone_at_a_shell(call, monkeypatch):
    from skin_lesions import cli
    monkeypatch.setattr(cli, 'COMMANDS', (warns,))
    warnings.simplefilter('default') # whatever those who came before have set
    said = 'skin_lesions warns: a.csv exists; --overwrite replaces it\nskin_lesions warns: give --overwrite\n'
    assert call('warns') == (2, '', said)


def test_an_empty_name_is_not_the_folder_one_is_in(finished_run, call, monkeypatch, sample):
    monkeypatch.chdir(sample)
    for args in (('predict', '', '--bundle', finished_run), ('predict', ''), ('gradcam', '', '--bundle', finished_run, '--out', 'maps')):
        status, _, error = call(*args)
        assert status == 2 and 'is empty' in error, error
    assert not (sample/'maps').exists()


def test_a_bundle_that_cannot_be_used(call, finished_run, sample, tmp_path):
    image = next(sample.rglob('*.jpg'))
    (tmp_path/'x').mkdir()
    status, _, error = call('predict', image, '--bundle', tmp_path/'x')
    assert status == 2 and 'bundle.json' in error, error
    broken = Path(shutil.copytree(finished_run, tmp_path/'broken'))
    (broken/'bundle.json').write_text('{"format":')
    status, _, error = call('predict', image, '--bundle', broken)
    assert status == 2 and 'damaged' in error, error
    other = Path(shutil.copytree(finished_run, tmp_path/'other'))
    record = json.loads((other/'bundle.json').read_text())
    record['network']['arch'] = 'test_resnet'
    (other/'bundle.json').write_text(json.dumps(record))
    status, _, error = call('predict', image, '--bundle', other)
    assert status == 2 and 'not fit' in error, error


@pytest.mark.parametrize('name', ['ham10000', 'hf://owner/name'])
def test_a_registered_name_is_not_a_path(name, call, finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, tmp_path/'ham10000')
    before = (tmp_path/'ham10000'/'bundle.json').read_bytes()
    status, _, error = call('calibrate', name, '--predictions', finished_run/'predictions.csv')
    assert status == 2 and 'registered name' in error, error
    assert (tmp_path/'ham10000'/'bundle.json').read_bytes() == before


def test_the_bundle_of_a_run_can_be_copied_alone(sample, call, finished_run, tmp_path):
    (tmp_path/'b').mkdir()
    for name in ('model.safetensors', 'bundle.json'): shutil.copy(finished_run/name, tmp_path/'b')
    bundle, record = json.loads((tmp_path/'b'/'bundle.json').read_text()), json.loads((finished_run/'run.json').read_text())
    assert bundle['scores']['average_recall'] == record['scores']['average_recall'] and bundle['split']['rule'] == record['split']['rule']
    image = next(sample.rglob('*.jpg'))
    for run, out in ((finished_run, 'a.csv'), (tmp_path/'b', 'b.csv')): assert call('predict', image, '--bundle', run, '--out', tmp_path/out)[0] == 0
    assert (tmp_path/'a.csv').read_text() == (tmp_path/'b.csv').read_text()


# ---- Grad-CAM

def test_the_map_s_caption_says_what_predict_prints(sample, finished_run, call, tmp_path):
    "Calibrated probabilities, and a rule's decision that is not the most probable class"
    from skin_lesions.bundle import update_bundle
    from skin_lesions.decide import Calibration, decision_rule
    from skin_lesions.classes import HAM10000
    from skin_lesions.style import percent_text
    from skin_lesions.predict import load_predictor
    run, image = Path(shutil.copytree(finished_run, tmp_path/'run')), sorted(sample.rglob('*.jpg'))[0]
    own = load_predictor(run).predict(image, progress=False)[CODES].astype(float).to_numpy()[0]
    calibration = Calibration('vector', (4.,), CODES, bias=tuple(3.*(c == 'vasc') for c in CODES))
    rule = decision_rule('prior', classes='HAM10000', prior={c: .97 if c == 'vasc' else .005 for c in CODES}, t=1.)
    update_bundle(run, calibration=calibration, rule=rule)
    table = load_predictor(run).predict(image, progress=False)
    decision, p = table.decision[0], table[CODES].astype(float).iloc[0]
    assert decision != p.idxmax() and abs(p.to_numpy() - own).max() > .1 # else the test would not show the difference
    for command, flag in (('predict', '--gradcam'), ('gradcam', '--out')):
        status, printed, error = call(command, image, '--bundle', run, flag, tmp_path/command, '--quiet')
        assert status == 0, error
        gallery = (tmp_path/command/'gallery.html').read_text()
        name = HAM10000.full_name(decision)
        assert f'predicted {name} ({percent_text(p[decision])}); map: {name}' in gallery.replace('\N{NO-BREAK SPACE}', ' ')
        if command == 'predict': assert f'{percent_text(p[decision])}  {decision}' in printed and f'Suggests: {HAM10000.full_name(decision)};' in printed


def test_a_wrong_layer_is_said_before_a_prediction(sample, finished_run, call, tmp_path, monkeypatch):
    from skin_lesions.predict import Predictor
    monkeypatch.setattr(Predictor, 'predict', lambda *args, **kwargs: pytest.fail('it predicted'))
    image = sorted(sample.rglob('*.jpg'))[0]
    status, _, error = call('gradcam', image, '--bundle', finished_run, '--out', tmp_path/'maps', '--layer', 'no.layer', '--quiet')
    assert status == 2 and "unknown layer 'no.layer'" in error, error


def test_gradcam_writes_images_and_a_gallery(sample, finished_run, call, tmp_path):
    images = sorted(sample.rglob('*.jpg'))[:3]
    (tmp_path/'in').mkdir()
    for p in images: shutil.copy(p, tmp_path/'in')
    (tmp_path/'in'/'broken.jpg').write_text('not an image')
    status, _, error = call('gradcam', tmp_path/'in', '--bundle', finished_run, '--out', tmp_path/'maps', '--quiet')
    assert status == 0 and 'broken.jpg' in error, error
    assert len(list((tmp_path/'maps').rglob('*.png'))) == 3
    gallery = (tmp_path/'maps'/'gallery.html').read_text()
    assert 'not a medical device' in gallery and 'src="http' not in gallery
    status, _, error = call('gradcam', tmp_path/'in', '--bundle', finished_run, '--out', tmp_path/'maps')
    assert status == 2 and '--overwrite' in error
    status, _, error = call('gradcam', images[0], '--bundle', finished_run, '--out', tmp_path/'other', '--target', 'mell', '--quiet')
    assert status == 2 and "did you mean 'mel'" in error


def test_app_says_at_once_that_its_port_is_taken(call):
    import socket
    with socket.create_server(('127.0.0.1', 0)) as s:
        port = s.getsockname()[1]
        status, printed, error = call('app', '--port', port, '--no-browser')
    assert (status, printed) == (2, '') and f'--port {port}' in error and '0 for a free one' in error and 'starting' not in error, error


# ---- calibrate, ensemble, submit, ONNX

def test_calibrate_then_predict(sample, call, finished_run, tmp_path):
    from skin_lesions.predict import load_predictor
    from skin_lesions.predictions import read_predictions
    run = Path(shutil.copytree(finished_run, tmp_path/'run'))
    status, _, error = call('calibrate', run, '--rule', 'prior', '--refer', '.9')
    assert status == 0 and 'not a medical device' in error, error
    before, after = (json.loads((f/'bundle.json').read_text()) for f in (finished_run, run))
    assert after['ood'] == before['ood'] is not None
    predictor = load_predictor(run)
    calibration, rule = predictor.calibration, predictor.rule
    assert calibration.method.startswith('stages') and rule.name == 'prior' and predictor.referral is not None
    split = pd.read_csv(run/'split.csv')
    (tmp_path/'in').mkdir()
    for i in split.image_id[~split.is_valid][:4]: shutil.copy(next(sample.rglob(f'{i}.jpg')), tmp_path/'in')
    for bundle, out in ((run, 'new.csv'), (finished_run, 'raw.csv')): assert call('predict', tmp_path/'in', '--bundle', bundle, '--out', tmp_path/out, '--quiet')[0] == 0
    new, by_hand = read_predictions(tmp_path/'new.csv'), calibration.calibrate(read_predictions(tmp_path/'raw.csv'))
    np.testing.assert_allclose(new[CODES], by_hand[CODES], atol=1e-9)
    lesions = ~new.ood.astype(bool).to_numpy()
    assert lesions.any() and list(new.decision[lesions]) == list(np.asarray(rule.decide(by_hand))[lesions])
    assert (run/'predictions.csv').read_bytes() == (finished_run/'predictions.csv').read_bytes()
    assert call('calibrate', run, '--calibration', 'none', '--rule', 'argmax')[0] == 0
    bundle = json.loads((run/'bundle.json').read_text())
    assert bundle['calibration'] is None and bundle['referral'] is None and bundle['rule']['name'] == 'argmax'


def test_calibrate_measures_cross_fitted(call, finished_run, tmp_path):
    rng, n = np.random.default_rng(0), 700
    z = rng.normal(size=(n, 7))
    y = np.array([rng.choice(7, p=np.exp(r)/np.exp(r).sum()) for r in z])
    p = np.exp(3*z)/np.exp(3*z).sum(1, keepdims=True) # three times too sure
    table = pd.DataFrame(p, columns=CODES).assign(image_id=[f'i{i}' for i in range(n)], dx=np.array(CODES)[y], group=[f'l{i//2}' for i in range(n)])
    table.to_csv(tmp_path/'valid.csv', index=False)
    shutil.copytree(finished_run, tmp_path/'run')
    status, printed, error = call('calibrate', tmp_path/'run', '--predictions', tmp_path/'valid.csv', '--calibration', 'temperature')
    assert status == 0 and '5 parts' in printed and '350 lesions' in printed, printed + error
    temperature = float(printed.split('temperature ')[1].splitlines()[0])
    assert 2.5 < temperature < 3.5, printed
    before, after = map(float, printed.split('calibration error ')[1].splitlines()[0].split(' -> '))
    assert after < before/2, printed


def test_ensemble_and_submit(sample, call, finished_run, tmp_path):
    from skin_lesions.predictions import ensemble, read_isic_submission, read_predictions
    a = read_predictions(finished_run/'predictions.csv')
    b = a.assign(**{c: a[CODES[::-1][i]] for i, c in enumerate(CODES)}).sample(frac=1, random_state=1)
    b.to_csv(tmp_path/'b.csv', index=False)
    for how in ('arithmetic', 'geometric', 'rank'):
        assert call('ensemble', finished_run, tmp_path/'b.csv', '--how', how, '--out', tmp_path/'e.csv')[0] == 0
        np.testing.assert_allclose(read_predictions(tmp_path/'e.csv')[CODES], ensemble([a, b], how)[CODES], atol=1e-12)
    assert call('ensemble', finished_run, tmp_path/'b.csv', '--table-weights', 1, 0, '--out', tmp_path/'e.csv')[0] == 0
    np.testing.assert_allclose(read_predictions(tmp_path/'e.csv')[CODES], a[CODES], atol=1e-12)
    status, _, error = call('ensemble', finished_run, tmp_path/'b.csv', '--greedy', '--out', tmp_path/'g.csv')
    assert status == 0 and 'too good' in error
    a.iloc[:10].to_csv(tmp_path/'f0.csv', index=False); a.iloc[10:].to_csv(tmp_path/'f1.csv', index=False)
    assert call('ensemble', tmp_path/'f0.csv', tmp_path/'f1.csv', '--out', tmp_path/'f.csv')[0] == 2
    if not set(a.group[:10]) & set(a.group[10:]):
        assert call('ensemble', tmp_path/'f0.csv', tmp_path/'f1.csv', '--out-of-fold', '--out', tmp_path/'f.csv')[0] == 0
        assert set(read_predictions(tmp_path/'f.csv').image_id) == set(a.image_id)
    assert call('submit', finished_run, '--out', tmp_path/'s.csv')[0] == 0
    np.testing.assert_allclose(read_isic_submission(tmp_path/'s.csv')[CODES], a[CODES], atol=1e-12)
    (tmp_path/'in').mkdir(); shutil.copy(next(sample.rglob('*.jpg')), tmp_path/'in')
    assert call('submit', tmp_path/'in', '--bundle', finished_run, '--out', tmp_path/'s.csv', '--views', 'dihedral', '--quiet')[0] == 0
    assert len(read_isic_submission(tmp_path/'s.csv')) == 1
    (tmp_path/'in'/'bad.jpg').write_text('not an image')
    status, _, error = call('submit', tmp_path/'in', '--bundle', finished_run, '--out', tmp_path/'t.csv', '--quiet')
    assert status == 2 and 'bad.jpg' in error and not (tmp_path/'t.csv').exists()


def test_export_onnx(call, finished_run, tmp_path, monkeypatch):
    "What it is called with; what it writes is in test_onnx"
    from skin_lesions import onnx
    given, sums = [], json.loads((finished_run/'bundle.json').read_text())['sha256']
    def fake(predictor, path, **options):
        given.append((predictor.record['sha256'], path, options))
        return 3e-7
    monkeypatch.setattr(onnx, 'export_onnx', fake)
    status, printed, error = call('export-onnx', finished_run, '--out', tmp_path/'net.onnx')
    assert status == 0 and printed == f"{tmp_path/'net.onnx'}: differs from PyTorch by at most 3e-07\n" and 'not a medical device' in error
    assert call('export-onnx', finished_run, '--out', tmp_path/'net.onnx', '--overwrite')[0] == 0
    assert given == [(sums, str(tmp_path/'net.onnx'), dict(overwrite=again)) for again in (False, True)]


# ---- demo

def test_demo_from_nothing(cli, tmp_path):
    "The README's main job, with fewer images"
    done = cli('demo', '--out', 'demo', '--n-images', 64, '--epochs', 1, '--size', 64, '--quiet', cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path/'demo'/'run'/'report.html').is_file() and 'report: ' in done.stdout
    assert done.stdout.count('%  ') == 7 and 'not a medical device' in done.stderr
    again = cli('demo', '--out', 'demo', '--quiet', cwd=tmp_path)
    assert again.returncode == 2 and '--overwrite' in again.stderr


# ---- images of another collection

def test_the_diagnoses_of_another_collection_are_mapped_or_counted(capsys):
    from skin_lesions.classes import CLASS_SETS, HAM10000, classes_of, with_classes
    from skin_lesions.cli import images_to_judge, in_classes, map_entries
    milk = CLASS_SETS['MILK10K']
    meta = with_classes(pd.DataFrame(dict(image_id=[f'i{i}' for i in range(22)], dx=list(milk)*2)), milk)
    mapped = in_classes(meta, HAM10000)
    error = capsys.readouterr().err
    assert sorted(set(mapped.dx)) == CODES and len(mapped) == 14 and classes_of(mapped) == HAM10000
    assert '8 of 22 images left out' in error and 'sccka 2' in error
    mapped = in_classes(meta, HAM10000, map_entries(['sccka=akiec', 'nv = none']))
    error = capsys.readouterr().err
    assert (mapped.dx == 'akiec').sum() == 4 and 'nv' not in set(mapped.dx) and 'nv 2' in error and 'sccka' not in error
    same = with_classes(pd.DataFrame(dict(image_id=['a'], dx=['nv'])), HAM10000)
    assert in_classes(same, HAM10000) is same and capsys.readouterr().err == ''


@pytest.mark.parametrize('entries, why', [(None, r'no entry for wart; add --map CODE=CODE'), (['wart=nevus'], 'nevus'), (['mole=nv'], 'mole'), (['wart=none', 'nv=none'], 'none of the diagnoses')])
def test_maps_that_do_not_fit_are_refused(entries, why):
    from skin_lesions.classes import HAM10000, with_classes
    from skin_lesions.cli import in_classes, map_entries
    meta = with_classes(pd.DataFrame(dict(image_id=['a', 'b'], dx=['wart', 'nv'])), ['wart', 'nv'])
    with pytest.raises(ValueError, match=why): in_classes(meta, HAM10000, map_entries(entries))


def test_map_needs_other_images_and_two_codes(call, tmp_path):
    (tmp_path/'table.csv').write_text('image_id\n')
    for args, why in (((tmp_path/'table.csv', '--map', 'a=b'), 'is a table'), (('ham10000', '--map', 'a=b'), 'give --data or --csv'), (('ham10000', '--data', '.', '--map', 'ab'), '--map takes CODE=CODE')):
        status, _, error = call('evaluate', *args)
        assert status == 2 and why in error, error


def test_a_single_image_is_seen_in_the_recipe_s_views(call, finished_run, sample, tmp_path):
    "One image: the recipe's views, also in the web demo; several, or --views one: one view"
    from skin_lesions.app import diagnose
    from skin_lesions.predict import load_predictor
    run = tmp_path/'run'
    shutil.copytree(finished_run, run)
    record = json.loads((run/'bundle.json').read_text())
    record['recipe']['views'] = 'dihedral'
    (run/'bundle.json').write_text(json.dumps(record))
    files, predictor = sorted(Path(sample).rglob('*.jpg'))[:2], load_predictor(run, 'cpu')
    def shown(*args):
        status, printed, error = call('predict', *args, '--bundle', run, '--json', '--device', 'cpu')
        assert status == 0, error
        return [list(r['probabilities'].values()) for r in json.loads(printed)], error
    def expected(images, views): return predictor.predict(images, views=views, progress=False)[list(predictor.classes)].round(4).values.tolist()
    one, eight = expected(files[:1], None), expected(files[:1], 'dihedral')
    assert one != eight
    assert shown(files[0])[0] == eight and 'averaged over the views dihedral' in shown(files[0])[1]
    assert shown(files[0], '--views', 'one')[0] == one
    assert shown(*files)[0] == expected(files, None)
    table, _ = diagnose(predictor, dict(a=files[0]))
    assert np.abs(table[list(predictor.classes)].to_numpy(float) - eight).max() < 1e-4


def test_a_pipe_that_nobody_reads_is_no_error(repo, tmp_path):
    "As in `skin_lesions paper --list | head -1`"
    read, write = os.pipe()
    os.close(read)
    try: done = subprocess.run([sys.executable, '-m', 'skin_lesions.cli', 'paper', '--list'], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    finally: os.close(write)
    assert (done.returncode, done.stderr) == (141, '')
