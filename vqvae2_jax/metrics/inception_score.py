"""Inception Score (Salimans et al. 2016): confidence of the Inception network's predictions, and their diversity."""

import numpy as np
from numpy.typing import ArrayLike

SPLITS = 10


def inception_score(logits: ArrayLike, splits: int = SPLITS) -> tuple[float, float]:
    """Returns exp of the mean KL divergence of p(class | image) from p(class).

    Args:
      logits: [N, classes], in an order that is random with respect to the classes, because splits are contiguous.
      splits: number of parts that the score is computed on; at most N.

    Returns:
      Mean and standard deviation over the splits.

    Raises:
      ValueError: another shape, too few images, logits that are not finite.
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or len(logits) < splits:
        raise ValueError(f'logits must be [N, classes] with N at least {splits}, got shape {logits.shape}')
    if not np.isfinite(logits).all():
        raise ValueError('logits has entries that are not finite: broken weights or images')
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    scores = []
    for part in np.array_split(log_p, splits):
        marginal = np.log(np.exp(part).mean(axis=0))
        scores.append(np.exp((np.exp(part) * (part - marginal)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
