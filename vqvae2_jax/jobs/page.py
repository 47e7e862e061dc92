"""The functions behind the page of --job=serve: pictures and texts of one generator, from the values of its controls.

They know no web library. Every function computes one batch of a fixed size, so that JAX compiles it once.

Shapes: B samples or variants, H W C image, h_l w_l code map of level l.
"""

import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vqvae2_jax import api
from vqvae2_jax.config import base, build
from vqvae2_jax.data.decode import UnreadableImage, decode_image, read_file, resize_and_crop
from vqvae2_jax.io import names, plots
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.sample import sample_labels

ALL_CLASSES = -1
_COLUMNS = 10  # images in a row, as in samples.png
_PICTURE, _CANVAS = 224, 448  # least heights of a picture and of the canvas, in pixels

Parameters = dict[tuple[str, str], float]  # {(field of `sample`, level): value}
_keys = jax.jit(api.sample_keys)


class BadInput(ValueError):
    """Invalid or missing input from the user of the page; the message says how to correct it."""


def describe(generator: api.Generator) -> str:
    """Returns the name and the sizes of a model, in Markdown."""
    specification = generator.specification
    height, width = specification.image_size
    maps = zip(specification.levels, specification.map_shapes, specification.codebook_sizes, strict=True)
    levels = ', '.join(f'{level} {h}×{w} of {size}' for level, (h, w), size in reversed(list(maps)))
    classes = f'{specification.num_classes} classes' if specification.num_classes else 'no classes'
    color = 'gray' if specification.channels == 1 else 'RGB'
    return (
        f'# {specification.to_config().name}\n\nimages {height}×{width} {color}, {classes}; codes {levels}; '
        f'{workdir.generator_size(generator):,} parameters'
    )


def class_choices(specification: api.Specification) -> list[tuple[str, int]]:
    """Returns (text, label) of all classes together, and of each."""
    texts = specification.class_names or map(str, range(specification.num_classes))
    return [('all classes', ALL_CLASSES), *((text, label) for label, text in enumerate(texts))]


def default_parameters(specification: api.Specification) -> Parameters:
    """Returns the sampling parameters of a model with the values of its config, the coarsest level first.

    Guidance is left out for a prior that was trained without label dropout.
    """
    config = specification.to_config()
    return {
        (name, level): value
        for name, values in build.sampling_settings(config).items()
        for level, value in reversed(values.items())
        if name != 'guidance' or config.prior[level].label_dropout
    }


def sampling_config(specification: api.Specification, label: int, seed: int, parameters: Parameters) -> ConfigDict:
    """Returns the config of the model with the section `sample` that the controls stand for.

    Args:
      specification: of the model.
      label: the class, or ALL_CLASSES: one after another.
      seed: the seed.
      parameters: those of `default_parameters`.

    Raises:
      ConfigError: a value is not allowed.
    """
    config, fields = specification.to_config(), base.schema(specification.levels)['sample']
    config.sample.seed = fields['seed'].check('seed', seed)
    config.sample.labels = fields['labels'].check('class', () if label == ALL_CLASSES else (label,))
    for (name, level), value in parameters.items():
        config.sample[name][level] = fields[name][level].check(f'{name} {level}', value)
    return config


