"""Improved precision and recall (Kynkäänniemi et al. 2019).

The manifold of a set is the union of balls around its images' features. The radius of a ball is the distance to the
k-th nearest neighbor in the set. Precision is the fraction of generated images inside the real manifold, recall the
fraction of real images inside the generated one. Distances are computed on the default device in blocks of rows, so the
N x M matrix is never held as a whole.
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from vqvae2_jax.metrics.frechet import check_features

NEIGHBORS = 3
_BLOCK = 1024


def precision_recall(real: ArrayLike, generated: ArrayLike, neighbors: int = NEIGHBORS) -> tuple[float, float]:
    """Returns precision and recall, in [0, 1].

    Args:
      real: [N, D].
      generated: [M, D]. N and M exceed `neighbors`. The paper takes 50 000 of both; the values depend on N and M.
      neighbors: k.

    Raises:
      ValueError: shapes that do not match, too few images, features that are not finite.
    """
    real, generated = check_features(real), check_features(generated)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f'the sets have {real.shape[1]} and {generated.shape[1]} features: of two networks?')
    if min(len(real), len(generated)) <= neighbors:
        raise ValueError(f'sets of {len(real)} and {len(generated)} images: more than {neighbors} of each are needed')
    # Centered, because with a mean far from 0 the squares of float32 distances lose their digits.
    center = real.mean(axis=0)
    real, generated = (jnp.asarray(features - center, jnp.float32) for features in (real, generated))
    precision = _inside(real, _radii(real, neighbors), generated)
    recall = _inside(generated, _radii(generated, neighbors), real)
    return float(precision.mean()), float(recall.mean())


def _radii(points, neighbors):
    # squared distance of each point [N, D] to its k-th nearest other point: [N]
    blocks = [_kth_distance(_block(points, start), points, neighbors) for start in range(0, len(points), _BLOCK)]
    return jnp.concatenate(blocks)[: len(points)]


def _inside(points, radii, queries):
    # whether each query [M, D] lies in a ball: bool [M]
    blocks = [_any_ball(_block(queries, start), points, radii) for start in range(0, len(queries), _BLOCK)]
    return np.concatenate(blocks)[: len(queries)]


def _block(points, start):
    # One compiled shape: the last block repeats its last point.
    return points[np.minimum(np.arange(start, start + _BLOCK), len(points) - 1)]


def _squared(x, y):
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum((x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * product, 0)


@jax.jit(static_argnums=2)
def _kth_distance(x, points, neighbors):
    # The nearest point is the point itself.
    return -jax.lax.top_k(-_squared(x, points), neighbors + 1)[0][:, -1]


@jax.jit
def _any_ball(x, points, radii):
    return (_squared(x, points) <= radii).any(axis=1)
