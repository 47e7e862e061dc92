"""How like a set of real images a set of generated ones is: FID and its kin, and what rejection does to them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vqvae2_jax.evaluation.features import MAX_STORED_FEATURES, Features, FeatureStats, Network
from vqvae2_jax.metrics.frechet import frechet_distance
from vqvae2_jax.metrics.inception_score import SPLITS, inception_score
from vqvae2_jax.metrics.kernel import SUBSET_SIZE, SUBSETS, kernel_distance
from vqvae2_jax.metrics.manifold import NEIGHBORS, precision_recall
from vqvae2_jax.sampling.rejection import select_top_per_class

MIN_FID_IMAGES = 10_000
# What the numbers are called when the network is the one they are named after.
_NAMES = {
    'inception': {'frechet': 'fid', 'kernel': 'kid'},
    'classifier': {'frechet': 'frechet_distance', 'kernel': 'kernel_distance'},
}
# Which images the numbers are of: where two sets are compared, and in the report of a run.
IMAGES_OF_SETS = f'all of both sets for the Fréchet distance; the first {MAX_STORED_FEATURES} of each for the other numbers'
IMAGES_OF_RUN = (
    f'the first {MAX_STORED_FEATURES} samples; all reconstructions and all real images for the Fréchet distance, '
    f'the first {MAX_STORED_FEATURES} for the other numbers'
)


class Share(NamedTuple):
    """The samples on which one share of the sweep is measured.

    Attributes:
      share: of every class, in (0, 1].
      kept_count: how many samples it keeps.
      positions: int64 [n], rising, of the first n that it keeps; n is 0 for a share that is left out, else the same for
        all shares.
    """

    share: float
    kept_count: int
    positions: np.ndarray


def protocol(network: Network, images: str) -> dict:
    """How every number of this file was computed; `images`: one of the texts above."""
    score = f'{SPLITS} splits, logits without bias'
    if network.name != 'inception':
        score = 'not computed: it needs the Inception network'
    elif not network.classes:
        score = 'not computed: the weights have no classification head'
    return {
        **network.protocol,
        'covariances': 'float64, over N - 1',
        'kernel': f'cubic, mean and deviation over {SUBSETS} subsets of up to {SUBSET_SIZE} images of each set',
        'precision_recall': f'k = {NEIGHBORS}, in the features of the same network, of as many images of both sets',
        'images': images,
        'inception_score': score,
    }


def compare(network: Network, real: FeatureStats | Features, generated: FeatureStats | Features) -> dict:
    """The numbers of `generated`, by name; the Inception Score where the network's weights have the head for it.

    Raises:
      ValueError: there are none: too few images, all alike, or features that are not finite.
    """
    names = _NAMES[network.name]
    kernel, deviation = kernel_distance(real.features, generated.features)
    found = {'count_real': len(real), 'count': len(generated)}
    found |= _likeness(network, real, generated)
    found[names['kernel']] = kernel
    if deviation is not None:
        found[f'{names["kernel"]}_deviation'] = deviation
    if min(len(real), len(generated)) < MIN_FID_IMAGES:
        found['warning'] = f'{len(real)} real and {len(generated)} generated images: {_caution(found)}'
    return found


def choose_samples(scores: np.ndarray, labels: np.ndarray, shares: Sequence[float], real_count: int) -> list[Share]:
    """Chooses the samples on which each share of the sweep is measured.

    All shares get the same number of samples n, because Fréchet distance, Inception Score, precision and recall depend
    on it: the largest n that every share and the real images can supply, at most `MAX_STORED_FEATURES`. Shares that keep too few
    samples for precision and recall are left out first.

    Args:
      scores: float [N], by which the samples are ranked. labels: int [N], their classes.
      shares: each in (0, 1].
      real_count: number of real images that the samples are compared with.

    Returns:
      One entry for each share, the largest first. All positions together are at most n for each share.
    """
    kept = {share: select_top_per_class(scores, labels, share) for share in sorted(set(shares), reverse=True)}
    count = min(
        [
            MAX_STORED_FEATURES,
            real_count,
            *(len(positions) for positions in kept.values() if len(positions) > NEIGHBORS),
        ]
    )
    return [
        Share(share, len(positions), positions[: count if min(count, len(positions)) > NEIGHBORS else 0])
        for share, positions in kept.items()
    ]


def sweep(
    network: Network,
    real: FeatureStats,
    reconstructed: FeatureStats,
    generated: FeatureStats,
    held: np.ndarray,
    chosen: list[Share],
    probability: np.ndarray,
) -> tuple[list[dict], str]:
    """Measures quality and diversity after keeping the best share of every class: the curves of the paper's section 5.

    Args:
      real, reconstructed: the first n images of each are used.
      generated: features of the samples `held`; int64 [M], rising, all positions in `chosen` among them.
      chosen: from `choose_samples`.
      probability: float [N], the classifier's probability of the intended class of every sample.

    Returns:
      The numbers of each share, and a note on their number of images and on the shares that have no numbers: those that
      keep too few samples, or samples that all look alike.
    """
    count = max((len(share.positions) for share in chosen), default=0)  # n
    references = [images.take(slice(count)) for images in (real, reconstructed)] if count else None
    points, missing = [], []
    for share, kept_count, positions in chosen:
        if not len(positions):
            missing.append(f'{share:g} keeps {kept_count} images; more than {NEIGHBORS} kept and real ones are needed')
            continue
        confidence = float(np.mean(probability[positions], dtype=np.float64))
        point = {'kept': share, 'kept_count': kept_count, 'count': count, 'confidence': confidence}
        try:
            points.append(
                point | _sweep_numbers(network, *references, generated.take(np.searchsorted(held, positions)))
            )
        except ValueError as error:
            missing.append(f'{share:g}: {error}')
    notes = []
    if points:
        few = f': {_caution(points[0])}' if count < MIN_FID_IMAGES else ''
        notes.append(
            f'Each share is measured on n = {count} samples, the first it keeps, and {count} real images{few}.'
        )
    if missing:
        notes.append(f'Left out: {"; ".join(missing)}.')
    return points, ' '.join(notes)


def _sweep_numbers(network, real, reconstructed, generated) -> dict:
    name = f'{_NAMES[network.name]["frechet"]}_against_reconstructions'  # FID* of the paper's figure 7a
    return _likeness(network, real, generated) | {name: frechet_distance(reconstructed.moments, generated.moments)}


def _caution(found) -> str:
    """Which of the numbers in `found` depend on the number of images, and how."""
    distance = next(names['frechet'] for names in _NAMES.values() if names['frechet'] in found)
    score = ' and inception_score downwards' if 'inception_score' in found else ''
    return (
        f'below {MIN_FID_IMAGES} images {distance} is biased upwards{score}, and precision and recall depend on the number of '
        'images; compare them only with numbers of as many images'
    )


def _likeness(network, real, generated) -> dict:
    """The numbers that `compare` and `sweep` share."""
    precision, recall = _precision_recall(real.features, generated.features)
    distance = frechet_distance(real.moments, generated.moments)
    found = {_NAMES[network.name]['frechet']: distance, 'precision': precision, 'recall': recall}
    if network.name == 'inception' and network.classes and len(generated.features) >= SPLITS:
        found['inception_score'], found['inception_score_deviation'] = inception_score(generated.logits)
    return found


def _precision_recall(real, generated):
    """Of sets of one size, as the numbers depend on it."""
    count = min(len(real), len(generated))
    return precision_recall(real[:count], generated[:count])
