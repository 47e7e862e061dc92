"""Fréchet Inception Distance (Heusel et al. 2017): the distance of two Gaussians fitted to features of two image sets.

NumPy in, float64 arithmetic, Python floats out. N images, D features (2048 of the Inception network for FID).
"""

import dataclasses
import functools
import operator

import numpy as np
from numpy.typing import ArrayLike

_CHUNK = 1024  # images that are converted to float64 at once


@dataclasses.dataclass
class Moments:
    """Count, mean and covariance of features; the moments of two sets add up.

    Sets are merged by the parallel form of Welford's update, which avoids cancellation.

    Attributes:
      count: N.
      mean: float64 [D].
      scatter: float64 [D, D], the sum of outer products of the deviations from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: ArrayLike, *, allow_nonfinite: bool = False) -> 'Moments':
        """Computes the moments of features.

        Args:
          features: float [N, D], N at least 1.
          allow_nonfinite: give NaN as the moments of features that are not finite. `covariance` then raises.

        Raises:
          ValueError: another shape, N is 0, or a feature is not finite.
        """
        features = check_features(features, allow_nonfinite)
        chunks = (features[start : start + _CHUNK].astype(np.float64) for start in range(0, len(features), _CHUNK))
        return functools.reduce(operator.add, map(cls._of_chunk, chunks))

    @classmethod
    def of_gaussian(cls, mean: ArrayLike, covariance: ArrayLike) -> 'Moments':
        """Returns moments with a given mean [D] and covariance [D, D]. Their count is 2, not that of the images.

        Raises:
          ValueError: other shapes.
        """
        mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
            raise ValueError(f'a mean [D] and a covariance [D, D] are needed, got {mean.shape} and {covariance.shape}')
        return cls(2, mean, covariance)  # over N - 1

    @classmethod
    def _of_chunk(cls, features):
        mean = features.mean(axis=0)
        centered = features - mean
        return cls(len(features), mean, centered.T @ centered)

    def __add__(self, other: 'Moments') -> 'Moments':
        count, difference = self.count + other.count, other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = np.outer(difference, difference) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def covariance(self) -> np.ndarray:
        """Returns the unbiased covariance (over N - 1), float64 [D, D].

        Raises:
          ValueError: fewer than two images, all have the same features, or features are not finite.
        """
        if not np.isfinite(self.scatter).all():
            raise ValueError(f'some of {self.count} images have features that are not finite: broken weights or images')
        if self.count < 2:
            raise ValueError(f'a set of {self.count} image has no covariance: give at least 2, better 10 000')
        if np.trace(self.scatter) <= 1e-13 * self.count * np.square(self.mean).sum():
            raise ValueError(
                f'all {self.count} images of a set have the same features: are they constant, or copies of one image?'
            )
        return self.scatter / (self.count - 1)

    @functools.cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance, float64 [D, D]; cached for comparison with many sets."""
        values, vectors = np.linalg.eigh(self.covariance())
        return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def frechet_distance(first: Moments, second: Moments) -> float:
    """Returns |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), at least 0.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2). That matrix is symmetric,
    so the result is real and stable also with fewer images than features, unlike with a general matrix root.

    Raises:
      ValueError: different numbers of features, or as `Moments.covariance`.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f'the sets have {first.mean.shape[0]} and {second.mean.shape[0]} features: of two networks?')
    covariances = first.covariance(), second.covariance()
    mixed = np.linalg.eigvalsh(first.root @ covariances[1] @ first.root).clip(min=0)
    means = np.square(first.mean - second.mean).sum()
    return max(float(means + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.sqrt(mixed).sum()), 0.0)


def check_features(features: ArrayLike, allow_nonfinite: bool = False) -> np.ndarray:
    """Returns features as an array [N, D].

    Raises:
      ValueError: another shape, N is 0, or a feature is not finite, unless `allow_nonfinite`.
    """
    features = np.asarray(features)
    if features.ndim != 2 or not len(features):
        raise ValueError(f'features must be [N, D] with N at least 1, got shape {features.shape}')
    if not (allow_nonfinite or np.isfinite(features).all()):
        bad = int((~np.isfinite(features).all(axis=1)).sum())
        raise ValueError(f'{bad} of {len(features)} images have features that are not finite: broken weights or images')
    return features
