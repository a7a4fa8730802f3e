"Changed images: each change against another program, the same numbers for an image whatever the order, flips and intervals by hand."
import io, re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageFilter

from skin_lesions.classes import HAM10000, with_classes
from skin_lesions.robustness import CHANGES, PairedScores, change_image, changed_predictions, score_change, setting_of, some_images, stress
from skin_lesions.synthetic import draw_image
from prediction_tables import synthetic_table

CODES = list(HAM10000.codes)


@pytest.fixture(scope='module')
def image(): return draw_image('nv', 4, 0, seed=2, size=(160, 120))[0]


def changed(image, change, strength, image_id='a', seed=42): return np.asarray(change_image(image, change, strength, image_id, seed))


# ---- the changes

@pytest.mark.parametrize('strength', [1, 3, 5])
def test_jpeg_is_pillow_s(image, strength):
    file = io.BytesIO(); Image.fromarray(image).save(file, 'jpeg', quality=setting_of('jpeg', strength))
    by_pillow = np.asarray(Image.open(file), float)
    assert np.abs(changed(image, 'jpeg', strength)-by_pillow).mean() < 1 < np.abs(by_pillow-image).mean()


@pytest.mark.parametrize('strength', [1, 3, 5])
def test_blur_is_pillow_s(image, strength):
    by_pillow = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(setting_of('blur', strength)*120)), float)
    inner = np.s_[16:-16, 16:-16] # Pillow ends images otherwise, and its Gaussian is made of boxes
    assert np.abs(changed(image, 'blur', strength)-by_pillow)[inner].mean() < .8


def test_noise_has_its_deviation_and_no_bias():
    grey = np.full((200, 200, 3), 128, np.uint8)
    for strength in (1, 2, 3):
        noise = changed(grey, 'noise', strength)/255-128/255
        assert abs(noise.std()-setting_of('noise', strength)) < .002 and abs(noise.mean()) < .002


def test_brightness_and_colour_multiply_the_channels():
    low = np.random.default_rng(0).integers(20, 120, (30, 40, 3), dtype=np.uint8)
    for change in ('brightness', 'colour'):
        for i in range(8):
            gains = (changed(low, change, 3, f'i{i}').astype(float)).sum((0, 1))/low.sum((0, 1))
            expected = np.clip(np.rint(low*gains), 0, 255)
            assert np.abs(changed(low, change, 3, f'i{i}')-expected).max() <= 1
            factor = setting_of(change, 3)
            if change == 'brightness': assert np.abs(np.abs(np.log(gains))-np.log(factor)).max() < .01 and np.ptp(gains) < .01
            else: assert abs(np.log(gains).sum()) < .02 and np.abs(np.log(gains)).max() <= np.log(factor)+.01 and np.ptp(gains) > .1
    directions = {changed(low, 'brightness', 3, f'i{i}').mean() > low.mean() for i in range(8)}
    assert directions == {True, False}


def test_hairs_cover_little_and_more_of_them_are_the_same_and_others(image):
    few, many = (np.any(changed(image, 'hair', s) != image, axis=2) for s in (1, 3))
    assert 0 < few.mean() < many.mean() < .3
    assert (many | ~few).mean() > .995 # where hairs cross, a later one is on top


def test_a_quarter_of_a_turn_is_numpy_s():
    square = draw_image('nv', 4, 0, seed=2, size=(97, 97))[0]
    turned = changed(square, 'rotation', 5)
    assert min(np.abs(turned.astype(int)-np.rot90(square, k)).max() for k in (1, 3)) <= 1


def test_a_crop_is_a_window_of_the_image(image):
    for strength in (1, 5):
        window, part = changed(image, 'crop', strength), setting_of('crop', strength)
        h, w = window.shape[:2]
        assert (h, w) == (round(part*120), round(part*160))
        assert any((image[y:y+h, x:x+w] == window).all() for y in range(120-h+1) for x in range(160-w+1))
    assert len({changed(image, 'crop', 5, f'i{i}').tobytes() for i in range(6)}) == 6 # not always the centre


