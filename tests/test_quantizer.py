"""The EMA quantizer against brute force and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqvae2_jax.models.quantizer import (
    NEVER,
    Quantizer,
    Statistics,
    ema_update,
    initial_statistics,
    nearest,
    restart_dead_codes,
    sum_by_code,
)

K, D = 7, 3


def make_quantizer(**changes):
    fields = {'codebook_size': K, 'codebook_dim': D, 'codebook_ema_decay': 0.99, 'dead_code_threshold': 0.03}
    return Quantizer(**fields | changes)


def _start(seed=0, inputs=None, **fields):
    quantizer = make_quantizer(**fields)
    inputs = jax.random.normal(jax.random.key(seed), (4, 3, 2, D)) if inputs is None else inputs
    variables = quantizer.init({'restart': jax.random.key(seed + 1)}, inputs)
    return quantizer, variables, inputs


def _step(quantizer, variables, inputs, seed=5):
    return quantizer.apply(variables, inputs, train=True, mutable=['codebook'], rngs={'restart': jax.random.key(seed)})


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_nearest_is_brute_force(seed, n, codes, dim):
    rng = np.random.default_rng(seed)
    vectors, codebook = rng.normal(size=(n, dim)), rng.normal(size=(codes, dim))
    distances = ((vectors[:, None] - codebook[None]) ** 2).sum(-1)  # [n, codes], float64
    found = np.asarray(nearest(jnp.asarray(vectors, jnp.float32), jnp.asarray(codebook, jnp.float32)))
    # float32 may choose the other one of two codes at the same distance, but never a worse one.
    np.testing.assert_allclose(distances[np.arange(n), found], distances.min(axis=1), rtol=1e-4, atol=1e-5)


def test_nearest_in_bfloat16_compares_in_float32():
    codebook = jnp.array([[1.0, 256.0], [1.0, 257.0]])  # bfloat16 cannot tell these products apart
    assert nearest(jnp.array([1.0, 257.0]), codebook) == 1


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_sums_by_code_are_those_of_a_loop(dtype):
    rng = np.random.default_rng(0)
    vectors, codes = jnp.asarray(rng.normal(size=(5000, D)), dtype), rng.integers(0, K - 1, 5000)
    expected = np.zeros((K, D))  # the last code has no vector
    np.add.at(expected, codes, np.asarray(vectors, np.float64))
    found = sum_by_code(vectors, jnp.asarray(codes), K)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


def test_bfloat16_inputs_give_the_statistics_of_the_same_inputs_in_float32():
    quantizer, variables, inputs = _start()
    inputs = inputs.astype(jnp.bfloat16)
    output, after = _step(quantizer, variables, inputs)
    expected, expected_after = _step(quantizer, variables, inputs.astype(jnp.float32))
    assert output.vectors.dtype == output.commitment.dtype == jnp.float32
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), output, expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), after, expected_after)


def test_codebook_starts_from_the_first_batch_with_counts_that_match():
    quantizer, variables, inputs = _start()
    book = variables['codebook']
    rows = {tuple(row) for row in np.asarray(inputs).reshape(-1, D).tolist()}
    assert all(tuple(row) in rows for row in np.asarray(book['embedding']).tolist())
    np.testing.assert_allclose(book['counts'], inputs.size / D / K, rtol=1e-6)
    np.testing.assert_allclose(book['sums'] / book['counts'][:, None], book['embedding'], rtol=1e-5)


def test_one_step_neither_shrinks_nor_inflates_an_unused_code():
    """With counts from zero it is multiplied by 1e5, or becomes exactly zero, in one step."""
    quantizer, variables, _ = _start(dead_code_threshold=0.0)
    only = jnp.broadcast_to(variables['codebook']['embedding'][2], (4, 3, 2, D))
    before = variables['codebook']['embedding']
    _, variables = _step(quantizer, variables, only)
    np.testing.assert_allclose(variables['codebook']['embedding'], before, rtol=1e-3, atol=1e-3)


def test_ema_follows_its_closed_form_in_float64():
    quantizer, variables, _ = _start(dead_code_threshold=0.0)
    counts, sums, book = (np.asarray(variables['codebook'][k], np.float64) for k in ('counts', 'sums', 'embedding'))
    for step in range(5):
        inputs = jax.random.normal(jax.random.key(100 + step), (4, 3, 2, D)) * (1 + step)
        flat = np.asarray(inputs, np.float64).reshape(-1, D)
        codes = ((flat[:, None] - book[None]) ** 2).sum(-1).argmin(1)  # the codebook from before the update
        output, variables = _step(quantizer, variables, inputs, seed=step)
        np.testing.assert_array_equal(np.asarray(output.codes).reshape(-1), codes)
        np.testing.assert_allclose(np.asarray(output.vectors).reshape(-1, D), book[codes], rtol=1e-4, atol=1e-4)
        hits = np.eye(K)[codes]
        decay = min(0.99, (1 + step) / (10 + step))
        counts = decay * counts + (1 - decay) * hits.sum(0)
        sums = decay * sums + (1 - decay) * hits.T @ flat
        smoothed = (counts + 1e-5) / (counts.sum() + K * 1e-5) * counts.sum()
        book = sums / smoothed[:, None]
        np.testing.assert_allclose(variables['codebook']['embedding'], book, rtol=2e-4, atol=2e-5)


def test_averages_forget_fast_at_first_and_then_by_the_decay():
    quantizer, variables, inputs = _start(dead_code_threshold=0.0, codebook_ema_decay=0.5)
    for _ in range(12):
        before = variables['codebook']
        _, variables = _step(quantizer, variables, inputs)
    after, hits = variables['codebook'], 4 * 3 * 2
    assert int(after['updates']) == 12
    codes = np.asarray(quantizer.apply({'codebook': before}, inputs).codes)
    expected = 0.5 * np.asarray(before['counts']) + 0.5 * np.bincount(codes.reshape(-1), minlength=K)
    np.testing.assert_allclose(after['counts'], expected, rtol=1e-5)
    np.testing.assert_allclose(after['counts'].sum(), hits, rtol=1e-5)


def test_laplace_smoothing_matters_for_rare_codes():
    old = Statistics(jnp.ones((2, 1)), jnp.array([0.0, 4.0]), jnp.array([[0.0], [4.0]]))
    new = ema_update(old, jnp.array([0, 4]), jnp.array([[0.0], [4.0]]), decay=0.5, epsilon=0.1)
    assert np.isfinite(np.asarray(new.codebook)).all()
    np.testing.assert_allclose(new.codebook[1, 0], 4.0 / ((4.0 + 0.1) / (4.0 + 0.2) * 4.0), rtol=1e-6)


def test_dead_codes_restart_with_their_statistics_and_stay():
    vectors = 10 + jax.random.normal(jax.random.key(0), (50, D))
    old = Statistics(jnp.zeros((K, D)), jnp.ones(K).at[3].set(1e-4), jnp.zeros((K, D)))
    new, dead = restart_dead_codes(old, vectors, 0.03, jax.random.key(1))
    assert np.flatnonzero(dead).tolist() == [3]
    assert np.abs(np.asarray(vectors) - np.asarray(new.codebook[3])).sum(1).min() == 0
    # One more update without a single hit leaves it where it was put: its statistics moved with it.
    after = ema_update(new, 5 * jnp.eye(K)[0], jnp.zeros((K, D)), 0.99, 1e-5)
    np.testing.assert_allclose(after.codebook[3], new.codebook[3], rtol=1e-4)
    again, dead = restart_dead_codes(after, vectors, 0.03, jax.random.key(2))
    assert not bool(dead[3])


def test_threshold_zero_never_restarts_a_code():
    old = Statistics(jnp.zeros((K, D)), jnp.zeros(K).at[0].set(1.0), jnp.zeros((K, D)))
    _, dead = restart_dead_codes(old, jnp.ones((50, D)), 0.0, jax.random.key(1))
    assert not np.asarray(dead).any()


def test_more_codes_than_vectors_start_apart():
    start = initial_statistics(jax.random.normal(jax.random.key(0), (5, D)), 64, jax.random.key(1))
    assert len(np.unique(np.asarray(start.codebook), axis=0)) == 64


@pytest.mark.parametrize('count', [64, 65, 200])
def test_enough_vectors_give_distinct_codes_from_all_of_the_batch(count):
    vectors = jnp.arange(count, dtype=jnp.float32)[:, None]
    sampled = np.stack([initial_statistics(vectors, 64, jax.random.key(seed)).codebook[:, 0] for seed in range(40)])
    assert all(len(np.unique(row)) == 64 for row in sampled)
    assert len(np.unique(sampled)) == count  # every vector has its chance


def test_gradient_passes_straight_through_and_the_codebook_gets_none():
    quantizer, variables, inputs = _start()
    weights = jax.random.normal(jax.random.key(9), inputs.shape)

    def loss(inputs, book):
        return jnp.sum(weights * quantizer.apply({'codebook': book}, inputs).vectors)

    to_inputs, to_book = jax.grad(loss, argnums=(0, 1), allow_int=True)(inputs, variables['codebook'])
    np.testing.assert_allclose(to_inputs, weights, rtol=1e-6)
    assert not np.asarray(to_book['embedding']).any()


def test_commitment_pulls_the_input_towards_its_code():
    quantizer, variables, inputs = _start()
    output = quantizer.apply(variables, inputs)
    gradient = jax.grad(lambda x: quantizer.apply(variables, x).commitment.sum())(inputs)
    per_element = 2 / (3 * 2 * D)
    np.testing.assert_allclose(gradient, per_element * (inputs - output.vectors), rtol=1e-4, atol=1e-6)


def test_age_counts_steps_since_a_code_was_chosen():
    quantizer, variables, _ = _start(dead_code_threshold=0.0)
    one = jnp.broadcast_to(variables['codebook']['embedding'][1], (1, 1, 1, D))
    for expected in (1, 2):
        output, variables = _step(quantizer, variables, one)
        age = np.asarray(output.metrics['age'])
        assert age[1] == 0 and (np.delete(age, 1) == NEVER + expected).all()
    np.testing.assert_allclose(output.metrics['perplexity'], 1.0, rtol=1e-5)
    other = jnp.broadcast_to(variables['codebook']['embedding'][2], (1, 1, 1, D))
    age = np.asarray(_step(quantizer, variables, other)[0].metrics['age'])
    assert age[1] == 1 and age[2] == 0


@pytest.mark.parametrize('threshold, alive', [(0.0, False), (0.03, True)])
def test_over_200_steps_only_restarts_keep_a_code_that_nothing_chooses(threshold, alive):
    """The vectors of all steps lie near one code, so that the others are never chosen but by chance of a restart."""
    near = 3 + 0.01 * jax.random.normal(jax.random.key(0), (200, 4, 3, 2, D))
    far = jnp.zeros((K, D)).at[0].set(3.0).at[1:].set(jnp.linspace(10, 20, K - 1)[:, None])
    quantizer, variables, _ = _start(dead_code_threshold=threshold)
    start = variables['codebook'] | {'embedding': far, 'sums': far * variables['codebook']['counts'][:, None]}

    def step(book, inputs):
        key = jax.random.fold_in(jax.random.key(1), book['updates'])
        _, after = quantizer.apply({'codebook': book}, inputs, train=True, mutable=['codebook'], rngs={'restart': key})
        return after['codebook'], jnp.linalg.norm(after['codebook']['embedding'], axis=-1)

    _, norms = jax.lax.scan(step, start, near)  # [200, K]
    first = jnp.linalg.norm(far, axis=-1)
    if alive:
        assert (norms[-1] > 0.5 * first[0]).all()
    else:  # the numbers that the module's docstring gives
        assert (norms[9, 1:] > 0.5 * first[1:]).all() and (norms[99:, 1:] < 1e-5 * first[1:]).all()


def test_evaluation_changes_nothing():
    quantizer, variables, inputs = _start()
    _, after = quantizer.apply(variables, inputs, mutable=['codebook'])
    jax.tree.map(np.testing.assert_array_equal, variables, after)


def test_wrong_width_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match='codebook_dim is 3.*4 channels'):
        make_quantizer().init({'restart': jax.random.key(0)}, jnp.zeros((1, 2, 2, 4)))
