"Helpers: images that are broken, odd or not images at every door, files that are whole or absent, silent progress."
import io, shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mutate import KINDS, mutated, saved
from skin_lesions import core
from skin_lesions.classes import HAM10000
from skin_lesions.core import ImageError, atomic_path, file_lock, read_image, read_json, write_json
from skin_lesions.data import ham10000_dataloaders
from skin_lesions.learner import lesion_learner
from skin_lesions.predict import load_predictor
from skin_lesions.bundle import save_bundle
from skin_lesions.predictions import get_predictions

INSIDE = ('Traceback', 'File "', 'site-packages', 'object at 0x', 'NoneType', 'unsupported operand') # of a library's inside, never in a reason
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::PIL.Image.DecompressionBombWarning')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "The thousand, as files that are all called .jpg: (kind, path)"
    folder = tmp_path_factory.mktemp('mutated')
    out = []
    for i, (kind, data) in enumerate(mutated(1000)):
        (folder/f'{i:04}.jpg').write_bytes(data)
        out.append((kind, folder/f'{i:04}.jpg'))
    return out


@pytest.fixture(scope='module')
def read(files):
    "What the door says of each: an array, or the error"
    out = []
    for kind, path in files:
        try: out.append(np.asarray(read_image(path)))
        except ImageError as e: out.append(e)
    return out


def by_opencv(path):
    "Another library's decoder, which rotates by EXIF too; None where it gives up"
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    return None if pixels is None else pixels[..., ::-1]


def test_each_of_a_thousand_is_read_or_named(files, read):
    good = {}
    for (kind, path), got in zip(files, read):
        if isinstance(got, ImageError):
            assert str(got) == f'{path}: {got.why}' and 5 < len(got.why) < 300 and not any(s in got.why for s in INSIDE), str(got)
        good.setdefault(kind, []).append(not isinstance(got, ImageError))
    assert set(good) == {k.__name__ for k in KINDS}
    for kind in ('zero_bytes', 'wrong_type', 'truncated', 'last_bytes_gone'): assert not any(good[kind]), kind
    for kind in ('other_kind', 'exif', 'tiny', 'two_images'): assert all(good[kind]), kind
    for kind in ('flipped', 'huge', 'other_mode', 'animated'): assert 0 < sum(good[kind]) < len(good[kind]), kind


def test_what_is_read_has_the_pixels_of_another_decoder(files, read):
    compared = 0
    for (kind, path), got in zip(files, read):
        if isinstance(got, ImageError): continue
        other = by_opencv(path)
        if other is None: continue
        assert got.shape == other.shape, (kind, path)
        assert np.abs(got.astype(int) - other).max() <= 4, (kind, path)
        compared += 1
    assert compared > 400


@pytest.fixture(scope='module')
def learn(sample):
    from skin_lesions.readers import read_metadata
    meta = read_metadata(sample)
    meta = pd.concat([g.head(4) for _, g in meta.groupby('dx')], ignore_index=True)
    dls = ham10000_dataloaders(meta.assign(is_valid=[i % 4 == 0 for i in range(len(meta))]), 32, bs=7, arch='test_efficientnet', num_workers=0, device='cpu')
    return lesion_learner(dls, 'test_efficientnet', pretrained=False)


@pytest.fixture(scope='module')
def predictor(learn, tmp_path_factory): return load_predictor(save_bundle(learn, tmp_path_factory.mktemp('b')/'b'), device='cpu')


def test_predict_keeps_a_row_for_each(predictor, files, read):
    some = slice(0, 240)
    table = predictor.predict([p for _, p in files[some]], progress=False)
    assert list(table.image_id) == [p.stem for _, p in files[some]]
    for (_, path), got, row in zip(files[some], read[some], table.itertuples()):
        if isinstance(got, ImageError): assert row.problem == f'{path.name}: {got.why}' and np.isnan(row.nv)
        else: assert row.problem is None or pd.isna(row.problem)
    good = table.problem.isna().to_numpy()
    pixels = predictor.predict([np.array(g) for g, ok in zip(read[some], good) if ok], progress=False)
    np.testing.assert_allclose(pixels[list(HAM10000)], table.loc[good, list(HAM10000)].astype(float), atol=1e-6)
    as_bytes = predictor.predict([p.read_bytes() for _, p in files[some]], progress=False, workers=0)
    np.testing.assert_array_equal(as_bytes.problem.isna(), good)
    pd.testing.assert_frame_equal(as_bytes.loc[good, list(HAM10000)], table.loc[good, list(HAM10000)])


