"Skin tone: the angle by the definition of CIELAB, where the skin is, what must not matter, and files that cannot be read."
import math

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from skin_lesions.skin import SKIN_TONES, lightness_and_yellow, skin_area, skin_tone, skin_tones, tone_of, typology_angle
from skin_lesions.synthetic import draw_image


def lab_by_hand(rgb):
    "L* and b* of an sRGB colour under D65, step by step"
    linear = [v/12.92 if v <= .04045 else ((v+.055)/1.055)**2.4 for v in np.array(rgb)/255]
    y, z = .2126729*linear[0]+.7151522*linear[1]+.0721750*linear[2], .0193339*linear[0]+.1191920*linear[1]+.9503041*linear[2]
    fy, fz = (t**(1/3) if t > (6/29)**3 else t/(3*(6/29)**2)+4/29 for t in (y, z/1.08883))
    return 116*fy-16, 200*(fy-fz)


def test_colours_are_cielab_s():
    colours = np.random.default_rng(0).integers(0, 256, (200, 3), dtype=np.uint8)
    found = lightness_and_yellow(colours)
    np.testing.assert_allclose(found, [lab_by_hand(c) for c in colours], atol=1e-9)
    lab = cv2.cvtColor((colours/np.float32(255))[:, None], cv2.COLOR_RGB2LAB)[:, 0]
    assert np.abs(found-lab[:, [0, 2]]).max() < 1.5 and np.abs(found-lab[:, [0, 2]]).mean() < .3


def test_the_angle_is_arctan_of_the_fraction_and_has_no_jump():
    L, b = np.meshgrid(np.linspace(5, 99, 30), np.linspace(.5, 40, 30))
    np.testing.assert_allclose(typology_angle(L, b), np.degrees(np.arctan((L-50)/b)))
    across = typology_angle(80, np.linspace(-10, 10, 201))
    assert (np.diff(across) < 0).all() and np.abs(np.diff(across)).max() < 1 and across[100] == 90


def test_categories_begin_above_their_thresholds():
    for (name, above), (next_name, _) in zip(SKIN_TONES, SKIN_TONES[1:]):
        assert tone_of(above+.01) == name and tone_of(above) == next_name
    assert tone_of(120) == 'very light' and tone_of(-120) == 'dark' and tone_of(math.nan) == 'unknown'


@pytest.mark.parametrize('seed', range(4))
def test_what_is_not_skin_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    skin = np.clip(rng.normal([205, 160, 140], 6, (90, 120, 3)), 0, 255).astype(np.uint8)
    clear = skin_tone(skin)
    spoilt = skin.copy()
    spoilt[30:60, 40:80] = 40, 20, 30 # the lesion
    spoilt[:8, :30] = 0 # a corner of the lens
    spoilt[84:, 90:100] = 255 # a reflection
    cv2.line(spoilt, (0, 10), (119, 85), (50, 40, 30), 1) # a hair
    mask = np.zeros((180, 240), np.uint8); mask[60:120, 80:160] = 255
    for tone in (skin_tone(spoilt), skin_tone(spoilt, mask), skin_tone(spoilt, mask > 0), skin_tone(Image.fromarray(spoilt), Image.fromarray(mask))):
        assert abs(tone.angle-clear.angle) < 1 and tone.category == clear.category
    area = skin_area(spoilt, mask)
    assert not area[30:60, 40:80].any() and not area[:8, :30].any() and not area[84:, 90:100].any() and area[20, 60]
    assert not area[27:30, 60].any() # the margin around the lesion


def test_the_ring_is_as_wide_as_asked_for():
    area = skin_area(np.full((100, 140, 3), 128, np.uint8), ring=.1)
    assert area.sum() == 100*140-80*120 and area[9, 70] and not area[10, 70]


