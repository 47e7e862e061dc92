"""--job=sample: class-conditional samples from all priors, decoded, in resumable shards.

Sample i depends on the seed, i, its label and the settings of `sample`: not on the batch it is drawn in, on the count
or on the devices.
"""

import functools
import time
from collections.abc import Callable

import jax
import numpy as np

from vqvae2_jax.config import build as configs
from vqvae2_jax.data import samples
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.distributed.preemption import exit_together, stop_signals
from vqvae2_jax.io import files, plots
from vqvae2_jax.io.logging import format_duration
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.sampling.ancestral import sample_levels
from vqvae2_jax.tasks.task import to_uint8

DIRECTORY = 'samples'


def draw_samples(run: Run) -> None:
    """Draws what is missing of sample.count samples; each process draws its files on its own devices."""
    sample, directory = run.config.sample, run.path(DIRECTORY)
    meta = _meta(run)
    _check_started(directory, meta)
    ranges = samples.shard_ranges(sample.count, sample.batch_size)
    missing = [r for r in ranges if not samples.shard_path(directory, *r).exists()]
    # All see the same before files change, whatever a shared file system may still show to one of them.
    if not processes.process_any(bool(missing) or not _is_recorded(directory, meta)):
        print(f'sample: done ({sample.count} samples in {directory})', flush=True)
        return
    with stop_signals() as stopped:
        samplers = make_samplers(run)  # refuses before anything changes
        if processes.is_main_process():
            (directory / 'samples.png').unlink(missing_ok=True)  # written last: where it is, nothing is missing
            files.write_json(directory / 'meta.json', meta)
        _draw(run, samplers, directory, [r for r in processes.shard_by_process(ranges) if r in missing], stopped)
        exit_together(stopped)
    if processes.is_main_process():
        samples.remove_others(directory, ranges)
        _picture(run, directory)


def _draw(run, samplers, directory, missing, stopped):
    sample = run.config.sample
    begin, before = time.monotonic(), _seconds(directory)
    for number, (start, stop, arrays) in enumerate(_shards(run, samplers, missing), start=1):
        samples.write_npz(samples.shard_path(directory, start, stop), arrays)
        seconds = time.monotonic() - begin
        if processes.is_main_process():
            files.write_json(directory / 'time.json', {'seconds': round(before + seconds, 1)})
        left = format_duration(seconds / number * (len(missing) - number))
        rate = number * sample.batch_size * jax.process_count() / seconds
        print(f'sample  {stop}/{sample.count}  {rate:.3g} img/s  ETA {left}', flush=True)
        if stopped():
            print(f'{number} of {len(missing)} files written; the same command draws the rest', flush=True)
            break


def make_samplers(run: Run) -> list[Callable]:
    """{index, label: int32 [B]} -> (images uint8 [B, H, W, C], codes per level), for each of `meshes_alone`."""
    config = run.config
    with parallel.use(parallel.meshes_alone()[0]):
        model, decoder, modules, weights = workdir.load_generator(run, config.sample.get('dtype'))

    def make():
        held = jax.device_put((weights, decoder), sharding.replicated_sharding())
        draw = functools.partial(compiled_draw(config, model, modules), *held, make_all_sampling_params(config))

        def sampler(batch):
            batch = sharding.make_global_batch(batch)
            return draw(batch['index'], batch['label'])

        return sampler

    return parallel.on_each_alone(make)


def compiled_draw(config, model, modules):
    """A jitted (priors' weights, decoder's collections, controls, index, label) -> as `make_samplers` says."""
    whole, split = sharding.replicated_sharding(), sharding.batch_sharding(config.sample.batch_size)
    key = jax.random.key(config.sample.seed)

    def draw(weights, decoder, controls, index, label):
        label = label if config.data.num_classes else None
        codes = sample_levels(modules, weights, key, index, label, controls)
        return to_uint8(model.apply(decoder, codes, method='decode')), codes

    # All of stage 1 lies on the devices, so it counts in what a plan says of memory.
    return jax.jit(draw, in_shardings=(whole, whole, whole, split, split), out_shardings=split, keep_unused=True)


