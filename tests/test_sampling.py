"""The cached sampler against its slow definition, and the inputs that a sample depends on."""

import collections
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from tests import defaults
from tests.test_prior import CASES, make_prior
from vqvae2_jax.distributed import sharding
from vqvae2_jax.models import attention
from vqvae2_jax.sampling import ancestral
from vqvae2_jax.sampling.ancestral import sample_keys, sample_level, sample_levels
from vqvae2_jax.sampling.params import SamplingParams, sample_codes
from vqvae2_jax.sampling.reference import sample_reference
from vqvae2_jax.sampling.rejection import select_top_per_class


@pytest.mark.parametrize('case', CASES)
def test_cached_sampling_draws_the_same_codes_as_rerunning_the_network(case):
    prior, params, _, labels, coarser = make_prior(case, batch=3)
    keys = sample_keys(jax.random.key(7), jnp.arange(3))
    fast = jax.jit(lambda: sample_level(prior, params, keys, labels, coarser, SamplingParams(1.3)))()
    slow = jax.jit(lambda: sample_reference(prior, params, keys, labels, coarser, SamplingParams(1.3)))()
    np.testing.assert_array_equal(fast.codes, slow.codes)
    np.testing.assert_allclose(fast.log_probs, slow.log_probs, atol=1e-4)
    assert len(np.unique(fast.codes)) > 2


@pytest.mark.parametrize('case', ['wavefront', 'skew 3, attention', 'guidance of a wavefront'])
def test_phases_of_fewer_positions_draw_the_same(case, monkeypatch):
    monkeypatch.setattr(ancestral, '_ROWS_WORTH_PHASES', 0)
    guided = case.startswith('guidance')
    fields = {'skew': 1, 'label_dropout': 0.1} if guided else {}
    prior, params, _, labels, coarser = make_prior('classes' if guided else case, batch=2, **fields)
    assert len(prior.order.phases(split=True)) == 3
    arguments = sample_keys(jax.random.key(7), jnp.arange(2)), labels, coarser
    arguments += (SamplingParams(1.3, guidance=2.0 if guided else None),)
    jaxpr = jax.make_jaxpr(lambda: sample_level(prior, params, *arguments))()
    assert sum(equation.primitive.name == 'scan' for equation in jaxpr.eqns) == 3
    fast = jax.jit(lambda: sample_level(prior, params, *arguments))()
    slow = jax.jit(lambda: sample_reference(prior, params, *arguments))()
    np.testing.assert_array_equal(fast.codes, slow.codes)
    np.testing.assert_allclose(fast.log_probs, slow.log_probs, atol=1e-4)


def test_projections_that_are_too_large_are_made_in_every_step(monkeypatch):
    prior, params, _, labels, coarser = make_prior('skew 2, coarser level', batch=2)
    keys = sample_keys(jax.random.key(7), jnp.arange(2))

    def products_in_loop():
        jaxpr = jax.make_jaxpr(lambda: sample_level(prior, params, keys, labels, coarser).codes)()
        return str(next(e for e in jaxpr.eqns if e.primitive.name == 'scan').params['jaxpr']).count('dot_general')

    once = products_in_loop(), jax.jit(lambda: sample_level(prior, params, keys, labels, coarser))()
    monkeypatch.setattr(ancestral, '_MAX_PROJECTIONS', 0)
    every = products_in_loop(), jax.jit(lambda: sample_level(prior, params, keys, labels, coarser))()
    assert every[0] == once[0] + prior.num_residual_blocks
    np.testing.assert_array_equal(once[1].codes, every[1].codes)
    np.testing.assert_allclose(once[1].log_probs, every[1].log_probs, atol=1e-5)


