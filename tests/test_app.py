"The web demo in a real browser: what a person sees and does, and what is left behind."
import importlib.util, io, json, os, re, shutil, subprocess, sys, time, urllib.error, urllib.request, webbrowser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from skin_lesions.app import launch_app
from skin_lesions.style import percent_text
from skin_lesions.classes import HAM10000
from skin_lesions.core import NOTICE
from skin_lesions.data import ham10000_dataloaders
from skin_lesions.readers import read_metadata
from skin_lesions.decide import answer_in_words, fit_calibration, fit_referral
from skin_lesions.learner import two_stage_learner
from skin_lesions.synthetic import draw_non_lesion
from skin_lesions.ood import fit_ood
from skin_lesions.predict import load_predictor
from skin_lesions.bundle import save_bundle
from skin_lesions.predictions import get_predictions
from skin_lesions.split import split_by_lesion

pytestmark = pytest.mark.skipif(importlib.util.find_spec('gradio') is None, reason="the app is an extra: pip install gradio") # which takes seconds to import
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'))), None)
SHOTS = os.environ.get('APP_SCREENSHOTS') # a folder to look at them


@pytest.fixture(scope='module')
def bundle(sample, tmp_path_factory):
    "A small network with calibration, referral and an out-of-distribution score"
    meta = split_by_lesion(read_metadata(sample))
    torch.manual_seed(0)
    learn = two_stage_learner(ham10000_dataloaders(meta, 64, bs=16, arch='test_efficientnet', num_workers=0, device='cpu'), 'test_efficientnet', pretrained=False)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 3e-3)
    table = get_predictions(learn)
    calibration = fit_calibration(table, 'temperature')
    folder = tmp_path_factory.mktemp('app')/'bundle'
    return save_bundle(learn, folder, calibration=calibration, referral=fit_referral(calibration.calibrate(table, overlap='ignore')), ood=fit_ood(learn, n=100))


@pytest.fixture(scope='module')
def app(bundle):
    app = launch_app(load_predictor(bundle, 'cpu'), port=0, max_mb=.5, max_images=4, per_minute=400, block=False)
    yield app
    app.close()
    app.folder.cleanup()


@pytest.fixture(scope='module')
def chromium():
    if BROWSER is None: pytest.skip('no Chromium on this machine (Debian: apt-get install chromium)')
    api = pytest.importorskip('playwright.sync_api')
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'])
        yield browser
        browser.close()


SCREENS = dict(desktop=(1280, 900), phone=(390, 844))
each_screen = pytest.mark.parametrize('page', SCREENS, indirect=True)


@pytest.fixture
def page(request, chromium, app):
    "A visit; in the end, nothing was asked of another machine and nothing lies about"
    size = dict(zip(('width', 'height'), SCREENS[getattr(request, 'param', 'desktop')]))
    context = chromium.new_context(viewport=size, accept_downloads=True)
    page, asked = context.new_page(), []
    page.on('request', lambda r: asked.append(r.url))
    page.goto(app.local_url)
    page.locator('#files input[type=file]').wait_for(state='attached', timeout=60_000)
    page.size = size
    yield page
    assert asked and not [u for u in asked if not u.startswith((app.local_url, 'data:', 'blob:'))], 'only this machine is asked'
    context.close()
    for _ in range(50): # the queue hands the answer over before the worker has ended
        left = [p for p in Path(app.folder.name).rglob('*') if p.is_file() and p.stat().st_size] # Gradio leaves empty ones, swept up later
        if not left: break
        time.sleep(.1)
    assert not left


def ask(page, *files):
    "Drop files and wait for the answer"
    page.locator('#files input[type=file]').set_input_files([str(f) for f in files])
    page.locator('#result .answer').wait_for(timeout=60_000)
    for width, height in SCREENS.values():
        page.set_viewport_size(dict(width=width, height=height))
        assert page.evaluate('document.documentElement.scrollWidth') <= width, 'nothing hangs over the edge'
    page.set_viewport_size(page.size)
    return page.locator('#result').inner_text()


