"""Causal layers with one definition and two ways to run: over whole maps, or as a stream with a cache.

A layer sees its past as zeros (whole maps: training) or as what the cache holds (sampling: one row or one position a
call). Nothing else differs but how sums are rounded, so a streamed network draws what the whole network would.

Streaming is on for the collections that the caller makes mutable:
  `rows`      the last rows that each convolution of a vertical stack has seen
  `columns`   the last columns that each convolution of a horizontal stack has seen; empty again at every new row
  `diagonals` the last steps that each convolution in wavefront order has seen, in the rows that are at work
  `attention` keys and values of all steps so far

Glossary of shapes: B batch, H W map (the part of it at hand, where streamed), F features, N attention heads, P
positions of the whole map, T steps of the order, n positions of a step.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqvae2_jax.models.order import GenerationOrder

_AXIS_OF = {'rows': 1, 'columns': 2}


class CausalConv(nn.Module):
    """Convolution whose output sees its own place and `kernel_size - 1` places back along one axis, `stream`.

    Along rows the other axis is padded to keep its size ('SAME').
    """

    features: int
    kernel_size: tuple[int, int]  # height, width
    stream: str  # 'rows' or 'columns'
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # [B, H, W, F'] -> [B, H, W, features]
        axis = _AXIS_OF[self.stream]
        reach = self.kernel_size[axis - 1] - 1
        past = jnp.zeros((*x.shape[:axis], reach, *x.shape[axis + 1 :]), x.dtype)
        streaming = self.is_mutable_collection(self.stream) and not self.is_initializing()
        if streaming:
            cache = self.variable(self.stream, 'past', lambda: past)
            past = cache.value
        x = jnp.concatenate([past, x], axis=axis)
        if streaming:
            cache.value = jax.lax.slice_in_dim(x, x.shape[axis] - reach, x.shape[axis], axis=axis)
        side = self.kernel_size[1] // 2 if self.stream == 'rows' else 0
        padding = ((0, 0), (side, side))
        return nn.Conv(
            self.features, self.kernel_size, padding=padding, kernel_init=self.kernel_init, dtype=self.dtype
        )(x)


class WavefrontConv(nn.Module):
    """Convolution whose output sees its own and earlier steps within a window (`GenerationOrder.visible_offsets`).

    As a stream it takes the features of one step after the other and gives those of the same step, or, where `strict`,
    of the next one: then the first features are those of "step -1", which lie outside the map and count for nothing.
    """

    features: int
    kernel_size: int
    order: GenerationOrder
    dtype: jnp.dtype
    strict: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # [B, H, W, F'] -> [B, H, W, features], or streamed [B, n, 1, F'] -> [B, n, 1, features]
        visible_offsets = self.order.visible_offsets(self.kernel_size, self.strict)
        weights = self.param('kernel', self.kernel_init, (len(visible_offsets), x.shape[-1], self.features))
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        x, weights, bias = nn.dtypes.promote_dtype(x, weights, bias, dtype=self.dtype)
        if self.is_mutable_collection('diagonals') and not self.is_initializing():
            # Float32 sums: what accelerators do anyway, and the only products of bfloat16 that are fast on CPUs.
            seen, weights = self._stream(x, visible_offsets), weights.reshape(-1, self.features)
            return jnp.matmul(seen, weights, preferred_element_type=jnp.float32).astype(x.dtype) + bias
        rows, columns = np.array(visible_offsets).T
        above, below, left, right = -rows.min(), rows.max(), -columns.min(), columns.max()
        window = jnp.zeros((above + below + 1, left + right + 1, *weights.shape[1:]), weights.dtype)
        window = window.at[above + rows, left + columns].set(weights)
        padding = ((above, below), (left, right))
        layout = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(x, window, (1, 1), padding, dimension_numbers=layout) + bias

    def _stream(self, x, visible_offsets):
        # [B, n, 1, F'] -> [B, n, 1, taps * F'], what each tap sees
        order, last = self.order, -int(self.strict)  # tap offsets count from the step that comes out
        above, below = -min(i for i, _ in visible_offsets), max(i for i, _ in visible_offsets)
        back = last - min(j + order.skew * i for i, j in visible_offsets)  # earlier steps to remember
        past = self.variable(
            'diagonals', 'past', jnp.zeros, (x.shape[0], above + order.rows, back, x.shape[-1]), x.dtype
        )
        calls = self.variable('diagonals', 'calls', jnp.zeros, (), jnp.int32)
        step = calls.value + last  # whose features x are
        calls.value = calls.value + 1

        _, _, inside = order.positions(step)
        new = jnp.where(inside[:, None, None], x, 0)  # outside of the map there are zeros, as in training
        kept = self._down(past.value, step)
        # The rows above those at work are finished: their later columns lie outside.
        seen = jnp.concatenate([kept, jnp.pad(new, ((0, 0), (above, 0), (0, 0), (0, 0)))], axis=2)
        past.value = seen[:, :, 1:]
        if self.strict:
            seen = self._down(seen, step + 1)
        seen = jnp.pad(seen, ((0, 0), (0, below), (0, 0), (0, 0)))  # rows that have not begun
        tap_rows = [slice(above + i, above + i + order.rows) for i, _ in visible_offsets]
        tap_steps = [back + j + order.skew * i - last for i, j in visible_offsets]
        return jnp.concatenate([seen[:, r, s] for r, s in zip(tap_rows, tap_steps, strict=True)], axis=-1)[:, :, None]

    def _down(self, rows, step):
        """Rows as they lay at work before `step` -> as they lie in it: at most one row further down."""
        moved = self.order.first_row(step) - self.order.first_row(step - 1)
        longer = jnp.pad(rows, ((0, 0), (0, 1), (0, 0), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(longer, moved, rows.shape[1], axis=1)


class CausalAttention(nn.Module):
    """Multi-head attention in an order: a position attends to the features of its own and of earlier steps.

    The features at a position already describe only codes of earlier steps, so its own may be attended and no row of
    the mask is empty.
    """

    num_heads: int
    order: GenerationOrder
    dropout: float
    dropout_kind: str  # or 'logits', see `_drop`
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, step: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """x [B, H, W, F] -> the same shape; streamed, the features [B, n, 1, F] of `step`."""
        batch, height, width, features = x.shape
        if features % self.num_heads:
            raise ValueError(f'num_heads is {self.num_heads}; it must divide hidden_channels={features}')
        shape = (batch, height * width, self.num_heads, features // self.num_heads)
        x = nn.RMSNorm(dtype=self.dtype)(x)
        query, key, value = (
            nn.Dense(features, dtype=self.dtype, name=n)(x).reshape(shape) for n in ('query', 'key', 'value')
        )
        if self.is_mutable_collection('attention') and not self.is_initializing():
            steps = np.arange(self.order.steps)[:, None]
            _, _, inside = self.order.positions(steps, np)
            visible = (inside & (steps <= step)).reshape(1, -1)  # [1, T n]
            key, value = self._remember('keys', key, step), self._remember('values', value, step)
        else:
            steps = self.order.step_of().reshape(-1)
            visible = jnp.asarray(steps[None, :] <= steps[:, None])  # [P, P]
        logits = jnp.einsum('bqnd,bknd->bnqk', query, key, preferred_element_type=jnp.float32) * shape[-1] ** -0.5
        if train and self.dropout > 0:
            logits, visible = self._drop(logits, visible)
        weights = nn.softmax(jnp.where(visible, logits, jnp.finfo(logits.dtype).min)).astype(value.dtype)
        attended = jnp.einsum('bnqk,bknd->bqnd', weights, value).reshape(x.shape)
        return nn.Dense(features, kernel_init=nn.initializers.zeros, dtype=self.dtype, name='out')(attended)

    def _drop(self, logits: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Dropout on logits [B, N, P, P] float32 and the mask of visible keys, broadcastable to it.

        'logits' is ordinary dropout, the reading of "dropout on the logits" in the paper's section 3.2: a dropped
        logit is 0 and the others are scaled up, so that every visible key keeps some weight. 'keys' is DropKey (Li et
        al. 2022): a dropped key gets no weight. A position always keeps itself, so that no row of the mask is empty.
        """
        kept = jax.random.bernoulli(self.make_rng('dropout'), 1 - self.dropout, logits.shape)
        if self.dropout_kind == 'logits':
            return jnp.where(kept, logits / (1 - self.dropout), 0), visible
        return logits, visible & (kept | jnp.eye(logits.shape[-1], dtype=bool))

    def _remember(self, name: str, new: jax.Array, step: jax.Array) -> jax.Array:
        # [B, n, N, d] -> [B, T n, N, d], with the new entries written at their step
        batch, rows, *rest = new.shape
        cache = self.variable('attention', name, jnp.zeros, (batch, self.order.steps * rows, *rest), new.dtype)
        cache.value = jax.lax.dynamic_update_slice_in_dim(cache.value, new, step * rows, axis=1)
        return cache.value
