"""CIFAR-10 at 32x32 with the whole pipeline, for one GPU.

  python -m vqvae2_jax.main --config=configs/cifar10.py
  sh benchmarks/run_cifar10.sh DATA    # from the raw archives, with FID

Reads the TFDS dataset `cifar10`, prepared as array_record (README, "TensorFlow Datasets"); or a folder with one
subfolder per class: --config.data.name=folder --config.data.path=... --config.data.splits="()".
The paper has no CIFAR-10 results; sizes here are this project's choice, for less than half an hour on an H200 by an
estimate from its FLOPs. Measured: not run yet.
"""

from ml_collections import ConfigDict

from vqvae2_jax.config import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = 'cifar10'
    config.seed = 0

    config.data.name = 'cifar10'
    config.data.path = ''
    config.data.splits = ('train[:90%]', 'train[90%:]', 'test')
    config.data.held_out = (0.1, 0.1)  # only for pools without splits of their own (data.splits=())
    config.data.image_size = (32, 32)
    config.data.channels = 3
    config.data.num_classes = 10
    config.data.flip = True
    config.data.crop = False
    config.data.workers = 0

    config.vqvae.downsample_factors = (2, 2)  # 16x16 (bottom), 8x8 (top)
    config.vqvae.hidden_channels = 128
    config.vqvae.residual_channels = 64
    config.vqvae.num_residual_blocks = 2
    config.vqvae.codebook_size = 512
    config.vqvae.codebook_dim = 64
    config.vqvae.commitment_weight = 0.25
    config.vqvae.codebook_ema_decay = 0.99
    config.vqvae.dead_code_threshold = 0.03
    config.vqvae.preview_grad_scale = 0.3
    config.vqvae.dtype = 'float32'
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
    config.codes.shard_size = 16_384

    config.prior.top.hidden_channels = 256
    config.prior.top.residual_channels = 256
    config.prior.top.num_residual_blocks = 12
    config.prior.top.kernel_size = 5
    config.prior.top.num_attention_layers = 4
    config.prior.top.num_heads = 8
    config.prior.top.num_output_blocks = 4
    config.prior.top.num_cond_blocks = 0
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
        params_ema_decay=0.999,
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
    config.classifier.stem_stride = 1
    config.classifier.dropout = 0.2
    config.classifier.flip = True
    config.classifier.crop = True
    config.classifier.dtype = 'float32'
    config.classifier.training.update(
        steps=10_000,
        batch_size=256,
        learning_rate=1e-3,
        warmup_steps=500,
        lr_schedule='cosine',
        weight_decay=5e-2,
        params_ema_decay=0.999,
        log_every=100,
        eval_every=1_000,
        save_every=1_000,
    )

    config.sample.count = 50_000
    config.sample.batch_size = 512
    config.sample.seed = 0
    config.sample.labels = ()
    config.sample.temperature.update(top=1.0, bottom=1.0)

    config.reject.keep_fraction = 0.5

    config.evaluate.reference = 'train'  # FID wants many images
    config.evaluate.cas = True
    config.evaluate.batch_size = 512
    return config
