"""From a config file's nested fields to the typed, checked values that the rest of the package takes.

A config is a plain `ml_collections.ConfigDict` (configs/*.py); docs/configs.md lists every field. Nothing below the
jobs sees it: they hand plain values to modules. `check` runs before any job, so that mistakes cost seconds.
"""

import difflib
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vqvae2_jax import parallel
from vqvae2_jax.data.images import ImageSpec
from vqvae2_jax.models.prior import Prior
from vqvae2_jax.models.resnet import ResNet
from vqvae2_jax.models.vqvae import VQVAE, map_shapes
from vqvae2_jax.optim import Training

# Fields of config.data that change how and from where images are read, not which images they are.
_READING = ('path', 'workers', 'on_error')
_OWN_FIELDS = {  # of each stage's section, beside the fields of its module
    'vqvae': ('commitment_weight', 'training'),
    'prior': ('training',),
    'classifier': ('flip', 'crop', 'training'),
}
_FROM_ELSEWHERE = {  # fields of the modules that follow from the rest of the config
    'vqvae': ('channels',),
    'prior': ('shape', 'codebook_size', 'coarser_codebook_sizes', 'num_classes'),
    'classifier': ('num_classes',),
}
_MODULES = {'vqvae': VQVAE, 'prior': Prior, 'classifier': ResNet}
_SHARE = (0, 1)
_RANGES = {  # (lowest, below what): the fields that must lie there
    'vqvae': {
        (1, math.inf): ('residual', 'layers', 'codebook_dim'),
        (2, math.inf): ('hidden', 'codebook_size'),  # half of hidden comes first; one code says nothing
        (0, math.inf): ('level_loss', 'commitment_weight'),
        _SHARE: ('decay', 'reseed_threshold'),
    },
    'prior': {
        (1, math.inf): ('hidden', 'residual', 'layers', 'kernel', 'heads'),
        (0, math.inf): ('attention_layers', 'output_layers', 'condition_layers'),
        _SHARE: ('dropout', 'attention_dropout'),
    },
    'classifier': {(1, math.inf): ('stem_stride',), _SHARE: ('dropout',)},
    'training': {_SHARE: ('b2',)},  # beside what Training itself refuses
    'codes': {(1, math.inf): ('shard_size',)},
    'sample': {(1, math.inf): ('count',)},
}


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


def make_prior(config: ConfigDict, level: int) -> Prior:
    """Stage 2's module of one level, counted from the finest."""
    names = level_names(config.vqvae.factors)
    coarser = len(names) - 1 - level
    return Prior(
        shape=map_shapes(config.data.image_size, config.vqvae.factors)[level],
        codebook_size=config.vqvae.codebook_size,
        coarser_codebook_sizes=(config.vqvae.codebook_size,) * coarser,
        num_classes=config.data.num_classes,
        **_module_fields(f'prior.{names[level]}', 'prior', config.prior[names[level]], Prior),
    )


def make_classifier(config: ConfigDict) -> ResNet:
    """The module that judges samples."""
    fields = _module_fields('classifier', 'classifier', config.classifier, ResNet)
    return ResNet(num_classes=config.data.num_classes, **fields)


def has_classifier(config: ConfigDict) -> bool:
    """Without classes there is nothing to classify, and no rejection."""
    return config.data.num_classes > 1


