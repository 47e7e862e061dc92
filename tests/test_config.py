"""Configs: every file builds and is documented, every mistake is an error that names its field."""

import inspect
import json
import math
import pathlib
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from tests import config_tables
from vqvae2_jax import load_config
from vqvae2_jax.config import base, build
from vqvae2_jax.config.fields import ConfigError, Field, Label
from vqvae2_jax.config.validation import check_batch_sizes, validate_config
from vqvae2_jax.data.images import ImageSpec
from vqvae2_jax.io import record
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import cas
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run, training_directory
from vqvae2_jax.models import (
    attention,
    causal,
    gated_resnet,
    quantizer,
    raster,
    residual,
    resnet,
    upsample,
    vqvae,
    wavefront,
)
from vqvae2_jax.training.optim import TrainConfig

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
DOCUMENT = (ROOT / 'docs' / 'configs.md').read_text()
MESH = (8, 1)


def load(name):
    config = load_config(name)
    if config.data.name == 'folder' and not config.data.path:
        config.data.path = '/somewhere'  # which only the user knows
    return config


def check(config, mesh_shape=MESH):
    validate_config(config)
    check_batch_sizes(config, mesh_shape, build.networks(config))


def set_field(config, field, value):
    """Sets a field as a config file may that replaces sections: of any type, known or not."""
    section, _, name = field.rpartition('.')
    with config.ignore_type(), (config[section] if section else config).unlocked() as fields:
        fields[name] = value


def parameter_counts(config):
    """Returns the number of parameters of every module, without creating any."""
    made = {name: jax.eval_shape(model.init, *inputs) for name, (model, inputs) in build.networks(config).items()}
    return {name: sum(math.prod(x.shape) for x in jax.tree.leaves(v['params'])) for name, v in made.items()}


@pytest.mark.parametrize('name', NAMES)
def test_every_config_passes_and_has_the_documented_parameters(name):
    config = load(name)
    check(config, (1, 8) if config.parallel.fsdp > 1 else MESH)
    assert config.name == name
    rows = re.findall(rf'^\| {name} \| (\S+) \| ([\d ]+) \|$', DOCUMENT, re.MULTILINE)
    documented = {module: int(count.replace(' ', '')) for module, count in rows}
    assert parameter_counts(config) == documented, 'bring the table of docs/configs.md up to date'


@pytest.mark.parametrize('name', NAMES)
def test_every_config_is_complete_and_locked(name):
    config = load(name)
    start = base.get_config(base.level_names(config.vqvae.downsample_factors))
    assert list(leaves(config.to_dict())) == list(leaves(start.to_dict()))
    assert config.is_locked and config.is_type_safe
    with pytest.raises(AttributeError, match='Did you mean "steps"'):
        config.vqvae.training.step = 3
    with pytest.raises(TypeError):
        config.vqvae.training.steps = 'many'


def test_the_tables_of_the_document_are_those_of_the_base_config():
    assert config_tables.updated(DOCUMENT) == DOCUMENT, 'run python -m tests.config_tables'


def leaves(fields, path=''):
    """Returns {dotted path: value} of a nested dict."""
    found = {}
    for name, value in fields.items():
        found |= leaves(value, f'{path}{name}.') if isinstance(value, dict) else {f'{path}{name}': value}
    return found


@pytest.mark.parametrize('count', [1, 2, 3, 5])
def test_every_field_has_a_meaning_and_an_allowed_default(count):
    levels = base.level_names((2,) * count)
    for path, field in leaves(base.schema(levels)).items():
        assert isinstance(field, Field) and field.doc, path
        checked = field.check(path, field.default)
        assert checked == field.default and type(checked) is type(field.default), path
    config = base.get_config(levels)
    config.data.image_size = (32, 32)
    check(config)


