"""The whole pipeline in about a minute, with nothing learnt worth looking at: for the tests and for trying changes out.

  python -m vqvae2_jax.main --config=configs/tiny.py

The images of configs/fashion.py and its structure, every width and step count cut down.
"""

from ml_collections import ConfigDict

from vqvae2_jax import load_config


def get_config() -> ConfigDict:
    config = load_config('fashion')
    config.name = 'tiny'
    config.data.held_out = (0.01, 0.01)  # 9800 train, 100 validation, 100 test
    small = dict(steps=8, batch_size=16, warmup_steps=2, log_every=2, eval_every=4, show_every=8, save_every=4)

    config.vqvae.update(hidden=8, residual=4, layers=1, codebook_size=16, codebook_dim=8)
    config.codes.update(batch_size=200, shard_size=4096)
    for prior in config.prior.values():
        prior.update(hidden=8, residual=8, layers=2, heads=2)
    config.prior.top.update(attention_layers=1)
    config.prior.bottom.update(condition_layers=1)
    config.classifier.update(widths=(8, 16), blocks=(1, 1))
    for section in (config.vqvae, config.prior.top, config.prior.bottom, config.classifier):
        section.training.update(small)
    config.sample.update(count=24, batch_size=16)
    return config
