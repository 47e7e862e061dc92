"""Exact ancestral sampling: a code is sampled from the prior given all codes sampled before it.

`sample` decodes incrementally, with caches: in raster order a row at a time through the vertical stack and a position
at a time through the horizontal stack; in wavefront order all positions of a step at once. `sample_reference` is the
slow definition, which runs the full network for every step. Both give the same codes.

The randomness of a code depends on the sample's key and the position alone, so sample i is the same in any batch and on
any number of devices.

Shapes: B batch, H W map, h_l w_l map of a coarser level, K codebook size, T steps of an order, n positions of a step.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqvae2_jax.models.prior import Prior
from vqvae2_jax.models.wavefront import WavefrontPrior
from vqvae2_jax.sampling.params import DEFAULT, SamplingParams, apply_cfg, sample_codes


class Sampled(NamedTuple):
    """Codes of one level.

    Attributes:
      codes: int32 [B, H, W].
      log_probs: float32 [B, H, W] in nats, of the prior itself (temperature 1, no guidance, no filter).
    """

    codes: jax.Array
    log_probs: jax.Array


def sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """Returns one key per sample, [B], from a key and the samples' indices int32 [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def sample(
    prior: Prior,
    params: Any,
    keys: jax.Array,
    labels: jax.Array | None = None,
    coarser: tuple[jax.Array, ...] = (),
    sampling_params: SamplingParams = DEFAULT,
    known_codes: jax.Array | None = None,
) -> Sampled:
    """Samples the codes of one level in the prior's order, with caches.

    Args:
      prior: the module.
      params: its parameters.
      keys: [B], one per sample, from `sample_keys`.
      labels: int32 [B]; None if the prior has no classes.
      coarser: int32 [B, h_l, w_l] of every coarser level, finest first.
      sampling_params: may be traced, except for whether there is guidance.
      known_codes: int32 [B, H, W], codes to keep, and -1 where one is sampled. A sampled code depends on the kept codes
        of earlier steps, not of later ones.

    Returns:
      Codes and their log-probabilities.

    Raises:
      ValueError: guidance without labels, or with a prior trained without label dropout.
    """
    choose = functools.partial(_choose, prior, keys, sampling_params, known_codes)
    labels, coarser = _cfg_inputs(prior, labels, coarser, sampling_params)
    condition = prior.apply({'params': params}, labels, coarser, method='condition')
    decode = _wavefront if isinstance(prior, WavefrontPrior) else _raster
    return decode(prior, params, condition, choose, functools.partial(_tile_for_cfg, sampling_params), keys.shape[0])


def sample_reference(
    prior: Prior,
    params: Any,
    keys: jax.Array,
    labels: jax.Array | None = None,
    coarser: tuple[jax.Array, ...] = (),
    sampling_params: SamplingParams = DEFAULT,
    known_codes: jax.Array | None = None,
) -> Sampled:
    """The slow definition of `sample`, with the same arguments and result: runs the full network for every step."""
    height, width = prior.shape
    choose = functools.partial(_choose, prior, keys, sampling_params, known_codes)
    labels, coarser = _cfg_inputs(prior, labels, coarser, sampling_params)
    rows, columns = (jnp.asarray(axis.reshape(-1)) for axis in np.mgrid[:height, :width])
    steps = prior.order.step_of().reshape(-1)

    def one_step(sampled, step):
        maps = _tile_for_cfg(sampling_params, sampled.codes.reshape(-1, height, width))
        logits = prior.apply({'params': params}, maps, labels, coarser)  # [B, H, W, K]
        new = choose(rows, columns, logits.reshape(logits.shape[0], height * width, -1))
        return jax.tree.map(lambda new, old: jnp.where(steps == step, new, old), new, sampled), None

    start = Sampled(jnp.zeros((len(keys), height * width), jnp.int32), jnp.zeros((len(keys), height * width)))
    sampled, _ = jax.lax.scan(one_step, start, jnp.arange(prior.order.steps))
    return jax.tree.map(lambda x: x.reshape(-1, height, width), sampled)


def sample_levels(
    priors: Sequence[Prior],
    params: Sequence[Any],
    key: jax.Array,
    index: jax.Array,
    labels: jax.Array | None = None,
    sampling_params: Sequence[SamplingParams] | None = None,
    known_codes: Sequence[jax.Array | None] | None = None,
) -> tuple[jax.Array, ...]:
    """Samples the codes of all levels, the coarsest first.

    Args:
      priors: one per level, finest first.
      params: their parameters, in the same order.
      key: of the whole set of samples.
      index: int32 [B], the samples' indices.
      labels: int32 [B]; None if the priors have no classes.
      sampling_params: one per level; None: the defaults.
      known_codes: per level None or codes to keep, as in `sample`.

    Returns:
      int32 [B, h_l, w_l] per level, finest first.

    Raises:
      ValueError: as `sample`.
    """
    sampling_params = sampling_params or (DEFAULT,) * len(priors)
    known_codes = known_codes or (None,) * len(priors)
    codes: tuple[jax.Array, ...] = ()
    for level in reversed(range(len(priors))):
        keys = sample_keys(jax.random.fold_in(key, level), index)
        arguments = labels, codes, sampling_params[level], known_codes[level]
        codes = (sample(priors[level], params[level], keys, *arguments).codes, *codes)
    return codes


