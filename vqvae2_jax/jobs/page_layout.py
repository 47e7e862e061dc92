"""The page of --job=serve in gradio: its controls, and the functions of `page` that they call."""

import contextlib
import functools
import html
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr
import jax
from ml_collections import ConfigDict

from vqvae2_jax import api
from vqvae2_jax.config import base
from vqvae2_jax.config.fields import ConfigError, Int
from vqvae2_jax.data.decode import SUFFIXES
from vqvae2_jax.jobs import page

CSS = """
.pixels img {image-rendering: pixelated}
.pixels .image-container {padding-top: 2rem}
.grid .image-frame, .grid img {width: 100%; height: auto; object-fit: contain}
"""
_HOUR = 3600  # seconds; uploads and pictures of that age are deleted


def build(generator: api.Generator, samples: int, variants: int) -> gr.Blocks:
    """Returns the page of one generator with priors.

    Args:
      generator: the networks, on the device that computes.
      samples: number of samples generated at once.
      variants: number of variants of a filled image, generated at once.
    """
    name = generator.specification.to_config().name
    with gr.Blocks(title=name, analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as blocks:
        gr.Markdown(page.describe(generator))
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                controls = _Controls(generator.specification)
            with gr.Column(scale=3):
                with gr.Tab('Samples'):
                    _add_samples(generator, controls, samples)
                with gr.Tab('Your image'):
                    image = _add_image(generator, controls)
                    _add_filling(generator, controls, variants, *image)
    return blocks


class _Controls:
    """Class, seed and sampling parameters.

    Attributes:
      label: the component of the class.
      components: all components; `config` takes their values in this order.
    """

    def __init__(self, specification: api.Specification):
        self._specification = specification
        sample, fields = specification.to_config().sample, base.schema(specification.levels)['sample']
        self.label = gr.Dropdown(
            page.class_choices(specification),
            value=page.ALL_CLASSES,
            label='class',
            info='all classes: in samples one after another, in a likelihood their average',
            elem_id='class',
            visible=specification.num_classes > 0,
        )
        self.components = [self.label, gr.Number(sample.seed, precision=0, label='seed', elem_id='seed')]
        self._parameters = page.default_parameters(specification)
        for name in dict.fromkeys(name for name, _ in self._parameters):
            field = next(iter(fields[name].values()))
            gr.Markdown(f'`{name}`: {field.doc}')
            with gr.Row():
                for level in (level for other, level in self._parameters if other == name):
                    self.components.append(_number(name, level, field, self._parameters[name, level]))

    def config(self, label: int, seed: int, *values: float) -> ConfigDict:
        """Returns `page.sampling_config` of the values of `components`."""
        parameters = dict(zip(self._parameters, values, strict=True))
        return page.sampling_config(self._specification, label, seed, parameters)


def _add_samples(generator, controls, count) -> None:
    button = gr.Button('Draw samples', variant='primary', elem_id='draw')
    outputs = [_picture('samples', 'samples', 'grid'), gr.Markdown(elem_id='progress')]
    finest = generator.specification.levels[0]

    def draw(*values):
        for level, images in page.sample_by_level(generator, controls.config(*values), count):
            text = 'all levels are sampled' if level == finest else f'preview of the level {level}; finer ones follow'
            yield page.grid(images), text

    _call(button.click, draw, controls.components, outputs)


def _add_image(generator, controls) -> tuple[gr.State, gr.ImageEditor]:
    """Adds codes, reconstructions and likelihood of an uploaded image; returns the image and the editor it lies in."""
    specification = generator.specification
    levels = tuple(reversed(specification.levels))
    upload = gr.File(file_types=list(SUFFIXES), label='image file', elem_id='upload', height=120)
    image, pictures = gr.State(time_to_live=_HOUR), []
    with gr.Row():
        pictures.append(_picture('image', 'image'))
        for level in levels:
            with gr.Column(min_width=160):
                decoded = 'reconstruction' if level == levels[-1] else f'preview: {level}'
                pictures += [_picture(f'codes: {level}', f'codes-{level}'), _picture(decoded, f'decoded-{level}')]
    likelihood = gr.Markdown(elem_id='likelihood')
    gr.Markdown('### Fill a part of the image')
    editor = gr.ImageEditor(
        label='paint over the part to fill',
        elem_id='editor',
        height=560,
        sources=(),
        transforms=(),
        layers=False,
        format='png',
        brush=gr.Brush(default_size=24, colors=['#ff0000'], color_mode='fixed'),
    )

    def show(path, label):
        found = page.read_image(path, specification)
        codes = page.encode(generator, found)
        shown = [found, page.canvas(found), page.enlarged(found)]
        for level, decoded in page.reconstructions(generator, codes).items():
            shown += [page.code_picture(specification, codes, level), page.enlarged(decoded)]
        yield *shown, 'computing the likelihood'
        yield *shown, page.likelihood_text(generator, codes, label)

    def update(found, label):
        yield page.likelihood_text(generator, page.encode(generator, found), label) if found is not None else ''

    _call(upload.upload, show, [upload, controls.label], [image, editor, *pictures, likelihood])
    _call(controls.label.change, update, [image, controls.label], [likelihood])
    return image, editor


def _add_filling(generator, controls, count, image, editor) -> None:
    specification = generator.specification
    levels = list(reversed(specification.levels))
    chosen = gr.CheckboxGroup(levels, value=levels, label='levels whose codes are sampled again', elem_id='levels')
    button = gr.Button('Fill', variant='primary', elem_id='fill')
    variants = _picture('variants', 'variants', 'grid')

    def fill(found, edited, chosen_levels, *values):
        if found is None:
            raise page.BadInput('there is no image: upload one first')
        mask = page.painted_mask(edited['layers'] if edited else (), specification.image_size)
        yield page.grid(page.fill(generator, controls.config(*values), found, mask, chosen_levels, count))

    _call(button.click, fill, [image, editor, chosen, *controls.components], [variants])


def _number(name, level, field, value) -> gr.Number:
    is_integer = isinstance(field, Int)
    return gr.Number(
        value,
        precision=0 if is_integer else None,
        step=1 if is_integer else 0.05,
        label=f'{name}: {level}',
        elem_id=f'{name}-{level}',
        min_width=80,
    )


def _picture(label, elem_id, *classes) -> gr.Image:
    return gr.Image(
        label=label,
        elem_id=elem_id,
        elem_classes=['pixels', *classes],
        format='png',  # without loss: the page shows the pixels that the model made
        interactive=False,
        buttons=['download'],
    )


def _call(event: Callable, function: Callable[..., Iterator[Any]], inputs: Sequence, outputs: Sequence) -> None:
    """Runs a function at an event; one function at a time has the device."""

    @functools.wraps(function)
    def with_messages(*values):
        with _messages():
            yield from function(*values)

    event(
        with_messages,
        inputs,
        outputs,
        concurrency_id='device',
        concurrency_limit=1,
        api_visibility='private',
    )


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    """Within the context, errors that the user can correct become messages in the page."""
    try:
        yield
    except (page.BadInput, ConfigError) as error:
        message = str(error)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith('RESOURCE_EXHAUSTED'):
            raise
        message = 'the device has too little memory: start the page with a lower serve.samples or serve.variants'
    else:
        return
    # gradio shows HTML, and the message may hold the name of a file.
    raise gr.Error(html.escape(message), duration=None, print_exception=False)
