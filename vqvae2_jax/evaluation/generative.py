"""Metrics of generated images: FID, KID, Inception Score, precision and recall, before and after rejection."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vqvae2_jax.evaluation.features import INCEPTION, MAX_STORED_FEATURES, FeatureExtractor, FeatureStats
from vqvae2_jax.io.progress import track
from vqvae2_jax.metrics.frechet import Moments, frechet_distance
from vqvae2_jax.metrics.inception_score import SPLITS, inception_score
from vqvae2_jax.metrics.kernel import SUBSET_SIZE, SUBSETS, kernel_distance
from vqvae2_jax.metrics.manifold import NEIGHBORS, precision_recall
from vqvae2_jax.sampling.rejection import select_top_per_class

MIN_FID_IMAGES = 10_000
# Names of the metrics; FID and KID are those of the Inception network alone.
_NAMES = {
    'inception': {'frechet': 'fid', 'kernel': 'kid'},
    'classifier': {'frechet': 'frechet_distance', 'kernel': 'kernel_distance'},
}
# The images behind the metrics, for the protocol of a comparison of two sets and of a report.
IMAGES_OF_SETS = (
    f'all of both sets for the Fréchet distance; the first {MAX_STORED_FEATURES} of each for the other numbers'
)
IMAGES_OF_RUN = (
    f'the first {MAX_STORED_FEATURES} samples; all reconstructions and all real images for the Fréchet distance, '
    f'the first {MAX_STORED_FEATURES} for the other numbers'
)


class SweepPoint(NamedTuple):
    """The samples of one point of the rejection sweep.

    Attributes:
      fraction: fraction of every class that is kept, in (0, 1].
      kept_count: number of samples kept.
      indices: int64 [n], ascending: the first n samples kept. n is 0 for a point that is left out, else the same for
        all points.
    """

    fraction: float
    kept_count: int
    indices: np.ndarray


def protocol(extractor: FeatureExtractor, images: str) -> dict[str, str]:
    """Returns how the metrics of this module are computed, for a report.

    Args:
      extractor: the network.
      images: one of the texts above.
    """
    score = f'{SPLITS} splits, logits without bias'
    if extractor.name != INCEPTION:
        score = 'not computed: it needs the Inception network'
    elif not extractor.num_classes:
        score = 'not computed: the weights have no classification head'
    return {
        **extractor.protocol,
        'covariances': 'float64, over N - 1',
        'kernel': f'cubic, mean and deviation over {SUBSETS} subsets of up to {SUBSET_SIZE} images of each set',
        'precision_recall': f'k = {NEIGHBORS}, features of the same network, the same number of images of both sets',
        'images': images,
        'inception_score': score,
    }


def generative_metrics(
    network_name: str, real: FeatureStats, generated: FeatureStats, name: str = 'metrics'
) -> dict[str, Any]:
    """Computes the metrics of a set of generated images against real ones, and prints progress.

    Args:
      network_name: 'inception' or 'classifier', which decides the names of the metrics.
      real: features of the real images.
      generated: features of the generated images; with Inception logits the Inception Score is computed too.
      name: name of the comparison in the lines of progress.

    Returns:
      {'count_real', 'count': numbers of images; 'fid' and 'kid' (of a classifier 'frechet_distance' and
      'kernel_distance'), 'precision', 'recall', 'inception_score'; the deviations of these that have one as
      '<name>_deviation'; 'warning': text, if there are few images}; see docs/files.md. The Fréchet distance and the
      counts are those of all images, the other metrics those of the stored features.

    Raises:
      ValueError: fewer than four images of a set, all the same, features that are not finite, or different numbers of
        features.
    """
    names = _NAMES[network_name]
    track_subsets = functools.partial(track, name=f'{name}: kernel distance', unit='subsets')
    kernel, deviation = kernel_distance(real.features, generated.features, track=track_subsets)
    metrics = {'count_real': len(real), 'count': len(generated)}
    metrics |= _shared_metrics(network_name, real, generated, name)
    metrics[names['kernel']] = kernel
    if deviation is not None:
        metrics[f'{names["kernel"]}_deviation'] = deviation
    if min(len(real), len(generated)) < MIN_FID_IMAGES:
        metrics['warning'] = f'{len(real)} real and {len(generated)} generated images: {_few_images(metrics)}'
    return metrics


def distance_to_statistics(network_name: str, real: Moments, generated: FeatureStats) -> dict[str, Any]:
    """Computes the Fréchet distance to published statistics of an unknown number of images.

    Args:
      network_name: as in `generative_metrics`.
      real: the statistics.
      generated: features of the generated images.

    Returns:
      {'count_real': None, 'count': number of images, 'fid' (of a classifier 'frechet_distance'), 'warning': text, if
      there are few images}.

    Raises:
      ValueError: as `frechet_distance`.
    """
    metrics = {'count_real': None, 'count': len(generated)}
    metrics[_NAMES[network_name]['frechet']] = frechet_distance(real, generated.moments)
    if len(generated) < MIN_FID_IMAGES:
        metrics['warning'] = f'{len(generated)} generated images: {_few_images(metrics)}'
    return metrics


def metrics_or_reason(
    network_name: str, real: FeatureStats | Moments, generated: FeatureStats, name: str
) -> dict[str, Any]:
    """Returns `generative_metrics`, or against moments `distance_to_statistics`.

    If there are no metrics it is {'missing': the reason}, so that the rest of a report is kept.
    """
    try:
        if isinstance(real, Moments):
            return distance_to_statistics(network_name, real, generated)
        return generative_metrics(network_name, real, generated, name)
    except ValueError as error:
        return {'missing': str(error)}


def choose_samples(
    scores: np.ndarray,
    labels: np.ndarray,
    fractions: Sequence[float],
    real_count: int,
    max_count: int = MAX_STORED_FEATURES,
) -> list[SweepPoint]:
    """Chooses the samples of each point of the rejection sweep.

    All points get the same number of samples n, because Fréchet distance, Inception Score, precision and recall depend
    on it: the largest n that every point and the real images can supply. Points that keep too few samples for precision
    and recall are left out first.

    Args:
      scores: float [N], by which the samples are ranked.
      labels: int [N], their classes.
      fractions: each in (0, 1].
      real_count: number of real images that the samples are compared with.
      max_count: upper limit of n.

    Returns:
      One point per fraction, the largest fraction first.
    """
    kept = {f: select_top_per_class(scores, labels, f) for f in sorted(set(fractions), reverse=True)}
    enough = [len(indices) for indices in kept.values() if len(indices) > NEIGHBORS]
    count = min([max_count, real_count, *enough])
    return [
        SweepPoint(fraction, len(indices), indices[: count if min(count, len(indices)) > NEIGHBORS else 0])
        for fraction, indices in kept.items()
    ]


def rejection_sweep(
    network_name: str,
    real: FeatureStats,
    reconstructed: FeatureStats,
    generated: FeatureStats,
    sample_indices: np.ndarray,
    points: Sequence[SweepPoint],
    probability: np.ndarray,
) -> tuple[list[dict[str, Any]], str]:
    """Computes metrics after keeping the best fraction of every class (VQ-VAE-2 section 5, figure 7); prints progress.

    Args:
      network_name: as in `generative_metrics`.
      real: features of real images; the first n are used.
      reconstructed: features of their reconstructions; the first n are used.
      generated: features of the samples `sample_indices`.
      sample_indices: int64 [M], ascending; includes all indices of the points.
      points: from `choose_samples`.
      probability: float [N], the classifier's probability of the intended class of every sample.

    Returns:
      The metrics of each point; and a note with the number of images and the points that have no metrics, because they
      keep too few samples or samples that are all the same.
    """
    count = max((len(point.indices) for point in points), default=0)  # n
    references = [stats.take(slice(count)) for stats in (real, reconstructed)] if count else None
    distance_name = f'{_NAMES[network_name]["frechet"]}_against_reconstructions'
    results, missing = [], []
    for fraction, kept_count, indices in points:
        if not len(indices):
            missing.append(
                f'{fraction:g} keeps {kept_count} images; more than {NEIGHBORS} kept and real ones are needed'
            )
            continue
        confidence = float(np.mean(probability[indices], dtype=np.float64))
        point = {'keep_fraction': fraction, 'kept_count': kept_count, 'count': count, 'confidence': confidence}
        chosen = generated.take(np.searchsorted(sample_indices, indices))
        try:
            metrics = _shared_metrics(network_name, references[0], chosen, f'sweep, {fraction:g} kept')
            # FID* of the paper's figure 7a
            metrics[distance_name] = frechet_distance(references[1].moments, chosen.moments)
            results.append(point | metrics)
        except ValueError as error:
            missing.append(f'{fraction:g}: {error}')
    notes = []
    if results:
        few = f': {_few_images(results[0])}' if count < MIN_FID_IMAGES else ''
        notes.append(
            f'Each fraction is evaluated on n = {count} samples, the first it keeps, and {count} real images{few}.'
        )
    if missing:
        notes.append(f'Left out: {"; ".join(missing)}.')
    return results, ' '.join(notes)


def _few_images(metrics):
    distance = next(names['frechet'] for names in _NAMES.values() if names['frechet'] in metrics)
    score = ' and inception_score downwards' if 'inception_score' in metrics else ''
    return (
        f'below {MIN_FID_IMAGES} images {distance} is biased upwards{score}, and precision and recall depend on the '
        'number of images; compare them only with metrics of the same number of images'
    )


def _shared_metrics(network_name, real, generated, name):
    # those of `generative_metrics` and of the sweep
    count = min(len(real.features), len(generated.features))  # precision and recall depend on it
    track_blocks = functools.partial(track, name=f'{name}: precision and recall', unit='blocks')
    precision, recall = precision_recall(real.features[:count], generated.features[:count], track=track_blocks)
    distance = frechet_distance(real.moments, generated.moments)
    metrics = {_NAMES[network_name]['frechet']: distance, 'precision': precision, 'recall': recall}
    if network_name == INCEPTION and generated.logits is not None and len(generated.features) >= SPLITS:
        metrics['inception_score'], metrics['inception_score_deviation'] = inception_score(generated.logits)
    return metrics
