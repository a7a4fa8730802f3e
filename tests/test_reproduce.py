"The package's bundle: killed at random moments, the same command ends with the weights of a training that was never killed."
import os, random, signal, subprocess, sys, time

import pandas as pd
import pytest
from safetensors.numpy import load_file

KILLS = int(os.environ.get('REPRODUCE_KILLS', 1))
START = "import sys, torch; torch.set_num_threads(1); from skin_lesions.cli import main; from skin_lesions import reproduce, experiments as e; " \
        "e.SCALES['tiny'] = e.replace(e.SCALES['tiny'], epochs=3); sys.exit(main(sys.argv[1:]))"


def command(out, sample): return [sys.executable, '-c', START, 'reproduce-bundle', '--scale', 'tiny', '--data', str(sample), '--out', str(out), '--workers', '0', '--device', 'cpu', '--minutes', '0']


def states(out): return {f: f.stat().st_mtime_ns for f in (out/'work').rglob('state.safetensors') if f.exists()}


def test_kills(tmp_path):
    from skin_lesions.synthetic import synthetic_ham10000
    sample = synthetic_ham10000(tmp_path/'sample', 80, size=(96, 72), show=False)
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    done = subprocess.run(command(whole, sample), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ('fold 0', 'all images'): assert sum(l.startswith(f'{name}: epoch') for l in done.stdout.splitlines()) == 3
    rng = random.Random(0)
    for _ in range(KILLS):
        before, process = states(killed), subprocess.Popen(command(killed, sample), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic()+240
        while states(killed) == before and process.poll() is None and time.monotonic() < end: time.sleep(.02)
        time.sleep(rng.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command(killed, sample), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    a, b = (load_file(o/'model.safetensors') for o in (whole, killed))
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    a, b = (pd.read_csv(o/'held_out_predictions.csv') for o in (whole, killed))
    pd.testing.assert_frame_equal(a, b)
    assert not list(killed.rglob('state.safetensors')) and (killed/'README.md').read_text() == (whole/'README.md').read_text()


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
        def predict(self, images, *args, **kwargs): asked.append(images); raise ValueError('asked')
    image = tmp_path/'a.png'
    monkeypatch.setattr('skin_lesions.cli.open_bundle', lambda bundle, device=None: asked.append(bundle) or Fake())
    for args in ([image], ['--bundle', 'run', '--quiet', image], [image, image, '--bundle', 'run']): main(['predict', *map(str, args)])
    assert asked == ['ham10000', [image], 'run', [image], 'run', [image, image]]