def make_all_sampling_params(config):
    """How the codes of each level are drawn, finest first."""
    return tuple(configs.make_sampling_params(config, name) for name in configs.level_names(config.vqvae.factors))


def sample_labels(config, index: np.ndarray) -> np.ndarray:
    """Labels int32 [B] of samples `index`: sample.labels in turn, or all classes in turn."""
    choices = np.asarray(config.sample.labels or range(max(config.data.num_classes, 1)), np.int32)
    return choices[index % len(choices)]


def _shards(run, samplers, ranges):
    """(start, stop, arrays) of every range; while the caller writes one, the devices draw the next."""
    batches = (_batch(run.config, start) for start, _ in ranges)
    for (start, stop), (batch, drawn) in zip(ranges, parallel.in_turn(samplers, batches), strict=True):
        images, codes = jax.device_get(drawn)
        arrays = {'arr_0': images, 'label': batch['label'], 'index': batch['index'].astype(np.int64)}
        arrays |= {f'codes_{level}': c for level, c in enumerate(codes)}
        yield start, stop, {name: a[: stop - start] for name, a in arrays.items()}


def _batch(config, start):
    # The last shard may be smaller than a batch; drawing past the end keeps one compiled program.
    index = np.arange(start, start + config.sample.batch_size, dtype=np.int32)
    return {'index': index, 'label': sample_labels(config, index)}


def _meta(run):
    sample = run.config.sample
    return {
        'schema': 1,
        'count': sample.count,
        'batch_size': sample.batch_size,
        'seed': sample.seed,
        'labels': list(sample.labels),
        **configs.controls(run.config),
        'dtype': sample.get('dtype', ''),
        'num_classes': run.config.data.num_classes,
        'upstream': workdir.generator_digests(run),
        'version': files.package_version(),
    }


def _check_started(directory, meta):
    if not (directory / 'meta.json').exists():
        return
    before = samples.read_meta(directory)
    hint = f'Give another --workdir, go back to those settings, or delete {directory} to draw anew.'
    workdir.check_digests(f'the samples in {directory}', before['upstream'], meta['upstream'], hint)
    if meta['count'] < before['count']:  # else samples beyond the new count would stay in the folder
        raise workdir.JobError(
            f'{directory} is a set of {before["count"]} samples, more than sample.count={meta["count"]}: '
            f'set --config.sample.count={before["count"]}, or delete {directory} to draw anew'
        )
    fields = set(meta) - {'schema', 'count', 'upstream', 'version'}  # the count may grow
    what = f'the set of samples in {directory}'
    workdir.check_same(what, {k: before.get(k) for k in fields}, {k: meta[k] for k in fields}, hint)


def _is_recorded(directory, meta) -> bool:
    if not all((directory / name).exists() for name in ('meta.json', 'samples.png')):
        return False
    return samples.digest(directory) == samples.digest_meta(meta)


def _seconds(directory) -> float:
    path = directory / 'time.json'
    return files.read_json(path)['seconds'] if path.exists() else 0.0


def _picture(run, directory):
    """samples.png: ten samples of each of the first ten labels, a row each."""
    count = run.config.sample.count
    labels = sample_labels(run.config, np.arange(count))
    grid = samples.take(directory, grid_positions(labels, np.arange(count)))['arr_0']
    picture = plots.image_grid(grid, columns=10, scale=plots.visible_scale(grid))
    plots.save_png(directory / 'samples.png', picture)
    print(f'sample: {count} samples in {directory}; look at {directory / "samples.png"}', flush=True)


def grid_positions(labels: np.ndarray, order: np.ndarray, rows: int = 10, columns: int = 10) -> np.ndarray:
    """Which samples make a grid: a row of `columns` for each of the first labels [N], in the order given.

    Where a label is the only one, or has too few samples to fill its row, the first of `order` in turn.
    """
    by_label = [order[labels[order] == label][:columns] for label in np.unique(labels)[:rows]]
    if len(by_label) == 1 or min(len(row) for row in by_label) < columns:
        return order[: rows * columns]
    return np.concatenate(by_label)
