"""Features of images in shards below features/<extractor>/: extracted once, continued after a stop, reused by digest.

A directory holds a record, files features-START-STOP.npz, and statistics.npz. A file has N images. Row r is the images
themselves, or their reconstructions from some of the levels.

    features_r  float32 [N, D]
    logits_r    float32 [N, S], if the network has them
    label       int32 [N]
    mask        bool [N], false for images that cannot be read

statistics.npz holds `count`, and `mean_r` [D] and `scatter_r` [D, D] of all images (see metrics/frechet.py).
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import os
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath

from vqvae2_jax.config import build as configs
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.arrays import ArraysDataset
from vqvae2_jax.data.codes import CodeSource
from vqvae2_jax.data.images import ImageSource
from vqvae2_jax.data.loader import eval_batches, read_all
from vqvae2_jax.data.shards import Range, ShardWriter, shard_ranges
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.distributed.batches import map_missing
from vqvae2_jax.distributed.preemption import exit_together
from vqvae2_jax.evaluation import features
from vqvae2_jax.evaluation.features import MAX_STORED_FEATURES, FeatureExtractor, FeatureStats
from vqvae2_jax.evaluation.reconstruction import make_reconstruct_fn
from vqvae2_jax.io import files, gcs, record
from vqvae2_jax.io.progress import Progress
from vqvae2_jax.io.record import JobError, Record
from vqvae2_jax.jobs import train, workdir
from vqvae2_jax.jobs.workdir import SAMPLES, Run
from vqvae2_jax.metrics.frechet import Moments

DIRECTORY = 'features'
SHARD_SIZE = 1024  # images
IMAGES = 'images'  # the row of images that are not reconstructed
_STATISTICS = 'statistics.npz'


def load_inception(run: Run) -> FeatureExtractor:
    """Loads the Inception network of evaluate.inception.

    Raises:
      JobError: the weights cannot be read, or belong to another network.
    """
    try:
        return features.load_inception(run.config.evaluate.inception)
    except (OSError, ValueError, ImportError) as error:
        raise JobError(f'evaluate.inception: {error}') from error


def load_classifier(run: Run) -> FeatureExtractor:
    """Loads the classifier that scores samples: reject.classifier, or else the run's own.

    Raises:
      JobError: it is missing, or has other classes.
    """
    if not (path := run.config.reject.classifier):
        return load_own_classifier(run, 'classifier', 'classifier')
    try:
        return features.load_classifier(path, run.config.data.num_classes)
    except (OSError, ValueError, ImportError) as error:
        raise JobError(f'reject.classifier: {error}') from error


def load_own_classifier(run: Run, directory: str, job: str) -> FeatureExtractor:
    """Loads a classifier that this run has trained; raises as `workdir.load_trained`."""
    trained = workdir.load_trained(run, directory, job, 'classifier')
    return features.classifier_extractor(configs.make_classifier(run.config), trained.params, trained.digest)


def classifier_digest(run: Run) -> str:
    """Returns the digest of the weights of `load_classifier`; raises as that."""
    if run.config.reject.classifier:
        return load_classifier(run).digest
    return workdir.trained_record(run, 'classifier', 'classifier', 'classifier').digest


def open_samples(run: Run, set_name: str, indices: np.ndarray | None = None) -> ImageSource:
    """Opens the images and labels of a finished sample set, or some of them.

    Args:
      run: the run.
      set_name: of the set.
      indices: int [M], ascending; None: all.

    Raises:
      JobError: the set is not finished.
    """
    directory, data = run.path(SAMPLES, set_name), run.config.data
    sample_store.shard_paths(directory)  # it refuses a set that lacks files
    folder = str(directory) if gcs.is_remote(directory) else glob.escape(str(directory))
    pattern = gcs.local_copy(os.path.join(folder, 'samples-*.npz'), sample_store.read_set(directory).digest)
    dataset = ArraysDataset(pattern, data.num_classes)
    indices = np.arange(len(dataset)) if indices is None else indices
    return ImageSource(dataset, indices, tuple(data.image_size), data.channels)


def read_batches(
    run: Run,
    source: ImageSource | CodeSource,
    name: str,
    stopped: Callable[[], int],
    start: int = 0,
    stop: int | None = None,
    *,
    section: str = 'evaluate',
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the process-local rows of batches of <section>.batch_size, and prints progress.

    Call it inside `jax.set_mesh`, on all processes together.

    Args:
      run: the run.
      source: images or codes.
      name: of the phase, for the log.
      stopped: of `stop_signals`.
      start: the first example.
      stop: one past the last example; None: all.
      section: of the config, for the batch size.

    Raises:
      Interrupted: a stop signal came.
    """
    batch_size = run.batch_size(section)
    stop = len(source) if stop is None else stop
    kwargs = run.loader_kwargs() if isinstance(source, ImageSource) else {}
    rows, progress = sharding.process_local_rows(batch_size), Progress(name, stop - start)
    batches = eval_batches(source, batch_size=batch_size, rows=rows, start=start, stop=stop, **kwargs)
    with contextlib.closing(batches):
        for number, batch in enumerate(read_all(batches, stopped), start=1):
            yield batch
            progress.update(min(number * batch_size, stop - start))
            exit_together(stopped)


