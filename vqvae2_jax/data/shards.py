"""Ranges of examples that are written to files of a fixed size, independent of the batch size and the devices."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Range = tuple[int, int]  # start, stop


def shard_ranges(count: int, size: int) -> list[Range]:
    """Returns (start, stop) of every shard of `count` examples, `size` each; the last one may be smaller."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def batch_starts(missing: Sequence[Range], batch_size: int) -> list[int]:
    """Returns the starts of the batches that hold the missing ranges, ascending.

    All starts are multiples of the batch size. A restart therefore computes an example at the same position of the same
    batch, which keeps its result bit-identical.
    """
    starts = {
        number * batch_size for start, stop in missing for number in range(start // batch_size, -(-stop // batch_size))
    }
    return sorted(starts)


def batch_runs(missing: Sequence[Range], batch_size: int, count: int) -> Iterator[Range]:
    """Yields (start, stop) of consecutive examples to compute for the missing ranges, in whole batches.

    Args:
      missing: (start, stop) of the shards to write.
      batch_size: the global batch size.
      count: number of all examples; the last run ends there.
    """
    starts = batch_starts(missing, batch_size)
    begin = 0
    for number, start in enumerate(starts):
        if number + 1 == len(starts) or starts[number + 1] != start + batch_size:
            yield starts[begin], min(start + batch_size, count)
            begin = number + 1


class ShardWriter:
    """Collects examples from batches and hands them on shard by shard.

    Batches come in ascending order of their examples. Examples that belong to no missing shard are dropped.
    """

    def __init__(self, missing: Sequence[Range], write: Callable[[Range, dict[str, np.ndarray]], Any]):
        """`write` is called with the range and the arrays [n, ...] of every shard, in order."""
        self._missing, self._write, self._parts = sorted(missing), write, []

    def add(self, start: int, arrays: dict[str, np.ndarray]) -> int:
        """Takes the examples start, start + 1, ... of a batch, arrays [B, ...]; writes the shards that are complete.

        Returns:
          The number of shards written.
        """
        written, stop = 0, start + len(next(iter(arrays.values())))
        while self._missing:
            first, last = self._missing[0]
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                # Copies, so that a slice does not keep the whole batch alive.
                self._parts.append({k: np.array(v[begin - start : end - start]) for k, v in arrays.items()})
            if last > stop:
                break
            self._missing.pop(0)
            shard = {k: np.concatenate([part[k] for part in self._parts]) for k in arrays}
            self._parts = []
            self._write((first, last), shard)
            written += 1
        return written
