"""Temperature, top-k, top-p and guidance, against their definitions on small distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import defaults
from tests.test_prior import make_prior
from vqvae2_jax.config import build
from vqvae2_jax.sampling.ancestral import sample_keys, sample_level
from vqvae2_jax.sampling.params import SamplingParams, apply_guidance, sample_codes, top_k_top_p_filter
from vqvae2_jax.sampling.reference import sample_reference

PROBABILITIES = np.array([0.05, 0.4, 0.15, 0.3, 0.1])
LOGITS = jnp.log(PROBABILITIES)


@pytest.mark.parametrize(
    'params, kept',
    [
        (SamplingParams(), [0, 1, 2, 3, 4]),
        (SamplingParams(top_k=1), [1]),
        (SamplingParams(top_k=2), [1, 3]),
        (SamplingParams(top_k=9), [0, 1, 2, 3, 4]),
        (SamplingParams(top_p=0.01), [1]),  # the most likely code always stays
        (SamplingParams(top_p=0.39), [1]),
        (SamplingParams(top_p=0.41), [1, 3]),  # the code that crosses the share is the last one in
        (SamplingParams(top_p=0.84), [1, 2, 3]),
        (SamplingParams(top_p=0.99), [0, 1, 2, 3, 4]),
        (SamplingParams(top_k=3, top_p=0.47), [1]),  # shares among the three: 0.47, 0.35, 0.18
        (SamplingParams(top_k=3, top_p=0.48), [1, 3]),
    ],
)
def test_the_codes_that_remain(params, kept):
    restricted = np.asarray(jax.jit(top_k_top_p_filter)(LOGITS, params))
    assert np.flatnonzero(np.isfinite(restricted)).tolist() == kept
    np.testing.assert_array_equal(restricted[kept], np.asarray(LOGITS)[kept])


@pytest.mark.parametrize(
    'params', [SamplingParams(top_k=0), SamplingParams(top_p=1.0), SamplingParams(top_k=0, top_p=1.0)]
)
def test_numbers_that_change_nothing_keep_codes_of_the_least_probability(params):
    logits = jnp.array([0.0, -40.0, 30.0])  # in float32 the most likely code has all of the probability
    np.testing.assert_array_equal(top_k_top_p_filter(logits, params), logits)


def test_a_program_without_top_k_and_top_p_does_not_sort(config):
    def lowered(config):
        params = SamplingParams(**{name: values['top'] for name, values in build.sampling_arguments(config).items()})
        return (
            jax.jit(sample_codes)
            .lower(jax.random.key(0)[None], jnp.zeros(1, int), LOGITS[None, None], params)
            .as_text()
        )

    assert 'stablehlo.sort' not in lowered(config)
    config.sample.top_p.top = 0.9
    assert 'stablehlo.sort' in lowered(config)


def test_draws_come_from_the_remaining_codes_in_proportion():
    keys = sample_keys(jax.random.key(0), jnp.arange(20000))
    sampled = sample_codes(keys, jnp.array([3]), jnp.tile(LOGITS, (20000, 1, 1)), SamplingParams(top_k=2))[:, 0]
    np.testing.assert_allclose(np.bincount(sampled, minlength=5) / 20000, [0, 0.4 / 0.7, 0, 0.3 / 0.7, 0], atol=0.015)


def test_temperature_comes_before_top_p():
    # At temperature 2 the shares are 0.30, 0.26, 0.18, ..., and three codes hold 0.6; at temperature 1 two do.
    keys = sample_keys(jax.random.key(0), jnp.arange(500))
    sampled = sample_codes(
        keys, jnp.array([0]), jnp.tile(LOGITS, (500, 1, 1)), SamplingParams(temperature=2.0, top_p=0.6)
    )
    assert set(np.unique(sampled)) == {1, 2, 3}


def test_guidance_extrapolates_from_the_logits_without_class():
    cond, uncond = jnp.array([1.0, 2.0]), jnp.array([0.5, 3.0])
    np.testing.assert_allclose(apply_guidance(cond, uncond, 1.0), [1.0, 2.0])
    np.testing.assert_allclose(apply_guidance(cond, uncond, 0.0), [0.5, 3.0])
    np.testing.assert_allclose(apply_guidance(cond, uncond, 3.0), [2.0, 0.0])


@pytest.mark.parametrize('skew', [None, 2])
def test_guided_sampling_equals_its_slow_definition(skew):
    fields = {} if skew is None else {'skew': skew}
    prior, params, _, labels, _ = make_prior('classes', batch=3, label_dropout=0.1, **fields)
    keys = sample_keys(jax.random.key(1), jnp.arange(3))
    traces = []

    @jax.jit
    def fast(sampling_params):
        traces.append(1)
        return sample_level(prior, params, keys, labels, sampling_params=sampling_params)

    strong = fast(SamplingParams(guidance=4.0, top_k=4))
    slow = jax.jit(lambda p: sample_reference(prior, params, keys, labels, sampling_params=p))(
        SamplingParams(guidance=4.0, top_k=4)
    )
    np.testing.assert_array_equal(strong.codes, slow.codes)
    np.testing.assert_allclose(strong.log_probs, slow.log_probs, atol=1e-4)
    whole = jax.nn.log_softmax(defaults.apply(prior, {'params': params}, strong.codes, labels))  # unguided
    expected = jnp.take_along_axis(whole, strong.codes[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(strong.log_probs, expected, atol=1e-4)
    plain = sample_level(prior, params, keys, labels).codes
    np.testing.assert_array_equal(fast(SamplingParams(guidance=1.0, top_k=0)).codes, plain)
    unlabeled = sample_level(prior, params, keys, jnp.full_like(labels, prior.num_classes)).codes
    np.testing.assert_array_equal(fast(SamplingParams(guidance=0.0, top_k=0)).codes, unlabeled)
    assert (plain != unlabeled).any() and len(traces) == 1


def test_guidance_needs_a_prior_that_has_seen_hidden_labels():
    prior, params, _, labels, _ = make_prior('classes')
    with pytest.raises(ValueError, match='label_dropout above 0'):
        sample_level(
            prior,
            params,
            sample_keys(jax.random.key(0), jnp.arange(2)),
            labels,
            sampling_params=SamplingParams(guidance=2.0),
        )


def test_label_dropout_hides_labels_in_training_only():
    prior, params, codes, labels, _ = make_prior('classes', label_dropout=0.999)
    hidden = defaults.apply(prior, {'params': params}, codes, labels, train=True, rngs={'dropout': jax.random.key(0)})
    without = defaults.apply(prior, {'params': params}, codes, jnp.full_like(labels, prior.num_classes))
    np.testing.assert_array_equal(hidden, without)
    assert np.abs(defaults.apply(prior, {'params': params}, codes, labels) - without).max() > 1e-3