def shot(page, name):
    if SHOTS: page.screenshot(path=f"{SHOTS}/{name}-{page.viewport_size['width']}.png", full_page=True)


def photograph(sample, path, i=0):
    "An image with what a phone writes beside it"
    image = Image.open(sorted(sample.rglob('*.jpg'))[i])
    exif = Image.Exif()
    exif[0x010f], exif[0x8825] = 'SECRETPHONE', {1: 'N', 2: (48.0, 12.0, 30.0)}
    image.save(path, exif=exif)
    return path


@each_screen
def test_a_photograph(page, sample, bundle, tmp_path):
    file = photograph(sample, tmp_path/'mole <b>.jpg')
    assert b'SECRETPHONE' in file.read_bytes()
    assert NOTICE.split(':')[0] in page.locator('#notice').inner_text() and page.locator('#notice').is_visible()
    shown = ask(page, file)
    shot(page, 'answer')
    predictor = load_predictor(bundle, 'cpu')
    row = predictor.predict(file, progress=False).iloc[0]
    for c in HAM10000: assert HAM10000.full_name(c) in shown and percent_text(float(row[c])) in shown
    words = answer_in_words(row, HAM10000, referral=predictor.referral)
    for text in (words.advice, words.finding, *words.notes, 'mole b.jpg'): assert text in shown, text # Gradio takes <> out of names
    images = page.locator('#result img')
    assert images.count() == 2 and all(images.nth(i).evaluate('e => e.complete && e.naturalWidth > 0') for i in range(2))
    content = page.content()
    assert 'SECRETPHONE' not in content and 'SECRETPHONE' not in ''.join(filter(None, (images.nth(i).get_attribute('src') for i in range(2))))
    assert page.locator('#notice').is_visible()


def test_an_image_without_a_lesion(page, tmp_path):
    Image.fromarray(draw_non_lesion('text', 0, size=(300, 225))).save(tmp_path/'page.png')
    shown = ask(page, tmp_path/'page.png')
    shot(page, 'no-lesion')
    assert 'does not look like a dermatoscopic image' in shown and 'Suggests' not in shown and 'all-clear' not in shown


def test_a_file_that_is_not_an_image(page, tmp_path):
    (tmp_path/'bad.jpg').write_text('this is not an image')
    shown = ask(page, tmp_path/'bad.jpg')
    shot(page, 'bad')
    assert 'This file cannot be used.' in shown and 'bad.jpg' in shown and 'Traceback' not in page.content()


def test_a_file_that_is_too_large(page, sample, tmp_path):
    (tmp_path/'large.jpg').write_bytes(sorted(sample.rglob('*.jpg'))[0].read_bytes() + bytes(600_000))
    page.locator('#files input[type=file]').set_input_files(str(tmp_path/'large.jpg'))
    toast = page.get_by_text('exceed the maximum allowed size', exact=False).first
    toast.wait_for(timeout=30_000)
    shot(page, 'large')
    assert not page.locator('#result .answer').count()
    page.reload()
    page.locator('#files input[type=file]').wait_for(state='attached', timeout=60_000)
    assert '%' in ask(page, photograph(sample, tmp_path/'small.jpg')), 'and the page goes on'


REJECTED = {'scan.pdf': bytes(99), 'letter.txt': b'text', 'large.jpg': bytes(600_000)}


@pytest.mark.parametrize('how', ['chosen', 'dropped'])
def test_no_answer_stays_when_other_files_are_given(page, sample, tmp_path, how):
    "Gradio rejects a file by its name or size without asking the app; the answer of the image before goes all the same"
    photo = photograph(sample, tmp_path/'mole.jpg')
    for name, data in REJECTED.items():
        assert 'mole.jpg' in ask(page, photo), 'the same image gets its answer again'
        (tmp_path/name).write_bytes(data)
        if how == 'chosen': page.locator('#files input[type=file]').set_input_files(str(tmp_path/name))
        else:
            transfer = page.evaluate_handle('([name, n]) => {const d = new DataTransfer(); d.items.add(new File([new Uint8Array(n)], name)); return d}', [name, len(data)])
            page.locator('#files button').first.dispatch_event('drop', {'dataTransfer': transfer})
        page.locator('#result .answer').wait_for(state='detached', timeout=30_000)
        assert '%' not in page.locator('#result').inner_text()


