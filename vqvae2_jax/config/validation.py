"""Checks a config before any job starts, so that a mistake costs seconds.

The names and types of all fields come from the base config. Relations between fields of one section are checked by the
module, `ImageSpec` or `TrainConfig` that the section describes; relations between sections are checked here.
"""

import difflib
import math
from collections.abc import Iterable

import jax
from ml_collections import ConfigDict

from vqvae2_jax.config import base, build
from vqvae2_jax.config.fields import ConfigError, show

# Fields of sections that a config without stage 1 has too, which need images or their decoder.
_OF_IMAGES = (
    *('codes.flip', 'codes.crops', 'likelihood.path'),
    *(f'evaluate.{name}' for name in ('references', 'inception', 'sweep', 'cas', 'nearest', 'real', 'generated')),
)


def validate_config(config: ConfigDict) -> None:
    """Checks all of a config; lists become tuples in it, integers floats where needed, and `~` the home folder.

    Args:
      config: from `base.get_config`, or with the same fields.

    Raises:
      ConfigError: the first field that cannot work, with its value and the allowed values.
    """
    if not isinstance(config, ConfigDict):
        raise ConfigError(f'the config is {show(config)}; it must be an ml_collections.ConfigDict')
    stage_1 = 'data' in config or 'vqvae' in config
    fields = base.schema(stage_1=stage_1)
    check_names('config', config, fields)
    for section in ('data', 'vqvae', 'codes') if stage_1 else ('codes',):  # they decide which levels there are
        _check_section(section, config[section], fields[section])
    spec = _code_spec(config)
    _check_levels(config, spec.levels)
    _check_section('', config, base.schema(spec.levels, stage_1=stage_1))
    if not stage_1:
        _check_without_images(config)
    _check_priors(config, spec)
    _check_training(config)
    _check_sampling(config, spec)
    _check_evaluation(config, spec)
    _check_networks(config, spec)


