"""Evaluation of stage 2: negative log-likelihood of the codes, baselines without a network, and bits per image."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vqvae2_jax.metrics import codebook


def likelihood_report(
    level_names: Sequence[str],
    nll: Sequence[float],
    nll_train: Sequence[float],
    codes: Sequence[np.ndarray],
    train_codes: Sequence[np.ndarray],
    codebook_sizes: Sequence[int],
    parameters: Sequence[int],
    image_shape: tuple[int, int, int] | None,
) -> dict[str, Any]:
    """Returns the likelihood part of a report. All sequences have one entry per level, finest first.

    Args:
      level_names: names of the levels.
      nll: nats per code of the held-out codes, given coarser codes.
      nll_train: nats per code of training codes.
      codes: held-out codes, int [N, h, w].
      train_codes: training codes that the per-position unigrams count, int [M, h, w].
      codebook_sizes: K of each level.
      parameters: number of parameters of the priors.
      image_shape: (H, W, C); None: there are no images.
    """
    levels = {}
    for level, (name, codebook_size) in enumerate(zip(level_names, codebook_sizes, strict=True)):
        levels[name] = {
            'nll': nll[level],
            'nll_train': nll_train[level],
            'unigram_entropy': codebook.unigram_entropy(codes[level], codebook_size),
            'positional_cross_entropy': codebook.positional_cross_entropy(
                train_codes[level], codes[level], codebook_size, alpha=1.0
            ),
            'parameters': parameters[level],
            'code_counts': codebook.histogram(codes[level], codebook_size).tolist(),
        }
    shapes = [values.shape[1:] for values in codes]
    bits = codebook.bits_per_image(nll, shapes)
    report = {
        'unit': 'nats per code',
        'levels': levels,
        'bits_per_image': bits,
        'bits_per_image_train': codebook.bits_per_image(nll_train, shapes),
    }
    return report | ({'bits_per_subpixel': bits / math.prod(image_shape)} if image_shape else {})
