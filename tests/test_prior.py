"""The prior: strictly causal, no blind spot, a normalised distribution, conditioned on what it is given."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import defaults
from vqvae2_jax.models import prior as prior_module
from vqvae2_jax.models.attention import CausalAttention
from vqvae2_jax.models.gated_resnet import GatedBlock
from vqvae2_jax.models.order import GenerationOrder
from vqvae2_jax.models.rms_norm import RMSNorm
from vqvae2_jax.tasks.prior import make_task

CASES = {
    'convolutions': {'shape': (5, 4)},
    'attention': {'shape': (4, 5), 'num_attention_layers': 1, 'num_heads': 2, 'num_output_blocks': 1},
    'rest': {'shape': (4, 4), 'num_residual_blocks': 5, 'num_attention_layers': 3, 'num_heads': 2},
    'deep kernel 5': {
        'shape': (4, 4),
        'num_residual_blocks': 3,
        'kernel_size': 5,
        'num_attention_layers': 3,
        'num_heads': 2,
    },
    'classes': {'shape': (4, 4), 'num_classes': 3},
    'coarser level': {'shape': (4, 6), 'coarser_codebook_sizes': (5,), 'num_cond_blocks': 1, 'num_classes': 3},
    'two coarser levels': {'shape': (4, 4), 'coarser_codebook_sizes': (5, 5), 'num_cond_blocks': 1},
    'wavefront': {'shape': (5, 4), 'skew': 2},
    'skew 1': {'shape': (4, 5), 'skew': 1, 'kernel_size': 5},
    'skew 3, attention': {
        'shape': (4, 6),
        'skew': 3,
        'kernel_size': 5,
        'num_attention_layers': 1,
        'num_heads': 2,
        'num_output_blocks': 1,
    },
    'skew 2, coarser level': {
        'shape': (6, 4),
        'skew': 2,
        'coarser_codebook_sizes': (5,),
        'num_cond_blocks': 1,
        'num_classes': 3,
    },
}


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_norm_is_that_of_flax(dtype):
    x = (3 * jax.random.normal(jax.random.key(0), (2, 5, 64))).astype(dtype)
    scale = {'params': {'scale': jnp.linspace(0.5, 2, 64)}}
    ours, theirs = RMSNorm(dtype), nn.RMSNorm(dtype=dtype)
    shapes = [jax.tree.map(jnp.shape, norm.init(jax.random.key(0), x)) for norm in (ours, theirs)]
    assert shapes[0] == shapes[1] == jax.tree.map(jnp.shape, scale)
    found, expected = ours.apply(scale, x), theirs.apply(scale, x)
    assert found.dtype == expected.dtype == dtype
    tolerance = 8 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=tolerance)
    assert np.abs(np.float32(expected)).max() > 2


def make_prior(case, seed=0, batch=2, **fields):
    """A small prior with every parameter moved off its start, so that no path is closed by a zero."""
    small = {'codebook_size': 6, 'hidden_channels': 8, 'residual_channels': 8, 'num_residual_blocks': 2}
    prior = defaults.make_prior(**{**small, 'kernel_size': 3, **CASES[case], **fields})
    keys = jax.random.split(jax.random.key(seed), 3)
    codes = jax.random.randint(keys[0], (batch, *prior.shape), 0, 6)
    labels = jnp.arange(batch) % 3 if prior.num_classes else None
    coarser = tuple(
        jax.random.randint(keys[1], (batch, prior.shape[0] // factor, prior.shape[1] // factor), 0, 5)
        for factor in (2, 4)[: len(prior.coarser_codebook_sizes)]
    )
    params = jax.jit(prior.init)(keys[2], codes, labels, coarser)['params']
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    params = tree.unflatten([x + 0.2 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])
    return prior, params, codes, labels, coarser


@pytest.mark.parametrize('case', CASES)
def test_no_position_sees_its_own_or_a_later_step(case):
    """By perturbation of every position: no logit of its own or an earlier step changes, and its neighbours' do."""
    prior, params, codes, labels, coarser = make_prior(case, batch=1)
    logits = jax.jit(lambda c: prior.apply({'params': params}, c, labels, coarser))
    reference = np.asarray(logits(codes)).reshape(-1, 6)
    positions, steps = reference.shape[0], prior.order.step_map().reshape(-1)
    for p in range(positions):
        changed = codes.reshape(-1).at[p].set((codes.reshape(-1)[p] + 1) % 6).reshape(codes.shape)
        difference = np.abs(np.asarray(logits(changed)).reshape(-1, 6) - reference).max(axis=-1)
        assert (difference[steps <= steps[p]] == 0).all(), f'{case}: position {p} is seen at or before its own step'
        width = prior.shape[1]
        neighbours = [p + 1] * ((p + 1) % width > 0) + [p + width] * (p + width < positions)  # right of it, below it
        assert all(difference[n] > 0 for n in neighbours), f'{case}: one of {neighbours} does not see {p}'


