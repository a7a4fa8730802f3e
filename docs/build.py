"""The pages as a web site that needs no network: `pip install -e '.[docs]'`, then `python docs/build.py`, then `python -m http.server -d _docs`.
nbconvert turns the notebooks with their stored outputs into Markdown, latex2mathml the formulas into MathML, MkDocs Material makes the site with its search,
mkdocstrings the API pages. Nothing is executed. Dead links and anything that a page would load from elsewhere end the build with an error."""
import argparse, json, os, re, shutil, subprocess, sys, tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO/'tools')] # the pages' own version of the package
from readme import pages_text, shown_outputs
from skin_lesions.style import color_variables

GIT = 'https://github.com/skin-lesions/skin_lesions/blob/main/'


def with_math(text):
    "Formulas as MathML, which browsers draw themselves; code stays"
    from latex2mathml.converter import convert
    parts = re.split(r'(```.*?```|`[^`\n]*`)', text, flags=re.S)
    def one(m): return convert(m[1] or m[2], display='block' if m[1] else 'inline').replace('\n', ' ')
    return ''.join(p if i%2 else re.sub(r'\$\$(.+?)\$\$|(?<![\w\\$])\$([^\s$](?:[^$\n]*[^\s$\\])?)\$(?![\w$])', one, p, flags=re.S) for i,p in enumerate(parts))


def with_links(text):
    "Links between notebooks become links between pages; those to other files of the repository lead to it; a badge becomes its text"
    badge = r'\[!\[([^\]]*)\]\(https?:[^)]*\)\]'
    text = re.sub(badge, r'[\1]', re.sub(rf'(?<=\))\n(?={badge})', ' · ', text))
    text = re.sub(r'\]\((?:nbs/)?(\d\d_\w+)\.ipynb', r'](\1.md', text)
    text = re.sub(r'\]\((?:nbs/)?README\.md', '](pages.md', text)
    # Jupyter keeps the capitals of a heading in its anchor, MkDocs does not
    text = re.sub(r'\]\((\d\d_\w+\.md|pages\.md|)#([^)\s]+)\)', lambda m: f']({m[1]}#{m[2].lower()})', text)
    return re.sub(r'\]\(((?!https?:|#|mailto:|images/|pages\.md|\d\d_\w+\.md)[^)\s]+)\)', lambda m: f"]({GIT}{m[1].removeprefix('../')})", text)


def is_shown(cell):
    "Whether a reader of the site sees a cell: raw ones are settings of nbdev, hidden ones plumbing"
    if cell.cell_type=='raw': return False
    return cell.cell_type=='markdown' or not re.search(r'^#\| *(hide|default_exp)\b|^workspace\.cleanup\(\)$', cell.source, re.M)


def shown(cell):
    "A cell whose code is not for the reader becomes what it shows"
    if cell.cell_type!='code' or '#| echo: false' not in cell.source: return cell
    return nbformat.v4.new_markdown_cell('\n\n'.join(shown_outputs(cell)))


def page(notebook, dest):
    "A notebook as Markdown beside its figures; returns its title"
    from nbconvert import MarkdownExporter
    nb = nbformat.read(notebook, 4)
    nb.cells = [shown(c) for c in nb.cells if is_shown(c)]
    nb.metadata['language_info'] = {'name': 'python'} # for colours
    for c in nb.cells:
        c.source = with_links(with_math(c.source)) if c.cell_type=='markdown' else re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    text,files = MarkdownExporter().from_notebook_node(nb, resources={'output_files_dir': f'{notebook.stem}_files', 'unique_key': notebook.stem})
    for name,data in files['outputs'].items():
        (dest/name).parent.mkdir(exist_ok=True)
        (dest/name).write_bytes(data)
    module = re.search(r'#\| default_exp (\w+)', notebook.read_text(encoding='utf-8'))
    if module: text += f'\n\n---\n\nAll signatures: [`skin_lesions.{module[1]}`](api/{module[1]}.md). Source of this page: [{notebook.name}]({GIT}nbs/{notebook.name}).\n'
    (dest/f'{notebook.stem}.md').write_text(text, encoding='utf-8')
    return re.search(r'^# (.+)$', text, re.M)[1]


def sources(dest):
    "All pages; returns the navigation: tutorials first, then what to type, then the rooms"
    shutil.copytree(REPO/'nbs'/'images', dest/'images')
    # the colours of the report and the web demo
    colors = color_variables('[data-md-color-scheme=default]', '[data-md-color-scheme=slate]')
    (dest/'extra.css').write_text(colors+(REPO/'docs'/'extra.css').read_text(encoding='utf-8'), encoding='utf-8')
    (dest/'api').mkdir()
    page(REPO/'nbs'/'index.ipynb', dest)
    (dest/'pages.md').write_text(with_links(pages_text(REPO/'nbs')), encoding='utf-8')
    (dest/'usage').mkdir()
    for name,text in usage_pages().items(): (dest/'usage'/f'{name}.md').write_text(text, encoding='utf-8')
    notebooks = sorted((REPO/'nbs').glob('[0-9]*.ipynb'))
    pages = {n: {f"{n.stem[:2]} {page(n, dest)}": f'{n.stem}.md'} for n in notebooks}
    tutorials,rooms = ([pages[n] for n in notebooks if (n.name[0]=='9')==last] for last in (True, False))
    modules = sorted(p.stem for p in (REPO/'skin_lesions').glob('[a-z]*.py'))
    for m in modules: (dest/'api'/f'{m}.md').write_text(f'# skin_lesions.{m}\n\n::: skin_lesions.{m}\n    options: {{show_root_heading: false, show_root_toc_entry: false}}\n')
    for name in ('CHANGELOG', 'CONTRIBUTING', 'SECURITY'): (dest/f'{name.lower()}.md').write_text(with_links((REPO/f'{name}.md').read_text(encoding='utf-8')), encoding='utf-8')
    usage = ['usage/index.md', *({name: f'usage/{name}.md'} for name in usage_pages() if name!='index')]
    return [{'Home': 'index.md'}, {'Tutorials': tutorials}, {'Usage': usage}, {'Pages': ['pages.md', *rooms]},
            {'API': [{m: f'api/{m}.md'} for m in modules]}, {'Project': ['changelog.md', 'contributing.md', 'security.md']}]


