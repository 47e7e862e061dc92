"""The residual stack of encoders, decoders and conditioning stacks (VQ-VAE-2 appendix A, as in Sonnet's VQ-VAE)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqvae2_jax.models.block_runner import DEFAULT, BlockRunner


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
    """Returns max(x, 0), of the shape and dtype of x.

    The gradient of `nn.relu` reads x. This one reads the result, so that x is not stored for the backward pass and XLA
    can fuse the maximum into the convolution before it.
    """
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
    y = relu(*primals)
    return y, tangents[0] * (y != 0)  # XLA would rewrite max(x, 0) > 0 to x > 0


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), with `residual_channels` between the convolutions.

    With `relu_skip` the sum takes relu(x) in place of x, as in PyTorch code whose first ReLU works in place.
    """

    residual_channels: int
    relu_skip: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to the same shape."""
        activated = relu(x)
        y = nn.Conv(self.residual_channels, (3, 3), dtype=self.dtype)(activated)
        return (activated if self.relu_skip else x) + nn.Conv(x.shape[-1], (1, 1), dtype=self.dtype)(relu(y))


class ResidualStack(nn.Module):
    """`num_blocks` residual blocks, one after the other.

    Shapes: B batch, H W map, C channels.
    """

    num_blocks: int
    residual_channels: int
    relu_skip: bool
    dtype: jnp.dtype

    def setup(self):
        self.blocks = [
            ResidualBlock(self.residual_channels, self.relu_skip, self.dtype) for _ in range(self.num_blocks)
        ]

    def __call__(self, x: jax.Array, runner: BlockRunner = DEFAULT) -> jax.Array:
        """Maps x [B, H, W, C] to the same shape; `runner` runs the blocks with remat or as a scan."""
        return runner.run(lambda block, x, _: block(x), self.blocks, x)[0]
