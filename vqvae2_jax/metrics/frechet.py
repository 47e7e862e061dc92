"""Fréchet Inception Distance (Heusel et al. 2017): how far apart two sets of images are, by Gaussians over features.

NumPy in, float64 arithmetic, Python floats out. N images, D features (2048 of the Inception network for FID).
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass
class Moments:
    """Count, mean and covariance of features that arrive batch by batch; two of them add up.

    Batches are merged by the parallel form of Welford's update, so that no digits are lost to cancellation.

    Attributes:
      count: N.
      mean: float64 [D].
      scatter: float64 [D, D], the sum of outer products of the deviations from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features) -> 'Moments':
        """Of one batch [N, D].

        Raises:
          ValueError: not [N, D] with N at least 1, or a feature that is not finite.
        """
        features = checked_features(features).astype(np.float64)
        centred = features - features.mean(axis=0)
        return cls(len(features), features.mean(axis=0), centred.T @ centred)

    def __add__(self, other: 'Moments') -> 'Moments':
        count, apart = self.count + other.count, other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def covariance(self) -> np.ndarray:
        """float64 [D, D], unbiased (over N - 1).

        Raises:
          ValueError: fewer than two images, or all alike.
        """
        if self.count < 2:
            raise ValueError(f'a set of {self.count} image has no covariance: give at least 2, better 10 000')
        if np.trace(self.scatter) <= 1e-13 * self.count * np.square(self.mean).sum():
            raise ValueError(
                f'all {self.count} images of a set look alike to the network: are they constant, or copies?'
            )
        return self.scatter / (self.count - 1)

    @functools.cached_property
    def root(self) -> np.ndarray:
        """The symmetric root of the covariance, float64 [D, D]; kept, as one real set is compared with many."""
        values, vectors = np.linalg.eigh(self.covariance())
        return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), at least 0.

    The trace of the root is taken from the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: unlike a general
    matrix root this is real and stable also where there are fewer images than features.

    Raises:
      ValueError: other numbers of features, or fewer than two images.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f'the sets have {first.mean.shape[0]} and {second.mean.shape[0]} features: of two networks?')
    covariances = first.covariance(), second.covariance()
    mixed = np.linalg.eigvalsh(first.root @ covariances[1] @ first.root).clip(min=0)
    apart = np.square(first.mean - second.mean).sum()
    return max(float(apart + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.sqrt(mixed).sum()), 0.0)


def checked_features(features) -> np.ndarray:
    """As [N, D]; raises ValueError unless they are finite, of that shape, and at least one."""
    features = np.asarray(features)
    if features.ndim != 2 or not len(features):
        raise ValueError(f'features must be [N, D] with N at least 1, got shape {features.shape}')
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features).all(axis=1)).sum())
        raise ValueError(f'{bad} of {len(features)} images have features that are not finite: broken weights or images')
    return features
