"""Fashion-MNIST, from images to judged samples in minutes on two CPU cores. No download: the images are in the package.

  python -m vqvae2_jax.main --config=configs/fashion.py

Two levels of codes, 14x14 over 7x7. Everything is small; `level_loss` and the re-seeding of codes are on, which the
paper does not have: with them both codebooks are in full use after some hundred steps.
Measured: see "The demo" in README.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = 'fashion'
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = 'fashion'  # 10 000 images: 8000 train, 1000 validation, 1000 test
    config.data.image_size = (28, 28)
    config.data.channels = 1
    config.data.num_classes = 10
    config.data.flip = False  # shoes all point to the left
    config.data.crop = False
    config.data.workers = 0  # in memory: processes would only cost

    config.vqvae = ConfigDict()
    config.vqvae.factors = (2, 2)  # 28x28 -> 14x14 (bottom) -> 7x7 (top)
    config.vqvae.hidden = 64
    config.vqvae.residual = 32
    config.vqvae.layers = 2
    config.vqvae.codebook_size = 128
    config.vqvae.codebook_dim = 32
    config.vqvae.decay = 0.99
    config.vqvae.reseed_threshold = 0.03
    config.vqvae.level_loss = 1.0
    config.vqvae.commitment_weight = 0.25
    config.vqvae.training = dict(
        steps=1600,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=50,
        decay='cosine',
        weight_ema=0.99,
        log_every=100,
        eval_every=400,
        show_every=800,
        save_every=400,
    )

    config.codes = ConfigDict()
    config.codes.batch_size = 256
    config.codes.shard_size = 4096

    config.prior = ConfigDict()
    config.prior.top = ConfigDict()
    config.prior.top.hidden = 64
    config.prior.top.residual = 64
    config.prior.top.layers = 4
    config.prior.top.kernel = 3
    config.prior.top.attention_layers = 2
    config.prior.top.heads = 4
    config.prior.top.output_layers = 1
    config.prior.top.dropout = 0.2
    config.prior.top.attention_dropout = 0.1
    config.prior.top.training = dict(
        steps=1500,
        batch_size=32,
        learning_rate=2e-3,
        warmup_steps=50,
        decay='cosine',
        clip_norm=1.0,
        weight_ema=0.995,
        log_every=100,
        eval_every=250,
        show_every=1500,
        save_every=500,
    )
    config.prior.bottom = ConfigDict()
    config.prior.bottom.hidden = 64
    config.prior.bottom.residual = 64
    config.prior.bottom.layers = 4
    config.prior.bottom.kernel = 3
    config.prior.bottom.condition_layers = 2
    config.prior.bottom.dropout = 0.1
    config.prior.bottom.training = dict(config.prior.top.training, steps=1600, batch_size=16, show_every=1600)

    config.classifier = ConfigDict()
    config.classifier.widths = (32, 64, 128)
    config.classifier.blocks = (1, 1, 1)
    config.classifier.stem_stride = 2
    config.classifier.dropout = 0.3
    config.classifier.flip = True
    config.classifier.crop = False
    config.classifier.training = dict(
        steps=1000,
        batch_size=64,
        learning_rate=2e-3,
        warmup_steps=50,
        decay='cosine',
        weight_decay=1e-2,
        weight_ema=0.99,
        log_every=100,
        eval_every=200,
        save_every=200,
    )

    config.sample = ConfigDict()
    config.sample.count = 1000
    config.sample.batch_size = 200
    config.sample.seed = 0
    config.sample.labels = ()  # all classes in turn
    config.sample.temperature = dict(top=0.9, bottom=0.8)  # cleaner pictures; 1.0 is the priors' own distribution

    config.reject = ConfigDict()
    config.reject.keep = 0.5  # the best half of each class

    config.evaluate = ConfigDict()
    config.evaluate.cas = True  # two more classifiers, trained on generated images alone
    return config
