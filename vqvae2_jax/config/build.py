"""From a config file's nested fields to the typed, checked values that the rest of the package takes.

A config is a plain `ml_collections.ConfigDict` (configs/*.py); docs/configs.md lists every field. Nothing below the
jobs sees it: they hand plain values to modules. `checks.py` looks at all of it before any job.
"""

import difflib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqvae2_jax.data.images import ImageSpec
from vqvae2_jax.distributed import sharding
from vqvae2_jax.models.prior import Prior
from vqvae2_jax.models.raster import RasterPrior
from vqvae2_jax.models.resnet import ResNet
from vqvae2_jax.models.vqvae import VQVAE, map_shapes
from vqvae2_jax.models.wavefront import WavefrontPrior
from vqvae2_jax.sampling.params import SamplingParams
from vqvae2_jax.training.optim import Training

# Fields of config.data that change how and from where images are read, not which images they are.
_READING = ('path', 'workers', 'on_error')
# Fields of modules that change how they are computed, not what.
_COMPUTING = ('remat', 'scan_layers')
_OWN_FIELDS = {  # of each stage's section, beside the fields of its module
    'vqvae': ('commitment_weight', 'training'),
    'prior': ('training',),
    'classifier': ('flip', 'crop', 'training'),
}
DERIVED_FIELDS = {  # fields of the modules that follow from the rest of the config
    'vqvae': ('channels',),
    'prior': ('shape', 'codebook_size', 'coarser_codebook_sizes', 'num_classes'),
    'classifier': ('num_classes',),
}
_ORDERS = {'raster': RasterPrior, 'wavefront': WavefrontPrior}  # prior.<level>.order
OPTIONAL_SECTIONS = {  # sections that configs may leave out
    'parallel': {'fsdp': 1},
    'edit': {'path': '', 'mask': '', 'levels': (), 'label': -1, 'count': 4},
    'likelihood': {'path': '', 'split': 'test'},
    'evaluate': {
        'split': 'test',
        'reference': '',
        'inception': '',
        'batch_size': 16,
        'sweep': (1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1),
        'cas': False,
        'real': '',
        'generated': '',
    },
}
SAMPLING_DEFAULTS = {'top_k': 0, 'top_p': 1.0, 'guidance': 1.0}  # sample.<field>.<level>, where left out


class ConfigError(ValueError):
    """A config that cannot work; the message names the field."""


def level_names(factors: tuple[int, ...]) -> tuple[str, ...]:
    """The names of the levels, finest first: bottom, middle, top as in the paper; bottom, level1, ..., top for more."""
    count = len(factors)
    if count == 1:
        return ('top',)
    middle = ('middle',) if count == 3 else tuple(f'level{i}' for i in range(1, count - 1))
    return ('bottom', *middle, 'top')


def image_spec(config: ConfigDict) -> ImageSpec:
    """config.data as the data package takes it."""
    _check_fields('data', config.data, inspect.signature(ImageSpec).parameters)
    return ImageSpec(**config.data)


def training(config: ConfigDict, section: str) -> Training:
    """How to train the stage `section`: 'vqvae', 'prior.top', 'classifier', ..."""
    fields = config[section].training  # ConfigDict reads dotted paths
    _check_fields(f'{section}.training', fields, inspect.signature(Training).parameters)
    try:
        return Training(**fields)
    except ValueError as error:
        raise ConfigError(f'{section}.{error}') from error


def make_vqvae(config: ConfigDict) -> VQVAE:
    """Stage 1's module."""
    return VQVAE(channels=config.data.channels, **_module_fields('vqvae', 'vqvae', config.vqvae, VQVAE))


