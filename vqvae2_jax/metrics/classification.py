"""Accuracy, top-k accuracy and per-class accuracy. NumPy in, Python floats out."""

import numpy as np
from numpy.typing import ArrayLike


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Returns the fraction of predictions that equal the label, in [0, 1].

    Args:
      predicted: integers [N], N at least 1.
      labels: integers [N].

    Raises:
      TypeError, ValueError: not integers, not [N] both, or empty.
    """
    predicted, labels = _integers('predicted', predicted), _integers('labels', labels)
    _same_length('predicted', predicted, labels)
    return float((predicted == labels).mean())


def top_k_accuracy(scores: ArrayLike, labels: ArrayLike, k: int) -> float:
    """Returns the fraction of examples whose label is among the k highest scores, in [0, 1].

    An example counts if fewer than k other classes score at least as high as its label. A tie is a miss, so a constant
    score has accuracy 0.

    Args:
      scores: floats [N, classes], logits or probabilities.
      labels: integers [N] in 0..classes-1.
      k: in 1..classes.

    Raises:
      TypeError, ValueError: wrong type or shape, empty, not finite, a label or k out of range.
    """
    scores, labels = np.asarray(scores), _integers('labels', labels)
    if scores.ndim != 2:
        raise ValueError(f'scores must be [N, classes], got shape {scores.shape}')
    _same_length('scores', scores, labels)
    classes = scores.shape[1]
    _in_range('labels', labels, classes)
    if not 1 <= k <= classes:
        raise ValueError(f'k is {k}, but there are {classes} classes')
    if not np.isfinite(scores).all():
        raise ValueError('scores has NaN or infinite entries, which cannot be ranked')
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    rivals = (scores >= own).sum(axis=1) - 1  # less the label itself
    return float((rivals < k).mean())


def per_class_accuracy(predicted: ArrayLike, labels: ArrayLike, classes: int) -> list[float | None]:
    """Returns the accuracy over the examples of each class, by class index; None for a class without examples.

    Args:
      predicted: integers [N], N at least 1.
      labels: integers [N] in 0..classes-1.
      classes: number of classes.

    Raises:
      TypeError, ValueError: not integers, not [N] both, empty, or a label out of range.
    """
    predicted, labels = _integers('predicted', predicted), _integers('labels', labels)
    _same_length('predicted', predicted, labels)
    _in_range('labels', labels, classes)
    totals = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    return [float(hit / total) if total else None for hit, total in zip(hits, totals, strict=True)]


def _integers(name: str, values) -> np.ndarray:
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f'{name} has dtype {values.dtype}; expected integer class indices')
    if values.ndim != 1:
        raise ValueError(f'{name} must be [N], got shape {values.shape}')
    return values


def _same_length(name: str, values: np.ndarray, labels: np.ndarray) -> None:
    if len(values) != len(labels) or not len(labels):
        raise ValueError(
            f'{name} has {len(values)} examples and labels has {len(labels)}; these must be equal, and at least one'
        )


def _in_range(name: str, values: np.ndarray, classes: int) -> None:
    if values.min() < 0 or values.max() >= classes:
        raise ValueError(f'{name} spans {values.min()}..{values.max()}, but {classes} classes allow 0..{classes - 1}')
