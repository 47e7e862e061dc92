"""Causal attention over the positions of a map, whole maps or step by step with a cache.

With a cache (the Flax collection `attention`: keys and values of all steps so far) a call takes the positions of one
step. Both ways compute the same sums up to rounding; `causal.py` has the convolutions.

Shapes: B batch, H W map (with a cache, the part that is computed in one call), F features, N attention heads,
d features per head, P positions of the whole map, T steps of the order, n positions of a step.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqvae2_jax.models.order import GenerationOrder


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
    """

    num_heads: int
    order: GenerationOrder
    dropout: float
    dropout_kind: str
    dtype: jnp.dtype

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
        x = nn.RMSNorm(dtype=self.dtype)(x)
        query, key, value = (
            nn.Dense(features, dtype=self.dtype, name=n)(x).reshape(shape) for n in ('query', 'key', 'value')
        )
        if self.is_mutable_collection('attention') and not self.is_initializing():
            steps = np.arange(self.order.num_steps)[:, None]
            _, _, on_map = self.order.positions(steps)
            visible = (on_map & (steps <= step)).reshape(1, -1)  # [1, T n]
            key, value = self._update_cache('keys', key, step), self._update_cache('values', value, step)
        else:
            steps = self.order.step_map().reshape(-1)
            visible = jnp.asarray(steps[None, :] <= steps[:, None])  # [P, P]
        logits = jnp.einsum('bqnd,bknd->bnqk', query, key, preferred_element_type=jnp.float32) * shape[-1] ** -0.5
        if train and self.dropout > 0:
            logits, visible = self._drop(logits, visible)
        weights = nn.softmax(jnp.where(visible, logits, jnp.finfo(logits.dtype).min)).astype(value.dtype)
        attended = jnp.einsum('bnqk,bknd->bqnd', weights, value).reshape(x.shape)
        return nn.Dense(features, kernel_init=nn.initializers.zeros, dtype=self.dtype, name='out')(attended)

    def _drop(self, logits: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Applies dropout to logits float32 [B, N, P, P] and the mask of visible keys, which broadcasts to them.

        'logits' is ordinary dropout, a reading of "dropout on the logits" in section 3.2 of VQ-VAE-2: a dropped logit
        is 0 and the others are scaled up, so every visible key keeps some weight. 'keys' is DropKey (Li et al. 2022): a
        dropped key gets no weight. A position never drops itself, so no row of the mask is empty.
        """
        kept = jax.random.bernoulli(self.make_rng('dropout'), 1 - self.dropout, logits.shape)
        if self.dropout_kind == 'logits':
            return jnp.where(kept, logits / (1 - self.dropout), 0), visible
        return logits, visible & (kept | jnp.eye(logits.shape[-1], dtype=bool))

    def _update_cache(self, name: str, new: jax.Array, step: jax.Array) -> jax.Array:
        # [B, n, N, d] -> [B, T n, N, d], with the new entries at their step
        batch, n, *rest = new.shape
        cache = self.variable('attention', name, jnp.zeros, (batch, self.order.num_steps * n, *rest), new.dtype)
        cache.value = jax.lax.dynamic_update_slice_in_dim(cache.value, new, step * n, axis=1)
        return cache.value
