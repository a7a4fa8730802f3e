"The command line as a user meets it: a process, files, exit codes, errors."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

CODES = ['akiec', 'bcc', 'bkl', 'df', 'mel', 'nv', 'vasc']


def test_train_writes_a_complete_run(finished_run):
    assert {p.name for p in finished_run.iterdir()} == {'model.safetensors', 'bundle.json', 'run.json', 'split.csv', 'history.csv', 'predictions.csv', 'report.html'}
    record = json.loads((finished_run/'run.json').read_text())
    table, split = pd.read_csv(finished_run/'predictions.csv'), pd.read_csv(finished_run/'split.csv')
    assert set(table.image_id) == set(split.image_id[split.is_valid])
    np.testing.assert_allclose(table[CODES].sum(axis=1), 1, atol=1e-5)
    by_hand = np.mean([(table[table.dx == c][CODES].to_numpy().argmax(1) == CODES.index(c)).mean() for c in CODES])
    assert record['scores']['average_recall'] == pytest.approx(by_hand, abs=1e-9)
    assert not set(split.group[split.is_valid]) & set(split.group[~split.is_valid])
    assert record['split']['valid_share_with_lesion_in_training'] == 0
    assert len(pd.read_csv(finished_run/'history.csv')) == 2
    assert record['versions']['torch'] and record['arguments']['seed'] == 42


def test_report_needs_no_other_file_and_no_network(finished_run):
    text = (finished_run/'report.html').read_text()
    assert 'not a medical device' in text
    assert 'by lesion, fold 0 of 5' in text and '&quot;rule&quot;' not in text and '"rule"' not in text
    assert 'src="data:image/png;base64,' in text or '<svg' in text
    for outside in ('src="http', "src='http", '<link', '@import', '<script src'): assert outside not in text


