"""Configs: every file builds and is documented, every mistake is an error that names its field."""

import inspect
import math
import pathlib
import re

import jax
import pytest

from vqvae2_jax import load_config
from vqvae2_jax.config import build as configs
from vqvae2_jax.config import validation
from vqvae2_jax.config.build import ConfigError
from vqvae2_jax.data.images import ImageSpec
from vqvae2_jax.models.resnet import ResNet
from vqvae2_jax.models.vqvae import VQVAE
from vqvae2_jax.models.wavefront import WavefrontPrior
from vqvae2_jax.training.optim import Training

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
DOCUMENT = (ROOT / 'docs' / 'configs.md').read_text()


def load(name):
    config = load_config(name)
    if config.data.name == 'folder' and not config.data.path:
        config.data.path = '/somewhere'  # which only the user knows
    return config


def parameter_counts(config):
    """Module -> number of parameters, without making any."""
    made = {name: jax.eval_shape(model.init, *inputs) for name, (model, inputs) in configs.networks(config).items()}
    return {name: sum(math.prod(x.shape) for x in jax.tree.leaves(v['params'])) for name, v in made.items()}


@pytest.mark.parametrize('name', NAMES)
def test_every_config_passes_and_has_the_documented_parameters(name):
    assert jax.device_count() == 8
    config = load(name)
    validation.check(config)
    assert config.name == name
    rows = re.findall(rf'^\| {name} \| (\S+) \| ([\d ]+) \|$', DOCUMENT, re.MULTILINE)
    documented = {module: int(count.replace(' ', '')) for module, count in rows}
    assert parameter_counts(config) == documented, 'bring the table of docs/configs.md up to date'


PRIOR_ELSEWHERE = ('shape', 'codebook_size', 'coarser_codebook_sizes', 'num_classes')


def documented_fields(section):
    """The fields in the table under a heading of docs/configs.md."""
    text = re.search(rf'^### `{re.escape(section)}`$(.*?)(?=^#|\Z)', DOCUMENT, re.MULTILINE | re.DOTALL)[1]
    return re.findall(r'^\| `(\w+)` \|', text, re.MULTILINE)


@pytest.mark.parametrize(
    'section, source, elsewhere, own',
    [
        ('data', ImageSpec, (), ()),
        ('vqvae', VQVAE, ('channels',), ('commitment_weight', 'training')),
        ('prior.<level>', WavefrontPrior, PRIOR_ELSEWHERE, ('order', 'training')),
        ('classifier', ResNet, ('num_classes',), ('flip', 'crop', 'training')),
        ('<stage>.training', Training, (), ()),
    ],
)
def test_every_field_is_documented_and_every_documented_field_exists(section, source, elsewhere, own):
    fields = set(inspect.signature(source).parameters) - {'parent', 'name' if section != 'data' else ''}
    documented = documented_fields(section)
    assert len(documented) == len(set(documented))
    assert set(documented) == fields - set(elsewhere) | set(own)


@pytest.mark.parametrize('section', ['sample', 'reject', 'codes', 'edit', 'likelihood'])
def test_the_other_sections_are_documented(config, section):
    assert set(documented_fields(section)) == set(configs.complete(config)[section])
    assert {'name', 'seed'} == set(documented_fields('config'))


