"""Figures stored in the pages: at least 100 dots an inch, so that their text is legible, and at most 50 kB.
`python tools/figures.py` makes large PNGs smaller, after pages were executed anew, and names the figures that are still too coarse or too large."""
import base64, io, json, sys
from pathlib import Path

from PIL import Image

LEAST_DPI,MOST_BYTES = 100,50_000


def images(notebook):
    "The stored images of a page: the cell's id, the output's data, its kind, the bytes"
    for cell in notebook['cells']:
        for output in cell.get('outputs', []):
            data = output.get('data', {})
            for kind in ('image/png', 'image/jpeg'):
                if kind in data: yield cell['id'],data,kind,base64.b64decode(''.join(data[kind]))


def dots_an_inch(data, image):
    "Resolution of a figure; None for an image that has none because its pixels are what it shows"
    found = Image.open(io.BytesIO(image)).info.get('dpi')
    if found: return round(min(found))
    return 0 if ''.join(data.get('text/plain', '')).startswith('<Figure') else None


def smaller(png, most=MOST_BYTES):
    "A PNG with a palette, or as a JPEG where that is smaller, as with photographs; both keep the resolution: kind and bytes"
    image = Image.open(io.BytesIO(png))
    dpi,rgb = {k: image.info[k] for k in ('dpi',) if k in image.info},image.convert('RGB')
    palette = io.BytesIO()
    rgb.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(palette, 'PNG', optimize=True, **dpi)
    for quality in (85, 75, 60):
        jpeg = io.BytesIO()
        rgb.save(jpeg, 'JPEG', quality=quality, optimize=True, **dpi)
        if len(jpeg.getvalue())<=most: break
    files = {'image/png': min(png, palette.getvalue(), key=len), 'image/jpeg': jpeg.getvalue()}
    return min(files.items(), key=lambda file: len(file[1]))


def shrink(notebook):
    "Make large PNGs smaller; of an image that is stored as PNG and as JPEG the smaller one stays"
    for _,data,kind,image in [*images(notebook)]:
        if kind!='image/png' or len(image)<=20_000 or Image.open(io.BytesIO(image)).mode=='P' and len(image)<=MOST_BYTES: continue
        new_kind,small = smaller(image)
        text = base64.b64encode(small).decode() # without a line's end, as nbdev_clean leaves it
        if new_kind==kind: data[kind] = text
        else:
            del data[kind]
            data[new_kind] = min(data.get(new_kind, text), text, key=len)
    for cell in notebook['cells']:
        for data in (output.get('data', {}) for output in cell.get('outputs', [])):
            if 'image/png' in data and 'image/jpeg' in data: del data[max('image/png', 'image/jpeg', key=lambda kind: len(''.join(data[kind])))]


def problems(notebook):
    "What is wrong with the figures of a page"
    for cell,data,_,image in images(notebook):
        dpi = dots_an_inch(data, image)
        if dpi is not None and dpi<LEAST_DPI: yield f'{cell}: a figure of {dpi or "unknown"} dpi; at least {LEAST_DPI}'
        if len(image)>MOST_BYTES: yield f'{cell}: a figure of {len(image):,} bytes; at most {MOST_BYTES:,}'


def main(pages):
    bad = []
    for path in pages:
        notebook = json.loads(path.read_text(encoding='utf-8'))
        shrink(notebook)
        text = json.dumps(notebook, indent=1, ensure_ascii=False)+'\n'
        if text!=path.read_text(encoding='utf-8'): path.write_text(text, encoding='utf-8')
        bad += [f'{path.name}, {p}' for p in problems(notebook)]
    print('\n'.join(bad) or f'{len(pages)} pages, all figures legible and small')
    return bool(bad)


if __name__=='__main__':
    repo = Path(__file__).resolve().parent.parent
    sys.exit(main([Path(p) for p in sys.argv[1:]] or sorted((repo/'nbs').glob('*.ipynb'))))
