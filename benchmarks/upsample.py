"""Compares the time of the gradient of `Upsample` with that of `nn.ConvTranspose`, which computes the same.

  python -m benchmarks.upsample

Prints both times and their ratio, at the sizes of stage 1 on 256-pixel images, batch 4.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.timing import machine, seconds
from vqvae2_jax import xla_flags
from vqvae2_jax.models.upsample import Upsample

SHAPES = (((4, 64, 64, 128), 64), ((4, 128, 128, 64), 3))  # input, features: the two doublings of the last decoder


def seconds_per_gradient(module: nn.Module, x: jax.Array) -> float:
    """Measures the compiled gradient with respect to parameters and input."""
    variables = module.init(jax.random.key(0), x)
    return seconds(jax.grad(lambda v, x: jnp.sum(jnp.sin(module.apply(v, x))), argnums=(0, 1)), variables, x)


def main() -> None:
    xla_flags.set_cpu_flags()
    print(f'{machine()}, jax {jax.__version__}')
    for shape, features in SHAPES:
        x = jax.random.normal(jax.random.key(1), shape)
        plain = seconds_per_gradient(nn.ConvTranspose(features, (4, 4), (2, 2), transpose_kernel=True), x)
        fast = seconds_per_gradient(Upsample(features, jnp.float32), x)
        print(f'{shape} -> {features}: {plain * 1e3:.1f} ms plain, {fast * 1e3:.1f} ms fast: {plain / fast:.1f}x')


if __name__ == '__main__':
    main()