def settings(config: ConfigDict, section: str) -> dict[str, Any]:
    """What decides the outcome of training `section`, for the record: its data, module and training, flat.

    Fields that the config leaves out are there with their defaults: what is recorded is what is built. Left out is what
    only says how often to log, evaluate or save, and how many workers read.
    """
    kind = section.partition('.')[0]
    elsewhere = _FROM_ELSEWHERE[kind]
    found = {'seed': config.seed}
    found |= {f'data.{k}': v for k, v in vars(image_spec(config)).items() if k not in _READING}
    module = _defaults(_MODULES[kind], elsewhere) | dict(config[section])
    found |= {f'{section}.{k}': v for k, v in module.items() if k != 'training'}
    found |= {f'{section}.training.{k}': v for k, v in training(config, section).identity().items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


def _defaults(module, elsewhere):
    """The values in JSON's terms that `module` takes for fields that are not given."""
    parameters = inspect.signature(module).parameters.items()
    values = {k: p.default for k, p in parameters if k not in elsewhere and k not in ('parent', 'name')}
    values = {k: v for k, v in values.items() if v is not inspect.Parameter.empty}
    return {k: np.dtype(v).name if k == 'dtype' else v for k, v in values.items()}


def check(config: ConfigDict) -> None:
    """Raises ConfigError naming the first field that cannot work, before any job starts."""
    try:
        _check(config)
    except ValueError as error:  # of ImageSpec, map_shapes, ...
        raise ConfigError(str(error)) from error


def _check(config):
    sections = ('name', 'seed', 'data', 'vqvae', 'codes', 'prior', 'classifier', 'sample', 'reject')
    _check_names('config', config, sections, required=sections)
    spec = image_spec(config)
    make_vqvae(config)
    if not config.vqvae.factors:
        raise ConfigError('vqvae.factors is empty; there is a level for each of them')
    names = level_names(config.vqvae.factors)
    shapes = map_shapes(spec.image_size, config.vqvae.factors)
    _check_ranges('vqvae', config.vqvae)
    if set(config.prior) != set(names):
        raise ConfigError(
            f'config.prior has the levels {sorted(config.prior)}, but vqvae.factors={tuple(config.vqvae.factors)} '
            f'makes {sorted(names)}: name one prior per level'
        )
    sections = ['vqvae', *(f'prior.{name}' for name in names)]
    for level, name in enumerate(names):
        make_prior(config, level)
        _check_prior(name, config.prior[name], shapes[level])
    if has_classifier(config):
        sections.append('classifier')
        make_classifier(config)
        _check_classifier(config.classifier)
    for section in sections:
        _check_training(section, training(config, section))
    parallel.check_batch_size(config.codes.batch_size, 'codes.batch_size')
    _check_sampling(config, names)
    _check_networks(config, names, shapes)


def _check_networks(config, names, shapes):
    """Goes through every module's shapes, without numbers: what does not fit together shows now, not hours later."""
    key = jax.random.key(0)
    image = jax.ShapeDtypeStruct((1, *config.data.image_size, config.data.channels), jnp.float32)
    codes = tuple(jax.ShapeDtypeStruct((1, *shape), jnp.int32) for shape in shapes)
    label = jax.ShapeDtypeStruct((1,), jnp.int32) if config.data.num_classes else None
    networks = {'vqvae': (make_vqvae(config), ({'params': key, 'reseed': key}, image))}
    for level, name in enumerate(names):
        networks[f'prior.{name}'] = make_prior(config, level), (key, codes[level], label, codes[level + 1 :])
    if has_classifier(config):
        networks['classifier'] = make_classifier(config), (key, image)
    for section, (model, inputs) in networks.items():
        try:
            jax.eval_shape(model.init, *inputs)
        except Exception as error:  # JAX, Flax and the modules raise many kinds; all are the config's doing here
            raise ConfigError(f'{section} cannot be built as configured: {error}') from error


def _check_training(section, fields):
    path = f'{section}.training'
    parallel.check_batch_size(fields.batch_size, f'{path}.batch_size')
    _check_ranges(path, vars(fields))
    if fields.warmup_steps > fields.steps:
        raise ConfigError(f'{path}.warmup_steps={fields.warmup_steps} exceeds {path}.steps={fields.steps}')


def _check_prior(name, prior, shape):
    section = f'prior.{name}'
    _check_ranges(section, prior)
    hidden, layers, kernel, heads = (_value(prior, Prior, k) for k in ('hidden', 'layers', 'kernel', 'heads'))
    attention = _value(prior, Prior, 'attention_layers')
    if attention and hidden % heads:
        raise ConfigError(f'{section}.heads={heads} does not divide {section}.hidden={hidden}')
    if attention > layers:
        raise ConfigError(f'{section}.attention_layers={attention}; there are {section}.layers={layers} to follow')
    if kernel % 2 == 0:
        raise ConfigError(f'{section}.kernel={kernel} must be odd, so that it has a middle')
    positions = math.prod(shape)
    if positions >= 2**24:
        raise ConfigError(f'prior.{name}: a {shape[0]}x{shape[1]} map has {positions} positions; 2**24 are too many')


def _check_sampling(config, names):
    sample, reject = config.sample, config.reject
    fields = {'sample': ('count', 'batch_size', 'seed', 'labels', 'temperature'), 'reject': ('keep',)}
    fields['codes'] = ('batch_size', 'shard_size')
    for section, names_of_fields in fields.items():
        _check_names(section, config[section], names_of_fields, required=names_of_fields)
    _check_ranges('sample', sample)
    _check_ranges('codes', config.codes)
    parallel.check_batch_size(sample.batch_size, 'sample.batch_size')
    if set(sample.temperature) != set(names):
        raise ConfigError(f'sample.temperature names {sorted(sample.temperature)}; the levels are {sorted(names)}')
    for name, value in sample.temperature.items():
        if value < 0:
            raise ConfigError(f'sample.temperature.{name} is {value}; it must be 0 (the likeliest code) or more')
    classes = config.data.num_classes
    wrong = [label for label in sample.labels if not 0 <= label < classes]
    if wrong:
        there = f'has labels 0 to {classes - 1}' if classes else 'means that there are no labels'
        raise ConfigError(f'sample.labels holds {wrong}, but data.num_classes={classes} {there}')
    if not 0 < reject.keep <= 1:
        raise ConfigError(f'reject.keep is {reject.keep}; it is a share in (0, 1]')


def _check_classifier(classifier):
    _check_ranges('classifier', classifier)
    widths, blocks = (_value(classifier, ResNet, k) for k in ('widths', 'blocks'))
    if len(widths) != len(blocks) or not widths:
        raise ConfigError(f'classifier.widths={tuple(widths)} and classifier.blocks={tuple(blocks)} must be as many')
    if min(widths) < 4 or min(blocks) < 1:
        raise ConfigError(f'classifier.widths={tuple(widths)} must be 4 or more, blocks={tuple(blocks)} 1 or more')


def _value(fields, module, name):
    return fields.get(name, inspect.signature(module).parameters[name].default)


def _check_ranges(path, fields):
    kind = next(part for part in reversed(path.split('.')) if part in _RANGES)
    for (low, high), names in _RANGES[kind].items():
        for name in names:
            if name in fields and not low <= fields[name] < high:
                limit = '' if high == math.inf else f' and less than {high}'
                raise ConfigError(f'{path}.{name} is {fields[name]}; it must be {low} or more{limit}')


def _module_fields(path, section, fields, module):
    own = set(_OWN_FIELDS[section])
    elsewhere = set(_FROM_ELSEWHERE[section])
    parameters = inspect.signature(module).parameters
    allowed = {k: v for k, v in parameters.items() if k not in {'parent', 'name'} | elsewhere}
    _check_fields(path, fields, allowed, own)
    chosen = {k: v for k, v in fields.items() if k in allowed}
    if 'dtype' in chosen:
        chosen['dtype'] = _dtype(path, chosen['dtype'])
    return chosen


def _dtype(path, name):
    if name not in ('float32', 'bfloat16'):
        raise ConfigError(f"{path}.dtype is {name!r}; it must be 'float32' or 'bfloat16'")
    return jnp.dtype(name)


def _check_fields(path, fields, parameters, own=()):
    """The fields are `parameters` of a signature or among `own`; those of both without a default are there."""
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    _check_names(path, fields, {*parameters, *own}, required | set(own))


def _check_names(path, fields, allowed, required):
    unknown, missing = sorted(set(fields) - set(allowed)), sorted(set(required) - set(fields))
    if unknown:
        near = difflib.get_close_matches(unknown[0], allowed, n=1)
        hint = f'did you mean {near[0]!r}? ' if near else ''
        raise ConfigError(
            f'{path} has the unknown field {unknown[0]!r}; {hint}its fields are {", ".join(sorted(allowed))}'
        )
    if missing:
        raise ConfigError(f'{path} lacks the field {missing[0]!r}')
