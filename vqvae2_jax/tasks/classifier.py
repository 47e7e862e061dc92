"""The classifier that judges samples (VQ-VAE-2 section 3.3); the paper does not say what it is."""

import jax.numpy as jnp
import optax

from vqvae2_jax.models.resnet import ResNet
from vqvae2_jax.tasks.task import Task, as_floats, to_float


def make_task(model: ResNet) -> Task:
    """The stage over batches {'image': uint8 [B, H, W, C], 'label': int32 [B]}."""

    def init(key, batch):
        return model.init(key, to_float(batch['image']))['params'], {}

    def per_example(logits, labels):
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)  # [B] nats
        return {'nll': nll, 'accuracy': (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)}

    def loss(params, variables, batch, key):
        logits = model.apply({'params': params}, to_float(batch['image']), train=True, rngs={'dropout': key})
        metrics = {name: jnp.mean(value) for name, value in per_example(logits, batch['label']).items()}
        return metrics['nll'], (variables, {'loss': metrics['nll'], **metrics})

    def evaluate(params, variables, batch):
        return per_example(model.apply({'params': params}, to_float(batch['image'])), batch['label'])

    return Task(init, loss, evaluate, as_floats, 'nll')
