"""Weights of rosinality's PyTorch VQ-VAE at 256x256 (docs/from_pytorch.md), with the priors of configs/folder256.py.

  python -m vqvae2_jax.main --config=configs/rosinality256.py --workdir=runs/ffhq --job=import --from=vqvae_560.pt \\
      --config.vqvae.relu_skip=True --config.data.path=/path/to/images

The VQ-VAE has the widths of its vqvae.py, and is computed in float32 as there. Weights that were trained before
2021-01-23, as vqvae_560.pt, need vqvae.relu_skip=True in every command. Measured: not run yet.
"""

from ml_collections import ConfigDict

from vqvae2_jax import load_config


def get_config() -> ConfigDict:
    config = load_config('folder256')
    config.name = 'rosinality256'
    config.vqvae.update(
        residual_channels=32,
        preview_grad_scale=0.0,  # it has no preview heads
        dtype='float32',
    )
    return config
