"""Classifier-based rejection (VQ-VAE-2 section 3.3): keep the samples that a classifier assigns to their class."""

import math

import numpy as np


def select_top_per_class(scores: np.ndarray, labels: np.ndarray, fraction: float) -> np.ndarray:
    """Selects the best-scoring fraction of every class.

    Each class is ranked on its own, which keeps the classes balanced. One ranking over all classes would keep mostly
    those that are easy to recognize.

    Args:
      scores: float [N], higher is better, such as the log-probability of the intended class.
      labels: int [N], the intended class.
      fraction: share of every class to keep, in (0, 1]; the number of samples is rounded up, so that no class is lost.

    Returns:
      Indices of the selected samples, int64 [number of selected samples], ascending.

    Raises:
      ValueError: a fraction outside (0, 1], lengths that differ, or a score that is NaN.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f'the fraction to keep must be in (0, 1]; it is {fraction}')
    if len(scores) != len(labels):
        raise ValueError(f'{len(scores)} scores for {len(labels)} labels')
    if np.isnan(scores).any():
        raise ValueError(f'{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN; the classifier is broken')
    kept = []
    for label in np.unique(labels):
        indices = np.flatnonzero(labels == label)
        best = indices[np.argsort(-scores[indices], kind='stable')]
        kept.append(best[: math.ceil(round(fraction * len(indices), 9))])  # 0.07 * 100 is 7.000000000000001
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.int64)


def log_probability(logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Returns the log-probability of the label under a softmax over the logits.

    In float32 a softmax rounds to exactly 1 if the label's logit is more than about 17 above the others, and a log
    softmax to exactly 0. This computes -log(1 + sum of exp(logit - logit of the label) over the other classes) in
    float64, which distinguishes such images up to a margin of about 700.

    Args:
      logits: float [N, S] for S classes, at least 2.
      label: int [N].

    Returns:
      float64 [N].
    """
    logits, rows = np.array(logits, np.float64), np.arange(len(logits))
    own = logits[rows, label]
    logits[rows, label] = -np.inf  # leaves the other classes
    top = logits.max(axis=-1)
    others = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
    with np.errstate(invalid='ignore'):  # NaN stays NaN; `select_top_per_class` refuses it
        return -np.logaddexp(0, others - own)
