"""Causal convolutions. They run over whole maps, or step by step with a cache.

On whole maps (training) the inputs before the first row or column are zeros; with a cache (sampling) they are the
inputs of earlier calls. Both compute the same sums up to rounding, so cached sampling gives the samples of the full
network.

A cache is a Flax collection. A layer uses it if the caller of `apply` makes the collection mutable:
  `rows`      the last input rows of each convolution of a vertical stack
  `columns`   the last input columns of each convolution of a horizontal stack; the caller empties it at every new row
  `diagonals` the inputs of the last steps of each convolution in wavefront order

Shapes: B batch, H W map (with a cache, the part that is computed in one call), F features, n positions that a call
computes of a step of the order.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqvae2_jax.models.order import GenerationOrder


class CausalConv(nn.Module):
    """Convolution that is causal along one axis: an output depends on inputs up to and including its own position.

    The kernel covers a position and the positions before it along the causal axis. Along the other axis a vertical
    stack has 'SAME' padding, and the kernel of a horizontal stack has size 1. With a cache a call takes one row of a
    vertical stack, or one position of a horizontal one.

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
        size = self.kernel_size[axis - 1]
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        use_cache = self.is_mutable_collection(self.cache_name) and not self.is_initializing()
        # The cache is the whole window of the last call: to write it and the part to keep would take two kernels.
        window = self.variable(self.cache_name, 'window', jnp.zeros, shape, x.dtype) if use_cache else None
        past = window.value if use_cache else jnp.zeros(shape, x.dtype)
        x = jnp.concatenate([jax.lax.slice_in_dim(past, 1, size, axis=axis), x], axis=axis)
        if use_cache:
            window.value = x
        convolve = _convolve_one_position if use_cache and self.cache_name == 'columns' else None
        side = self.kernel_size[1] // 2 if self.cache_name == 'rows' else 0
        return nn.Conv(
            self.features,
            self.kernel_size,
            padding=((0, 0), (side, side)),
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            conv_general_dilated=convolve,
        )(x)


def _convolve_one_position(window, kernel, *arguments, **options):
    # [B, 1, k, F] and [1, k, F, features] -> [B, 1, 1, features]: a product, which accelerators start faster
    def product(window, kernel):
        return _product(window.reshape(window.shape[0], 1, 1, -1), kernel.reshape(-1, kernel.shape[-1]))

    def convolution(window, kernel):
        return jax.lax.conv_general_dilated(window, kernel, *arguments, **options)

    if window.dtype != jnp.float32:
        return product(window, kernel)
    # XLA for CPUs computes products of 4 to 16 rows more slowly than convolutions, and those of one row faster. But a
    # sample must not depend on its batch, and the two round differently.
    return jax.lax.platform_dependent(window, kernel, cpu=convolution, default=product)


def _product(x, weights):
    # Accelerators accumulate in float32 anyway, and CPUs are fast at bfloat16 products only in this way.
    return jnp.matmul(x, weights, preferred_element_type=jnp.float32).astype(x.dtype)


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
            return _product(self._cached_window(x, visible_offsets), weights.reshape(-1, self.features)) + bias
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
        n, margin = x.shape[1], self.kernel_size // 2  # margin: rows above and below the map
        steps_back = [-j - order.skew * i for i, j in visible_offsets]  # from the step of the output
        num_slots = max(steps_back) - lead + 1
        shape = (num_slots, x.shape[0], order.shape[0] + 2 * margin, x.shape[-1])
        ring = self.variable('diagonals', 'ring', jnp.zeros, shape, x.dtype)  # slot: step modulo their number
        calls = self.variable('diagonals', 'calls', jnp.zeros, (), jnp.int32)
        output_step, step = calls.value, calls.value - lead  # step: of x
        calls.value = calls.value + 1

        _, _, on_map = order.positions(step, n)
        new = jnp.where(on_map[:, None], x[:, :, 0], 0)  # zeros off the map, as in training
        # The slot holds an older step. The rows above are finished, so they become zeros as far as a window reaches;
        # those below have not started in either step.
        new = jnp.pad(new, ((0, 0), (margin, 0), (0, 0)))[None]
        ring.value = jax.lax.dynamic_update_slice(ring.value, new, (step % num_slots, 0, order.first_row(step, n), 0))
        top = order.first_row(output_step, n) + margin
        at_offsets = [
            jax.lax.dynamic_slice(
                ring.value, ((output_step - back) % num_slots, 0, top + i, 0), (1, x.shape[0], n, x.shape[-1])
            )
            for (i, _), back in zip(visible_offsets, steps_back, strict=True)
        ]
        return jnp.concatenate(at_offsets, axis=-1)[0][:, :, None]