def test_a_cache_of_many_keys_is_padded_and_draws_the_same(monkeypatch):
    prior, params, _, labels, coarser = make_prior('skew 3, attention', batch=2)
    keys = sample_keys(jax.random.key(7), jnp.arange(2))
    plain = jax.jit(lambda: sample_level(prior, params, keys, labels, coarser))()
    monkeypatch.setattr(attention, '_MANY_KEYS', 8)
    monkeypatch.setattr(attention, '_KEYS_MULTIPLE', 32)
    lowered = jax.jit(lambda: sample_level(prior, params, keys, labels, coarser)).lower()
    assert '2x32x2x4xf32' in lowered.as_text() and '2x30x2x4xf32' not in lowered.as_text()
    np.testing.assert_array_equal(lowered.compile()().codes, plain.codes)


@pytest.mark.system
@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_any_order_shape_kernel_and_depth_is_exact(data):
    height, width = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 6))
    fields = {
        'shape': (height, width),
        'kernel_size': data.draw(st.sampled_from([3, 5, 7])),
        'num_residual_blocks': data.draw(st.integers(1, 3)),
        'num_attention_layers': data.draw(st.integers(0, 1)),
        'num_heads': 2,
    }
    if data.draw(st.booleans()):
        fields['skew'] = data.draw(st.integers(1, width))
    prior, params, _, labels, _ = make_prior('classes', seed=height * 7 + width, batch=2, **fields)
    keys = sample_keys(jax.random.key(1), jnp.arange(2))
    with mock.patch.object(ancestral, '_ROWS_WORTH_PHASES', data.draw(st.sampled_from([0, 256]))):
        fast = jax.jit(lambda: sample_level(prior, params, keys, labels))()
    slow = jax.jit(lambda: sample_reference(prior, params, keys, labels))()
    np.testing.assert_array_equal(fast.codes, slow.codes, err_msg=str(fields))
    np.testing.assert_allclose(fast.log_probs, slow.log_probs, atol=1e-4)


def test_a_map_of_one_row_is_conditioned_on_a_coarser_one():
    fields = {'shape': (1, 4), 'skew': 2, 'coarser_codebook_sizes': (5,), 'codebook_size': 6, 'hidden_channels': 8}
    prior = defaults.make_prior(**fields, residual_channels=8, num_residual_blocks=2, kernel_size=3)
    keys, coarser = sample_keys(jax.random.key(1), jnp.arange(2)), (jnp.array([[[0, 3]], [[4, 1]]]),)
    params = prior.init(jax.random.key(0), jnp.zeros((2, 1, 4), jnp.int32), None, coarser)['params']
    fast, slow = (draws(prior, params, keys, None, coarser).codes for draws in (sample_level, sample_reference))
    np.testing.assert_array_equal(fast, slow)


