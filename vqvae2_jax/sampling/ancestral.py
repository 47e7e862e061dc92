"""Exact ancestral sampling: every code is drawn from the prior given all codes drawn before it.

`sample` streams, each layer remembering what it has seen: in raster order row by row through the vertical stack and
position by position through the horizontal one; in wavefront order one step, which is many positions, after the other.
`sample_reference` is the slow definition, which runs the whole network for every step; both draw the same codes.

Randomness is a function of (key of the sample, position) alone, so sample i is the same in any batch, on any number of
devices.

Glossary of shapes: B batch, H W map, K codebook size, T steps of an order, n positions of a step.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqvae2_jax.models.prior import Prior
from vqvae2_jax.models.wavefront import WavefrontPrior
from vqvae2_jax.sampling.params import DEFAULT, SamplingParams, apply_cfg, draw


class Sampled(NamedTuple):
    """What was drawn."""

    codes: jax.Array  # int32 [B, H, W]
    log_probs: jax.Array  # float32 [B, H, W], the prior's own (temperature 1, unguided, all codes), in nats


def sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key for each sample index, [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def sample(
    prior: Prior,
    params: dict,
    keys: jax.Array,
    labels: jax.Array | None = None,
    coarser: tuple[jax.Array, ...] = (),
    control: SamplingParams = DEFAULT,
    given: jax.Array | None = None,
) -> Sampled:
    """Codes drawn in the prior's order, with caches.

    Args:
      prior: the module; `params`: its parameters.
      keys: [B], one key per sample (`sample_keys`).
      labels: int32 [B] where the prior has classes.
      coarser: int32 [B, h_l, w_l] of every coarser level, finest first.
      control: temperature and the like; traced, but for whether there is guidance at all.
      given: int32 [B, H, W], codes to keep, and -1 where one is to be drawn. A draw sees the kept codes of earlier
        steps, not those still to come.

    Raises:
      ValueError: guidance without a prior trained for it.
    """
    choose = functools.partial(_choose, prior, keys, control, given)
    labels, coarser = _cfg_inputs(prior, labels, coarser, control)
    condition = prior.apply({'params': params}, labels, coarser, method='condition')
    stream = _wavefront if isinstance(prior, WavefrontPrior) else _raster
    return stream(prior, params, condition, choose, functools.partial(_tile_for_cfg, control), keys.shape[0])


def sample_reference(prior, params, keys, labels=None, coarser=(), control=DEFAULT, given=None) -> Sampled:
    """The slow definition of `sample`: the same arguments and the same result, the whole network run for every step."""
    height, width = prior.shape
    choose = functools.partial(_choose, prior, keys, control, given)
    labels, coarser = _cfg_inputs(prior, labels, coarser, control)
    rows, columns = (jnp.asarray(axis.reshape(-1)) for axis in np.mgrid[:height, :width])
    steps = prior.order.step_of().reshape(-1)

    def one_step(sampled, step):
        maps = _tile_for_cfg(control, sampled.codes.reshape(-1, height, width))
        logits = prior.apply({'params': params}, maps, labels, coarser)  # [B, H, W, K]
        drawn = choose(rows, columns, logits.reshape(logits.shape[0], height * width, -1))
        return jax.tree.map(lambda new, old: jnp.where(steps == step, new, old), drawn, sampled), None

    start = Sampled(jnp.zeros((len(keys), height * width), jnp.int32), jnp.zeros((len(keys), height * width)))
    sampled, _ = jax.lax.scan(one_step, start, jnp.arange(prior.order.steps))
    return jax.tree.map(lambda x: x.reshape(-1, height, width), sampled)


def sample_levels(priors, params, key, index, labels=None, controls=None, given=None) -> tuple[jax.Array, ...]:
    """Codes of every level, finest first, the coarsest drawn first.

    Args:
      priors, params: one per level, finest first.
      key: of the whole run.
      index: int32 [B], which samples to draw.
      labels: int32 [B] where the priors have classes.
      controls: a Control per level; None: the priors as they are.
      given: per level None or codes to keep, as in `sample`.
    """
    controls = controls or (DEFAULT,) * len(priors)
    given = given or (None,) * len(priors)
    codes: tuple[jax.Array, ...] = ()
    for level in reversed(range(len(priors))):
        keys = sample_keys(jax.random.fold_in(key, level), index)
        drawn = sample(priors[level], params[level], keys, labels, codes, controls[level], given[level])
        codes = (drawn.codes, *codes)
    return codes


def _cfg_inputs(prior, labels, coarser, control):
    """Labels and coarser codes of what the network runs on: where there is guidance, once more without the class."""
    if control.guidance is None:
        return labels, coarser
    if not prior.label_dropout or labels is None:
        raise ValueError('guidance needs labels, and a prior that was trained with label_dropout above 0')
    labels = jnp.concatenate([labels, jnp.full_like(labels, prior.num_classes)])
    return labels, tuple(_tile_for_cfg(control, c) for c in coarser)


def _tile_for_cfg(control, x):
    """[B, ...] -> [2 B, ...] where there is guidance, for the branches with and without class; else as it is."""
    return x if control.guidance is None else jnp.concatenate([x, x])


def _choose(prior, keys, control, given, rows, columns, logits) -> Sampled:
    """Codes and their log-probabilities [B, n] for logits [B or 2 B, n, K] at the positions rows, columns [n]."""
    codes = draw(keys, rows * prior.shape[1] + columns, apply_cfg(logits, control), control)
    if given is not None:
        here = given[:, rows, columns]
        codes = jnp.where(here >= 0, here, codes)
    log_probs = jax.nn.log_softmax(logits[: len(keys)])
    return Sampled(codes, jnp.take_along_axis(log_probs, codes[..., None], axis=-1)[..., 0])


def _wavefront(prior, params, condition, choose, both, batch) -> Sampled:
    order = prior.order

    def network(cache, previous, step):
        variables, arguments = {'params': params, **cache}, (both(previous), step, condition)
        return prior.apply(variables, *arguments, method='diagonal', mutable=['diagonals', 'attention'])

    def one_step(carry, step):
        previous, cache = carry
        logits, cache = network(cache, previous, step)
        rows, columns, _ = order.positions(step)
        drawn = choose(rows, columns, logits)
        return (drawn.codes, cache), drawn

    start = jnp.zeros((batch, order.rows), jnp.int32)
    _, empty = jax.eval_shape(lambda: network({}, start, jnp.int32(0)))
    _, drawn = jax.lax.scan(one_step, (start, _zeros(empty)), jnp.arange(order.steps))
    steps, slots = order.step_of(), order.slot_of()  # [H, W]
    return jax.tree.map(lambda x: jnp.moveaxis(x[steps, :, slots], 2, 0), drawn)  # [T, B, n] -> [H, W, B] -> [B, H, W]


def _raster(prior, params, condition, choose, both, batch) -> Sampled:
    width, outside = prior.shape[1], prior.codebook_size
    variables = {'params': params}

    def vertical(cache, above, row):
        arguments = (both(above)[:, None], row[None], _rows(condition, row))
        return prior.apply(variables | cache, *arguments, method='vertical', mutable=['rows'])

    def horizontal(cache, left, row, column, features):
        part = _columns(_rows(condition, row), column)
        arguments = (both(left)[:, None], row[None], column[None], [_columns(f, column) for f in features], part)
        return prior.apply(variables | cache, *arguments, method='horizontal', mutable=['columns', 'attention'])

    def one_row(carry, row):
        above, rows, attention = carry
        features, rows = vertical(rows, above, row)

        def one_column(carry, column):
            left, cache = carry
            logits, cache = horizontal(cache, left, row, column, features)
            drawn = choose(row[None], column[None], logits[:, 0])
            return (drawn.codes, cache), jax.tree.map(lambda x: x[:, 0], drawn)

        start = (jnp.full((batch, 1), outside, jnp.int32), {**empty_columns, **attention})
        (_, cache), drawn = jax.lax.scan(one_column, start, jnp.arange(width))
        drawn = jax.tree.map(jnp.transpose, drawn)  # [W, B] -> [B, W]
        return (drawn.codes, rows, {k: v for k, v in cache.items() if k == 'attention'}), drawn

    above = jnp.full((batch, width), outside, jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    features, empty_rows = jax.eval_shape(lambda: vertical({}, above, zero))
    features, empty_rows = _zeros(features), _zeros(empty_rows)
    _, empty = jax.eval_shape(lambda: horizontal({}, above[:, :1], zero, zero, features))
    empty = _zeros(empty)
    empty_columns = {k: v for k, v in empty.items() if k == 'columns'}
    empty_attention = {k: v for k, v in empty.items() if k == 'attention'}
    _, drawn = jax.lax.scan(one_row, (above, empty_rows, empty_attention), jnp.arange(prior.shape[0]))
    return jax.tree.map(lambda x: x.swapaxes(0, 1), drawn)  # [H, B, W] -> [B, H, W]


def _rows(x, row):
    # [B, H or 1, W, F] -> [B, 1, W, F]
    return x if x is None or x.shape[1] == 1 else jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1)


def _columns(x, column):
    # [B, 1, W or 1, F] -> [B, 1, 1, F]
    return x if x is None or x.shape[2] == 1 else jax.lax.dynamic_slice_in_dim(x, column, 1, axis=2)


def _zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
