"""Causal attention over the positions of a map, whole maps or step by step with a cache.

With a cache (the Flax collection `attention`: keys and values of all steps so far) a call takes the positions of one
step. Both ways compute the same sums up to rounding; `causal.py` has the convolutions.

Shapes: B batch, H W map (with a cache, the part that is computed in one call), F features, N attention heads,
d features per head, P positions of the whole map, T steps of the order, n positions of a step.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqvae2_jax.models.order import GenerationOrder
from vqvae2_jax.models.rms_norm import RMSNorm

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]  # of the signature of `attend`

# A cache of more keys than this holds a multiple of so many: XLA for GPUs would pad a copy of it in every step.
_MANY_KEYS, _KEYS_MULTIPLE = 1024, 128
# Maps of more positions compute attention head by head: the logits of all heads would take most of the memory.
_MANY_POSITIONS = 2048


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes softmax(query key^T / sqrt(d)) value for every head: the reference of other implementations.

    Args:
      query: [B, P, N, d].
      key: [B, P, N, d].
      value: [B, P, N, d].
      mask: bool [P, P], whether a query (first axis) sees a key; every query sees one at least.

    Returns:
      [B, P, N, d], of the dtype of `value`.
    """

    def attend_heads(query, key, value, _):
        return _weighted_mean(_logits(query, key), mask, value)

    return _over_heads(attend_heads, query, key, value)


def _over_heads(function, query, key, value, rng=None):
    """Calls a function of all heads at once, or of one after another if the map is large.

    One after another, the activations of a head are recomputed in the backward pass.

    Args:
      function: (query, key, value, rng) -> [B, P, N, d], for any N.
      query: [B, P, N, d].
      key: [B, P, N, d].
      value: [B, P, N, d].
      rng: key of `function`, split for the heads if they are computed one after another.

    Returns:
      [B, P, N, d].
    """
    _, num_positions, num_heads, _ = query.shape
    if num_positions <= _MANY_POSITIONS:
        return function(query, key, value, rng)
    heads = (jnp.moveaxis(x, 2, 0)[:, :, :, None] for x in (query, key, value))
    rngs = None if rng is None else jax.random.split(rng, num_heads)
    attended = jax.lax.map(jax.checkpoint(lambda arguments: function(*arguments)), (*heads, rngs))
    return jnp.moveaxis(attended[:, :, :, 0], 0, 2)


def _logits(query, key):
    # float32 [B, N, queries, keys]
    logits = jnp.einsum('bqnd,bknd->bnqk', query, key, preferred_element_type=jnp.float32)
    return logits * query.shape[-1] ** -0.5


def _weighted_mean(logits, visible, value):
    # By arithmetic, because `jnp.where` needs an array of constants as large as the logits: see `pointwise.py`.
    hidden = (1 - visible.astype(logits.dtype)) * jnp.finfo(logits.dtype).min
    weights = nn.softmax(logits + hidden).astype(value.dtype)
    return jnp.einsum('bnqk,bknd->bqnd', weights, value)


