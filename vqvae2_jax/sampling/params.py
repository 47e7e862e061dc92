"""How a code is sampled from a prior's logits: classifier-free guidance, temperature, top-k, top-p.

All values may be traced, so a change of one does not compile a new program. Only whether there is guidance is static.

Shapes: B batch, n positions sampled together, K codebook size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SamplingParams(NamedTuple):
    """Changes to the logits, applied in the order guidance, temperature, top-k, top-p.

    Attributes:
      temperature: divides the logits; 0 takes the most likely code (greedy).
      top_k: sample among the k most likely codes; 0: among all.
      top_p: sample among the most likely codes that hold this share of the probability (nucleus sampling).
      guidance: w in uncond + w (cond - uncond); None: the conditional logits, without the second forward pass.
    """

    temperature: jax.Array | float = 1.0
    top_k: jax.Array | int = 0
    top_p: jax.Array | float = 1.0
    guidance: jax.Array | float | None = None


DEFAULT = SamplingParams()  # the prior's own distribution


def sample_codes(
    keys: jax.Array, positions: jax.Array, logits: jax.Array, sampling_params: SamplingParams = DEFAULT
) -> jax.Array:
    """Samples codes. The result depends on the sample's key, the position and the logits alone, not on the batch.

    Args:
      keys: [B], one per sample.
      positions: int32 [n], raster indices on the map.
      logits: float32 [B, n, K], after guidance.
      sampling_params: temperature, top-k and top-p.

    Returns:
      int32 [B, n].
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
      sampling_params: of which top_k and top_p are used.

    Returns:
      float32 [..., K].
    """

    def keep_most_likely(logits):
        ordered = -jnp.sort(-logits, axis=-1)  # most likely first
        size = logits.shape[-1]
        limit = jnp.where(jnp.asarray(sampling_params.top_k) > 0, jnp.clip(sampling_params.top_k, 1, size), size)
        ordered = jnp.where(jnp.arange(size) < limit, ordered, -jnp.inf)
        probability = jax.nn.softmax(ordered)
        before = jnp.cumsum(probability, axis=-1) - probability  # of all more likely codes
        inside = (before < sampling_params.top_p).at[..., 0].set(True) & (ordered > -jnp.inf)
        lowest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= lowest, logits, -jnp.inf)

    active = (jnp.asarray(sampling_params.top_k) > 0) | (jnp.asarray(sampling_params.top_p) < 1)
    return jax.lax.cond(active, keep_most_likely, lambda logits: logits, logits)  # sorts only if needed


def apply_cfg(logits: jax.Array, sampling_params: SamplingParams) -> jax.Array:
    """Applies classifier-free guidance (Ho and Salimans 2022).

    Args:
      logits: float32 [2 B, ...], of every sample the conditional and then the unconditional ones; [B, ...] without
        guidance.
      sampling_params: of which guidance is used.

    Returns:
      float32 [B, ...].
    """
    if sampling_params.guidance is None:
        return logits
    pairs = logits.reshape(-1, 2, *logits.shape[1:])  # keeps the sharding of the batch
    cond, uncond = pairs[:, 0], pairs[:, 1]
    return uncond + sampling_params.guidance * (cond - uncond)
