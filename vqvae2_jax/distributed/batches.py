"""Runs a compiled function over a stream of batches, sharded over the mesh, and collects its results on the host."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import jax
import numpy as np

from vqvae2_jax.data.shards import Range, batch_runs
from vqvae2_jax.distributed import sharding

_META = ('label', 'index', 'mask')  # fields of a loader's batch that the caller gets together with the results


def map_batches(
    function: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    batches: Iterable[dict[str, np.ndarray]],
    batch_size: int,
    main_process_only: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Applies a jitted function to every batch. Call and iterate it inside `jax.set_mesh`, on all processes together.

    The next batch is dispatched before the results of the current one are fetched, so the devices do not wait for the
    caller.

    Args:
      function: takes a dict of global arrays [B, ...] and returns a dict of arrays [B, ...].
      batches: dicts of arrays [n, ...] of the rows of this process (`sharding.process_local_rows(batch_size)`), all of
        one size; read one batch ahead.
      batch_size: B, the global batch size.
      main_process_only: copies results to process 0 only; the other processes get empty arrays [B, 0].

    Yields:
      For each batch a dict of NumPy arrays [B, ...]: the results, and 'label', 'index' and 'mask' if the batch has them
      and no result has that name. 64-bit integers become int32.
    """
    pending = None
    for batch in batches:
        inputs = sharding.make_global_batch(batch, batch_size)
        outputs = {**{name: inputs[name] for name in _META if name in inputs}, **function(inputs)}
        if pending is not None:
            yield sharding.gather_rows(pending, main_process_only)
        pending = outputs
    if pending is not None:
        yield sharding.gather_rows(pending, main_process_only)


def map_missing(
    function: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    missing: Sequence[Range],
    open_batches: Callable[[int, int], Generator[dict[str, np.ndarray], None, None]],
    batch_size: int,
    count: int,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Applies a jitted function to the batches that hold missing shards; otherwise as `map_batches`.

    Only process 0 gets the results, as it writes the shards.

    Args:
      function: see `map_batches`.
      missing: (start, stop) of the shards to compute.
      open_batches: (start, stop) -> generator of the batches of these examples, as `batches` of `map_batches`; it is
        closed after its last batch.
      batch_size: the global batch size.
      count: number of all examples.

    Yields:
      The position of the first example of a batch, and the results of the batch, for `ShardWriter.add`.
    """
    for start, stop in batch_runs(missing, batch_size, count):
        with contextlib.closing(open_batches(start, stop)) as batches:
            for number, results in enumerate(map_batches(function, batches, batch_size, main_process_only=True)):
                yield start + number * batch_size, results


def map_examples(
    function: Callable[[dict[str, jax.Array]], dict[str, jax.Array]], examples: dict[str, np.ndarray], batch_size: int
) -> dict[str, np.ndarray]:
    """Applies a jitted function to arrays [N, ...] of any N, in batches; the last one is padded with its last row.

    Args:
      function: see `map_batches`.
      examples: arrays [N, ...], the same on every process.
      batch_size: the global batch size.

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
