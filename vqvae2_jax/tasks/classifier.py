"""The classifier that scores samples (VQ-VAE-2 section 3.3). The paper does not describe it."""

import jax.numpy as jnp
import optax

from vqvae2_jax.models.resnet import ResNet
from vqvae2_jax.tasks.task import Task, as_floats, to_float


def make_task(model: ResNet) -> Task:
    """Makes the task over batches {'image': uint8 [B, H, W, C], 'label': int32 [B]}."""

    def init(key, batch):
        return model.init(key, to_float(batch['image']))['params'], {}

    def per_example(logits, labels):
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)  # [B] nats
        return {'nll': nll, 'accuracy': (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)}

    def loss(params, variables, batch, key):
        logits = model.apply({'params': params}, to_float(batch['image']), train=True, rngs={'dropout': key})
        metrics = {name: jnp.mean(value) for name, value in per_example(logits, batch['label']).items()}
        return metrics['nll'], (variables, {'loss': metrics['nll'], **metrics})

    def eval_step(params, variables, batch):
        return per_example(model.apply({'params': params}, to_float(batch['image'])), batch['label'])

    return Task(init, loss, eval_step, as_floats, 'nll')
