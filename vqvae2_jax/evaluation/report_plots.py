"""Plots of a report: learning curves, and the rejection sweep."""

from collections.abc import Sequence
from typing import Any

from vqvae2_jax.io.plots import Panel

_DISTANCES = {'fid': 'FID', 'frechet_distance': 'Fréchet distance'}


def curve_panel(
    title: str,
    lines: Sequence[dict[str, float]],
    metric: str,
    labels: tuple[str, str],
    ylabel: str,
    hlines: dict[str, float] | None = None,
    *,
    log_y: bool = False,
) -> Panel:
    """Returns the learning curves of one training.

    Args:
      title: of the panel.
      lines: of metrics.jsonl, with 'step' and 'train/<metric>' or 'validation/<metric>'.
      metric: name of the metric.
      labels: of the training and of the validation curve.
      ylabel: name of the metric with its unit.
      hlines: label -> value of a horizontal line.
      log_y: logarithmic axis.
    """
    curves = {}
    for prefix, label in zip(('train', 'validation'), labels, strict=True):
        points = [(line['step'], line[f'{prefix}/{metric}']) for line in lines if f'{prefix}/{metric}' in line]
        if points:
            curves[label] = tuple(zip(*points, strict=True))
    return Panel(title, curves, ylabel, hlines or {}, log_y)


def curve_labels(*, averaged: bool, dropout: bool, augmented: bool) -> tuple[str, str]:
    """Returns labels of the training and the validation curve, with everything in which the two differ.

    Args:
      averaged: validation uses averaged parameters.
      dropout: training uses dropout.
      augmented: training images are augmented.
    """
    train = ['train'] + ['last weights'] * averaged + ['dropout'] * dropout + ['augmented'] * augmented
    return ', '.join(train), ', '.join(['held out'] + ['averaged weights'] * averaged)


def sweep_panels(points: Sequence[dict[str, Any]]) -> list[Panel]:
    """Returns the plots of a rejection sweep (VQ-VAE-2 figure 7).

    Args:
      points: from `generative.rejection_sweep`; at least one.
    """
    distance = next(name for name in _DISTANCES if name in points[0])
    x = 'inception_score' if all('inception_score' in p for p in points) else 'confidence'
    distances = {'against real images': distance, 'against reconstructions': f'{distance}_against_reconstructions'}
    curves = {label: ([p[x] for p in points], [p[key] for p in points]) for label, key in distances.items()}
    kept = f'kept {points[0]["keep_fraction"]:.0%} to {points[-1]["keep_fraction"]:.0%}'
    trade_off = {kept: ([p['recall'] for p in points], [p['precision'] for p in points])}
    images = f'n = {points[0]["count"]}'
    xlabel = {'inception_score': 'Inception Score', 'confidence': 'mean confidence of the classifier'}[x]
    return [
        Panel(f'quality, {kept}, {images}', curves, _DISTANCES[distance], xlabel=xlabel),
        Panel(f'precision and recall, {images}', trade_off, 'precision', xlabel='recall'),
    ]
