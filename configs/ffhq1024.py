"""VQ-VAE-2 on FFHQ at 1024x1024 (Razavi et al. 2019, arXiv 1906.00446): the paper's three-level model.

  python -m vqvae2_jax.main --config=configs/ffhq1024.py --config.data.path=/data/ffhq

Reproduces: tables 4 and 5 of the paper's appendix, figures 3 and 6. The paper has no number for FFHQ, only pictures.
Measured here: stage 1 alone, on a CPU: 600 updates of 2 images (rate 1e-3, preview_grad_scale=1, float32) on 27
photographs reach 19.1 dB on held-out ones, recognizable but still pale (2 cores of an AMD EPYC, 2026-11-20).
The memory of the batch sizes below is in docs/scale.md.

Numbers marked [A] are the paper's appendix A. "open" marks values that the paper leaves open; they are this project's
choice.
Faces have no classes: the priors are unconditional and there is no rejection.
"""

from ml_collections import ConfigDict

from vqvae2_jax.config import base


def get_config() -> ConfigDict:
    config = base.get_config(levels=('bottom', 'middle', 'top'))
    config.name = 'ffhq1024'

    config.data.name = 'folder'
    config.data.held_out = (0.01, 0.01)  # open: FFHQ has no official split for this
    config.data.image_size = (1024, 1024)  # [A]
    config.data.channels = 3
    config.data.workers = 16

    config.parallel.fsdp = 16  # devices that share one copy of a training state

    config.vqvae.downsample_factors = (8, 2, 2)  # [A] 128x128 (bottom), 64x64 (middle), 32x32 (top)
    config.vqvae.hidden_channels = 128  # [A]
    config.vqvae.residual_channels = 64  # [A]
    config.vqvae.num_residual_blocks = 2  # [A]
    config.vqvae.codebook_size = 512  # [A]
    config.vqvae.codebook_dim = 64  # [A]
    config.vqvae.commitment_weight = 0.25  # [A] beta
    config.vqvae.codebook_ema_decay = 0.99  # gamma, the paper's section 2.1
    config.vqvae.dead_code_threshold = 0.03  # open
    config.vqvae.preview_grad_scale = 0.0  # the paper's objective
    config.vqvae.dtype = 'bfloat16'  # open
    config.vqvae.training.update(
        steps=304_741,  # [A]
        batch_size=128,  # [A]
        learning_rate=3e-4,  # open, as in imagenet256.py
        params_ema_decay=0.99,  # open; the span of the codebook's averages, which must match the weights
        log_every=100,
        eval_every=5_000,
        eval_examples=640,
        image_every=5_000,
        save_every=2_500,
    )

    config.codes.batch_size = 4_096  # 16 a chip on 256 chips
    config.codes.shard_size = 2_048

    for prior in config.prior.values():
        prior.hidden_channels = 512  # [A], all levels
        prior.num_residual_blocks = 20  # [A] top and middle
        prior.kernel_size = 5  # [A]
        prior.num_heads = 8  # [A] for the top; blank for the middle, whose one attention layer needs a number too
        prior.num_output_blocks = 0  # [A]
        prior.attention_dropout_kind = 'logits'  # the paper's section 3.2
        prior.dtype = 'bfloat16'  # open
        prior.remat = 'blocks'  # recomputes activations that would not fit
        prior.scan_layers = True  # loops over blocks and their attention, of which few are compiled
        prior.training.update(
            learning_rate=3e-4,  # open, and the next four
            warmup_steps=5_000,
            lr_schedule='cosine',
            clip_norm=1.0,
            params_ema_decay=0.9999,
            log_every=100,
            eval_every=1_000,
            eval_examples=700,
            image_every=20_000,
            save_every=1_000,
        )
    # [A]: residual units, attention layers, dropout, conditioning blocks, steps and batch size of each level. The
    # dropout is inside the blocks, in the paper's text after them: see "Departures" in docs/design.md. The rate of the
    # attention dropout is open.
    config.prior.top.update(
        residual_channels=2048, num_attention_layers=4, num_cond_blocks=0, dropout=0.5, attention_dropout=0.5
    )
    config.prior.top.training.update(steps=237_000, batch_size=1024)
    config.prior.middle.update(
        residual_channels=1024, num_attention_layers=1, num_cond_blocks=8, dropout=0.3, attention_dropout=0.3
    )
    config.prior.middle.training.update(steps=57_400, batch_size=512)
    config.prior.bottom.update(
        residual_channels=1024, num_attention_layers=0, num_cond_blocks=8, dropout=0.25, num_residual_blocks=10
    )
    config.prior.bottom.training.update(steps=270_000, batch_size=256)

    # There are no classes, so there is no classifier and no rejection.

    config.sample.dtype = 'bfloat16'
    config.sample.batch_size = 1_024  # 4 a chip on 256 chips
    config.sample.shard_size = 100  # 300 MB a file
    config.sample.temperature.update(top=1.0, middle=1.0, bottom=1.0)  # open

    config.evaluate.batch_size = 2_048
    return config
