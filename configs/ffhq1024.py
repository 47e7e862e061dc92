"""VQ-VAE-2 on FFHQ at 1024x1024 (Razavi et al. 2019, arXiv 1906.00446): the paper's three-level model.

  python -m vqvae2_jax.main --config=configs/ffhq1024.py --config.data.path=/data/ffhq

Reproduces: tables 4 and 5 of the paper's appendix, figures 3 and 6. The paper has no number for FFHQ, only pictures.
Measured here: stage 1 alone, on a CPU: 600 updates of 2 images (rate 1e-3, level_loss=1, float32) on 27 photographs
bring held-out ones to 19.1 dB, plainly recognisable, their colours still pale (2 cores of an AMD EPYC, 2026-11-20).
What the batch sizes below take is in docs/scale.md.

Numbers marked [A] are the paper's appendix A; "open" is what the paper leaves open and this project chose.
Faces have no classes: the priors are unconditional and there is no rejection.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = 'ffhq1024'
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = 'folder'
    config.data.path = ''  # the folder of the images; its subfolders are no classes
    config.data.splits = ()
    config.data.held_out = (0.01, 0.01)  # open: FFHQ has no official split for this
    config.data.split_seed = 0
    config.data.image_size = (1024, 1024)  # [A]
    config.data.channels = 3
    config.data.num_classes = 0
    config.data.flip = False  # open
    config.data.crop = False
    config.data.on_error = 'raise'
    config.data.workers = 16

    config.parallel = ConfigDict(dict(fsdp=16))  # devices that share one copy of a training state

    config.vqvae = ConfigDict()
    config.vqvae.factors = (8, 2, 2)  # [A] 128x128 (bottom), 64x64 (middle), 32x32 (top)
    config.vqvae.hidden = 128  # [A]
    config.vqvae.residual = 64  # [A]
    config.vqvae.layers = 2  # [A]
    config.vqvae.codebook_size = 512  # [A]
    config.vqvae.codebook_dim = 64  # [A]
    config.vqvae.commitment_weight = 0.25  # [A] beta
    config.vqvae.decay = 0.99  # gamma, the paper's section 2.1
    config.vqvae.reseed_threshold = 0.03  # open
    config.vqvae.level_loss = 0.0  # the paper's objective
    config.vqvae.dtype = 'bfloat16'  # open
    config.vqvae.training = dict(
        steps=304_741,  # [A]
        batch_size=128,  # [A]
        learning_rate=3e-4,  # open, as in imagenet256.py
        warmup_steps=0,
        decay='constant',
        weight_ema=0.99,  # open; the span of the codebook's averages, which must match the weights
        log_every=100,
        eval_every=5_000,
        eval_examples=640,
        show_every=5_000,
        save_every=2_500,
    )

    config.codes = ConfigDict()
    config.codes.batch_size = 64
    config.codes.shard_size = 2_048

    prior = ConfigDict()
    prior.hidden = 512  # [A], all levels
    prior.layers = 20  # [A] top and middle
    prior.kernel = 5  # [A]
    prior.heads = 8  # [A] for the top; blank for the middle, whose one attention layer needs a number too
    prior.output_layers = 0  # [A]
    prior.dtype = 'bfloat16'  # open
    prior.remat = True  # recomputes what would not fit
    prior.scan_layers = True  # loops over blocks and their attention, which compile few of them
    prior.training = dict(
        steps=237_000,
        batch_size=1024,
        learning_rate=3e-4,  # open, and the next three
        warmup_steps=5_000,
        decay='cosine',
        clip_norm=1.0,
        weight_ema=0.9999,
        log_every=100,
        eval_every=1_000,
        eval_examples=700,
        show_every=20_000,
        save_every=1_000,
    )
    config.prior = ConfigDict()
    for name, own, training in (
        # [A]: residual units, attention layers, dropout, conditioning blocks, steps and batch size of each level. The
        # dropout is inside the blocks, in the paper's text after them: see "Departures" in docs/design.md.
        ('top', dict(residual=2048, attention_layers=4, dropout=0.5, condition_layers=0), (237_000, 1024)),
        ('middle', dict(residual=1024, attention_layers=1, dropout=0.3, condition_layers=8), (57_400, 512)),
        (
            'bottom',
            dict(residual=1024, attention_layers=0, dropout=0.25, condition_layers=8, layers=10),
            (270_000, 256),
        ),
    ):
        config.prior[name] = prior.copy_and_resolve_references()
        config.prior[name].update(own)
        config.prior[name].attention_dropout = own['dropout'] if own['attention_layers'] else 0.0  # open: the rate
        config.prior[name].attention_dropout_kind = 'logits'  # the paper's section 3.2
        config.prior[name].training.update(steps=training[0], batch_size=training[1])

    config.classifier = ConfigDict()  # no classes, no classifier

    config.sample = ConfigDict()
    config.sample.count = 1_000
    config.sample.dtype = 'bfloat16'
    config.sample.batch_size = 32
    config.sample.seed = 0
    config.sample.labels = ()
    config.sample.temperature = dict(top=1.0, middle=1.0, bottom=1.0)  # open

    config.reject = ConfigDict()
    config.reject.keep = 1.0  # nothing rejects

    config.evaluate = ConfigDict(dict(batch_size=256))
    return config
