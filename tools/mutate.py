"A thousand JPEGs that went wrong, made from synthetic images: the same ones for the same random seed."
import io, struct, zipfile
import numpy as np
from PIL import Image

SIZE = (72, 54)


def synthetic(n=6):
    "JPEGs of synthetic lesions"
    from skin_lesions.classes import HAM10000
    from skin_lesions.synthetic import draw_image
    out = []
    for i in range(n):
        image = Image.fromarray(draw_image(HAM10000.codes[i % len(HAM10000)], i, i, seed=3, size=(144, 108))[0]).resize(SIZE)
        out.append(saved(image, 'JPEG', quality=88, subsampling=i % 3, progressive=i % 2 == 1))
    return out


def saved(image, kind, **kwargs):
    data = io.BytesIO()
    image.save(data, kind, **kwargs)
    return data.getvalue()


def opened(jpg): return Image.open(io.BytesIO(jpg)).convert('RGB')
def truncated(jpg, rng): return jpg[:rng.integers(1, len(jpg))]
def last_bytes_gone(jpg, rng): return jpg[:-int(rng.integers(1, 60))]
def zero_bytes(jpg, rng): return b''
def two_images(jpg, rng): return jpg + jpg
def deleted(jpg, rng): a = int(rng.integers(2, len(jpg) - 40)); return jpg[:a] + jpg[a + int(rng.integers(1, 40)):]
def inserted(jpg, rng): a = int(rng.integers(2, len(jpg))); return jpg[:a] + rng.bytes(int(rng.integers(1, 40))) + jpg[a:]


def flipped(jpg, rng, start=2, end=None):
    data = bytearray(jpg)
    for i in rng.integers(start, end or len(data), rng.integers(1, 12)): data[i] ^= 1 << int(rng.integers(8))
    return bytes(data)


def flipped_header(jpg, rng): return flipped(jpg, rng, 0, 620)


def zeroed(jpg, rng):
    a = int(rng.integers(0, len(jpg) - 1))
    b = min(len(jpg), a + int(rng.integers(1, 400)))
    return jpg[:a] + bytes(b - a) + jpg[b:]


def wrong_type(jpg, rng):
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, 'w') as z: z.writestr('a.jpg', jpg)
    choices = [b'not an image', rng.bytes(500), b'<html><body>404</body></html>', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', b'%PDF-1.7\n', zipped.getvalue(), jpg[:2], bytes(300), b'\x00\x00\x00\x18ftypheic' + bytes(200)]
    return choices[rng.integers(len(choices))]


def other_kind(jpg, rng):
    kind = ('PNG', 'BMP', 'TIFF', 'GIF', 'WEBP')[rng.integers(5)]
    return saved(opened(jpg), kind, **(dict(lossless=True) if kind == 'WEBP' else {}))


def huge(jpg, rng):
    "A header that promises more pixels than there are: a few more, or billions"
    at = next(i for i in range(2, len(jpg)) if jpg[i:i + 2] in (b'\xff\xc0', b'\xff\xc2')) + 5
    h, w = (rng.integers(30_000, 65_536, 2) if rng.random() < .7 else rng.integers(1, 400, 2)).tolist()
    return jpg[:at] + struct.pack('>HH', h, w) + jpg[at + 4:]


def other_mode(jpg, rng):
    image = opened(jpg)
    grey = image.convert('L')
    alpha = image.convert('RGBA')
    if rng.random() < .5: alpha.putpixel((3, 4), (0, 0, 0, int(rng.integers(256))))
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16)*257)
    choices = [('JPEG', image.convert('CMYK')), ('PNG', sixteen), ('TIFF', sixteen), ('TIFF', grey.convert('F')), ('JPEG', grey), ('PNG', grey.convert('1')), ('PNG', image.quantize(16)), ('PNG', alpha),
               ('PNG', grey.convert('LA')), ('TIFF', image.convert('CMYK')), ('TIFF', image.convert('LAB'))]
    kind, chosen = choices[rng.integers(len(choices))]
    return saved(chosen, kind)


def exif(jpg, rng):
    note = Image.Exif()
    note[0x0112] = int(rng.integers(0, 11))
    data = note.tobytes()
    if rng.random() < .2: data = data[:8] + rng.bytes(20)
    return saved(opened(jpg), ('JPEG', 'PNG', 'WEBP')[rng.integers(3)], exif=data, **(dict(lossless=True)))


def animated(jpg, rng):
    frames = [opened(jpg).rotate(90*i) for i in range(int(rng.integers(1, 4)))]
    return saved(frames[0], ('GIF', 'PNG', 'WEBP', 'TIFF', 'MPO')[rng.integers(5)], save_all=True, append_images=frames[1:])


def tiny(jpg, rng): return saved(opened(jpg).resize(rng.integers(1, 5, 2).tolist()), 'PNG')


KINDS = (truncated, last_bytes_gone, flipped, flipped_header, zeroed, deleted, inserted, zero_bytes, two_images, wrong_type, other_kind, huge, other_mode, exif, animated, tiny)


def mutated(n=1000, seed=0):
    "`n` pairs of a kind and the bytes of a file"
    rng, base = np.random.default_rng(seed), synthetic()
    kinds = [KINDS[i % len(KINDS)] for i in range(n)]
    return [(k.__name__, k(base[int(rng.integers(len(base)))], rng)) for k in kinds]
