"""Features of images in shards below features/<extractor>/: extracted once, continued after a stop, reused by digest.

A directory holds a record, files features-START-STOP.npz, and statistics.npz. A file has N images. Row r is the images
themselves, or their reconstructions from some of the levels.

    features_r  float32 [N, D]
    logits_r    float32 [N, S], if the network has them
    label       int32 [N]
    mask        bool [N], false for images that cannot be read
    pixels      uint8 [N, 32], SHA-256 of the images, of a comparison of two sets

statistics.npz holds `count`, and `mean_r` [D] and `scatter_r` [D, D] of all images (see metrics/frechet.py).
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from vqvae2_jax.config import build
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
from vqvae2_jax.io import files, record
from vqvae2_jax.io.progress import Progress
from vqvae2_jax.io.record import JobError, Record
from vqvae2_jax.jobs import train, workdir
from vqvae2_jax.jobs.workdir import RECONSTRUCTIONS, SAMPLES, Run
from vqvae2_jax.metrics.frechet import Moments

DIRECTORY = 'features'
# Part of the settings of all features. Raise it when a network's output for the same weights and images changes, or the
# arrays of the files: preprocessing, resizing, which layer is read, how statistics are computed.
FEATURES_VERSION = 1
SHARD_SIZE = 1024  # images
IMAGES = 'images'  # the row of images that are not reconstructed
_STATISTICS = 'statistics.npz'
_CHUNK = 1024  # images whose moments are computed at once


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
    """Loads the classifier that scores samples: reject.classifier, or if that is '' the one that this run trained.

    Raises:
      JobError: it is missing or unreadable, or has another number of classes.
      SettingsChangedError: the run's own was trained with another network or on other data.
    """
    if not (path := run.config.reject.classifier):
        return load_own_classifier(run)
    try:
        return features.load_classifier(path, run.config.data.num_classes)
    except (OSError, ValueError, ImportError) as error:
        raise JobError(f'reject.classifier: {error}') from error


def load_own_classifier(run: Run, directory: str = '') -> FeatureExtractor:
    """Loads a classifier that this run has trained; arguments and errors as in `workdir.load_trained`."""
    trained = workdir.load_trained(run, 'classifier', directory)
    return features.classifier_extractor(build.make_classifier(run.config), trained.params, trained.digest)


def classifier_digest(run: Run) -> str:
    """Returns the digest of the weights of `load_classifier`; raises as that."""
    if run.config.reject.classifier:
        return load_classifier(run).digest
    return workdir.trained_record(run, 'classifier').digest


def open_samples(run: Run, indices: np.ndarray | None = None) -> ImageSource:
    """Opens the images and labels of the finished sample set sample.name, or some of them.

    Args:
      run: the run.
      indices: int [M], ascending; None: all.

    Raises:
      JobError: the set is not finished.
    """
    data = run.config.data
    dataset = ArraysDataset(sample_store.local_files(run.sample_set_path(SAMPLES)), data.num_classes)
    indices = np.arange(len(dataset)) if indices is None else indices
    return ImageSource(dataset, indices, tuple(data.image_size), data.channels)


def read_batches(
    run: Run,
    source: ImageSource | CodeSource,
    name: str,
    received_signal: Callable[[], int],
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
      name: name of the phase, for the log.
      received_signal: from `stop_signals`.
      start: the first example.
      stop: one past the last example; None: all.
      section: section of the config that has the batch size.

    Raises:
      Interrupted: a stop signal came.
    """
    batch_size = run.batch_size(section)
    stop = len(source) if stop is None else stop
    kwargs = run.loader_kwargs() if isinstance(source, ImageSource) else {}
    rows, progress = sharding.process_local_rows(batch_size), Progress(name, stop - start)
    batches = eval_batches(source, batch_size=batch_size, rows=rows, start=start, stop=stop, **kwargs)
    with contextlib.closing(batches):
        for number, batch in enumerate(read_all(batches, received_signal), start=1):
            yield batch
            progress.update(min(number * batch_size, stop - start))
            exit_together(received_signal)


def image_features(
    run: Run, extractor: FeatureExtractor, split: str, received_signal: Callable[[], int], name: str = ''
) -> Record:
    """Extracts features of the images of a split into features/<name>/<split>, unless that is done.

    Args:
      run: the run.
      extractor: the network.
      split: 'train', 'validation' or 'test'.
      received_signal: from `stop_signals`.
      name: directory of the network; '': the extractor's name.

    Returns:
      The record, for `load_stats` and `load_logits`; results['count'] is the number of readable images.

    Raises:
      JobError: no image can be read.
      Interrupted: a stop signal came; the same call continues.
    """
    source, directory = run.images(split), run.path(DIRECTORY, name or extractor.name, split)
    return write_features(run, extractor, source, directory, {'images': source.digest}, received_signal)


