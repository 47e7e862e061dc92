"""Attention over whole maps and its implementations, and the functions of single elements."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.defaults import make_prior
from vqvae2_jax.kernels import attention as kernel
from vqvae2_jax.models import attention
from vqvae2_jax.models.attention import CausalAttention, attend
from vqvae2_jax.models.order import GenerationOrder
from vqvae2_jax.models.pointwise import Dropout, elu
from vqvae2_jax.planning import hardware

ORDERS = {'raster': GenerationOrder.raster((4, 4)), 'wavefront': GenerationOrder((4, 4), 2)}


def inputs(order, dtype):
    steps = ORDERS[order].step_map().reshape(-1)
    arrays = [jax.random.normal(key, (2, 16, 2, 8), dtype) for key in jax.random.split(jax.random.key(0), 3)]
    return *arrays, steps[None, :] <= steps[:, None]


def plain(query, key, value, mask):
    logits = jnp.einsum('bqnd,bknd->bnqk', query, key, precision='highest') / np.sqrt(query.shape[-1])
    weights = jnp.exp(logits) * mask
    return jnp.einsum('bnqk,bknd->bqnd', weights / weights.sum(axis=-1, keepdims=True), value, precision='highest')


def with_gradients(function, query, key, value, mask):
    def loss(*x):
        return jnp.sum(jnp.sin(function(*x, mask).astype(jnp.float32)))

    return function(query, key, value, mask), *jax.grad(loss, (0, 1, 2))(query, key, value)


@pytest.mark.parametrize('implementation', [attend, kernel.attend])
@pytest.mark.parametrize('order', ORDERS)
def test_attention_is_a_mean_of_the_visible_values(order, implementation):
    """cuDNN does not take float32, so that its form runs everywhere here."""
    found, expected = (with_gradients(f, *inputs(order, jnp.float32)) for f in (implementation, plain))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.skipif(not hardware.has_gpu_compiler(), reason='cuDNN cannot be traced without the CUDA plugin')
@pytest.mark.parametrize('order', ORDERS)
def test_cudnn_holds_no_logits(order):
    def backward(*x):
        return with_gradients(kernel.attend, *x)

    traced = jax.jit(backward).trace(*inputs(order, jnp.bfloat16))
    assert [(x.shape, x.dtype) for x in traced.out_info] == [((2, 16, 2, 8), jnp.bfloat16)] * 4
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert '__cudnn$fmhaScaleBiasSoftmaxBackward' in text and '2x2x16x16' not in text


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs a GPU')
@pytest.mark.parametrize('order', ORDERS)
def test_cudnn_computes_the_reference(order):
    found, expected = (with_gradients(f, *inputs(order, jnp.bfloat16)) for f in (kernel.attend, attend))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.03)


@pytest.mark.parametrize('skew', [{}, {'skew': 2}])
@pytest.mark.parametrize('rate, calls', [(0.0, 2), (0.1, 0)])
def test_training_without_attention_dropout_takes_the_given_attention(skew, rate, calls):
    fields = dict(shape=(4, 4), codebook_size=6, hidden_channels=8, residual_channels=8, num_residual_blocks=2)
    fields |= dict(num_attention_layers=2, num_heads=2, kernel_size=3, attention_dropout=rate, **skew)
    called = []

    def counted(*x):
        called.append(1)
        return attend(*x)

    given, reference = make_prior(**fields, attend=counted), make_prior(**fields)
    codes, rngs = jnp.arange(32).reshape(2, 4, 4) % 6, {'dropout': jax.random.key(1)}
    params = jax.tree.map(lambda x: x + 0.05, reference.init(jax.random.key(0), codes))
    np.testing.assert_array_equal(
        given.apply(params, codes, train=True, rngs=rngs), reference.apply(params, codes, train=True, rngs=rngs)
    )
    assert len(called) == calls


@pytest.mark.parametrize('attend', [attention.attend, kernel.attend])  # cuDNN does not take float32
def test_large_maps_attend_head_by_head(monkeypatch, attend):
    module = CausalAttention(2, ORDERS['raster'], 0.0, 'keys', jnp.float32, attend)
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 8))
    params = jax.tree.map(lambda p: p + 0.1, module.init(jax.random.key(1), x))

    def output_and_gradients(params):
        return jax.value_and_grad(lambda params: jnp.sum(jnp.sin(module.apply(params, x))))(params)

    expected = output_and_gradients(params)
    monkeypatch.setattr(attention, '_MANY_POSITIONS', 15)
    assert 'f32[3,2,16,16]' not in str(jax.make_jaxpr(output_and_gradients)(params))  # logits of both heads
    for a, b in zip(*map(jax.tree.leaves, (output_and_gradients(params), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', ['keys', 'logits'])
@pytest.mark.parametrize('many', [15, 16])
def test_dropout_differs_by_head_and_example(monkeypatch, many, kind):
    """Queries and keys are zeros and values one-hot positions, so the output shows the weights of every head."""
    monkeypatch.setattr(attention, '_MANY_POSITIONS', many)
    heads, order = 4, ORDERS['raster']
    module = CausalAttention(heads, order, 0.5, kind, jnp.float32)
    x = jnp.tile(jnp.eye(16), heads).reshape(1, 4, 4, -1).repeat(8, axis=0)  # [8, 4, 4, 64]
    params = jax.tree.map(jnp.zeros_like, module.init(jax.random.key(1), x))
    for name in ('value', 'out'):
        params['params'][name]['kernel'] = jnp.eye(16 * heads)
    params = flax.traverse_util.path_aware_map(lambda path, p: p + 1 if path[-1] == 'scale' else p, params)
    output = module.apply(params, x, train=True, rngs={'dropout': jax.random.key(2)})
    weights = output.reshape(8, 16, heads, 16) / jnp.max(output[:, 0, 0])  # a query at the first position sees itself
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    assert not np.any(weights * (1 - np.tri(16))[:, None])  # causal
    if kind == 'logits':  # all logits are 0, dropped or not
        np.testing.assert_allclose(weights[:, 15], 1 / 16, rtol=1e-5)
        return
    kept = np.asarray(weights[:, 15, :, :15] > 0)  # [8, heads, keys]
    assert 0.4 < kept.mean() < 0.6 and len({row.tobytes() for row in kept.reshape(-1, 15)}) == 8 * heads


def test_elu_and_its_gradient():
    x = jnp.array([-100.0, -3.0, -1e-3, -0.0, 0.0, 1e-3, 3.0, 100.0])
    np.testing.assert_array_equal(elu(x), nn.elu(x))
    slope, expected = (jax.grad(lambda x, f=f: jnp.sum(f(x)))(x) for f in (elu, nn.elu))
    np.testing.assert_allclose(slope, expected, rtol=1e-6)
    assert elu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('rate', [0.0, 0.3])
def test_dropout_is_that_of_flax(rate, train):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(rate, deterministic=not train)(x)

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Dropout(rate)(x, train=train)

    x = jax.random.normal(jax.random.key(0), (50, 7))
    found, expected = (m.apply({}, x, rngs={'dropout': jax.random.key(1)}) for m in (Own(), Plain()))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
