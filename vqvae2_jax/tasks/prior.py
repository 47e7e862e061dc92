"""Stage 2: one level's prior, trained by maximum likelihood on extracted codes (VQ-VAE-2 algorithm 2)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vqvae2_jax.models.prior import Prior
from vqvae2_jax.sampling.ancestral import sample_keys, sample_level
from vqvae2_jax.tasks.task import Task, make_likelihood_task


def make_task(
    model: Prior, level: int, num_levels: int, decode: Callable[[tuple[jax.Array, ...]], jax.Array] | None = None
) -> Task:
    """Makes the task of a prior over batches {'codes_l': int32 [B, h_l, w_l], 'label': int32 [B]}.

    A batch has the codes of this level and of all coarser levels; level 0 is the finest.

    Args:
      model: the prior of `level`.
      level: the level that is trained.
      num_levels: number of levels.
      decode: decodes codes int32 [B, h_l, w_l] of the levels `level` to `num_levels` - 1 to images float32
        [B, H, W, C] in [-1, 1], for pictures; None: no pictures.
    """

    def targets_and_inputs(batch):
        codes, coarser = batch[f'codes_{level}'], tuple(batch[f'codes_{i}'] for i in range(level + 1, num_levels))
        return codes, (codes, batch['label'] if model.num_classes else None, coarser)

    def visualize(params, model_state, batch):
        codes, (_, labels, coarser) = targets_and_inputs(batch)
        keys = sample_keys(jax.random.key(0), jnp.arange(codes.shape[0]))
        sampled = sample_level(model, params, keys, labels, coarser).codes
        return decode((codes, *coarser)), decode((sampled, *coarser))

    image_labels = ('codes of\nan image', 'sampled\ncodes')
    return make_likelihood_task(model, targets_and_inputs, visualize if decode else None, image_labels)
