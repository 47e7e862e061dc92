"""CIFAR-10 on two CPU cores, class-conditional, with all stages: at most three hours of training and sampling.

  python -m benchmarks.cifar10_npz cifar-10-binary.tar.gz data/cifar10.npz
  python -m vqvae2_jax.main --config=configs/cifar10_cpu.py

Reads the 50 000 training images alone, and cuts them into 38 000 for training, 2 000 for validation and 10 000 held-out
ones, which are "test" here: they are not CIFAR-10's own test images.
Measured, with the trials that led to these values: see docs/results.md.
"""

from ml_collections import ConfigDict

from vqvae2_jax import load_config


def get_config() -> ConfigDict:
    config = load_config('cifar10_small')
    config.name = 'cifar10_cpu'
    config.data.held_out = (0.04, 0.2)

    config.vqvae.codebook_size = 512
    config.vqvae.training.update(steps=6_000, lr_schedule='cosine', eval_every=1_000, image_every=2_000, save_every=500)

    config.codes.flip = True  # as stage 1, the priors train on mirrored images too
    config.prior.top.update(dropout=0.1, attention_dropout=0.1)
    config.prior.top.training.update(steps=20_000, lr_schedule='cosine', eval_every=1_000, image_every=5_000)
    config.prior.bottom.training.update(steps=6_000, lr_schedule='cosine', eval_every=1_000, image_every=3_000)
    config.classifier.training.update(steps=4_000, lr_schedule='cosine', eval_every=500)

    config.sample.count = 10_000
    config.evaluate.references = ('test', 'train')
    return config
