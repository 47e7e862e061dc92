"""CIFAR-10 on two CPU cores, from images to samples.

  python -m benchmarks.cifar10_npz cifar-10-binary.tar.gz data/cifar10.npz
  python -m vqvae2_jax.main --config=configs/cifar10_cpu.py --config.evaluate.inception=fetch

With one core for each training, and both priors at once (--job=prior --level=top and --level=bottom in two processes),
stage 1 took 25 minutes, the top prior 40 and the bottom prior 42 on an AMD EPYC (2026-12-01). The classifier and the
evaluation were not timed with this config. Measured so far: docs/results.md.
"""

from ml_collections import ConfigDict

from vqvae2_jax import load_config


def get_config() -> ConfigDict:
    config = load_config('cifar10_small')
    config.name = 'cifar10_cpu'
    config.data.held_out = (0.04, 0.2)

    config.vqvae.codebook_size = 512
    config.vqvae.training.update(steps=6_000, lr_schedule='cosine', eval_every=1_000, image_every=3_000)
    config.codes.flip = True

    config.prior.top.training.update(steps=20_000, eval_every=1_000, image_every=10_000, save_every=1_000)
    config.prior.bottom.training.update(steps=5_000, eval_every=500, image_every=2_500, save_every=500)
    for prior in config.prior.values():
        prior.label_dropout = 0.1  # for guidance
        prior.training.lr_schedule = 'cosine'

    config.classifier.training.update(steps=2_000, lr_schedule='cosine', eval_every=500, save_every=500)

    config.sample.count = 10_000
    config.evaluate.references = ('test', 'train')  # train: 38 000 passes of Inception
    return config