class CausalAttention(nn.Module):
    """Multi-head attention in which a position attends to the same and earlier steps of an order.

    The features at a position depend on codes of earlier steps only, so a position may attend to itself, and no row of
    the mask is empty.

    Attributes:
      num_heads: N, a divisor of F.
      order: the order of the positions.
      dropout: dropout rate of the attention.
      dropout_kind: 'keys' drops keys; 'logits' sets logits to 0. `_drop` has the sources.
      dtype: dtype of the computation.
      attend: computes attention over whole maps without dropout; `attend` of this file or an equal function.
    """

    num_heads: int
    order: GenerationOrder
    dropout: float
    dropout_kind: str
    dtype: jnp.dtype
    attend: Attend = attend

    @nn.compact
    def __call__(self, x: jax.Array, step: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Applies pre-norm attention.

        Args:
          x: [B, H, W, F]; with a cache, [B, n, 1, F], the positions of one step.
          step: int32 [], the number of this step; used with a cache only.
          train: apply dropout, which needs the rng `dropout`.

        Returns:
          The output of the attention, without the residual connection; an array of the shape of x.

        Raises:
          ValueError: num_heads does not divide F.
        """
        batch, height, width, features = x.shape
        if features % self.num_heads:
            raise ValueError(f'num_heads is {self.num_heads}; it must divide hidden_channels={features}')
        shape = (batch, height * width, self.num_heads, features // self.num_heads)
        x = RMSNorm(dtype=self.dtype)(x)
        query, key, value = (
            nn.Dense(features, dtype=self.dtype, name=n)(x).reshape(shape) for n in ('query', 'key', 'value')
        )
        if self.is_mutable_collection('attention') and not self.is_initializing():
            attended = self._attend_step(query, key, value, step)
        else:
            attended = self._attend_map(query, key, value, train)
        attended = attended.reshape(x.shape)
        return nn.Dense(features, kernel_init=nn.initializers.zeros, dtype=self.dtype, name='out')(attended)

    def _attend_step(self, query, key, value, step):
        # [B, n, N, d] each -> [B, n, N, d]; the keys and values are added to the cache
        steps = np.arange(self.order.num_steps)[:, None]
        _, _, on_map = self.order.positions(steps)
        visible = (on_map & (steps <= step)).reshape(1, -1)  # [1, T n]
        key, value = self._update_cache('keys', key, step), self._update_cache('values', value, step)
        visible = jnp.pad(visible, ((0, 0), (0, key.shape[1] - visible.shape[1])))
        # Keys of later steps may be anything, but values must be finite.
        logits = jnp.where(visible, _logits(query, key), jnp.finfo(jnp.float32).min)
        return _weighted_mean(logits, visible, value)

    def _attend_map(self, query, key, value, train):
        # [B, P, N, d] each -> [B, P, N, d]
        steps = self.order.step_map().reshape(-1)
        visible = jnp.asarray(steps[None, :] <= steps[:, None])  # [P, P]
        if not train or self.dropout == 0:
            return self.attend(query, key, value, visible)

        def attend_heads(query, key, value, rng):
            logits, kept = self._drop(rng, _logits(query, key), visible)
            return _weighted_mean(logits, kept, value)

        return _over_heads(attend_heads, query, key, value, self.make_rng('dropout'))

    def _drop(self, rng: jax.Array, logits: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Applies dropout to logits float32 [B, N, P, P] and the mask of visible keys, which broadcasts to them.

        'logits' is ordinary dropout, a reading of "dropout on the logits" in section 3.2 of VQ-VAE-2: a dropped logit
        is 0 and the others are scaled up, so every visible key keeps some weight. 'keys' is DropKey (Li et al. 2022): a
        dropped key gets no weight. A position never drops itself, so no row of the mask is empty.
        """
        kept = jax.random.bernoulli(rng, 1 - self.dropout, logits.shape)
        if self.dropout_kind == 'logits':
            return logits / (1 - self.dropout) * kept, visible
        return logits, visible & (kept | jnp.eye(logits.shape[-1], dtype=bool))

    def _update_cache(self, name: str, new: jax.Array, step: jax.Array) -> jax.Array:
        # [B, n or fewer, N, d] -> [B, T n or more, N, d], with the new entries at their step
        batch, count, *rest = new.shape
        order, n = self.order, self.order.max_positions_per_step
        length = order.num_steps * n
        if length > _MANY_KEYS:
            length += -length % _KEYS_MULTIPLE
        cache = self.variable('attention', name, jnp.zeros, (batch, length, *rest), new.dtype)
        start = step * n + order.first_row(step, count) - order.first_row(step)
        cache.value = jax.lax.dynamic_update_slice_in_dim(cache.value, new, start, axis=1)
        return cache.value
