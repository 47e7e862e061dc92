"""How a code is sampled from a prior's logits: classifier-free guidance, temperature, top-k, top-p.

The numbers may be traced, so a program that takes them as an argument is compiled once for all values. Only whether
one is None is static: the program then does not contain that change.

Shapes: B batch, n positions sampled together, K codebook size.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class SamplingParams(NamedTuple):
    """Changes to the logits, applied in the order guidance, temperature, top-k, top-p.

    All are numbers, arrays of shape [], or None where it says so. The defaults sample from the prior's own
    distribution.

    Attributes:
      temperature: divides the logits; 0 takes the most likely code (greedy).
      top_k: sample among the k most likely codes; 0 or None: among all. None saves the sort.
      top_p: sample among the smallest set of most likely codes with at least this probability (nucleus sampling); None:
        among all, which saves the sort.
      guidance: the weight of classifier-free guidance, see `apply_guidance`; None: no guidance, which saves the second
        forward pass.
    """

    temperature: jax.Array | float = 1.0
    top_k: jax.Array | int | None = None
    top_p: jax.Array | float | None = None
    guidance: jax.Array | float | None = None


DEFAULT = SamplingParams()  # the prior's own distribution
PerLevel = float | jax.Array | Mapping[str, Any] | None  # one value for all levels, or {level: value}


def params_of_levels(levels: Sequence[str], **values: PerLevel) -> tuple[SamplingParams, ...]:
    """Returns the parameters of each level.

    Args:
      levels: names of the levels.
      **values: fields of `SamplingParams`; a level without a value has the default.

    Raises:
      ValueError: there is no such level.
    """
    for field, value in values.items():
        if unknown := set(value) - set(levels) if isinstance(value, Mapping) else ():
            raise ValueError(
                f'{field}: there is no level {min(unknown)!r}; the levels are {", ".join(reversed(levels))}'
            )

    def of_level(level):
        given = {
            field: value.get(level, getattr(DEFAULT, field)) if isinstance(value, Mapping) else value
            for field, value in values.items()
        }
        return SamplingParams(**given)

    return tuple(of_level(level) for level in levels)


def sample_codes(
    keys: jax.Array, positions: jax.Array, logits: jax.Array, sampling_params: SamplingParams = DEFAULT
) -> jax.Array:
    """Samples codes from logits.

    A code depends on its sample's key, its position and its logits alone, not on the batch.

    Args:
      keys: one key per sample, [B], from `ancestral.sample_keys`.
      positions: positions on the map as row * W + column, int32 [n].
      logits: float32 [B, n, K], after guidance.
      sampling_params: temperature, top-k and top-p; its guidance is not applied.

    Returns:
      The codes, int32 [B, n].
    """
    greedy = jnp.asarray(sampling_params.temperature) <= 0
    scaled = logits / jnp.where(greedy, 1.0, sampling_params.temperature)
    scaled = top_k_top_p_filter(scaled, sampling_params)

    def sample_one(key, position, row):
        return jax.random.categorical(jax.random.fold_in(key, position), row)

    sampled = jax.vmap(jax.vmap(sample_one, in_axes=(None, 0, 0)), in_axes=(0, None, 0))(keys, positions, scaled)
    return jnp.where(greedy, jnp.argmax(logits, axis=-1), sampled).astype(jnp.int32)


def top_k_top_p_filter(logits: jax.Array, sampling_params: SamplingParams) -> jax.Array:
    """Sets the logits that top-k and top-p exclude to minus infinity; the most likely code always stays.

    Args:
      logits: float32 [..., K].
      sampling_params: top_k and top_p; its other values are not used.

    Returns:
      float32 [..., K].
    """
    top_k, top_p = sampling_params.top_k, sampling_params.top_p
    if top_k is None and top_p is None:
        return logits
    ordered = -jnp.sort(-logits, axis=-1)  # most likely first
    if top_k is not None:
        size = logits.shape[-1]
        limit = jnp.where(jnp.asarray(top_k) > 0, jnp.clip(top_k, 1, size), size)
        ordered = jnp.where(jnp.arange(size) < limit, ordered, -jnp.inf)
    kept = ordered > -jnp.inf
    if top_p is not None:
        probability = jax.nn.softmax(ordered)
        before = jnp.cumsum(probability, axis=-1) - probability  # the probability of all more likely codes
        kept &= ((before < top_p) | (jnp.asarray(top_p) >= 1)).at[..., 0].set(True)
    lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def apply_guidance(cond: jax.Array, uncond: jax.Array, guidance: jax.Array | float) -> jax.Array:
    """Applies classifier-free guidance (Ho and Salimans 2022): uncond + guidance * (cond - uncond).

    Args:
      cond: logits given the class, float32 of any shape.
      uncond: logits without the class, float32 of the same shape.
      guidance: the guidance weight, []; 1 gives `cond`, 0 gives `uncond`, above 1 strengthens the class.

    Returns:
      float32 of the same shape.
    """
    return uncond + guidance * (cond - uncond)