def check_batch_sizes(config: ConfigDict, mesh_shape: tuple[int, int], sections: Iterable[str]) -> None:
    """Checks that the training batches of some sections can be sharded evenly over the devices.

    A batch that is only a multiple of the `data` axis is sharded over that axis alone. Batch sizes of jobs that train
    nothing are padded instead.

    Args:
      config: a config that `validate_config` accepts.
      mesh_shape: the sizes of the mesh axes `data` and `fsdp`.
      sections: the sections to check: 'vqvae', 'prior.<level>' or 'classifier'.

    Raises:
      ConfigError: a batch that cannot be sharded; the message suggests a size.
    """
    devices = math.prod(mesh_shape)
    for section in sections:
        training = build.train_config(config, section)
        parts, field = training.grad_accum_steps, f'{section}.training.batch_size'
        if training.batch_size % (mesh_shape[0] * parts):
            unit = mesh_shape[0] * parts
            example = -(-training.batch_size // unit) * unit
            among = f'{devices} devices' + (f' in grad_accum_steps={parts} microbatches' if parts > 1 else '')
            divisors = [n for n in range(1, devices + 1) if devices % n == 0]
            fsdp = next((n for n in divisors if training.batch_size % (devices // n * parts) == 0), None)
            advice = f', or set --config.parallel.fsdp={fsdp}' if fsdp else ''
            raise ConfigError(
                f'{field} is {training.batch_size}, which {among} cannot share evenly; it must be a multiple of '
                f'{unit} on this mesh, for example --config.{field}={example}{advice}'
            )


def check_names(path: str, names: Iterable[str], allowed: Iterable[str], complete: bool = True) -> None:
    """Checks the names of the fields of a section.

    Args:
      path: the section, for the message.
      names: its fields.
      allowed: the fields of the base config.
      complete: whether all of them have to be there.

    Raises:
      ConfigError: a field is unknown (the message suggests a similar one) or missing.
    """
    names, allowed = list(map(str, names)), list(allowed)
    if unknown := sorted(set(names) - set(allowed)):
        near = _similar(unknown[0], allowed)
        hint = f'did you mean {near!r}? ' if near else ''
        raise ConfigError(
            f'{path} has the unknown field {show(unknown[0])}; {hint}its fields are {", ".join(sorted(allowed))}'
        )
    if complete and (missing := sorted(set(allowed) - set(names))):
        raise ConfigError(
            f'{path} lacks the field {missing[0]!r}; start the config from vqvae2_jax.config.base.get_config()'
        )


def _similar(name, allowed):
    """Returns the allowed name that a name is closest to, as a whole or in one of its words; None if none is close."""
    words = {word: full for full in reversed(allowed) for word in full.split('_')}
    for choices in ({full: full for full in allowed}, words):
        if near := difflib.get_close_matches(name, choices, n=1):
            return choices[near[0]]
    return None


def _check_section(path, section, fields):
    """Checks names and types of a section's fields; the path of the whole config is ''."""
    if not isinstance(section, ConfigDict):
        names = sorted(fields)
        raise ConfigError(
            f'{path} is {show(section)}; it must be a section with the fields {", ".join(names)}: '
            f'set one, as in --config.{path}.{names[0]}='
        )
    check_names(path or 'config', section, fields)
    for name, field in fields.items():
        value, field_path = section[name], f'{path}.{name}' if path else name
        if isinstance(field, dict):
            _check_section(field_path, value, field)
            continue
        checked = field.check(field_path, value)
        if type(checked) is not type(value) or checked != value:  # a path with its home folder
            with section.unlocked(), section.ignore_type():
                section[name] = checked


def _code_spec(config):
    """Checks that codes come from stage 1 or from codes.path; returns their description."""
    path = config.codes.path
    if not build.has_stage_1(config):
        if not path:
            raise ConfigError(
                "codes.path is ''; a config without the sections data and vqvae needs the directory of its codes: "
                'start it from base.get_config(codes=...)'
            )
        return build.code_spec(config)
    if path:
        raise ConfigError(
            f'codes.path is {show(path)}, but this config has the sections data and vqvae, which it replaces: start '
            'the config from base.get_config(codes=...)'
        )
    build.image_spec(config)
    try:
        return build.code_spec(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_levels(config, levels):
    if isinstance(config.prior, ConfigDict) and set(config.prior) != set(levels):
        if build.has_stage_1(config):
            field, start = f'vqvae.downsample_factors={config.vqvae.downsample_factors} makes', levels
        else:
            field, start = f'codes.path={config.codes.path!r} has', 'codes=...'
        raise ConfigError(
            f'prior has the levels {sorted(map(str, config.prior))}, but {field} {sorted(levels)}: start the config '
            f'from base.get_config({start})'
        )


def _check_without_images(config):
    """Checks that fields that need images have their defaults, in a config without stage 1."""
    fields = base.schema(stage_1=False)
    for path in _OF_IMAGES:
        section, name = path.split('.')
        value, default = config[section][name], fields[section][name].default
        if value != default:
            raise ConfigError(
                f'{path} is {show(value)}; it must be {default!r}, because codes.path={config.codes.path!r} has no '
                'images, and no decoder that makes some'
            )


def _classes_field(config, spec):
    """Returns the number of classes and where it is given, for messages."""
    return f'{"data." if build.has_stage_1(config) else "codes.path has "}num_classes={spec.num_classes}'


def _check_priors(config, spec):
    for name, (height, width) in zip(spec.levels, spec.shapes, strict=True):
        path, prior = f'prior.{name}', config.prior[name]
        if prior.label_dropout and not spec.num_classes:
            raise ConfigError(
                f'{path}.label_dropout is {prior.label_dropout}, but {_classes_field(config, spec)}; without classes '
                'it must be 0'
            )
        if height * width >= 2**24:
            raise ConfigError(
                f'{path} has a {height}x{width} map of {height * width} positions; it must have fewer than 2**24: '
                'lower data.image_size, or raise vqvae.downsample_factors'
            )


def _check_training(config):
    for section in (*(f'prior.{name}' for name in config.prior), 'classifier'):
        build.train_config(config, section)
    if not build.has_stage_1(config):
        return
    if (steps := build.train_config(config, 'vqvae').grad_accum_steps) > 1:
        raise ConfigError(
            f'vqvae.training.grad_accum_steps is {steps}; it must be 1, because the codebook learns from the sums over '
            'a whole batch'
        )


def _check_sampling(config, spec):
    sample, classes = config.sample, spec.num_classes
    if wrong := [label for label in sample.labels if _is_no_class(label, classes)]:
        there = f'has labels 0 to {classes - 1}' if classes else 'means that there are no labels'
        raise ConfigError(f'sample.labels holds {show(wrong)}, but {_classes_field(config, spec)} {there}')
    for name in spec.levels:
        guidance, prior = sample.guidance[name], f'prior.{name}'
        if guidance != 1 and not config[prior].label_dropout:
            raise ConfigError(
                f'sample.guidance.{name} is {guidance}, but {prior}.label_dropout is 0: guidance compares the prior '
                f'with itself without class. Train it with {prior}.label_dropout=0.1, for example, or set '
                'guidance to 1'
            )


def _is_no_class(label, classes):
    """Returns whether no class can have a label; names are looked up by the job, which knows the data."""
    return not classes if isinstance(label, str) else label >= classes


def _check_evaluation(config, spec):
    evaluate, label, classes = config.evaluate, config.inpaint.label, spec.num_classes
    if bool(evaluate.real) != bool(evaluate.generated):
        raise ConfigError(
            f'evaluate.real is {evaluate.real!r} and evaluate.generated {evaluate.generated!r}: give both sets, or '
            'neither to evaluate the run'
        )
    if evaluate.real and not evaluate.inception:
        raise ConfigError(
            "evaluate.inception is '', but two sets are compared by the Inception network; it must be the path of its "
            "weights, or 'fetch'"
        )
    if isinstance(label, str) and not classes:
        raise ConfigError(
            f'inpaint.label is {show(label)}, but {_classes_field(config, spec)} means that there are no labels'
        )
    if classes and _is_no_class(label, classes):
        raise ConfigError(
            f'inpaint.label is {label}; with {_classes_field(config, spec)} it must be at most {classes - 1}'
        )


def _check_networks(config, spec):
    """Traces every module with shapes alone, so that sizes that do not fit show now and not hours later."""
    for section, (model, inputs) in build.networks(config, spec=spec).items():
        try:
            jax.eval_shape(model.init, *inputs)
        except ValueError as error:  # modules raise it for relations between fields, with the field as first word
            message = ' '.join(str(error).split())
            joint = '.' if message.partition(' ')[0] in config[section] else ' cannot be built: '
            raise ConfigError(f'{section}{joint}{message}') from error
