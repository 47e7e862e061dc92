"""The classifier that scores samples (VQ-VAE-2 section 3.3). The paper does not describe it."""

from vqvae2_jax.models.resnet import ResNet
from vqvae2_jax.tasks.task import Task, make_likelihood_task, to_float


def make_task(model: ResNet) -> Task:
    """Makes the task of a classifier, trained by maximum likelihood (see `make_likelihood_task`), without pictures.

    Batches are {'image': uint8 [B, H, W, C], 'label': int32 [B] in [0, number of classes)}.
    """
    return make_likelihood_task(model, lambda batch: (batch['label'], (to_float(batch['image']),)))
