"""README.md is nbs/index.ipynb as text, nbs/README.md the list of all pages, read from the pages themselves: `python tools/readme.py` writes both.
Of a cell marked `#| echo: false` the README has what it printed instead of its code; its figure is a file in nbs/images."""
import base64, json, re
from pathlib import Path

FIGURE = 'readme_{}.png' # in nbs/images, by cell


def cells_of(notebook): return json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']


def shown_outputs(cell):
    "What an `echo: false` cell puts on the page: text as Markdown, or a figure with its alternative text"
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        if 'image/png' in data:
            alt = re.search(r'^#\| fig-alt: (.+)$', ''.join(cell['source']), re.M)[1]
            yield f'![{alt}](images/{FIGURE.format(cell["id"])})'
        elif 'text/markdown' in data: yield ''.join(data['text/markdown']).strip()


def figures(notebook):
    "The files of the page's figures: name and bytes"
    for cell in cells_of(notebook):
        if '#| echo: false' not in ''.join(cell['source']): continue
        for output in cell.get('outputs', []):
            if 'image/png' in output.get('data', {}):
                yield FIGURE.format(cell['id']), base64.b64decode(''.join(output['data']['image/png']))


def readme_text(notebook):
    "The page's markdown cells as they are, its code cells as Python blocks, or what they show"
    parts = []
    for cell in cells_of(notebook):
        source = ''.join(cell['source']).strip()
        code = '\n'.join(l for l in source.split('\n') if not l.startswith('#|')).strip()
        if cell['cell_type'] == 'markdown': parts.append(source)
        elif '#| echo: false' in source: parts += shown_outputs(cell)
        elif code and '#| hide' not in source: parts.append(f'```python\n{code}\n```')
    return re.sub(r'\]\((?=images/|\d\d_|README\.md)', '](nbs/', '\n\n'.join(parts)).replace('](../', '](') + '\n'


def page_row(notebook):
    "A page in the list: number and title, module, what the reader gets"
    cells = cells_of(notebook)
    first = ''.join(cells[0]['source'])
    title,gets = re.search(r'^# (.+)$', first, re.M)[1],re.search(r'^> (.+)$', first, re.M)[1]
    module = re.search(r'^#\| default_exp (\w+)', '\n'.join(''.join(c['source']) for c in cells), re.M)
    return f"| [{notebook.stem[:2]} {title}]({notebook.name}) | {f'`{module[1]}`' if module else ''} | {gets.replace('|', chr(92)+'|')} |"


def pages_text(folder):
    "The list of all pages: tutorials, then the rooms in the order in which they import each other"
    pages = sorted(Path(folder).glob('[0-9]*.ipynb'))
    tutorials,rooms = ([page_row(p) for p in pages if (p.name[0] == '9') == last] for last in (True, False))
    head = '| page | module | what it is for |\n|---|---|---|\n'
    return f"""# Pages

Each page is a notebook: text, code and small checks; its module is exported from it. A page may use those above it. Plan and promises: [Architecture](09_architecture.ipynb).

## Tutorials

{head}{chr(10).join(tutorials)}

## The library, room by room

{head}{chr(10).join(rooms)}
"""


if __name__ == '__main__':
    repo = Path(__file__).resolve().parent.parent
    (repo/'README.md').write_text(readme_text(repo/'nbs'/'index.ipynb'), encoding='utf-8')
    (repo/'nbs'/'README.md').write_text(pages_text(repo/'nbs'), encoding='utf-8')
    for name,data in figures(repo/'nbs'/'index.ipynb'): (repo/'nbs'/'images'/name).write_bytes(data)