def test_scale_goes_both_ways_around_the_centre(image):
    larger, smaller = set(), set()
    for i in range(8):
        result = changed(image, 'scale', 4, f'i{i}').astype(float)
        factor = setting_of('scale', 4)
        inner = np.asarray(Image.fromarray(image).resize((round(160*factor), round(120*factor)), Image.Resampling.BILINEAR), float)
        top, left = (inner.shape[0]-120)//2, (inner.shape[1]-160)//2
        if np.abs(result-inner[top:top+120, left:left+160]).mean() < 4: larger.add(i)
        shrunk = np.asarray(Image.fromarray(image).resize((round(160/factor), round(120/factor)), Image.Resampling.BILINEAR), float)
        h, w = shrunk.shape[:2]
        if np.abs(result[(120-h)//2:(120-h)//2+h, (160-w)//2:(160-w)//2+w]-shrunk).mean() < 4: smaller.add(i)
    assert larger and smaller and larger | smaller == set(range(8)) and not larger & smaller


def test_strength_0_is_the_image_and_more_is_more(image):
    for change in CHANGES:
        assert (changed(image, change, 0) == image).all()
        if change in ('rotation', 'crop'): continue
        distance = [np.abs(changed(image, change, s)[:120, :160].astype(float)-image).mean() for s in range(6)]
        assert distance == sorted(distance) and len(set(distance)) == 6, (change, distance)


def test_an_image_has_its_numbers_in_every_process(image, warm_python, tmp_path):
    import hashlib
    Image.fromarray(image).save(tmp_path/'a.png')
    done = warm_python('''
import hashlib
from skin_lesions.robustness import CHANGES, change_image
print([hashlib.sha256(change_image('a.png', c, 4, 'ISIC_7').tobytes()).hexdigest() for c in reversed(CHANGES)])
''', cwd=tmp_path)
    here = [hashlib.sha256(changed(image, c, 4, 'ISIC_7').tobytes()).hexdigest() for c in reversed(CHANGES)]
    assert done.stdout.strip() == str(here), done.stderr
    assert changed(image, 'hair', 4, 'b').tobytes() != changed(image, 'hair', 4, 'c').tobytes() != changed(image, 'hair', 4, 'c', seed=1).tobytes()


def test_the_image_itself_stays(image):
    before = image.copy()
    for change in CHANGES: change_image(image, change, 5)
    assert (image == before).all()


# ---- scores

def test_flips_and_differences_by_hand():
    a, b = synthetic_table(60, seed=0), synthetic_table(60, seed=0, noise=5)
    a['decision'] = ['mel']*10+[None]*(len(a)-10) # a decision goes before the most probable class
    b['decision'] = None
    found = score_change(PairedScores(a, 100), b)
    def decided(row): return row.decision if isinstance(row.decision, str) else max(CODES, key=lambda c: row[c])
    pairs = [(decided(x), decided(y), x.dx) for (_, x), (_, y) in zip(a.iterrows(), b.iterrows())]
    assert found['flips'] == pytest.approx(np.mean([x != y for x, y, _ in pairs]))
    recalls = [[np.mean([pair[side] == c for pair in pairs if pair[2] == c]) for c in CODES] for side in (0, 1)]
    assert found['recall_difference'] == pytest.approx(np.mean(recalls[1])-np.mean(recalls[0]))
    assert found['average_recall'] == pytest.approx(np.mean(recalls[1]))
    aucs = [np.mean([(p > q)+.5*(p == q) for p in b[c][b.dx == c] for q in b[c][b.dx != c]]) for c in CODES]
    assert found['macro_auc'] == pytest.approx(np.mean(aucs))
    assert found['flips_low'] < found['flips'] < found['flips_high'] and found['recall_low'] < found['recall_difference'] < found['recall_high']


def test_intervals_are_those_of_compare():
    from skin_lesions.evaluate import compare
    a, b = synthetic_table(80, seed=3), synthetic_table(80, seed=3, noise=2)
    found, both = score_change(PairedScores(a, 300, seed=7), b), compare(a, b, 300, seed=7)
    for name, index in (('recall', ('average_recall', 'all')), ('auc', ('auc', 'macro'))):
        ends = [found[f'{name}_{end}'] for end in ('difference', 'low', 'high')]
        np.testing.assert_allclose(ends, both.loc[index, ['difference', 'low', 'high']].astype(float))


def test_the_interval_of_flips_is_over_lesions():
    "Images of a lesion that flip together count once: the interval is that of as many lesions"
    n = 40
    lesion = np.repeat(np.arange(n), 25)
    p = np.eye(7)[np.zeros(len(lesion), int)]
    a = with_classes(pd.DataFrame(p, columns=CODES).assign(image_id=[f'i{i}' for i in range(len(p))], dx='nv', group=lesion.astype(str)), HAM10000)
    b = a.copy(); b.attrs = a.attrs
    b.loc[lesion < 10, CODES] = np.eye(7)[1] # a quarter of the lesions
    found = score_change(PairedScores(a, 2000), b)
    deviation = (.25*.75/n)**.5
    assert found['flips'] == .25 and abs((found['flips_high']-found['flips_low'])/(2*1.96*deviation)-1) < .15


def test_few_lesions_without_a_flip_are_not_certain():
    table = synthetic_table(20, seed=1)
    found = score_change(PairedScores(table, 500), table)
    assert found['flips'] == found['flips_low'] == 0 and .02 < found['flips_high'] < .3 and found['recall_difference'] == 0


def test_without_labels_decisions_still_flip():
    a, b = (t.drop(columns='dx') for t in (synthetic_table(40), synthetic_table(40, noise=3)))
    found = score_change(PairedScores(a, 50), b)
    assert found['flips'] > 0 and np.isnan([found[k] for k in ('average_recall', 'macro_auc', 'recall_difference', 'auc_low')]).all()
    a['dx'] = synthetic_table(40).dx.where(np.arange(len(a)) % 2 == 0, None) # and with some labels those are scored
    part, both = score_change(PairedScores(a, 50), b), synthetic_table(40, noise=3).iloc[::2]
    assert part['average_recall'] == pytest.approx(both.groupby('dx')[CODES].apply(lambda g: (g.idxmax(axis=1) == g.name).mean()).mean())


# ---- all of it

class PixelPredictor:
    "Stands for a network: probabilities from the mean colours"
    calibration = rule = None
    preprocess = ()
    def __init__(self, seed=0):
        self.model, self.opened = torch.nn.Linear(6, 7, bias=False), 0
        with torch.no_grad(): self.model.weight.copy_(torch.randn(7, 6, generator=torch.Generator().manual_seed(seed))*40)

    def predict(self, images, **options):
        rows, problems = [], []
        for source in images.path:
            try: pixels = np.asarray(source.read(), dtype=np.float32)/255
            except (OSError, ValueError) as e: rows.append([np.nan]*7); problems.append(str(e)); continue
            self.opened += 1
            x = torch.tensor([*pixels.mean((0, 1)), *pixels.std((0, 1))])
            rows.append(self.model(x-.4).double().softmax(0).tolist()); problems.append(None)
        table = pd.DataFrame(rows, columns=CODES).assign(image_id=list(images.image_id), problem=pd.Series(problems, dtype=object))
        return with_classes(table.assign(**{c: images[c].to_numpy() for c in ('dx', 'group') if c in images}), HAM10000)


@pytest.fixture(scope='module')
def meta(tmp_path_factory):
    from skin_lesions.readers import read_metadata
    from skin_lesions.synthetic import synthetic_ham10000
    return read_metadata(synthetic_ham10000(tmp_path_factory.mktemp('data')/'ham', n_images=60, seed=7, size=(96, 72), show=False))


def test_a_stop_loses_one_table_and_another_network_finds_none(meta, tmp_path):
    options = dict(only=['blur', 'hair'], strengths=(2, 4), folder=tmp_path, n_draws=50, show=False)
    first = PixelPredictor()
    whole = stress(first, meta, **options)
    assert first.opened == 5*60 and len(list(tmp_path.iterdir())) == 5
    again = PixelPredictor()
    pd.testing.assert_frame_equal(stress(again, meta, **options), whole)
    assert again.opened == 0
    next(tmp_path.glob('hair-4*')).unlink()
    pd.testing.assert_frame_equal(stress(again, meta, **options), whole)
    assert again.opened == 60
    other = PixelPredictor(seed=1)
    assert not stress(other, meta, **options).equals(whole) and other.opened == 5*60
    other.opened = 0
    stress(other, meta[:30], **options)
    assert other.opened == 5*30
    without = {k: v for k, v in options.items() if k != 'folder'}
    pd.testing.assert_frame_equal(stress(PixelPredictor(), meta, **without), whole)


def test_rows_are_what_was_asked_for(meta):
    result = stress(PixelPredictor(), meta, ['scale', 'jpeg'], strengths=(1, 5), n_draws=20, show=False)
    assert list(zip(result.change, result.strength)) == [('none', 0), ('scale', 1), ('scale', 5), ('jpeg', 1), ('jpeg', 5)]
    assert (result.images == 60).all() and (result.lesions == meta.group.nunique()).all() and result.setting[4] == 10
    assert (result.loc[0, ['flips', 'flips_low', 'flips_high', 'recall_difference', 'auc_difference']] == 0).all()


def test_images_are_opened_one_batch_at_a_time(meta):
    seen = {}
    class Looks(PixelPredictor):
        def predict(self, images, **options):
            seen['read'] = sum(isinstance(v, (Image.Image, np.ndarray)) for s in images.path for v in vars(s).values())
            return super().predict(images, **options)
    changed_predictions(Looks(), meta, 'noise', 1)
    assert seen['read'] == 0


def test_some_images_takes_whole_lesions_in_any_order(meta):
    some = some_images(meta, 20)
    assert 20 <= len(some) < 30 and set(meta.image_id[meta.group.isin(some.group)]) == set(some.image_id)
    shuffled = some_images(meta.sample(frac=1, random_state=1), 20)
    assert set(shuffled.image_id) == set(some.image_id) != set(some_images(meta, 20, seed=1).image_id)
    assert len(some_images(meta, 1000)) == len(meta)
    with pytest.raises(ValueError, match='1 image or more'): some_images(meta, 0)


def test_unreadable_images_are_counted_and_named(meta, tmp_path):
    (tmp_path/'bad.jpg').write_bytes(b'no image')
    paths = [str(tmp_path/'bad.jpg'), 'gone.jpg', *meta.path[2:]]
    with pytest.raises(ValueError, match=f'2 of 60 images cannot be read: {meta.image_id[0]} .*{meta.image_id[1]}'):
        stress(PixelPredictor(), meta.assign(path=paths), ['blur'], show=False)


def test_the_command(meta, tmp_path, capsys, monkeypatch):
    from skin_lesions import cli
    monkeypatch.setattr(cli, 'open_bundle', lambda run, device=None: SimpleNamespace(record={}))
    def command(*args):
        status = cli.main(['stress', *map(str, args)]); printed = capsys.readouterr()
        return status, printed.out, printed.err
    status, _, error = command(tmp_path/'none')
    assert status == 2 and 'does not exist' in error
    (tmp_path/'file').touch()
    status, _, error = command('ham10000', '--out', tmp_path/'file')
    assert status == 2 and 'is a file' in error
    predictor = PixelPredictor(); predictor.record = {}
    monkeypatch.setattr(cli, 'open_bundle', lambda run, device=None: predictor)
    monkeypatch.setattr(cli, 'images_to_judge', lambda *args: (meta, None))
    status, printed, error = command('ham10000', '--only', 'blur', 'jpeg', '--n', 20, '--out', tmp_path/'out', '--quiet')
    assert not error and re.search(r'^ *blur +1 +0\.\d+ +0\.\d{3} \(0\.\d{3} to ', printed, re.M), error+printed
    table = pd.read_csv(tmp_path/'out'/'stress.csv')
    assert status == 0 and len(table) == 11 and 'unchanged: average recall' in printed and 20 <= table.images[0] < 30
    assert (tmp_path/'out'/'stress.html').read_text().count('<tr') == 12


@pytest.mark.parametrize('change', CHANGES)
def test_a_change_gets_pixels_of_its_own(change, monkeypatch):
    "PyTorch warns of arrays that are not writable, and a change must not reach the image it was given"
    own, apply = [], CHANGES[change].apply
    monkeypatch.setitem(CHANGES, change, CHANGES[change]._replace(apply=lambda pixels, *args: own.append(pixels.flags.writeable) or apply(pixels, *args)))
    image = Image.new('RGB', (40, 30), (200, 150, 120))
    before = image.tobytes()
    change_image(image, change, 3)
    assert own == [True] and image.tobytes() == before


@pytest.mark.parametrize('wrong', [dict(only=['blurr']), dict(strengths=(6,)), dict(strengths=()), dict(strengths=(1.5,)), dict(n=0), dict(n_draws=0)])
def test_wrong_arguments_are_refused_before_any_image_is_opened(wrong, meta):
    predictor = PixelPredictor()
    with pytest.raises(ValueError): stress(predictor, meta, show=False, **wrong)
    assert predictor.opened == 0