def complete(config: ConfigDict) -> ConfigDict:
    """The config itself, with every field that it leaves out put in at its default, so that a flag can set it."""
    stages = [name for name in ('vqvae', 'classifier') if config.get(name)]
    stages += [f'prior.{name}' for name in config.get('prior', ())]
    with config.unlocked():
        for job in OPTIONAL_SECTIONS:
            config[job] = options(config, job)
        _fill(config.get('data', ConfigDict()), _defaults(ImageSpec))
        for section in stages:
            if section.startswith('prior'):  # in either order, so that a flag can change it
                _fill(config[section], {'order': 'raster', **_defaults(WavefrontPrior, DERIVED_FIELDS['prior'])})
            else:
                _fill(config[section], _stage_defaults(section, config[section]))
            _fill(config[section].get('training', ConfigDict()), _defaults(Training))
        if 'reject' in config:
            _fill(config.reject, {'threshold': 0.0, 'classifier': ''})
        if 'sample' in config:
            _fill(config.sample, {'dtype': '', **{field: {} for field in SAMPLING_DEFAULTS}})
            for field, default in SAMPLING_DEFAULTS.items():
                if isinstance(config.sample[field], ConfigDict):  # else `check` says what is wrong
                    _fill(config.sample[field], dict.fromkeys(config.get('prior', ()), default))
    return config


def _fill(section, defaults):
    for name, value in defaults.items():
        if name not in section:
            section[name] = value


def _module(path, fields):
    """The class that a stage's section configures."""
    if not path.startswith('prior'):
        return {'vqvae': VQVAE, 'classifier': ResNet}[path]
    order = fields.get('order', 'raster')
    if order not in _ORDERS:
        raise ConfigError(f'{path}.order is {order!r}; it must be one of {", ".join(_ORDERS)}')
    return _ORDERS[order]


def _stage_defaults(path, fields):
    kind = path.partition('.')[0]
    order = {'order': 'raster'} if kind == 'prior' else {}
    return order | _defaults(_module(path, fields), DERIVED_FIELDS[kind])


def _stage_fields(path, fields):
    """A stage's section without what its module has no use for: the slope of a prior in raster order."""
    unused = ('slope',) if path.startswith('prior') and fields.get('order', 'raster') == 'raster' else ()
    return {k: v for k, v in fields.items() if k not in unused}


def options(config: ConfigDict, job: str) -> ConfigDict:
    """The section of a job of `OPTIONAL_SECTIONS`, complete."""
    given = config.get(job, ConfigDict())
    if not isinstance(given, ConfigDict):
        raise ConfigError(f'{job} is {given!r}; it is a section with the fields {", ".join(sorted(OPTIONAL_SECTIONS[job]))}')
    return ConfigDict(OPTIONAL_SECTIONS[job] | dict(given))


def controls(config: ConfigDict) -> dict[str, dict]:
    """{field: {level: value}} of sample.temperature, top_k, top_p and guidance, complete."""
    sample = config.sample
    found = {
        k: dict.fromkeys(config.prior, default) | dict(sample.get(k, {})) for k, default in SAMPLING_DEFAULTS.items()
    }
    return {'temperature': dict(sample.temperature), **found}


def make_sampling_params(config: ConfigDict, level_name: str) -> SamplingParams:
    """How the codes of a level are drawn."""
    chosen = {field: values[level_name] for field, values in controls(config).items()}
    guidance = chosen.pop('guidance')
    guidance = None if guidance == 1.0 else float(guidance)  # 1: the prior as it is, at half the work
    return SamplingParams(float(chosen.pop('temperature')), **chosen, guidance=guidance)


def make_prior(config: ConfigDict, level: int) -> Prior:
    """Stage 2's module of one level, counted from the finest."""
    names = level_names(config.vqvae.factors)
    coarser = len(names) - 1 - level
    path, section = f'prior.{names[level]}', config.prior[names[level]]
    module = _module(path, section)
    return module(
        shape=map_shapes(config.data.image_size, config.vqvae.factors)[level],
        codebook_size=config.vqvae.codebook_size,
        coarser_codebook_sizes=(config.vqvae.codebook_size,) * coarser,
        num_classes=config.data.num_classes,
        **_module_fields(path, 'prior', section, module),
    )


def make_classifier(config: ConfigDict) -> ResNet:
    """The module that judges samples."""
    fields = _module_fields('classifier', 'classifier', config.classifier, ResNet)
    return ResNet(num_classes=config.data.num_classes, **fields)


