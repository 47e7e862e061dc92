"""The page of --job=serve without a browser: its functions against the API and the jobs, its messages, its address."""

import io
import os
import re
import socket
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from tests.test_sampling_program import make_generator
from vqvae2_jax import api
from vqvae2_jax.config import base
from vqvae2_jax.config.fields import ConfigError
from vqvae2_jax.data import sample_store
from vqvae2_jax.io import plots
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import page, serve
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run


@pytest.fixture(scope='module')
def generator():
    """Random weights; 3 classes, 16x16 gray images, codes 8x8 and 4x4, both priors with label dropout."""
    return make_generator()


@pytest.fixture
def specification(generator):
    return generator.specification


def config_of(specification, label=page.ALL_CLASSES, seed=5, **changes):
    parameters = page.default_parameters(specification) | {tuple(k.split('__')): v for k, v in changes.items()}
    return page.sampling_config(specification, label, seed, parameters)


def save(path, image):
    Image.fromarray(image).save(path)
    return str(path)


def test_samples_are_those_of_the_api_the_coarsest_level_first(generator, specification):
    config = config_of(specification, temperature__top=0.5, guidance__bottom=2.0, top_k__bottom=8)
    steps = list(page.sample_by_level(generator, config, 4))
    keys, labels = api.sample_keys(jax.random.key(5), np.arange(4)), np.array([0, 1, 2, 0])
    parameters = {'temperature': {'top': 0.5}, 'guidance': {'bottom': 2.0}, 'top_k': {'bottom': 8}}
    expected = api.sample(generator, keys, labels, **parameters)
    assert [level for level, _ in steps] == ['top', 'bottom']
    np.testing.assert_array_equal(steps[0][1], api.preview(generator, expected.codes))
    np.testing.assert_array_equal(steps[1][1], expected.images)


def test_controls_choose_class_and_seed(generator, specification):
    def sampled(*arguments):
        return list(page.sample_by_level(generator, config_of(specification, *arguments), 3))[-1][1]

    every = sampled(page.ALL_CLASSES)
    np.testing.assert_array_equal(sampled(0)[0], every[0])
    np.testing.assert_array_equal(sampled(1)[1], every[1])
    assert (sampled(1) != sampled(0)).any() and (sampled(0, 6) != sampled(0)).any()


@pytest.mark.parametrize(
    'arguments, changes, message',
    [
        ((0, None), {}, 'seed is None; it must be an integer from 0 to 4294967295'),
        ((None,), {}, r'class\[0\] is None; it must be an integer'),
        ((0,), {'temperature__top': -1.0}, r'temperature top is -1.0; it must be a number in \[0, 1000\]'),
        ((0,), {'top_p__bottom': 0.0}, r'top_p bottom is 0.0; it must be a number in \(0, 1\]'),
        ((0,), {'top_k__top': None}, 'top_k top is None; it must be an integer from 0'),
    ],
)
def test_values_that_a_control_cannot_have_are_named(specification, arguments, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(specification, *arguments, **changes)


def test_guidance_is_offered_for_priors_with_label_dropout_alone(specification):
    config = specification.to_config()
    config.prior.top.label_dropout = 0.0
    config.sample.temperature.top = 0.9
    parameters = page.default_parameters(api.Specification.of(config))
    assert ('guidance', 'bottom') in parameters and ('guidance', 'top') not in parameters
    assert list(parameters.items())[:2] == [(('temperature', 'top'), 0.9), (('temperature', 'bottom'), 1.0)]


def test_classes_have_their_names_or_numbers(specification):
    assert page.class_choices(specification) == [('all classes', -1), ('0', 0), ('1', 1), ('2', 2)]
    named = api.Specification(specification.config, ('cat', 'dog', 'eel'))
    assert page.class_choices(named)[1:] == [('cat', 0), ('dog', 1), ('eel', 2)]


def without_classes(specification):
    config = specification.to_config()
    config.data.num_classes = config.prior.top.label_dropout = config.prior.bottom.label_dropout = 0
    return api.Specification.of(config)


@pytest.mark.slow  # importing gradio takes seconds
def test_a_model_without_classes_has_no_control_of_them(specification):
    import gradio

    from vqvae2_jax.jobs import page_layout

    with gradio.Blocks():
        controls = page_layout._Controls(without_classes(specification))
    assert not controls.label.visible and controls.label.preprocess(page.ALL_CLASSES) == page.ALL_CLASSES
    assert controls.config(page.ALL_CLASSES, 1, *[1.0, 0.9, 3, 0, 1.0, 1.0]).sample.top_k.top == 3


def test_the_model_is_described(generator):
    text = page.describe(generator)
    assert text.startswith('# unnamed\n') and 'images 16×16 gray, 3 classes; codes top 4×4 of 16, bottom 8×8' in text


def test_uploads_are_cropped_and_resized_as_training_images(specification, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    np.testing.assert_array_equal(page.read_image(save(tmp_path / 'a.png', image), specification), image[..., None])
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 255
    assert page.read_image(save(tmp_path / 'b.PNG', wide), specification).min() == 255


@pytest.mark.parametrize(
    'name, data, message',
    [
        ('a.png', b'', 'cannot read the image a.png: not an image in a known format'),
        ('a.png', b'<svg></svg>', 'not an image in a known format'),
        ('a\n.png', b'text', r'cannot read the image a\\n.png'),
        ('cut.png', None, 'cannot read the image cut.png: '),
        ('missing.png', False, 'No such file'),
    ],
)
def test_broken_uploads_are_refused(specification, tmp_path, name, data, message):
    if data is None:
        whole = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(whole, 'PNG')
        data = whole.getvalue()[:1000]
    if data is not False:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(page.BadInput, match=message):
        page.read_image(str(tmp_path / name), specification)


def test_uploads_with_too_many_pixels_are_refused(specification, tmp_path):
    config = specification.to_config()
    config.data.max_pixels = 100
    path = save(tmp_path / 'a.png', np.zeros((11, 10), np.uint8))
    with pytest.raises(page.BadInput, match='it has 11x10 pixels, more than data.max_pixels=100'):
        page.read_image(path, api.Specification.of(config))


def test_reconstructions_go_from_coarse_to_fine(generator):
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 1), np.uint8)
    codes = page.encode(generator, image)
    found = page.reconstructions(generator, codes)
    assert list(found) == ['top', 'bottom']
    np.testing.assert_array_equal(found['top'], api.preview(generator, codes)[0])
    np.testing.assert_array_equal(found['bottom'], api.reconstruct(generator, image[None])[0])


