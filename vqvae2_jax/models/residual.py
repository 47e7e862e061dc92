"""The residual stack of encoders, decoders and conditioning stacks (VQ-VAE-2 appendix A, as in Sonnet's VQ-VAE)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqvae2_jax.models.block_runner import DEFAULT, BlockRunner


class ResidualBlock(nn.Module):
    """ReLU, 3x3 to `residual_channels`, ReLU, 1x1 back to the width of the input, added to it."""

    residual_channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Conv(self.residual_channels, (3, 3), dtype=self.dtype)(nn.relu(x))
        return x + nn.Conv(x.shape[-1], (1, 1), dtype=self.dtype)(nn.relu(y))


class ResidualStack(nn.Module):
    """A stack of `num_blocks` residual blocks."""

    num_blocks: int
    residual_channels: int
    dtype: jnp.dtype

    def setup(self):
        self.blocks = [ResidualBlock(self.residual_channels, self.dtype) for _ in range(self.num_blocks)]

    def __call__(self, x: jax.Array, repeat: BlockRunner = DEFAULT) -> jax.Array:
        return repeat.run(lambda block, x, _: block(x), self.blocks, x)[0]
