"""Pure functions over a trained generator: encode, decode, preview, reconstruct, sample, inpaint, log-likelihood.

The jobs that encode, decode, sample or inpaint, the notebooks and the page call these functions. For example:

  import jax
  import jax.numpy as jnp
  import vqvae2_jax as vq2

  generator = vq2.load('fashion')
  keys = vq2.sample_keys(jax.random.key(0), jnp.arange(10))
  images, codes = vq2.sample(generator, keys, labels=jnp.arange(10), temperature={'top': 0.9})

Every function is compiled by `jax.jit`, once for all generators of one specification, and may be called inside `jit`
and `vmap`. NumPy and JAX arrays of any sharding are accepted. Inside a mesh of `distributed.sharding.make_mesh`, the
weights may be sharded: a function gathers them once, before any loop, and its results are sharded along the batch.

Images are uint8, or float in [-1, 1]. Codes are a tuple with one int32 array per level, finest first. A generator
whose priors were trained on codes of another tokenizer has no stage 1: functions of images and `decode` raise
ValueError.

Shapes: B batch, H W C image, h_l w_l map of level l (0 is the finest), L levels.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vqvae2_jax.distributed import sharding
from vqvae2_jax.generator import Generator, Specification
from vqvae2_jax.sampling import ancestral
from vqvae2_jax.sampling import log_likelihood as likelihood
from vqvae2_jax.sampling.ancestral import sample_keys
from vqvae2_jax.sampling.params import PerLevel, params_of_levels
from vqvae2_jax.tasks.task import to_float, to_uint8

__all__ = [
    'Generator',
    'LogLikelihood',
    'Samples',
    'Specification',
    'decode',
    'encode',
    'inpaint',
    'log_likelihood',
    'preview',
    'reconstruct',
    'sample',
    'sample_keys',
    'sample_level',
]

Codes = tuple[jax.Array, ...]


class Samples(NamedTuple):
    """Generated images.

    Attributes:
      images: [B, H, W, C], of the dtype that was asked for; None without stage 1.
      codes: int32 [B, h_l, w_l] per level, finest first.
    """

    images: jax.Array | None
    codes: Codes


class LogLikelihood(NamedTuple):
    """Log-likelihood of codes.

    Attributes:
      nats: float32 [B, L], log p(codes of a level | codes of the coarser levels, class), finest level first.
      bits: float32 [B], bits of all codes of an image: -sum(nats) / log(2).
    """

    nats: jax.Array
    bits: jax.Array


@jax.jit
def encode(generator: Generator, images: jax.Array) -> Codes:
    """Encodes images to codes.

    Args:
      generator: the networks.
      images: [B, H, W, C], uint8, or float in [-1, 1]. Their size may differ from that of the training images; the
        product of the downsampling factors divides it.

    Returns:
      Codes, int32 [B, h_l, w_l] per level, finest first.

    Raises:
      ValueError: the images have another rank, number of channels or dtype, or a size that is not divisible.
    """
    generator = _enter(generator, images)
    model, variables = generator.vqvae()
    images = _to_float(generator, images)
    return sharding.constrain_batch(model.apply(variables, images, method='encode'))


@functools.partial(jax.jit, static_argnames='dtype')
def decode(generator: Generator, codes: Sequence[jax.Array], *, dtype: Any = jnp.uint8) -> jax.Array:
    """Decodes the codes of all levels to images.

    Args:
      generator: the networks.
      codes: int [B, h_l, w_l] per level, finest first.
      dtype: uint8, or float32 for images in about [-1, 1] without clipping.

    Returns:
      Images [B, H, W, C].

    Raises:
      ValueError: the codes are not those of all levels.
    """
    return _decode(_enter(generator, codes), codes, 0, dtype)


@functools.partial(jax.jit, static_argnames=('level', 'dtype'))
def preview(
    generator: Generator, codes: Sequence[jax.Array], *, level: str = 'top', dtype: Any = jnp.uint8
) -> jax.Array:
    """Decodes the codes of coarse levels to images, without the finer levels.

    Args:
      generator: the networks.
      codes: int [B, h_l, w_l] of all levels, or of `level` and the coarser ones; finest first.
      level: the finest level that is decoded. The finest of all gives the result of `decode`.
      dtype: as in `decode`.

    Returns:
      Images [B, H, W, C].

    Raises:
      ValueError: there is no such level, or codes are missing.
    """
    first, levels = generator.specification.level_index(level), len(generator.specification.levels)
    codes = tuple(codes)[-(levels - first) :]
    return _decode(_enter(generator, codes), codes, first, dtype)


@jax.jit
def reconstruct(generator: Generator, images: jax.Array) -> jax.Array:
    """Encodes and decodes images.

    Args:
      generator: the networks.
      images: as in `encode`.

    Returns:
      Reconstructions [B, H, W, C]: uint8 of uint8 images, otherwise float32 in about [-1, 1].

    Raises:
      ValueError: as `encode`.
    """
    dtype = jnp.uint8 if images.dtype == jnp.uint8 else jnp.float32
    return decode(generator, encode(generator, images), dtype=dtype)


@functools.partial(jax.jit, static_argnames='dtype')
def sample(
    generator: Generator,
    keys: jax.Array,
    labels: jax.Array | None = None,
    *,
    temperature: PerLevel = 1.0,
    top_k: PerLevel = None,
    top_p: PerLevel = None,
    guidance: PerLevel = None,
    dtype: Any = jnp.uint8,
) -> Samples:
    """Samples codes of all levels, the coarsest first, and decodes them if there is a stage 1.

    A sample depends on its key, its label and the sampling parameters alone, not on its batch or the devices. The four
    parameters are one value for all levels, or {level: value}; a level without a value has the default. Values may be
    traced.

    Args:
      generator: the networks.
      keys: one key per sample, [B], from `sample_keys`.
      labels: classes, int32 [B], below the number of classes (not checked); ignored if there are no classes.
      temperature: divides the logits; 0 takes the most likely code.
      top_k: samples among the k most likely codes; None: among all.
      top_p: samples among the smallest set of most likely codes with at least this probability; None: among all.
      guidance: weight of classifier-free guidance, for priors that were trained with label dropout; None: off.
      dtype: of the images, as in `decode`.

    Returns:
      Images and their codes.

    Raises:
      ValueError: the generator has no priors, labels are missing, a level does not exist, or guidance needs label
        dropout.
    """
    generator = _enter(generator, keys)
    settings = _settings(generator.specification, temperature, top_k, top_p, guidance)
    codes = _sample(generator, keys, labels, settings)
    images = _decode(generator, codes, 0, dtype) if generator.specification.has_stage_1 else None
    return sharding.constrain_batch(Samples(images, codes))


@functools.partial(jax.jit, static_argnames='level')
def sample_level(
    generator: Generator,
    level: str,
    keys: jax.Array,
    labels: jax.Array | None = None,
    coarser: Sequence[jax.Array] = (),
    *,
    temperature: PerLevel = 1.0,
    top_k: PerLevel = None,
    top_p: PerLevel = None,
    guidance: PerLevel = None,
) -> jax.Array:
    """Samples the codes of one level, given those of the coarser ones.

    Called for all levels, the coarsest first, it draws the samples of `sample`, and shows them as they are made.

    Args:
      generator: the networks.
      level: name of the level, such as 'top'.
      keys: one key per sample, [B], from `sample_keys`; the same for all levels.
      labels: classes, int32 [B]; ignored if there are no classes.
      coarser: codes of every coarser level, finest first; each int [B, h_l, w_l].
      temperature: this and the following ones as in `sample`.
      top_k: see `sample`.
      top_p: see `sample`.
      guidance: see `sample`.

    Returns:
      Codes, int32 [B, h, w].

    Raises:
      ValueError: as `sample`, or codes of coarser levels are missing.
    """
    generator = _enter(generator, keys, coarser)
    specification, index = generator.specification, generator.specification.level_index(level)
    coarser = _codes_of_priors(specification, coarser, index + 1)
    settings = _settings(specification, temperature, top_k, top_p, guidance)[index]
    arguments = ancestral.level_keys(keys, index), _labels(specification, labels, keys.shape[0]), coarser, settings
    sampled = ancestral.sample_level(specification.priors[index], generator.prior_params()[index], *arguments)
    return sharding.constrain_batch(sampled.codes)


@functools.partial(jax.jit, static_argnames='levels')
def inpaint(
    generator: Generator,
    keys: jax.Array,
    images: jax.Array,
    mask: jax.Array,
    labels: jax.Array | None = None,
    *,
    levels: tuple[str, ...] | None = None,
    temperature: PerLevel = 1.0,
    top_k: PerLevel = None,
    top_p: PerLevel = None,
    guidance: PerLevel = None,
) -> Samples:
    """Samples the masked part of images again.

    A code with any masked pixel in its cell is sampled; all others are those of the image. All pixels of the result
    are decoded: those outside of the mask are those of the reconstruction, and near the mask they may differ from it.

    Args:
      generator: the networks.
      keys: one key per result, [B], from `sample_keys`.
      images: [B, H, W, C], or [1, H, W, C] for several variants of one image; uint8, or float in [-1, 1].
      mask: bool [H, W], or one per image; True where to sample.
      labels: classes, int32 [B]; ignored if there are no classes.
      levels: names of the levels whose masked codes are sampled, as a tuple; None: all.
      temperature: this and the following ones as in `sample`.
      top_k: see `sample`.
      top_p: see `sample`.
      guidance: see `sample`.

    Returns:
      Images, uint8 of uint8 images and otherwise float32, and their codes.

    Raises:
      ValueError: as `sample` and `encode`; or the mask has another size than the images, or there are neither as many
        images or masks as keys nor one.
    """
    generator = _enter(generator, keys, images)
    specification, batch = generator.specification, keys.shape[0]
    _check_mask(images, mask, batch)
    sampled = {specification.level_index(name) for name in (specification.levels if levels is None else levels)}
    masks = mask if mask.ndim == 3 else mask[None]
    known_codes = [
        jnp.where(_masked_cells(masks, codes.shape[1:]), -1, codes) if level in sampled else codes
        for level, codes in enumerate(_codes_of_priors(specification, encode(generator, images)))
    ]
    known_codes = [jnp.broadcast_to(codes, (batch, *codes.shape[1:])) for codes in known_codes]
    settings = _settings(specification, temperature, top_k, top_p, guidance)
    codes = _sample(generator, keys, labels, settings, known_codes)
    dtype = jnp.uint8 if images.dtype == jnp.uint8 else jnp.float32
    return sharding.constrain_batch(Samples(_decode(generator, codes, 0, dtype), codes))


@jax.jit
def log_likelihood(generator: Generator, codes: Sequence[jax.Array], labels: jax.Array | None = None) -> LogLikelihood:
    """Computes the exact log-likelihood of codes under the priors.

    Args:
      generator: the networks.
      codes: int [B, h_l, w_l] per level, finest first, such as those of `encode`.
      labels: classes, int32 [B]. None: if there are classes, the probability is averaged over all of them; see
        `sampling.log_likelihood`.

    Returns:
      Nats of every level, and bits of every image.

    Raises:
      ValueError: the generator has no priors, or the codes are not those of all levels.
    """
    generator = _enter(generator, codes)
    codes = _codes_of_priors(generator.specification, codes)
    labels = _labels(generator.specification, labels, codes[0].shape[0])
    nats = likelihood.log_likelihood(generator.specification.priors, generator.prior_params(), codes, labels)  # [L, B]
    return sharding.constrain_batch(LogLikelihood(nats.T, -jnp.sum(nats, axis=0) / math.log(2)))


def _enter(generator, *inputs):
    """Returns the generator gathered for use in a function, and checks the mesh of its inputs."""
    sharding.refuse_explicit_axes((generator, inputs))
    return sharding.constrain_replicated(generator)


def _settings(specification, temperature, top_k, top_p, guidance):
    return params_of_levels(specification.levels, temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)


def _sample(generator, keys, labels, settings, known_codes=None):
    priors, labels = generator.specification.priors, _labels(generator.specification, labels, keys.shape[0])
    return ancestral.sample_levels(priors, generator.prior_params(), keys, labels, settings, known_codes)


def _labels(specification, labels, batch):
    if not specification.num_classes or labels is None:
        return None
    if jnp.shape(labels) != (batch,):
        raise ValueError(f'labels have the shape {jnp.shape(labels)}; they must be [{batch}], one for every example')
    return labels


def _decode(generator, codes, level, dtype):
    if (dtype := jnp.dtype(dtype)) not in (jnp.uint8, jnp.float32):
        raise ValueError(f'dtype is {dtype.name}; images are uint8 or float32')
    codes = _checked_codes(generator.specification, codes, level)
    model, variables = generator.vqvae()
    images = model.apply(variables, codes, level, method='decode')
    return sharding.constrain_batch(to_uint8(images) if dtype == jnp.uint8 else images)


def _to_float(generator, images):
    channels = generator.specification.channels
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(f'images have the shape {images.shape}; it must be [B, H, W, {channels}]')
    if images.dtype == jnp.uint8:
        return to_float(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f'images are {images.dtype}; they must be uint8, or float in [-1, 1]')
    return images.astype(jnp.float32)


def _codes_of_priors(specification, codes, level=0):
    # The priors have maps of one size; stage 1 takes any.
    codes, expected = _checked_codes(specification, codes, level), specification.map_shapes[level:]
    if (given := tuple(x.shape[1:] for x in codes)) != expected:
        raise ValueError(f'the code maps are {given}, finest first; the priors model maps of {expected}')
    return codes


def _checked_codes(specification, codes, level):
    codes, names = tuple(jnp.asarray(x) for x in codes), specification.levels[level:]
    if len(codes) != len(names) or any(x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.integer) for x in codes):
        given = ', '.join(f'{x.dtype}{list(x.shape)}' for x in codes)
        raise ValueError(
            f'codes are {given or "missing"}; they must be integers [B, h, w] of the levels {", ".join(names)}, finest '
            'first'
        )
    return tuple(x.astype(jnp.int32) for x in codes)


def _check_mask(images, mask, batch):
    counts = {images.shape[0], *mask.shape[:-2]}
    if mask.ndim not in (2, 3) or mask.shape[-2:] != images.shape[1:3] or not counts <= {1, batch}:
        raise ValueError(
            f'there are {batch} keys, images of the shape {images.shape} and a mask of {mask.shape}; the mask must be '
            f'[H, W] or [B, H, W] with the height and width of the images, and B one or the number of keys'
        )


def _masked_cells(masks, shape):
    # bool [B, H, W] -> [B, h, w]: codes with a masked pixel in their cell
    batch, height, width = masks.shape
    cells = masks.reshape(batch, shape[0], height // shape[0], shape[1], width // shape[1])
    return cells.any(axis=(2, 4))