def test_get_predictions_names_the_files(learn, files, read):
    bad = [str(p) for (_, p), r in zip(files, read) if isinstance(r, ImageError)][:3]
    good = [str(p) for (_, p), r in zip(files, read) if not isinstance(r, ImageError)][:5]
    assert len(get_predictions(learn, good)) == 5
    with pytest.raises(ValueError) as e: get_predictions(learn, good + bad)
    assert '3 of 8' in str(e.value) and all(b in str(e.value) for b in bad) and not any(s in str(e.value) for s in INSIDE)


def test_training_and_prediction_see_the_same_pixels(learn, predictor, sample, tmp_path):
    "A phone's image, stored lying and marked as standing; not square, so that a crop would show"
    image = Image.open(next(Path(sample).rglob('*.jpg'))).convert('RGB').crop((0, 0, 300, 180))
    note = Image.Exif(); note[0x0112] = 6
    (tmp_path/'rotated.png').write_bytes(saved(image.transpose(Image.Transpose.ROTATE_90), 'PNG', exif=note))
    (tmp_path/'plain.png').write_bytes(saved(image, 'PNG'))
    (tmp_path/'lying.png').write_bytes(saved(image.transpose(Image.Transpose.ROTATE_90), 'PNG')) # another image: what a lost mark would give
    names = ['rotated', 'plain', 'lying']
    files = [tmp_path/f'{n}.png' for n in names]
    for table in (get_predictions(learn, files), predictor.predict(files, progress=False), predictor.predict([Image.open(f) for f in files], progress=False)):
        rotated, plain, lying = table[list(HAM10000)].astype(float).to_numpy()
        np.testing.assert_allclose(rotated, plain, rtol=0, atol=1e-7) # an image's place in a batch moves the last bit
        assert np.abs(lying - plain).max() > 1e-5, np.abs(lying - plain).max()
    seen = [np.asarray(learn.dls.valid_ds.tls[0].tfms(f)) for f in files[:2]]
    half = np.asarray(image.reduce(2)) # all that 32 pixels need, in training as in validation
    for pixels in seen: np.testing.assert_array_equal(pixels, half)


def test_a_bomb_is_refused_before_it_goes_off(tmp_path, monkeypatch):
    "400 KB that would be 1.2 GB; the limit can be moved"
    bomb = saved(Image.new('1', (20_000, 20_000)), 'PNG')
    assert len(bomb) < 1_000_000
    def decoded(self): raise AssertionError('decoded')
    monkeypatch.setattr(Image.Image, 'load', decoded)
    with pytest.raises(ImageError, match='64,000,000'): read_image(bomb)
    monkeypatch.undo()
    monkeypatch.setattr(core, 'MAX_PIXELS', 100)
    with pytest.raises(ImageError, match='12 x 10 pixels, more than the limit of 100'): read_image(saved(Image.new('RGB', (12, 10)), 'PNG'))


def test_a_pipe_is_never_waited_for(tmp_path, predictor):
    import os
    os.mkfifo(tmp_path/'pipe.jpg')
    table = predictor.predict([tmp_path/'pipe.jpg', tmp_path, 'a\0b.jpg', tmp_path/'gone.jpg'], progress=False)
    for reason, problem in zip(('not a plain file', 'a folder', 'null', 'no such file'), table.problem): assert reason in problem


def test_no_other_program_is_started_for_an_image(tmp_path, monkeypatch):
    "Pillow would call Ghostscript for PostScript"
    import subprocess
    eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n'
    with Image.open(io.BytesIO(eps)) as known: assert known.format == 'EPS'
    def run(*args, **kwargs): raise AssertionError('a program was started')
    monkeypatch.setattr(subprocess, 'Popen', run)
    with pytest.raises(ImageError, match='not an image of a kind'): read_image(eps)


@pytest.mark.parametrize('command', ['predict', 'submit', 'gradcam', 'train'])
def test_commands_name_the_file(command, learn, files, read, sample, tmp_path, capsys, small):
    from skin_lesions.cli import main
    run = save_bundle(learn, tmp_path/'run')
    (tmp_path/'new').mkdir()
    bad = next(p for (k, p), r in zip(files, read) if k == 'truncated')
    shutil.copy(bad, tmp_path/'new'/'bad.jpg')
    out = tmp_path/('out' if command in ('gradcam', 'train') else 'out.csv')
    if command == 'train':
        data = shutil.copytree(sample, tmp_path/'data')
        shutil.copy(bad, next(data.rglob('ISIC_*.jpg')))
        status = main(['train', '--data', str(data), '--out', str(out), '--no-check', *small])
    else: status = main([command, str(tmp_path/'new'), '--bundle', str(run), '--out', str(out), '--quiet'])
    error = capsys.readouterr().err
    reasons = ('truncated', 'broken', 'not an image', 'cannot be decoded')
    assert status == 2 and '.jpg' in error and any(r in error for r in reasons), error
    assert not any(s in error for s in INSIDE) and error.count('\n') == 1, error