@each_screen
def test_several_images_and_their_table(page, sample, bundle, tmp_path):
    files = [photograph(sample, tmp_path/f'{name}.jpg', i) for i, name in enumerate(('one', '=two'))] + [tmp_path/'bad.jpg']
    files[-1].write_text('no')
    shown = ask(page, *files)
    shot(page, 'table')
    assert 'one.jpg' in shown and 'all 7 probabilities of 3 images' in shown and '1 without an answer' in shown
    predictor = load_predictor(bundle, 'cpu')
    rows = {f.name: r for f, (_, r) in zip(files, predictor.predict(files, progress=False).iterrows())}
    words = {name: answer_in_words(r, HAM10000, referral=predictor.referral) for name, r in rows.items()}
    cards = page.locator('#result tbody tr')
    order = [cards.nth(i).locator('th').inner_text() for i in range(cards.count())]
    assert order == sorted(words, key=lambda n: -1 if words[n].risk is None else words[n].risk, reverse=True), 'largest risk on top'
    for i, name in enumerate(order[:2]):
        assert percent_text(words[name].risk) in cards.nth(i).inner_text() and cards.nth(i).locator('th img').count() == 1
    lines = cards.first.locator('th span').evaluate("e => e.getClientRects().length && e.offsetHeight/parseFloat(getComputedStyle(e).lineHeight)")
    assert lines < 2.5, 'letters do not stack'
    image = cards.first.locator('details img')
    assert not image.is_visible()
    cards.first.locator('summary').focus()
    page.keyboard.press('Enter')
    image.wait_for(state='visible', timeout=10_000)
    with page.expect_download() as download: page.locator('#result a[download]').click()
    text = Path(download.value.path()).read_text()
    table, right = pd.read_csv(io.StringIO(text)), load_predictor(bundle, 'cpu').predict(files[:2], progress=False)
    assert list(table.image_id) == ['one.jpg', "'=two.jpg", 'bad.jpg'] and table.problem.notna().tolist() == [False, False, True]
    pd.testing.assert_frame_equal(table.loc[:1, list(HAM10000)].astype(float), right[list(HAM10000)].astype(float), atol=1e-6)
    shown = ask(page, *[photograph(sample, tmp_path/f'{i}.jpg', i) for i in range(5)])
    page.get_by_text('too many at once').wait_for(timeout=30_000)


def test_other_doors_are_shut(app):
    "One function to call, no file of the machine, no listening on other addresses"
    assert app.local_url.startswith('http://127.0.0.1:')
    for path in ('gradio_api/file=/etc/passwd', 'gradio_api/file=../../etc/passwd'):
        with pytest.raises(urllib.error.HTTPError) as e: urllib.request.urlopen(app.local_url + path)
        assert e.value.code in (403, 404)
    with urllib.request.urlopen(app.local_url + 'gradio_api/info') as r: assert list(json.loads(r.read())['named_endpoints']) == ['/predict']
    assert not app.share and app.max_file_size == int(.5*2**20)


