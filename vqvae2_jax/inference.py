"""Compiled functions of trained networks: encode, decode, sample, inpaint, log-likelihood.

They are pure: weights and batches in, arrays out; no config, no files. Call them inside `jax.set_mesh`, with batches
from `sharding.make_global_batch` and weights from `sharding.put_sharded`. Each function gathers the weights once,
before any loop.

Shapes: B batch, H W C image, h_l w_l map of level l (0 is the finest), L levels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vqvae2_jax.distributed import sharding
from vqvae2_jax.models.prior import Prior
from vqvae2_jax.models.vqvae import VQVAE
from vqvae2_jax.sampling.ancestral import sample_levels
from vqvae2_jax.sampling.log_likelihood import log_likelihood
from vqvae2_jax.tasks.task import to_float, to_uint8

Batch = dict[str, jax.Array]


def make_encode_fn(model: VQVAE) -> Callable[[Any, Batch], Batch]:
    """Returns a jitted (variables, {'image': uint8 [B, H, W, C]}) -> {'codes_l': int32 [B, h_l, w_l]}."""

    def encode(variables, batch):
        variables = sharding.constrain_replicated(variables)
        return _codes_dict(model.apply(variables, to_float(batch['image']), method='encode'))

    return jax.jit(encode, keep_unused=True)  # the decoder is held on the devices too, so a plan counts it


def make_decode_fn(model: VQVAE) -> Callable[[Any, Batch], Batch]:
    """Returns a jitted (variables, {'codes_l': int32 [B, h_l, w_l]}) -> {'image': uint8 [B, H, W, C]}."""

    @jax.jit
    def decode(variables, batch):
        variables = sharding.constrain_replicated(variables)
        codes = tuple(batch[f'codes_{level}'] for level in range(len(model.downsample_factors)))
        return sharding.constrain_batch({'image': to_uint8(model.apply(variables, codes, method='decode'))})

    return decode


def make_sample_fn(model: VQVAE, priors: Sequence[Prior], *, seed: int) -> Callable[..., Batch]:
    """Returns a jitted function that draws samples from all priors and decodes them.

    Sample i depends on the seed, i, its label and the sampling parameters alone, not on its batch or the devices.

    Args:
      model: stage 1.
      priors: one per level, finest first.
      seed: of the randomness.

    Returns:
      (variables of stage 1, list of the priors' params, tuple of SamplingParams per level, {'index': int32 [B],
      'label': int32 [B]}) -> {'image': uint8 [B, H, W, C], 'codes_l': int32 [B, h_l, w_l]}.
    """

    def sample(variables, params, sampling_params, batch):
        # Without this, XLA may gather a layer's weights in every step of the sampling loop.
        variables, params = sharding.constrain_replicated((variables, params))
        label = batch['label'] if priors[0].num_classes else None
        key = jax.random.key(seed)
        codes = sample_levels(priors, params, key, batch['index'], label, sampling_params)
        image = to_uint8(model.apply(variables, codes, method='decode'))
        return sharding.constrain_batch({'image': image}) | _codes_dict(codes)

    # Stage 1's encoder is held on the devices too, so a plan counts it.
    return jax.jit(sample, keep_unused=True)


def make_inpaint_fn(
    model: VQVAE, priors: Sequence[Prior], levels: Sequence[bool], *, seed: int
) -> Callable[..., Batch]:
    """Returns a jitted function that samples a masked part of an image again.

    Args:
      model: stage 1.
      priors: one per level, finest first.
      levels: for each level, whether its masked codes are sampled again.
      seed: of the randomness.

    Returns:
      (variables of stage 1, list of the priors' params, tuple of SamplingParams per level, {'index': int32 [B],
      'label': int32 [B]}, image uint8 [H, W, C], mask bool [H, W], number int32 []) -> as `make_sample_fn`. Variant
      `index` of image `number` depends on the seed and on these two numbers alone.
    """

    @jax.jit
    def inpaint(variables, params, sampling_params, batch, image, mask, number):
        variables, params = sharding.constrain_replicated((variables, params))
        index, label = batch['index'], batch['label'] if priors[0].num_classes else None
        kept = model.apply(variables, to_float(image[None]), method='encode')
        kept = [jnp.repeat(codes, len(index), axis=0) for codes in kept]
        known_codes = [
            jnp.where(_covered(mask, codes.shape[1:]), -1, codes) if chosen else codes
            for chosen, codes in zip(levels, kept, strict=True)
        ]
        key = jax.random.fold_in(jax.random.key(seed), number)
        codes = sample_levels(priors, params, key, index, label, sampling_params, known_codes)
        image = to_uint8(model.apply(variables, codes, method='decode'))
        return sharding.constrain_batch({'image': image}) | _codes_dict(codes)

    return inpaint


def make_log_likelihood_fn(model: VQVAE, priors: Sequence[Prior], *, labeled: bool) -> Callable[..., Batch]:
    """Returns a jitted (variables, list of params, {'image': uint8, 'label': int32}) -> {'log_likelihood': [B, L]}.

    Args:
      labeled: condition on the labels; else the class counts as unknown.

    The log-likelihoods of the codes are float32, in nats, finest level first.
    """

    @jax.jit
    def evaluate(variables, params, batch):
        variables, params = sharding.constrain_replicated((variables, params))
        codes = model.apply(variables, to_float(batch['image']), method='encode')
        nats = log_likelihood(priors, params, codes, batch['label'] if labeled else None)  # [L, B]
        return sharding.constrain_batch({'log_likelihood': nats.T})

    return evaluate


def _codes_dict(codes):
    return sharding.constrain_batch({f'codes_{level}': c for level, c in enumerate(codes)})


def _covered(mask, shape):
    # bool [H, W] -> [h, w]: codes with a masked pixel in their cell
    height, width = mask.shape
    cells = mask.reshape(shape[0], height // shape[0], shape[1], width // shape[1])
    return cells.any(axis=(1, 3))
