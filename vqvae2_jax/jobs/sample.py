"""--job=sample: class-conditional samples from all priors, decoded if there is a stage 1, in shards.

A restart continues.

Sample i depends on the seed, i, its label and the settings of `sample`, not on its batch, the count or the devices.
"""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from vqvae2_jax import api
from vqvae2_jax.config import build
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.codes import name_levels
from vqvae2_jax.data.shards import Range, ShardWriter, shard_ranges
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.distributed.batches import map_missing
from vqvae2_jax.distributed.preemption import exit_together, stop_signals
from vqvae2_jax.io import plots, record
from vqvae2_jax.io.progress import Progress
from vqvae2_jax.io.record import JobError, Record
from vqvae2_jax.jobs import class_labels, workdir
from vqvae2_jax.jobs.workdir import SAMPLES, Run

PICTURE = 'samples.png'


def draw_samples(run: Run) -> None:
    """Draws the missing ones of sample.count samples into samples/<sample.name>.

    Raises:
      JobError: networks are missing, or the set already has more samples.
      StaleInputError: the set was sampled from other networks.
      SettingsChangedError: the set was sampled with other settings.
      Interrupted: a stop signal came; the same command continues.
    """
    class_labels.resolve_sample_labels(run)
    count, directory = run.config.sample.count, run.sample_set_path(SAMPLES)
    hint = (
        'Set --config.sample.name=OTHER to keep both, go back to the recorded settings, '
        f'or delete {directory} to draw the samples again.'
    )
    output = run.open_output(directory, 'sample', workdir.generator_digests(run), _settings(run), hint=hint)
    ranges = shard_ranges(count, run.config.sample.shard_size)
    stored = sample_store.stored_count(output)
    if count < stored:  # else samples beyond the new count would stay in the directory
        raise JobError(
            f'{directory} is a set of {stored} samples, more than sample.count={count}: '
            f'set --config.sample.count={stored}, or delete {directory} to draw the samples again'
        )
    missing = sample_store.missing_shards(output, ranges)
    if output.state == record.DONE and output.results['count'] == count and PICTURE in output.files:
        print(f'sample: done ({count} samples in {directory})', flush=True)
        return
    with run.lock(directory, output.job, output), stop_signals() as received_signal:
        if missing:
            _draw_shards(run, output, missing, received_signal)
            exit_together(received_signal)
        processes.run_on_main_process(lambda: _finish(run, output, ranges))
    print(f'sample: {count} samples in {directory}; they are shown in {directory / PICTURE}', flush=True)


def _settings(run):
    sample = run.config.sample
    return {
        'seed': sample.seed,
        'labels': list(sample.labels),
        **build.sampling_settings(run.config),
        'dtype': sample.dtype,
        'num_classes': run.code_spec.num_classes,
        'shard_size': sample.shard_size,
    }


def _draw_shards(run: Run, output: Record, missing: Sequence[Range], received_signal: Callable[[], int]) -> None:
    """Writes the missing files, until a stop signal comes."""
    batch_size, total = run.batch_size('sample'), sum(stop - start for start, stop in missing)
    begin, before = time.monotonic(), output.seconds

    def write(shard, arrays):
        images = {'arr_0': arrays['image']} if 'image' in arrays else {}
        arrays = images | {k: v for k, v in arrays.items() if k not in ('image', 'index')}
        arrays['index'] = np.arange(*shard, dtype=np.int64)
        path = sample_store.shard_path(output.directory, *shard)
        sample_store.write_npz(path, arrays)
        output.add_files(path.name, seconds=before + time.monotonic() - begin)

    writer = ShardWriter(missing, lambda *args: processes.run_on_main_process(lambda: write(*args)))
    with jax.set_mesh(run.mesh):
        generator = workdir.load_generator(run, run.config.sample.dtype)  # it refuses before any file changes
        run.print_start('sample', f'{total} samples', parameters=workdir.generator_size(generator), batch='sample')
        processes.run_on_main_process(lambda: _start(output))
        written, progress = 0, Progress('sample', total)
        rows = sharding.process_local_rows(batch_size)

        def open_batches(start, stop):
            for first in range(start, stop, batch_size):
                index = first + rows
                yield {
                    'index': index.astype(np.int32),
                    'label': sample_labels(run.config.sample.labels, run.code_spec.num_classes, index),
                }

        results = map_missing(make_sampler(run, generator), missing, open_batches, batch_size, run.config.sample.count)
        for number, (start, arrays) in enumerate(results, start=1):
            written += writer.add(start, arrays)
            progress.update(min(number * batch_size, total))
            if processes.process_any(bool(received_signal())):
                print(f'sample: {written} of {len(missing)} files written; the same command continues', flush=True)
                break


def make_sampler(run: Run, generator: api.Generator) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """Returns {'index': int32 [B], 'label': int32 [B]} -> {'image': uint8 [B, H, W, C], 'codes_l': int32 [B, ...]}.

    Without stage 1 there is no 'image'.
    """
    seed, settings = run.config.sample.seed, build.sampling_arguments(run.config)
    keys_of = jax.jit(lambda index: api.sample_keys(jax.random.key(seed), index))

    def sample(batch):
        images, codes = api.sample(generator, keys_of(batch['index']), batch['label'], **settings)
        return ({} if images is None else {'image': images}) | name_levels(codes)

    return sample


def sample_labels(labels: Sequence[int], num_classes: int, index: np.ndarray) -> np.ndarray:
    """Returns labels int32 [B] of samples `index`: those of sample.labels, or else all classes, round-robin."""
    choices = np.asarray(labels or range(max(num_classes, 1)), np.int32)
    return choices[index % len(choices)]


def _start(output):
    output.files.pop(PICTURE, None)  # it is not that of the larger set
    output.start()


def _finish(run: Run, output: Record, ranges: Sequence[Range]) -> None:
    """Writes samples.png, ten samples of each of the first ten labels, and the record."""
    count, directory = run.config.sample.count, output.directory
    sample_store.remove_others(output, ranges)
    output.finish({'count': count})
    labels = sample_labels(run.config.sample.labels, run.code_spec.num_classes, np.arange(count))
    grid = images_or_codes(run, sample_store.take(directory, grid_positions(labels, np.arange(count))))
    plots.save_png(directory / PICTURE, plots.image_grid(grid, columns=10, scale=plots.visible_scale(grid)))
    output.add_files(PICTURE)


def images_or_codes(run: Run, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the images of some samples, or a drawing of their codes, uint8 [N, H, W, C]."""
    if 'arr_0' in arrays:
        return arrays['arr_0']
    levels = [arrays[f'codes_{level}'] for level in range(len(run.levels))]
    return plots.draw_codes(levels, run.code_spec.codebook_sizes)


def grid_positions(labels: np.ndarray, order: np.ndarray, rows: int = 10, columns: int = 10) -> np.ndarray:
    """Returns which samples a grid of pictures shows: a row of each of the first classes.

    Args:
      labels: int [N], of all samples.
      order: int [M], indices of samples, the first ones are preferred.
      rows: number of classes.
      columns: number of samples per class.

    Returns:
      int [at most rows * columns], indices of samples. If there is only one class, or one has too few samples to fill
      its row, they are the first of `order`.
    """
    by_label = [order[labels[order] == label][:columns] for label in np.unique(labels)[:rows]]
    if len(by_label) == 1 or min(len(row) for row in by_label) < columns:
        return order[: rows * columns]
    return np.concatenate(by_label)
