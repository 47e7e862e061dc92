"""The transposed 4x4 convolution that doubles a map, in two forms with the same results, parameters and gradients.

GPUs compute it as the gradient of a strided convolution. XLA's CPU backend has only a slow loop for the gradients of
that form (benchmarks/upsample.py), and TPU programs of two images a chip move more bytes with it. On both, a dense
2x2 convolution computes each 2x2 block of output pixels, which depends on a 2x2 neighborhood of the input, as channels,
and a pixel shuffle arranges the blocks.
Both equal `nn.ConvTranspose` (tests/test_upsample.py).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange


class Upsample(nn.Module):
    """Transposed 4x4 convolution with stride 2 and padding 1.

    The kernel is that of PyTorch's ConvTranspose2d, [4, 4, C, F] in place of [C, F, 4, 4]: pixel i of the input reaches
    the pixels 2 i - 1 + k of the output through kernel row k.

    Shapes: B batch, H W map, C input channels, F output channels.

    Attributes:
      features: F.
      dtype: dtype of the computation.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, 2 H, 2 W, F]."""
        # The fan-in counts 16 taps, of which 4 reach a pixel; this half scale trains better (measured).
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (4, 4, x.shape[-1], self.features))
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return jax.lax.platform_dependent(x, kernel, cpu=_dense, tpu=_dense, default=_transposed) + bias


def _dense(x, kernel):
    # Rows 2 m - 1 and 2 m of the output both take the inputs m - 1 and m, through kernel rows 2 + i and i.
    kernel = rearrange(kernel, '(s i) (t j) c f -> s t c (i j f)', i=2, j=2)[::-1, ::-1]  # [2, 2, C, 4 F]
    # Padding inside the convolution would make the gradient of its kernel slow on CPUs.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    blocks = rearrange(y, 'b h w (i j f) -> b (h i) (w j) f', i=2, j=2)  # [B, 2 H + 2, 2 W + 2, F], from row -1 on
    return blocks[:, 1:-1, 1:-1]


@jax.custom_vjp
def _transposed(x, kernel):
    # The gradient of `_strided` with respect to its first argument.
    numbers = ('NHWC', 'HWIO', 'NHWC')
    flipped, padding = kernel[::-1, ::-1], ((2, 2), (2, 2))
    return jax.lax.conv_general_dilated(x, flipped, (1, 1), padding, lhs_dilation=(2, 2), dimension_numbers=numbers)


def _strided(y, kernel):
    # [B, 2 H, 2 W, F] -> [B, H, W, C]
    return jax.lax.conv_general_dilated(y, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWOI', 'NHWC'))


def _transposed_forward(x, kernel):
    return _transposed(x, kernel), (x, kernel)


def _transposed_backward(inputs, gradient):
    # JAX would differentiate the dilated convolution by a convolution whose window is the whole map. The gradients of
    # `_strided` are the ones that libraries have kernels for.
    x, kernel = inputs
    gradient_of_x, pull_back = jax.vjp(_strided, gradient, kernel)
    return gradient_of_x, pull_back(x)[1]


_transposed.defvjp(_transposed_forward, _transposed_backward)
