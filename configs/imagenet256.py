"""VQ-VAE-2 on ImageNet at 256x256 (Razavi et al. 2019, arXiv 1906.00446): the paper's model.

  python -m vqvae2_jax.main --config=configs/imagenet256.py --config.data.path=/data/tfds

Reproduces: tables 3 and 5 of the paper's appendix (VQ-VAE, top and bottom prior), figures 1, 4 and 5. The paper's
numbers: validation MSE 0.0050 (its pixel range is not stated; [-1, 1] is plausible), validation NLL 3.41 (top) and 3.45
(bottom), units not stated, nats per code assumed. Measured here: not run yet. What it takes is in docs/scale.md:
`--job=plan --topology=v5e:16x16` says whether it fits, and how long it takes at least.

Numbers marked [A] are the paper's appendix A, [T] its text. What is marked "open" the paper leaves open; the value
is this project's choice and says where it comes from.
For your own images start from configs/folder256.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = 'imagenet256'
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = 'imagenet2012'  # prepared with TFDS as array_record, see README
    config.data.path = ''
    # The paper's held-out numbers are on ImageNet's validation set; weights are chosen on a part of the training set.
    config.data.splits = ('train[:99%]', 'train[99%:]', 'validation')
    config.data.held_out = (0.05, 0.05)  # only for pools without splits of their own (data.splits=())
    config.data.image_size = (256, 256)  # [A]
    config.data.channels = 3
    config.data.num_classes = 1000
    config.data.flip = False  # open: the paper mentions no augmentation
    config.data.crop = False
    config.data.on_error = 'raise'
    config.data.workers = 16

    config.parallel = ConfigDict(dict(fsdp=16))  # devices that share one copy of a training state

    config.vqvae = ConfigDict()
    config.vqvae.factors = (4, 2)  # [A] latent layers 64x64 (bottom) and 32x32 (top)
    config.vqvae.hidden = 128  # [A]
    config.vqvae.residual = 64  # [A]
    config.vqvae.layers = 2  # [A]
    config.vqvae.codebook_size = 512  # [A]
    config.vqvae.codebook_dim = 64  # [A]
    config.vqvae.commitment_weight = 0.25  # [A] beta
    config.vqvae.decay = 0.99  # [T] gamma
    config.vqvae.reseed_threshold = 0.03  # open: the paper re-seeds nothing; 0 turns it off
    config.vqvae.level_loss = 0.0  # the paper's objective
    config.vqvae.dtype = 'bfloat16'  # open; the quantizer stays in float32
    config.vqvae.training = dict(
        steps=2_207_444,  # [A]
        batch_size=128,  # [A]
        learning_rate=3e-4,  # open: Adam at 3e-4 is Sonnet's VQ-VAE example
        warmup_steps=0,
        decay='constant',  # open
        weight_ema=0.99,  # open; the span of the codebook's averages, which must match the weights
        log_every=100,
        eval_every=10_000,
        eval_examples=12_800,
        show_every=10_000,
        save_every=5_000,
    )

    config.codes = ConfigDict()
    config.codes.batch_size = 256
    config.codes.shard_size = 16_384

    config.prior = ConfigDict()
    config.prior.top = ConfigDict()
    config.prior.top.hidden = 512  # [A]
    config.prior.top.residual = 2048  # [A]
    config.prior.top.layers = 20  # [A]
    config.prior.top.kernel = 5  # [A]
    config.prior.top.attention_layers = 4  # [A]: one every five layers [T]
    config.prior.top.heads = 8  # [A]
    config.prior.top.output_layers = 20  # [A]
    config.prior.top.condition_layers = 0  # [A]: nothing is coarser
    config.prior.top.dropout = 0.1  # [A], inside the blocks; [T] after them, see "Departures" in docs/design.md
    config.prior.top.attention_dropout = 0.1  # open: the rate
    config.prior.top.attention_dropout_kind = 'logits'  # [T]
    config.prior.top.dtype = 'bfloat16'  # open
    config.prior.top.remat = True  # recomputes what would not fit
    config.prior.top.scan_layers = True  # loops over blocks and their attention, which compile few of them
    config.prior.top.training = dict(
        steps=1_600_000,  # [A]
        batch_size=1024,  # [A]
        learning_rate=3e-4,  # open: rosinality's, as for the rest of this line
        warmup_steps=5_000,  # open
        decay='cosine',  # open
        clip_norm=1.0,  # open
        weight_ema=0.9999,  # open: PixelSNAIL averages with 0.9997 on ImageNet
        log_every=100,
        eval_every=5_000,
        eval_examples=10_240,
        show_every=50_000,
        save_every=2_500,
    )
    config.prior.bottom = ConfigDict()
    config.prior.bottom.hidden = 512  # [A]
    config.prior.bottom.residual = 1024  # [A]
    config.prior.bottom.layers = 20  # [A]
    config.prior.bottom.kernel = 5  # [A]
    config.prior.bottom.attention_layers = 0  # [A]
    config.prior.bottom.heads = 8  # unused
    config.prior.bottom.output_layers = 0  # [A]
    config.prior.bottom.condition_layers = 20  # [A] conditioning stack residual blocks
    config.prior.bottom.dropout = 0.1  # [A], inside the blocks as above
    config.prior.bottom.attention_dropout = 0.0  # unused
    config.prior.bottom.dtype = 'bfloat16'  # open
    config.prior.bottom.remat = True  # recomputes what would not fit
    config.prior.bottom.scan_layers = True  # loops over blocks and their attention, which compile few of them
    config.prior.bottom.training = dict(config.prior.top.training, steps=754_000, batch_size=512)  # [A]

    # The classifier for rejection [T, section 3.3]: the paper states neither its architecture nor its training. This is
    # a ResNet-18 in shape.
    config.classifier = ConfigDict()
    config.classifier.widths = (64, 128, 256, 512)  # open
    config.classifier.blocks = (2, 2, 2, 2)  # open
    config.classifier.stem_stride = 2
    config.classifier.dropout = 0.0
    config.classifier.flip = True
    config.classifier.crop = True
    config.classifier.dtype = 'bfloat16'
    config.classifier.training = dict(
        steps=112_590,  # open: 90 epochs of 1024
        batch_size=1024,
        learning_rate=1e-3,
        warmup_steps=6_000,
        decay='cosine',
        weight_decay=5e-2,
        weight_ema=0.9999,
        log_every=100,
        eval_every=5_000,
        eval_examples=12_800,
        save_every=2_500,
    )

    config.sample = ConfigDict()
    config.sample.count = 50_000
    config.sample.dtype = 'bfloat16'
    config.sample.batch_size = 128
    config.sample.seed = 0
    config.sample.labels = ()  # all classes in turn
    config.sample.temperature = dict(top=1.0, bottom=1.0)  # open: the paper does not state it

    config.reject = ConfigDict()
    config.reject.keep = 0.1  # open: the paper sweeps rates that it does not name

    config.evaluate = ConfigDict(dict(batch_size=256))
    return config
