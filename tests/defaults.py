"""Specs, train configs and modules with the defaults of the base config, for tests that need only a few fields."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqvae2_jax.config import base
from vqvae2_jax.data.images import ImageSpec
from vqvae2_jax.models.prior import Prior
from vqvae2_jax.models.raster import RasterPrior
from vqvae2_jax.models.resnet import ResNet
from vqvae2_jax.models.vqvae import VQVAE
from vqvae2_jax.models.wavefront import WavefrontPrior
from vqvae2_jax.training.optim import TrainConfig

_DEFAULTS = base.get_config(levels=('top',)).to_dict()


def image_spec(name: str = 'fashion', path: str = '', **changes: Any) -> ImageSpec:
    """Returns the base config's images, with changes."""
    return ImageSpec(**_DEFAULTS['data'] | {'name': name, 'path': str(path)} | changes)


def train_config(**changes: Any) -> TrainConfig:
    """Returns the base config's training, with changes."""
    return TrainConfig(**_DEFAULTS['vqvae']['training'] | changes)


def make_vqvae(**changes: Any) -> VQVAE:
    """Returns the base config's stage 1, with changes of its module's fields."""
    fields = _module_fields(_DEFAULTS['vqvae'], without=('commitment_weight',))
    return VQVAE(**fields | {'channels': _DEFAULTS['data']['channels']} | changes)


def apply(module: nn.Module, variables: Any, *arguments: Any, **options: Any) -> Any:
    """Returns `module.apply(variables, ...)`, compiled as one program: one operation after another takes far longer."""
    return jax.jit(functools.partial(module.apply, **options))(variables, *arguments)


def make_prior(**changes: Any) -> Prior:
    """Returns the base config's prior on a map of `shape`, with changes of its module's fields.

    The order is raster; with a `skew` among the changes it is wavefront. Unless given, it is the only level and has no
    classes.
    """
    fields = _module_fields(_DEFAULTS['prior']['top'], without=('order', 'skew'))
    fields |= {'codebook_size': _DEFAULTS['vqvae']['codebook_size'], 'coarser_codebook_sizes': (), 'num_classes': 0}
    return (WavefrontPrior if 'skew' in changes else RasterPrior)(**fields | changes)


def make_classifier(**changes: Any) -> ResNet:
    """Returns the base config's classifier for `num_classes`, with changes of its module's fields."""
    return ResNet(**_module_fields(_DEFAULTS['classifier'], without=('flip', 'crop')) | changes)


def _module_fields(section, without):
    fields = {k: v for k, v in section.items() if k not in ('training', *without)}
    return fields | {'dtype': jnp.dtype(section['dtype'])}
