"""Kernel Inception Distance (Binkowski et al. 2018): unbiased, so that it can be had of few images, unlike FID."""

import numpy as np

from vqvae2_jax.metrics.frechet import checked_features

SUBSETS, SUBSET_SIZE = 100, 1000


def kernel_distance(first, second, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0):
    """Squared maximum mean discrepancy with the kernel (x y / D + 1)^3, over random subsets.

    Args:
      first: [N, D], N at least 2. second: [M, D], M at least 2.
      subsets: how many pairs of subsets are compared.
      subset_size: images of each, at most; the smaller set's size where that is less.
      seed: of their choice.

    Returns:
      Mean over the subsets, and standard deviation: (float, float). The mean may be slightly negative. Where both sets
      are no larger than a subset there is one comparison, of all, and no deviation: (float, None).

    Raises:
      ValueError: shapes that do not fit, too few images, features that are not finite.
    """
    first, second = checked_features(first), checked_features(second)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f'the sets have {first.shape[1]} and {second.shape[1]} features: of two networks?')
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise ValueError(f'sets of {len(first)} and {len(second)} images: KID needs at least 2 of each')
    generator, found = np.random.default_rng(seed), []
    alone = size == len(first) == len(second)
    for _ in range(1 if alone else subsets):
        x, y = (features[generator.choice(len(features), size, replace=False)] for features in (first, second))
        x, y = x.astype(np.float64), y.astype(np.float64)
        within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (_kernel(x, x), _kernel(y, y)))
        found.append(within - 2 * _kernel(x, y).mean())
    return float(np.mean(found)), None if alone else float(np.std(found))


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3
