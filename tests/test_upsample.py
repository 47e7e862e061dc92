"""The fast doubling convolution against its plain definition, values and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae2_jax.models.upsample import Upsample


@pytest.mark.parametrize('shape', [(2, 6, 4, 3), (1, 1, 3, 1)])
def test_values_and_gradients_equal_the_transposed_convolution(shape):
    fast = Upsample(5, jnp.float32)
    plain = nn.ConvTranspose(5, (4, 4), (2, 2), transpose_kernel=True)  # PyTorch's layout: not mirrored
    x = jax.random.normal(jax.random.key(0), shape)
    params = {**fast.init(jax.random.key(1), x)['params'], 'bias': jnp.arange(5.0)}

    def through(module, convert):
        def loss(params, x):
            y = module.apply({'params': {'kernel': convert(params['kernel']), 'bias': params['bias']}}, x)
            return jnp.sum(jnp.sin(y)), y

        (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y, gradients

    ours = through(fast, lambda kernel: kernel)
    theirs = through(plain, lambda kernel: kernel.swapaxes(2, 3))
    assert ours[0].shape == (shape[0], 2 * shape[1], 2 * shape[2], 5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, theirs)


def test_computes_in_its_dtype_with_float32_parameters():
    x = jnp.ones((1, 4, 4, 3))
    module = Upsample(5, dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), x)
    assert module.apply(variables, x).dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
