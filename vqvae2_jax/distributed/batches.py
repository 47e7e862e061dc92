"""Runs a compiled function over a stream of batches, sharded over the mesh, and collects its results on the host."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import jax
import numpy as np

from vqvae2_jax.data.shards import Range, batch_runs
from vqvae2_jax.distributed import sharding

_META = ('label', 'index', 'mask')  # of a loader's batch: handed to the caller together with the results


def map_batches(
    function: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    batches: Iterable[dict[str, np.ndarray]],
    batch_size: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Applies a jitted function to every batch. Call and iterate it inside `jax.set_mesh`, on all processes together.

    The next batch is dispatched before the results of the current one are fetched, so the devices do not wait for the
    caller.

    Args:
      function: takes a dict of global arrays [B, ...] and returns a dict of arrays [B, ...].
      batches: dicts of the process-local rows (`sharding.process_local_rows(batch_size)`), [n, ...].
      batch_size: B, the global one.

    Yields:
      On every process, for each batch: the results of all rows, and 'label', 'index' and 'mask' of the batch where it
      has them; [B, ...] each.
    """
    pending = None
    for batch in batches:
        inputs = sharding.make_global_batch(batch, batch_size)
        outputs = {**{name: inputs[name] for name in _META if name in inputs}, **function(inputs)}
        if pending is not None:
            yield sharding.gather_rows(pending)
        pending = outputs
    if pending is not None:
        yield sharding.gather_rows(pending)


def map_missing(
    function: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    missing: Sequence[Range],
    open_batches: Callable[[int, int], Generator[dict[str, np.ndarray], None, None]],
    batch_size: int,
    count: int,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Applies a jitted function to the batches that hold missing shards; otherwise as `map_batches`.

    Args:
      function: as in `map_batches`.
      missing: ranges of examples to compute.
      open_batches: (start, stop) -> process-local rows of the batches of these examples; closed after its last batch.
      batch_size: the global one.
      count: number of examples there are.

    Yields:
      The position of the first example of a batch, and the results of the batch, for `ShardWriter.add`.
    """
    for start, stop in batch_runs(missing, batch_size, count):
        with contextlib.closing(open_batches(start, stop)) as batches:
            for number, results in enumerate(map_batches(function, batches, batch_size)):
                yield start + number * batch_size, results


def map_examples(
    function: Callable[[dict[str, jax.Array]], dict[str, jax.Array]], examples: dict[str, np.ndarray], batch_size: int
) -> dict[str, np.ndarray]:
    """Applies a jitted function to arrays [N, ...] of any N, in batches; the last one is padded with its last row.

    Args:
      function: as in `map_batches`.
      examples: the same on every process.
      batch_size: the global one.

    Returns:
      Arrays [N, ...], on every process.
    """
    count, rows = len(next(iter(examples.values()))), sharding.process_local_rows(batch_size)

    def batches():
        for start in range(0, count, batch_size):
            index = np.minimum(start + rows, count - 1)
            yield {name: values[index] for name, values in examples.items()}

    parts = list(map_batches(function, batches(), batch_size))
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