# Gradio fades an answer that is on its way in elements around it, and colours are right when that is over
SETTLED = """(() => {
    let part = document.querySelector('#result .answer') || document.querySelector('#result')
    for (; part; part = part.parentElement) if (getComputedStyle(part).opacity != 1) return false
    return true
})()"""
FADING = "[...document.querySelectorAll('#result *')].filter(e => getComputedStyle(e).transitionDuration != '0s').map(e => e.className)"
AXE = 'no axe-core on this machine: pip install axe-playwright-python'


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1280, 390])
def test_for_people_with_other_eyes_and_hands(chromium, app, sample, tmp_path, scheme, width):
    "axe-core finds nothing against WCAG and its best practices, in light and dark, on each kind of page; the keyboard reaches everything and shows where it is"
    axe = pytest.importorskip('axe_playwright_python.sync_playwright', reason=AXE).Axe()
    page = chromium.new_context(viewport=dict(width=width, height=844), color_scheme=scheme, reduced_motion='reduce').new_page()
    def check(name):
        page.wait_for_function(SETTLED, timeout=30_000)
        assert page.evaluate(FADING) == [], 'who asks for less motion gets none'
        found = [(v['id'], n['target'], n['html'][:200]) for v in axe.run(page).response['violations'] for n in v['nodes']]
        assert not found, (name, found)
        shot(page, f'{name}-{scheme}')
    page.goto(app.local_url)
    page.locator('#files input[type=file]').wait_for(state='attached', timeout=60_000)
    page.wait_for_function("document.querySelector('#result')?.getAttribute('aria-live') === 'polite'", timeout=30_000) # answers are read out
    check('start')
    reached = []
    for _ in range(4):
        page.keyboard.press('Tab')
        reached.append(page.evaluate("(() => {const e = document.activeElement, s = getComputedStyle(e); return [e.ariaLabel || e.innerText, s.outlineStyle != 'none' && parseFloat(s.outlineWidth) >= 2]})()"))
    assert [seen for _, seen in reached] == [True]*4 and reached[0][0].startswith('Click to upload') and reached[3][0] == 'Page of text', reached
    page.keyboard.press('Enter') # on the last example
    page.locator('#result h2', has_text='Page of text').wait_for(timeout=60_000)
    check('example')
    page.locator('#files input[type=file]').set_input_files([str(photograph(sample, tmp_path/f'{i}.jpg', i)) for i in range(2)])
    page.locator('#result table').wait_for(timeout=60_000)
    page.locator('#result summary').first.click()
    check('many')
    of_row, of_map = (page.locator(f'#result {e}').first for e in ('tbody tr', 'details[open] img'))
    framed = of_row.evaluate('e => parseFloat(getComputedStyle(e).borderTopWidth) >= 1')
    assert framed == (width < 480), 'on a phone, each image has a frame'
    assert of_map.bounding_box()['width'] >= 150 and of_map.evaluate("e => {const w = e.closest('.wide'); return w.scrollWidth <= w.clientWidth}"), 'a map is large, and nothing of it is cut off'
    page.context.close()


def test_axe_can_find_something(chromium):
    axe = pytest.importorskip('axe_playwright_python.sync_playwright', reason=AXE).Axe()
    page = chromium.new_page()
    page.set_content('<html lang=en><title>t</title><main><h1>h</h1><p style="color:#bbb;background:#fff">faint</p><img src="data:,">')
    assert {v['id'] for v in axe.run(page).response['violations']} >= {'color-contrast', 'image-alt'}
    page.close()


@each_screen
def test_the_answer_as_one_file(page, chromium, sample, tmp_path):
    "It opens without the app, looks the same, runs nothing and asks for nothing"
    shown = ask(page, photograph(sample, tmp_path/'mole.jpg'))
    with page.expect_download() as download: page.get_by_role('button', name='Save as one file').click()
    file = tmp_path/'answer.html'
    download.value.save_as(file)
    text, asked = file.read_text(encoding='utf-8'), []
    assert '<script' not in text and "default-src 'none'" in text and '@@' not in text
    context = chromium.new_context(viewport=dict(width=page.size['width'], height=844))
    other = context.new_page()
    other.on('request', lambda r: asked.append(r.url))
    other.goto(file.as_uri())
    saved = other.locator('main').inner_text().replace('\N{NO-BREAK SPACE}', ' ')
    for line in filter(None, map(str.strip, shown.replace('Save as one file', '').replace('Print', '').splitlines())): assert line in saved, line
    assert NOTICE.split(':')[0] in saved and not other.locator('button').count()
    images = other.locator('img')
    assert images.count() == 2 and all(images.nth(i).evaluate('e => e.naturalWidth > 0') for i in range(2))
    assert other.evaluate('document.documentElement.scrollWidth') <= page.size['width'] and not [u for u in asked if not u.startswith(('file:', 'data:'))]
    shot_name = f"{SHOTS}/saved-{page.size['width']}.png"
    if SHOTS: other.screenshot(path=shot_name, full_page=True)
    context.close()


