"Overlap: known transforms are recovered, look-alikes are not reported, and independent small computations agree"
import math
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

import skin_lesions.overlap as overlap
from skin_lesions.core import ImageError
from skin_lesions.overlap import (FEATURE, FeatureStore, align, find_overlap, inside_frame, local_features,
    match_features, mirrored_features, overlap_gallery, perceptual_hash, unit_descriptors, weigh_words, word_list,
    words_of_images)


def texture(seed, w=320, h=240):
    "Details of several sizes around a dark patch, all different from seed to seed except the patch"
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    patch = 70*np.exp(-((x-w/2)**2+(y-h/2)**2)/(2*50**2))
    details = sum(60*cv2.GaussianBlur(rng.normal(size=(h, w)), (0, 0), s)*s for s in (1.5, 3, 6))
    return Image.fromarray(np.clip(170-patch+details*.35, 40, 250).astype(np.uint8)).convert('RGB')


def warped(image, angle, zoom, mirror):
    "Rotated clockwise about the middle and enlarged; mirrored first"
    if mirror: image = ImageOps.mirror(image)
    pixels, (w, h) = np.asarray(image), image.size
    matrix = cv2.getRotationMatrix2D(((w-1)/2, (h-1)/2), -angle, zoom)
    return Image.fromarray(cv2.warpAffine(pixels, matrix, (w, h), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "Eight photographs, four of them also as other versions"
    folder = tmp_path_factory.mktemp('images')
    for i in range(8): texture(i).save(folder/f'photo_{i}.png')
    (folder/'versions').mkdir()
    for i in range(4): warped(texture(i), 25*i, 1.2, i%2==1).save(folder/'versions'/f'version_{i}.png')
    return folder


def photos(folder): return sorted(folder.glob('photo_*.png'))


def versions(folder): return sorted((folder/'versions').glob('version_*.png'))


@pytest.mark.parametrize('angle', [0, 37, 90, 180, -140])
@pytest.mark.parametrize('mirror', [False, True])
def test_known_transforms_are_recovered(angle, mirror):
    a, b = local_features(texture(3)), local_features(warped(texture(3), angle, 1.25, mirror))
    found = align(a, b, mirrored=mirror)
    assert found.inliers > 25 and found.scale == pytest.approx(1.25, abs=.03)
    assert abs((found.rotation-angle+180) % 360-180) < 2
    assert align(a, b, mirrored=not mirror).inliers < overlap.MIN_INLIERS


def test_mirrored_descriptors_are_those_of_the_mirrored_image():
    gray = np.asarray(texture(5).convert('L'))
    sift, flipped = cv2.SIFT_create(200, contrastThreshold=.01), np.ascontiguousarray(gray[:, ::-1])
    points, descriptors = sift.detectAndCompute(gray, None)
    by_sift = [(p.pt, d) for p, d in zip(*sift.detectAndCompute(flipped, None))]
    features = np.zeros(len(points), FEATURE)
    features['xy'], features['descriptor'] = [p.pt for p in points], descriptors
    mirrored, seen, equal = mirrored_features(features), 0, 0
    for xy, descriptor in zip(mirrored['xy'], mirrored['descriptor']):
        x, y = xy[0]+gray.shape[1]-1, xy[1]
        near = [d for (px, py), d in by_sift if math.hypot(px-x, py-y) < .5]
        seen += bool(near)
        equal += any(np.corrcoef(d, descriptor)[0, 1] > .98 for d in near)
    assert seen > .4*len(features) and equal > .8*seen
    assert np.array_equal(mirrored_features(mirrored), features)


def test_matches_agree_with_opencv():
    a, b = local_features(texture(1)), local_features(warped(texture(1), 20, 1.1, False))
    nearest = cv2.BFMatcher().knnMatch(unit_descriptors(a), unit_descriptors(b), k=2)
    expected = {(one.queryIdx, one.trainIdx) for one, two in nearest if one.distance < .8*two.distance}
    assert len(expected ^ set(zip(*match_features(a, b)))) <= 1 and len(expected) > 30


def test_likeness_is_tf_idf():
    features = [local_features(texture(i)) for i in range(3)]
    words = word_list(features)
    bags = []
    for f in features:
        distances = ((unit_descriptors(f)[:, None]-words[None])**2).sum(2)
        bags.append(set(distances.argmin(1)))
    frequency = Counter(w for bag in bags for w in bag)
    weight = {w: math.log(4/(n+1)) for w, n in frequency.items()}
    vector = np.array([weight.get(w, 0) for w in range(len(words))])
    matrix = weigh_words(words_of_images(features, words), vector)
    for i, a in enumerate(bags):
        for j, b in enumerate(bags):
            norm = math.sqrt(sum(weight[w]**2 for w in a)*sum(weight[w]**2 for w in b))
            expected = sum(weight[w]**2 for w in a & b)/norm
            assert (matrix@matrix.T)[i, j] == pytest.approx(expected, abs=1e-4)


def test_versions_are_found_and_nothing_else(images, tmp_path):
    table = find_overlap(versions(images), photos(images), show=False)
    same = table[table.same]
    assert dict(zip(same.image_a, same.image_b)) == {f'version_{i}': f'photo_{i}' for i in range(4)}
    assert len(same) == 4 and list(same.sort_values('image_a').mirrored) == [False, True, False, True]
    assert table.attrs['n_a'] == 4 and table.attrs['n_b'] == 8


def test_a_collection_against_itself(images):
    table = find_overlap(images, show=False)
    same = table[table.same]
    pairs = [frozenset(pair) for pair in zip(same.image_a, same.image_b)]
    assert sorted(map(sorted, pairs)) == [[f'photo_{i}', f'version_{i}'] for i in range(4)]
    assert table.attrs['n_a'] == 12 and table.attrs['n_b'] is None


def test_a_dark_frame_is_no_photograph(tmp_path):
    "What a hash of a thumbnail takes for copies: other skin in the same frame"
    y, x = np.mgrid[:240, :320]
    frame = np.hypot(x-160, y-120) > 110
    files = []
    for seed in range(11, 16):
        pixels = (150+.3*(np.asarray(texture(seed))-150.)).astype(np.uint8)
        pixels[frame] = 5
        files.append(tmp_path/f'{seed}.png')
        Image.fromarray(pixels).save(files[-1])
        assert not inside_frame(pixels[..., 0])[frame].any() and inside_frame(pixels[..., 0]).mean() > .3
    hashes = [perceptual_hash(file) for file in files]
    differing = [(hashes[i] != hashes[j]).sum() for i in range(5) for j in range(i)]
    assert sum(n <= 10 for n in differing) >= 3
    assert not find_overlap(files, show=False).same.any()


def test_blocks_threads_and_cache_change_nothing(images, tmp_path, monkeypatch):
    whole = find_overlap(images, show=False)
    monkeypatch.setattr(overlap, '_BLOCK', 3)
    for n_workers in (1, 3):
        table = find_overlap(images, show=False, n_workers=n_workers, cache=tmp_path/'features')
        pd.testing.assert_frame_equal(table, whole)


def test_features_are_kept_and_made_again(images, tmp_path, monkeypatch):
    file = tmp_path/'a.png'
    texture(0).save(file)
    store = FeatureStore(tmp_path/'features')
    first = store.features(file)
    kept = store.file(file)
    kept.write_bytes(kept.read_bytes()[:100]) # as after a full disk
    assert np.array_equal(store.features(file), first)
    with monkeypatch.context() as patch:
        patch.setattr(overlap, 'local_features', lambda path: pytest.fail('read from the image again'))
        assert np.array_equal(store.features(file), first)
    texture(1, w=300).save(file)
    assert not np.array_equal(store.features(file), first)


def test_bad_files_are_named(images, tmp_path):
    (tmp_path/'bad.jpg').write_bytes(b'not an image')
    Image.new('RGB', (200, 150), (220, 180, 170)).save(tmp_path/'smooth.png')
    table = find_overlap([*versions(images), tmp_path/'bad.jpg', tmp_path/'gone.jpg', tmp_path/'smooth.png'],
                         photos(images), show=False)
    assert {Path(p).name for p in table.attrs['unreadable']} == {'bad.jpg', 'gone.jpg'}
    assert table.attrs['unreadable'][str(tmp_path/'gone.jpg')] == 'no such file'
    assert [Path(p).name for p in table.attrs['featureless']] == ['smooth.png'] and table.same.sum() == 4
    nothing = find_overlap([tmp_path/'bad.jpg'], photos(images), show=False)
    assert len(nothing) == 0 and list(nothing.columns) == list(table.columns)
    smooth = find_overlap([tmp_path/'smooth.png'], show=False)
    assert len(smooth) == 0


@pytest.mark.parametrize('args, options, error, words', [
    (['nowhere'], {}, FileNotFoundError, 'nowhere does not exist'),
    ([[]], {}, ValueError, 'has no image'),
    ([pd.DataFrame(dict(path=['a.png']))], {}, ValueError, "lacks column 'image_id'"),
    ([['a.png']], dict(min_inliers=4), ValueError, 'min_inliers must be a whole number, 5 or more'),
    ([['a.png']], dict(n_candidates=0), ValueError, 'n_candidates must be 1 image or more'),
])
def test_errors(args, options, error, words):
    with pytest.raises(error, match=words): find_overlap(*args, **options)


def test_groups_come_along(images):
    frame = pd.DataFrame(dict(image_id=list('abcd'), path=[str(p) for p in versions(images)], group=list('wxyz')))
    table = find_overlap(frame, photos(images), show=False)
    assert dict(zip(table.image_a, table.group_a)) == dict(a='w', b='x', c='y', d='z') and 'group_b' not in table


def test_gallery_links_and_escapes(images, tmp_path):
    table = find_overlap(versions(images), photos(images), show=False)
    table.loc[0, 'image_a'] = '<script>alert(1)</script>'
    page = overlap_gallery(table, tmp_path/'pairs.html', limit=3).read_text(encoding='utf-8')
    assert page.count('<img') == 6 and 'The first 3 are shown' in page and '<script' not in page
    assert 'data:image' not in page and Path(table.path_b[0]).as_uri() in page
    with pytest.raises(ValueError, match='find_overlap makes it'): overlap_gallery(table[['image_a']], tmp_path/'x.html')


def test_an_unreadable_image_is_an_error_alone(tmp_path):
    (tmp_path/'bad.jpg').write_bytes(b'no')
    with pytest.raises(ImageError): local_features(tmp_path/'bad.jpg')