def test_a_code_map_has_a_square_of_its_color_for_every_code(specification):
    codes = (np.arange(64).reshape(1, 8, 8) % 16, np.arange(16).reshape(1, 4, 4))
    picture = page.code_picture(specification, codes, 'top')
    assert picture.shape == (224, 224, 3)
    squares = picture.reshape(4, 56, 4, 56, 3)
    np.testing.assert_array_equal(squares, np.broadcast_to(squares[:, :1, :, :1], squares.shape))
    colors = squares[:, 0, :, 0].reshape(16, 3)
    np.testing.assert_array_equal(colors, plots.code_palette(16))
    assert page.code_picture(specification, codes, 'bottom').shape == (224, 224, 3)


@pytest.mark.parametrize('label', [page.ALL_CLASSES, 2])
def test_the_likelihood_is_that_of_the_api(generator, label):
    codes = page.encode(generator, np.random.default_rng(2).integers(0, 256, (16, 16, 1), np.uint8))
    expected = api.log_likelihood(generator, codes, None if label == page.ALL_CLASSES else np.array([label]))
    bottom, top = -np.asarray(expected.nats)[0]
    text = page.likelihood_text(generator, codes, label)
    assert f'| top | {top:.1f} | {top / 16:.3f} |\n| bottom | {bottom:.1f} | {bottom / 64:.3f} |' in text
    assert f'**{float(expected.bits[0]):.1f} bits**' in text