# (field, value, what the error says)
MISTAKES = [
    ('seeds', 1, "config has the unknown field 'seeds'; did you mean 'seed'?"),
    ('data.chanels', 3, "data has the unknown field 'chanels'; did you mean 'channels'?"),
    ('vqvae.hiden', 3, "vqvae has the unknown field 'hiden'; did you mean 'hidden'?"),
    ('vqvae.channels', 3, "vqvae has the unknown field 'channels'"),  # it is data.channels
    ('vqvae.training.step', 3, "vqvae.training has the unknown field 'step'; did you mean 'steps'?"),
    ('codes.shards', 3, "codes has the unknown field 'shards'"),
    ('prior.top.head', 3, "prior.top has the unknown field 'head'; did you mean 'heads'?"),
    ('prior.bottom.training.warmup', 3, "prior.bottom.training has the unknown field 'warmup'"),
    ('classifier.width', (8,), "classifier has the unknown field 'width'; did you mean 'widths'?"),
    ('sample.size', 3, "sample has the unknown field 'size'"),
    ('reject.share', 3, "reject has the unknown field 'share'; its fields are classifier, keep, threshold"),
    ('prior.middle', {}, "the levels ['bottom', 'middle', 'top'], but vqvae.factors=(2, 2) makes ['bottom', 'top']"),
    ('sample.temperature.middle', 1.0, 'sample.temperature names'),
    ('sample.top_k', {'midle': 3}, 'sample.top_k names'),
    ('sample.top_k', 50, 'sample.top_k is 50; give a value for each level, as in dict(bottom=50)'),
    ('sample.temperature.top', float('nan'), 'sample.temperature.top is nan'),
    ('edit', 3, 'edit is 3; it is a section with the fields count, label, levels, mask, path'),
    ('prior.top.oder', 'wavefront', "prior.top has the unknown field 'oder'; did you mean 'order'?"),
    ('sample.top_k', {'top': -1}, 'sample.top_k.top is -1; it must be 0'),
    ('sample.top_p', {'top': 0.0}, 'sample.top_p.top is 0.0; it is a share'),
    ('sample.guidance', {'bottom': 2.0}, 'sample.guidance.bottom is 2.0, but prior.bottom.label_dropout is 0'),
    ('sample.dtype', 'float16', "sample.dtype is 'float16'; it must be"),
    ('prior.top.order', 'snake', "prior.top.order is 'snake'; it must be one of raster, wavefront"),
    ('prior.top.label_dropout', 1.0, 'prior.top.label_dropout is 1.0; it must be 0 or more and less than 1'),
    ('sample.temperature.top', -1.0, 'sample.temperature.top is -1.0; it must be 0'),
    ('sample.labels', (3, 10), 'sample.labels holds [10], but data.num_classes=10 has labels 0 to 9'),
    ('sample.count', 0, 'sample.count is 0; it must be 1 or more'),
    ('sample.batch_size', 12, 'sample.batch_size is 12, which 8 devices cannot share evenly'),
    ('sample.batch_size', 0, '--config.sample.batch_size=8'),
    ('codes.batch_size', 12, '--config.codes.batch_size=16'),
    ('codes.shard_size', 0, 'codes.shard_size is 0'),
    ('vqvae.training.batch_size', 4, 'vqvae.training.batch_size is 4, which 8 devices'),
    ('prior.bottom.training.batch_size', 4, 'prior.bottom.training.batch_size is 4'),
    ('classifier.training.batch_size', 4, 'classifier.training.batch_size is 4'),
    ('classifier.training.steps', 0, 'classifier.training.steps must be positive; it is 0'),
    ('prior.top.training.decay', 'linear', "prior.top.training.decay must be 'constant' or 'cosine'; it is 'linear'"),
    ('prior.top.heads', 3, 'prior.top.heads=3 does not divide prior.top.hidden=8'),
    ('prior.top.heads', 0, 'prior.top.heads is 0'),
    ('prior.top.kernel', 4, 'prior.top.kernel=4 must be odd'),
    ('prior.top.attention_layers', 5, 'prior.top.attention_layers=5; there are prior.top.layers=2'),
    ('prior.bottom.hidden', 0, 'prior.bottom.hidden is 0'),
    ('vqvae.codebook_size', 0, 'vqvae.codebook_size is 0'),
    ('vqvae.factors', (2, 3), 'vqvae.factors: 3 is not a power of two'),
    ('vqvae.factors', (2, 2, 2), 'data.image_size is 28x28 and must be divisible by 8'),
    ('vqvae.dtype', 'float16', "vqvae.dtype is 'float16'; it must be 'float32' or 'bfloat16'"),
    ('prior.top.dtype', 'half', "prior.top.dtype is 'half'"),
    ('classifier.dtype', 'int8', "classifier.dtype is 'int8'"),
    ('classifier.blocks', (1,), 'classifier.widths=(8, 16) and classifier.blocks=(1,) must be as many'),
    ('classifier.widths', (2, 8), 'classifier.widths=(2, 8) must be 4 or more'),
    ('data.channels', 2, 'data.channels=2: must be 1 or 3'),
    ('data.name', 'folder', "data.path='': must be the place"),
    ('evaluate.split', 'all', "evaluate.split is 'all'; there are train, validation, test"),
    ('evaluate.reference', 'all', "evaluate.reference is 'all'; there are train, validation, test"),
    ('evaluate.sweep', (0.5, 1.5), 'evaluate.sweep holds [1.5]; they are shares in (0, 1]'),
    ('evaluate.real', 'images', "evaluate.real is 'images' and evaluate.generated '': give both sets"),
    ('data.on_error', 'ignore', "data.on_error='ignore'"),
    ('vqvae.codebook_size', 1, 'vqvae.codebook_size is 1; it must be 2 or more'),
    ('vqvae.decay', 1.0, 'vqvae.decay is 1.0; it must be 0 or more and less than 1'),
    ('vqvae.reseed_threshold', -0.1, 'vqvae.reseed_threshold is -0.1; it must be 0 or more and less than 1'),
    ('vqvae.level_loss', -1.0, 'vqvae.level_loss is -1.0; it must be 0 or more'),
    ('vqvae.commitment_weight', -1.0, 'vqvae.commitment_weight is -1.0'),
    ('prior.top.dropout', 1.0, 'prior.top.dropout is 1.0; it must be 0 or more and less than 1'),
    ('prior.bottom.attention_dropout', float('nan'), 'prior.bottom.attention_dropout is nan'),
    ('prior.top.attention_layers', -1, 'prior.top.attention_layers is -1'),
    ('prior.bottom.output_layers', -1, 'prior.bottom.output_layers is -1'),
    ('prior.bottom.condition_layers', -1, 'prior.bottom.condition_layers is -1'),
    ('classifier.dropout', -0.5, 'classifier.dropout is -0.5'),
    ('classifier.stem_stride', 0, 'classifier.stem_stride is 0'),
    ('prior.top.training.b2', 1.0, 'prior.top.training.b2 is 1.0; it must be 0 or more and less than 1'),
    ('classifier.training.warmup_steps', 9, 'training.warmup_steps=9 exceeds classifier.training.steps=8'),
    ('classifier.blocks', (1, 1.5), "classifier cannot be built as configured: 'float' object"),
    ('vqvae.factors', (), 'vqvae.factors is empty'),
    ('edit.count', 0, 'edit.count is 0'),
    ('edit.masks', '', "edit has the unknown field 'masks'; did you mean 'mask'?"),
    ('likelihood.split', 'tests', "likelihood.split is 'tests'; there are train, validation, test"),
    ('reject.keep', 0.0, 'reject.keep is 0.0; it is a share in (0, 1]'),
    ('reject.threshold', 1.5, 'reject.threshold is 1.5; it is a probability'),
]


