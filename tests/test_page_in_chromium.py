"""The page of --job=serve in headless Chromium: its buttons are pressed, and its pictures compared pixel by pixel."""

import base64
import contextlib
import io
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vqvae2_jax.jobs import page as functions
from vqvae2_jax.jobs import serve
from vqvae2_jax.jobs.pipeline import run_job

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.system
LIMIT = 300_000  # milliseconds that a press may take, compilation included
MAX_BYTES = 20_000
# The command line, which reports every connection that its process opens to another machine.
MAIN = """
import sys

def report(event, args):
    if event == 'socket.connect' and isinstance(args[1], tuple) and args[1][0] not in ('127.0.0.1', '::1'):
        print('connects to', args[1], flush=True)
    if event == 'socket.getaddrinfo' and args[0] not in (None, '127.0.0.1', '::1', 'localhost'):
        print('connects to', args[0], flush=True)

sys.addaudithook(report)
from vqvae2_jax import main
main.run()
"""


def chromium():
    """The path of Chromium."""
    found = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not found and 'CI' not in os.environ:
        pytest.skip('Chromium is not installed (on Debian: apt-get install chromium)')
    return found


@pytest.fixture(scope='module')
def served(finished, tmp_path_factory):
    """The address of the page of the finished run; afterwards, that the server has ended as it should."""
    chromium()
    temporary = tmp_path_factory.mktemp('served')
    options = ['--config=tiny', '--job=serve', f'--workdir={finished.workdir}', '--config.data.held_out=(0.9,0.06)']
    options += ['--config.serve.port=0', f'--config.serve.max_bytes={MAX_BYTES}']
    with (temporary / 'log').open('w+') as log:
        server = subprocess.Popen(
            [sys.executable, '-u', '-c', MAIN, *options],
            cwd=ROOT,
            env=os.environ | {'TMPDIR': str(temporary)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield wait_for_address(server, temporary / 'log')
        finally:
            server.send_signal(signal.SIGINT)
            status = server.wait(60)
    output = (temporary / 'log').read_text()
    assert status == 128 + signal.SIGINT and 'SIGINT: the page is closed' in output, output
    assert 'connects to' not in output and 'Traceback' not in output, output
    assert not list(temporary.glob('vqvae2_jax-page-*')), 'uploads are left'


def wait_for_address(server, log):
    while server.poll() is None:
        if found := re.search(r'serve: (http://127\.0\.0\.1:\d+) ', log.read_text()):
            return found[1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium())
        yield browser
        browser.close()


@pytest.fixture
def tab(served, browser):
    """A tab with the page; afterwards, that it asked no other machine for anything and that no script failed."""
    tab, requests, errors = browser.new_page(viewport={'width': 1280, 'height': 1500}), [], []
    tab.set_default_timeout(LIMIT)
    tab.on('request', lambda request: requests.append(request.url))
    tab.on('pageerror', lambda error: errors.append(str(error)))
    tab.goto(served)
    tab.wait_for_selector('#draw')
    yield tab
    tab.close()
    elsewhere = [url for url in requests if not url.startswith((served, 'data:', f'blob:{served}'))]
    assert not elsewhere and not errors and len(requests) > 10


@pytest.fixture(scope='module')
def generator(finished):
    return serve.load_generator(finished)


def picture(tab, name):
    """The pixels of a picture of the page, as its PNG file holds them; uint8 [H, W, 3]."""
    source = tab.wait_for_selector(f'#{name} img').get_attribute('src')
    data = tab.evaluate(
        """async url => {
          const bytes = new Uint8Array(await (await fetch(url)).arrayBuffer());
          return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(''));
        }""",
        source,
    )
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == 'PNG'
    return np.asarray(image.convert('RGB'))


def choose_class(tab, name):
    tab.click('#class input')
    tab.get_by_role('option', name=name, exact=True).click()


def upload(tab, name, data):
    files = [{'name': name, 'mimeType': 'image/png', 'buffer': data}]
    tab.set_input_files('#upload input[type=file]', files=files)


def upload_image(tab, image):
    tab.get_by_role('tab', name='Your image').click()
    data = io.BytesIO()
    Image.fromarray(image).save(data, 'PNG')
    upload(tab, 'mine.png', data.getvalue())
    tab.wait_for_selector('#likelihood:has-text("bits")')


def color_image():
    """uint8 [56, 60, 3], of another size and with other channels than the model's images."""
    y, x = np.mgrid[:56, :60]
    return np.stack([4 * y, 4 * x, 2 * (x + y)], axis=-1).astype(np.uint8)


def test_samples_appear_level_by_level_and_are_those_of_the_job(tab, run):
    choose_class(tab, 'Dress')
    tab.fill('#seed input', '7')
    tab.click('#draw')
    tab.wait_for_selector('#progress:has-text("preview of the level top")')
    preview = picture(tab, 'samples')
    tab.wait_for_selector('#progress:has-text("all levels are sampled")')
    run.config.sample.update(name='page', count=10, seed=7, labels=('Dress',))
    run_job(run, 'sample')
    expected = np.asarray(Image.open(run.path('samples', 'page', 'samples.png')))
    np.testing.assert_array_equal(picture(tab, 'samples'), expected)
    assert preview.shape == expected.shape and (preview != expected).any()


def test_a_value_that_is_not_allowed_gives_a_message(tab):
    tab.fill('#temperature-top input', '-1')
    tab.click('#draw')
    tab.wait_for_selector('.toast-body:has-text("temperature top is -1; it must be a number in [0, 1000]")')
    assert not tab.query_selector('#guidance-top'), 'the prior was trained without label dropout'


def test_a_bad_file_gives_a_message_and_the_page_goes_on(tab):
    tab.get_by_role('tab', name='Your image').click()
    upload(tab, 'broken<b>.png', b'no image')
    tab.wait_for_selector('.toast-body:has-text("cannot read the image broken")')
    tab.wait_for_selector('.toast-body:has-text("not an image in a known format")')
    tab.click('.toast-close')
    tab.click('#upload button[aria-label=Clear], #upload button[title=Clear]')
    upload(tab, 'large.png', bytes(MAX_BYTES + 1))
    tab.wait_for_selector('.toast-body:has-text("maximum allowed size")')
    tab.reload()
    upload_image(tab, color_image())


def test_codes_reconstructions_and_likelihood_of_an_image_are_shown(tab, generator, tmp_path):
    choose_class(tab, 'Coat')
    upload_image(tab, color_image())
    Image.fromarray(color_image()).save(tmp_path / 'mine.png')
    image = functions.read_image(str(tmp_path / 'mine.png'), generator.specification)
    codes = functions.encode(generator, image)
    np.testing.assert_array_equal(picture(tab, 'image'), functions.enlarged(image))
    for level, decoded in functions.reconstructions(generator, codes).items():
        expected = functions.code_picture(generator.specification, codes, level)
        np.testing.assert_array_equal(picture(tab, f'codes-{level}'), expected)
        np.testing.assert_array_equal(picture(tab, f'decoded-{level}'), functions.enlarged(decoded))
    bits = re.search(r'([\d.]+) bits', functions.likelihood_text(generator, codes, 4))[1]
    assert f'{bits} bits' in tab.inner_text('#likelihood')
    choose_class(tab, 'Bag')
    bits = re.search(r'([\d.]+) bits', functions.likelihood_text(generator, codes, 8))[1]
    tab.wait_for_selector(f'#likelihood:has-text("{bits} bits")')


def test_a_painted_part_is_filled(tab, generator):
    upload_image(tab, color_image())
    tab.click('#fill')
    tab.wait_for_selector('.toast-body:has-text("nothing is painted")')
    canvas = tab.wait_for_selector('#editor canvas')
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle, y = box['x'] + box['width'] / 2, box['y'] + box['height'] / 2
    tab.mouse.move(middle - 60, y)
    tab.mouse.down()
    tab.mouse.move(middle + 60, y, steps=20)
    tab.mouse.up()
    tab.get_by_role('checkbox', name='top').uncheck()
    tab.click('#fill')
    variants = picture(tab, 'variants')
    scale = 4  # plots.visible_scale of 28 pixels
    height, width = 28 * scale, 4 * 28 * scale + 3 * 2
    assert variants.shape == (height, width, 3)
    first, second = variants[:, : 28 * scale], variants[:, 28 * scale + 2 : 2 * 28 * scale + 2]
    assert (first != second).any(), 'variants differ'
    decoded = picture(tab, 'decoded-bottom')[::8, ::8]
    kept = first[::scale, ::scale]
    changed = np.argwhere((kept != decoded).any(axis=-1))
    assert len(changed) and (kept[0] == decoded[0]).all() and (kept[-1] == decoded[-1]).all(), changed
