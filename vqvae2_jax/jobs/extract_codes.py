"""--job=extract_codes: encodes every image of every split, in shards; a restart continues (VQ-VAE-2, algorithm 2)."""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
from etils import epath

from vqvae2_jax import inference
from vqvae2_jax.config import build
from vqvae2_jax.data import codes as store
from vqvae2_jax.data.images import SPLITS
from vqvae2_jax.data.shards import ShardWriter, shard_ranges
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.distributed.batches import map_missing
from vqvae2_jax.distributed.preemption import Interrupted, exit_together, stop_signals
from vqvae2_jax.io import record
from vqvae2_jax.io.record import Record
from vqvae2_jax.jobs import feature_store, train, workdir
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.models.vqvae import map_shapes


def extract_codes(run: Run) -> None:
    """Writes codes/<split> for all splits; finished shards are kept.

    Raises:
      JobError: stage 1 or images are missing.
      StaleInputError: stage 1 was trained on other images, or existing codes are those of other weights or images.
      SettingsChangedError: existing codes were extracted with other settings.
      Interrupted: a stop signal came; the same command continues.
    """
    trained = workdir.load_trained(run, 'vqvae')
    stage1 = trained.record
    hint = f'delete {stage1.directory} to train it again'
    record.check_inputs(stage1.directory, stage1.inputs, train.inputs(run, 'vqvae'), hint)
    outputs = {split: _open_output(run, split) for split in SPLITS}  # any refusal comes before the work
    counts = ', '.join(f'{split} {len(run.images(split))}' for split in SPLITS)
    run.print_start(store.JOB, f'{counts} images', parameters=workdir.num_parameters(trained.params), batch='codes')
    with jax.set_mesh(run.mesh):
        encode = functools.partial(
            inference.make_encode_fn(build.make_vqvae(run.config)), sharding.put_sharded(trained.variables)
        )
    with stop_signals() as received_signal:
        for split, output in outputs.items():
            if output.state == record.DONE:
                print(f'codes {split}: done ({output.results["count"]} images in {output.directory})', flush=True)
                continue
            with run.lock(output.directory, output.job, output):
                _extract_split(run, split, output, encode, received_signal)
            exit_together(received_signal)


def inputs(run: Run, split: str) -> dict[str, str]:
    """Returns the current digests of the inputs of codes/<split>.

    Raises:
      JobError: stage 1 or images are missing.
    """
    return {'vqvae': workdir.trained_record(run, 'vqvae').digest, 'images': run.images(split).digest}


def _open_output(run: Run, split: str) -> Record:
    return run.open_output(run.path('codes', split), store.JOB, inputs(run, split), _settings(run, split))


def _extract_split(run: Run, split: str, output: Record, encode: Callable, received_signal: Callable[[], int]) -> None:
    source, directory = run.images(split), output.directory
    ranges = shard_ranges(len(source), output.settings['shard_size'])
    paths = {shard: store.shard_path(directory, number, len(ranges)) for number, shard in enumerate(ranges)}
    missing = [shard for shard, path in paths.items() if path.name not in output.files]
    processes.run_on_main_process(output.start)
    begin, before, written = time.monotonic(), output.seconds, 0

    def write(shard, examples):
        store.write_shard(paths[shard], [examples], tuple(output.settings['codebook_sizes']))
        output.add_files(paths[shard].name, seconds=before + time.monotonic() - begin)

    writer = ShardWriter(missing, lambda *args: processes.run_on_main_process(lambda: write(*args)))
    read = functools.partial(
        feature_store.read_batches, run, source, f'codes {split}', received_signal, section='codes'
    )
    try:
        with jax.set_mesh(run.mesh):
            for start, arrays in map_missing(encode, missing, read, run.batch_size('codes'), len(source)):
                written += writer.add(start, arrays)
    except Interrupted:
        print(f'codes {split}: {written} of {len(missing)} shards written; the same command continues', flush=True)
        raise
    meta = processes.run_on_main_process(lambda: _finish(output, source.class_names, list(paths.values())))
    print(f'codes {split}: {meta.count} images in {directory}', flush=True)


def _settings(run, split):
    config = run.config
    return {
        'split': split,
        'shard_size': config.codes.shard_size,
        'shapes': map_shapes(config.data.image_size, config.vqvae.downsample_factors),
        'codebook_sizes': [config.vqvae.codebook_size] * len(run.levels),
        'num_classes': config.data.num_classes,
    }


def _finish(output: Record, class_names: tuple[str, ...], paths: list[epath.Path]) -> store.CodesMeta:
    """Records a split whose shards are all written."""
    settings = {name: output.settings[name] for name in ('shapes', 'codebook_sizes', 'num_classes', 'split')}
    count = sum(store.count_records(path) for path in paths)
    meta = store.CodesMeta(**settings, class_names=class_names, count=count, shards=len(paths))
    output.finish(dataclasses.asdict(meta))
    return meta
