"""Exact ancestral sampling: every code is drawn from the prior given all codes drawn before it.

`sample` streams: row by row through the vertical stack, position by position through the horizontal one, each layer
remembering what it has seen. `sample_by_rerunning` is the slow definition, which runs the whole network for every
position; both draw the same codes.

Randomness is a function of (key of the sample, position) alone, so sample i is the same in any batch, on any number of
devices.

Glossary of shapes: B batch, H W map, K codebook size.
"""

import jax
import jax.numpy as jnp

from vqvae2_jax.models.prior import Prior


def sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key for each sample index, [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def draw(keys: jax.Array, position: jax.Array, logits: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """One code int32 [B] from softmax(logits [B, K] / temperature); temperature 0 takes the likeliest."""

    def one(key, row):
        cold = jnp.asarray(temperature) <= 0
        tempered = row / jnp.where(cold, 1.0, temperature)
        drawn = jax.random.categorical(jax.random.fold_in(key, position), tempered)
        return jnp.where(cold, jnp.argmax(row), drawn).astype(jnp.int32)

    return jax.vmap(one)(keys, logits)


def sample(
    prior: Prior,
    params: dict,
    keys: jax.Array,
    labels: jax.Array | None = None,
    coarser: tuple[jax.Array, ...] = (),
    temperature: jax.Array | float = 1.0,
) -> jax.Array:
    """Codes int32 [B, H, W], one position after the other in raster order, with caches.

    Args:
      prior: the module; `params`: its parameters.
      keys: [B], one key per sample (`sample_keys`).
      labels: int32 [B] where the prior has classes.
      coarser: int32 [B, h_l, w_l] of every coarser level, finest first.
      temperature: divides the logits; may be traced.
    """
    batch, (height, width) = keys.shape[0], prior.shape
    outside = prior.codebook_size
    variables = {'params': params}
    condition = prior.apply(variables, labels, coarser, method='condition')

    def vertical(cache, above, row):
        part = _rows(condition, row)
        arguments = (above[:, None], row[None], part)
        return prior.apply(variables | cache, *arguments, method='vertical', mutable=['rows'])

    def horizontal(cache, left, row, column, features):
        part = _columns(_rows(condition, row), column)
        arguments = (left[:, None, None], row[None], column[None], [_columns(f, column) for f in features], part)
        return prior.apply(variables | cache, *arguments, method='horizontal', mutable=['columns', 'attention'])

    def one_row(carry, row):
        above, rows, attention = carry
        features, rows = vertical(rows, above, row)

        def one_column(carry, column):
            left, cache = carry
            logits, cache = horizontal(cache, left, row, column, features)
            code = draw(keys, row * width + column, logits[:, 0, 0], temperature)
            return (code, cache), code

        start = (jnp.full((batch,), outside, jnp.int32), {**empty_columns, **attention})
        (_, cache), codes = jax.lax.scan(one_column, start, jnp.arange(width))
        codes = codes.T  # [W, B] -> [B, W]
        return (codes, rows, {k: v for k, v in cache.items() if k == 'attention'}), codes

    above = jnp.full((batch, width), outside, jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    features, empty_rows = jax.eval_shape(lambda: vertical({}, above, zero))
    features, empty_rows = _zeros(features), _zeros(empty_rows)
    _, empty = jax.eval_shape(lambda: horizontal({}, above[:, 0], zero, zero, features))
    empty = _zeros(empty)
    empty_columns = {k: v for k, v in empty.items() if k == 'columns'}
    empty_attention = {k: v for k, v in empty.items() if k == 'attention'}
    _, codes = jax.lax.scan(one_row, (above, empty_rows, empty_attention), jnp.arange(height))
    return codes.swapaxes(0, 1)  # [H, B, W] -> [B, H, W]


def sample_by_rerunning(prior, params, keys, labels=None, coarser=(), temperature=1.0) -> jax.Array:
    """The slow definition of `sample`: the same arguments and the same codes, the whole network run per position."""
    height, width = prior.shape

    def one_position(codes, position):
        row, column = position // width, position % width
        logits = prior.apply({'params': params}, codes, labels, coarser)  # [B, H, W, K]
        code = draw(keys, position, logits[:, row, column], temperature)
        return codes.at[:, row, column].set(code), None

    start = jnp.zeros((keys.shape[0], height, width), jnp.int32)
    return jax.lax.scan(one_position, start, jnp.arange(height * width))[0]


def sample_levels(priors, params, key, index, labels=None, temperatures=None) -> tuple[jax.Array, ...]:
    """Codes of every level, finest first, the coarsest drawn first.

    Args:
      priors, params: one per level, finest first.
      key: of the whole run.
      index: int32 [B], which samples to draw.
      labels: int32 [B] where the priors have classes.
      temperatures: one per level, may be traced; None is 1 everywhere.
    """
    temperatures = (1.0,) * len(priors) if temperatures is None else temperatures
    codes: tuple[jax.Array, ...] = ()
    for level in reversed(range(len(priors))):
        keys = sample_keys(jax.random.fold_in(key, level), index)
        codes = (sample(priors[level], params[level], keys, labels, codes, temperatures[level]), *codes)
    return codes


def _rows(x, row):
    # [B, H or 1, W, F] -> [B, 1, W, F]
    return x if x is None or x.shape[1] == 1 else jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1)


def _columns(x, column):
    # [B, 1, W or 1, F] -> [B, 1, 1, F]
    return x if x is None or x.shape[2] == 1 else jax.lax.dynamic_slice_in_dim(x, column, 1, axis=2)


def _zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