def test_fields_have_one_default():
    """Modules, specs and train configs have none of their own, so that a field cannot be left out by mistake."""
    networks = attention, causal, gated_resnet, quantizer, raster, residual, resnet, upsample, vqvae, wavefront
    modules = [c for file in networks for c in vars(file).values() if isinstance(c, type) and issubclass(c, nn.Module)]
    for module in (ImageSpec, TrainConfig, *modules):
        fields = inspect.signature(module).parameters.items()
        given = {name for name, parameter in fields if parameter.default is not inspect.Parameter.empty}
        of_flax = {'parent', 'name'} if issubclass(module, nn.Module) else set()
        assert given - of_flax <= {'kernel_init', 'strict', 'attend', 'nearest'}, module


# (field, value, the message)
MISTAKES = [
    ('seeds', 1, "config has the unknown field 'seeds'; did you mean 'seed'?"),
    ('data.chanels', 3, "data has the unknown field 'chanels'; did you mean 'channels'?"),
    ('vqvae.hiden', 3, "vqvae has the unknown field 'hiden'; did you mean 'hidden_channels'?"),
    ('vqvae.factors', (2, 2), "vqvae has the unknown field 'factors'; did you mean 'downsample_factors'?"),
    ('vqvae.channels', 3, "vqvae has the unknown field 'channels'"),  # it is data.channels
    ('vqvae.training.step', 3, "vqvae.training has the unknown field 'step'; did you mean 'steps'?"),
    ('codes.shards', 3, "codes has the unknown field 'shards'"),
    ('prior.top.head', 3, "prior.top has the unknown field 'head'; did you mean 'num_heads'?"),
    ('prior.bottom.training.warmup', 3, "prior.bottom.training has the unknown field 'warmup'"),
    ('classifier.width', (8,), "classifier has the unknown field 'width'; did you mean 'widths'?"),
    ('sample.size', 3, "sample has the unknown field 'size'"),
    ('reject.share', 3, "reject has the unknown field 'share'; its fields are classifier, keep_fraction, threshold"),
    (
        'prior.middle',
        {},
        "levels ['bottom', 'middle', 'top'], but vqvae.downsample_factors=(2, 2) makes ['bottom', 'top']",
    ),
    ('sample.temperature.middle', 1.0, "sample.temperature has the unknown field 'middle'"),
    ('sample.top_k', {'midle': 3}, "sample.top_k has the unknown field 'midle'"),
    ('sample.top_k', 50, 'sample.top_k is 50; it must be a section with the fields bottom, top: set one'),
    ('sample.temperature.top', float('nan'), 'sample.temperature.top is nan; it must be a number in [0, 1000]'),
    ('inpaint', 3, 'inpaint is 3; it must be a section with the fields count, label, levels, mask, path'),
    ('prior.top.oder', 'wavefront', "prior.top has the unknown field 'oder'; did you mean 'order'?"),
    ('sample.top_k.top', -1, 'sample.top_k.top is -1; it must be an integer from 0 to'),
    ('sample.top_p.top', 0.0, 'sample.top_p.top is 0.0; it must be a number in (0, 1]'),
    ('sample.guidance.bottom', 2.0, 'sample.guidance.bottom is 2.0, but prior.bottom.label_dropout is 0'),
    ('sample.dtype', 'float16', "sample.dtype is 'float16'; it must be '', 'float32' or 'bfloat16'"),
    ('prior.top.order', 'snake', "prior.top.order is 'snake'; it must be 'raster' or 'wavefront'"),
    ('prior.top.label_dropout', 1.0, 'prior.top.label_dropout is 1.0; it must be a number in [0, 1)'),
    ('sample.temperature.top', -1.0, 'sample.temperature.top is -1.0; it must be a number in [0, 1000]'),
    ('sample.labels', (3, 10), 'sample.labels holds [10], but data.num_classes=10 has labels 0 to 9'),
    ('sample.count', 0, 'sample.count is 0; it must be an integer from 1 to'),
    ('sample.batch_size', 0, 'sample.batch_size is 0; it must be an integer from 1 to'),
    ('codes.batch_size', 0, 'codes.batch_size is 0; it must be an integer from 1 to'),
    ('evaluate.batch_size', float('nan'), 'evaluate.batch_size is nan; it must be an integer from 1 to'),
    ('codes.shard_size', 0, 'codes.shard_size is 0'),
    ('sample.shard_size', 0, 'sample.shard_size is 0'),
    ('sample.name', '../x', "sample.name is '../x'; it must be 1 to 100 letters, digits, '-', '_' and '.'"),
    ('name', '.hidden', "name is '.hidden'; it must be 1 to 100 letters"),
    ('vqvae.training.batch_size', 4, 'vqvae.training.batch_size is 4, which 8 devices cannot share evenly'),
    ('vqvae.training.batch_size', 12, '--config.vqvae.training.batch_size=16'),
    ('prior.bottom.training.batch_size', 4, 'prior.bottom.training.batch_size is 4, which 8 devices'),
    ('classifier.training.batch_size', 4, 'classifier.training.batch_size is 4, which 8 devices'),
    ('classifier.training.steps', 0, 'classifier.training.steps is 0; it must be an integer from 1 to'),
    ('prior.top.training.steps', 3.7, 'prior.top.training.steps is 3.7; it must be an integer'),
    ('prior.top.training.learning_rate', float('inf'), 'learning_rate is inf; it must be a number in (0, 10]'),
    ('prior.top.training.lr_schedule', 'linear', "lr_schedule is 'linear'; it must be 'constant' or 'cosine'"),
    ('prior.top.training.profile_steps', (3, 2), 'prior.top.training.profile_steps is (3, 2); the first step must'),
    (
        'prior.top.training.profile_steps',
        (3,),
        'prior.top.training.profile_steps is (3,); it must be a tuple of 0 or 2',
    ),
    ('vqvae.training.grad_accum_steps', 2, 'vqvae.training.grad_accum_steps is 2; it must be 1, because the codebook'),
    ('prior.top.num_heads', 3, 'prior.top.num_heads is 3; it must divide hidden_channels=8'),
    ('prior.top.num_heads', 0, 'prior.top.num_heads is 0'),
    ('prior.top.num_heads', True, 'prior.top.num_heads is True; it must be an integer'),
    ('prior.top.kernel_size', 4, 'prior.top.kernel_size is 4; it must be odd'),
    ('prior.top.num_attention_layers', 5, 'num_attention_layers is 5; it must be at most num_residual_blocks=2'),
    ('prior.top.num_residual_blocks', 2**31, 'num_residual_blocks is 2147483648; it must be an integer from 1 to 256'),
    ('prior.top.remat', 'x', "prior.top.remat is 'x'; it must be 'none', 'blocks' or 'blocks_but_convs'"),
    ('prior.bottom.hidden_channels', 0, 'prior.bottom.hidden_channels is 0'),
    ('vqvae.codebook_size', 0, 'vqvae.codebook_size is 0'),
    ('vqvae.downsample_factors', (2, 3), 'vqvae.downsample_factors is (2, 3), but 3 is not a power of two'),
    ('vqvae.downsample_factors', (2, 2, 2), 'data.image_size is 28x28 and must be divisible by 8'),
    ('vqvae.dtype', 'float16', "vqvae.dtype is 'float16'; it must be 'float32' or 'bfloat16'"),
    ('prior.top.dtype', 'half', "prior.top.dtype is 'half'; it must be 'float32' or 'bfloat16'"),
    ('classifier.dtype', 'int8', "classifier.dtype is 'int8'; it must be 'float32' or 'bfloat16'"),
    ('classifier.blocks', (1,), 'classifier.widths is (8, 16); it must have as many items as blocks=(1,)'),
    ('classifier.widths', (2, 8), 'classifier.widths[0] is 2; it must be an integer from 4 to'),
    ('classifier.crop', 'abc', "classifier.crop is 'abc'; it must be True or False"),
    ('data.channels', 2, 'data.channels is 2; it must be 1 or 3'),
    ('evaluate.split', 'all', "evaluate.split is 'all'; it must be 'train', 'validation' or 'test'"),
    ('evaluate.references', (1,), 'evaluate.references[0] is 1'),
    ('evaluate.sweep', (0.5, 1.5), 'evaluate.sweep[1] is 1.5; it must be a number in (0, 1]'),
    ('evaluate.real', 'images', "evaluate.real is 'images' and evaluate.generated '': give both sets"),
    ('data.on_error', 'ignore', "data.on_error is 'ignore'; it must be 'raise' or 'skip'"),
    ('vqvae.codebook_size', 1, 'vqvae.codebook_size is 1; it must be an integer from 2 to'),
    ('vqvae.codebook_ema_decay', 1.0, 'vqvae.codebook_ema_decay is 1.0; it must be a number in [0, 1)'),
    ('vqvae.dead_code_threshold', -0.1, 'vqvae.dead_code_threshold is -0.1; it must be a number in [0, 1)'),
    ('vqvae.preview_grad_scale', -1.0, 'vqvae.preview_grad_scale is -1.0; it must be a number in [0, 1000]'),
    ('vqvae.commitment_weight', -1.0, 'vqvae.commitment_weight is -1.0'),
    ('prior.top.dropout', 1.0, 'prior.top.dropout is 1.0; it must be a number in [0, 1)'),
    ('prior.bottom.attention_dropout', float('nan'), 'prior.bottom.attention_dropout is nan'),
    ('prior.top.num_attention_layers', -1, 'prior.top.num_attention_layers is -1'),
    ('prior.bottom.num_output_blocks', -1, 'prior.bottom.num_output_blocks is -1'),
    ('prior.bottom.num_cond_blocks', -1, 'prior.bottom.num_cond_blocks is -1'),
    ('classifier.dropout', -0.5, 'classifier.dropout is -0.5'),
    ('classifier.stem_stride', 0, 'classifier.stem_stride is 0'),
    ('prior.top.training.adam_b2', 1.0, 'prior.top.training.adam_b2 is 1.0; it must be a number in [0, 1)'),
    ('classifier.training.warmup_steps', 9, 'classifier.training.warmup_steps is 9; it must be at most steps=8'),
    ('classifier.blocks', (1, 1.5), 'classifier.blocks[1] is 1.5; it must be an integer from 1 to'),
    ('vqvae.downsample_factors', (), 'vqvae.downsample_factors is (); it must be a tuple of 1 to 8 items'),
    ('inpaint.count', 0, 'inpaint.count is 0'),
    ('inpaint.label', (), 'inpaint.label is (); it must be an integer from -1 to'),
    ('inpaint.label', 10, 'inpaint.label is 10; with data.num_classes=10 it must be at most 9'),
    ('inpaint.levels', ('middle',), "inpaint.levels[0] is 'middle'; it must be 'bottom' or 'top'"),
    ('inpaint.masks', '', "inpaint has the unknown field 'masks'; did you mean 'mask'?"),
    ('likelihood.split', 'tests', "likelihood.split is 'tests'; it must be 'train', 'validation' or 'test'"),
    ('reject.keep_fraction', 0.0, 'reject.keep_fraction is 0.0; it must be a number in (0, 1]'),
    ('reject.threshold', 1.5, 'reject.threshold is 1.5; it must be a number in [0, 1]'),
    ('data.image_size', (2**14, 2**14), 'prior.bottom has a 8192x8192 map of 67108864 positions'),
    ('data.image_size', (1024, 1024), 'prior.top.num_attention_layers is 1; on a 256x256 map it must be 0'),
]


