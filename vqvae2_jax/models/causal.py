"""Causal convolutions. They run over whole maps, or step by step with a cache.

On whole maps (training) the inputs before the first row or column are zeros; with a cache (sampling) they are the
inputs of earlier calls. Both compute the same sums up to rounding, so cached sampling gives the samples of the full
network.

A cache is a Flax collection. A layer uses it if the caller of `apply` makes the collection mutable:
  `rows`      the last input rows of each convolution of a vertical stack
  `columns`   the last input columns of each convolution of a horizontal stack; the caller empties it at every new row
  `diagonals` the inputs of the last steps of each convolution in wavefront order, for the rows of the current step

Shapes: B batch, H W map (with a cache, the part that is computed in one call), F features, n positions of a step of the
order.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqvae2_jax.models.order import GenerationOrder


class CausalConv(nn.Module):
    """Convolution that is causal along one axis: an output depends on inputs up to and including its own position.

    The kernel covers a position and the positions before it along the causal axis. Along the other axis a vertical
    stack has 'SAME' padding, and the kernel of a horizontal stack has size 1.

    Attributes:
      features: number of output channels.
      kernel_size: (height, width).
      cache_name: the collection of the cache, which also selects the causal axis: 'rows' the height, 'columns' the
        width.
      kernel_init: initializer of the kernel.
      dtype: dtype of the computation.
    """

    features: int
    kernel_size: tuple[int, int]
    cache_name: str
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, F] to [B, H, W, features]."""
        axis = {'rows': 1, 'columns': 2}[self.cache_name]
        length = self.kernel_size[axis - 1] - 1  # of the past that the kernel covers
        past = jnp.zeros((*x.shape[:axis], length, *x.shape[axis + 1 :]), x.dtype)
        use_cache = self.is_mutable_collection(self.cache_name) and not self.is_initializing()
        if use_cache:
            cache = self.variable(self.cache_name, 'past', lambda: past)
            past = cache.value
        x = jnp.concatenate([past, x], axis=axis)
        if use_cache:
            cache.value = jax.lax.slice_in_dim(x, x.shape[axis] - length, x.shape[axis], axis=axis)
        side = self.kernel_size[1] // 2 if self.cache_name == 'rows' else 0
        padding = ((0, 0), (side, side))
        return nn.Conv(
            self.features, self.kernel_size, padding=padding, kernel_init=self.kernel_init, dtype=self.dtype
        )(x)


class WavefrontConv(nn.Module):
    """Convolution over the positions in its window that belong to the same or earlier steps of an order.

    With a cache each call takes the inputs of one step and returns the outputs of the same step. If `strict`, an output
    depends on earlier steps only, so a call returns the outputs of the next step. The first call then takes inputs of
    step -1, which has no position on the map; they count as zero.

    Attributes:
      features: number of output channels.
      kernel_size: number of rows of the window, see `GenerationOrder.visible_offsets`.
      order: the order of the positions.
      strict: leave out the positions of the same step.
      kernel_init: initializer of the kernel.
      dtype: dtype of the computation.
    """

    features: int
    kernel_size: int
    order: GenerationOrder
    dtype: jnp.dtype
    strict: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, F] to [B, H, W, features]; with a cache, [B, n, 1, F] to [B, n, 1, features]."""
        visible_offsets = self.order.visible_offsets(self.kernel_size, self.strict)
        weights = self.param('kernel', self.kernel_init, (len(visible_offsets), x.shape[-1], self.features))
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        x, weights, bias = nn.dtypes.promote_dtype(x, weights, bias, dtype=self.dtype)
        if self.is_mutable_collection('diagonals') and not self.is_initializing():
            # Accelerators accumulate in float32 anyway, and CPUs are fast at bfloat16 products only in this way.
            window, weights = self._cached_window(x, visible_offsets), weights.reshape(-1, self.features)
            return jnp.matmul(window, weights, preferred_element_type=jnp.float32).astype(x.dtype) + bias
        rows, columns = np.array(visible_offsets).T
        above, below, left, right = -rows.min(), rows.max(), -columns.min(), columns.max()
        kernel = jnp.zeros((above + below + 1, left + right + 1, *weights.shape[1:]), weights.dtype)
        kernel = kernel.at[above + rows, left + columns].set(weights)
        padding = ((above, below), (left, right))
        layout = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=layout) + bias

    def _cached_window(self, x, visible_offsets):
        # [B, n, 1, F] -> [B, n, 1, offsets * F], the inputs at every offset
        order, lead = self.order, int(self.strict)  # `lead`: number of steps from the step of x to that of the output
        n = order.max_positions_per_step
        above, below = -min(i for i, _ in visible_offsets), max(i for i, _ in visible_offsets)
        num_cached_steps = -lead - min(j + order.skew * i for i, j in visible_offsets)
        shape = (x.shape[0], above + n, num_cached_steps, x.shape[-1])
        past = self.variable('diagonals', 'past', jnp.zeros, shape, x.dtype)
        calls = self.variable('diagonals', 'calls', jnp.zeros, (), jnp.int32)
        step = calls.value - lead  # the step of x
        calls.value = calls.value + 1

        _, _, on_map = order.positions(step)
        new = jnp.where(on_map[:, None, None], x, 0)  # zeros off the map, as in training
        kept = self._shift_rows(past.value, step)
        # The rows above those of this step are finished: their later columns are off the map.
        inputs = jnp.concatenate([kept, jnp.pad(new, ((0, 0), (above, 0), (0, 0), (0, 0)))], axis=2)
        past.value = inputs[:, :, 1:]
        if self.strict:
            inputs = self._shift_rows(inputs, step + 1)
        inputs = jnp.pad(inputs, ((0, 0), (0, below), (0, 0), (0, 0)))  # rows that have not started
        at_offsets = [
            inputs[:, above + i : above + i + n, num_cached_steps + lead + j + order.skew * i]
            for i, j in visible_offsets
        ]
        return jnp.concatenate(at_offsets, axis=-1)[:, :, None]

    def _shift_rows(self, inputs, step):
        # from the rows of the previous step to those of `step`: by at most one row
        shift = self.order.first_row(step) - self.order.first_row(step - 1)
        padded = jnp.pad(inputs, ((0, 0), (0, 1), (0, 0), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(padded, shift, inputs.shape[1], axis=1)
