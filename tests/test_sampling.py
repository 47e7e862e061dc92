"""The cached sampler against its slow definition, and what a sample may depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_prior import CASES, make_prior
from vqvae2_jax.sampling.ancestral import draw, sample, sample_by_rerunning, sample_keys, sample_levels
from vqvae2_jax.sampling.rejection import keep_best


@pytest.mark.parametrize('case', CASES)
def test_cached_sampling_draws_the_same_codes_as_rerunning_the_network(case):
    prior, params, _, labels, coarser = make_prior(case, batch=3)
    keys = sample_keys(jax.random.key(7), jnp.arange(3))
    fast = jax.jit(lambda: sample(prior, params, keys, labels, coarser, 1.3))()
    slow = jax.jit(lambda: sample_by_rerunning(prior, params, keys, labels, coarser, 1.3))()
    np.testing.assert_array_equal(fast, slow)
    assert len(np.unique(fast)) > 2


@pytest.mark.parametrize('case', ['attention', 'coarser level'])
def test_streamed_logits_equal_the_whole_network(case):
    """Stronger than equal codes: row by row and position by position, the logits agree to rounding."""
    prior, params, codes, labels, coarser = make_prior(case)
    whole = prior.apply({'params': params}, codes, labels, coarser)
    condition = prior.apply({'params': params}, labels, coarser, method='condition')
    rows, attention = {}, {}
    above = jnp.full((2, 1, prior.shape[1]), prior.codebook_size)
    for i in range(prior.shape[0]):
        part = condition if condition is None or condition.shape[1] == 1 else condition[:, i : i + 1]
        variables = {'params': params, **rows}
        features, rows = prior.apply(variables, above, jnp.array([i]), part, method='vertical', mutable=['rows'])
        left, cache = jnp.full((2, 1, 1), prior.codebook_size), attention
        for j in range(prior.shape[1]):
            here = part if part is None or part.shape[2] == 1 else part[:, :, j : j + 1]
            arguments = (left, jnp.array([i]), jnp.array([j]), [f[:, :, j : j + 1] for f in features], here)
            logits, cache = prior.apply(
                {'params': params, **cache}, *arguments, method='horizontal', mutable=['columns', 'attention']
            )
            np.testing.assert_allclose(logits[:, 0, 0], whole[:, i, j], atol=1e-4)
            left = codes[:, i : i + 1, j : j + 1]
        attention = {k: v for k, v in cache.items() if k == 'attention'}
        above = codes[:, i : i + 1]


def test_sample_i_is_the_same_in_any_batch_and_order():
    prior, params, _, _, _ = make_prior('classes')
    key = jax.random.key(3)
    run = jax.jit(lambda index: sample(prior, params, sample_keys(key, index), index % 3))
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
        return sample(prior, params, keys, temperature=temperature)

    cold, also_cold = run(keys, 0.0), run(sample_keys(jax.random.key(1), jnp.arange(4)), 0.0)
    np.testing.assert_array_equal(cold, also_cold)
    assert (np.asarray(cold) == np.asarray(cold[0])).all()
    assert (np.asarray(run(keys, 2.0)) != np.asarray(cold)).any()
    assert len(traces) == 1


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
    keys = sample_keys(jax.random.key(0), jnp.arange(20000))
    drawn = draw(keys, jnp.array(5), jnp.tile(logits, (20000, 1)), 1.0)
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 20000, [0.1, 0.2, 0.7], atol=0.015)
    warm = draw(keys, jnp.array(5), jnp.tile(logits, (20000, 1)), 2.0)  # p^(1/2), normalised
    np.testing.assert_allclose(np.bincount(warm, minlength=3) / 20000, [0.198, 0.279, 0.523], atol=0.015)
    again = draw(keys, jnp.array(6), jnp.tile(logits, (20000, 1)), 1.0)
    assert 0.4 < np.mean(np.asarray(drawn) == np.asarray(again)) < 0.68  # another position is another draw (0.54)


def test_samples_follow_the_prior():
    """The frequency of every first code agrees with the network's own probability of it."""
    prior, params, codes, _, _ = make_prior('convolutions', batch=1)
    probability = jax.nn.softmax(prior.apply({'params': params}, codes)[0, 0, 0])
    keys = sample_keys(jax.random.key(0), jnp.arange(4000))
    drawn = jax.jit(lambda: sample(prior, params, keys))()[:, 0, 0]
    np.testing.assert_allclose(np.bincount(drawn, minlength=6) / 4000, probability, atol=0.03)


def test_levels_are_drawn_from_the_coarsest_and_condition_the_finer():
    top, top_params, *_ = make_prior('classes', shape=(2, 3), codebook_size=5)
    bottom, bottom_params, *_ = make_prior('coarser level')
    index, labels, key = jnp.arange(4), jnp.arange(4) % 3, jax.random.key(11)
    codes = sample_levels((bottom, top), (bottom_params, top_params), key, index, labels, (1.0, 0.7))
    assert [c.shape for c in codes] == [(4, 4, 6), (4, 2, 3)]
    by_hand = sample(top, top_params, sample_keys(jax.random.fold_in(key, 1), index), labels, (), 0.7)
    np.testing.assert_array_equal(codes[1], by_hand)
    keys = sample_keys(jax.random.fold_in(key, 0), index)
    np.testing.assert_array_equal(codes[0], sample(bottom, bottom_params, keys, labels, (by_hand,)))


def test_rejection_keeps_the_best_of_every_class():
    scores = np.array([0.9, 0.1, 0.5, 0.2, 0.3, 0.95])
    labels = np.array([0, 0, 0, 1, 1, 0])
    assert keep_best(scores, labels, 0.5).tolist() == [0, 4, 5]
    assert keep_best(scores, labels, 0.01).tolist() == [4, 5]  # no class is lost
    assert keep_best(scores, labels, 1.0).tolist() == list(range(6))
    assert len(keep_best(np.linspace(0, 1, 100), np.zeros(100, int), 0.07)) == 7
    with pytest.raises(ValueError, match='1 of 6 scores are NaN'):
        keep_best(np.array([np.nan, *scores[1:]]), labels, 0.5)
    with pytest.raises(ValueError, match=r'\(0, 1\]; it is 0'):
        keep_best(scores, labels, 0)
