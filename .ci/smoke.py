"What an installed skin-lesions must do, in a minute and outside the repository: import, train, predict, read its bundle; run by .ci/matrix."
import importlib, os, pkgutil, subprocess, sys, tempfile, traceback
from importlib.metadata import version
from pathlib import Path

import skin_lesions

assert 'site-packages' in skin_lesions.__file__, skin_lesions.__file__
assert (Path(skin_lesions.__file__).parent/'py.typed').is_file(), 'py.typed'
modules = [m.name for m in pkgutil.iter_modules(skin_lesions.__path__)]
for name in modules: importlib.import_module(f'skin_lesions.{name}')

def run(*args):
    done = subprocess.run(['skin_lesions', *map(str, args)], capture_output=True, text=True, cwd=folder)
    assert done.returncode==0, done.stdout+done.stderr
    return done.stdout

def run_in_a_fork(*args):
    "Without importing anew what is imported above"
    pid = os.fork()
    if not pid:
        os.chdir(folder)
        try: os._exit(importlib.import_module('skin_lesions.cli').main(list(map(str, args))))
        except BaseException: traceback.print_exc()
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])==0, args

with tempfile.TemporaryDirectory() as folder:
    from skin_lesions.classes import HAM10000
    from skin_lesions.predict import load_predictor
    from skin_lesions.readers import read_metadata
    from skin_lesions.synthetic import synthetic_ham10000
    assert run('--version').split()[-1]==version('skin_lesions')
    sample = synthetic_ham10000(Path(folder)/'sample', n_images=120, seed=7)
    # the recipe's network with its installed weights
    run_in_a_fork('train', '--data', sample, '--out', 'run', '--recipe', 'quick', '--set', 'epochs=1', '--set', 'size=64', '--set', 'bs=16', '--workers', 2, '--quiet')
    run('predict', sample, '--bundle', 'run', '--out', 'table.csv', '--quiet')
    table = load_predictor(Path(folder)/'run', device='cpu').predict(read_metadata(sample), progress=False)
    assert len(table)==120 and table.problem.isna().all(), table
    assert (table[list(HAM10000)].sum(1).astype(float)-1).abs().max()<1e-5

print(f'Python {sys.version.split()[0]}: {len(modules)} modules imported, a network trained for an epoch, 120 images predicted')
