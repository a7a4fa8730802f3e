"Finding, listing and checking image files."
import os
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from skin_lesions.core import IMAGE_SUFFIXES, ImageError, read_image
from skin_lesions.dataset import check_images, find_ham10000, image_paths, unlabelled_images


@pytest.mark.parametrize('suffix', [*IMAGE_SUFFIXES, '.JPG', '.WebP'])
def test_an_image_is_found_whatever_its_suffix(tmp_path, suffix):
    (tmp_path/'deep'/'er').mkdir(parents=True)
    Image.new('RGB', (4, 4)).save(tmp_path/'deep'/'er'/f'a{suffix}', 'png') # known by its name; no package writes them all
    (tmp_path/'a.txt').write_text('no image')
    assert image_paths(tmp_path, ['a', 'b']) == {'a': str(tmp_path/'deep'/'er'/f'a{suffix}')}


def test_of_two_files_of_an_image_the_usual_kind_is_taken(tmp_path):
    for name in ('a.heic', 'a.jpg', 'a.gif', 'b.gif', 'b.png'): (tmp_path/name).touch()
    assert image_paths(tmp_path, ['a', 'b']) == {'a': str(tmp_path/'a.jpg'), 'b': str(tmp_path/'b.png')}


def test_a_folder_that_links_to_itself_ends(tmp_path):
    Image.new('RGB', (4, 4)).save(tmp_path/'a.png')
    os.symlink(tmp_path, tmp_path/'again')
    assert image_paths(tmp_path, ['a']) == {'a': str(tmp_path/'a.png')}


def test_the_folder_named_is_the_folder_taken(sample, tmp_path):
    "Neither a folder that is given nor HAM10000_DIR is passed over for another one"
    with patch.dict(os.environ, HAM10000_DIR=str(sample)):
        assert find_ham10000() == Path(sample)
        with pytest.raises(FileNotFoundError, match='no HAM10000 in'): find_ham10000(tmp_path)
    with patch.dict(os.environ, HAM10000_DIR=str(tmp_path)):
        with pytest.raises(FileNotFoundError, match='HAM10000_DIR'): find_ham10000()
        assert find_ham10000(sample) == Path(sample)


def test_check_images_says_what_read_image_says(tmp_path):
    "Of good files, of files cut at every length, and of other files"
    good = tmp_path/'good.jpg'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(good)
    data = good.read_bytes()
    for n in range(0, len(data), len(data)//40): (tmp_path/f'cut{n:06}.jpg').write_bytes(data[:n])
    (tmp_path/'text.jpg').write_text('not an image')
    meta = unlabelled_images(tmp_path)
    reasons = {}
    for path in meta.path:
        try: read_image(path)
        except ImageError as e: reasons[path] = e.why
    bad = check_images(meta, n_workers=2, show=False)
    assert dict(zip(bad.path, bad.reason)) == reasons and 30 < len(reasons) < len(meta)
