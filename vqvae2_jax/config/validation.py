"""What is wrong with a config, found before any job starts, so that mistakes cost seconds."""

import inspect
import math

import jax
from ml_collections import ConfigDict

from vqvae2_jax.config import build as configs
from vqvae2_jax.config.build import ConfigError
from vqvae2_jax.data.images import SPLITS, check_seed
from vqvae2_jax.distributed import sharding
from vqvae2_jax.models.prior import Prior
from vqvae2_jax.models.resnet import ResNet
from vqvae2_jax.models.vqvae import map_shapes
from vqvae2_jax.models.wavefront import WavefrontPrior

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
        _SHARE: ('dropout', 'attention_dropout', 'label_dropout'),
    },
    'classifier': {(1, math.inf): ('stem_stride',), _SHARE: ('dropout',)},
    'training': {_SHARE: ('b2',)},  # beside what Training itself refuses
    'codes': {(1, math.inf): ('shard_size',)},
    'sample': {(1, math.inf): ('count',)},
}


def check(config: ConfigDict) -> None:
    """Raises ConfigError naming the first field that cannot work, before any job starts."""
    try:
        _check(config)
    except ValueError as error:  # of ImageSpec, map_shapes, ...
        raise ConfigError(str(error)) from error


def _check(config):
    sections = ('name', 'seed', 'data', 'vqvae', 'codes', 'prior', 'classifier', 'sample', 'reject')
    configs.check_names('config', config, (*sections, *configs.OPTIONAL_SECTIONS), required=sections)
    check_seed('seed', config.seed)
    spec = configs.image_spec(config)
    _check_aside(config)
    configs.make_vqvae(config)
    if not config.vqvae.factors:
        raise ConfigError('vqvae.factors is empty; there is a level for each of them')
    names = configs.level_names(config.vqvae.factors)
    shapes = map_shapes(spec.image_size, config.vqvae.factors)
    _check_ranges('vqvae', config.vqvae)
    if set(config.prior) != set(names):
        raise ConfigError(
            f'config.prior has the levels {sorted(config.prior)}, but vqvae.factors={tuple(config.vqvae.factors)} '
            f'makes {sorted(names)}: name one prior per level'
        )
    sections = ['vqvae', *(f'prior.{name}' for name in names)]
    for level, name in enumerate(names):
        configs.make_prior(config, level)
        _check_prior(name, config.prior[name], shapes[level], spec.num_classes)
    if configs.has_classifier(config):
        sections.append('classifier')
        configs.make_classifier(config)
        _check_classifier(config.classifier)
    for section in sections:
        _check_training(section, configs.training(config, section))
    sharding.check_batch_size(config.codes.batch_size, 'codes.batch_size', own=True)
    _check_sampling(config, names)
    _check_networks(config)


def _check_aside(config):
    for job, defaults in configs.OPTIONAL_SECTIONS.items():
        configs.check_names(job, configs.options(config, job), defaults, required=())
    edit, likelihood, evaluate = (configs.options(config, job) for job in ('edit', 'likelihood', 'evaluate'))
    if edit.count < 1:
        raise ConfigError(f'edit.count is {edit.count}; it must be 1 or more')
    splits = {'likelihood.split': likelihood.split, 'evaluate.split': evaluate.split}
    splits |= {'evaluate.reference': evaluate.reference} if evaluate.reference else {}
    for field, split in splits.items():
        if split not in SPLITS:
            raise ConfigError(f'{field} is {split!r}; there are {", ".join(SPLITS)}')
    if evaluate.inception:
        sharding.check_batch_size(evaluate.batch_size, 'evaluate.batch_size', own=True)
    if wrong := [share for share in evaluate.sweep if not 0 < share <= 1]:
        raise ConfigError(f'evaluate.sweep holds {wrong}; they are shares in (0, 1]')
    if bool(evaluate.real) != bool(evaluate.generated):
        raise ConfigError(
            f'evaluate.real is {evaluate.real!r} and evaluate.generated {evaluate.generated!r}: give both sets, or '
            'neither to evaluate the run'
        )
    if evaluate.real and not evaluate.inception:
        raise ConfigError(
            "evaluate.inception is '': two sets are compared by that network; give its weights or 'fetch'"
        )


def _check_networks(config):
    """Goes through every module's shapes, without numbers: what does not fit together shows now, not hours later."""
    for section, (model, inputs) in configs.networks(config).items():
        try:
            jax.eval_shape(model.init, *inputs)
        except Exception as error:  # JAX, Flax and the modules raise many kinds; all are the config's doing here
            raise ConfigError(f'{section} cannot be built as configured: {error}') from error