@pytest.mark.parametrize('case, fields', [('convolutions', {}), *(('wavefront', {'skew': n}) for n in (1, 2, 3))])
def test_no_blind_spot(case, fields):
    """Deep enough, a position sees all of the earlier steps: in raster order those to the upper right, too."""
    prior, params, codes, labels, coarser = make_prior(case, batch=1, num_residual_blocks=6, **fields)
    height, width = prior.shape
    steps = prior.order.step_map()
    for position in ((height - 1, 0), (height // 2, width // 2), (1, width - 1)):
        logits = jax.jit(lambda c, p=position: prior.apply({'params': params}, c, labels, coarser)[0, p[0], p[1]])
        reference, seen = logits(codes), np.zeros(prior.shape, bool)
        for row, column in itertools.product(range(height), range(width)):
            changed = codes.at[0, row, column].set((codes[0, row, column] + 1) % 6)
            seen[row, column] = np.abs(logits(changed) - reference).max() > 0
        np.testing.assert_array_equal(seen, steps < steps[position], err_msg=f'{case} {fields}: {position}')


def test_likelihood_sums_to_one_over_all_maps():
    """By enumeration of all 3^4 maps of 2x2 codes with K = 3."""
    fields = {'hidden_channels': 8, 'residual_channels': 8, 'num_residual_blocks': 2, 'kernel_size': 3, 'num_heads': 2}
    prior = defaults.make_prior(shape=(2, 2), codebook_size=3, num_attention_layers=1, **fields)
    maps = jnp.array(list(itertools.product(range(3), repeat=4))).reshape(-1, 2, 2)
    params = prior.init(jax.random.key(0), maps)['params']
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    task = make_task(prior, level=0, num_levels=1)
    batch = {'codes_0': maps, 'label': jnp.zeros(len(maps), jnp.int32)}
    nll = task.eval_step(params, {}, batch)['nll']  # mean nats per code
    np.testing.assert_allclose(np.exp(-4 * np.asarray(nll, np.float64)).sum(), 1.0, rtol=1e-4)
    assert np.ptp(np.asarray(nll)) > 0.01  # and it is not the uniform distribution


def test_class_and_every_coarser_level_matter():
    prior, params, codes, labels, coarser = make_prior('coarser level')
    reference = defaults.apply(prior, {'params': params}, codes, labels, coarser)
    other_class = defaults.apply(prior, {'params': params}, codes, (labels + 1) % 3, coarser)
    assert np.abs(other_class - reference).max() > 1e-3
    prior, params, codes, labels, coarser = make_prior('two coarser levels')
    reference = defaults.apply(prior, {'params': params}, codes, labels, coarser)
    for level, size in enumerate((2, 4)):  # a coarse code covers size * size fine ones
        changed = list(coarser)
        changed[level] = coarser[level].at[:, 0, 0].set((coarser[level][:, 0, 0] + 1) % 5)
        logits = defaults.apply(prior, {'params': params}, codes, labels, tuple(changed))
        assert np.abs(logits - reference).max(axis=(0, 3))[:size, :size].min() > 0, level


@pytest.mark.parametrize('sizes', [((3, 5), (2, 2)), ((7, 4), (3, 9)), ((2, 3), (4, 6)), ((5, 8), (10, 7))])
def test_a_position_sees_the_coarse_position_below_it_at_any_ratio(sizes):
    """Maps of any size, also larger ones, give the condition of the maps that a loop resizes to this level's size."""
    prior, params, _, _, _ = make_prior('two coarser levels', shape=(5, 8))
    keys = jax.random.split(jax.random.key(1))
    coarser = tuple(jax.random.randint(key, (2, *size), 0, 5) for key, size in zip(keys, sizes, strict=True))
    resized = [np.zeros((2, 5, 8), np.int32) for _ in coarser]
    for codes, full in zip(coarser, resized, strict=True):
        for i, j in itertools.product(range(5), range(8)):
            row, column = math.floor(i * codes.shape[1] / 5), math.floor(j * codes.shape[2] / 8)
            full[:, i, j] = codes[:, row, column]
    condition = jax.jit(lambda coarser: prior.apply({'params': params}, None, coarser, method='condition'))
    np.testing.assert_array_equal(condition(coarser), condition(tuple(resized)))


def test_integer_ratios_are_repetitions():
    """Of values and of gradients, bit by bit: the programs are those of `jnp.repeat`."""
    x, weights = (jax.random.normal(jax.random.key(i), (2, 4 * s, 6 * s, 5)) for i, s in enumerate((1, 3)))

    def repeat(x):
        return jnp.repeat(jnp.repeat(x, 3, 1), 3, 2)

    for function in (lambda resize: resize(x), lambda resize: jax.grad(lambda x: jnp.sum(resize(x) * weights))(x)):
        np.testing.assert_array_equal(function(lambda x: prior_module._resize(x, (12, 18))), function(repeat))


def test_conditions_that_are_missing_are_refused():
    prior, params, codes, labels, coarser = make_prior('coarser level')
    with pytest.raises(ValueError, match='3 classes'):
        defaults.apply(prior, {'params': params}, codes, None, coarser)
    with pytest.raises(ValueError, match='1 coarser levels, not 0'):
        defaults.apply(prior, {'params': params}, codes, labels, ())


@pytest.mark.parametrize('placement', ['inside', 'after'])
@pytest.mark.parametrize('kind', ['keys', 'logits'])
def test_dropout_acts_in_training_only(placement, kind):
    fields = dict(dropout_placement=placement, attention_dropout_kind=kind)
    prior, params, codes, labels, coarser = make_prior('attention', dropout=0.5, attention_dropout=0.5, **fields)
    plain = defaults.apply(prior, {'params': params}, codes)
    np.testing.assert_array_equal(plain, defaults.apply(make_prior('attention')[0], {'params': params}, codes))
    one, two = (
        defaults.apply(prior, {'params': params}, codes, train=True, rngs={'dropout': jax.random.key(i)})
        for i in range(2)
    )
    assert np.abs(one - two).max() > 1e-3 and np.isfinite(one).all()


@pytest.mark.parametrize('placement', ['inside', 'after'])
def test_dropout_is_inside_of_a_block_or_on_its_output(placement):
    block = GatedBlock(4, nn.Dense, dropout=0.5, dropout_placement=placement, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 6))
    variables = jax.tree.map(jnp.zeros_like, block.init(jax.random.key(1), x))  # the branch adds nothing
    dropped = block.apply(variables, x, train=True, rngs={'dropout': jax.random.key(2)})
    if placement == 'inside':
        np.testing.assert_array_equal(dropped, x)
    else:
        assert 0.4 < (dropped == 0).mean() < 0.6
        np.testing.assert_allclose(dropped[dropped != 0], 2 * x[dropped != 0], rtol=1e-6)


def make_attention(**fields):
    return CausalAttention(num_heads=1, order=GenerationOrder.raster((2, 3)), dtype=jnp.float32, **fields)


def test_dropped_keys_are_unseen_and_never_empty_a_row():
    attention = make_attention(dropout=0.9, dropout_kind='keys')
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 4))
    variables = attention.init(jax.random.key(1), x)
    variables = jax.tree.map(lambda v: v + 0.5, variables)
    out = [attention.apply(variables, x, train=True, rngs={'dropout': jax.random.key(i)}) for i in range(3)]
    assert np.isfinite(np.stack(out)).all() and np.abs(out[0] - out[1]).max() > 0
    # The first position has only itself, which is never dropped; an empty row would let it see all the others.
    whole = attention.apply(variables, x)
    np.testing.assert_allclose(out[0][0, 0, 0], whole[0, 0, 0], rtol=1e-5)