def networks(config: ConfigDict) -> dict[str, tuple[Any, tuple]]:
    """Every section's module, and what its `init` takes, as shapes: {'vqvae', 'prior.<level>', 'classifier'}."""
    key, names = jax.random.key(0), level_names(config.vqvae.factors)
    shapes = map_shapes(config.data.image_size, config.vqvae.factors)
    image = jax.ShapeDtypeStruct((1, *config.data.image_size, config.data.channels), jnp.float32)
    codes = tuple(jax.ShapeDtypeStruct((1, *shape), jnp.int32) for shape in shapes)
    label = jax.ShapeDtypeStruct((1,), jnp.int32) if config.data.num_classes else None
    found = {'vqvae': (make_vqvae(config), ({'params': key, 'reseed': key}, image))}
    for level, name in enumerate(names):
        found[f'prior.{name}'] = make_prior(config, level), (key, codes[level], label, codes[level + 1 :])
    if has_classifier(config):
        found['classifier'] = make_classifier(config), (key, image)
    return found


def make_mesh(config: ConfigDict, devices=None) -> Mesh:
    """All devices (or those given), arranged as config.parallel says."""
    try:
        return sharding.make_mesh(devices, options(config, 'parallel').fsdp)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def has_classifier(config: ConfigDict) -> bool:
    """Without classes there is nothing to classify, and no rejection."""
    return config.data.num_classes > 1


def trains_classifier(config: ConfigDict) -> bool:
    """Whether the run's own classifier is needed: to judge samples, unless another one does, or to be compared with."""
    return has_classifier(config) and (not config.reject.get('classifier') or has_cas(config))


def has_cas(config: ConfigDict) -> bool:
    """Whether the Classification Accuracy Score is wanted, and can be had."""
    return has_classifier(config) and options(config, 'evaluate').cas


def settings(config: ConfigDict, section: str) -> dict[str, Any]:
    """What decides the outcome of training `section`, for the record: its data, module and training, flat.

    Fields that the config leaves out are there with their defaults: what is recorded is what is built. Left out is what
    only says how often to log, evaluate or save, and how many workers read.
    """
    found = {'seed': config.seed}
    found |= {f'data.{k}': v for k, v in vars(image_spec(config)).items() if k not in _READING}
    module = _stage_defaults(section, config[section]) | _stage_fields(section, config[section])
    found |= {f'{section}.{k}': v for k, v in module.items() if k not in ('training', *_COMPUTING)}
    found |= {f'{section}.training.{k}': v for k, v in training(config, section).identity().items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


def _defaults(module, elsewhere=()):
    """The values in JSON's terms that `module` takes for fields that are not given."""
    parameters = inspect.signature(module).parameters.items()
    values = {k: p.default for k, p in parameters if k not in elsewhere and k not in ('parent', 'name')}
    values = {k: v for k, v in values.items() if v is not inspect.Parameter.empty}
    return {k: np.dtype(v).name if k == 'dtype' else v for k, v in values.items()}


def _module_fields(path, section, fields, module):
    elsewhere = {'parent', 'name', *DERIVED_FIELDS[section]}
    allowed = {k: v for k, v in inspect.signature(module).parameters.items() if k not in elsewhere}
    optional = ('order', 'slope') if section == 'prior' else ()
    _check_fields(path, fields, allowed, _OWN_FIELDS[section], optional)
    chosen = {k: v for k, v in fields.items() if k in allowed}
    if 'dtype' in chosen:
        chosen['dtype'] = dtype_of(path, chosen['dtype'])
    return chosen


def dtype_of(path, name):
    if name not in ('float32', 'bfloat16'):
        raise ConfigError(f"{path}.dtype is {name!r}; it must be 'float32' or 'bfloat16'")
    return jnp.dtype(name)


def _check_fields(path, fields, parameters, own=(), optional=()):
    """The fields are `parameters`, `own` or `optional`; all of `own`, and those without a default, are there."""
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    check_names(path, fields, {*parameters, *own, *optional}, required | set(own))


def check_names(path, fields, allowed, required):
    unknown, missing = sorted(set(fields) - set(allowed)), sorted(set(required) - set(fields))
    if unknown:
        near = difflib.get_close_matches(unknown[0], allowed, n=1)
        hint = f'did you mean {near[0]!r}? ' if near else ''
        raise ConfigError(
            f'{path} has the unknown field {unknown[0]!r}; {hint}its fields are {", ".join(sorted(allowed))}'
        )
    if missing:
        raise ConfigError(f'{path} lacks the field {missing[0]!r}')
