"""Stage 2: one level's prior, trained by maximum likelihood on extracted codes (VQ-VAE-2 algorithm 2)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vqvae2_jax.models.prior import Prior
from vqvae2_jax.sampling.ancestral import sample, sample_keys
from vqvae2_jax.tasks.task import Task, as_floats


def make_task(
    model: Prior, level: int, levels: int, decode: Callable[[tuple[jax.Array, ...]], jax.Array] | None = None
) -> Task:
    """Makes the task over batches {'codes_l': int32 [B, h_l, w_l], 'label': int32 [B]}; level 0 is the finest.

    Args:
      model: the prior of `level`.
      level: its number.
      levels: how many there are.
      decode: converts codes of levels `level` .. `levels` - 1 to images in [-1, 1], for pictures; None: no pictures.
    """

    def inputs(batch):
        coarser = tuple(batch[f'codes_{i}'] for i in range(level + 1, levels))
        return batch[f'codes_{level}'], batch['label'] if model.num_classes else None, coarser

    def init(key, batch):
        return model.init(key, *inputs(batch))['params'], {}

    def per_example(logits, codes):
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, codes)  # [B, H, W] nats
        hit = jnp.argmax(logits, axis=-1) == codes
        return {'nll': jnp.mean(nll, axis=(1, 2)), 'accuracy': jnp.mean(hit, axis=(1, 2))}

    def loss(params, variables, batch, key):
        codes, labels, coarser = inputs(batch)
        logits = model.apply({'params': params}, codes, labels, coarser, train=True, rngs={'dropout': key})
        metrics = {name: jnp.mean(value) for name, value in per_example(logits, codes).items()}
        return metrics['nll'], (variables, {'loss': metrics['nll'], **metrics})

    def eval_step(params, variables, batch):
        codes, labels, coarser = inputs(batch)
        return per_example(model.apply({'params': params}, codes, labels, coarser), codes)

    def visualize(params, variables, batch):
        codes, labels, coarser = inputs(batch)
        keys = sample_keys(jax.random.key(0), jnp.arange(codes.shape[0]))
        sampled = sample(model, params, keys, labels, coarser).codes
        return decode((codes, *coarser)), decode((sampled, *coarser))

    image_labels = ('codes of\nan image', 'sampled\ncodes')
    return Task(init, loss, eval_step, as_floats, 'nll', visualize if decode else None, image_labels)
