"""From a complete config to the typed values that the rest of the package takes: modules, image specs, train configs.

Only jobs see a config; they hand plain values to everything below. `validation.py` checks a config before any job.
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vqvae2_jax.config.base import level_names
from vqvae2_jax.config.fields import ConfigError
from vqvae2_jax.data.images import ImageSpec
from vqvae2_jax.kernels.select import REFERENCES, Implementations
from vqvae2_jax.models.prior import Prior
from vqvae2_jax.models.raster import RasterPrior
from vqvae2_jax.models.resnet import ResNet
from vqvae2_jax.models.vqvae import VQVAE, map_shapes
from vqvae2_jax.models.wavefront import WavefrontPrior
from vqvae2_jax.sampling.params import SamplingParams
from vqvae2_jax.training.optim import TrainConfig

# Fields of config.data that change how and from where images are read, but not which images they are.
IO_ONLY_FIELDS = ('path', 'workers', 'on_error', 'max_pixels', 'max_bytes', 'check_all')
# Fields of modules that change how they are computed, but not their outputs.
COMPUTE_ONLY_FIELDS = ('remat', 'scan_layers')


def image_spec(config: ConfigDict) -> ImageSpec:
    """Returns config.data as the data package takes it.

    Raises:
      ConfigError: two of its fields contradict each other.
    """
    try:
        return ImageSpec(**config.data)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def train_config(config: ConfigDict, section: str) -> TrainConfig:
    """Returns how to train the network of a section.

    Args:
      config: the config.
      section: 'vqvae', 'prior.<level>' or 'classifier'.

    Raises:
      ConfigError: two of its fields contradict each other.
    """
    try:
        return TrainConfig(**config[section].training)  # ConfigDict reads dotted paths
    except ValueError as error:
        raise ConfigError(f'{section}.training.{error}') from error


def make_vqvae(config: ConfigDict, implementations: Implementations = REFERENCES) -> VQVAE:
    """Returns stage 1's module.

    Args:
      config: the config.
      implementations: from `kernels.select`, for training on certain devices.
    """
    fields = _module_fields(config.vqvae, without=('commitment_weight',))
    return VQVAE(channels=config.data.channels, nearest=implementations.nearest, **fields)


def make_prior(config: ConfigDict, level: int, implementations: Implementations = REFERENCES) -> Prior:
    """Returns stage 2's module of one level.

    Args:
      config: the config.
      level: counted from the finest.
      implementations: from `kernels.select`, for training on certain devices.
    """
    factors = config.vqvae.downsample_factors
    names = level_names(factors)
    section = config.prior[names[level]]
    raster = section.order == 'raster'
    return (RasterPrior if raster else WavefrontPrior)(
        shape=map_shapes(config.data.image_size, factors)[level],
        codebook_size=config.vqvae.codebook_size,
        coarser_codebook_sizes=(config.vqvae.codebook_size,) * (len(names) - 1 - level),
        num_classes=config.data.num_classes,
        attend=implementations.attend,
        **_module_fields(section, without=('order', 'skew') if raster else ('order',)),
    )


def make_classifier(config: ConfigDict) -> ResNet:
    """Returns the module that classifies samples."""
    fields = _module_fields(config.classifier, without=('flip', 'crop'))
    return ResNet(num_classes=config.data.num_classes, **fields)


def _module_fields(section, without):
    fields = {k: v for k, v in section.items() if k not in ('training', *without)}
    return fields | {'dtype': jnp.dtype(section.dtype)}


def networks(config: ConfigDict, implementations: Implementations = REFERENCES) -> dict[str, tuple[Any, tuple]]:
    """Returns the module of every section that has one, and the arguments of its `init`: keys, and shapes of the rest.

    Args:
      config: the config.
      implementations: from `kernels.select`, for training on certain devices.

    Returns:
      {section: (module, arguments)} of 'vqvae', every 'prior.<level>', and 'classifier' if there are classes.
    """
    factors = config.vqvae.downsample_factors
    key, names, shapes = jax.random.key(0), level_names(factors), map_shapes(config.data.image_size, factors)
    image = jax.ShapeDtypeStruct((1, *config.data.image_size, config.data.channels), jnp.float32)
    codes = tuple(jax.ShapeDtypeStruct((1, *shape), jnp.int32) for shape in shapes)
    label = jax.ShapeDtypeStruct((1,), jnp.int32) if config.data.num_classes else None
    modules = {'vqvae': (make_vqvae(config, implementations), ({'params': key, 'restart': key}, image))}
    for level, name in enumerate(names):
        prior = make_prior(config, level, implementations)
        modules[f'prior.{name}'] = prior, (key, codes[level], label, codes[level + 1 :])
    if has_classifier(config):
        modules['classifier'] = make_classifier(config), (key, image)
    return modules


def sampling_settings(config: ConfigDict) -> dict[str, dict[str, float]]:
    """Returns {field: {level: value}} of sample.temperature, top_k, top_p and guidance."""
    return {field: config.sample[field].to_dict() for field in SamplingParams._fields}


def make_sampling_params(config: ConfigDict, level_name: str) -> SamplingParams:
    """Returns how the codes of a level are sampled."""
    values = {field: config.sample[field][level_name] for field in SamplingParams._fields}
    no_change = {'top_k': 0, 'top_p': 1, 'guidance': 1}  # left out of the program
    return SamplingParams(
        **{field: None if no_change.get(field) == value else value for field, value in values.items()}
    )


def has_classifier(config: ConfigDict) -> bool:
    """Returns whether the data have two classes or more; otherwise there is no classifier and no rejection."""
    return config.data.num_classes > 1


def has_cas(config: ConfigDict) -> bool:
    """Returns whether the Classification Accuracy Score is wanted and possible."""
    return has_classifier(config) and config.evaluate.cas


def trains_classifier(config: ConfigDict) -> bool:
    """Returns whether the run trains a classifier: for rejection, unless another one is given, or for CAS."""
    return has_classifier(config) and (not config.reject.classifier or has_cas(config))


def settings(config: ConfigDict, section: str) -> dict[str, Any]:
    """Returns the fields that decide the outcome of training a section, flat, for its record.

    Fields that only say how often to log, evaluate or save, how to read images or how to compute are left out.

    Args:
      config: the config.
      section: 'vqvae', 'prior.<level>' or 'classifier'.

    Raises:
      ConfigError: as `train_config`.
    """
    unused = ('training', *COMPUTE_ONLY_FIELDS)
    if config[section].get('order') == 'raster':
        unused += ('skew',)
    values = {'seed': config.seed}
    values |= {f'data.{k}': v for k, v in config.data.items() if k not in IO_ONLY_FIELDS}
    values |= {f'{section}.{k}': v for k, v in config[section].items() if k not in unused}
    values |= {f'{section}.training.{k}': v for k, v in train_config(config, section).resume_settings().items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
