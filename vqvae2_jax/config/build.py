"""From a complete config to the typed values that the rest of the package takes: modules, image specs, train configs.

Only jobs see a config; they hand plain values to everything below. `validation.py` checks a config before any job.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vqvae2_jax.config.base import level_names
from vqvae2_jax.config.fields import ConfigError
from vqvae2_jax.data import own_codes
from vqvae2_jax.data.codes import CodeSpec
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
IO_ONLY_FIELDS = ('path', 'workers', 'on_error', 'max_pixels', 'max_bytes', 'cache_bytes', 'check_all')
# Fields of modules that change how they are computed, but not their outputs.
COMPUTE_ONLY_FIELDS = ('remat', 'scan_layers')
# Fields of modules that matter in training only, and the dtype.
_TRAINING_FIELDS = ('commitment_weight', 'codebook_ema_decay', 'dead_code_threshold', 'preview_grad_scale')
_TRAINING_FIELDS += ('dropout', 'attention_dropout', 'dtype')
# Fields of config.data that describe images, but do not say which they are.
_FORM_FIELDS = ('image_size', 'channels', 'num_classes')


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


def make_prior(
    config: ConfigDict, level: int, implementations: Implementations = REFERENCES, spec: CodeSpec | None = None
) -> Prior:
    """Returns stage 2's module of one level.

    Args:
      config: the config.
      level: counted from the finest.
      implementations: from `kernels.select`, for training on certain devices.
      spec: describes the codes; None: `code_spec(config)`.
    """
    spec = spec or code_spec(config)
    section = config.prior[spec.levels[level]]
    raster = section.order == 'raster'
    return (RasterPrior if raster else WavefrontPrior)(
        shape=spec.shapes[level],
        codebook_size=spec.codebook_sizes[level],
        coarser_codebook_sizes=spec.codebook_sizes[level + 1 :],
        num_classes=spec.num_classes,
        attend=implementations.attend,
        **_module_fields(section, without=('order', 'skew') if raster else ('order',)),
    )


def has_stage_1(config: ConfigDict) -> bool:
    """Returns whether a run has images and stage 1; otherwise its codes are those of another tokenizer."""
    return 'vqvae' in config


def code_spec(config: ConfigDict) -> CodeSpec:
    """Returns the description of the codes that the priors are trained on.

    Stage 1's sections give it, without names of classes, or the codes of another tokenizer.

    Raises:
      ConfigError: there are no such codes.
      ValueError: the sizes of images and maps do not fit.
    """
    if not has_stage_1(config):
        return own_codes.read_spec(config.codes.path)
    factors, classes = config.vqvae.downsample_factors, config.data.num_classes
    shapes = map_shapes(config.data.image_size, factors)
    return CodeSpec(level_names(factors), shapes, (config.vqvae.codebook_size,) * len(shapes), classes, ())


def make_classifier(config: ConfigDict) -> ResNet:
    """Returns the module that classifies samples."""
    fields = _module_fields(config.classifier, without=('flip', 'crop'))
    return ResNet(num_classes=config.data.num_classes, **fields)


def _module_fields(section, without):
    fields = {k: v for k, v in section.items() if k not in ('training', *without)}
    return fields | {'dtype': jnp.dtype(section.dtype)}


def networks(
    config: ConfigDict, implementations: Implementations = REFERENCES, spec: CodeSpec | None = None
) -> dict[str, tuple[Any, tuple]]:
    """Returns the module of every section that has one, and the arguments of its `init`: keys, and shapes of the rest.

    Args:
      config: the config.
      implementations: from `kernels.select`, for training on certain devices.
      spec: describes the codes; None: `code_spec(config)`.

    Returns:
      {section: (module, arguments)} of 'vqvae' if there is a stage 1, every 'prior.<level>', and 'classifier' if there
      are images with classes.
    """
    key, spec, modules = jax.random.key(0), spec or code_spec(config), {}
    if has_stage_1(config):
        image = jax.ShapeDtypeStruct((1, *config.data.image_size, config.data.channels), jnp.float32)
        modules['vqvae'] = make_vqvae(config, implementations), ({'params': key, 'restart': key}, image)
    codes = tuple(jax.ShapeDtypeStruct((1, *shape), jnp.int32) for shape in spec.shapes)
    label = jax.ShapeDtypeStruct((1,), jnp.int32) if spec.num_classes else None
    for level, name in enumerate(spec.levels):
        prior = make_prior(config, level, implementations, spec)
        modules[f'prior.{name}'] = prior, (key, codes[level], label, codes[level + 1 :])
    if has_classifier(config):
        modules['classifier'] = make_classifier(config), (key, image)
    return modules


def different_arrays(found: Any, expected: Any) -> dict[str, tuple[tuple | None, tuple | None]]:
    """Compares the names and shapes of two trees of arrays, for the errors of weights that are not a network's.

    Returns:
      {path: (shape found, shape expected)} where they differ, by name; None: there is no such array.
    """
    found, expected = (
        {jax.tree_util.keystr(path, simple=True, separator='/'): x.shape for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (found, expected)
    )
    pairs = {name: (found.get(name), expected.get(name)) for name in sorted(found.keys() | expected.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def sampling_settings(config: ConfigDict) -> dict[str, dict[str, float]]:
    """Returns {field: {level: value}} of sample.temperature, top_k, top_p and guidance."""
    return {field: config.sample[field].to_dict() for field in SamplingParams._fields}


def sampling_arguments(config: ConfigDict) -> dict[str, dict[str, float | None]]:
    """Returns the same as arguments of `api.sample`: a value that changes nothing is None, not in the program."""
    no_change = {'top_k': 0, 'top_p': 1, 'guidance': 1}
    return {
        field: {level: None if no_change.get(field) == value else value for level, value in values.items()}
        for field, values in sampling_settings(config).items()
    }


def has_classifier(config: ConfigDict) -> bool:
    """Returns whether there are images of two classes or more; otherwise there is no classifier and no rejection."""
    return has_stage_1(config) and config.data.num_classes > 1


def skips_unreadable(config: ConfigDict) -> bool:
    """Returns whether images that cannot be read are skipped and listed."""
    return has_stage_1(config) and config.data.on_error == 'skip'


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
    if not config[section].get('relu_skip'):  # records that are older than the field lack it
        unused += ('relu_skip',)
    values = {'seed': config.seed}
    if has_stage_1(config):
        values |= {f'data.{k}': v for k, v in config.data.items() if k not in IO_ONLY_FIELDS}
    else:
        values |= {f'codes.{k}': v for k, v in dataclasses.asdict(code_spec(config)).items()}
    values |= {f'{section}.{k}': v for k, v in config[section].items() if k not in unused}
    values |= {f'{section}.training.{k}': v for k, v in train_config(config, section).resume_settings().items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def training_fields(section: str) -> tuple[str, ...]:
    """Returns the beginnings of the names in `settings` that decide how a network is trained, but not the network."""
    names = ('training.', 'flip', 'crop', 'commitment_weight')
    return ('seed', 'data.flip', 'data.crop', *(f'{section}.{name}' for name in names))


def network_settings(config: ConfigDict, section: str) -> dict[str, Any]:
    """Returns the fields of a section that decide the function of its network; networks may differ in the others."""
    fields, unused = config[section], ('training', *COMPUTE_ONLY_FIELDS, *_TRAINING_FIELDS)
    if fields.get('order') == 'raster':
        unused += ('skew',)
    return {f'{section}.{k}': v for k, v in fields.items() if k not in unused}


def import_settings(config: ConfigDict, section: str) -> dict[str, Any]:
    """Returns the part of `settings` that weights which were trained elsewhere must fit; the rest is unknown."""
    known = tuple(f'data.{name}' for name in _FORM_FIELDS)
    values = {k: v for k, v in settings(config, section).items() if not k.startswith(training_fields(section))}
    return {k: v for k, v in values.items() if not k.startswith('data.') or k in known}