def _cfg_inputs(prior, labels, coarser, sampling_params):
    # With guidance every row comes twice, with and without its class. The two are neighbors, as a batch that is sharded
    # over devices would have to be exchanged between them in every step if they were two halves.
    if sampling_params.guidance is None:
        return labels, coarser
    if not prior.label_dropout or labels is None:
        raise ValueError('guidance needs labels, and a prior that was trained with label_dropout above 0')
    labels = jnp.stack([labels, jnp.full_like(labels, prior.num_classes)], axis=1).reshape(-1)
    return labels, tuple(_tile_for_cfg(sampling_params, c) for c in coarser)


def _tile_for_cfg(sampling_params, x):
    # [B, ...] -> [2 B, ...] with guidance; else unchanged
    return x if sampling_params.guidance is None else jnp.repeat(x, 2, axis=0)


def _choose(prior, keys, sampling_params, known_codes, rows, columns, logits) -> Sampled:
    # logits [B or 2 B, n, K] at the positions rows, columns [n] -> codes and log-probabilities [B, n]
    positions = rows * prior.shape[1] + columns
    codes = sample_codes(keys, positions, apply_cfg(logits, sampling_params), sampling_params)
    if known_codes is not None:
        known = known_codes[:, rows, columns]
        codes = jnp.where(known >= 0, known, codes)
    cond = logits if sampling_params.guidance is None else logits.reshape(-1, 2, *logits.shape[1:])[:, 0]
    log_probs = jax.nn.log_softmax(cond)
    return Sampled(codes, jnp.take_along_axis(log_probs, codes[..., None], axis=-1)[..., 0])


def _wavefront(prior, params, condition, choose, tile, batch) -> Sampled:
    order = prior.order

    def network(cache, previous, step):
        variables, arguments = {'params': params, **cache}, (tile(previous), step, condition)
        return prior.apply(variables, *arguments, method='decode_step', mutable=['diagonals', 'attention'])

    def one_step(carry, step):
        previous, cache = carry
        logits, cache = network(cache, previous, step)
        rows, columns, _ = order.positions(step)
        sampled = choose(rows, columns, logits)
        return (sampled.codes, cache), sampled

    start = jnp.zeros((batch, order.rows), jnp.int32)
    _, empty = jax.eval_shape(lambda: network({}, start, jnp.int32(0)))
    _, sampled = jax.lax.scan(one_step, (start, _zeros(empty)), jnp.arange(order.steps))
    steps, slots = order.step_of(), order.slot_of()  # [H, W]
    return jax.tree.map(
        lambda x: jnp.moveaxis(x[steps, :, slots], 2, 0), sampled
    )  # [T, B, n] -> [H, W, B] -> [B, H, W]


def _raster(prior, params, condition, choose, tile, batch) -> Sampled:
    width, outside = prior.shape[1], prior.codebook_size
    variables = {'params': params}

    def decode_row(cache, above, row):
        arguments = (tile(above)[:, None], row[None], _rows(condition, row))
        return prior.apply(variables | cache, *arguments, method='decode_row', mutable=['rows'])

    def decode_position(cache, left, row, column, features):
        part = _columns(_rows(condition, row), column)
        arguments = (tile(left)[:, None], row[None], column[None], [_columns(f, column) for f in features], part)
        return prior.apply(variables | cache, *arguments, method='decode_position', mutable=['columns', 'attention'])

    def one_row(carry, row):
        above, rows, attention = carry
        features, rows = decode_row(rows, above, row)

        def one_column(carry, column):
            left, cache = carry
            logits, cache = decode_position(cache, left, row, column, features)
            sampled = choose(row[None], column[None], logits[:, 0])
            return (sampled.codes, cache), jax.tree.map(lambda x: x[:, 0], sampled)

        start = (jnp.full((batch, 1), outside, jnp.int32), {**empty_columns, **attention})
        (_, cache), sampled = jax.lax.scan(one_column, start, jnp.arange(width))
        sampled = jax.tree.map(jnp.transpose, sampled)  # [W, B] -> [B, W]
        return (sampled.codes, rows, {k: v for k, v in cache.items() if k == 'attention'}), sampled

    above = jnp.full((batch, width), outside, jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    features, empty_rows = jax.eval_shape(lambda: decode_row({}, above, zero))
    features, empty_rows = _zeros(features), _zeros(empty_rows)
    _, empty = jax.eval_shape(lambda: decode_position({}, above[:, :1], zero, zero, features))
    empty = _zeros(empty)
    empty_columns = {k: v for k, v in empty.items() if k == 'columns'}
    empty_attention = {k: v for k, v in empty.items() if k == 'attention'}
    _, sampled = jax.lax.scan(one_row, (above, empty_rows, empty_attention), jnp.arange(prior.shape[0]))
    return jax.tree.map(lambda x: x.swapaxes(0, 1), sampled)  # [H, B, W] -> [B, H, W]


def _rows(x, row):
    # [B, H or 1, W, F] -> [B, 1, W, F]
    return x if x is None or x.shape[1] == 1 else jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1)


def _columns(x, column):
    # [B, 1, W or 1, F] -> [B, 1, 1, F]
    return x if x is None or x.shape[2] == 1 else jax.lax.dynamic_slice_in_dim(x, column, 1, axis=2)


def _zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
