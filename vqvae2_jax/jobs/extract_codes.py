"""--job=codes: every image of every split as codes, in shards that restart where they stopped (algorithm 2)."""

import time

import jax
import numpy as np

from vqvae2_jax.config import build as configs
from vqvae2_jax.data import codes as store
from vqvae2_jax.data.images import SPLITS
from vqvae2_jax.data.loader import eval_batches, read_all
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.distributed.preemption import exit_together, stop_signals
from vqvae2_jax.io import files
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.models.vqvae import map_shapes
from vqvae2_jax.tasks.task import to_float

_META, _STARTED = 'meta.json', 'started.json'


def extract(run: Run) -> None:
    """Writes codes/<split> for all splits that have images; finished shards are kept."""
    trained = workdir.load_vqvae(run)
    workdir.check_images(run, 'vqvae', trained.record)
    model = configs.make_vqvae(run.config)
    encoders = parallel.on_each_alone(lambda: _encoder(model, trained))
    with stop_signals() as stopped:
        for split in SPLITS:
            _extract_split(run, split, encoders, trained.digest, stopped)
        exit_together(stopped)


def _encoder(model, trained):
    variables = trained.on_devices()
    encode = jax.jit(lambda image: model.apply(variables, to_float(image), method='encode'))
    return lambda batch: encode(sharding.make_global_batch({'image': batch['image']})['image'])


def current_codes_digest(run: Run) -> str:
    """What the priors' training depends on: the codes of all splits, by their records; checked against stage 1.

    It covers what is in the codes and which images they are of.

    Raises:
      JobError: codes are missing. UpstreamChanged: they were made by another stage 1.
    """
    vqvae = workdir.vqvae_record(run)
    found = {}
    for split in SPLITS:
        directory = run.path('codes', split)
        if not (directory / _META).exists():
            raise workdir.JobError(f'{directory} holds no finished codes; {workdir.job_command("codes")}')
        meta = store.read_meta(directory)
        _check_vqvae(directory, meta.vqvae_digest, vqvae['digest'])
        found[split] = {'meta': meta.to_json(), 'images': _images_digest(directory)}
    return files.digest_json(found)


def check_images(run: Run, split: str) -> None:
    """Refuses codes of other images than those of the split now.

    Raises:
      UpstreamChanged: with both digests.
    """
    directory = run.path('codes', split)
    _check_images(directory, _images_digest(directory), run.images(split).digest)


def _images_digest(directory):
    path = directory / _STARTED
    return files.read_json(path).get('images_digest') if path.exists() else None


def _extract_split(run, split, encoders, digest, stopped):
    config, directory = run.config, run.path('codes', split)
    source = run.images(split)
    size = config.codes.shard_size
    shards = max(-(-len(source) // size), 1)
    started = {'vqvae': digest, 'shards': shards, 'shard_size': size}
    started |= {'images': len(source), 'images_digest': source.digest}
    _check_started(directory, started)
    done = set(store.finished_shards(directory, shards))
    # All see the same before files appear, whatever a shared file system may still show to one of them.
    finished = not processes.process_any(not (directory / _META).exists() or len(done) < shards)
    if processes.process_any(stopped() > 0):
        return
    if finished:
        print(f'codes {split}: done ({store.read_meta(directory).count} images)', flush=True)
        return
    if processes.is_main_process():
        files.write_json(directory / _STARTED, started)
    for shard in processes.shard_by_process(range(shards)):
        if shard in done:
            continue
        if stopped():
            break
        begin = time.perf_counter()
        limits = {'start': shard * size, 'stop': min((shard + 1) * size, len(source))}
        batches = eval_batches(source, batch_size=config.codes.batch_size, **limits, **run.reading())
        sizes = (config.vqvae.codebook_size,) * len(run.levels)
        encoded = _encoded(encoders, read_all(batches, stopped))
        count = store.write_shard(store.shard_path(directory, shard, shards), encoded, sizes)
        rate = f'{count / (time.perf_counter() - begin):.3g} images/s'
        print(f'codes {split}: shard {shard + 1} of {shards}, {count} images, {rate}', flush=True)
    stopping = processes.process_any(stopped() > 0)
    done = store.finished_shards(directory, shards)
    if stopping and len(done) < shards:
        print(f'codes {split}: {len(done)} of {shards} shards are done; the same command continues', flush=True)
    elif processes.is_main_process():
        _finish(run, source, split, shards, digest)


def _encoded(encoders, batches):
    for batch, codes in parallel.in_turn(encoders, batches):
        yield {
            **{f'codes_{level}': np.asarray(c) for level, c in enumerate(codes)},
            **{k: batch[k] for k in ('label', 'index', 'mask')},
        }


def _finish(run, source, split, shards, digest):
    config, directory = run.config, run.path('codes', split)
    meta = store.CodesMeta(
        shapes=map_shapes(config.data.image_size, config.vqvae.factors),
        codebook_sizes=(config.vqvae.codebook_size,) * len(run.levels),
        num_classes=config.data.num_classes,
        class_names=source.class_names,
        count=sum(store.count_records(store.shard_path(directory, shard, shards)) for shard in range(shards)),
        split=split,
        shards=shards,
        vqvae_digest=digest,
        version=files.package_version(),
    )
    store.write_meta(directory, meta)
    print(f'codes {split}: {meta.count} images in {directory}', flush=True)


def _check_started(directory, started):
    path = directory / _STARTED
    if not path.exists():
        return
    before = files.read_json(path)
    _check_vqvae(directory, before['vqvae'], started['vqvae'])
    _check_images(directory, before.get('images_digest'), started['images_digest'])
    workdir.check_same(
        f'the extraction in {directory}',
        before,
        started,
        f'Go back to those settings, or delete {directory} to extract anew.',
    )


def _check_images(directory, recorded, current):
    hint = f'Bring back those images, or delete {directory} to extract anew.'
    workdir.check_digests(f'{directory}', {'images': recorded}, {'images': current}, hint)


def _check_vqvae(directory, recorded, current):
    hint = f'Delete {directory.parent} and run --job=codes again, or restore the stage 1 that made it.'
    workdir.check_digests(f'{directory}', {'stage 1 (vqvae)': recorded}, {'stage 1 (vqvae)': current}, hint)