@pytest.mark.parametrize('size', [(448, 448), (28, 28), (100, 90), (7, 7)])
def test_masks_are_painted_at_any_size(size):
    layer = np.zeros((*size, 4), np.uint8)
    layer[: size[0] // 2, : size[1] // 2, 3] = 1  # hardly visible
    empty = np.zeros_like(layer)
    mask = page.painted_mask([empty, layer], (28, 28))
    expected = np.zeros((28, 28), bool)
    height, width = (-(-(n // 2) * 28 // n) for n in size)
    expected[:height, :width] = True
    np.testing.assert_array_equal(mask, expected)


def test_a_single_painted_pixel_counts_and_none_is_refused():
    layer = np.full((448, 448, 4), 255, np.uint8)
    layer[..., 3] = 0
    with pytest.raises(page.BadInput, match='nothing is painted'):
        page.painted_mask([layer], (28, 28))
    with pytest.raises(page.BadInput, match='nothing is painted'):
        page.painted_mask([], (28, 28))
    layer[447, 16 * 5, 3] = 255
    assert np.argwhere(page.painted_mask([layer], (28, 28))).tolist() == [[27, 5]]


def test_filling_needs_a_level(generator, specification):
    image, mask = np.zeros((16, 16, 1), np.uint8), np.ones((16, 16), bool)
    with pytest.raises(page.BadInput, match='no level is chosen'):
        page.fill(generator, config_of(specification), image, mask, [], 2)


@pytest.mark.system
@pytest.mark.slow
def test_the_page_draws_and_fills_as_the_jobs_do(run, tmp_path):
    generator = serve.load_generator(run)
    assert generator.specification.class_names[3] == 'Dress'
    assert len({x.sharding for x in jax.tree.leaves(generator)}) == 1 and len(jax.devices()) == 8
    run.config.sample.update(name='page', count=10, seed=7, labels=(3,))
    run_job(run, 'sample')
    *_, (_, images) = page.sample_by_level(generator, config_of(generator.specification, 3, 7), 10)
    picture = np.asarray(Image.open(run.path('samples', 'page', 'samples.png')))
    np.testing.assert_array_equal(page.grid(images), picture)

    image = run.images('test')[0]['image']
    path = save(tmp_path / 'a.png', image[..., 0])
    run.config.inpaint.update(path=path, mask='0.5,0,1,1', label=3, count=8, levels=('bottom',))
    run_job(run, 'inpaint')
    mask = np.zeros((28, 28), bool)
    mask[14:] = True
    config = config_of(generator.specification, 3, 7)
    found = page.fill(generator, config, page.read_image(path, generator.specification), mask, ['bottom'], 4)
    expected = sample_store.read_npz(run.path('inpaint', '0000-a.npz'))['arr_0']
    np.testing.assert_array_equal(found, expected[:4])


def handlers(generator):
    """The functions that the page calls, by name."""
    from vqvae2_jax.jobs import page_layout

    blocks = page_layout.build(generator, 3, 2)
    return {function.name: function.fn for function in blocks.fns.values()}


@pytest.mark.slow  # importing gradio takes seconds
def test_mistakes_become_messages(generator, specification, tmp_path):
    import gradio

    calls = handlers(generator)
    assert set(calls) == {'draw', 'show', 'update', 'fill'}
    controls = [page.ALL_CLASSES, 5, *page.default_parameters(specification).values()]
    (tmp_path / '<b>.png').write_bytes(b'no image')
    wrong = {
        'seed is None; it must be an integer': ('draw', *controls[:1], None, *controls[2:]),
        'cannot read the image &lt;b&gt;.png: not an image': ('show', str(tmp_path / '<b>.png'), 0),
        'there is no image: upload one first': ('fill', None, None, ['top'], *controls),
        'nothing is painted': ('fill', np.zeros((16, 16, 1), np.uint8), None, ['top'], *controls),
    }
    for message, (name, *values) in wrong.items():
        with pytest.raises(gradio.Error, match=message) as error:
            list(calls[name](*values))
        assert not error.value.print_exception
    assert list(calls['update'](None, 0)) == ['']


@pytest.mark.slow  # importing gradio takes seconds
def test_only_a_lack_of_memory_of_the_device_becomes_a_message(generator, specification, monkeypatch):
    import gradio

    def fail(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(page, 'sample_by_level', fail)
    controls = [page.ALL_CLASSES, 5, *page.default_parameters(specification).values()]
    message = 'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.'
    with pytest.raises(gradio.Error, match='lower serve.samples or serve.variants'):
        list(handlers(generator)['draw'](*controls))
    message = 'INTERNAL: other'
    with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
        list(handlers(generator)['draw'](*controls))


@pytest.mark.slow  # importing gradio takes seconds
def test_the_page_is_for_this_machine_and_reports_no_use(generator):
    options = base.get_config().serve
    assert options.host == '127.0.0.1'
    app = serve.make_app(generator, options)
    (blocks,) = [route.app.get_blocks() for route in app.routes if hasattr(getattr(route, 'app', None), 'get_blocks')]
    assert not blocks.analytics_enabled and not blocks.enable_monitoring and not blocks.run_history
    assert blocks.max_file_size == 2**24
    assert not re.search(r'url\(["\']?\w*:?//', blocks.theme_css + blocks.css) and not blocks.stylesheets


def test_an_address_in_use_is_named():
    options = base.get_config().serve
    options.port = 0
    with serve.bind(options) as taken:
        options.port = taken.getsockname()[1]
        with pytest.raises(JobError, match=f'serve.host=127.0.0.1 and serve.port={options.port}: .*in use.* another'):
            serve.bind(options)
    options.update(host='203.0.113.1', port=0)  # of no machine
    with pytest.raises(JobError, match='serve.host=203.0.113.1 and serve.port=0: .*as --config.serve.host'):
        serve.bind(options)


@pytest.mark.skipif(not socket.has_ipv6, reason='this machine has no IPv6')
def test_an_address_may_be_ipv6():
    options = base.get_config().serve
    options.update(host='::1', port=0)
    try:
        listener = serve.bind(options)
    except JobError as error:
        pytest.skip(str(error))
    with listener:
        assert listener.family == socket.AF_INET6


def test_a_missing_gradio_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(JobError, match=r'--job=serve needs gradio \(.*\): pip install gradio'):
        serve.serve(Run(config, tmp_path))


def test_several_processes_are_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(JobError, match='--job=serve runs in one process'):
        serve.serve(Run(config, tmp_path))


def test_files_of_the_page_are_private_and_go_with_it(monkeypatch):
    monkeypatch.setenv('GRADIO_TEMP_DIR', '/before')
    with serve._private_files():
        folder = os.environ['GRADIO_TEMP_DIR']
        assert os.stat(folder).st_mode & 0o777 == 0o700
        os.mkdir(os.path.join(folder, 'upload'))
    assert not os.path.exists(folder) and os.environ['GRADIO_TEMP_DIR'] == '/before'
