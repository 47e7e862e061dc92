"""Functions over streams of batches on the mesh: results in order, labels and masks, any number of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae2_jax.distributed import sharding
from vqvae2_jax.distributed.batches import map_batches, map_examples, map_missing


@jax.jit
def double(batch):
    return {'twice': 2 * batch['x'], 'row': jnp.sum(batch['x'], axis=1)}


def make_batches(count, size):
    for number in range(count):
        x = np.arange(size * 3, dtype=np.float32).reshape(size, 3) + 100 * number
        yield {'x': x, 'label': np.arange(size, dtype=np.int32), 'mask': np.arange(size) < size - number}


@pytest.mark.parametrize('devices, fsdp', [(1, 1), (2, 2), (8, 1), (8, 4)])
def test_results_come_in_order_with_what_belongs_to_them(devices, fsdp):
    with jax.set_mesh(sharding.make_mesh(jax.devices()[:devices], fsdp)):
        found = list(map_batches(double, make_batches(3, 8), 8))
    assert len(found) == 3
    for given, result in zip(make_batches(3, 8), found, strict=True):
        assert set(result) == {'twice', 'row', 'label', 'mask'}
        assert all(isinstance(values, np.ndarray) for values in result.values())
        np.testing.assert_array_equal(result['twice'], 2 * given['x'])
        np.testing.assert_array_equal(result['row'], given['x'].sum(axis=1))
        for name in ('label', 'mask'):
            np.testing.assert_array_equal(result[name], given[name])


def test_the_next_batch_is_dispatched_before_the_last_result_is_handed_out():
    calls = []

    def function(batch):
        calls.append(len(calls))
        return double(batch)

    with jax.set_mesh(sharding.make_mesh()):
        results = map_batches(function, make_batches(3, 8), 8)
        next(results)
        assert len(calls) == 2
        assert len(list(results)) == 2 and len(calls) == 3
        assert list(map_batches(function, [], 8)) == []


def test_missing_shards_are_computed_in_aligned_batches_and_readers_are_closed():
    opened, closed = [], []

    def open_batches(start, stop):
        opened.append((start, stop))
        try:
            for first in range(start, stop, 8):
                yield {'x': np.arange(first, first + 8, dtype=np.float32)[:, None] * np.ones(3, np.float32)}
        finally:
            closed.append((start, stop))

    with jax.set_mesh(sharding.make_mesh()):
        results = map_missing(double, [(4, 10), (34, 38)], open_batches, 8, 38)
        found = [(start, rows['twice'][0, 0]) for start, rows in results]
        assert found == [(0, 0), (8, 16), (32, 64)]
        assert opened == closed == [(0, 16), (32, 38)]
        stopped = map_missing(double, [(0, 38)], open_batches, 8, 38)
        next(stopped)
        stopped.close()
    assert closed[-1] == opened[-1] == (0, 38)


@pytest.mark.parametrize('count', [1, 8, 21])
def test_examples_are_padded_and_the_padding_is_cut_off(count):
    shapes = []

    def function(batch):
        shapes.append(batch['x'].shape)
        return double(batch)

    x = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    with jax.set_mesh(sharding.make_mesh()):
        found = map_examples(function, {'x': x, 'index': np.arange(count)}, 8)
    assert set(shapes) == {(8, 3)} and len(shapes) == -(-count // 8)
    np.testing.assert_array_equal(found['twice'], 2 * x)
    np.testing.assert_array_equal(found['index'], np.arange(count))


def test_rows_are_gathered_from_any_sharding():
    x = np.arange(48).reshape(16, 3)
    with jax.set_mesh(sharding.make_mesh(fsdp=2)):
        for size in (16, 4):  # sharded over all axes, or over `data` alone
            batch = sharding.make_global_batch({'x': x[:size]})
            np.testing.assert_array_equal(sharding.gather_rows(batch)['x'], x[:size])