@pytest.mark.parametrize('field, value, message', MISTAKES)
def test_mistakes_are_errors_that_name_the_field(config, field, value, message):
    set_field(config, field, value)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        check(config)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('field', ['seed', 'sample.seed', 'data.split_seed'])
@pytest.mark.parametrize('value', [-1, 2**32, 2**63, True, 1.5, '3'])
def test_seeds_outside_32_bits_are_refused(config, field, value):
    set_field(config, field, value)
    message = f'{field} is {value!r}; it must be an integer from 0 to 4294967295'
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate_config(config)


@pytest.mark.parametrize('value', [0, 2**32 - 1])
def test_seeds_of_32_bits_are_accepted(config, value):
    config.seed = config.sample.seed = config.data.split_seed = value
    validate_config(config)
    assert config.seed == config.sample.seed == config.data.split_seed == value


@pytest.mark.parametrize(
    'field, message',
    [
        ('reject', "config lacks the field 'reject'"),
        ('inpaint', "config lacks the field 'inpaint'"),
        ('data.name', "data lacks the field 'name'"),
        ('vqvae.downsample_factors', "vqvae lacks the field 'downsample_factors'"),
        ('vqvae.commitment_weight', "vqvae lacks the field 'commitment_weight'"),
        ('prior.top.training.steps', "prior.top.training lacks the field 'steps'"),
        ('classifier.flip', "classifier lacks the field 'flip'"),
        ('codes.shard_size', "codes lacks the field 'shard_size'"),
        ('sample.seed', "sample lacks the field 'seed'"),
        ('sample.temperature.bottom', "sample.temperature lacks the field 'bottom'"),
    ],
)
def test_missing_fields_are_errors_that_name_them(config, field, message):
    section, _, name = field.rpartition('.')
    with (config[section] if section else config).unlocked() as fields:
        del fields[name]
    with pytest.raises(ConfigError, match=message):
        validate_config(config)


