"""The image of the web demo in nbs/images/app.jpg: `python tools/app_image.py` makes it again, after the app or the network in the package changed.
It needs Chromium, Playwright and Gradio. The lesion is synthetic. On the left the whole page on a wide screen, in light; on the right the answer on a phone, in dark."""
import io, shutil, sys
from pathlib import Path

from PIL import Image

REPO = Path(__file__).resolve().parent.parent
APP_IMAGE = REPO/'nbs'/'images'/'app.jpg'
WIDE,NARROW = 660,390 # CSS pixels
DPI = 100 # dots an inch; 96 are one a CSS pixel
MOST_BYTES = 150_000


def browser_path():
    "Chromium or Chrome of this machine"
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'))), None)


def what_it_shows(classes):
    "What the image's comment says of its contents: the diagnoses that have a probability"
    return f'{len(classes)} diagnoses: ' + ', '.join(classes.full_name(c) for c in classes)


def answered_page(browser, app, name, width, scheme):
    "The app after a click on an example"
    context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme, reduced_motion='reduce', device_scale_factor=DPI/96)
    page = context.new_page()
    page.goto(app.local_url)
    page.get_by_role('button', name=name).click(timeout=60_000)
    page.locator('#result .answer').wait_for(timeout=120_000)
    page.wait_for_function("[...document.querySelectorAll('#result img')].every(e => e.complete && e.naturalWidth > 0)")
    page.mouse.move(0, 0)
    return page


def screenshot(page, from_answer=False):
    "The page, or what begins with its answer"
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert('RGB')
    if not from_answer: return image
    top = page.locator('#result .answer').bounding_box()['y'] + page.evaluate('scrollY') - 12
    return image.crop((0, round(top*DPI/96), image.width, image.height))


def beside(left, right):
    "Two images beside each other; what the right one lacks in height is in its own colour, what it has more is cut"
    both = Image.new('RGB', (left.width + right.width, left.height), right.getpixel((0, 0)))
    both.paste(left, (0, 0))
    both.paste(right.crop((0, 0, right.width, min(right.height, left.height))), (left.width, 0))
    return both


def make_app_image(predictor, path=APP_IMAGE):
    "Ask the app about the synthetic malignant lesion, wide and narrow, and store what it shows"
    from playwright.sync_api import sync_playwright
    from skin_lesions.app import example_images, launch_app
    name = list(example_images(predictor.classes))[1]
    app = launch_app(predictor, port=0, block=False)
    try:
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=browser_path(), args=['--no-sandbox'])
            wide,narrow = (screenshot(answered_page(browser, app, name, *how), how[0]==NARROW) for how in ((WIDE, 'light'), (NARROW, 'dark')))
            browser.close()
    finally:
        app.close()
        app.folder.cleanup()
    beside(wide, narrow).save(path, 'JPEG', quality=55, optimize=True, progressive=True, dpi=(DPI, DPI), comment=what_it_shows(predictor.classes))
    return path


def problems(classes, path=APP_IMAGE):
    "What is wrong with the image: too coarse, too large, or of a network with other diagnoses"
    image = Image.open(path)
    if min(image.info.get('dpi', (0,)))<100: yield 'fewer than 100 dots an inch'
    if Path(path).stat().st_size>MOST_BYTES: yield f'{Path(path).stat().st_size:,} bytes, at most {MOST_BYTES:,}'
    shows = image.info.get('comment', b'').decode()
    if shows!=what_it_shows(classes): yield f'it shows {shows!r}, the network in the package answers {what_it_shows(classes)!r}'


if __name__=='__main__':
    from skin_lesions.predict import load_predictor
    predictor = load_predictor('ham10000', 'cpu')
    print(make_app_image(predictor))
    sys.exit('\n'.join(problems(predictor.classes)) or None)
