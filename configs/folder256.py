"""Your own images at 256x256 on one accelerator: the structure of configs/imagenet256.py, narrowed and shortened.

  python -m vqvae2_jax.main --config=configs/folder256.py --workdir=runs/mine --config.data.path=/path/to/images \\
      --config.data.num_classes=10

One subfolder per class; --config.data.num_classes=0 for images without classes. Widths, steps and rates are this
project's choice for some thousand to some hundred thousand images. Measured: not run yet on an accelerator.
"""

from ml_collections import ConfigDict

from vqvae2_jax import load_config


def get_config() -> ConfigDict:
    config = load_config('imagenet256')
    config.name = 'folder256'
    config.data.update(name='folder', splits=(), num_classes=0, flip=True, workers=4)
    config.vqvae.update(preview_grad_scale=1.0)  # the top level carries the image from the first steps on
    config.vqvae.training.update(
        steps=30_000,
        batch_size=32,
        learning_rate=5e-4,
        warmup_steps=500,
        lr_schedule='cosine',
        eval_every=1_000,
        eval_examples=512,
        image_every=2_000,
        save_every=1_000,
    )
    config.codes.update(batch_size=64, shard_size=4_096)

    config.prior.top.update(
        hidden_channels=256,
        residual_channels=256,
        num_residual_blocks=12,
        num_attention_layers=3,
        num_output_blocks=4,
        dropout=0.2,
    )
    config.prior.bottom.update(hidden_channels=192, residual_channels=192, num_residual_blocks=12, num_cond_blocks=8)
    config.prior.top.attention_dropout_kind = 'keys'
    for prior in config.prior.values():
        prior.order = 'wavefront'  # on a GPU the launches of raster order's many steps decide (docs/sampling.md)
        prior.training.update(
            steps=30_000,
            batch_size=32,
            learning_rate=5e-4,
            warmup_steps=1_000,
            params_ema_decay=0.999,
            eval_every=1_000,
            eval_examples=512,
            image_every=10_000,
            save_every=1_000,
        )

    config.classifier.update(widths=(64, 128, 256), blocks=(1, 1, 1), dropout=0.2)
    config.classifier.training.update(
        steps=10_000,
        batch_size=64,
        warmup_steps=500,
        params_ema_decay=0.999,
        eval_every=500,
        save_every=500,
        eval_examples=512,
    )
    config.sample.update(count=1_000, batch_size=64)
    config.reject.update(keep_fraction=0.5)

    config.evaluate.update(batch_size=128)
    return config
