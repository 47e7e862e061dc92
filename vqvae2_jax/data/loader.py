"""Batches from any random-access source of flat dicts of arrays: images, or codes.

Batch number k is a pure function of (source, seed, k). An iterator's whole state is therefore the number of batches
read, and a restored iterator continues exactly, even with another number of worker processes. The global batch does not
depend on the number of processes (hosts) either: each reads its rows.

Unreadable examples (source.on_error == 'skip') do not shift this. Each is replaced by the next readable one; training
sees that example once more, evaluation masks it out.
"""

import concurrent.futures
import contextlib
import functools
import gc
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from vqvae2_jax.data import worker_processes
from vqvae2_jax.data.decode import UnreadableImage, random_crop
from vqvae2_jax.io import names
from vqvae2_jax.io.record import JobError

_READ_THREADS = 4  # Decoding releases the GIL, so a few threads help even without worker processes.
_REMOTE_THREADS = 32  # of a process, for examples that wait for a network
_WORKER_BUFFER = 2  # Chunks that each worker process holds ready, or more if one batch has more chunks.
_CHUNK_BYTES = 2**26  # Batches are read in chunks of at most this size, since workers hold them in shared memory.


def train_batches(
    source: Any,
    *,
    batch_size: int,
    seed: int,
    flip: bool = False,
    crop: bool = False,
    workers: int = 0,
    rows: Sequence[int] | None = None,
    skip_log: str | None = None,
) -> 'BatchIterator':
    """Reads endless batches, reshuffled every epoch. A batch may span two epochs.

    Args:
      source: has __len__, and __getitem__ that returns a dict of arrays or scalars of fixed shapes and dtypes. It may
        raise `decode.UnreadableImage`; if its attribute `on_error` is 'skip', the next example is read instead. If its
        attribute `is_remote` is True, many examples are read at once.
      batch_size: the global batch size.
      seed: seed of shuffling and augmentation.
      flip: mirror half of the images.
      crop: crop every image at a random position (source.read, see decode.CROP_ZOOM).
      workers: number of grain worker processes; 0 reads in threads.
      rows: indices of the rows of the global batch to read, int [n], ascending; None: all.
      skip_log: file that the names of unreadable examples are appended to; see read_skipped.

    Returns:
      A grain.DatasetIterator over dicts of arrays [n, ...]. get_state() is a dict for JSON. Close it when done.

    Raises:
      ValueError: an empty source, rows outside the batch, or augmentation of a source without images.
    """
    rows = _checked_rows(rows, batch_size)
    reader = _Reader(source, skip_log, flip, crop)
    examples = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    # Augmentation depends on the position in the endless sequence, so it differs between epochs.
    examples = examples.random_map(reader.augmented) if flip or crop else examples.map(reader.plain)
    return BatchIterator(examples, batch_size, rows, workers, reader.is_remote)


def eval_batches(
    source: Any,
    *,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    workers: int = 0,
    rows: Sequence[int] | None = None,
    skip_log: str | None = None,
) -> 'BatchIterator':
    """Reads source[start:stop] once, in order, in full batches.

    Args:
      source: see train_batches.
      batch_size: the global batch size.
      start: first example.
      stop: one past the last example; None: the end of the source.
      workers: see train_batches.
      rows: see train_batches. The number of batches does not depend on them.
      skip_log: see train_batches.

    Returns:
      An iterator over dicts of arrays [n, ...], n the number of `rows`, with 'mask': bool [n], False for copies of the
      last example that fill the last batch, and for examples that replace an unreadable one. Close it when done.

    Raises:
      ValueError: an empty source, a range outside of it, a batch size below 1, or rows outside the batch.
    """
    rows = _checked_rows(rows, batch_size)
    reader = _Reader(source, skip_log)
    stop = len(source) if stop is None else stop
    if not 0 <= start <= stop <= len(source):
        raise ValueError(f'start={start}, stop={stop}: not a range within the {len(source)} examples of the source.')
    examples = grain.MapDataset.range(start, stop).map(reader.with_mask)
    return BatchIterator(examples, batch_size, rows, workers, reader.is_remote)


def read_next(batches: 'BatchIterator', received_signal: Callable[[], int]) -> dict[str, np.ndarray]:
    """Reads the next batch, even if a signal to the whole process group has ended the workers that were reading it.

    A preempted process still has to finish its step: other processes wait for its part of the batch.

    Args:
      batches: the iterator.
      received_signal: returns the signal that this process has received, or 0.

    Raises:
      StopIteration: there are no more batches.
    """
    try:
        return next(batches)
    except StopIteration:
        raise
    except Exception:
        if not received_signal():
            raise
    batches.fall_back_to_threads()
    return next(batches)


