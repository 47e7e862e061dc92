"""Ranges of shards, the batches that compute them, and the writer that puts batches together to shards."""

import numpy as np
import pytest

from vqvae2_jax.data.shards import ShardWriter, batch_runs, batch_starts, shard_ranges


def test_shards_cover_all_examples_once():
    assert shard_ranges(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert shard_ranges(8, 4) == [(0, 4), (4, 8)] and shard_ranges(3, 4) == [(0, 3)] and shard_ranges(0, 4) == []


@pytest.mark.parametrize('batch_size', [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize('missing', [[(0, 4)], [(4, 8)], [(0, 4), (8, 10)], [(0, 4), (4, 8), (8, 10)], []])
def test_batches_start_at_multiples_of_their_size_and_cover_the_missing_shards(missing, batch_size):
    starts = batch_starts(missing, batch_size)
    assert starts == sorted(set(starts)) and all(start % batch_size == 0 for start in starts)
    computed = {start + row for start in starts for row in range(batch_size)}
    wanted = {i for start, stop in missing for i in range(start, stop)}
    assert wanted <= computed
    for start in starts:  # none is computed for nothing
        assert wanted & set(range(start, start + batch_size))
    runs = list(batch_runs(missing, batch_size, 10))
    assert [s for start, stop in runs for s in range(start, stop, batch_size)] == starts
    assert all(stop <= 10 for _, stop in runs)
    assert all(a[1] < b[0] for a, b in zip(runs, runs[1:], strict=False))  # consecutive batches are one run


@pytest.mark.parametrize('batch_size', [1, 2, 3, 5, 7, 16])
@pytest.mark.parametrize('present', [[], [0], [1], [3], [0, 2], [0, 1, 2, 3]])
def test_a_shard_holds_its_examples_whatever_the_batch_size(batch_size, present):
    ranges, count = shard_ranges(15, 4), 15
    missing = [r for number, r in enumerate(ranges) if number not in present]
    written = []
    writer = ShardWriter(missing, lambda shard, arrays: written.append((shard, arrays)))
    finished = 0
    for start in batch_starts(missing, batch_size):
        rows = np.arange(start, start + batch_size)
        finished += writer.add(start, {'index': rows, 'pair': np.stack([rows, rows**2], axis=1)})
        assert finished == len(written)
    assert [shard for shard, _ in written] == missing
    for (start, stop), arrays in written:
        np.testing.assert_array_equal(arrays['index'], np.arange(start, stop))
        np.testing.assert_array_equal(arrays['pair'][:, 1], np.arange(start, stop) ** 2)
        assert stop <= count


def test_a_writer_does_not_keep_batches_alive():
    kept = []
    writer = ShardWriter([(0, 2), (2, 6)], lambda shard, arrays: kept.append(arrays['x']))
    batch = np.zeros((4, 1000))
    writer.add(0, {'x': batch})
    batch[:] = 1  # a loader may reuse its memory
    writer.add(4, {'x': batch})
    np.testing.assert_array_equal(kept[1][:, 0], [0, 0, 1, 1])
    assert not any(np.shares_memory(batch, x) for x in kept)
