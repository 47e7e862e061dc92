"""The hierarchical VQ-VAE: wiring of the levels, shapes, gradients, overfitting."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import defaults
from vqvae2_jax.models.residual import relu
from vqvae2_jax.models.vqvae import map_shapes
from vqvae2_jax.tasks.vqvae import make_task
from vqvae2_jax.training import optim, state

SMALL = {
    'channels': 3,
    'hidden_channels': 8,
    'residual_channels': 4,
    'num_residual_blocks': 1,
    'codebook_size': 16,
    'codebook_dim': 6,
}


def _model(factors=(2, 2), size=(8, 12), batch=2, **fields):
    model = defaults.make_vqvae(downsample_factors=factors, **SMALL | fields)
    image = jax.random.uniform(jax.random.key(1), (batch, *size, 3), minval=-1)
    variables = jax.jit(model.init)({'params': jax.random.key(2), 'restart': jax.random.key(3)}, image)
    return model, variables, image


@pytest.mark.parametrize(
    'factors, size',
    [
        ((4,), (8, 8)),
        ((2, 2), (8, 12)),
        ((4, 2), (16, 24)),
        ((2, 4), (8, 16)),
        ((2, 2, 2), (16, 8)),
        ((8, 2, 2), (32, 64)),
    ],
)
def test_any_levels_and_non_square_images(factors, size):
    model, variables, image = _model(factors, size)
    output = jax.eval_shape(model.apply, variables, image)
    assert output.image.shape == image.shape
    assert [c.shape[1:] for c in output.codes] == list(map_shapes(size, factors))
    assert len(output.previews) == len(factors) - 1 and all(p.shape == image.shape for p in output.previews)


def test_sizes_that_do_not_divide_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r'data.image_size is 28x30 and must be divisible by 8'):
        map_shapes((28, 30), (2, 4))
    with pytest.raises(ValueError, match='3 is not a power of two'):
        map_shapes((27, 27), (3,))


def test_decoding_the_codes_is_the_reconstruction():
    model, variables, image = _model((2, 2, 2), (8, 8))
    output = defaults.apply(model, variables, image)
    codes = defaults.apply(model, variables, image, method='encode')
    jax.tree.map(np.testing.assert_array_equal, codes, output.codes)
    np.testing.assert_allclose(defaults.apply(model, variables, codes, method='decode'), output.image, atol=1e-5)
    for level in (1, 2):
        preview = defaults.apply(model, variables, codes[level:], level=level, method='decode')
        np.testing.assert_allclose(preview, output.previews[level - 1], atol=1e-5)
    with pytest.raises(ValueError, match='decoding from level 1 needs the codes of 2 levels, not 3'):
        defaults.apply(model, variables, codes, level=1, method='decode')
    for level, some in ((3, ()), (-1, (*codes, codes[-1]))):
        with pytest.raises(ValueError, match=f'level is {level}; it must be from 0 to 2'):
            defaults.apply(model, variables, some, level=level, method='decode')


def test_the_image_depends_on_every_level_and_a_preview_on_the_coarser_ones_only():
    model, variables, image = _model((2, 2, 2), (8, 8))
    codes = list(defaults.apply(model, variables, image, method='encode'))
    reference = defaults.apply(model, variables, tuple(codes), method='decode')
    for level in range(3):
        changed = list(codes)
        changed[level] = (codes[level] + 1) % 16
        assert not np.allclose(defaults.apply(model, variables, tuple(changed), method='decode'), reference)
        coarser = tuple(changed[1:]), tuple(codes[1:])
        preview, same = (defaults.apply(model, variables, c, level=1, method='decode') for c in coarser)
        assert np.allclose(preview, same) == (level == 0)


def test_finer_codes_see_the_decoded_coarser_ones():
    """Algorithm 1: change the top codebook's vectors alone, and the bottom codes change."""
    model, variables, image = _model()
    before = defaults.apply(model, variables, image).codes[0]
    book = variables['codebook']['quantizers_1']
    moved = {**variables['codebook'], 'quantizers_1': {**book, 'embedding': 50 * book['embedding'][::-1]}}
    after = defaults.apply(model, {**variables, 'codebook': moved}, image).codes[0]
    assert (before != after).any()


def _gradients(preview_grad_scale):
    model, variables, image = _model(preview_grad_scale=preview_grad_scale)
    task = make_task(model, ('bottom', 'top'), 0.25, 10)
    batch = {'image': jnp.round((image + 1) * 127.5).astype(jnp.uint8)}
    rest = {'codebook': variables['codebook']}
    return jax.jit(jax.grad(lambda p: task.loss(p, rest, batch, jax.random.key(0))[0]))(variables['params'])


def test_straight_through_gradient_reaches_every_parameter():
    for path, leaf in jax.tree_util.tree_leaves_with_path(_gradients(0.0)):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_previews_leave_the_paper_model_alone_unless_asked():
    def main_gradient(preview_grad_scale, drop_preview):
        model, variables, image = _model(preview_grad_scale=preview_grad_scale)

        def loss(params):
            output = model.apply({**variables, 'params': params}, image)
            preview = 0.0 if drop_preview else sum(jnp.mean((p - image) ** 2) for p in output.previews)
            return jnp.mean((output.image - image) ** 2) + preview

        gradient = jax.jit(jax.grad(loss))(variables['params'])
        return {k: v for k, v in gradient.items() if not k.startswith('previewers')}

    alone = main_gradient(0.0, drop_preview=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), main_gradient(0.0, False), alone)
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), main_gradient(1.0, False), alone)
    assert max(jax.tree.leaves(difference)) > 1e-4