def test_the_error_is_that_of_sectors():
    "Uneven light gives a larger error, and the error of twelve sectors is the deviation of their angles over its root"
    flat = np.full((120, 120, 3), (205, 160, 140), np.uint8)
    assert skin_tone(flat).error == 0
    x = np.linspace(.7, 1.1, 120)[None, :, None]
    slope = np.clip(flat*x, 0, 255).astype(np.uint8)
    tone = skin_tone(slope, np.zeros((120, 120), bool))
    yy, xx = np.mgrid[:120, :120]
    sector = np.minimum(11, ((np.arctan2((yy-60)/120, (xx-60)/120)+np.pi)/(2*np.pi)*12).astype(int))
    angles = []
    for s in range(12):
        lab = np.array([lab_by_hand(p) for p in slope[sector == s][::7]])
        angles.append(np.degrees(np.arctan((np.median(lab[:, 0])-50)/np.median(lab[:, 1]))))
    assert tone.error == pytest.approx(np.std(angles, ddof=1)/12**.5, rel=.05) and tone.error > .5


def test_synthetic_skin_is_ranked_by_its_tone():
    "Lesions of the synthetic sample have skins of known colour"
    from skin_lesions import synthetic
    found, truth = [], []
    for lesion in range(25):
        image, mask = draw_image('nv', lesion, 0, seed=5, size=(128, 96))
        found.append(skin_tone(image, mask).angle)
        tone, _ = synthetic._lesion('nv', lesion, 5, (128, 96))
        L, b = lab_by_hand(np.clip(tone, 0, 255)); truth.append(np.degrees(np.arctan2(L-50, b)))
    ranks = [pd.Series(v).rank() for v in (found, truth)]
    assert np.corrcoef(*ranks)[0, 1] > .8


def test_too_little_skin_is_unknown():
    for tone in (skin_tone(np.zeros((40, 40, 3), np.uint8)), skin_tone(np.full((40, 40, 3), 150, np.uint8), np.ones((40, 40), bool))):
        assert tone.category == 'unknown' and math.isnan(tone.angle) and tone.fraction == 0


def test_a_frame_with_masks_and_bad_files(tmp_path):
    from skin_lesions.evaluate import scores_by
    from prediction_tables import synthetic_table
    image, mask = draw_image('mel', 1, 1, size=(128, 96))
    for i in range(3): Image.fromarray(image).save(tmp_path/f'{i}.jpg')
    Image.fromarray(mask).save(tmp_path/'0_segmentation.png')
    (tmp_path/'3.jpg').write_bytes(b'no image')
    frame = pd.DataFrame(dict(image_id=list('01234'), path=[str(tmp_path/f'{i}.jpg') for i in range(5)]))
    with pytest.warns(UserWarning, match='2 of 5 images cannot be read'): tones = skin_tones(frame, tmp_path, show=False)
    assert tones.masked.tolist() == [True]+[False]*4 and tones.ita.notna().tolist() == [True]*3+[False]*2
    assert tones.ita[0] == skin_tone(tmp_path/'0.jpg', tmp_path/'0_segmentation.png').angle != tones.ita[1] == tones.ita[2]
    table = synthetic_table(30)
    names = np.resize(['light', 'tan', 'unknown'], len(table))
    meta = tones.iloc[np.resize([0], len(table))].assign(image_id=table.image_id.to_numpy(), skin_tone=pd.Categorical(names, tones.skin_tone.cat.categories, ordered=True))
    assert scores_by(table, meta, 'skin_tone', 50).index.tolist() == ['all', 'light', 'tan', 'unknown']


def test_wrong_input():
    with pytest.raises(ValueError, match='in colour'): skin_tone(np.zeros((9, 9), np.uint8))
    with pytest.raises(ValueError, match='in colour'): skin_tone(np.zeros((9, 9, 3)))
    with pytest.raises(ValueError, match='a mask'): skin_tone(np.zeros((9, 9, 3), np.uint8), np.zeros(9))
    with pytest.raises(FileNotFoundError): skin_tone('gone.jpg')
