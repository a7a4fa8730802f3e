"Everything here is read from settings.ini, the one home of name, version and requirements."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='], comment_prefixes=['#'])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

extras = {key.removesuffix('_requirements'): value.split() for key,value in cfg.items() if key.endswith('_requirements')}
readme = here/'README.md'

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Natural Language :: English',
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    packages=find_packages(include=['skin_lesions', 'skin_lesions.*']),
    include_package_data=True,
    package_data={'skin_lesions': ['py.typed', 'bundles/*/*', 'tables/*']},
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    python_requires='>=' + cfg['min_python'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    zip_safe=False,
)