def image_features(run: Run, extractor: FeatureExtractor, name: str, split: str, stopped: Callable[[], int]) -> Record:
    """Extracts features of the images of a split into features/<name>/<split>, unless that is done.

    Args:
      run: the run.
      extractor: the network.
      name: its directory.
      split: 'train', 'validation' or 'test'.
      stopped: of `stop_signals`.

    Returns:
      The record, for `load_stats` and `load_logits`; results['count'] is the number of readable images.

    Raises:
      Interrupted: a stop signal came; the same call continues.
    """
    source = run.images(split)
    inputs = {'network': extractor.digest, 'images': source.digest}
    directory = run.path(DIRECTORY, name, split)
    return extract(run, directory, inputs, {}, source, lambda: _one_row(extractor), [IMAGES], stopped)


def sample_features(
    run: Run, extractor: FeatureExtractor, name: str, set_name: str, indices: np.ndarray, stopped: Callable[[], int]
) -> Record:
    """Extracts features of the samples `indices` of a set into features/<name>/samples/<set>; see `image_features`."""
    source = open_samples(run, set_name, indices)
    inputs = {'network': extractor.digest, 'images': sample_store.read_set(run.path(SAMPLES, set_name)).digest}
    settings = {'indices': files.digest_arrays({'indices': np.asarray(indices, np.int64)})}
    directory = run.path(DIRECTORY, name, SAMPLES, set_name)
    return extract(run, directory, inputs, settings, source, lambda: _one_row(extractor), [IMAGES], stopped)


def reconstruction_features(
    run: Run, extractor: FeatureExtractor, name: str, split: str, stopped: Callable[[], int]
) -> Record:
    """Extracts features of reconstructions into features/<name>/reconstructions/<split>; see `image_features`.

    The rows are those of stage 1's `image_labels` without the original.
    """
    source = run.images(split)
    inputs = {'network': extractor.digest, 'images': source.digest, 'vqvae': workdir.vqvae_record(run).digest}
    task = train.vqvae_task(run)
    rows = list(task.image_labels[1:])

    def make_function():
        trained = workdir.load_vqvae(run)
        weights = sharding.put_replicated((trained.params, trained.model_state))
        reconstruct, extract_fn = make_reconstruct_fn(task), features.make_extract_fn(extractor)

        def function(batch):
            images = reconstruct(*weights, batch)
            outputs = [extract_fn({'image': images[row]}) for row in rows]
            return {f'{k}_{r}': values for r, output in enumerate(outputs) for k, values in output.items()}

        return function

    directory = run.path(DIRECTORY, name, 'reconstructions', split)
    return extract(run, directory, inputs, {}, source, make_function, rows, stopped)


def _one_row(extractor):
    extract_fn = features.make_extract_fn(extractor)
    return lambda batch: {f'{name}_0': values for name, values in extract_fn(batch).items()}


