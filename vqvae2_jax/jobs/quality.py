"""How like a set of real images a set of generated ones is: FID and its kin, and what rejection does to them."""

import contextlib

import numpy as np

from vqvae2_jax.jobs.features import KEPT, Network, Observed
from vqvae2_jax.metrics.frechet import Moments, frechet_distance
from vqvae2_jax.metrics.inception_score import SPLITS, inception_score
from vqvae2_jax.metrics.kernel import SUBSET_SIZE, SUBSETS, kernel_distance
from vqvae2_jax.metrics.manifold import NEIGHBOURS, precision_recall
from vqvae2_jax.sampling.rejection import keep_best

FEW = 10_000
# What the numbers are called when the network is the one they are named after.
_NAMES = {
    'inception': {'frechet': 'fid', 'kernel': 'kid'},
    'classifier': {'frechet': 'frechet_distance', 'kernel': 'kernel_distance'},
}


def protocol(network: Network) -> dict:
    """How every number of this file was computed."""
    score = f'{SPLITS} splits, logits without bias'
    if network.name != 'inception':
        score = 'not computed: it needs the Inception network'
    elif not network.classes:
        score = 'not computed: the weights have no classification head'
    return {
        **network.protocol,
        'covariances': 'float64, over N - 1',
        'kernel': f'cubic, mean and deviation over {SUBSETS} subsets of up to {SUBSET_SIZE} images of each set',
        'precision_recall': f'k = {NEIGHBOURS}, in the features of the same network, of as many images of both sets',
        'images': f'FID: all; kernel, precision, recall, scores: the first {KEPT} of a set',
        'inception_score': score,
    }


def compare(network: Network, real: Observed, generated: Observed) -> dict:
    """The numbers of `generated`, by name; the Inception Score where the network's weights have the head for it.

    Raises:
      ValueError: there are none: too few images, all alike, or features that are not finite.
    """
    names = _NAMES[network.name]
    kernel, deviation = kernel_distance(real.features, generated.features)
    logits = generated.logits if network.classes else None
    found = {'count_real': len(real), 'count': len(generated)}
    found |= _likeness(network, real, generated.moments, generated.features, logits)
    found[names['kernel']] = kernel
    if deviation is not None:
        found[f'{names["kernel"]}_deviation'] = deviation
    if min(len(real), len(generated)) < FEW:
        found['warning'] = (
            f'{names["frechet"]} of {len(real)} and {len(generated)} images: with fewer than {FEW} of both it is '
            'biased upwards; compare it with numbers of as many images only'
        )
    return found


def sweep(network: Network, real: Observed, generated: Observed, scores, labels, shares) -> list[dict]:
    """The two curves of the paper's section 5: quality and variety after keeping the best share of every class.

    Args:
      scores, labels: of the generated images [N], in their order: the classifier's probability of the label.
      shares: each in (0, 1].

    Returns:
      For each share of which there are numbers (as `compare` has them: not of too few images, nor of images all
      alike): how many it keeps, and what they are like. The fewer they are, the higher a distance: a curve that falls
      nonetheless says so the louder.
    """
    points = []
    for share in sorted(shares, reverse=True):
        kept = keep_best(scores, labels, share)
        held = kept[kept < KEPT]
        if len(held) <= NEIGHBOURS:
            continue
        features, logits = generated.features[held], generated.logits[held] if network.classes else None
        point = {'kept': share, 'count': len(held), 'confidence': float(np.mean(scores[kept]))}
        with contextlib.suppress(ValueError):
            points.append(point | _likeness(network, real, Moments.of(features), features, logits))
    return points


def _likeness(network, real, moments, features, logits) -> dict:
    """What `compare` and `sweep` tell of generated images alike."""
    precision, recall = _precision_recall(real.features, features)
    distance = frechet_distance(real.moments, moments)
    found = {_NAMES[network.name]['frechet']: distance, 'precision': precision, 'recall': recall}
    if network.name == 'inception' and network.classes and len(features) >= SPLITS:
        found['inception_score'], found['inception_score_deviation'] = inception_score(logits)
    return found


def _precision_recall(real, generated):
    """Of sets of one size, as the numbers depend on it."""
    count = min(len(real), len(generated))
    return precision_recall(real[:count], generated[:count])
