"""Fashion-MNIST, from images to evaluated samples in minutes on two CPU cores. The images are in the package.

  python -m vqvae2_jax.main --config=configs/fashion.py

Two levels of codes, 14x14 and 7x7. Unlike the paper, it uses `preview_grad_scale` and restarts dead codes, so that both
codebooks are in full use after some hundred steps. The priors generate in wavefront order, which trains faster here.
Fields that it does not set have the defaults of vqvae2_jax/config/base.py.
Measured: see "The demo" in README.md.
"""

from ml_collections import ConfigDict

from vqvae2_jax.config import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = 'fashion'

    config.data.num_classes = 10

    config.vqvae.hidden_channels = 64
    config.vqvae.residual_channels = 32
    config.vqvae.codebook_size = 128
    config.vqvae.codebook_dim = 32
    config.vqvae.preview_grad_scale = 1.0
    config.vqvae.training.update(
        steps=1600,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=50,
        lr_schedule='cosine',
        params_ema_decay=0.99,
        log_every=100,
        eval_every=400,
        image_every=800,
        save_every=400,
    )

    config.codes.shard_size = 4096

    for prior in config.prior.values():
        prior.order = 'wavefront'
    config.prior.top.hidden_channels = 64
    config.prior.top.residual_channels = 64
    config.prior.top.num_residual_blocks = 4
    config.prior.top.kernel_size = 3
    config.prior.top.num_attention_layers = 2
    config.prior.top.num_heads = 4
    config.prior.top.num_output_blocks = 1
    config.prior.top.dropout = 0.2
    config.prior.top.attention_dropout = 0.1
    config.prior.top.training.update(
        steps=1500,
        learning_rate=2e-3,
        warmup_steps=50,
        lr_schedule='cosine',
        clip_norm=1.0,
        params_ema_decay=0.995,
        log_every=100,
        eval_every=250,
        image_every=1500,
    )
    config.prior.bottom.hidden_channels = 64
    config.prior.bottom.residual_channels = 64
    config.prior.bottom.num_residual_blocks = 4
    config.prior.bottom.kernel_size = 3
    config.prior.bottom.num_cond_blocks = 2
    config.prior.bottom.dropout = 0.1
    config.prior.bottom.training.update(config.prior.top.training, steps=1400, batch_size=16, image_every=1400)

    config.classifier.widths = (32, 64, 128)
    config.classifier.blocks = (1, 1, 1)
    config.classifier.stem_stride = 2
    config.classifier.dropout = 0.3
    config.classifier.flip = True
    config.classifier.training.update(
        steps=700,
        batch_size=64,
        learning_rate=2e-3,
        warmup_steps=50,
        lr_schedule='cosine',
        weight_decay=1e-2,
        params_ema_decay=0.99,
        log_every=100,
        eval_every=100,
        save_every=100,
    )

    config.sample.batch_size = 200
    config.sample.shard_size = 200
    config.sample.temperature.update(top=0.9, bottom=0.8)  # cleaner pictures; 1.0 is the priors' own distribution

    config.reject.keep_fraction = 0.5  # the best half of each class

    config.evaluate.batch_size = 200
    config.evaluate.cas = True  # two more classifiers, trained only on generated images
    return config
