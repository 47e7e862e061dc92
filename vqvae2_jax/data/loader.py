"""Batches from any random-access source of flat dicts of arrays: images, or codes.

Batch number k is a pure function of (source, seed, k). So an iterator's whole state is the number of batches it has
handed out, and a restored one continues exactly, even with another number of worker processes. Nor does the global
batch depend on the number of processes (hosts): process p of P gets its rows [p*b, (p+1)*b), b = batch_size / P.

Unreadable examples (source.on_error == 'skip') do not shift this: each is replaced by the next readable one, which in
training means that a neighbour is seen once more, and in evaluation is masked out.
"""

import gc
import os
import signal

import grain
import numpy as np
from absl import flags, logging

from vqvae2_jax.data.decode import CROP_ZOOM, UnreadableImage

_READ_THREADS = 4  # Decoding releases the GIL, so a few threads help even without worker processes.
_WORKER_BUFFER = 2  # Batches that each worker process holds ready.


def train_batches(
    source,
    *,
    batch_size: int,
    seed: int,
    flip: bool = False,
    crop: bool = False,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    skip_log: str | None = None,
) -> 'BatchIterator':
    """Endless batches, reshuffled every epoch; an epoch's end does not end a batch.

    Args:
      source: has __len__, and __getitem__ that returns a dict of arrays or scalars of fixed shapes and dtypes.
      batch_size: the global one.
      seed: of shuffling and augmentation.
      flip: mirror half of the images.
      crop: crop each image at a random place (source.read, see decode.CROP_ZOOM).
      workers: grain worker processes; 0 reads in threads.
      process_index, process_count: which rows of the global batch are wanted.
      skip_log: file that the names of unreadable examples are appended to; see read_skipped.

    Returns:
      A grain.DatasetIterator over dicts of arrays [batch_size / process_count, ...]. get_state() is a JSON-able dict to
      go on from. Close it when done if workers > 0.

    Raises:
      ValueError: an empty source, a batch size that does not divide, or augmentation of a source without images.
    """
    rows = _local_rows(batch_size, process_index, process_count)
    reader = _Reader(source, skip_log, flip, crop)
    examples = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    # Augmentation is drawn by position in the endless sequence, hence anew in each epoch.
    examples = examples.random_map(reader.augmented) if flip or crop else examples.map(reader.plain)
    local_batches = examples.batch(rows, drop_remainder=True, batch_fn=_stack)
    return BatchIterator(local_batches[process_index::process_count], workers)


def eval_batches(
    source,
    *,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    skip_log: str | None = None,
) -> 'BatchIterator':
    """source[start:stop] once, in order, in batches that are all full.

    Args:
      source: as in train_batches.
      batch_size: the global one.
      start: first example.
      stop: one past the last example; None is the end of the source.
      workers, process_index, process_count, skip_log: as in train_batches. Every process yields equally many batches.

    Returns:
      An iterator over dicts of arrays [batch_size / process_count, ...] with 'mask': bool [batch_size / process_count],
      False where an example was repeated to fill the last batch, or stands in for an unreadable one.

    Raises:
      ValueError: an empty source, a range outside of it, or a batch size that does not divide.
    """
    rows = _local_rows(batch_size, process_index, process_count)
    reader = _Reader(source, skip_log)
    stop = len(source) if stop is None else stop
    if not 0 <= start <= stop <= len(source):
        raise ValueError(f'start={start}, stop={stop}: not a range within the {len(source)} examples of the source.')
    batches = _EvalBatches(reader, start, stop, batch_size, slice(process_index * rows, (process_index + 1) * rows))
    return BatchIterator(grain.MapDataset.source(batches), workers)


def read_skipped(skip_log: str) -> list[str]:
    """The distinct names in a skip log, sorted; [] if nothing was skipped."""
    if not os.path.exists(skip_log):
        return []
    with open(skip_log, encoding='utf-8', errors='surrogateescape') as file:
        return sorted(set(file.read().splitlines()))