@pytest.mark.parametrize('kind', ['keys', 'logits'])
def test_weights_under_both_kinds_of_attention_dropout(kind):
    attention = make_attention(dropout=0.5, dropout_kind=kind)
    logits, visible = jax.random.normal(jax.random.key(0), (1, 1, 6, 6)), jnp.tril(jnp.ones((6, 6), bool))

    def weights(module):
        dropped, seen = module._drop(module.make_rng('dropout'), logits, visible)
        return nn.softmax(jnp.where(seen, dropped, -jnp.inf)), dropped

    found, dropped = nn.apply(weights, attention)({}, rngs={'dropout': jax.random.key(1)})
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-6)
    assert (found[0, 0][~np.asarray(visible)] == 0).all()  # causal either way
    inside = np.asarray(found[0, 0])[np.asarray(visible)]
    if kind == 'logits':  # a dropped logit is 0, and its key is still seen
        assert (inside > 0).all()
        zero = np.asarray(dropped == 0)
        assert 0.2 < zero.mean() < 0.8
        np.testing.assert_allclose(dropped[~zero], 2 * logits[~zero], rtol=1e-6)
    else:
        assert (inside == 0).any() and (np.diagonal(found[0, 0]) > 0).all()


def test_bfloat16_is_close_and_gives_float32_logits():
    prior, params, codes, labels, coarser = make_prior('attention')
    half = prior.clone(dtype=jnp.bfloat16)
    logits = defaults.apply(half, {'params': params}, codes)
    assert logits.dtype == jnp.float32
    reference = defaults.apply(prior, {'params': params}, codes)
    assert 0 < np.abs(logits - reference).max() < 0.1 * np.abs(reference).max()


def test_even_kernels_and_too_much_attention_are_refused():
    cases = (
        ({'kernel_size': 4}, 'kernel_size is 4; it must be odd'),
        ({'num_attention_layers': 3}, 'at most .*blocks=2'),
    )
    for fields, message in cases:
        with pytest.raises(ValueError, match=message):
            make_prior('convolutions', **fields)


@pytest.mark.parametrize(
    'field, wanted', [('dropout_placement', 'inside, after'), ('attention_dropout_kind', 'keys, logits')]
)
def test_other_kinds_of_dropout_are_refused(field, wanted):
    with pytest.raises(ValueError, match=f"{field} is 'none'; it must be one of {wanted}"):
        make_prior('convolutions', **{field: 'none'})
