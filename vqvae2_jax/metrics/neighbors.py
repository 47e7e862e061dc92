"""The nearest neighbors of some images among many, by the Euclidean distance of their features."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from vqvae2_jax.metrics.frechet import check_features

_BLOCK = 1024


def nearest(queries: ArrayLike, parts: Iterable[tuple[ArrayLike, ArrayLike]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest of many points to each query. Distances are computed in blocks on the default device.

    Args:
      queries: [M, D].
      parts: the points, in parts that need not be in memory together: names int [N_i], features [N_i, D].

    Returns:
      The name of the nearest point, int64 [M], the first one of equally near ones; and its distance, float32 [M].

    Raises:
      ValueError: shapes that do not match, no points, features that are not finite.
    """
    queries = check_features(queries)
    # Centered, because with a mean far from 0 the squares of float32 distances lose their digits.
    center = queries.mean(axis=0)
    blocks = [_pad(queries[i : i + _BLOCK] - center) for i in range(0, len(queries), _BLOCK)]
    best, nearest_names = np.full(len(queries), np.inf, np.float32), np.full(len(queries), -1, np.int64)
    for names, points in parts:
        points = check_features(points)
        if points.shape[1] != queries.shape[1]:
            raise ValueError(f'{queries.shape[1]} and {points.shape[1]} features: of two networks?')
        for start in range(0, len(points), _BLOCK):
            others = _pad(points[start : start + _BLOCK] - center)
            found = [jax.device_get(_nearest_in_block(block, others)) for block in blocks]
            among, squared = (np.concatenate(arrays)[: len(queries)] for arrays in zip(*found, strict=True))
            nearer = squared < best
            best = np.where(nearer, squared, best)
            nearest_names = np.where(nearer, np.asarray(names)[start + among], nearest_names)
    if (nearest_names < 0).all():
        raise ValueError('there are no points')
    return nearest_names, np.sqrt(best)


def _pad(points):
    # One compiled shape: the last block repeats its last point, which is found at its first place.
    return jnp.asarray(points[np.minimum(np.arange(_BLOCK), len(points) - 1)], jnp.float32)


@jax.jit
def _nearest_in_block(x, points):
    product = jnp.matmul(x, points.T, precision=jax.lax.Precision.HIGHEST)
    squared = jnp.maximum((x * x).sum(1)[:, None] + (points * points).sum(1) - 2 * product, 0)
    among = squared.argmin(axis=1)
    return among, jnp.take_along_axis(squared, among[:, None], axis=1)[:, 0]