def test_task_counts_only_codes_that_were_chosen_as_used_and_clips_as_evaluation_does():
    model, variables, image = _model()
    task = make_task(model, ('bottom', 'top'), 0.25, steps_per_epoch=10)
    batch, codebook = {'image': jnp.round((image + 1) * 127.5).astype(jnp.uint8)}, {'codebook': variables['codebook']}
    params = jax.tree.map(lambda x: 3 * x, variables['params'])  # images that leave [-1, 1]
    _, (after, metrics) = jax.jit(task.loss)(params, codebook, batch, jax.random.key(0))
    output = defaults.apply(model, {'params': params, **codebook}, batch['image'] / 127.5 - 1)
    for name, codes in zip(('bottom', 'top'), output.codes, strict=True):
        assert metrics[f'used_{name}'] == len(np.unique(codes)) / 16 < 1
    assert np.abs(output.image).max() > 1
    values = jax.jit(task.eval_step)(params, codebook, batch)
    assert metrics['mse'] == pytest.approx(float(np.mean(values['mse'])), rel=1e-5)
    assert metrics['loss'] > metrics['mse'] + np.mean((output.image - jnp.clip(output.image, -1, 1)) ** 2)


def test_bfloat16_computes_close_to_float32_and_quantizes_in_float32():
    model, variables, image = _model()
    half = defaults.make_vqvae(downsample_factors=(2, 2), dtype=jnp.bfloat16, **SMALL)
    output = defaults.apply(half, variables, image)
    assert output.image.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables['params']))
    error = jnp.sqrt(jnp.mean((output.image - defaults.apply(model, variables, image).image) ** 2))
    assert 0 < error < 0.1
    _, after = defaults.apply(
        half, variables, image, train=True, mutable=['codebook'], rngs={'restart': jax.random.key(0)}
    )
    assert after['codebook']['quantizers_0']['embedding'].dtype == jnp.float32


def test_task_summary_counts_codes_and_psnr():
    model, variables, image = _model()
    task = make_task(model, ('bottom', 'top'), 0.25, 10)
    batch = {'image': jnp.round((image + 1) * 127.5).astype(jnp.uint8)}
    values = jax.jit(task.eval_step)(variables['params'], {'codebook': variables['codebook']}, batch)
    summary = task.reduce_metrics({k: np.asarray(v, np.float64).mean(0) for k, v in values.items()})
    codes = defaults.apply(model, variables, batch['image'] / 127.5 - 1, method='encode')
    for name, level_codes in zip(('bottom', 'top'), codes, strict=True):
        assert summary[f'used_{name}'] == len(np.unique(level_codes)) / 16
    assert summary['psnr'] == pytest.approx(10 * np.log10(4 / summary['mse']))
    assert task.image_labels == ('original', 'top only', 'all levels')
    original, _, both = jax.jit(task.visualize)(variables['params'], {'codebook': variables['codebook']}, batch)
    np.testing.assert_allclose(original, batch['image'] / 127.5 - 1, atol=1e-6)
    error = np.mean((np.clip(both, -1, 1) - original) ** 2)
    assert error == pytest.approx(summary['mse'], rel=1e-5)


@pytest.mark.slow
def test_overfits_eight_images():
    model, variables, image = _model(
        (2, 2), (16, 16), batch=8, hidden_channels=32, residual_channels=16, codebook_size=64, codebook_dim=16
    )
    task = make_task(model, ('bottom', 'top'), 0.25, 10)
    training = defaults.train_config(steps=300, batch_size=8, learning_rate=3e-3)
    optimizer = optim.make_optimizer(training)
    # Smooth images, as photographs are: noise has no structure to find.
    smooth = jax.image.resize(image[:, ::4, ::4], image.shape, 'linear')
    batch = {'image': jnp.round((smooth + 1) * 127.5).astype(jnp.uint8)}
    current = state.create(*task.init(jax.random.key(0), batch), jax.random.key(1), optimizer)

    @jax.jit
    def step(current):
        key = jax.random.fold_in(current.key, current.step)
        (_, (rest, metrics)), gradients = jax.value_and_grad(task.loss, has_aux=True)(
            current.params, current.model_state, batch, key
        )
        return state.update(current, gradients, rest, optimizer, 0.9), metrics

    first = None
    for _ in range(300):
        current, metrics = step(current)
        first = first or float(metrics['mse'])
    assert float(metrics['mse']) < 0.01 < first
    assert np.isfinite(float(optax.tree.norm(current.params)))


def test_relu_and_its_gradient_are_those_of_flax():
    x = jnp.array([-2.0, -0.0, 0.0, 1e-30, 3.0, jnp.inf])
    for function in (lambda f: f(x), lambda f: jax.grad(lambda x: jnp.sum(f(x) * jnp.arange(6)))(x)):
        np.testing.assert_array_equal(function(relu), function(nn.relu))