def sample_features(
    run: Run, extractor: FeatureExtractor, indices: np.ndarray, received_signal: Callable[[], int]
) -> Record:
    """Extracts features of the samples `indices` of the set sample.name; see `image_features`."""
    source, directory = open_samples(run, indices), run.sample_set_path(DIRECTORY, extractor.name, SAMPLES)
    inputs = {'images': sample_store.read_set(run.sample_set_path(SAMPLES)).digest}
    settings = {'indices': files.digest_arrays({'indices': np.asarray(indices, np.int64)})}
    return write_features(run, extractor, source, directory, inputs, received_signal, settings=settings)


def reconstruction_features(
    run: Run, extractor: FeatureExtractor, split: str, received_signal: Callable[[], int], name: str = ''
) -> Record:
    """Extracts features of reconstructions into features/<name>/reconstructions/<split>; see `image_features`.

    The rows are those of stage 1's `image_labels` without the original.
    """
    source, task = run.images(split), train.make_task(run, 'vqvae')
    directory = run.path(DIRECTORY, name or extractor.name, RECONSTRUCTIONS, split)
    inputs = {'images': source.digest, 'vqvae': workdir.trained_record(run, 'vqvae').digest}

    def make_images():
        trained = workdir.load_trained(run, 'vqvae')
        weights = sharding.put_replicated((trained.params, trained.model_state))
        return functools.partial(make_reconstruct_fn(task), *weights)

    rows = task.image_labels[1:]
    return write_features(
        run, extractor, source, directory, inputs, received_signal, rows=rows, make_images=make_images
    )


def write_features(
    run: Run,
    extractor: FeatureExtractor,
    source: ImageSource,
    directory: epath.Path,
    inputs: dict[str, str],
    received_signal: Callable[[], int],
    *,
    settings: dict[str, Any] | None = None,
    rows: Sequence[str] = (IMAGES,),
    make_images: Callable[[], Callable] | None = None,
    hash_images: bool = False,
) -> Record:
    """Writes the missing shards of features, and then their statistics.

    Args:
      run: the run.
      extractor: the network.
      source: the images.
      directory: the output.
      inputs: digests of the images and of all that makes the rows. Features of other inputs are replaced.
      received_signal: from `stop_signals`.
      settings: further settings that identify the images.
      rows: names of the rows, the r-th is row r.
      make_images: called inside the mesh if shards are missing; returns a function batch -> {row: images uint8
        [B, H, W, C]}. None: there is one row, the images themselves.
      hash_images: store the SHA-256 of each image as 'pixels', uint8 [N, 32].

    Raises:
      JobError: no image can be read.
      Interrupted: a stop signal came; the same call continues.
    """
    inputs, settings = {'network': extractor.digest, **inputs}, {**(settings or {}), 'rows': list(rows)}
    settings |= {'count': len(source), 'shard_size': SHARD_SIZE, 'features_version': FEATURES_VERSION}
    output = run.open_output(directory, 'evaluate', inputs, settings, replace=True)
    if output.state == record.DONE:
        return output
    missing = [s for s in shard_ranges(len(source), SHARD_SIZE) if _shard_path(directory, s).name not in output.files]
    writer = ShardWriter(missing, lambda *args: processes.run_on_main_process(lambda: _write_shard(output, *args)))
    with jax.set_mesh(run.mesh):
        images_of = make_images() if missing and make_images else lambda batch: {IMAGES: batch['image']}

        def function(batch):
            images, arrays = images_of(batch), {'image': batch['image']} if hash_images else {}
            for r, row in enumerate(rows):
                arrays |= {f'{k}_{r}': values for k, values in extractor.extract({'image': images[row]}).items()}
            return arrays

        processes.run_on_main_process(lambda: _start(output))
        read = functools.partial(read_batches, run, source, str(directory.relative_to(run.workdir)), received_signal)
        for start, arrays in map_missing(function, missing, read, run.batch_size('evaluate'), len(source)):
            if hash_images:
                arrays['pixels'] = _hashes(arrays.pop('image'))
            writer.add(start, arrays)
    return processes.run_on_main_process(lambda: _finish(run, output))


def _write_shard(output: Record, shard: Range, arrays: dict[str, np.ndarray]) -> None:
    path = _shard_path(output.directory, shard)
    sample_store.write_npz(path, {k: v for k, v in arrays.items() if k != 'index'})
    output.add_files(path.name)


def _hashes(images: np.ndarray) -> np.ndarray:
    hashes = [hashlib.sha256(image.tobytes()).digest() for image in images]
    return np.frombuffer(b''.join(hashes), np.uint8).reshape(-1, 32)