class BatchIterator(grain.DatasetIterator):
    """Hands out the batches of a MapDataset in order, read ahead by threads or worker processes.

    Reading starts with the first batch, or start_prefetch().
    """

    def __init__(self, batches: grain.MapDataset, workers: int = 0):
        super().__init__()
        self._batches = batches
        self._workers = workers
        self._next_batch = 0
        self._reading = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._next_batch >= len(self._batches):
            self._stop_reading()
            raise StopIteration
        self.start_prefetch()
        batch = next(self._reading)
        self._next_batch += 1
        if self._workers:  # Out of the workers' shared memory, which is scarce and must not outlive them.
            batch = {name: np.array(values) for name, values in batch.items()}
        return batch

    def get_state(self) -> dict[str, int]:
        """{'next_batch': how many batches were handed out}; the same on every process."""
        return {'next_batch': self._next_batch}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues after the batches counted by `state`."""
        self._stop_reading()
        self._next_batch = state['next_batch']

    def start_prefetch(self) -> None:
        if self._closed:
            raise ValueError('this iterator is closed')
        if self._reading is None:
            remaining = self._batches[self._next_batch :]
            workers = min(self._workers, len(remaining))
            threads = 1 if workers else _READ_THREADS
            if workers and not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, which nobody parses in a notebook or a test.
            dataset = remaining.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_WORKER_BUFFER)
            self._reading = iter(dataset.mp_prefetch(options, _leave_ctrl_c_to_the_parent if workers else None))
            self._reading.start_prefetch()

    def without_workers(self) -> None:
        """Goes on reading in threads of this process, for when its worker processes were ended."""
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


def _leave_ctrl_c_to_the_parent(worker: int, workers: int):
    """Run in each worker process: a terminal sends Ctrl-C to all, but the parent still has to save and to close them.

    SIGTERM is not ignored, as Python ends daemonic processes by it when it exits, and then waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Reader:
    """Reads examples by index, augmented if asked, standing in for unreadable ones if the source says to skip them."""

    def __init__(self, source, skip_log: str | None, flip: bool = False, crop: bool = False):
        if not len(source):
            raise ValueError(f'the source {source} has no examples.')
        if (flip or crop) and not hasattr(source, 'read'):
            raise ValueError(f'flip={flip}, crop={crop}: {type(source).__name__} has no images to augment.')
        self._source = source
        self._skip = getattr(source, 'on_error', 'raise') == 'skip'
        self._skip_log = skip_log
        self._flip = flip
        self._crop = crop
        self._logged = set()

    def plain(self, index: int) -> dict:
        return self.readable(index)[0]

    def augmented(self, index: int, rng: np.random.Generator) -> dict:
        crop = (rng.uniform(1, CROP_ZOOM), tuple(rng.random(2))) if self._crop else None
        example = self.readable(index, crop)[0]
        if self._flip and rng.random() < 0.5:
            example['image'] = example['image'][:, ::-1]
        return example

    def readable(self, index: int, crop: tuple[float, tuple[float, float]] | None = None) -> tuple[dict, bool]:
        """The first readable example at or after index (cyclic), and whether that is the one at index.

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
        raise ValueError(f'none of the {count} examples can be read; the last one: {self._source.where(candidate)}.')

    def _log(self, error: UnreadableImage):
        if error.where in self._logged:
            return
        self._logged.add(error.where)
        logging.warning('skipping %s: %s', error.where, error.reason)
        if self._skip_log:
            line = error.where.replace('\n', ' ') + '\n'
            # One write to a file opened for appending is atomic, so that worker processes can share the file.
            with open(self._skip_log, 'ab', buffering=0) as file:
                file.write(line.encode('utf-8', 'surrogateescape'))


class _EvalBatches:
    """The full batches over examples start..stop as a random-access sequence; of each only the rows `local`."""

    def __init__(self, reader: _Reader, start: int, stop: int, batch_size: int, local: slice):
        self._reader = reader
        self._range = range(start, stop)
        self._batch_size = batch_size
        self._local = local

    def __len__(self) -> int:
        return -(-len(self._range) // self._batch_size)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        wanted = self._range[number * self._batch_size :][self._local]
        read = [self._reader.readable(index) for index in wanted] or [self._reader.readable(self._range[-1])]
        rows = self._local.stop - self._local.start
        examples = [example for example, _ in read] + [read[-1][0]] * (rows - len(read))
        mask = np.zeros(rows, bool)
        mask[: len(wanted)] = [as_asked for _, as_asked in read][: len(wanted)]
        return _stack(examples) | {'mask': mask}


def _stack(examples: list[dict]) -> dict[str, np.ndarray]:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _local_rows(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f'batch_size={batch_size} must be a positive multiple of process_count={process_count}.')
    if not 0 <= process_index < process_count:
        raise ValueError(f'process_index={process_index} must be in [0, {process_count}).')
    return batch_size // process_count
