"""Evaluation of stage 1: reconstruction errors, codebook usage and compression; reconstructions from fewer levels."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from vqvae2_jax.distributed import sharding
from vqvae2_jax.metrics import codebook
from vqvae2_jax.tasks.task import Task, to_uint8


def make_reconstruct_fn(task: Task) -> Callable[[Any, Any, dict[str, jax.Array]], dict[str, jax.Array]]:
    """Returns a compiled (params, model_state, {'image': uint8 [B, H, W, C]}) -> {label: uint8 [B, H, W, C]}.

    Args:
      task: stage 1's.

    The labels are those of `task.image_labels`, in this order: the original image; its reconstructions from the
    coarsest level alone, then with ever finer levels; and from all levels. Call the function inside `jax.set_mesh`.
    """

    @jax.jit
    def reconstruct(params, model_state, batch):
        rows = task.visualize(params, model_state, {'image': batch['image']})
        return sharding.constrain_batch(tuple(to_uint8(images) for images in rows))

    def labeled(params, model_state, batch):
        return dict(zip(task.image_labels, reconstruct(params, model_state, batch), strict=True))

    return labeled


def reconstruction_report(
    metrics: dict[str, float],
    train_metrics: dict[str, float],
    level_names: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    image_shape: tuple[int, int, int],
    codebook_size: int,
) -> dict[str, Any]:
    """Returns the reconstruction part of a report.

    Args:
      metrics: reduced metrics of stage 1's task on a held-out split.
      train_metrics: the same on training images.
      level_names: finest first.
      shapes: (h, w) of each level's codes, finest first.
      image_shape: (H, W, C).
      codebook_size: K of every level.
    """
    levels = {}
    for name, shape in zip(level_names, shapes, strict=True):
        levels[name] = {
            'codes': list(shape),
            'codebook_usage': metrics[f'used_{name}'],
            'perplexity': metrics[f'perplexity_{name}'],
        }
        if name in level_names[1:]:
            levels[name]['without_finer_levels'] = _errors(metrics, f'_{name}_only')
    ratio = codebook.compression_ratio(image_shape, shapes, (codebook_size,) * len(shapes))
    return _errors(metrics) | {
        'train': _errors(train_metrics),
        'bits_per_image': 8 * float(math.prod(image_shape)) / ratio,
        'compression_ratio': ratio,
        'levels': levels,
    }


def _errors(metrics, suffix=''):
    mse = metrics[f'mse{suffix}']  # in [-1, 1]
    errors = {'psnr': metrics[f'psnr{suffix}'], 'mse': mse, 'mse_unit': mse / 4}
    return errors | ({'ssim': metrics[f'ssim{suffix}']} if f'ssim{suffix}' in metrics else {})
