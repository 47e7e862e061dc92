"""The residual stack of encoders, decoders and conditioning stacks (VQ-VAE-2 appendix A, as in Sonnet's VQ-VAE)."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class ResidualStack(nn.Module):
    """`layers` blocks of ReLU, 3x3 to `residual`, ReLU, 1x1 back to the width of the input, added to it."""

    layers: int
    residual: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1]
        for _ in range(self.layers):
            y = nn.Conv(self.residual, (3, 3), dtype=self.dtype)(nn.relu(x))
            x = x + nn.Conv(features, (1, 1), dtype=self.dtype)(nn.relu(y))
        return x
