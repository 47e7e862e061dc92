"""Rejection by a classifier (VQ-VAE-2 section 3.3): keep the samples that look most like their class."""

import math

import numpy as np


def select_top_per_class(scores: np.ndarray, labels: np.ndarray, share: float) -> np.ndarray:
    """Positions of the best-scoring `share` of every class, in rising order.

    Class by class, so that rejection leaves the classes as balanced as it found them: over all classes at once it would
    keep those that are easy to recognise.

    Args:
      scores: float [N], higher is better, such as the log-probability of the intended class.
      labels: int [N], the intended class.
      share: of each class, rounded up, so that no class is lost; in (0, 1].

    Raises:
      ValueError: a share outside (0, 1], lengths that differ, or a score that is NaN.
    """
    if not 0 < share <= 1:
        raise ValueError(f'the share to keep must lie in (0, 1]; it is {share}')
    if len(scores) != len(labels):
        raise ValueError(f'{len(scores)} scores for {len(labels)} labels')
    if np.isnan(scores).any():
        raise ValueError(f'{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN; the classifier is broken')
    kept = []
    for label in np.unique(labels):
        positions = np.flatnonzero(labels == label)
        best = positions[np.argsort(-scores[positions], kind='stable')]
        kept.append(best[: math.ceil(round(share * len(positions), 9))])  # 0.07 * 100 is 7.000000000000001
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.int64)
