"""VQ-VAE-2 on ImageNet at 256x256 (Razavi et al. 2019, arXiv 1906.00446): the paper's model.

  python -m vqvae2_jax.main --config=configs/imagenet256.py --config.data.path=/data/tfds

Reproduces: tables 3 and 5 of the paper's appendix (VQ-VAE, top and bottom prior), figures 1, 4 and 5. The paper's
numbers: validation MSE 0.0050 (its pixel range is not stated; [-1, 1] is plausible), validation NLL 3.41 (top) and 3.45
(bottom), units not stated, nats per code assumed. Not run here yet. Its memory and time are
in docs/scale.md: `--job=plan --topology=v5e:16x16` shows whether it fits, and a lower bound of the time.

Numbers marked [A] are the paper's appendix A, [T] its text. "open" marks values that the paper leaves open; they are
this project's choice, with their source.
The priors generate in raster order, as in the paper. To sample on GPUs, train them in wavefront order
(--config.prior.top.order=wavefront --config.prior.bottom.order=wavefront): docs/sampling.md says why.
For your own images start from configs/folder256.py.
"""

from ml_collections import ConfigDict

from vqvae2_jax.config import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = 'imagenet256'

    config.data.name = 'imagenet2012'  # prepared with TFDS as array_record, see README
    # The paper's held-out numbers are on ImageNet's validation set; weights are chosen on a part of the training set.
    config.data.splits = ('train[:99%]', 'train[99%:]', 'validation')
    config.data.image_size = (256, 256)  # [A]
    config.data.channels = 3
    config.data.num_classes = 1000
    config.data.flip = False  # open: the paper mentions no augmentation
    config.data.workers = 16

    config.parallel.fsdp = 16  # devices that share one copy of a training state

    config.vqvae.downsample_factors = (4, 2)  # [A] latent layers 64x64 (bottom) and 32x32 (top)
    config.vqvae.hidden_channels = 128  # [A]
    config.vqvae.residual_channels = 64  # [A]
    config.vqvae.num_residual_blocks = 2  # [A]
    config.vqvae.codebook_size = 512  # [A]
    config.vqvae.codebook_dim = 64  # [A]
    config.vqvae.commitment_weight = 0.25  # [A] beta
    config.vqvae.codebook_ema_decay = 0.99  # [T] gamma
    config.vqvae.dead_code_threshold = 0.03  # open: the paper restarts no code; 0 turns it off
    config.vqvae.preview_grad_scale = 0.0  # the paper's objective
    config.vqvae.dtype = 'bfloat16'  # open; the quantizer stays in float32
    config.vqvae.training.update(
        steps=2_207_444,  # [A]
        batch_size=128,  # [A]
        learning_rate=3e-4,  # open: Adam at 3e-4 is Sonnet's VQ-VAE example
        lr_schedule='constant',  # open
        params_ema_decay=0.99,  # open; the span of the codebook's averages, which must match the weights
        log_every=100,
        eval_every=10_000,
        eval_examples=12_800,
        image_every=10_000,
        save_every=5_000,
    )

    config.codes.batch_size = 32_768  # 128 a chip on 256 chips

    config.prior.top.hidden_channels = 512  # [A]
    config.prior.top.residual_channels = 2048  # [A]
    config.prior.top.num_residual_blocks = 20  # [A]
    config.prior.top.kernel_size = 5  # [A]
    config.prior.top.num_attention_layers = 4  # [A]: one every five layers [T]
    config.prior.top.num_heads = 8  # [A]
    config.prior.top.num_output_blocks = 20  # [A]
    config.prior.top.num_cond_blocks = 0  # [A]: nothing is coarser
    config.prior.top.dropout = 0.1  # [A], inside the blocks; [T] after them, see "Departures" in docs/design.md
    config.prior.top.attention_dropout = 0.1  # open: the rate
    config.prior.top.attention_dropout_kind = 'logits'  # [T]
    config.prior.top.dtype = 'bfloat16'  # open
    config.prior.top.remat = 'blocks_but_convs'  # recomputes activations that would not fit
    config.prior.top.scan_layers = True  # loops over blocks and their attention, of which few are compiled
    config.prior.top.training.update(
        steps=1_600_000,  # [A]
        batch_size=1024,  # [A]
        learning_rate=3e-4,  # open: rosinality's
        warmup_steps=5_000,  # open
        lr_schedule='cosine',  # open
        clip_norm=1.0,  # open
        params_ema_decay=0.9999,  # open: PixelSNAIL averages with 0.9997 on ImageNet
        log_every=100,
        eval_every=5_000,
        eval_examples=10_240,
        image_every=50_000,
        save_every=2_500,
    )
    config.prior.bottom.hidden_channels = 512  # [A]
    config.prior.bottom.residual_channels = 1024  # [A]
    config.prior.bottom.num_residual_blocks = 20  # [A]
    config.prior.bottom.kernel_size = 5  # [A]
    config.prior.bottom.num_attention_layers = 0  # [A]
    config.prior.bottom.num_output_blocks = 0  # [A]
    config.prior.bottom.num_cond_blocks = 20  # [A] conditioning stack residual blocks
    config.prior.bottom.dropout = 0.1  # [A], inside the blocks as above
    config.prior.bottom.dtype = 'bfloat16'  # open
    config.prior.bottom.remat = 'blocks'  # recomputes activations that would not fit
    config.prior.bottom.scan_layers = True  # loops over blocks and their attention, of which few are compiled
    config.prior.bottom.training.update(config.prior.top.training, steps=754_000, batch_size=512)  # [A]

    # The classifier for rejection [T, section 3.3]: the paper states neither its architecture nor its training. This is
    # a ResNet-18 in shape.
    config.classifier.widths = (64, 128, 256, 512)  # open
    config.classifier.blocks = (2, 2, 2, 2)  # open
    config.classifier.stem_stride = 2
    config.classifier.flip = True
    config.classifier.crop = True
    config.classifier.dtype = 'bfloat16'
    config.classifier.training.update(
        steps=112_590,  # open: 90 epochs of 1024
        batch_size=1024,
        learning_rate=1e-3,
        warmup_steps=6_000,
        lr_schedule='cosine',
        weight_decay=5e-2,
        params_ema_decay=0.9999,
        log_every=100,
        eval_every=5_000,
        eval_examples=12_800,
        save_every=2_500,
    )

    config.sample.count = 50_000
    config.sample.dtype = 'bfloat16'
    config.sample.batch_size = 4_096  # 512 a GPU on 8 GPUs; 32 768 do not fit there
    config.sample.temperature.update(top=1.0, bottom=1.0)  # open: the paper does not state it

    config.reject.keep_fraction = 0.1  # open: the paper sweeps rates that it does not name

    config.evaluate.batch_size = 8_192
    return config
