"""CIFAR-10 at 32x32 with the whole pipeline, for one GPU.

  python -m vqvae2_jax.main --config=configs/cifar10.py
  sh benchmarks/run_cifar10.sh DATA    # from the raw archives, with FID

Reads the TFDS dataset `cifar10`, prepared as array_record (README, "TensorFlow Datasets"); or a folder with one
subfolder per class: --config.data.name=folder --config.data.path=... --config.data.splits="()".
Two levels of codes, 16x16 and 8x8. Fields that are not set have the defaults of vqvae2_jax/config/base.py.
The paper has no CIFAR-10 results; sizes here are this project's choice, for less than half an hour on an H200 by an
estimate from its FLOPs. Measured: not run yet.
"""

from ml_collections import ConfigDict

from vqvae2_jax.config import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = 'cifar10'

    config.data.name = 'cifar10'
    config.data.splits = ('train[:90%]', 'train[90%:]', 'test')
    config.data.image_size = (32, 32)
    config.data.channels = 3
    config.data.num_classes = 10
    config.data.flip = True

    config.vqvae.preview_grad_scale = 0.3
    config.vqvae.training.update(
        steps=20_000,
        batch_size=256,
        learning_rate=5e-4,
        warmup_steps=500,
        lr_schedule='cosine',
        params_ema_decay=0.99,  # the span of the codebook's averages
        log_every=100,
        eval_every=2_000,
        image_every=4_000,
        save_every=2_000,
    )

    config.codes.batch_size = 512

    config.prior.top.order = 'wavefront'  # on a GPU the launches of raster order's many steps decide (docs/sampling.md)
    config.prior.top.hidden_channels = 256
    config.prior.top.residual_channels = 256
    config.prior.top.num_residual_blocks = 12
    config.prior.top.num_attention_layers = 4
    config.prior.top.num_output_blocks = 4
    config.prior.top.dropout = 0.3
    config.prior.top.attention_dropout = 0.1
    config.prior.top.dtype = 'bfloat16'
    config.prior.top.training.update(
        steps=20_000,
        batch_size=256,
        learning_rate=5e-4,
        warmup_steps=1_000,
        lr_schedule='cosine',
        clip_norm=1.0,
        log_every=100,
        eval_every=2_000,
        image_every=10_000,
        save_every=2_000,
    )
    config.prior.bottom.update(config.prior.top)
    config.prior.bottom.update(
        num_attention_layers=0, num_output_blocks=0, num_cond_blocks=8, dropout=0.2, attention_dropout=0.0
    )
    config.prior.bottom.training.steps = 10_000

    config.classifier.widths = (64, 128, 256)
    config.classifier.blocks = (2, 2, 2)
    config.classifier.dropout = 0.2
    config.classifier.flip = True
    config.classifier.crop = True
    config.classifier.training.update(
        batch_size=256,
        learning_rate=1e-3,
        warmup_steps=500,
        lr_schedule='cosine',
        weight_decay=5e-2,
        log_every=100,
        eval_every=1_000,
        save_every=1_000,
    )

    config.sample.count = 50_000
    config.sample.batch_size = 512

    config.reject.keep_fraction = 0.5

    config.evaluate.references = ('train',)  # FID wants many images
    config.evaluate.cas = True
    config.evaluate.batch_size = 512
    return config
