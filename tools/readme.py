"README.md is nbs/index.ipynb as text: `python tools/readme.py` writes it."
import json, re
from pathlib import Path


def readme_text(notebook):
    "The page's markdown cells as they are, its code cells as Python blocks"
    parts = []
    for cell in json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source']).strip()
        lines = [l for l in source.split('\n') if not l.startswith('#|')]
        if cell['cell_type'] == 'markdown': parts.append(re.sub(r'\]\((?=images/|\d\d_)', '](nbs/', source).replace('](../', ']('))
        elif lines and '#| hide' not in source: parts.append('```python\n' + '\n'.join(lines).strip() + '\n```')
    return '\n\n'.join(parts) + '\n'


if __name__ == '__main__':
    repo = Path(__file__).resolve().parent.parent
    (repo/'README.md').write_text(readme_text(repo/'nbs'/'index.ipynb'), encoding='utf-8')
