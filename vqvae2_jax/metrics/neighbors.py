"""The nearest neighbors of some images among many, by the Euclidean distance of their features."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from vqvae2_jax.metrics.frechet import check_features

BLOCK = 1024  # points of which distances are computed at once


def take_block(points: Any, start: int) -> Any:
    """Returns `BLOCK` rows of points [N, D] from `start` on; the last block repeats its last point, for one shape."""
    return points[np.minimum(np.arange(start, start + BLOCK), len(points) - 1)]


def squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the squared Euclidean distances of x [N, D] and y [M, D], [N, M], at least 0.

    Both should be centered: with a mean far from 0 the squares of float32 distances lose their digits.
    """
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum((x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * product, 0)


def nearest(queries: ArrayLike, parts: Iterable[tuple[ArrayLike, ArrayLike]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest of many points to each query. Distances are computed in blocks on the default device.

    Args:
      queries: [M, D].
      parts: the points, in parts that need not be in memory together: names int [N_i], features [N_i, D]. Empty
        parts are allowed.

    Returns:
      The name of the nearest point, int64 [M], the first one of equally near ones; and its distance, float32 [M].

    Raises:
      ValueError: shapes that do not match, no points, features that are not finite.
    """
    queries = check_features(queries)
    center = queries.mean(axis=0)
    blocks = [_centered_block(queries, start, center) for start in range(0, len(queries), BLOCK)]
    best, nearest_names = np.full(len(queries), np.inf, np.float32), np.full(len(queries), -1, np.int64)
    for names, points in parts:
        if not len(points):
            continue
        points = check_features(points)
        if points.shape[1] != queries.shape[1]:
            raise ValueError(f'{queries.shape[1]} and {points.shape[1]} features: of two networks?')
        for start in range(0, len(points), BLOCK):
            others = _centered_block(points, start, center)
            found = jax.device_get([_nearest_in_block(block, others) for block in blocks])
            among, squared = (np.concatenate(arrays)[: len(queries)] for arrays in zip(*found, strict=True))
            nearer = squared < best
            best = np.where(nearer, squared, best)
            nearest_names = np.where(nearer, np.asarray(names)[start + among], nearest_names)
    if (nearest_names < 0).all():
        raise ValueError('there are no points')
    return nearest_names, np.sqrt(best)


def _centered_block(points, start, center):
    return jnp.asarray(take_block(points, start) - center, jnp.float32)


@jax.jit
def _nearest_in_block(x, points):
    squared = squared_distances(x, points)
    among = squared.argmin(axis=1)  # a repeated point is found at its first place
    return among, jnp.take_along_axis(squared, among[:, None], axis=1)[:, 0]