def _check_training(section, fields):
    path = f'{section}.training'
    sharding.check_batch_size(fields.batch_size, f'{path}.batch_size', parts=fields.accumulate)
    _check_ranges(path, vars(fields))
    if section == 'vqvae' and fields.accumulate > 1:
        raise ConfigError(
            f'{path}.accumulate is {fields.accumulate}; stage 1 takes its batch at once, because the codebook learns '
            'from the sums over a whole batch'
        )
    if fields.warmup_steps > fields.steps:
        raise ConfigError(f'{path}.warmup_steps={fields.warmup_steps} exceeds {path}.steps={fields.steps}')


def _check_prior(name, prior, shape, classes):
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
    slope = _value(prior, WavefrontPrior, 'slope')
    if prior.get('order') == 'wavefront' and not 1 <= slope <= shape[1]:
        raise ConfigError(
            f'{section}.slope is {slope}; on a {shape[0]}x{shape[1]} map it lies between 1 and the width, {shape[1]}'
        )
    if prior.get('label_dropout') and not classes:
        raise ConfigError(f'{section}.label_dropout={prior.label_dropout}, but data.num_classes=0: nothing to hide')
    positions = math.prod(shape)
    if positions >= 2**24:
        raise ConfigError(f'prior.{name}: a {shape[0]}x{shape[1]} map has {positions} positions; 2**24 are too many')


def _check_sampling(config, names):
    sample, reject = config.sample, config.reject
    fields = {'sample': ('count', 'batch_size', 'seed', 'labels', 'temperature'), 'reject': ('keep',)}
    fields['codes'] = ('batch_size', 'shard_size')
    optional = {'sample': ('dtype', *configs.SAMPLING_DEFAULTS), 'reject': ('threshold', 'classifier')}
    for section, required in fields.items():
        configs.check_names(section, config[section], (*required, *optional.get(section, ())), required)
    if sample.get('dtype'):
        configs.dtype_of('sample', sample.dtype)
    check_seed('sample.seed', sample.seed)
    _check_ranges('sample', sample)
    _check_ranges('codes', config.codes)
    sharding.check_batch_size(sample.batch_size, 'sample.batch_size', own=True)
    _check_levels(sample, 'temperature', names, required=names)
    for field in configs.SAMPLING_DEFAULTS:
        _check_levels(sample, field, names, required=())
    for name in names:
        _check_control(f'prior.{name}', config.prior[name], name, configs.make_sampling_params(config, name))
    classes = config.data.num_classes
    wrong = [label for label in sample.labels if not 0 <= label < classes]
    if wrong:
        there = f'has labels 0 to {classes - 1}' if classes else 'means that there are no labels'
        raise ConfigError(f'sample.labels holds {wrong}, but data.num_classes={classes} {there}')
    if not 0 < reject.keep <= 1:
        raise ConfigError(f'reject.keep is {reject.keep}; it is a share in (0, 1]')
    if not 0 <= reject.get('threshold', 0.0) <= 1:
        raise ConfigError(f'reject.threshold is {reject.threshold}; it is a probability')


def _check_levels(sample, field, names, required):
    values = sample.get(field, ConfigDict())
    if not isinstance(values, ConfigDict):
        example = f'dict({names[0]}={values!r})'
        raise ConfigError(f'sample.{field} is {values!r}; give a value for each level, as in {example}')
    if not set(required) <= set(values) <= set(names):
        raise ConfigError(f'sample.{field} names {sorted(values)}; the levels are {sorted(names)}')


def _check_control(section, prior, name, control):
    if not control.temperature >= 0:
        raise ConfigError(
            f'sample.temperature.{name} is {control.temperature}; it must be 0 (the likeliest code) or more'
        )
    if control.top_k < 0:
        raise ConfigError(f'sample.top_k.{name} is {control.top_k}; it must be 0 (all codes) or more')
    if not 0 < control.top_p <= 1:
        raise ConfigError(f'sample.top_p.{name} is {control.top_p}; it is a share in (0, 1]')
    if control.guidance is not None and not prior.get('label_dropout', 0.0):
        raise ConfigError(
            f'sample.guidance.{name} is {control.guidance}, but {section}.label_dropout is 0: guidance '
            f'compares the prior with itself without class, so train it with '
            f'{section}.label_dropout=0.1 or so, or leave guidance at 1'
        )


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
