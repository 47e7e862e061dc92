"""Compiled functions of trained networks: encode, decode, sample, inpaint, log-likelihood.

They are pure: weights and batches in, arrays out; no config, no files. Call them inside `jax.set_mesh`. Each function
gathers the weights once, before any loop. A complete example, which samples 16 images with labels from 0 to 9:

  with jax.set_mesh(sharding.make_mesh()):
      variables, params = sharding.put_sharded(variables), sharding.put_sharded(params)
      index = np.arange(16, dtype=np.int32)
      batch = sharding.make_global_batch({'index': index, 'label': index % 10})
      outputs = make_sample_fn(model, priors, seed=0)(variables, params, (SamplingParams(),) * len(priors), batch)
      images = sharding.gather_rows(outputs)['image']

The arguments have the same names in all functions:
  model      the VQ-VAE's module (stage 1), such as `config.build.make_vqvae(config)`.
  priors     one module per level (stage 2), finest first, such as `config.build.make_prior(config, level)`.
  variables  all collections of the VQ-VAE, {'params': ..., 'codebook': ...}: the result of `model.init`, or trained.
  params     list of the collection `params` of every prior, in the order of `priors`.
  batch      {name: array of the global batch}, from `sharding.make_global_batch`.
The weights come from `sharding.put_sharded`. Results are sharded along the batch; `sharding.gather_rows` converts them
to NumPy.

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
from vqvae2_jax.tasks.task import Batch, to_float, to_uint8


def make_encode_fn(model: VQVAE) -> Callable[[Any, Batch], Batch]:
    """Makes the function that encodes images to codes.

    Args:
      model: the VQ-VAE's module.

    Returns:
      A jitted function (variables, {'image': uint8 [B, H, W, C]}) -> {'codes_0': int32 [B, h_0, w_0], 'codes_1': ...},
      one entry per level.
    """

    def encode(variables, batch):
        variables = sharding.constrain_replicated(variables)
        codes = model.apply(variables, to_float(batch['image']), method='encode')
        return sharding.constrain_batch(_name_codes(codes))

    return jax.jit(encode, keep_unused=True)  # the decoder is held on the devices too, so a plan counts it


def make_decode_fn(model: VQVAE) -> Callable[[Any, Batch], Batch]:
    """Makes the function that decodes codes to images.

    Args:
      model: the VQ-VAE's module.

    Returns:
      A jitted function (variables, {'codes_0': int32 [B, h_0, w_0], 'codes_1': ...}) -> {'image': uint8 [B, H, W, C]},
      which takes the codes of all levels.
    """

    @jax.jit
    def decode(variables, batch):
        variables = sharding.constrain_replicated(variables)
        codes = tuple(batch[f'codes_{level}'] for level in range(len(model.downsample_factors)))
        return sharding.constrain_batch({'image': _decode(model, variables, codes)})

    return decode


def make_sample_fn(model: VQVAE, priors: Sequence[Prior], *, seed: int) -> Callable[..., Batch]:
    """Makes the function that samples codes from all priors and decodes them.

    Sample i depends on the seed, i, its label and the sampling parameters alone, not on its batch or the devices.

    Args:
      model: the VQ-VAE's module.
      priors: one module per level, finest first.
      seed: seed of the random numbers.

    Returns:
      A jitted function (variables, params, sampling_params, {'index': int32 [B], 'label': int32 [B]}) ->
      {'image': uint8 [B, H, W, C], 'codes_0': int32 [B, h_0, w_0], 'codes_1': ...}.
      `sampling_params` is a tuple with one `SamplingParams` per level, finest first. `index`: indices of the
      samples, i; `label`: their classes; it has to be there, but priors without classes ignore it.
    """

    def sample(variables, params, sampling_params, batch):
        # Without this, XLA may gather a layer's weights in every step of the sampling loop.
        variables, params = sharding.constrain_replicated((variables, params))
        label = batch['label'] if priors[0].num_classes else None
        codes = sample_levels(priors, params, jax.random.key(seed), batch['index'], label, sampling_params)
        return sharding.constrain_batch({'image': _decode(model, variables, codes), **_name_codes(codes)})

    # The VQ-VAE's encoder is held on the devices too, so a plan counts it.
    return jax.jit(sample, keep_unused=True)


def make_inpaint_fn(
    model: VQVAE, priors: Sequence[Prior], resampled: Sequence[bool], *, seed: int
) -> Callable[..., Batch]:
    """Makes the function that samples the masked part of an image again, in several variants.

    Variant `index` of image `number` depends on the seed, these two numbers, the image, the mask, the label and the
    sampling parameters alone.

    Args:
      model: the VQ-VAE's module.
      priors: one module per level, finest first.
      resampled: for each level, finest first, whether its masked codes are sampled again; otherwise all are kept.
      seed: seed of the random numbers.

    Returns:
      A jitted function (variables, params, sampling_params, {'index': int32 [B], 'label': int32 [B]},
      image uint8 [H, W, C], mask bool [H, W], number int32 []) -> the result of the function of `make_sample_fn`.
      `index`: indices of the variants. `mask`: True where to sample; a code with any such pixel in its cell is sampled.
      `number`: index of the image in its source. These three are host arrays, the same on every process; the other
      arguments are those of `make_sample_fn`. All pixels of the result are decoded: those outside of the mask are those
      of the reconstruction, and near the mask they may differ from it.
    """

    @jax.jit
    def inpaint(variables, params, sampling_params, batch, image, mask, number):
        variables, params = sharding.constrain_replicated((variables, params))
        index, label = batch['index'], batch['label'] if priors[0].num_classes else None
        encoded = model.apply(variables, to_float(image[None]), method='encode')
        encoded = [jnp.repeat(codes, len(index), axis=0) for codes in encoded]
        known_codes = [
            jnp.where(_masked_codes(mask, codes.shape[1:]), -1, codes) if resample else codes
            for resample, codes in zip(resampled, encoded, strict=True)
        ]
        key = jax.random.fold_in(jax.random.key(seed), number)
        codes = sample_levels(priors, params, key, index, label, sampling_params, known_codes)
        return sharding.constrain_batch({'image': _decode(model, variables, codes), **_name_codes(codes)})

    return inpaint


def make_log_likelihood_fn(model: VQVAE, priors: Sequence[Prior], *, labeled: bool) -> Callable[..., Batch]:
    """Makes the function that computes the log-likelihood of the codes of images.

    Args:
      model: the VQ-VAE's module.
      priors: one module per level, finest first.
      labeled: condition on the labels; otherwise average the probability over all classes.

    Returns:
      A jitted function (variables, params, {'image': uint8 [B, H, W, C], 'label': int32 [B]}) ->
      {'log_likelihood': float32 [B, L]}, in nats, finest level first. See `sampling.log_likelihood`.
    """

    @jax.jit
    def evaluate(variables, params, batch):
        variables, params = sharding.constrain_replicated((variables, params))
        codes = model.apply(variables, to_float(batch['image']), method='encode')
        nats = log_likelihood(priors, params, codes, batch['label'] if labeled else None)  # [L, B]
        return sharding.constrain_batch({'log_likelihood': nats.T})

    return evaluate


def _decode(model, variables, codes):
    return to_uint8(model.apply(variables, codes, method='decode'))


def _name_codes(codes):
    return {f'codes_{level}': level_codes for level, level_codes in enumerate(codes)}


def _masked_codes(mask, shape):
    # bool [H, W] -> [h, w]: codes with a masked pixel in their cell
    height, width = mask.shape
    cells = mask.reshape(shape[0], height // shape[0], shape[1], width // shape[1])
    return cells.any(axis=(1, 3))
