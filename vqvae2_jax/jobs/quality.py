"""How like a set of real images a set of generated ones is: FID and its kin, and what rejection does to them."""

import numpy as np

from vqvae2_jax.jobs.features import Network, Observed
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
    return {
        **network.protocol,
        'covariances': 'float64, over N - 1',
        'kernel': f'cubic, mean and deviation over {SUBSETS} subsets of up to {SUBSET_SIZE} images of each set',
        'precision_recall': f'k = {NEIGHBOURS}, squared Euclidean distances, in the features of the same network',
        'inception_score': f'{SPLITS} splits, logits without bias',
    }


def compare(network: Network, real: Observed, generated: Observed) -> dict:
    """The numbers of `generated`, by name; the Inception Score where the network's weights have the head for it."""
    names = _NAMES[network.name]
    kernel, deviation = kernel_distance(real.features, generated.features)
    precision, recall = precision_recall(real.features, generated.features)
    found = {
        'count_real': len(real),
        'count': len(generated),
        names['frechet']: frechet_distance(real.moments, generated.moments),
        names['kernel']: kernel,
        f'{names["kernel"]}_deviation': deviation,
        'precision': precision,
        'recall': recall,
    }
    if network.name == 'inception' and generated.logits is not None and len(generated) >= SPLITS:
        found['inception_score'], found['inception_score_deviation'] = inception_score(generated.logits)
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
      For each share: how many images it keeps, and what they are like.
    """
    name, points = _NAMES[network.name]['frechet'], []
    for share in sorted(shares, reverse=True):
        kept = keep_best(scores, labels, share)
        kept = kept[kept < len(generated.features)]
        if len(kept) <= NEIGHBOURS:
            continue
        features = generated.features[kept]
        precision, recall = precision_recall(real.features, features)
        point = {
            'kept': share,
            'count': len(kept),
            'confidence': float(np.mean(scores[kept])),
            name: frechet_distance(real.moments, Moments.of(features)),
            'precision': precision,
            'recall': recall,
        }
        if network.name == 'inception' and generated.logits is not None and len(kept) >= SPLITS:
            point['inception_score'] = inception_score(generated.logits[kept])[0]
        points.append(point)
    return points
