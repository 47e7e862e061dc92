"""Causal layers with one definition and two ways to run: over whole maps, or as a stream with a cache.

A layer sees its past as zeros (whole maps: training) or as what the cache holds (sampling: one row or one position a
call). Nothing else differs, so a streamed network draws what the whole network would.

Streaming is on for the collections that the caller makes mutable:
  `rows`      the last rows that each convolution of the vertical stack has seen
  `columns`   the last columns that each convolution of the horizontal stack has seen; empty again at every new row
  `attention` keys and values of all positions so far

Glossary of shapes: B batch, H W map (1 where streamed), F features, N attention heads, P positions of the whole map.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

_AXIS_OF = {'rows': 1, 'columns': 2}


class CausalConv(nn.Module):
    """Convolution whose output sees its own place and `kernel - 1` places back along one axis, `stream`.

    Along rows the other axis is padded to keep its size ('SAME').
    """

    features: int
    kernel: tuple[int, int]  # height, width
    stream: str  # 'rows' or 'columns'
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # [B, H, W, F'] -> [B, H, W, features]
        axis = _AXIS_OF[self.stream]
        reach = self.kernel[axis - 1] - 1
        past = jnp.zeros((*x.shape[:axis], reach, *x.shape[axis + 1 :]), x.dtype)
        streaming = self.is_mutable_collection(self.stream) and not self.is_initializing()
        if streaming:
            cache = self.variable(self.stream, 'past', lambda: past)
            past = cache.value
        x = jnp.concatenate([past, x], axis=axis)
        if streaming:
            cache.value = jax.lax.slice_in_dim(x, x.shape[axis] - reach, x.shape[axis], axis=axis)
        side = self.kernel[1] // 2 if self.stream == 'rows' else 0
        padding = ((0, 0), (side, side))
        return nn.Conv(self.features, self.kernel, padding=padding, kernel_init=self.kernel_init, dtype=self.dtype)(x)


class CausalAttention(nn.Module):
    """Multi-head attention in raster order: position p attends to the features at positions 0 .. p.

    The features at p already describe only codes before p (the prior shifts its input), so p itself may be
    attended and no row of the mask is empty.
    """

    heads: int
    positions: int  # P, of the whole map
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, position: jax.Array, *, train: bool = False) -> jax.Array:
        """x [B, H, W, F] with H * W features at raster indices `position` int32 [H * W]; the same shape out."""
        batch, height, width, features = x.shape
        if features % self.heads:
            raise ValueError(f'heads={self.heads} does not divide the hidden width {features}')
        shape = (batch, height * width, self.heads, features // self.heads)
        query, key, value = (
            nn.Dense(features, dtype=self.dtype, name=n)(x).reshape(shape) for n in ('query', 'key', 'value')
        )
        if self.is_mutable_collection('attention') and not self.is_initializing():
            key, value = self._remember('keys', key, position), self._remember('values', value, position)
        logits = jnp.einsum('bqnd,bknd->bnqk', query, key, preferred_element_type=jnp.float32) * shape[-1] ** -0.5
        here = jnp.arange(key.shape[1])[None, :]  # [1, P]
        visible = (here <= position[:, None])[None, None]  # [1, 1, Q, P]
        if train and self.dropout > 0:
            # "Dropout on the logits" (section 3.2.1): a dropped logit is one that the softmax does not see. A
            # position always keeps itself, so that no row is empty.
            kept = jax.random.bernoulli(self.make_rng('dropout'), 1 - self.dropout, logits.shape)
            visible = visible & (kept | (here == position[:, None])[None, None])
        weights = nn.softmax(jnp.where(visible, logits, jnp.finfo(logits.dtype).min)).astype(value.dtype)
        attended = jnp.einsum('bnqk,bknd->bqnd', weights, value).reshape(x.shape)
        return nn.Dense(features, kernel_init=nn.initializers.zeros, dtype=self.dtype, name='out')(attended)

    def _remember(self, name: str, new: jax.Array, position: jax.Array) -> jax.Array:
        # [B, 1, N, d] -> [B, P, N, d], with the new entry written at its position
        batch, _, heads, width = new.shape
        cache = self.variable('attention', name, jnp.zeros, (batch, self.positions, heads, width), new.dtype)
        cache.value = jax.lax.dynamic_update_slice_in_dim(cache.value, new, position[0], axis=1)
        return cache.value