@pytest.mark.parametrize('field, value, message', MISTAKES)
def test_mistakes_are_errors_that_name_the_field(config, field, value, message):
    section, _, name = field.rpartition('.')
    if section in configs.OPTIONAL_SECTIONS:
        config = configs.complete(config)
    with (config[section] if section else config).unlocked() as fields:
        fields[name] = value
    with pytest.raises(ConfigError, match=re.escape(message)):
        validation.check(config)


@pytest.mark.parametrize('field', ['seed', 'sample.seed', 'data.split_seed'])
@pytest.mark.parametrize('value', [-1, 2**32, 2**63, True, 1.5, '3'])
def test_seeds_outside_32_bits_are_refused(config, field, value):
    section, _, name = field.rpartition('.')
    with config.ignore_type(), (config[section] if section else config).unlocked() as fields:
        fields[name] = value
    with pytest.raises(
        ConfigError, match=re.escape(f'{field} is {value!r}; a seed must be an integer from 0 to 4294967295')
    ):
        validation.check(config)


@pytest.mark.parametrize('value', [0, 2**32 - 1])
def test_seeds_of_32_bits_are_taken(config, value):
    config = configs.complete(config)
    config.seed = config.sample.seed = value
    config.data.split_seed = value
    validation.check(config)


@pytest.mark.parametrize(
    'field, message',
    [
        ('reject', "config lacks the field 'reject'"),
        ('data.name', "data lacks the field 'name'"),
        ('vqvae.factors', "vqvae lacks the field 'factors'"),
        ('vqvae.commitment_weight', "vqvae lacks the field 'commitment_weight'"),
        ('prior.top.training.steps', "prior.top.training lacks the field 'steps'"),
        ('classifier.flip', "classifier lacks the field 'flip'"),
        ('codes.shard_size', "codes lacks the field 'shard_size'"),
        ('sample.seed', "sample lacks the field 'seed'"),
        ('sample.temperature.bottom', r"sample.temperature names \['top'\]; the levels are"),
    ],
)
def test_missing_fields_are_errors_that_name_them(config, field, message):
    section, _, name = field.rpartition('.')
    with (config[section] if section else config).unlocked() as fields:
        del fields[name]
    with pytest.raises(ConfigError, match=message):
        validation.check(config)


