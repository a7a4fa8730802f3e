"The pages of the web site as far as they can be checked without MkDocs: `python docs/build.py` makes the rest and checks the links of its HTML"
import json, re, sys, unicodedata
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPO/'nbs').glob('*.ipynb'))


@pytest.fixture(scope='module')
def build():
    sys.path.insert(0, str(REPO/'docs'))
    import build
    return build


def markdown_of(notebook):
    return '\n\n'.join(''.join(c['source']) for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == 'markdown')


@pytest.fixture(scope='module')
def sources(build):
    "Each page of the site as Markdown with its links turned, by the file it becomes"
    texts = {f'{p.stem}.md': build.with_links(markdown_of(p)) for p in NOTEBOOKS}
    texts |= {f'{n.lower()}.md': build.with_links((REPO/f'{n}.md').read_text()) for n in ('CHANGELOG', 'CONTRIBUTING', 'SECURITY')}
    texts |= {f'usage/{name}.md': text for name, text in build.usage_pages().items()}
    return texts | {'pages.md': build.with_links(build.pages_text(REPO/'nbs'))}


def anchors(text):
    "Names that MkDocs gives to the headings of a page"
    headings = re.findall(r'^#+ +(.+)$', re.sub(r'```.*?```', '', text, flags=re.S), re.M)
    plain = [unicodedata.normalize('NFKD', re.sub(r'[`*]|\]\(.*?\)|\[', '', h)).encode('ascii', 'ignore').decode() for h in headings]
    return {re.sub(r'[-\s]+', '-', re.sub(r'[^\w\s-]', '', h).strip().lower()) for h in plain}


def dead(build, texts):
    "Links to pages, places and files of the repository that are not there"
    for name, text in texts.items():
        text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)
        for target, place in re.findall(r'\]\(([^)#\s]*)(?:#([^)\s]+))?\)', text):
            if target.startswith(build.GIT):
                if not (REPO/target.removeprefix(build.GIT)).exists(): yield name, target
            elif not re.match('https?:|mailto:', target):
                page = (Path(name).parent/target).as_posix().replace('usage/../', '') if target else name
                if page.startswith('images/'): there = (REPO/'nbs'/page).is_file()
                else: there = page in texts and (not place or place in anchors(texts[page]))
                if not there: yield name, f'{target}#{place}'


def test_no_dead_link_on_the_site(build, sources):
    assert not list(dead(build, sources))
    wrong = sources | {'new.md': build.with_links('[a](00_core.ipynb) [b](98_gone.ipynb) [c](12_split.ipynb#gone) [d](../gone.py) [e](#gone) [f](README.md#tutorials) [g](images/gone.png)')}
    assert [target for _, target in dead(build, wrong)] == ['98_gone.md#', '12_split.md#gone', build.GIT+'gone.py', '#gone', 'images/gone.png#']


def test_usage_has_each_command_with_each_option(build):
    from skin_lesions.cli import argument_parser
    pages = build.usage_pages()
    commands = next(a for a in argument_parser()._actions if a.dest == 'command').choices
    assert list(pages) == ['index', *commands]
    for name, command in commands.items():
        assert f']({name}.md)' in pages['index'] and f'# skin_lesions {name}\n' in pages[name]
        for action in command._actions:
            shown = re.search(rf"^\| `{re.escape((action.option_strings or [action.dest])[0])}( [^`]+)?` \| \S.* \|$", pages[name], re.M)
            assert shown or action.dest == 'help', (name, action.dest)


def test_usage_says_what_must_be_typed(build):
    pages = build.usage_pages()
    assert '```text\nskin_lesions predict images [images ...] [options]\n```' in pages['predict']
    assert '```text\nskin_lesions train --out OUT [options]\n```' in pages['train']
    assert '| `--json` |' in pages['predict'] and '| `--device DEVICE` |' in pages['predict'] and '`--images IMAGES [IMAGES ...]`' in pages['quantize']
    for text in pages.values():
        assert not re.search(r'(?<![\w`-])--[a-z]', re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)), 'an option that a browser may break after its hyphens'


def test_badges_are_apart(build):
    assert build.with_links('[![A](https://x/y)](#a)\n[![B](https://x/z)](#b)\n\ntext') == '[A](#a) · [B](#b)\n\ntext'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_plumbing_is_not_on_the_site(path, build):
    import nbformat
    cells = [c for c in nbformat.read(path, 4).cells if build.is_shown(c)]
    assert cells and not [c.source for c in cells if re.search(r'^(skip_exec|workspace\.cleanup|%%%*\s*md)', c.source, re.M)]
    assert not [c for c in map(build.shown, cells) if c.cell_type == 'code' and '#| echo: false' in c.source]


def test_what_a_hidden_cell_shows_is_on_the_site(build):
    import nbformat
    nb = nbformat.read(REPO/'nbs'/'index.ipynb', 4)
    text = '\n'.join(build.shown(c).source for c in nb.cells)
    assert '](images/readme_recall.png)' in text and '| average recall (95 % interval) |' in text and 'result_row' not in text
