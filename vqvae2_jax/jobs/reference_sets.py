"""The items of evaluate.references besides the first split: FID of samples and reconstructions against each of them."""

import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vqvae2_jax.data.images import SPLITS, ImageSource, open_native_size
from vqvae2_jax.evaluation import generative
from vqvae2_jax.evaluation.features import INCEPTION, FeatureExtractor, FeatureStats
from vqvae2_jax.io import names, npz, regular, remote
from vqvae2_jax.io.record import JobError, Record
from vqvae2_jax.jobs import feature_store
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.metrics.frechet import Moments

_FIELD = 'evaluate.references'
_IMAGES, _STATISTICS = 'arr_0', ('mu', 'sigma')


class Reference(NamedTuple):
    """One item of evaluate.references.

    Attributes:
      digest: of the images, or of the bytes of the file of statistics.
      source: the images; None: there are statistics.
      statistics: the statistics; None: there are images.
    """

    digest: str
    source: ImageSource | None = None
    statistics: Moments | None = None


def first_split(run: Run) -> str:
    """Returns the split that all metrics compare with: the first one in evaluate.references, or else evaluate.split."""
    options = run.config.evaluate
    return next((name for name in options.references if name in SPLITS), options.split)


def open_references(run: Run, network: FeatureExtractor | None) -> dict[str, Reference]:
    """Opens the items of evaluate.references but the first split.

    Args:
      run: the run.
      network: whose features are compared; None: there are no metrics, and no references.

    Raises:
      JobError: an item cannot be read; or it is statistics, and `network` is not the Inception network.
    """
    first = first_split(run)
    others = [name for name in dict.fromkeys(run.config.evaluate.references) if name != first]
    return {name: _open(run, network, name) for name in others} if network else {}


def extract(
    run: Run, network: FeatureExtractor, references: Mapping[str, Reference], received_signal: Callable[[], int]
) -> None:
    """Extracts the features of all references that are images, unless that is done. All processes together.

    Raises:
      Interrupted: a stop signal came; the same call continues.
    """
    for name, reference in references.items():
        if reference.source is not None:
            _features(run, network, name, reference, received_signal)


def compare(
    run: Run, network: FeatureExtractor, references: Mapping[str, Reference], generated: FeatureStats, title: str
) -> dict[str, dict[str, Any]]:
    """Returns the metrics of generated images against every reference, by its name. On the main process only.

    Args:
      run: the run.
      network: whose features are compared.
      references: of which `extract` has the features.
      generated: features of the images.
      title: name of these images, for the lines of progress.

    Returns:
      {name: as `generative.metrics_or_reason`}.
    """
    results = {}
    for name, reference in references.items():
        real = reference.statistics
        if real is None:
            output = feature_store.read_features(_directory(run, network, name, reference))
            real = feature_store.load_stats(output)
        results[name] = generative.metrics_or_reason(network.name, real, generated, f'{title}, {names.printable(name)}')
    return results


def _open(run, network, name) -> Reference:
    if name in SPLITS:
        source = run.images(name)
        return Reference(source.digest, source)
    try:
        path = remote.local_copy(name) if name.endswith('.npz') else name
        if (arrays := _array_names(path)) is not None and _IMAGES not in arrays and set(_STATISTICS) <= arrays:
            return _read_statistics(network, name, path)
        if network.name != INCEPTION:  # it takes images of the config's size and channels alone
            source = run.folder(name, _FIELD)
        else:
            data = run.config.data
            source = open_native_size(name, _FIELD, data.on_error, data.max_pixels, data.max_bytes, data.cache_bytes)
        return Reference(source.digest, source)
    except JobError:
        raise
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise JobError(f'{_FIELD}: {error}') from error


def _array_names(path) -> set[str] | None:
    """Returns the names of the arrays in an .npz file; None of other files and of folders."""
    if not (path.endswith('.npz') and os.path.isfile(path)):
        return None
    with regular.open_file(path) as file, zipfile.ZipFile(file) as archive:
        return {name.removesuffix('.npy') for name in archive.namelist()}


def _read_statistics(network, name, path) -> Reference:
    if network.name != INCEPTION:
        raise JobError(
            f'{_FIELD}: {names.printable(name)} has statistics of the Inception network: set evaluate.inception'
        )
    with regular.open_file(path) as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    arrays = npz.read(path, _STATISTICS)
    return Reference(digest, statistics=Moments.of_gaussian(*(arrays[key] for key in _STATISTICS)))


def _directory(run, network, name, reference):
    if name in SPLITS:
        return run.path(feature_store.DIRECTORY, network.name, name)
    # Names of files may hold anything.
    return run.path(feature_store.DIRECTORY, network.name, 'references', reference.digest[:16])


def _features(run, network, name, reference, received_signal) -> Record:
    directory = _directory(run, network, name, reference)
    inputs = {'images': reference.digest}
    return feature_store.write_features(run, network, reference.source, directory, inputs, received_signal)
