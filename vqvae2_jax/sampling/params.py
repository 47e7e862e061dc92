"""How one code is drawn from a prior's logits: temperature, top-k, top-p, classifier-free guidance.

Every value may be traced, so that none of them makes a new program; only whether there is guidance at all does.

Glossary of shapes: B batch, n positions drawn together, K codebook size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SamplingParams(NamedTuple):
    """What is done to the logits, in this order: guidance, temperature, top-k, top-p."""

    temperature: jax.Array | float = 1.0  # divides the logits; 0 takes the likeliest code
    top_k: jax.Array | int = 0  # draw among the k likeliest codes only; 0: among all
    top_p: jax.Array | float = 1.0  # draw among the likeliest codes that hold this share of the probability
    guidance: jax.Array | float | None = None  # w: logits without class + w (with - without); None: the prior as it is


DEFAULT = SamplingParams()  # the prior as it is


def draw(keys: jax.Array, positions: jax.Array, logits: jax.Array, control: SamplingParams = DEFAULT) -> jax.Array:
    """Codes int32 [B, n] from logits [B, n, K]; a draw depends on the sample's key and the position alone.

    Args:
      keys: [B], one per sample.
      positions: int [n], raster indices on the map.
      logits: guided already.
      control: temperature, top-k and top-p.
    """
    cold = jnp.asarray(control.temperature) <= 0
    tempered = top_k_top_p_filter(logits / jnp.where(cold, 1.0, control.temperature), control)

    def one(key, position, row):
        return jax.random.categorical(jax.random.fold_in(key, position), row)

    drawn = jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)), in_axes=(0, None, 0))(keys, positions, tempered)
    return jnp.where(cold, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)


def top_k_top_p_filter(logits: jax.Array, control: SamplingParams) -> jax.Array:
    """Logits [..., K] with those that top-k and top-p exclude at minus infinity; the likeliest code always stays."""

    def keep_likeliest(logits):
        ordered = -jnp.sort(-logits, axis=-1)  # likeliest first
        size = logits.shape[-1]
        limit = jnp.where(jnp.asarray(control.top_k) > 0, jnp.clip(control.top_k, 1, size), size)
        ordered = jnp.where(jnp.arange(size) < limit, ordered, -jnp.inf)
        probability = jax.nn.softmax(ordered)
        before = jnp.cumsum(probability, axis=-1) - probability  # of all likelier codes
        inside = (before < control.top_p).at[..., 0].set(True) & (ordered > -jnp.inf)
        lowest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= lowest, logits, -jnp.inf)

    active = (jnp.asarray(control.top_k) > 0) | (jnp.asarray(control.top_p) < 1)
    return jax.lax.cond(active, keep_likeliest, lambda logits: logits, logits)  # the sort costs nothing where unused


def apply_cfg(logits: jax.Array, control: SamplingParams) -> jax.Array:
    """Classifier-free guidance (Ho and Salimans 2022): [2 B, ...] with and then without class -> [B, ...]."""
    if control.guidance is None:
        return logits
    with_class, without = jnp.split(logits, 2)
    return without + control.guidance * (with_class - without)
