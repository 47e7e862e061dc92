"""Improved precision and recall (Kynkäänniemi et al. 2019): what share of each set lies in the other's manifold.

A set's manifold is the union of balls around its images' features, each reaching to the image's k-th nearest neighbour
in the set. Precision is the share of generated images inside the real manifold, recall that of real images inside the
generated one. Distances are computed on the device, a block of rows at a time: N x M of them are never held at once.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vqvae2_jax.metrics.frechet import checked_features

NEIGHBORS = 3
_BLOCK = 1024


def precision_recall(real, generated, neighbours: int = NEIGHBORS) -> tuple[float, float]:
    """Shares in [0, 1].

    Args:
      real: [N, D]. generated: [M, D]. More than `neighbours` images each; the paper takes 50 000 of both, and the
        numbers depend on how many.
      neighbours: k.

    Raises:
      ValueError: shapes that do not fit, too few images, features that are not finite.
    """
    real, generated = checked_features(real), checked_features(generated)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f'the sets have {real.shape[1]} and {generated.shape[1]} features: of two networks?')
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(f'sets of {len(real)} and {len(generated)} images: more than {neighbours} of each are needed')
    # Centred first, as the squares of float32 distances would lose their digits to a mean far from 0.
    centre = real.mean(axis=0)
    real, generated = (jnp.asarray(features - centre, jnp.float32) for features in (real, generated))
    precision = _inside(real, _radii(real, neighbours), generated)
    recall = _inside(generated, _radii(generated, neighbours), real)
    return float(precision.mean()), float(recall.mean())


def _radii(points, neighbours):
    """Squared distance of every point [N, D] to its k-th nearest other point: [N]."""
    blocks = [_kth_distance(_block(points, start), points, neighbours) for start in range(0, len(points), _BLOCK)]
    return jnp.concatenate(blocks)[: len(points)]


def _inside(points, radii, queries):
    """Whether each query [M, D] lies in a ball: bool [M]."""
    blocks = [_any_ball(_block(queries, start), points, radii) for start in range(0, len(queries), _BLOCK)]
    return np.concatenate(blocks)[: len(queries)]


def _block(points, start):
    # one compiled shape: the last block repeats its last point
    return points[np.minimum(np.arange(start, start + _BLOCK), len(points) - 1)]


def _squared(x, y):
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum((x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * product, 0)


@jax.jit(static_argnums=2)
def _kth_distance(x, points, neighbours):
    # The nearest point is the point itself.
    return -jax.lax.top_k(-_squared(x, points), neighbours + 1)[0][:, -1]


@jax.jit
def _any_ball(x, points, radii):
    return (_squared(x, points) <= radii).any(axis=1)