def usage_pages():
    "For each command of the shell a page from its own parser, and an index of them: text by name"
    os.environ['COLUMNS'] = '80' # argparse wraps its text to the terminal
    from skin_lesions.cli import argument_parser
    parser = argument_parser()
    commands = next(a for a in parser._actions if a.dest=='command')
    about = {a.dest: a.help.replace('%%', '%') for a in commands._choices_actions}
    pages = {'index': '# Command line\n\nAfter the [installation](../index.md#install), `skin_lesions COMMAND`; `skin_lesions --version` and `skin_lesions --debug COMMAND`, '
                      'which shows the traceback of an error. What the commands read and write: [81 Command line](../81_cli.md).\n\n| command | what it does |\n|---|---|\n'
                      + ''.join(f'| [`{name}`]({name}.md) | {with_options_as_code(text)} |\n' for name,text in about.items())}
    for name,command in commands.choices.items():
        pages[name] = f'# skin_lesions {name}\n\n{with_options_as_code(about[name])}.\n\n```text\n{synopsis(name, command)}\n```\n\n'+option_tables(command)
    return pages


def with_options_as_code(text): return re.sub(r'(?<![\w`-])--[a-z][\w-]*', r'`\g<0>`', text)


def synopsis(name, command):
    "How a command is typed: its arguments and the options that it needs; the tables have the others"
    arguments = [typed(a) for a in command._actions if not a.option_strings]
    needed = [typed(a) for a in command._actions if a.option_strings and a.required]
    return ' '.join(['skin_lesions', name, *arguments, *needed, '[options]'])


def typed(action):
    "An argument or option with the values that it takes"
    value = '' if action.nargs==0 else action.metavar or (action.dest.rstrip('_').upper() if action.option_strings else action.dest)
    if action.nargs=='+': value = f'{value} [{value} ...]'
    return ' '.join([*action.option_strings[:1], value]).strip()


def option_tables(command):
    "The arguments and options of a parser as tables"
    def cell(text): return with_options_as_code(text.replace('%%', '%').replace('|', '\\|').replace('<', '&lt;'))
    def row(a): return f"| `{typed(a)}` | {cell(a.help)}{'; one of '+', '.join(f'`{c}`' for c in a.choices) if a.choices else ''} |\n"
    shown = [a for a in command._actions if a.dest!='help']
    tables = ''
    for title,actions in (('Arguments', [a for a in shown if not a.option_strings]), ('Options', [a for a in shown if a.option_strings])):
        if actions: tables += f'## {title}\n\n| {title.lower()[:-1]} | what it is |\n|---|---|\n'+''.join(map(row, actions))+'\n'
    return tables


class Found(HTMLParser):
    def __init__(self): super().__init__(); self.links,self.loads,self.ids = [],[],set()
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag=='a' and a.get('href'): self.links.append(a['href'])
        if a.get('src'): self.loads.append(a['src'])
        if tag=='link' and a.get('href') and a.get('rel') not in ('canonical', 'next', 'prev'): self.loads.append(a['href'])


def problems(site):
    "Links and files that are not there, and what would be loaded from another server"
    found = {}
    for p in site.rglob('*.html'):
        found[p] = Found(); found[p].feed(p.read_text(encoding='utf-8'))
    for p,f in found.items():
        if p.name=='404.html': continue
        for kind,urls in (('link', f.links), ('file', f.loads)):
            for u in urls:
                url = urlsplit(u)
                if url.scheme or url.netloc:
                    if kind=='file' and url.scheme!='data': yield f'{p.name} loads {u}'
                    continue
                to = (p.parent/unquote(url.path)).resolve() if url.path else p
                if to.is_dir(): to = to/'index.html'
                if not to.is_file(): yield f'{p.name}: {u} is not there'
                elif kind=='link' and url.fragment and to in found and unquote(url.fragment) not in found[to].ids and not url.fragment.startswith('__'): yield f'{p.name}: {u} has no such place'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('site', nargs='?', default=REPO/'_docs', type=Path, help='folder that is made; what is in it is replaced')
    site = parser.parse_args().site.resolve()
    with tempfile.TemporaryDirectory() as tmp:
        source = Path(tmp)/'pages'; source.mkdir()
        nav = sources(source)
        config = Path(tmp)/'mkdocs.yml'
        config.write_text((REPO/'docs'/'mkdocs.yml').read_text(encoding='utf-8') + 'nav: ' + json.dumps(nav) + '\n', encoding='utf-8')
        env = os.environ | dict(DOCS_SOURCE=str(source), DOCS_SITE=str(site), DOCS_REPO=str(REPO), NO_MKDOCS_2_WARNING='1')
        done = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--clean', '--strict', '--quiet', '-f', str(config)], env=env)
    bad = sorted(set(problems(site)))
    print('\n'.join(bad) if bad else f'{len(list(site.rglob("*.html")))} pages in {site}, no dead link, nothing from elsewhere')
    return done.returncode or bool(bad)


if __name__=='__main__': sys.exit(main())