@pytest.mark.parametrize('case', ['coarser level', 'skew 3, attention'])
def test_log_probs_are_those_of_the_whole_network_on_the_finished_map(case):
    prior, params, _, labels, coarser = make_prior(case, batch=2)
    keys = sample_keys(jax.random.key(5), jnp.arange(2))
    sampled = jax.jit(lambda: sample_level(prior, params, keys, labels, coarser, SamplingParams(0.7, top_k=3)))()
    whole = jax.nn.log_softmax(defaults.apply(prior, {'params': params}, sampled.codes, labels, coarser))
    expected = jnp.take_along_axis(whole, sampled.codes[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(sampled.log_probs, expected, atol=1e-4)


@pytest.mark.parametrize('case', ['attention', 'skew 3, attention'])
def test_in_bfloat16_log_probs_are_nearly_those_of_the_whole_network(case):
    prior, params, *_ = make_prior(case, batch=4)
    prior = prior.clone(dtype=jnp.bfloat16)
    keys = sample_keys(jax.random.key(5), jnp.arange(4))
    sampled = jax.jit(lambda: sample_level(prior, params, keys))()
    whole = jax.nn.log_softmax(defaults.apply(prior, {'params': params}, sampled.codes))
    expected = jnp.take_along_axis(whole, sampled.codes[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(sampled.log_probs, expected, atol=0.1)


@pytest.mark.parametrize('case', ['attention', 'skew 3, attention'])
def test_kept_codes_stay_and_the_rest_is_drawn_given_the_earlier_ones(case):
    prior, params, codes, labels, coarser = make_prior(case, batch=2)
    keys = sample_keys(jax.random.key(5), jnp.arange(2))
    keep = jax.random.bernoulli(jax.random.key(6), 0.5, codes.shape)
    run = jax.jit(lambda known: sample_level(prior, params, keys, labels, coarser, known_codes=known).codes)
    completed = run(jnp.where(keep, codes, -1))
    assert (completed[keep] == codes[keep]).all() and (completed[~keep] != codes[~keep]).any()
    slow = jax.jit(lambda known: sample_reference(prior, params, keys, labels, coarser, known_codes=known).codes)
    np.testing.assert_array_equal(completed, slow(jnp.where(keep, codes, -1)))
    np.testing.assert_array_equal(
        run(jnp.full_like(codes, -1)), sample_level(prior, params, keys, labels, coarser).codes
    )


def poisoned(cache, written):
    """Keys beyond the `written` first are NaN, values there a number that would drown all others."""

    def poison(path, held):
        later = (jnp.arange(held.shape[1]) >= written)[:, None, None]
        return jnp.where(later, jnp.nan if path[-1].key == 'keys' else 1e30, held)

    return {**cache, 'attention': jax.tree_util.tree_map_with_path(poison, cache['attention'])}


def test_what_a_cache_holds_of_later_steps_is_never_read():
    prior, params, codes, labels, coarser = make_prior('skew 3, attention')
    order = prior.order

    def run(poison):
        cache, logits = {}, []
        previous = jnp.zeros((2, order.max_positions_per_step), jnp.int32)
        for step in range(order.num_steps):
            arguments = (previous, jnp.int32(step), None)
            out, cache = prior.apply(
                {'params': params, **cache}, *arguments, method='decode_step', mutable=['diagonals', 'attention']
            )
            rows, columns, inside = order.positions(step)
            previous = codes[:, rows, columns]
            logits.append(jnp.where(inside[:, None], out, 0))
            if poison:
                cache = poisoned(cache, (step + 1) * order.max_positions_per_step)
        return np.stack(logits)

    clean = run(poison=False)
    np.testing.assert_array_equal(run(poison=True), clean)
    whole = np.asarray(defaults.apply(prior, {'params': params}, codes, labels, coarser))
    steps, indices = order.step_map(), order.index_in_step_map()
    np.testing.assert_allclose(np.moveaxis(clean[steps, :, indices], 2, 0), whole, atol=1e-4)


@pytest.mark.parametrize('case', ['classes', 'wavefront'])
def test_eight_devices_draw_what_one_draws(case):
    prior, params, *_ = make_prior(case)
    index = jnp.arange(8)
    run = jax.jit(lambda i: sample_level(prior, params, sample_keys(jax.random.key(2), i), i % 3).codes)
    alone = run(jax.device_put(index, jax.devices()[0]))
    with jax.set_mesh(sharding.make_mesh()):
        spread = run(jax.device_put(index, sharding.batch_sharding()))
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_array_equal(alone, spread)


@pytest.mark.parametrize('case', ['attention', 'coarser level'])
def test_logits_with_caches_equal_the_whole_network(case):
    """Stronger than equal codes: row by row and position by position, the logits agree to rounding, poison or not."""
    prior, params, codes, labels, coarser = make_prior(case)
    whole = defaults.apply(prior, {'params': params}, codes, labels, coarser)
    condition = defaults.apply(prior, {'params': params}, labels, coarser, method='condition')
    rows, attention = {}, {}
    above = jnp.full((2, prior.shape[1]), prior.codebook_size)
    for i in range(prior.shape[0]):
        part = condition if condition is None or condition.shape[1] == 1 else condition[:, i : i + 1]
        variables = {'params': params, **rows}
        first, made = prior.apply(
            variables, above, jnp.int32(i), part, method='decode_row', mutable=['rows', 'projections']
        )
        left, cache = jnp.full((2, 1), prior.codebook_size), attention
        for j in range(prior.shape[1]):
            first_here, projections = jax.tree.map(
                lambda f, j=j: f if f.shape[2] == 1 else f[:, :, j : j + 1], (first, made['projections'])
            )
            variables = {'params': params, 'projections': projections, **cache}
            arguments = left, jnp.int32(i * prior.shape[1] + j), first_here
            logits, cache = prior.apply(
                variables, *arguments, method='decode_position', mutable=['columns', 'attention']
            )
            np.testing.assert_allclose(logits[:, 0], whole[:, i, j], atol=1e-4)
            left = codes[:, i, j : j + 1]
            if 'attention' in cache:
                cache = poisoned(cache, i * prior.shape[1] + j + 1)
        attention = {k: v for k, v in cache.items() if k == 'attention'}
        rows, above = {'rows': made['rows']}, codes[:, i]


@pytest.mark.parametrize('case', ['attention', 'coarser level'])
def test_a_single_sample_is_computed_twice_on_gpus_with_the_same_result(case, monkeypatch):
    prior, params, _, labels, coarser = make_prior(case, batch=1)

    def run():
        return jax.jit(
            lambda: sample_level(prior, params, sample_keys(jax.random.key(7), jnp.arange(1)), labels, coarser)
        )()

    def on_a_gpu(*arguments, default, cuda=None, cpu=None):
        return (cuda or default)(*arguments)

    once = run()
    monkeypatch.setattr(jax.lax, 'platform_dependent', on_a_gpu)
    twice = run()
    assert twice.codes.shape == (1, *prior.shape)
    np.testing.assert_array_equal(once.codes, twice.codes)
    np.testing.assert_allclose(once.log_probs, twice.log_probs, atol=1e-5)


def products_by_loop_depth(jaxpr, depth=0):
    """{depth: number of matrix products and convolutions}, of code whose results are used, of one branch of several."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, list(jaxprs_in_params(equation.params))
        found[depth] += name in ('dot_general', 'conv_general_dilated')
        for part in inner[:1] if name == 'cond' else inner:
            found += products_by_loop_depth(part, depth + (name == 'scan'))
    return found


@pytest.mark.parametrize('case, depth', [('attention', 2), ('coarser level', 2), ('skew 3, attention', 1)])
def test_projections_of_what_a_step_does_not_change_are_not_in_its_loop(case, depth):
    """Two convolutions a block, six products of an attention layer, the first convolution, and the logits."""
    prior, params, _, labels, coarser = make_prior(case, num_classes=3)
    labels, keys = jnp.arange(2), sample_keys(jax.random.key(7), jnp.arange(2))
    jaxpr = jax.make_jaxpr(lambda: sample_level(prior, params, keys, labels, coarser).codes)().jaxpr
    used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]
    blocks = prior.num_residual_blocks + prior.num_output_blocks
    assert products_by_loop_depth(used)[depth] == 2 * blocks + 6 * prior.num_attention_layers + 2


def test_sample_i_is_the_same_in_any_batch_and_order():
    prior, params, _, _, _ = make_prior('classes')
    key = jax.random.key(3)
    run = jax.jit(lambda index: sample_level(prior, params, sample_keys(key, index), index % 3).codes)
    together = run(jnp.arange(6))
    np.testing.assert_array_equal(run(jnp.array([4, 1]))[::-1], together[jnp.array([1, 4])])
    assert (np.asarray(together[0]) != np.asarray(together[3])).any()  # same class, another sample


def test_temperature_is_traced_and_zero_takes_the_likeliest():
    prior, params, _, _, _ = make_prior('convolutions')
    keys = sample_keys(jax.random.key(0), jnp.arange(4))
    traces = []

    @jax.jit
    def run(keys, temperature):
        traces.append(1)
        return sample_level(prior, params, keys, sampling_params=SamplingParams(temperature)).codes

    greedy, also_greedy = run(keys, 0.0), run(sample_keys(jax.random.key(1), jnp.arange(4)), 0.0)
    np.testing.assert_array_equal(greedy, also_greedy)
    assert (np.asarray(greedy) == np.asarray(greedy[0])).all()
    assert (np.asarray(run(keys, 2.0)) != np.asarray(greedy)).any()
    assert len(traces) == 1


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
    keys = sample_keys(jax.random.key(0), jnp.arange(20000))

    def sample_at(position, temperature):
        return sample_codes(keys, jnp.array([position]), jnp.tile(logits, (20000, 1, 1)), SamplingParams(temperature))[
            :, 0
        ]

    sampled = sample_at(5, 1.0)
    np.testing.assert_allclose(np.bincount(sampled, minlength=3) / 20000, [0.1, 0.2, 0.7], atol=0.015)
    warm = sample_at(5, 2.0)  # p^(1/2), normalised
    np.testing.assert_allclose(np.bincount(warm, minlength=3) / 20000, [0.198, 0.279, 0.523], atol=0.015)
    again = sample_at(6, 1.0)
    assert 0.4 < np.mean(np.asarray(sampled) == np.asarray(again)) < 0.68  # another position is another draw (0.54)


def test_samples_follow_the_prior():
    """The frequency of every first code agrees with the network's own probability of it."""
    prior, params, codes, _, _ = make_prior('convolutions', batch=1)
    probability = jax.nn.softmax(defaults.apply(prior, {'params': params}, codes)[0, 0, 0])
    keys = sample_keys(jax.random.key(0), jnp.arange(4000))
    sampled = jax.jit(lambda: sample_level(prior, params, keys))().codes[:, 0, 0]
    np.testing.assert_allclose(np.bincount(sampled, minlength=6) / 4000, probability, atol=0.03)


def test_levels_are_drawn_from_the_coarsest_and_condition_the_finer():
    top, top_params, *_ = make_prior('classes', shape=(2, 3), codebook_size=5)
    bottom, bottom_params, *_ = make_prior('coarser level')
    labels, keys = jnp.arange(4) % 3, sample_keys(jax.random.key(11), jnp.arange(4))
    codes = sample_levels(
        (bottom, top), (bottom_params, top_params), keys, labels, (SamplingParams(), SamplingParams(0.7))
    )
    assert [c.shape for c in codes] == [(4, 4, 6), (4, 2, 3)]

    def level_keys(level):
        return jnp.stack([jax.random.fold_in(key, level) for key in keys])

    by_hand = sample_level(top, top_params, level_keys(1), labels, (), SamplingParams(0.7)).codes
    np.testing.assert_array_equal(codes[1], by_hand)
    by_hand = sample_level(bottom, bottom_params, level_keys(0), labels, (by_hand,)).codes
    np.testing.assert_array_equal(codes[0], by_hand)


def test_rejection_keeps_the_best_of_every_class():
    scores = np.array([0.9, 0.1, 0.5, 0.2, 0.3, 0.95])
    labels = np.array([0, 0, 0, 1, 1, 0])
    assert select_top_per_class(scores, labels, 0.5).tolist() == [0, 4, 5]
    assert select_top_per_class(scores, labels, 0.01).tolist() == [4, 5]  # no class is lost
    assert select_top_per_class(scores, labels, 1.0).tolist() == list(range(6))
    assert len(select_top_per_class(np.linspace(0, 1, 100), np.zeros(100, int), 0.07)) == 7
    with pytest.raises(ValueError, match='1 of 6 scores are NaN'):
        select_top_per_class(np.array([np.nan, *scores[1:]]), labels, 0.5)
    with pytest.raises(ValueError, match=r'\(0, 1\]; it is 0'):
        select_top_per_class(scores, labels, 0)
