"""Kernel Inception Distance (Binkowski et al. 2018): unlike FID unbiased, also for few images."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from vqvae2_jax.metrics.frechet import check_features

SUBSETS, SUBSET_SIZE = 100, 1000


def kernel_distance(
    first: ArrayLike,
    second: ArrayLike,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
    track: Callable[[Sequence], Iterable] = iter,
) -> tuple[float, float | None]:
    """Returns the squared maximum mean discrepancy with the kernel (x y / D + 1)^3, over random subsets.

    Args:
      first: [N, D], N at least 2.
      second: [M, D], M at least 2.
      subsets: number of pairs of subsets, at least 1.
      subset_size: images of each subset; reduced to the size of the smaller set.
      seed: seed of the random subsets.
      track: wraps the sequence that the loop over the subsets iterates, to show progress.

    Returns:
      Mean and standard deviation over the subsets. The mean may be slightly negative. If both sets have exactly that
      many images, they are compared once as a whole, and the deviation is None.

    Raises:
      ValueError: shapes that do not match, too few images, features that are not finite.
    """
    first, second = check_features(first), check_features(second)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f'the sets have {first.shape[1]} and {second.shape[1]} features: of two networks?')
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise ValueError(f'sets of {len(first)} and {len(second)} images: KID needs at least 2 of each')
    generator, distances = np.random.default_rng(seed), []
    whole = size == len(first) == len(second)
    for _ in track(range(1 if whole else subsets)):
        x, y = (features[generator.choice(len(features), size, replace=False)] for features in (first, second))
        x, y = x.astype(np.float64), y.astype(np.float64)
        within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (_kernel(x, x), _kernel(y, y)))
        distances.append(within - 2 * _kernel(x, y).mean())
    return float(np.mean(distances)), None if whole else float(np.std(distances))


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3
