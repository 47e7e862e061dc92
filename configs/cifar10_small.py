"""CIFAR-10 on two CPU cores: configs/cifar10.py, narrowed and shortened. `python -m benchmarks.orders` starts from it.

  python -m benchmarks.cifar10_npz cifar-10-binary.tar.gz data/cifar10.npz
  python -m vqvae2_jax.main --config=configs/cifar10_small.py

The priors train at a constant rate, so that their learning curves can be compared at any time.
Measured: see "Likelihood by order" in docs/sampling.md.
"""

from ml_collections import ConfigDict

from vqvae2_jax import load_config


def get_config() -> ConfigDict:
    config = load_config('cifar10')
    config.name = 'cifar10_small'
    config.data.update(name='npz', path='data/cifar10.npz', splits=())

    config.vqvae.update(hidden_channels=64, residual_channels=32, codebook_size=256, codebook_dim=32)
    config.vqvae.training.update(
        steps=2_000,
        batch_size=32,
        learning_rate=1e-3,
        warmup_steps=50,
        eval_every=500,
        image_every=1_000,
        save_every=500,
    )

    config.prior.top.update(
        hidden_channels=64,
        residual_channels=64,
        num_residual_blocks=4,
        num_attention_layers=2,
        num_heads=4,
        num_output_blocks=1,
        dropout=0.0,
        dtype='float32',
    )
    config.prior.bottom.update(
        hidden_channels=64, residual_channels=64, num_residual_blocks=4, num_cond_blocks=2, dropout=0.0, dtype='float32'
    )
    for prior in config.prior.values():
        prior.attention_dropout = 0.0
        prior.training.update(
            steps=800,
            batch_size=16,
            learning_rate=4e-3,
            warmup_steps=50,
            lr_schedule='constant',
            params_ema_decay=0.99,
            log_every=20,
            eval_every=100,
            eval_examples=1_000,
            image_every=800,
            save_every=200,
        )

    config.classifier.update(widths=(32, 64, 128), blocks=(1, 1, 1))
    config.classifier.training.update(
        steps=1_000,
        batch_size=64,
        learning_rate=2e-3,
        warmup_steps=50,
        params_ema_decay=0.99,
        eval_every=200,
        save_every=200,
    )

    config.sample.update(count=1_000, batch_size=200)
    config.evaluate.batch_size = 200
    return config
