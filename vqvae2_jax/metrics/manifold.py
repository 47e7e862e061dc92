"""Improved precision and recall (Kynkäänniemi et al. 2019).

The manifold of a set is the union of balls around its images' features. The radius of a ball is the distance to the
k-th nearest neighbor in the set. Precision is the fraction of generated images inside the real manifold, recall the
fraction of real images inside the generated one. Distances are computed on the default device in blocks of rows, so the
N x M matrix is never held as a whole.
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from vqvae2_jax.metrics.frechet import check_features
from vqvae2_jax.metrics.neighbors import BLOCK, squared_distances, take_block

NEIGHBORS = 3


def precision_recall(
    real: ArrayLike,
    generated: ArrayLike,
    neighbors: int = NEIGHBORS,
    track: Callable[[Sequence], Iterable] = iter,
) -> tuple[float, float]:
    """Returns precision and recall, in [0, 1].

    Args:
      real: [N, D].
      generated: [M, D]. N and M exceed `neighbors`. The paper takes 50 000 of both; the values depend on N and M.
      neighbors: k.
      track: wraps the sequence that each of the four loops over blocks of images iterates, to show progress.

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
    precision = _share_inside(real, generated, neighbors, track)
    return precision, _share_inside(generated, real, neighbors, track)


def _share_inside(points, queries, neighbors, track):
    # fraction of the queries [M, D] that lie in a ball around one of the points [N, D]
    def blocks(of):
        return track(range(0, len(of), BLOCK))

    # np.asarray waits for each block, so that the printed progress is that of the device.
    radii = [np.asarray(_kth_distance(take_block(points, start), points, neighbors)) for start in blocks(points)]
    radii = jnp.asarray(np.concatenate(radii)[: len(points)])  # squared
    inside = [np.asarray(_any_ball(take_block(queries, start), points, radii)) for start in blocks(queries)]
    return float(np.concatenate(inside)[: len(queries)].mean())


@jax.jit(static_argnums=2)
def _kth_distance(x, points, neighbors):
    # The nearest point is the point itself.
    return -jax.lax.top_k(-squared_distances(x, points), neighbors + 1)[0][:, -1]


@jax.jit
def _any_ball(x, points, radii):
    return (squared_distances(x, points) <= radii).any(axis=1)
