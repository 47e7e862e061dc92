"""--job=extract_codes: encodes every image of every split, in shards; a restart continues (VQ-VAE-2, algorithm 2).

The training split also has the codes of its images cropped (codes.crops) and mirrored (codes.flip), after the others.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from vqvae2_jax import api
from vqvae2_jax.data import codes as store
from vqvae2_jax.data.images import SPLITS, ImageSource
from vqvae2_jax.data.shards import ShardWriter, shard_ranges
from vqvae2_jax.distributed import processes
from vqvae2_jax.distributed.batches import map_missing
from vqvae2_jax.distributed.preemption import Interrupted, exit_together, stop_signals
from vqvae2_jax.io import record
from vqvae2_jax.io.record import JobError, Record
from vqvae2_jax.jobs import code_inputs, feature_store, train, workdir
from vqvae2_jax.jobs.workdir import Run

LMDB = 'lmdb'  # the input of codes that --job=import has read


def extract_codes(run: Run) -> None:
    """Writes codes/<split> for all splits; finished shards are kept.

    Raises:
      JobError: stage 1 or images are missing, or an import of codes is not finished.
      StaleInputError: stage 1 was trained on other images, or existing codes are those of other weights or images.
      SettingsChangedError: existing codes were extracted with other settings.
      Interrupted: a stop signal came; the same command continues.
    """
    if _are_imported(run):
        return
    trained = workdir.load_trained(run, 'vqvae')
    stage1 = trained.record
    hint = f'delete {stage1.directory} to train it again'
    record.check_inputs(stage1.directory, stage1.inputs, train.inputs(run, 'vqvae'), hint)
    outputs = {split: _open_output(run, split) for split in SPLITS}  # any refusal comes before the work
    counts = ', '.join(f'{split} {len(_images(run, split))}' for split in SPLITS)
    run.print_start(store.JOB, f'{counts} images', parameters=workdir.num_parameters(trained.params), batch='codes')
    with jax.set_mesh(run.mesh):
        generator = workdir.load_generator(run, with_priors=False)

    def encode(batch):
        return store.name_levels(api.encode(generator, batch['image']))

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

    Returns:
      The digests by name; for imported codes with that of their database, as their record has it.

    Raises:
      JobError: stage 1 or images are missing.
    """
    digests = {'vqvae': workdir.trained_record(run, 'vqvae').digest, 'images': run.images(split).digest}
    output = record.read_if_sound(run.path('codes', split))
    return digests | ({LMDB: output.inputs[LMDB]} if output and LMDB in output.inputs else {})


def _are_imported(run: Run) -> bool:
    """Returns whether the codes were imported, and says so; refuses them if some are missing."""

    def read():
        records = [record.read_if_sound(run.path('codes', split)) for split in SPLITS]
        return [output.state if output and output.job == workdir.IMPORT else None for output in records]

    states = processes.run_on_main_process(read)
    if not any(states):
        return False
    if states != [record.DONE] * len(SPLITS):
        raise JobError(
            f'the import of codes to {run.path("codes")} is not finished: the same command with --job=import '
            'continues it. To extract codes instead, delete that directory'
        )
    counts = ', '.join(f'{split} {codes.results["count"]}' for split, codes in code_inputs.codes_records(run).items())
    print(f'codes: done (imported: {counts})', flush=True)
    return True


def _open_output(run: Run, split: str) -> Record:
    return run.open_output(run.path('codes', split), store.JOB, inputs(run, split), settings(run, split))


def _extract_split(run: Run, split: str, output: Record, encode: Callable, received_signal: Callable[[], int]) -> None:
    source, directory = _images(run, split), output.directory
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
    meta = processes.run_on_main_process(lambda: finish(output, source.class_names, list(paths.values())))
    print(f'codes {split}: {meta.count} images in {directory}', flush=True)


def settings(run: Run, split: str) -> dict[str, Any]:
    """Returns the settings in the record of codes/<split>."""
    return {
        'split': split,
        'shard_size': run.config.codes.shard_size,
        **{name: getattr(run.code_spec, name) for name in ('shapes', 'codebook_sizes', 'num_classes')},
        **{name: run.config.codes[name] for name in ('crops', 'flip') if split == 'train' and run.config.codes[name]},
    }


def views_per_image(settings: Mapping[str, Any]) -> int:
    """Returns how many records of codes an image has, given `settings`: one of itself, then those of augmentation."""
    return (1 + settings.get('crops', 0)) * (1 + settings.get('flip', False))


def _images(run, split) -> ImageSource:
    images, fields = run.images(split), run.config.codes
    return dataclasses.replace(images, crops=fields.crops, with_mirrored=fields.flip) if split == 'train' else images


def finish(output: Record, class_names: tuple[str, ...], paths: list[epath.Path]) -> store.CodesMeta:
    """Records a split whose shards are all written."""
    settings = {name: output.settings[name] for name in ('shapes', 'codebook_sizes', 'num_classes', 'split')}
    count = sum(store.count_records(path) for path in paths)
    meta = store.CodesMeta(**settings, class_names=class_names, count=count, shards=len(paths))
    output.finish(dataclasses.asdict(meta))
    return meta
