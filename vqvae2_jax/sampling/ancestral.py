"""Exact ancestral sampling: a code is sampled from the prior given all codes sampled before it.

`sample_level` decodes incrementally, with caches. In raster order it runs the vertical stack once per row and the
horizontal stack once per position; in wavefront order it computes all positions of a step at once.

The random numbers of a code depend on the sample's key and the position alone, so sample i is the same in any batch and
on any number of devices.

Shapes: B batch, H W map, h_l w_l map of level l, K codebook size, F features, T steps of an order, n positions of a
step. With classifier-free guidance the networks run on 2 B examples: every sample twice, with and without its class.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp

from vqvae2_jax.models.prior import Prior
from vqvae2_jax.models.wavefront import WavefrontPrior
from vqvae2_jax.sampling.params import DEFAULT, SamplingParams, apply_guidance, sample_codes

# Products with fewer rows than this (positions of a step in all samples) take the time of reading the weights, so half
# as many rows save nothing. Phases of their own take up to three times as long to compile. It counts the rows of the
# whole batch, on all devices.
_ROWS_WORTH_PHASES = 256

# Bytes that the projections of the condition may take in wavefront order, for whole maps of the batch on all devices.
# Above it, every step projects the condition of its positions.
_MAX_PROJECTIONS = 2**30


class Sampled(NamedTuple):
    """Codes of one level.

    Attributes:
      codes: int32 [B, H, W].
      log_probs: float32 [B, H, W] in nats, under the prior itself (temperature 1, no guidance, no top-k or top-p).
    """

    codes: jax.Array
    log_probs: jax.Array


def sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """Derives one key per sample, which depends on `key` and the index of the sample alone.

    Args:
      key: a key of `jax.random.key`, shape [].
      index: the indices of the samples in their set, int32 [B].

    Returns:
      Keys [B].
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def level_keys(keys: jax.Array, level: int) -> jax.Array:
    """Derives the keys [B] of one level, counted from the finest, from the keys [B] of samples."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, level)


def sample_level(
    prior: Prior,
    params: Any,
    keys: jax.Array,
    labels: jax.Array | None = None,
    coarser: tuple[jax.Array, ...] = (),
    sampling_params: SamplingParams = DEFAULT,
    known_codes: jax.Array | None = None,
) -> Sampled:
    """Samples the codes of one level in the prior's order, with caches.

    For example, to sample 16 maps of a prior without classes and coarser levels:

      params = prior.init(jax.random.key(0), jnp.zeros((1, *prior.shape), jnp.int32))['params']
      keys = sample_keys(jax.random.key(1), jnp.arange(16))
      codes = jax.jit(lambda params, keys: sample_level(prior, params, keys).codes)(params, keys)

    Args:
      prior: the module.
      params: the collection `params` of `prior.init` or of a trained prior.
      keys: one key per sample, [B], from `sample_keys`.
      labels: classes, int32 [B]; ignored if the prior has no classes.
      coarser: codes of every coarser level, finest first; each int32 [B, h_l, w_l].
      sampling_params: temperature, top-k, top-p and guidance. The numbers may be traced; whether one is None may not.
      known_codes: int32 [B, H, W]: codes in [0, K) to keep, and -1 at positions to sample; None: sample all. A sampled
        code depends on the kept codes of earlier steps, not of later ones.

    Returns:
      The codes, kept ones included, and their log-probabilities.

    Raises:
      ValueError: labels or coarser levels are missing; guidance with a prior trained without label dropout.
    """
    guided = sampling_params.guidance is not None
    if guided:
        if not prior.label_dropout or labels is None:
            raise ValueError('guidance needs labels, and a prior that was trained with label_dropout above 0')
        # With and without class are neighbors: if they were two halves of the batch, devices would have to exchange
        # them in every step.
        labels = jnp.stack([labels, jnp.full_like(labels, prior.num_classes)], axis=1).reshape(-1)
    copies = 2 if guided else 1
    coarser = tuple(jnp.repeat(codes, copies, axis=0) for codes in coarser)
    condition = prior.apply({'params': params}, labels, coarser, method='condition')
    sample_at = functools.partial(_sample_codes, prior, keys, sampling_params, known_codes)
    decode = _decode_wavefront if isinstance(prior, WavefrontPrior) else _decode_raster
    decode = functools.partial(decode, prior, sample_at, keys.shape[0])
    if keys.shape[0] == 1 and not guided and not isinstance(prior, WavefrontPrior):
        return _decode_single(decode, params, condition)
    return decode(params, condition, copies)


def _decode_single(decode, params, condition) -> Sampled:
    # For NVIDIA GPUs XLA turns the product of a single row with a matrix into a sum of elementwise products, which it
    # writes to memory. Two rows remain a matrix product.
    def decode_twice(params, condition):
        return decode(params, None if condition is None else jnp.repeat(condition, 2, axis=0), copies=2)

    decode_once = functools.partial(decode, copies=1)
    return jax.lax.platform_dependent(params, condition, cuda=decode_twice, default=decode_once)


def sample_levels(
    priors: Sequence[Prior],
    params: Sequence[Any],
    keys: jax.Array,
    labels: jax.Array | None = None,
    sampling_params: Sequence[SamplingParams] | None = None,
    known_codes: Sequence[jax.Array | None] | None = None,
) -> tuple[jax.Array, ...]:
    """Samples the codes of all levels, the coarsest first.

    Args:
      priors: one module per level, finest first.
      params: the collection `params` of each prior, in the same order.
      keys: one key per sample, [B], from `sample_keys`.
      labels: classes, int32 [B]; None if the priors have no classes.
      sampling_params: one per level, finest first; None: the priors' own distributions.
      known_codes: for each level codes to keep, or None, as in `sample_level`; None: sample all codes of all levels.

    Returns:
      int32 [B, h_l, w_l] per level, finest first.

    Raises:
      ValueError: guidance without labels, or with a prior trained without label dropout.
    """
    sampling_params = sampling_params or (DEFAULT,) * len(priors)
    known_codes = known_codes or (None,) * len(priors)
    codes: tuple[jax.Array, ...] = ()
    for level in reversed(range(len(priors))):
        arguments = level_keys(keys, level), labels, codes, sampling_params[level], known_codes[level]
        codes = (sample_level(priors[level], params[level], *arguments).codes, *codes)
    return codes


def _sample_codes(prior, keys, sampling_params, known_codes, rows, columns, logits) -> Sampled:
    # logits [B, n, K], or [2 B, n, K] of two copies of every sample, at the positions rows, columns [n] -> codes and
    # log-probabilities [B, n]
    if sampling_params.guidance is not None:
        pairs = logits.reshape(keys.shape[0], 2, *logits.shape[1:])  # keeps the sharding of the batch
        logits, without_class = pairs[:, 0], pairs[:, 1]
        guided = apply_guidance(logits, without_class, sampling_params.guidance)
    else:
        guided = logits = logits[: keys.shape[0]]
    codes = sample_codes(keys, rows * prior.shape[1] + columns, guided, sampling_params)
    if known_codes is not None:
        known = known_codes[:, rows, columns]
        codes = jnp.where(known >= 0, known, codes)
    log_probs = jax.nn.log_softmax(logits)
    return Sampled(codes, jnp.take_along_axis(log_probs, codes[..., None], axis=-1)[..., 0])


def _decode_wavefront(prior, sample_at, batch_size, params, condition, copies) -> Sampled:
    order, variables = prior.order, {'params': params}

    def project(condition):
        return prior.apply(variables, condition, method='project_condition', mutable=['projections'])[1]

    projections = {}
    if condition is not None and not _is_above(_bytes(jax.eval_shape(project, condition)), _MAX_PROJECTIONS):
        projections = project(condition)

    def network(cache, previous, step):
        rows, columns, _ = order.positions(step, previous.shape[1])

        def at_positions(x):  # [B, H or 1, W or 1, features] -> [B, n or 1, 1, features]
            return x if x.shape[1:3] == (1, 1) else x[:, rows, columns][:, :, None]

        condition_here, made = jax.tree.map(at_positions, (None if projections else condition, projections))
        arguments = jnp.repeat(previous, copies, axis=0), step, condition_here
        return prior.apply(
            variables | made | cache, *arguments, method='decode_step', mutable=['diagonals', 'attention']
        )

    def one_step(phase, carry, step):
        previous, cache = carry
        logits, cache = network(cache, previous[:, phase.first : phase.first + phase.count], step)
        rows, columns, _ = order.positions(step, phase.count)
        sampled = sample_at(rows, columns, logits)
        around = (0, 0), (phase.first, n - phase.first - phase.count)
        sampled = jax.tree.map(lambda x: jnp.pad(x, around), sampled)
        return (sampled.codes, cache), sampled

    n = order.max_positions_per_step
    start = jnp.zeros((batch_size, n), jnp.int32)
    _, empty_cache = _zeros_like_result(network, {}, start, jnp.int32(0))
    carry, phases = (start, empty_cache), []
    for phase in order.phases(split=_is_above(batch_size * copies * n, _ROWS_WORTH_PHASES - 1)):
        run = functools.partial(one_step, phase)
        carry, sampled = jax.lax.scan(run, carry, jnp.arange(phase.start, phase.stop))
        phases.append(sampled)
    sampled = jax.tree.map(lambda *parts: jnp.concatenate(parts), *phases)
    steps, indices = order.step_map(), order.index_in_step_map()
    # [T, B, n] -> [H, W, B] -> [B, H, W]
    return jax.tree.map(lambda x: jnp.moveaxis(x[steps, :, indices], 2, 0), sampled)


def _decode_raster(prior, sample_at, batch_size, params, condition, copies) -> Sampled:
    (height, width), off_map = prior.shape, prior.codebook_size
    variables = {'params': params}

    def decode_row(cache, above, row, row_condition):
        arguments = jnp.repeat(above, copies, axis=0), row, row_condition
        return prior.apply(variables | cache, *arguments, method='decode_row', mutable=['rows', 'projections'])

    def decode_position(cache, left, step, first, projections):
        arguments = jnp.repeat(left, copies, axis=0), step, first
        cache = cache | {'projections': projections}
        return prior.apply(variables | cache, *arguments, method='decode_position', mutable=['columns', 'attention'])

    def one_row(carry, row):
        above, row_cache, cache = carry
        first, made = decode_row(row_cache, above, row, _slice(condition, row, axis=1))

        def one_column(carry, column):
            left, cache = carry
            here = jax.tree.map(lambda x: _slice(x, column, axis=2), (first, made['projections']))
            logits, cache = decode_position(cache, left, row * width + column, *here)
            sampled = sample_at(row[None], column[None], logits)
            return (sampled.codes, cache), jax.tree.map(lambda x: x[:, 0], sampled)

        start = jnp.full((batch_size, 1), off_map, jnp.int32), cache | {'columns': empty_cache['columns']}
        (_, cache), sampled = _scan_columns(one_column, start, width)
        sampled = jax.tree.map(jnp.transpose, sampled)  # [W, B] -> [B, W]
        return (sampled.codes, {'rows': made['rows']}, cache), sampled

    above, zero = jnp.full((batch_size, width), off_map, jnp.int32), jnp.int32(0)
    first, made = _zeros_like_result(decode_row, {}, above, zero, _slice(condition, 0, axis=1))
    here = jax.tree.map(lambda x: x[:, :, :1], (first, made['projections']))
    _, empty_cache = _zeros_like_result(decode_position, {}, above[:, :1], zero, *here)
    _, sampled = jax.lax.scan(one_row, (above, {'rows': made['rows']}, empty_cache), jnp.arange(height))
    return jax.tree.map(lambda x: x.swapaxes(0, 1), sampled)  # [H, B, W] -> [B, H, W]


def _scan_columns(one_column, start, width):
    def scan(start, unroll):
        return jax.lax.scan(one_column, start, jnp.arange(width), unroll=min(unroll, width))

    # Two positions in one iteration: the windows of `columns` move from one buffer to another and back, without a copy.
    # XLA for CPUs copies the keys and values of attention instead.
    once, twice = (functools.partial(scan, unroll=unroll) for unroll in (1, 2))
    return jax.lax.platform_dependent(start, cpu=once, default=twice)


def _slice(x, index, axis):
    # the part of x [B, H or 1, W or 1, F], or None, at this row (axis 1) or column (axis 2)
    return x if x is None or x.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(x, index, 1, axis)


def _is_above(size, limit):
    # False if the batch size is free, as in an exported program
    return not jax.export.is_symbolic_dim(size) and size > limit


def _bytes(shapes):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def _zeros_like_result(function, *arguments):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))