def test_labels_of_unlabelled_data_are_refused(config):
    config.data.num_classes = 0
    validation.check(config)
    config.sample.labels = (0,)
    with pytest.raises(ConfigError, match='data.num_classes=0 means that there are no labels'):
        validation.check(config)


def test_levels_have_the_names_of_the_paper():
    names = [configs.level_names((2,) * levels) for levels in (1, 2, 3, 4)]
    assert names == [('top',), ('bottom', 'top'), ('bottom', 'middle', 'top'), ('bottom', 'level1', 'level2', 'top')]


def test_settings_hold_what_decides_the_outcome_and_nothing_else(config):
    before = configs.settings(config, 'prior.top')
    config.prior.top.training.update(log_every=7, eval_every=7, save_every=7, show_every=7)
    config.data.workers = 2
    config.sample.count = 10**6
    config.prior.bottom.layers = 7
    assert configs.settings(config, 'prior.top') == before
    config.prior.top.training.learning_rate = 0.5
    config.data.split_seed = 1
    changed = {k: v for k, v in configs.settings(config, 'prior.top').items() if before.get(k) != v}
    assert changed == {'prior.top.training.learning_rate': 0.5, 'data.split_seed': 1}


@pytest.mark.parametrize(
    'section, field, default',
    [
        ('data', 'split_seed', 0),
        ('vqvae', 'reseed_threshold', 0.03),
        ('vqvae', 'dtype', 'float32'),
        ('vqvae.training', 'b2', 0.999),
    ],
)
def test_settings_hold_the_value_of_a_field_left_out(config, section, field, default):
    """So that a record notices when the package's default changes, and does not mind when somebody spells it out."""
    with config[section].unlocked():
        config[section][field] = default
        spelled = configs.settings(config, 'vqvae')
        del config[section][field]
    assert configs.settings(config, 'vqvae') == spelled
    assert spelled[f'{section}.{field}'] == default


def test_settings_follow_a_changed_default(config, monkeypatch):
    signature = inspect.signature(ResNet)
    changed = [p.replace(default=3) if p.name == 'stem_stride' else p for p in signature.parameters.values()]
    with config.classifier.unlocked():
        del config.classifier['stem_stride']
    monkeypatch.setattr(ResNet, '__signature__', signature.replace(parameters=changed), raising=False)
    assert configs.settings(config, 'classifier')['classifier.stem_stride'] == 3


@pytest.mark.parametrize('slope', [0, 8])
def test_slopes_that_the_map_has_no_room_for_are_refused(config, slope):
    config = configs.complete(config)
    config.prior.top.update(order='wavefront', slope=slope)
    with pytest.raises(ConfigError, match=rf'prior.top.slope is {slope}; .*between 1 and the width, 7'):
        validation.check(config)
    config.prior.top.slope = 7
    validation.check(config)


def test_label_dropout_needs_classes(config):
    config = configs.complete(config)
    config.prior.top.label_dropout = 0.1
    validation.check(config)
    config.sample.guidance.top = 2.0
    validation.check(config)
    config.data.num_classes = 0
    with pytest.raises(ConfigError, match='label_dropout=0.1, but data.num_classes=0'):
        validation.check(config)


@pytest.mark.parametrize('name', NAMES)
def test_a_completed_config_says_the_same_and_has_every_field(name):
    config, complete = load(name), configs.complete(load(name))
    for section in ['vqvae', *(f'prior.{level}' for level in config.prior)]:
        assert configs.settings(complete, section) == configs.settings(config, section)
        assert complete[section].training.b2 == 0.999
    assert complete.prior.top.slope == 2 and complete.data.split_seed == 0
    assert all(set(complete.sample[field]) == set(config.prior) for field in configs.SAMPLING_DEFAULTS)
    assert configs.complete(complete).to_dict() == complete.to_dict()