KILLED = """
import os, signal, sys
from skin_lesions.core import atomic_path
with atomic_path(sys.argv[1]) as tmp:
    tmp.write_text('half')
    os.kill(os.getpid(), signal.SIGKILL)
"""

def test_a_killed_process_leaves_the_old_file(tmp_path, python):
    (tmp_path/'a.json').write_text('old')
    assert python(KILLED, tmp_path/'a.json', cwd=tmp_path).returncode < 0
    assert (tmp_path/'a.json').read_text() == 'old'


@pytest.mark.parametrize('seed', range(3))
def test_json_comes_back(tmp_path, seed):
    rng = np.random.default_rng(seed)
    record = dict(a=rng.normal(size=(3, 2)), b=[np.int64(rng.integers(9)), np.float32(.5)], c={1: None, 'x': float('inf')})
    write_json(record, tmp_path/'a.json')
    again = read_json(tmp_path/'a.json')
    np.testing.assert_array_equal(again['a'], record['a'])
    assert again['b'] == record['b'] and again['c'] == {'1': None, 'x': None}


def test_a_lock_ends_with_its_process(tmp_path, python):
    "Killed while it held the lock"
    code = KILLED.replace('atomic_path', 'file_lock').replace("    tmp.write_text('half')\n", '')
    assert python(code, tmp_path/'lock', cwd=tmp_path).returncode < 0
    with file_lock(tmp_path/'lock', wait=False) as had: assert had


def test_progress_is_silent_in_a_log(tmp_path, python):
    done = python('from skin_lesions.core import progress; print(sum(progress(range(1500), "images")))', cwd=tmp_path)
    assert (done.stdout, done.stderr) == (f'{sum(range(1500))}\n', '')


def test_the_foundations_need_neither_torch_nor_fastai(tmp_path, python):
    code = 'import sys; from skin_lesions import core, classes, synthetic, patient, preprocess; print([m for m in ("torch", "fastai", "timm", "matplotlib") if m in sys.modules])'
    done = python(code, cwd=tmp_path)
    assert done.stdout == '[]\n', done.stdout + done.stderr


def test_heic_and_dicom_are_read_by_their_packages(tmp_path, monkeypatch):
    "Through stand-ins for the packages: which files go to them, and what is refused"
    import sys
    from types import SimpleNamespace
    from skin_lesions.core import ImageError, image_files, read_image
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    class Record(dict):
        def __getattr__(self, name): return self[name]
    usual = Record(Rows=4, Columns=5, BitsAllocated=8, PhotometricInterpretation='YBR_FULL_422', PixelData=b'')
    given = SimpleNamespace(dcmread=lambda f: usual, pixels=SimpleNamespace(pixel_array=lambda data: pixels))
    (tmp_path/'a.dcm').write_bytes(bytes(128) + b'DICM'); (tmp_path/'b.HEIC').write_bytes(bytes(4) + b'ftypheic' + bytes(8))
    assert [f.name for f in image_files(tmp_path)] == ['a.dcm', 'b.HEIC']
    monkeypatch.setitem(sys.modules, 'pydicom', given)
    assert (np.asarray(read_image(tmp_path/'a.dcm')) == pixels).all()
    for change, why in ((dict(BitsAllocated=16), '16 bits'), (dict(NumberOfFrames='3'), 'several images'), (dict(Rows=10**5, Columns=10**5), 'limit'),
                        (dict(PhotometricInterpretation='MONOCHROME1'), 'MONOCHROME1')):
        monkeypatch.setattr(given, 'dcmread', lambda f: Record(usual | change))
        with pytest.raises(ImageError, match=why): read_image(tmp_path/'a.dcm')
    monkeypatch.setattr(given, 'dcmread', lambda f: Record())
    with pytest.raises(ImageError, match='without an image'): read_image(tmp_path/'a.dcm')
    asked = []
    monkeypatch.setitem(sys.modules, 'pillow_heif', SimpleNamespace(register_heif_opener=lambda: asked.append(1)))
    with pytest.raises(ImageError): read_image(tmp_path/'b.HEIC') # there is nothing in it
    assert asked == [1]