def extract(
    run: Run,
    directory: epath.Path,
    inputs: dict[str, str],
    settings: dict,
    source: ImageSource,
    make_function: Callable[[], Callable],
    rows: list[str],
    stopped: Callable[[], int],
    *,
    job: str = 'evaluate',
) -> Record:
    """Writes the missing shards of features, and then their statistics.

    Args:
      run: the run.
      directory: the output.
      inputs: digests of the network and the images. Features of other inputs are replaced.
      settings: further settings that identify the images.
      source: the images.
      make_function: called inside the mesh; returns a function batch -> {'features_r', 'logits_r'}. It may also return
        the 'image' uint8 [B, H, W, C]; their SHA-256 are then stored as 'pixels', uint8 [N, 32].
      rows: names of the sets of images r.
      stopped: of `stop_signals`.
      job: the value of --job, for messages.

    Raises:
      Interrupted: a stop signal came; the same call continues.
    """
    settings = {**settings, 'rows': rows, 'count': len(source), 'shard_size': SHARD_SIZE}
    output = run.open_output(directory, job, inputs, settings, replace=True)
    ranges = shard_ranges(len(source), SHARD_SIZE)
    missing = processes.run_on_main_process(lambda: _missing(output, ranges))
    if output.state == record.DONE and not missing:
        return output
    batch_size, name = run.batch_size('evaluate'), '/'.join(directory.relative_to(run.workdir).parts)

    def write(limits, arrays):
        arrays = {k: v for k, v in arrays.items() if k != 'index'}
        processes.run_on_main_process(lambda: sample_store.write_npz(_shard_path(directory, limits), arrays))

    writer = ShardWriter(missing, write)
    with jax.set_mesh(run.mesh):
        function = make_function() if missing else None
        processes.run_on_main_process(output.start)
        read = functools.partial(read_batches, run, source, name, stopped)
        for start, arrays in map_missing(function, missing, read, batch_size, len(source)):
            writer.add(start, _hash_images(arrays))
    results = processes.run_on_main_process(lambda: _finish(output))
    return dataclasses.replace(output, state=record.DONE, results=results[0], digest=results[1])


def load_stats(output: Record, row: str = IMAGES, max_stored: int = MAX_STORED_FEATURES) -> FeatureStats:
    """Loads the statistics of extracted features, with the features of the first images.

    Args:
      output: from one of the functions above.
      row: one of the rows.
      max_stored: number of first images whose features and logits are loaded; the moments are of all.

    Raises:
      ValueError: there are none: no image could be read, or features are not finite.
    """
    if 'error' in output.results:
        raise ValueError(output.results['error'])
    r, stored = output.settings['rows'].index(row), []
    for shard in read_shards(output):
        stored.append(_select(shard, r))
        if sum(len(part['features']) for part in stored) >= max_stored:
            break
    arrays = {k: np.concatenate([part[k] for part in stored])[:max_stored] for k in stored[0]}
    values = sample_store.read_npz(output.directory / _STATISTICS)
    moments = Moments(int(values['count']), values[f'mean_{r}'], values[f'scatter_{r}'])
    return FeatureStats(arrays['features'], arrays.get('logits'), moments)


def load_logits(output: Record, row: str = IMAGES) -> tuple[np.ndarray, np.ndarray]:
    """Loads the logits float32 [N, S] and the labels int32 [N] of all readable images of a row."""
    r = output.settings['rows'].index(row)
    parts = [(_select(shard, r)['logits'], shard['label'][shard['mask']]) for shard in read_shards(output)]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def _hash_images(arrays):
    if 'image' not in arrays:
        return arrays
    hashes = [np.frombuffer(hashlib.sha256(image.tobytes()).digest(), np.uint8) for image in arrays['image']]
    return {k: v for k, v in arrays.items() if k != 'image'} | {'pixels': np.stack(hashes)}


def _shard_path(directory, limits: Range):
    return directory / f'features-{limits[0]:08d}-{limits[1]:08d}.npz'


def read_shards(output: Record) -> Iterator[dict[str, np.ndarray]]:
    """Yields the arrays of every file of extracted features."""
    ranges = shard_ranges(output.settings['count'], output.settings['shard_size'])
    return (sample_store.read_npz(_shard_path(output.directory, limits)) for limits in ranges)


def _select(shard, r):
    # readable images of a row
    names = [name for name in ('features', 'logits') if f'{name}_{r}' in shard]
    return {name: shard[f'{name}_{r}'][shard['mask']] for name in names}


def _missing(output, ranges):
    if output.state in (record.MISSING, record.STALE):  # files may be left of other images
        for path in output.directory.glob('*.npz'):
            path.unlink()
    return [limits for limits in ranges if not _shard_path(output.directory, limits).exists()]


def _finish(output):
    """Writes the statistics and the record; returns its results and digest."""
    try:
        arrays = {}
        for r in range(len(output.settings['rows'])):
            stats = FeatureStats.collect((_select(shard, r) for shard in read_shards(output)), max_stored=0)
            arrays |= {f'mean_{r}': stats.moments.mean, f'scatter_{r}': stats.moments.scatter}
        sample_store.write_npz(output.directory / _STATISTICS, {'count': np.array(len(stats)), **arrays})
        results = {'count': len(stats)}
    except ValueError as error:
        results = {'count': sum(int(shard['mask'].sum()) for shard in read_shards(output)), 'error': str(error)}
    output.finish(results)
    return results, output.digest
