"""The files of a release, made and checked: `python tools/release.py`. With them an index needs one command, which is printed.

A wheel is installed on Kaggle or anywhere without an index as it is: `pip install dist/skin_lesions-*.whl`.
"""
import argparse, importlib.util, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def settings(repo=REPO):
    "What settings.ini says"
    parser = ConfigParser(delimiters=['='], comment_prefixes=['#'])
    parser.read(repo/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def built(out, repo=REPO, isolated=True):
    "Sdist and wheel in a folder; by `build` where it is installed, which makes the wheel from the sdist, in a new environment or in this one"
    if importlib.util.find_spec('build'):
        commands = [[sys.executable, '-m', 'build', *['--no-isolation']*(not isolated), '--outdir', str(out), str(repo)]]
    else:
        commands = [[sys.executable, 'setup.py', '--quiet', 'sdist', '--dist-dir', str(out)],
                    [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '-w', str(out), str(repo)]]
    for command in commands: subprocess.run(command, cwd=repo, check=True)
    version = settings(repo)['version']
    return [next(out.glob(f'skin_lesions-{version}{end}')) for end in ('.tar.gz', '-py3-none-any.whl')]


def names_in(file):
    "The files in an sdist, without its folder, or in a wheel"
    if file.suffix == '.whl': return set(zipfile.ZipFile(file).namelist())
    with tarfile.open(file) as archive: return {m.name.split('/', 1)[-1] for m in archive if m.isfile()}


def missing(file, repo=REPO):
    "What a release must hold and the file does not"
    package = [p for p in (repo/'skin_lesions').rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    needed = {p.relative_to(repo).as_posix() for p in package if p.suffix in ('.py', '.typed', '.json', '.safetensors', '.md', '.xz')}
    if file.suffix != '.whl': needed |= {'README.md', 'LICENSE', 'settings.ini', 'setup.py', 'pyproject.toml'}
    return sorted(needed - names_in(file))


def main(args):
    out = Path(args.out).resolve()
    if out.is_dir() and any(out.iterdir()): sys.exit(f'{out} is not empty: an index would get its old files too')
    out.mkdir(parents=True, exist_ok=True)
    files = built(out)
    for file in files:
        lacks = missing(file)
        if lacks: sys.exit(f'{file.name} lacks {", ".join(lacks)}')
        print(f'{file}: {file.stat().st_size/2**20:.1f} MB, {len(names_in(file))} files')
    if importlib.util.find_spec('twine'):
        subprocess.run([sys.executable, '-m', 'twine', 'check', '--strict', *map(str, files)], check=True)
    else: print('not checked by twine, which is not installed: pip install twine')
    print(f'to an index: python -m twine upload {out}/*')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', default=str(REPO/'dist'), help='empty folder for the files')
    main(parser.parse_args())
