"""The whole pipeline in about a minute, for the tests and for trying out changes. It learns nothing useful.

  python -m vqvae2_jax.main --config=configs/tiny.py

The images and the structure of configs/fashion.py, with smaller widths and step counts, and raster order.
"""

from ml_collections import ConfigDict

from vqvae2_jax import load_config


def get_config() -> ConfigDict:
    config = load_config('fashion')
    config.name = 'tiny'
    config.data.held_out = (0.01, 0.01)  # 9800 train, 100 validation, 100 test
    small = dict(steps=8, batch_size=16, warmup_steps=2, log_every=2, eval_every=4, image_every=8, save_every=4)

    config.vqvae.update(hidden_channels=8, residual_channels=4, num_residual_blocks=1, codebook_size=16, codebook_dim=8)
    config.codes.batch_size = 200
    for prior in config.prior.values():
        prior.update(order='raster', hidden_channels=8, residual_channels=8, num_residual_blocks=2, num_heads=2)
    config.prior.top.update(num_attention_layers=1)
    config.prior.bottom.update(num_cond_blocks=1)
    config.classifier.update(widths=(8, 16), blocks=(1, 1))
    for section in (config.vqvae, config.prior.top, config.prior.bottom, config.classifier):
        section.training.update(small)
    config.sample.update(count=24, batch_size=16, shard_size=16)
    config.evaluate.batch_size = 16
    return config