ODD = [None, '', 'abc', '../x', 'a\nb', b'abc', True, -1, 0, 3, 2**31, 2**63, 10**5000, 0.5, 1e300, math.nan, math.inf]
ODD += [
    -math.inf,
    np.float32(np.nan),
    (),
    (1,),
    (0.5, 'a'),
    [[1], [2]],
    [2, 2],
    (None,) * 3,
    {},
    {'a': 1},
    1j,
    object(),
]
FIELDS = leaves(base.schema())


def types_of(field):
    """The types of checked values; a class has a number or a name."""
    return (int, str) if isinstance(field, Label) else (type(field.default),)


def test_every_odd_value_of_every_field_is_accepted_as_that_type_or_refused_in_one_line():
    """The types alone; the modules are built in the next test."""
    for path, field in FIELDS.items():
        for value in ODD:
            try:
                checked = field.check(path, value)
            except ConfigError as error:
                assert str(error).startswith(path) and '; it must be ' in str(error) and '\n' not in str(error)
                assert len(str(error)) < 500
            else:
                assert type(checked) in types_of(field) and field.check(path, checked) == checked
                assert json.loads(json.dumps(checked, allow_nan=False)) is not None


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(list(FIELDS)),
    st.one_of(
        st.sampled_from(ODD),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.tuples(st.integers(-2, 9), st.floats()),
    ),
)
def test_any_value_of_any_field_passes_or_is_refused_in_one_line(field, value):
    config = load_config('tiny')
    try:
        set_field(config, field, value)
    except OverflowError:  # of ml_collections, for a float; load_config names the line
        return
    try:
        check(config)
    except ConfigError as error:
        message = str(error)
        name = field.rpartition('.')[2]
        assert name in message and '\n' not in message and len(message) < 900
    else:
        json.dumps(config.to_dict(), allow_nan=False)
        assert type(config[field]) in types_of(FIELDS[field])


