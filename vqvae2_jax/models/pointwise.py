"""Functions of single elements, by arithmetic with scalars: `jnp.where(x > 0, x, 0)` makes an array of zeros.

Alone that costs nothing, because XLA fuses it. Inside a `jax.lax.scan` that is differentiated, JAX moves all that does
not depend on the step out of the loop, so that every step reads arrays of zeros from memory.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


@jax.custom_jvp
def elu(x: jax.Array) -> jax.Array:
    """Returns x where it is positive, else exp(x) - 1, as `jax.nn.elu`."""
    return jnp.maximum(x, 0) + jnp.expm1(jnp.minimum(x, 0))


@elu.defjvp
def _elu_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    y = elu(x)
    return y, tangent * (1 + jnp.minimum(y, 0))


class Dropout(nn.Module):
    """Sets a share of the elements to zero and scales the others up, as `flax.linen.Dropout` with the same rng.

    Attributes:
      rate: the share, below 1.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns x with dropout if `train`, which needs the rng `dropout`; else x."""
        if not train or self.rate == 0:
            return x
        return x / (1 - self.rate) * jax.random.bernoulli(self.make_rng('dropout'), 1 - self.rate, x.shape)