def sample_by_level(generator: api.Generator, config: ConfigDict, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Draws the first samples of the set that `--job=sample` draws with this config, the coarsest level first.

    Args:
      generator: the networks.
      config: from `sampling_config`.
      count: B, the number of samples.

    Yields:
      A level, and the images uint8 [B, H, W, C] that its codes and the coarser ones decode to.
    """
    index = np.arange(count, dtype=np.int32)
    keys, labels = (
        _keys(jax.random.key(config.sample.seed), index),
        sample_labels(config.sample.labels, config.data.num_classes, index),
    )
    parameters, codes = build.sampling_arguments(config), ()
    for level in reversed(generator.specification.levels):
        of_level = {name: {level: values[level]} for name, values in parameters.items()}
        codes = (api.sample_level(generator, level, keys, labels, codes, **of_level), *codes)
        yield level, np.asarray(api.preview(generator, codes, level=level))


def read_image(path: str, specification: api.Specification) -> np.ndarray:
    """Reads an uploaded file as uint8 [H, W, C], resized and cropped as the training images.

    Raises:
      BadInput: it is no image that can be read.
    """
    data, name = specification.to_config().data, os.path.basename(path)
    try:
        image = decode_image(read_file(path, name), data.channels, name, data.max_pixels)
    except UnreadableImage as error:
        raise BadInput(f'cannot read the image {names.printable(name)}: {error.reason}') from error
    return resize_and_crop(image, data.image_size)


def encode(generator: api.Generator, image: np.ndarray) -> tuple[jax.Array, ...]:
    """Returns the codes of an image uint8 [H, W, C], int32 [1, h_l, w_l] per level, finest first."""
    return api.encode(generator, image[None])


def reconstructions(generator: api.Generator, codes: Sequence[jax.Array]) -> dict[str, np.ndarray]:
    """Returns {level: image uint8 [H, W, C] decoded from its codes and the coarser ones}, the coarsest level first."""
    levels = reversed(generator.specification.levels)
    return {level: np.asarray(api.preview(generator, codes, level=level))[0] for level in levels}


def likelihood_text(generator: api.Generator, codes: Sequence[jax.Array], label: int) -> str:
    """Returns the negative log-likelihood of the codes of one image, in Markdown.

    Args:
      generator: the networks.
      codes: int [1, h_l, w_l] per level, finest first.
      label: the class, or ALL_CLASSES: the probability is averaged over them.
    """
    specification = generator.specification
    labels = None if label == ALL_CLASSES else np.array([label], np.int32)
    found = api.log_likelihood(generator, codes, labels)
    nats = dict(zip(specification.levels, -np.asarray(found.nats)[0], strict=True))
    sizes = dict(zip(specification.levels, (x[0].size for x in codes), strict=True))
    rows = [f'| {level} | {nats[level]:.1f} | {nats[level] / sizes[level]:.3f} |' for level in reversed(nats)]
    rows = '\n'.join(['| level | nats | nats per code |', '|---|---|---|', *rows])
    return f'{rows}\n\n**{float(found.bits[0]):.1f} bits** for the codes of the image'


def painted_mask(layers: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Returns which pixels of an image are painted.

    Args:
      layers: uint8 [h, w, 4] (RGBA) each, of any size: the paint over the image.
      size: (H, W) of the image.

    Returns:
      bool [H, W]; True where any of the pixels that a layer has there is not transparent.

    Raises:
      BadInput: nothing is painted.
    """
    mask = np.zeros(size, bool)
    for layer in layers:
        painted = Image.fromarray(np.uint8(255) * (layer[..., 3] > 0))
        # In floating point the mean of a box with any painted pixel is above 0.
        mask |= np.asarray(painted.convert('F').resize(size[::-1], Image.Resampling.BOX)) > 0
    if not mask.any():
        raise BadInput('nothing is painted: paint over the part of the image to fill')
    return mask


def fill(
    generator: api.Generator, config: ConfigDict, image: np.ndarray, mask: np.ndarray, levels: Sequence[str], count: int
) -> np.ndarray:
    """Fills the masked part of an image, as `--job=inpaint` fills the first image of a folder.

    Args:
      generator: the networks.
      config: from `sampling_config`.
      image: uint8 [H, W, C].
      mask: bool [H, W].
      levels: names of the levels whose masked codes are sampled.
      count: B, the number of variants.

    Returns:
      uint8 [B, H, W, C].

    Raises:
      BadInput: no level is chosen.
    """
    if not levels:
        raise BadInput('no level is chosen: choose the levels whose codes are sampled again')
    chosen = tuple(level for level in generator.specification.levels if level in levels)
    index = np.arange(count, dtype=np.int32)
    keys = _keys(jax.random.fold_in(jax.random.key(config.sample.seed), 0), index)
    parameters = build.sampling_arguments(config)
    labels = sample_labels(config.sample.labels, config.data.num_classes, index)
    return np.asarray(api.inpaint(generator, keys, image[None], mask, labels, levels=chosen, **parameters).images)


def grid(images: np.ndarray) -> np.ndarray:
    """Returns a picture of images uint8 [B, H, W, C], of the layout of samples.png; uint8 [H', W', 3]."""
    return plots.image_grid(images, columns=_COLUMNS, scale=plots.visible_scale(images))


def enlarged(image: np.ndarray, least: int = _PICTURE) -> np.ndarray:
    """Returns an image uint8 [H, W, C] of at least that height, every pixel a square; uint8 [H', W', 3]."""
    return plots.image_grid(image[None], columns=1, scale=max(1, -(-least // image.shape[0])))


def canvas(image: np.ndarray) -> np.ndarray:
    """Returns an image uint8 [H, W, C] at a size to paint on; uint8 [H', W', 3]."""
    return enlarged(image, _CANVAS)


def code_picture(specification: api.Specification, codes: Sequence[jax.Array], level: str) -> np.ndarray:
    """Returns a picture of the code map of a level of one image, a color per code; uint8 [H', W', 3].

    Args:
      specification: of the model.
      codes: int [1, h_l, w_l] per level, finest first.
      level: name of the level.
    """
    index = specification.level_index(level)
    return enlarged(plots.code_palette(specification.codebook_sizes[index])[np.asarray(codes[index][0])])