def test_dicom_without_a_suffix_is_an_image(tmp_path):
    "As hospitals export it; their index of files, and other files without a suffix, are none"
    from skin_lesions.core import image_files
    for name in ('IM000001', 'DICOMDIR', 'IM000002.txt', '.IM000003'): (tmp_path/name).write_bytes(bytes(128) + b'DICM')
    (tmp_path/'LICENSE').write_bytes(b'short'); (tmp_path/'folder').mkdir()
    assert [f.name for f in image_files(tmp_path)] == ['IM000001'] and image_files(tmp_path/'IM000001') == [tmp_path/'IM000001']
    for name in ('LICENSE', 'DICOMDIR'):
        with pytest.raises(ValueError, match='not an image by its name'): image_files(tmp_path/name)


def test_what_pillow_reads_is_found_and_read(tmp_path, monkeypatch):
    "JPEG by its other names, a GIF of one frame, AVIF; an animation and a Pillow without AVIF have a reason, other kinds of images are counted"
    import sys
    from PIL import Image
    from skin_lesions.core import ImageError, image_files, read_image
    y, x = np.mgrid[:32, :48]
    image = Image.fromarray(np.stack([4*x, 6*y, 200 - 2*x], -1).astype(np.uint8))
    for name in ('a.jfif', 'a.JPE', 'a.gif', 'a.png'): image.save(tmp_path/name, {'.gif': 'GIF', '.png': 'PNG'}.get(Path(name).suffix, 'JPEG'))
    image.save(tmp_path/'moving.gif', save_all=True, append_images=[image.rotate(90)])
    (tmp_path/'raw.CR2').touch(); (tmp_path/'scan.jp2').touch(); (tmp_path/'notes.txt').touch()
    with pytest.warns(UserWarning, match='kinds that are not read.* 2 files, raw.CR2, scan.jp2'): files = image_files(tmp_path)
    assert [f.name for f in files] == ['a.JPE', 'a.gif', 'a.jfif', 'a.png', 'moving.gif']
    for f in files[:4]: assert np.abs(np.asarray(read_image(f), float) - np.asarray(image, float)).mean() < 6, f.name
    with pytest.raises(ImageError, match='moving.gif: several images in one file'): read_image(files[4])
    other = tmp_path/'other'; other.mkdir(); (other/'a.NEF').touch()
    with pytest.raises(FileNotFoundError, match='kinds that are not read.* 1 file, a.NEF'): image_files(other)
    for brands in (b'avif\0\0\0\0avifmif1', b'mif1\0\0\0\0mif1avif'):
        (tmp_path/'b.avif').write_bytes(b'\0\0\0\x18ftyp' + brands)
        monkeypatch.setitem(sys.modules, 'PIL._avif', None)
        with pytest.raises(ImageError, match='AVIF.* pip install --upgrade pillow'): read_image(tmp_path/'b.avif')
        monkeypatch.undo()


def test_real_avif(tmp_path):
    "Where this Pillow has it; a sequence is refused"
    from PIL import Image, features
    from skin_lesions.core import ImageError, image_files, read_image
    if not features.check('avif'): pytest.skip('this Pillow has no AVIF')
    image = Image.new('RGB', (48, 32), (200, 120, 40))
    image.save(tmp_path/'a.AVIF', 'AVIF'); image.save(tmp_path/'b.avif', save_all=True, append_images=[image.rotate(90)])
    still, moving = image_files(tmp_path)
    assert read_image(still).size == (48, 32) and np.abs(np.asarray(read_image(still), float) - (200, 120, 40)).max() <= 8
    assert np.array_equal(read_image(still.read_bytes()), read_image(still))
    with pytest.raises(ImageError, match='several images'): read_image(moving)


@pytest.mark.parametrize('kind', ['heic', 'dicom'])
def test_real_heic_and_dicom(kind, tmp_path):
    "With the packages themselves, where they are installed"
    from PIL import Image
    from skin_lesions.core import read_image
    pixels = np.full((32, 48, 3), (200, 120, 40), dtype=np.uint8)
    if kind == 'heic':
        pytest.importorskip('pillow_heif').register_heif_opener()
        Image.fromarray(pixels).save(tmp_path/'a.heic', quality=95)
    else:
        pydicom = pytest.importorskip('pydicom')
        from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = SecondaryCaptureImageStorage, generate_uid(), ExplicitVRLittleEndian
        data = pydicom.dataset.Dataset(); data.file_meta = meta
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 32, 48, 3, 'RGB', 0
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation, data.PixelData = 8, 8, 7, 0, pixels.tobytes()
        data.save_as(tmp_path/'a.dicom', enforce_file_format=True)
    image = read_image(next(tmp_path.iterdir()))
    assert image.size == (48, 32) and np.abs(np.asarray(image).astype(int) - pixels).max() <= 8