@pytest.mark.parametrize('path', ['data', 'vqvae', 'vqvae.training', 'prior', 'prior.top', 'sample', 'sample.top_k'])
@pytest.mark.parametrize('value', [None, 3, 'abc', (), {}, {'a': 1}])
def test_odd_values_of_sections_are_refused_in_one_line(config, path, value):
    set_field(config, path, value)
    with pytest.raises(ConfigError, match=rf'^{re.escape(path)} (is|has|lacks) ') as error:
        validate_config(config)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('value', [None, 3, {'seed': 0}])
def test_what_is_no_config_is_refused(value):
    with pytest.raises(ConfigError, match='it must be an ml_collections.ConfigDict'):
        validate_config(value)


def test_lists_and_integers_are_converted(config):
    for field, value in (('data.image_size', [28, 28]), ('vqvae.training.learning_rate', 1), ('seed', np.int64(3))):
        set_field(config, field, value)
    validate_config(config)
    assert config.data.image_size == (28, 28) and type(config.vqvae.training.learning_rate) is float
    assert type(config.seed) is int
    json.dumps(config.to_dict())


@pytest.mark.parametrize('mesh, steps, batch', [((8, 1), 1, 16), ((2, 4), 1, 6), ((1, 8), 3, 9), ((4, 2), 2, 8)])
def test_training_batches_are_sharded_over_the_data_axis_at_least(config, mesh, steps, batch):
    for section in ('vqvae', 'prior.top', 'prior.bottom', 'classifier'):
        config[section].training.batch_size = 2 * 3 * 8 * steps
    config.prior.top.training.update(grad_accum_steps=steps, batch_size=batch)
    config.sample.batch_size = config.codes.batch_size = config.evaluate.batch_size = 13  # padded
    sections = list(build.networks(config))
    check_batch_sizes(config, mesh, sections)
    config.prior.top.training.batch_size = batch + 1
    if mesh[0] * steps > 1:
        unit = mesh[0] * steps
        with pytest.raises(
            ConfigError, match=rf'prior.top.training.batch_size is {batch + 1}, .* multiple of {unit} '
        ) as error:
            check_batch_sizes(config, mesh, sections)
        if advised := re.search(r'--config.parallel.fsdp=(\d+)', str(error.value)):
            check_batch_sizes(config, (8 // int(advised[1]), int(advised[1])), ['prior.top'])
        advised = re.search(r'--config.prior.top.training.batch_size=(\d+)', str(error.value))
        config.prior.top.training.batch_size = int(advised[1])
        check_batch_sizes(config, mesh, sections)


@pytest.mark.parametrize(
    'job, trained',
    [
        ('pipeline', 'vqvae'),
        ('pipeline', 'classifier'),
        ('prior', 'prior.bottom'),
        ('cas', 'classifier'),
        ('plan', 'prior.bottom'),
        ('prior --level=top', ''),
        ('sample', ''),
        ('extract_codes', ''),
        ('evaluate', ''),
        ('likelihood', ''),
    ],
)
def test_jobs_check_the_batch_sizes_of_the_networks_that_they_train(config, tmp_path, job, trained):
    for section in [trained] if trained else build.networks(config):
        if section != 'prior.top':
            config[section].training.batch_size = 12
    job, _, level = job.partition(' --level=')
    # A job that trains nothing starts, and then misses its inputs.
    message = f'{trained}.training.batch_size is 12, which 8 devices' if trained else r' has nothing: '
    with pytest.raises(ConfigError if trained else JobError, match=message):
        run_job(Run(config, tmp_path), job, level or None)


def test_batch_sizes_of_finished_networks_are_not_checked(config, tmp_path):
    outputs = {training_directory(section): section for section in build.networks(config)}
    outputs |= dict.fromkeys(cas.directories(Run(config, tmp_path)).values(), 'classifier')
    for directory, section in outputs.items():
        config[section].training.batch_size = 12
        output = record.open_output(tmp_path / directory, section, {}, {})
        output.finish({'steps': config[section].training.steps})
    with pytest.raises(JobError, match='was made from another input'):  # the records are made up
        run_job(Run(config, tmp_path), 'pipeline')
    config.prior.top.training.steps += 1
    with pytest.raises(ConfigError, match='prior.top.training.batch_size is 12, which 8 devices'):
        run_job(Run(config, tmp_path), 'pipeline')


def test_labels_of_unlabeled_data_are_refused(config):
    config.data.num_classes = 0
    validate_config(config)
    config.sample.labels = (0,)
    with pytest.raises(ConfigError, match='data.num_classes=0 means that there are no labels'):
        validate_config(config)


def test_levels_have_the_names_of_the_paper():
    names = [base.level_names((2,) * levels) for levels in (1, 2, 3, 4)]
    assert names == [('top',), ('bottom', 'top'), ('bottom', 'middle', 'top'), ('bottom', 'level1', 'level2', 'top')]


def test_settings_hold_the_fields_that_decide_the_outcome_and_no_others(config):
    before = build.settings(config, 'prior.top')
    config.prior.top.training.update(log_every=7, eval_every=7, save_every=7, image_every=7, profile_steps=(1, 2))
    config.prior.top.update(remat='blocks_but_convs', scan_layers=True, skew=3)
    config.data.workers = 2
    config.sample.count = 10**6
    config.prior.bottom.num_residual_blocks = 7
    assert build.settings(config, 'prior.top') == before
    config.prior.top.training.learning_rate = 0.5
    config.data.split_seed = 1
    changed = {k: v for k, v in build.settings(config, 'prior.top').items() if before.get(k) != v}
    assert changed == {'prior.top.training.learning_rate': 0.5, 'data.split_seed': 1}
    json.dumps(before)


@pytest.mark.parametrize(
    'section, field, default',
    [
        ('data', 'split_seed', 0),
        ('vqvae', 'dead_code_threshold', 0.03),
        ('vqvae', 'dtype', 'float32'),
        ('vqvae.training', 'adam_b2', 0.999),
    ],
)
def test_settings_hold_fields_that_a_config_leaves_at_their_default(config, section, field, default):
    """So that a record shows when a default of the package changes."""
    assert build.settings(config, 'vqvae')[f'{section}.{field}'] == default


def test_settings_hold_the_skew_of_a_wavefront_prior(config):
    assert 'prior.top.skew' not in build.settings(config, 'prior.top')
    config.prior.top.order = 'wavefront'
    assert build.settings(config, 'prior.top')['prior.top.skew'] == 2


@pytest.mark.parametrize('skew', [0, 8])
def test_skews_outside_the_map_are_refused(config, skew):
    config.prior.top.update(order='wavefront', skew=skew)
    with pytest.raises(ConfigError, match=rf'prior.top.skew is {skew}; .*it must be an integer from 1 to '):
        validate_config(config)
    config.prior.top.skew = 7
    validate_config(config)


def test_label_dropout_needs_classes(config):
    config.prior.top.label_dropout = 0.1
    validate_config(config)
    config.sample.guidance.top = 2.0
    validate_config(config)
    config.data.num_classes = 0
    with pytest.raises(ConfigError, match='label_dropout is 0.1, but data.num_classes=0'):
        validate_config(config)


def test_sampling_parameters_that_change_nothing_are_off(config):
    nothing = {'bottom': None, 'top': None}
    found = build.sampling_arguments(config)
    assert found.pop('temperature')['top'] == 0.9 and found == {'top_k': nothing, 'top_p': nothing, 'guidance': nothing}
    config.sample.guidance.top = 2.0
    assert build.sampling_arguments(config)['guidance'] == {'bottom': None, 'top': 2.0}
    assert build.sampling_settings(config)['guidance'] == {'bottom': 1.0, 'top': 2.0}


def test_a_mistake_in_a_config_file_is_one_line_and_another_error_is_not_hidden(tmp_path):
    def write(line):
        path = tmp_path / 'mine.py'
        lines = ['from vqvae2_jax import load_config', '', 'def get_config():', "    c = load_config('tiny')", '']
        path.write_text('\n'.join([*lines, f'    {line}', '    return c']))
        return path

    for line, message in (
        ('c.vqvae.training.stepps = 3', 'line 6: Key "stepps" does not exist .* Did you mean "steps"'),
        ("c.vqvae.training.steps = 'x'", "line 6: Could not override field 'steps'"),
        ('c.vqvae.training.learning_rate = 10**400', 'line 6: int too large to convert to float'),
        ('c.nothing.at_all = 3', "line 6: there is no field 'nothing'"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            load_config(write(line))
        assert '\n' not in str(error.value) and len(str(error.value)) < 300
    with pytest.raises(AttributeError, match='int'):
        load_config(write('(3).nothing'))
    config = load_config(write('c.reject = dict(keep=0.5)'))  # a new section is neither locked nor complete
    with pytest.raises(ConfigError, match="reject has the unknown field 'keep'; did you mean 'keep_fraction'"):
        validate_config(config)


def test_an_unexpected_exception_is_not_hidden(config, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError('unexpected')

    monkeypatch.setattr(jax, 'eval_shape', fail)
    with pytest.raises(RuntimeError, match='unexpected'):
        validate_config(config)


def test_the_base_config_is_new_each_time():
    changed = base.get_config()
    changed.vqvae.training.steps = 7
    changed.prior.top.training.steps = 8
    assert isinstance(changed, ConfigDict)
    assert base.get_config().vqvae.training.steps != 7 and changed.prior.bottom.training.steps != 8
