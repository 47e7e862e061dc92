"""The forms of the doubling convolution against its plain definition, values and gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae2_jax.models import upsample
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


@pytest.mark.parametrize('shape', [(2, 6, 4, 3), (1, 1, 3, 1)])
def test_the_form_of_accelerators_equals_that_of_cpus(shape):
    x, kernel = jax.random.normal(jax.random.key(0), shape), jax.random.normal(jax.random.key(1), (4, 4, shape[-1], 5))
    cotangent = jax.random.normal(jax.random.key(2), (shape[0], 2 * shape[1], 2 * shape[2], 5))

    def through(form):
        y, gradient = jax.vjp(form, x, kernel)
        return y, gradient(cotangent)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    jax.tree.map(close, through(upsample._dense), through(upsample._transposed))


def test_the_platform_selects_the_form_and_one_export_has_both():
    x = jnp.ones((1, 4, 4, 3))
    module = Upsample(5, jnp.float32)
    variables = module.init(jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda variables, x: jnp.sum(module.apply(variables, x) ** 2), argnums=(0, 1)))
    for platform in ('cpu', 'tpu', 'cuda'):
        text = gradient.trace(variables, x).lower(lowering_platforms=(platform,)).as_text()
        assert ('lhs_dilate = [2, 2]' in text) is (platform == 'cuda')
    batch = jax.ShapeDtypeStruct((*jax.export.symbolic_shape('batch'), 4, 4, 3), jnp.float32)
    exported = jax.export.export(jax.jit(module.apply), platforms=('cpu', 'tpu', 'cuda'))(variables, batch)
    np.testing.assert_allclose(exported.call(variables, x), module.apply(variables, x), atol=1e-5)


def test_computes_in_its_dtype_with_float32_parameters():
    x = jnp.ones((1, 4, 4, 3))
    module = Upsample(5, dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), x)
    assert module.apply(variables, x).dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