def test_an_example_counts_and_has_the_answer_of_its_image(page, bundle):
    from skin_lesions.app import example_images
    predictor = load_predictor(bundle, 'cpu')
    for name, image in example_images(HAM10000).items():
        page.get_by_role('button', name=name, exact=True).click()
        page.locator('#result h2', has_text=name).wait_for(timeout=60_000)
        words = answer_in_words(predictor.predict(image, progress=False).iloc[0], HAM10000, referral=predictor.referral)
        assert words.advice in page.locator('#result').inner_text()


def test_the_curl_lines_of_the_page(app, bundle, sample, repo, tmp_path):
    "What the notebook says to programs, as it stands there"
    if not shutil.which('curl') or not shutil.which('bash'): pytest.skip('no curl or no bash')
    cells = json.loads((repo/'nbs'/'80_app.ipynb').read_text(encoding='utf-8'))['cells']
    lines, = re.findall(r'```bash\n(url=.*?)```', '\n'.join(''.join(c['source']) for c in cells), re.S)
    photo = photograph(sample, tmp_path/'photo.jpg')
    def run(script): return subprocess.run(['bash', '-c', script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    script = lines.replace('http://127.0.0.1:7860/', app.local_url)
    done = run(script)
    assert done.stdout.startswith('event: complete'), done
    (answer,), = json.loads(done.stdout.split('data: ', 1)[1])
    predictor = load_predictor(bundle, 'cpu')
    row = predictor.predict(photo, progress=False).iloc[0]
    words = answer_in_words(row, HAM10000, referral=predictor.referral)
    assert (answer['file'], answer['advice'], answer['finding'], answer['decision']) == ('photo.jpg', words.advice, words.finding, row.decision)
    assert answer['probabilities'] == {HAM10000.full_name(c): pytest.approx(float(row[c]), abs=1e-4) for c in HAM10000}
    # a client can name any file; only its uploads are read and deleted
    for sent in (str(photo), dict(path=str(photo), meta=dict(_type='gradio.FileData')), dict(path=str(photo))):
        refused = run(re.sub(r'^file=.*$', lambda m: f"file='{json.dumps(sent)}'", script, flags=re.M))
        assert 'complete' not in refused.stdout and photo.is_file(), refused


@pytest.fixture()
def busy(bundle, monkeypatch):
    "Apps whose answers wait until they are let go; none of the images is big"
    import threading
    from skin_lesions import app as module
    from skin_lesions.app import diagnose
    monkeypatch.setenv('GRADIO_TEMP_DIR', os.environ.get('GRADIO_TEMP_DIR', ''))
    gate, together, started, apps = threading.Event(), threading.Lock(), [], []
    def slow(predictor, images, **kwargs):
        with together: started.append(predictor)
        assert gate.wait(120)
        return diagnose(predictor, images, **kwargs)
    monkeypatch.setattr(module, 'diagnose', slow)
    def launch(**kwargs):
        apps.append(launch_app(load_predictor(bundle, 'cpu'), port=0, max_images=4, per_minute=400, block=False, **kwargs))
        return apps[-1]
    yield launch, gate, started
    gate.set()
    for app in apps:
        app.close()
        app.folder.cleanup()


def post(url, body):
    "Status and text of a POST of JSON"
    request = urllib.request.Request(url, json.dumps(body).encode(), {'Content-Type': 'application/json'})
    try:
        with urllib.request.urlopen(request, timeout=120) as r: return r.status, r.read().decode()
    except urllib.error.HTTPError as e: return e.code, e.read().decode()


def ask_for(app, photo, name):
    "Upload as a program does, and join the queue"
    edge = 'x'*20
    head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/jpeg\r\n\r\n'
    body = head.encode() + photo.read_bytes() + f'\r\n--{edge}--\r\n'.encode()
    request = urllib.request.Request(f'{app.local_url}gradio_api/upload', body, {'Content-Type': f'multipart/form-data; boundary={edge}'})
    with urllib.request.urlopen(request, timeout=120) as r: path, = json.loads(r.read())
    return post(f'{app.local_url}gradio_api/call/predict', dict(data=[[dict(path=path, meta=dict(_type='gradio.FileData'))]]))


def answer_for(app, joined):
    with urllib.request.urlopen(f"{app.local_url}gradio_api/call/predict/{json.loads(joined[1])['event_id']}", timeout=120) as r: text = r.read().decode()
    assert text.startswith('event: complete'), text
    (answer,), = json.loads(text.split('data: ', 1)[1])
    return answer


def test_sixteen_clients_wait_and_each_gets_its_own_answer(busy, bundle, sample, tmp_path):
    "As many at once as there are copies of the network; the others wait, and maps of one do not hook into another"
    launch, gate, started = busy
    app, plain = launch(at_once=3), load_predictor(bundle, 'cpu')
    photos = [photograph(sample, tmp_path/f'{i}.jpg', i) for i in range(16)]
    with ThreadPoolExecutor(16) as clients:
        joined = list(clients.map(lambda p: ask_for(app, p, p.name), photos))
        assert [status for status, _ in joined] == [200]*16
        for _ in range(300):
            if len(started) == 3: break
            time.sleep(.1)
        time.sleep(.5)
        assert len(started) == 3 == len({id(p) for p in started}) and app.pool.n == 3
        gate.set()
        answers = list(clients.map(lambda j: answer_for(app, j), joined))
    table = plain.predict(photos, progress=False)
    for photo, answer, row in zip(photos, answers, table.to_dict('records')):
        decision = None if pd.isna(row['decision']) else row['decision'] # an image that is out-of-distribution gets none
        assert answer['file'] == photo.name and answer['decision'] == decision
        assert answer['probabilities'] == {HAM10000.full_name(c): pytest.approx(row[c], abs=1e-3) for c in HAM10000}
    assert len({id(p) for p in started}) == 3 and app.pool.free.qsize() == 3


def test_a_full_queue_says_so(busy, sample, tmp_path):
    launch, gate, started = busy
    app, photo = launch(at_once=1, waiting=1), photograph(sample, tmp_path/'a.jpg')
    joined = [ask_for(app, photo, 'first.jpg')]
    for _ in range(300):
        if started: break
        time.sleep(.1)
    for i in range(3): joined.append(ask_for(app, photo, f'{i}.jpg'))
    refused = [text for status, text in joined if status == 503]
    assert refused and all('Queue is full' in text for text in refused), joined
    gate.set()
    assert [answer_for(app, j)['file'] for j in joined if j[0] == 200][0] == 'first.jpg'


def test_copies_of_a_predictor_are_lent_and_come_back(bundle, monkeypatch):
    from skin_lesions.app import PredictorPool, usable_at_once
    plain = load_predictor(bundle, 'cpu')
    pool = PredictorPool(plain, 2)
    with pytest.raises(ZeroDivisionError):
        with pool.lend() as a, pool.lend() as b:
            assert a.model is not b.model and a.network.classifier is a.model and b.network.classifier is b.model
            assert pool.free.empty()
            1/0
    assert pool.free.qsize() == 2
    with pytest.raises(ValueError, match='n must be 1 or more'): PredictorPool(plain, 0)
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    assert usable_at_once(plain) == 4
    other = load_predictor(bundle, 'cpu')
    other.network.classifier = torch.nn.Identity()
    assert usable_at_once(other) == 1, 'an engine'


def test_the_browser_opens_when_asked(bundle, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, 'open', opened.append)
    monkeypatch.setenv('GRADIO_TEMP_DIR', os.environ.get('GRADIO_TEMP_DIR', '')) # launching changes it
    predictor = load_predictor(bundle, 'cpu')
    for browser in (False, True):
        app = launch_app(predictor, port=0, block=False, browser=browser)
        app.close()
        app.folder.cleanup()
    assert opened == [app.local_url]


def test_the_container_starts_what_exists(repo, cli, tmp_path):
    "The Dockerfile's command is one of ours, and what it copies is what the package is built from"
    text = (repo/'Dockerfile').read_text()
    name, command, *options = json.loads(re.search(r'^CMD (\[.*\])$', text, re.M)[1])
    help_text = cli(command, '--help', cwd=tmp_path).stdout
    assert name == 'skin_lesions' and all(o in help_text for o in options if o.startswith('--'))
    kept = [l[1:] for l in (repo/'.dockerignore').read_text().splitlines() if l.startswith('!')]
    assert all((repo/k).exists() for k in kept) and {'skin_lesions', 'settings.ini', 'setup.py', 'pyproject.toml', 'README.md'} <= set(kept)
    assert "'/src[app]'" in text and 'USER app' in text and 'STOPSIGNAL SIGINT' in text


def test_the_command(bundle, tmp_path):
    "A new interpreter says what it does before its slow imports, serves the page and ends with Ctrl-C"
    import signal
    command = [sys.executable, '-W', 'ignore', '-m', 'skin_lesions.cli', 'app', '--bundle', str(bundle), '--port', '0', '--device', 'cpu']
    printed, errors = tmp_path/'printed', tmp_path/'errors'
    with open(printed, 'w') as out, open(errors, 'w') as err:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=err, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        while '\n' not in printed.read_text() and process.poll() is None: time.sleep(.05)
        url = printed.read_text().split(' ')[0]
        assert url.startswith('http://'), printed.read_text() + errors.read_text()
        assert errors.read_text().startswith('starting the web demo')
        with urllib.request.urlopen(url) as r: assert r.status == 200 and 'skin_lesions' in r.read().decode()
    finally: process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, 130)


def test_the_space(bundle, repo, monkeypatch):
    "Its file serves the page of the bundle that the environment names, on all addresses and the port that is asked"
    import runpy, socket
    from skin_lesions import app as module
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    monkeypatch.setenv('MODEL', str(bundle))
    monkeypatch.setenv('GRADIO_SERVER_PORT', str(port))
    started, own = [], module.launch_app
    monkeypatch.setattr(module, 'launch_app', lambda *args, **kwargs: started.append(own(*args, **kwargs, block=False)))
    runpy.run_path(str(repo/'spaces'/'app.py'), run_name='__main__')
    space, = started
    try:
        assert space.server_name == '0.0.0.0' and space.server_port == port
        with urllib.request.urlopen(f'http://127.0.0.1:{port}') as r: assert r.status == 200 and 'skin_lesions' in r.read().decode()
    finally:
        space.close()
        space.folder.cleanup()


NUMBERS = {7: 'seven', 8: 'eight', 9: 'nine', 10: 'ten', 11: 'eleven'}


def test_the_image_of_the_app_is_of_the_network_in_the_package(repo, tmp_path):
    "What the page and the README show has the diagnoses that are answered, and the texts beside it say how many"
    spec = importlib.util.spec_from_file_location('app_image', repo/'tools'/'app_image.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    classes = load_predictor('ham10000', 'cpu').classes
    assert list(tool.problems(classes)) == []
    assert len(list(tool.problems(HAM10000))) == 1, 'it can fail'
    Image.open(tool.APP_IMAGE).save(tmp_path/'coarse.jpg', quality=20, dpi=(72, 72), comment='')
    assert len(list(tool.problems(classes, tmp_path/'coarse.jpg'))) == 2
    for page in ('nbs/80_app.ipynb', 'nbs/index.ipynb', 'README.md'):
        alt, = re.findall(r'!\[([^\]]+)\]\([^)]*images/app\.jpg\)', (repo/page).read_text())
        assert NUMBERS[len(classes)] in alt and not [w for n, w in NUMBERS.items() if n != len(classes) and w in alt], page
    assert f'{NUMBERS[len(classes)]} diagnoses from' in (repo/'spaces'/'README.md').read_text().lower()