def test_same_seed_same_result(sample, finished_run, cli, small, tmp_path):
    assert cli('train', '--data', sample, '--out', tmp_path/'again', '--epochs', 2, *small, cwd=tmp_path).returncode == 0
    a, b = pd.read_csv(finished_run/'predictions.csv'), pd.read_csv(tmp_path/'again'/'predictions.csv')
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_predict_gives_the_run_s_own_probabilities(sample, finished_run, cli, tmp_path):
    table = pd.read_csv(finished_run/'predictions.csv').set_index('image_id')
    (tmp_path/'new').mkdir()
    ids = list(table.index[:5])
    for i in ids: shutil.copy(next(sample.rglob(f'{i}.jpg')), tmp_path/'new')
    done = cli('predict', finished_run, 'new', '--out', 'out.csv', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'not a medical device' in done.stderr
    found = pd.read_csv(tmp_path/'out.csv').set_index('image_id')
    np.testing.assert_allclose(found.loc[ids, CODES], table.loc[ids, CODES], atol=1e-5)
    one = cli('predict', finished_run, tmp_path/'new'/f'{ids[0]}.jpg', cwd=tmp_path)
    assert one.stdout.count('%') == 7 and 'melanoma' in one.stdout and 'FutureWarning' not in one.stderr


def test_a_picture_that_is_no_lesion_is_named(sample, finished_run, call, tmp_path):
    from PIL import Image
    from skin_lesions.ood import draw_non_lesion
    (tmp_path/'new').mkdir()
    for kind in ('noise', 'text'): Image.fromarray(draw_non_lesion(kind, 0, size=(300, 225))).save(tmp_path/'new'/f'{kind}.png')
    lesion = pd.read_csv(finished_run/'predictions.csv').image_id[0]
    shutil.copy(next(sample.rglob(f'{lesion}.jpg')), tmp_path/'new')
    status, said = call('predict', finished_run, tmp_path/'new', '--out', tmp_path/'out.csv', '--gradcam', tmp_path/'maps', '--quiet')
    assert {p.name for p in (tmp_path/'maps').iterdir()} == {'gallery.html', 'noise_gradcam.png', 'text_gradcam.png', f'{lesion}_gradcam.png'}
    assert status == 0 and '2 of 3 pictures do not look like dermatoscopic images, their probabilities mean nothing: noise, text' in said
    table = pd.read_csv(tmp_path/'out.csv').set_index('image_id')
    assert table.unusual.to_dict() == {'noise': True, 'text': True, lesion: False}
    status, said = call('predict', tmp_path/'new'/'noise.png') # the network of the package, which decides and refers
    assert status == 0 and 'noise does not look like a dermatoscopic image, its probabilities mean nothing' in said and 'decision' not in said and 'referral' not in said


def test_calibrate_leaves_the_score_of_unusual_pictures(finished_run, call, tmp_path):
    run = Path(shutil.copytree(finished_run, tmp_path/'run'))
    assert call('calibrate', run)[0] == 0
    before, after = (json.loads((f/'bundle.json').read_text()) for f in (finished_run, run))
    assert after['ood'] == before['ood'] is not None and after['calibration'] != before['calibration']


def test_evaluate_says_what_train_said(finished_run, cli, tmp_path):
    record = json.loads((finished_run/'run.json').read_text())
    done = cli('evaluate', finished_run, '--out', tmp_path/'r.html', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"average recall {record['scores']['average_recall']:.3f}" in done.stdout
    assert (tmp_path/'r.html').stat().st_size > 10_000


def test_evaluate_leaves_out_what_was_trained_on(sample, finished_run, cli, tmp_path):
    done = cli('evaluate', finished_run, '--data', sample, '--out', tmp_path/'r.html', '--quiet', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    split = pd.read_csv(finished_run/'split.csv')
    assert f'{(~split.is_valid).sum()} of {len(split)} images left out' in done.stdout


def deaf_no_more():
    "A shell's background job ignores Ctrl-C and hands that on to its children; the command under test must hear it"
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_keeps_what_was_learnt(sample, cli, small, tmp_path):
    command = [sys.executable, '-W', 'ignore', '-m', 'skin_lesions.cli', 'train', '--data', sample, '--out', 'run', '--epochs', '400', *small]
    with open(tmp_path/'log', 'w') as log: process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=log, stderr=log, preexec_fn=deaf_no_more)
    history = tmp_path/'run'/'history.csv'
    for _ in range(1200):
        if process.poll() is not None or (history.is_file() and len(history.read_text().splitlines()) > 2): break
        time.sleep(.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, (tmp_path/'log').read_text()
    said = (tmp_path/'log').read_text()
    assert 'what was learnt so far is in' in said and 'Traceback' not in said
    record = json.loads((tmp_path/'run'/'run.json').read_text())
    assert not record['complete'] and record['epochs_done'] >= 2
    done = cli('evaluate', 'run', cwd=tmp_path)
    assert done.returncode == 0 and 'average recall' in done.stdout, done.stderr


@pytest.fixture
def call(capsys):
    "Run `skin_lesions ...` in this process: quick; returns exit status and what it complained of"
    def run(*args):
        from skin_lesions.cli import main
        status = main([str(a) for a in args])
        return status, capsys.readouterr().err
    return run


@pytest.mark.parametrize('args, said', [
    (['--gamma', '-1'], 'gamma'),
    (['--arch', 'efficientnet_lite_O'], 'did you mean'),
    (['--fold', '9'], 'fold'),
    (['--weights', 'nowhere.pth'], 'no weights at'),
    (['--epochs', '0'], '--epochs'),
    (['--mixup', '1.5'], 'lam'),
    (['--size', '0'], 'size'),
    (['--bs', '0'], 'bs'),
])
def test_wrong_arguments_get_one_clear_line(args, said, sample, call, small, tmp_path):
    base = [a for a in small if a != '--no-pretrained'] if '--weights' in args else list(small)
    status, complained = call('train', '--data', sample, '--out', tmp_path/'run', '--no-check', *base, *args)
    assert status == 2 and said in complained and complained.count('\n') == 1, complained


def test_an_error_in_a_real_process_is_no_traceback(sample, cli, small, tmp_path):
    done = cli('train', '--data', sample, '--out', 'run', *small, '--gamma', -1, cwd=tmp_path)
    assert done.returncode == 2 and 'gamma' in done.stderr and 'Traceback' not in done.stderr, done.stderr


def test_bad_folders(call, small, sample, tmp_path):
    (tmp_path/'empty').mkdir()
    status, complained = call('train', '--data', tmp_path/'empty', '--out', tmp_path/'run', *small)
    assert status == 2 and 'HAM10000' in complained
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'thesis.txt').write_text('mine')
    status, complained = call('train', '--data', sample, '--out', tmp_path/'full', *small)
    assert status == 2 and '--overwrite' in complained
    assert (tmp_path/'full'/'thesis.txt').read_text() == 'mine'


def test_a_text_file_named_jpg(call, small, sample, finished_run, tmp_path):
    data = tmp_path/'data'
    shutil.copytree(sample, data)
    bad = next(data.rglob('*.jpg'))
    bad.write_text('not a picture')
    status, complained = call('train', '--data', data, '--out', tmp_path/'run', *small)
    assert status == 2 and bad.name in complained, complained
    status, complained = call('predict', finished_run, bad)
    assert status == 2 and bad.name in complained, complained
    assert call('train', '--data', data, '--out', tmp_path/'run2', '--drop-bad', '--epochs', 1, *small)[0] == 0
    assert bad.stem not in set(pd.read_csv(tmp_path/'run2'/'split.csv').image_id)


def test_run_folder_that_is_none(call, finished_run, tmp_path):
    (tmp_path/'x').mkdir(); (tmp_path/'y.jpg').write_bytes(b'')
    status, complained = call('predict', tmp_path/'x', tmp_path/'y.jpg')
    assert status == 2 and 'no run folder' in complained
    shutil.copytree(finished_run, tmp_path/'broken')
    (tmp_path/'broken'/'bundle.json').write_text('{"format":')
    status, complained = call('predict', tmp_path/'broken', tmp_path/'y.jpg')
    assert status == 2 and 'damaged' in complained
    (tmp_path/'broken'/'bundle.json').unlink()
    (tmp_path/'broken'/'run.json').write_text('{"arguments":')
    status, complained = call('predict', tmp_path/'broken', tmp_path/'y.jpg')
    assert status == 2 and 'damaged' in complained


def test_weights_of_another_network_do_not_load(call, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path/'other')
    bundle = json.loads((tmp_path/'other'/'bundle.json').read_text())
    bundle['network']['arch'] = 'test_resnet'
    (tmp_path/'other'/'bundle.json').write_text(json.dumps(bundle))
    image = next((finished_run.parent).rglob('*.jpg'), tmp_path/'y.jpg')
    image.touch()
    status, complained = call('predict', tmp_path/'other', image)
    assert status == 2 and 'does not fit the network' in complained


def test_a_run_from_before_there_were_bundles(sample, call, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path/'old')
    image = next(sample.rglob('*.jpg'))
    assert call('predict', tmp_path/'old', image, '--out', tmp_path/'new.csv')[0] == 0
    (tmp_path/'old'/'bundle.json').unlink()
    assert call('predict', tmp_path/'old', image, '--out', tmp_path/'old.csv')[0] == 0
    np.testing.assert_allclose(pd.read_csv(tmp_path/'old.csv')[CODES], pd.read_csv(tmp_path/'new.csv')[CODES], atol=1e-6)
    record = json.loads((tmp_path/'old'/'run.json').read_text())
    record['arguments']['arch'] = 'test_resnet'
    (tmp_path/'old'/'run.json').write_text(json.dumps(record))
    status, complained = call('predict', tmp_path/'old', image)
    assert status == 2 and 'does not fit the network' in complained


def test_the_bundle_of_a_run_can_be_copied_alone(sample, call, finished_run, tmp_path):
    (tmp_path/'b').mkdir()
    for name in ('model.safetensors', 'bundle.json'): shutil.copy(finished_run/name, tmp_path/'b')
    bundle = json.loads((tmp_path/'b'/'bundle.json').read_text())
    record = json.loads((finished_run/'run.json').read_text())
    assert bundle['scores']['average_recall'] == record['scores']['average_recall'] and bundle['split']['rule'] == record['split']['rule']
    image = next(sample.rglob('*.jpg'))
    for run, out in ((finished_run, 'a.csv'), (tmp_path/'b', 'b.csv')): assert call('predict', run, image, '--out', tmp_path/out)[0] == 0
    assert (tmp_path/'a.csv').read_text() == (tmp_path/'b.csv').read_text()


def test_calibrate_then_predict(sample, call, finished_run, tmp_path):
    from skin_lesions.decide import from_dict
    from skin_lesions.predictions import read_predictions
    run = tmp_path/'run'
    shutil.copytree(finished_run, run)
    status, complained = call('calibrate', run, '--rule', 'prior', '--refer', '.9')
    assert status == 0 and 'not a medical device' in complained, complained
    bundle = json.loads((run/'bundle.json').read_text())
    calibration, rule, referral = (from_dict(bundle[k]) for k in ('calibration', 'rule', 'referral'))
    assert calibration.method == 'stages_vector' and rule.name == 'prior'
    split = pd.read_csv(run/'split.csv')
    (tmp_path/'in').mkdir()
    for i in split.image_id[~split.is_valid][:4]: shutil.copy(next(sample.rglob(f'{i}.jpg')), tmp_path/'in')
    assert call('predict', run, tmp_path/'in', '--out', tmp_path/'new.csv', '--quiet')[0] == 0
    assert call('predict', finished_run, tmp_path/'in', '--out', tmp_path/'raw.csv', '--quiet')[0] == 0
    new, by_hand = read_predictions(tmp_path/'new.csv'), calibration.calibrate(read_predictions(tmp_path/'raw.csv'))
    np.testing.assert_allclose(new[CODES], by_hand[CODES], atol=1e-9)
    assert list(new.decision) == list(rule.decide(by_hand)) and list(new.refer.astype(str)) == [str(r) for r in referral.refer(by_hand)]
    assert (run/'model.safetensors').read_bytes() == (finished_run/'model.safetensors').read_bytes()
    assert (run/'predictions.csv').read_bytes() == (finished_run/'predictions.csv').read_bytes()
    assert call('calibrate', run, '--method', 'none', '--rule', 'argmax')[0] == 0
    bundle = json.loads((run/'bundle.json').read_text())
    assert bundle['calibration'] is None and bundle['referral'] is None and bundle['rule']['name'] == 'argmax'


def test_calibrate_measures_in_turns(call, finished_run, tmp_path, capsys):
    from skin_lesions.cli import main
    rng = np.random.default_rng(0)
    n = 700
    z = rng.normal(size=(n, 7))
    y = np.array([rng.choice(7, p=np.exp(r)/np.exp(r).sum()) for r in z])
    p = np.exp(3*z)/np.exp(3*z).sum(1, keepdims=True) # three times too sure
    table = pd.DataFrame(p, columns=CODES).assign(image_id=[f'i{i}' for i in range(n)], dx=np.array(CODES)[y], group=[f'l{i//2}' for i in range(n)])
    table.to_csv(tmp_path/'valid.csv', index=False)
    shutil.copytree(finished_run, tmp_path/'run')
    assert main(['calibrate', str(tmp_path/'run'), '--table', str(tmp_path/'valid.csv'), '--method', 'temperature']) == 0
    said = capsys.readouterr().out
    assert 'in turns over 5 parts of 350 lesions' in said
    temperature = float(said.split('temperature ')[1].split(';')[0])
    assert 2.5 < temperature < 3.5, said
    before, after = map(float, said.split('calibration error ')[1].splitlines()[0].split(' -> '))
    assert after < before/2, said


def test_ensemble_and_submit(sample, call, finished_run, tmp_path, capsys):
    from skin_lesions.cli import main
    from skin_lesions.predictions import ensemble, read_isic_submission, read_predictions
    a = read_predictions(finished_run/'predictions.csv')
    b = a.assign(**{c: a[CODES[::-1][i]] for i, c in enumerate(CODES)}).sample(frac=1, random_state=1)
    b.to_csv(tmp_path/'b.csv', index=False)
    for how in ('mean', 'geometric', 'rank'):
        assert call('ensemble', finished_run, tmp_path/'b.csv', '--how', how, '--out', tmp_path/'e.csv')[0] == 0
        np.testing.assert_allclose(read_predictions(tmp_path/'e.csv')[CODES], ensemble([a, b], how)[CODES], atol=1e-12)
    assert call('ensemble', finished_run, tmp_path/'b.csv', '--weights', 1, 0, '--out', tmp_path/'e.csv')[0] == 0
    np.testing.assert_allclose(read_predictions(tmp_path/'e.csv')[CODES], a[CODES], atol=1e-12)
    assert main(['ensemble', str(finished_run), str(tmp_path/'b.csv'), '--greedy', '--out', str(tmp_path/'g.csv')]) == 0
    assert 'too good' in capsys.readouterr().out
    a.iloc[:10].to_csv(tmp_path/'f0.csv', index=False); a.iloc[10:].to_csv(tmp_path/'f1.csv', index=False)
    status, complained = call('ensemble', tmp_path/'f0.csv', tmp_path/'f1.csv', '--out', tmp_path/'f.csv')
    assert status == 2 and 'lacks' in complained
    if not set(a.group[:10]) & set(a.group[10:]):
        assert call('ensemble', tmp_path/'f0.csv', tmp_path/'f1.csv', '--folds', '--out', tmp_path/'f.csv')[0] == 0
        assert set(read_predictions(tmp_path/'f.csv').image_id) == set(a.image_id)
    assert call('submit', finished_run, '--out', tmp_path/'s.csv')[0] == 0
    np.testing.assert_allclose(read_isic_submission(tmp_path/'s.csv')[CODES], a[CODES], atol=1e-12)
    (tmp_path/'in').mkdir(); shutil.copy(next(sample.rglob('*.jpg')), tmp_path/'in')
    assert call('submit', finished_run, tmp_path/'in', '--out', tmp_path/'s.csv', '--tta', 'dihedral', '--quiet')[0] == 0
    assert len(read_isic_submission(tmp_path/'s.csv')) == 1
    (tmp_path/'in'/'bad.jpg').write_text('no picture')
    status, complained = call('submit', finished_run, tmp_path/'in', '--out', tmp_path/'t.csv', '--quiet')
    assert status == 2 and 'bad.jpg' in complained and not (tmp_path/'t.csv').exists()


def test_predict_names_unreadable_files_and_goes_on(sample, call, finished_run, tmp_path):
    (tmp_path/'in').mkdir()
    shutil.copy(next(sample.rglob('*.jpg')), tmp_path/'in'); (tmp_path/'in'/'bad.jpg').write_text('no picture')
    status, complained = call('predict', finished_run, tmp_path/'in', '--out', tmp_path/'o.csv', '--quiet')
    assert status == 0 and '1 of 2 pictures left out: bad.jpg: not an image' in complained
    assert len(pd.read_csv(tmp_path/'o.csv')) == 1


def test_export_onnx(call, finished_run, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='needs onnx, onnxscript and onnxruntime')
    pytest.importorskip('onnxscript', reason='needs onnx, onnxscript and onnxruntime')
    status, complained = call('export-onnx', finished_run, tmp_path/'net.onnx')
    assert status == 0, complained
    session = onnxruntime.InferenceSession(str(tmp_path/'net.onnx'), providers=['CPUExecutionProvider'])
    assert json.loads(session.get_modelmeta().custom_metadata_map['classes']) == CODES
    status, complained = call('export-onnx', finished_run, tmp_path/'net.onnx')
    assert status == 2 and 'exists' in complained


def test_help_shows_every_default(capsys, monkeypatch):
    from skin_lesions.cli import main
    monkeypatch.setenv('COLUMNS', '200')
    for command in ('demo', 'train', 'evaluate', 'calibrate', 'predict', 'gradcam', 'ensemble', 'submit', 'export-onnx'):
        with pytest.raises(SystemExit) as stop: main([command, '--help'])
        assert stop.value.code == 0
        said = capsys.readouterr().out
        if command == 'train':
            for default in ('0.001', 'tf_efficientnet_lite0', '128', '0.7', 'lesion'): assert f'(default: {default})' in said


def test_demo_from_nothing(cli, tmp_path):
    "The README's main job, with fewer pictures"
    done = cli('demo', '--out', 'demo', '--images', 64, '--epochs', 1, '--size', 64, '--quiet', cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path/'demo'/'run'/'report.html').is_file() and 'report: ' in done.stdout
    assert done.stdout.count('%  ') == 7 and 'not a medical device' in done.stderr
    again = cli('demo', '--out', 'demo', '--quiet', cwd=tmp_path)
    assert again.returncode == 2 and '--overwrite' in again.stderr


def test_an_empty_name_is_not_the_folder_one_is_in(finished_run, call, monkeypatch, sample):
    monkeypatch.chdir(sample)
    for args in (('predict', finished_run, ''), ('predict', ''), ('gradcam', finished_run, '', '--out', 'maps')):
        status, complained = call(*args)
        assert status == 2 and 'is empty' in complained, complained
    assert not (sample/'maps').exists()


def test_the_map_s_caption_says_what_predict_prints(sample, finished_run, tmp_path, capsys):
    "Calibrated probabilities, and a rule's decision that is not the most probable class"
    from skin_lesions.cli import main
    from skin_lesions.decide import Calibration, decision_rule
    from skin_lesions.predict import load_predictor
    from skin_lesions.bundle import update_bundle
    run, image = Path(shutil.copytree(finished_run, tmp_path/'run')), sorted(sample.rglob('*.jpg'))[0]
    own = load_predictor(run).predict(image, progress=False)[CODES].astype(float).to_numpy()[0]
    update_bundle(run, calibration=Calibration('vector', (4.,), CODES, tuple(3.*(c == 'vasc') for c in CODES)), rule=decision_rule('prior', prior={c: .97 if c == 'vasc' else .005 for c in CODES}, t=1.))
    table = load_predictor(run).predict(image, progress=False)
    decision, p = table.decision[0], table[CODES].astype(float).iloc[0]
    assert decision != p.idxmax() and abs(p.to_numpy() - own).max() > .1 # else the test would not show the difference
    for command, more in (('predict', ('--gradcam', tmp_path/'maps')), ('gradcam', ('--out', tmp_path/'maps2'))):
        assert main([str(a) for a in (command, run, image, *more, '--quiet')]) == 0
        printed = capsys.readouterr().out
        gallery = (more[1]/'gallery.html').read_text()
        assert f'predicted {decision} ({p[decision]:.1%}); map: {decision}' in gallery
        if command == 'predict': assert f'{p[decision]:7.1%}  {decision}' in printed and f'decision: {decision}' in printed


def test_gradcam_writes_pictures_and_a_gallery(sample, finished_run, call, tmp_path):
    images = sorted(sample.rglob('*.jpg'))[:3]
    (tmp_path/'in').mkdir()
    for p in images: shutil.copy(p, tmp_path/'in')
    (tmp_path/'in'/'broken.jpg').write_text('no picture')
    status, complained = call('gradcam', finished_run, tmp_path/'in', '--out', tmp_path/'maps', '--quiet')
    assert status == 0 and 'broken.jpg' in complained, complained
    assert len(list((tmp_path/'maps').rglob('*.png'))) == 3
    gallery = (tmp_path/'maps'/'gallery.html').read_text()
    assert 'not a medical device' in gallery and 'src="http' not in gallery
    status, complained = call('gradcam', finished_run, tmp_path/'in', '--out', tmp_path/'maps')
    assert status == 2 and '--overwrite' in complained
    status, complained = call('gradcam', finished_run, images[0], '--out', tmp_path/'other', '--target', 'mell', '--quiet')
    assert status == 2 and "did you mean 'mel'" in complained