def read_all(batches: 'BatchIterator', received_signal: Callable[[], int]) -> Iterator[dict[str, np.ndarray]]:
    """Yields all batches that are left, each as `read_next`."""
    with contextlib.suppress(StopIteration):
        while True:
            yield read_next(batches, received_signal)


def read_skipped(skip_log: str) -> list[str]:
    """Returns the distinct names in a skip log, sorted; [] if nothing was skipped."""
    if not os.path.exists(skip_log):
        return []
    with open(skip_log, 'rb') as file:
        return sorted({names.from_line(line.removesuffix(b'\n')) for line in file})


class BatchIterator(grain.DatasetIterator):
    """Reads batches in order and ahead, in threads or worker processes.

    Reading starts with the first batch, or with start_prefetch().
    """

    def __init__(
        self,
        examples: grain.MapDataset,
        batch_size: int,
        rows: Sequence[int],
        workers: int = 0,
        is_remote: bool = False,
    ):
        """Batch k has examples[k * batch_size + row] for every row of `rows`; see `_Chunks`.

        Args:
          examples: dicts of arrays of fixed shapes and dtypes.
          batch_size: the global batch size.
          rows: indices of the rows of the global batch to read, int [n], ascending.
          workers: number of worker processes; 0 reads in threads.
          is_remote: whether reading an example waits for a network: then many are read at once.
        """
        super().__init__()
        self._examples, self._batch_size, self._rows = examples, batch_size, rows
        self._workers, self._is_remote = workers, is_remote
        self._next_batch = 0
        self._reading = None

    @functools.cached_property
    def _chunks(self) -> '_Chunks':
        return _Chunks(self._examples, self._batch_size, self._rows, self._is_remote)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._next_batch * self._batch_size >= len(self._examples):
            self._stop_reading()
            raise StopIteration
        try:
            self.start_prefetch()
            # Grain starts workers here, too.
            with worker_processes.block_stop_signals() if self._workers else contextlib.nullcontext():
                batch = self._assemble(self._reading)
        except Exception as error:
            self._stop_reading()  # The next call would continue in the middle of this batch.
            if self._workers and (message := worker_processes.failure(error, self._workers)):
                raise JobError(message) from error
            raise
        self._next_batch += 1
        return batch

    def peek(self) -> dict[str, np.ndarray]:
        """Reads the next batch in this thread, without workers; the iterator does not advance."""
        first = self._next_batch * self._chunks.per_batch
        return self._assemble(map(self._chunks.__getitem__, itertools.count(first)))

    def _assemble(self, chunks: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Joins the next chunks to a batch."""
        batch, filled = {}, 0
        while filled < len(self._rows):
            chunk = next(chunks)
            if not self._workers and self._chunks.per_batch == 1:
                return chunk  # of this process's own memory: nothing to join or to copy
            if not batch:
                batch = {name: np.empty((len(self._rows), *x.shape[1:]), x.dtype) for name, x in chunk.items()}
            count = len(next(iter(chunk.values())))
            # Copied from the workers' shared memory, which is scarce and must not outlive them.
            for name, values in chunk.items():
                batch[name][filled : filled + count] = values
            filled += count
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns {'next_batch': number of batches read}; the same on every process."""
        return {'next_batch': self._next_batch}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues where an iterator with this state would."""
        self._stop_reading()
        self._next_batch = state['next_batch']

    def start_prefetch(self) -> None:
        """Starts to read ahead."""
        if self._closed:
            raise ValueError('this iterator is closed')
        if self._reading is None:
            per_batch = self._chunks.per_batch
            remaining = grain.MapDataset.source(self._chunks)[self._next_batch * per_batch :]
            workers = min(self._workers, len(remaining))
            if workers and not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, which nobody parses in a notebook or a test.
            # At least one batch is read ahead, while the caller works on another one.
            threads, ahead = (1, 1) if workers else (_READ_THREADS, max(_READ_THREADS, per_batch))
            dataset = remaining.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
            buffer = max(_WORKER_BUFFER, -(-per_batch // max(workers, 1)))
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=buffer)
            with worker_processes.block_stop_signals() if workers else contextlib.nullcontext():
                self._reading = iter(dataset.mp_prefetch(options, worker_processes.prepare if workers else None))
                self._reading.start_prefetch()

    def fall_back_to_threads(self) -> None:
        """Continues in threads of this process, after a signal has ended its worker processes."""
        self._stop_reading()
        self._workers = 0

    def close(self) -> None:
        """Ends threads and worker processes."""
        self._stop_reading()
        self._closed = True

    def _stop_reading(self):
        if self._reading is not None:
            self._reading.close()
            self._reading = None
            if self._workers:
                gc.collect()  # Grain leaves its last batches in reference cycles, and with them shared memory.


class _Reader:
    """Reads examples by index, augmented if asked; replaces unreadable ones if source.on_error is 'skip'."""

    def __init__(self, source, skip_log: str | None, flip: bool = False, crop: bool = False):
        if not len(source):
            raise ValueError(f'the source {source} has no examples.')
        if (flip or crop) and not hasattr(source, 'read'):
            raise ValueError(f'flip={flip}, crop={crop}: {type(source).__name__} has no images to augment.')
        self._source, self.is_remote = source, getattr(source, 'is_remote', False)
        self._skip = getattr(source, 'on_error', 'raise') == 'skip'
        self._skip_log = skip_log
        self._flip = flip
        self._crop = crop
        self._logged = set()

    def plain(self, index: int) -> dict:
        return self.readable(index)[0]

    def with_mask(self, index: int) -> dict:
        example, as_asked = self.readable(index)
        return example | {'mask': np.bool_(as_asked)}

    def augmented(self, index: int, rng: np.random.Generator) -> dict:
        crop = random_crop(rng) if self._crop else None
        example = self.readable(index, crop)[0]
        if self._flip and rng.random() < 0.5:
            example['image'] = example['image'][:, ::-1]
        return example

    def readable(self, index: int, crop: tuple[float, tuple[float, float]] | None = None) -> tuple[dict, bool]:
        """Returns the first readable example at or after index (cyclic), and whether that is the one at index.

        `crop` is the zoom and offset of source.read.
        """
        count = len(self._source)
        for shift in range(count):
            candidate = (index + shift) % count
            try:
                if crop is None:
                    return self._source[candidate], shift == 0
                return self._source.read(candidate, *crop), shift == 0
            except UnreadableImage as error:
                if not self._skip:
                    raise
                self._log(error)
        name = names.printable(self._source.example_name(candidate))
        raise JobError(f'none of the {count} examples can be read; the last one: {name}.')

    def _log(self, error: UnreadableImage):
        if error.example_name in self._logged:
            return
        self._logged.add(error.example_name)
        print(f'data: skipped {names.printable(error.example_name)}: {error.reason}', file=sys.stderr, flush=True)
        if self._skip_log:
            os.makedirs(os.path.dirname(self._skip_log) or '.', exist_ok=True)  # nothing else may be there yet
            try:
                # One write to a file opened for appending is atomic, so that worker processes can share the file.
                with open(self._skip_log, 'ab', buffering=0) as file:
                    file.write(names.to_line(error.example_name) + b'\n')
            except OSError as failed:
                raise JobError(f'{self._skip_log} cannot be written: {failed.strerror}') from failed


class _Chunks:
    """Parts of batches, by number: the unit that a thread or a worker process reads; a source for grain.

    Every batch has the same number of chunks. A chunk has at most _CHUNK_BYTES, or one example. The last example fills
    the last batch; 'mask' is False there.
    """

    def __init__(self, examples: grain.MapDataset, batch_size: int, rows: Sequence[int], is_remote: bool):
        self._examples, self._batch_size, self._is_remote = examples, batch_size, is_remote
        example_bytes = sum(np.asarray(value).nbytes for value in examples[0].values())
        self.per_batch = -(-len(rows) // max(_CHUNK_BYTES // example_bytes, 1))
        self._rows = np.array_split(rows, self.per_batch)

    def __len__(self) -> int:
        batches = -(-len(self._examples) // self._batch_size)
        return min(batches * self.per_batch, sys.maxsize)  # the length of endless examples

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        batch, chunk = divmod(number, self.per_batch)
        wanted = batch * self._batch_size + self._rows[chunk]
        last = len(self._examples) - 1
        positions = np.minimum(wanted, last).tolist()
        read = _remote_pool().map if self._is_remote else map
        distinct = list(dict.fromkeys(positions))
        examples = dict(zip(distinct, read(self._examples.__getitem__, distinct), strict=True))
        arrays = {name: np.stack([examples[p][name] for p in positions]) for name in examples[positions[0]]}
        if 'mask' in arrays:
            arrays['mask'] &= wanted <= last
        return arrays


@functools.cache
def _remote_pool() -> concurrent.futures.ThreadPoolExecutor:
    """The threads of this process that wait for a network, for all chunks."""
    return concurrent.futures.ThreadPoolExecutor(_REMOTE_THREADS, 'remote')


def _checked_rows(rows: Sequence[int] | None, batch_size: int) -> list[int]:
    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size} must be positive.')
    rows = list(range(batch_size)) if rows is None else [int(row) for row in rows]
    if not rows or rows != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= batch_size:
        raise ValueError(f'rows={rows} must be some of 0 to {batch_size - 1}, ascending.')
    return rows