def _start(output: Record) -> None:
    if output.state in (record.MISSING, record.STALE):  # files may be left of other images
        for name in files.list_names(output.directory):
            if name.endswith('.npz'):
                files.remove(output.directory / name)
    output.start()


def _finish(run: Run, output: Record) -> Record:
    """Writes the statistics of all rows and the record; returns the record.

    Features that are not finite give statistics that are NaN: the metrics refuse them.
    """
    name, row_indices = output.directory.relative_to(run.workdir), range(len(output.settings['rows']))
    count, size = output.settings['count'], output.settings['shard_size']
    progress, totals, pending = Progress(f'{name}: statistics', count), [], []
    for start, shard in zip(range(0, count, size), _read_shards(output), strict=True):
        pending.append([shard[f'features_{r}'][shard['mask']] for r in row_indices])
        pending_count = sum(len(rows[0]) for rows in pending)
        # Parts of about the same size, whatever the size of the shards: rounding depends on it.
        if pending_count >= _CHUNK or (pending_count and start + size >= count):
            parts = [np.concatenate(arrays) for arrays in zip(*pending, strict=True)]
            moments = [Moments.of(features, allow_nonfinite=True) for features in parts]
            totals = [before + more for before, more in zip(totals, moments, strict=True)] if totals else moments
            pending = []
        progress.update(start + size)
    if not totals:
        raise JobError(f'{name}: none of the {count} images could be read. Repair them and delete {output.directory}')
    arrays = {'count': np.array(totals[0].count)}
    for r in row_indices:
        arrays |= {f'mean_{r}': totals[r].mean, f'scatter_{r}': totals[r].scatter}
    sample_store.write_npz(output.directory / _STATISTICS, arrays)
    output.add_files(_STATISTICS)
    output.finish({'count': totals[0].count})
    return output


def read_features(directory: epath.Path) -> Record:
    """Reads the record of extracted features; raises JobError if they are not finished."""
    return record.read_done(directory, 'evaluate')


def load_stats(output: Record, row: str = IMAGES, max_stored: int | None = None) -> FeatureStats:
    """Loads the statistics of extracted features, with the features of the first images.

    Args:
      output: from one of the functions above.
      row: one of the rows.
      max_stored: number of first images whose features and logits are loaded, by default `MAX_STORED_FEATURES`; the
        moments are those of all images.
    """
    r = output.settings['rows'].index(row)
    max_stored = MAX_STORED_FEATURES if max_stored is None else max_stored
    arrays = _load(output, (f'features_{r}', f'logits_{r}'), max_stored)
    values = sample_store.read_npz(output.directory / _STATISTICS)
    moments = Moments(int(values['count']), values[f'mean_{r}'], values[f'scatter_{r}'])
    return FeatureStats(arrays[f'features_{r}'], arrays.get(f'logits_{r}'), moments)


def load_logits(output: Record, row: str = IMAGES) -> tuple[np.ndarray, np.ndarray]:
    """Loads the logits float32 [N, S] and the labels int32 [N] of all readable images of a row."""
    logits = f'logits_{output.settings["rows"].index(row)}'
    arrays = _load(output, (logits, 'label'))
    return arrays[logits], arrays['label']


def iterate_features(output: Record) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields features of the images themselves, file by file: the images' indices int [N], and float32 [N, D]."""
    starts = range(0, output.settings['count'], output.settings['shard_size'])
    for start, shard in zip(starts, _read_shards(output), strict=True):
        yield start + np.flatnonzero(shard['mask']), shard['features_0'][shard['mask']]


def digest_images(output: Record) -> str:
    """Returns the SHA-256 of the SHA-256 of every readable image, of features extracted with `hash_images`."""
    return hashlib.sha256(_load(output, ('pixels',))['pixels'].tobytes()).hexdigest()


def _load(output: Record, names: Sequence[str], max_count: int | None = None) -> dict[str, np.ndarray]:
    """Loads arrays of the first `max_count` readable images; leaves out names that the files lack."""
    parts, count = [], 0
    for shard in _read_shards(output):
        parts.append({name: shard[name][shard['mask']] for name in names if name in shard})
        count += int(shard['mask'].sum())
        if max_count is not None and count >= max_count:
            break
    return {name: np.concatenate([part[name] for part in parts])[:max_count] for name in parts[0]}


def _read_shards(output: Record) -> Iterator[dict[str, np.ndarray]]:
    ranges = shard_ranges(output.settings['count'], output.settings['shard_size'])
    return (sample_store.read_npz(_shard_path(output.directory, shard)) for shard in ranges)


def _shard_path(directory: epath.Path, shard: Range) -> epath.Path:
    return directory / f'features-{shard[0]:08d}-{shard[1]:08d}.npz'
