"""Codes of another tokenizer: written and read without loss, and every mistake names its file and both sides."""

import json
import pathlib
import re
import tracemalloc

import numpy as np
import pytest

import vqvae2_jax
from vqvae2_jax import load_config
from vqvae2_jax.config import base, build, portable
from vqvae2_jax.config.fields import ConfigError
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.data import codes, codes_writer, own_codes
from vqvae2_jax.data.codes import CodeSource, CodeSpec, write_shard
from vqvae2_jax.data.images import SPLITS, random_split
from vqvae2_jax.data.loader import eval_batches, train_batches
from vqvae2_jax.data.own_codes import ArrayCodes
from vqvae2_jax.io import record

SIZES = (7, 300)
SHAPES = ((5, 6), (3, 4))
NAMES = ('cat', 'dog', 'cow')
SPEC = CodeSpec(('fine', 'coarse'), SHAPES, SIZES, 3, NAMES)


def make_maps(count=40, seed=0):
    """Two levels of maps whose extreme codes occur, and labels of three classes."""
    rng = np.random.default_rng(seed)
    maps = [rng.integers(0, size, (count, *shape)) for shape, size in zip(SHAPES, SIZES, strict=True)]
    for level, size in zip(maps, SIZES, strict=True):
        level[0, 0, 0], level[-1, -1, -1] = 0, size - 1
    return maps, np.arange(count) % 3


def write(directory, maps=None, labels=None, **changes):
    if maps is None:
        maps, labels = make_maps()
    fields = {'codebook_sizes': SIZES, 'class_names': NAMES, 'levels': ('fine', 'coarse')}
    vqvae2_jax.write_codes(directory, maps, labels, **fields | changes)


def write_json(directory, **changes):
    fields = {'levels': ['fine', 'coarse'], 'shapes': SHAPES, 'codebook_sizes': SIZES, 'class_names': NAMES} | changes
    directory.mkdir(parents=True, exist_ok=True)
    (directory / 'codes.json').write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def write_arrays(directory, form='npz', split='train', **changes):
    """Writes a split as another program would; returns its arrays."""
    maps, labels = make_maps()
    arrays = {'codes_0': maps[0], 'codes_1': maps[1], 'label': labels} | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    if form == 'npy':
        (directory / split).mkdir(parents=True)
        for name, array in arrays.items():
            np.save(directory / split / f'{name}.npy', array)
    else:
        (np.savez if form == 'npz' else np.savez_compressed)(directory / f'{split}.npz', **arrays)
    return arrays


def check_examples(source, maps, labels):
    """Checks that every example is the one at its 'index'; returns the indices."""
    found = [source[i] for i in range(len(source))]
    for example in found:
        for level, expected in enumerate(maps):
            np.testing.assert_array_equal(example[f'codes_{level}'], expected[example['index']])
            assert example[f'codes_{level}'].dtype == np.int32
        assert example['label'] == labels[example['index']] and example['label'].dtype == np.int32
    return [int(example['index']) for example in found]


def test_written_codes_are_split_as_images_are(tmp_path):
    maps, labels = make_maps()
    write(tmp_path / 'codes', maps, labels, held_out=(0.2, 0.1), split_seed=5, shard_size=7)
    assert own_codes.read_spec(tmp_path / 'codes') == SPEC
    expected = random_split(40, (0.2, 0.1), 5, labels, labels)
    for split in SPLITS:
        source = own_codes.open_split(tmp_path / 'codes', split, SPEC)
        assert isinstance(source, CodeSource) and source.kind == 'codes'
        assert source.meta.shards == -(-len(source) // 7)
        assert check_examples(source, maps, labels) == expected[split].tolist()


def test_given_splits_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(codes_writer, '_BATCH', 3)
    parts = {split: make_maps(20 + number, number) for number, split in enumerate(SPLITS)}
    maps, labels = ({split: part[i] for split, part in parts.items()} for i in (0, 1))
    write(tmp_path / 'codes', maps, labels)
    for number, split in enumerate(SPLITS):
        source = own_codes.open_split(tmp_path / 'codes', split, SPEC)
        indices = check_examples(source, *parts[split])
        assert sorted(indices) == list(range(20 + number)) != indices  # some metrics use the first ones alone


def test_one_level_without_classes_has_the_name_top(tmp_path):
    maps, _ = make_maps()
    np.save(tmp_path / 'maps.npy', maps[1])
    mapped = np.load(tmp_path / 'maps.npy', mmap_mode='r')
    vqvae2_jax.write_codes(tmp_path / 'codes', [mapped], codebook_sizes=[300])
    spec = own_codes.read_spec(tmp_path / 'codes')
    assert spec == CodeSpec(('top',), (SHAPES[1],), (300,), 0, ())
    source = own_codes.open_split(tmp_path / 'codes', 'train', spec)
    check_examples(source, maps[1:], np.zeros(40, int))
    assert len(source) == 32


MAPS, LABELS = make_maps()
# (arguments, message)
WRONG_ARGUMENTS = [
    ({'codebook_sizes': (6, 300)}, r'maps of fine\[\d+, \d, \d\] is 6, but with the size 6 in codebook_sizes it .* 5'),
    ({'codebook_sizes': (7, 299)}, r'maps of coarse\[\d+, \d, \d\] is 299, but with the size 299'),
    ({'maps': [MAPS[0] - 1, MAPS[1]]}, r'maps of fine\[\d+, \d, \d\] is -1'),
    ({'codebook_sizes': (7,)}, 'levels has 2 items, shapes has 2 items, codebook_sizes has 1 items'),
    ({'codebook_sizes': (1, 300)}, r'codebook_sizes\[0\] is 1; it must be an integer from 2 to 1048576'),
    ({'maps': MAPS[0]}, r'maps hold an array int64 \[5, 6\]; a level needs integers \[N, h, w\]'),
    ({'maps': [MAPS[0].astype(float), MAPS[1]]}, r'maps hold an array float64 \[40, 5, 6\]'),
    ({'maps': [MAPS[0], MAPS[1][:39]]}, r'levels have \[40, 39\] maps; all need one number'),
    ({'labels': LABELS[:3]}, r'labels are int64 \[3\]; they must be integers \[40\]'),
    ({'maps': [x[:0] for x in MAPS], 'labels': LABELS[:0]}, r'levels have \[0, 0\] maps'),
    ({'maps': []}, 'all need the same levels and sizes'),
    ({'labels': LABELS + 1}, r'labels\[2\] is 3, but with the size 3 in num_classes it must be 0 to 2'),
    ({'labels': LABELS.astype(float)}, r'labels are float64 \[40\]; they must be integers'),
    ({'labels': None}, 'there are none, but the number of classes is 3'),
    ({'class_names': ()}, 'there are 40, but the number of classes is 0'),
    ({'num_classes': 2}, 'class_names has 3 items, but num_classes is 2'),
    ({'class_names': ('a', 'b', 'a')}, "class_names holds 'a' twice"),
    ({'levels': ('fine', 'Fine')}, r"levels is \['fine', 'Fine'\]; each level needs a name of its own"),
    ({'levels': ('fine', 'update')}, r"levels\[1\] is 'update'; it must be .* no method of ConfigDict"),
    ({'levels': ('fine', '../x')}, r"levels\[1\] is '../x'; it must be up to 50 letters"),
    ({'held_out': (0.5, 0.5)}, r'held_out=\(0.5, 0.5\) leaves a split of 40 maps empty'),
    ({'held_out': (0.1, 0.0)}, 'leaves a split of 40 maps empty'),
    ({'held_out': 0.1}, 'held_out is 0.1; it must be a tuple of 2 items'),
    ({'split_seed': -1}, 'split_seed is -1; it must be an integer from 0'),
    ({'shard_size': 0}, 'shard_size is 0; it must be an integer from 1'),
    ({'maps': {'train': MAPS, 'validation': MAPS}}, 'give both for train, validation, test'),
    ({'maps': dict.fromkeys(SPLITS, MAPS), 'labels': {'train': LABELS}}, 'give both for train, validation, test'),
    ({'maps': {'train': MAPS, 'validation': MAPS, 'test': MAPS[:1]}}, 'all need the same levels and sizes'),
]


@pytest.mark.parametrize('arguments, message', WRONG_ARGUMENTS)
def test_wrong_arguments_of_write_codes_are_named_and_leave_nothing(tmp_path, arguments, message):
    arguments = {'maps': MAPS, 'labels': LABELS} | arguments
    with pytest.raises(ValueError, match=message):
        write(tmp_path / 'codes', **arguments)
    assert not list(tmp_path.iterdir())


def test_written_codes_are_not_overwritten(tmp_path):
    write(tmp_path / 'codes')
    before = own_codes.open_split(tmp_path / 'codes', 'train', SPEC).digest
    with pytest.raises(ValueError, match='codes is not empty: give write_codes a new directory, or delete this one'):
        write(tmp_path / 'codes')
    assert own_codes.open_split(tmp_path / 'codes', 'train', SPEC).digest == before


@pytest.mark.parametrize('form, mapped', [('npz', True), ('npy', True), ('compressed', False)])
def test_arrays_of_other_programs(tmp_path, form, mapped):
    write_json(tmp_path)
    arrays = write_arrays(tmp_path, form)
    source = own_codes.open_split(tmp_path, 'train', own_codes.read_spec(tmp_path))
    assert isinstance(source, ArrayCodes) and source.kind == 'codes' and source.class_names == NAMES
    assert all(isinstance(array, np.memmap) == mapped for array in source._arrays.values())
    indices = check_examples(source, (arrays['codes_0'], arrays['codes_1']), arrays['label'])
    assert sorted(indices) == list(range(40)) != indices
    assert source.example_name(indices[3]) == str(indices[3])
    evaluated = list(eval_batches(source, batch_size=16))
    assert np.concatenate([batch['index'][batch['mask']] for batch in evaluated]).tolist() == indices
    batch = next(train_batches(source, batch_size=40, seed=0))
    assert sorted(batch['index']) == list(range(40)) and batch['codes_1'].shape == (40, 3, 4)
    for index in (-1, 40):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize('dtype', ['u1', '>i2', '<u2', '>u8', 'int32'])
def test_any_type_and_order_of_integers(tmp_path, dtype):
    write_json(tmp_path, codebook_sizes=(7, 256))
    maps, labels = make_maps()
    forms = {'codes_0': np.asfortranarray(maps[0].astype(dtype)), 'codes_1': (maps[1] % 256).astype(dtype)}
    write_arrays(tmp_path, 'npy', **forms)
    source = own_codes.open_split(tmp_path, 'train', own_codes.read_spec(tmp_path))
    check_examples(source, (maps[0], maps[1] % 256), labels)


def test_the_digest_shows_every_change(tmp_path):
    write_json(tmp_path)
    digests = [write_and_digest(tmp_path)]
    for name in ('codes_0', 'codes_1', 'label'):
        arrays = dict(zip(('codes_0', 'codes_1', 'label'), (*make_maps()[0], make_maps()[1]), strict=True))
        arrays[name].flat[-5] = arrays[name].flat[-5] == 0  # another value, which is allowed
        digests.append(write_and_digest(tmp_path, **arrays))
    assert len(set(digests)) == 4
    assert write_and_digest(tmp_path) == digests[0]


def write_and_digest(directory, **arrays):
    write_arrays(directory, **arrays)  # over the file that was read before
    return own_codes.open_split(directory, 'train', SPEC).digest


def test_labels_are_not_needed_without_classes(tmp_path):
    write_json(tmp_path, class_names=None, num_classes=0)
    arrays = write_arrays(tmp_path, label=None)
    source = own_codes.open_split(tmp_path, 'train', own_codes.read_spec(tmp_path))
    check_examples(source, (arrays['codes_0'], arrays['codes_1']), np.zeros(40, int))


def changed(name, place, value):
    maps, labels = make_maps()
    arrays = {'codes_0': maps[0], 'codes_1': maps[1], 'label': labels}
    arrays[name][place] = value
    return {name: arrays[name]}


# (arrays, message)
WRONG_ARRAYS = [
    (
        {'codes_1': None},
        "has no array 'codes_1'; codes.json asks for codes_0, codes_1, label, and there is codes_0, label",
    ),
    ({'label': None}, "has no array 'label'"),
    ({'codes_2': MAPS[0]}, "has the array 'codes_2', but codes.json asks for codes_0, codes_1, label only"),
    ({'codes_0': MAPS[0] * 1.0}, 'codes_0 has the dtype float64; it must be one of integers'),
    ({'codes_0': MAPS[0] > 3}, 'codes_0 has the dtype bool; it must be one of integers'),
    ({'label': LABELS * 1.0}, 'label has the dtype float64'),
    ({'codes_0': MAPS[0][:, :4]}, r'codes_0 has the shape \[40, 4, 6\], but codes.json says \[N, 5, 6\]'),
    ({'codes_1': MAPS[1].reshape(40, 12)}, r'codes_1 has the shape \[40, 12\], but codes.json says \[N, 3, 4\]'),
    ({'codes_0': MAPS[0][0, 0, 0]}, r'codes_0 has the shape \[\], but codes.json says \[N, 5, 6\]'),
    ({'label': LABELS[:, None]}, r'label has the shape \[40, 1\], but codes.json says \[N\]'),
    ({'codes_1': MAPS[1][:39]}, 'codes_1 has 39 examples, but codes_0 has 40'),
    ({'label': LABELS[:39]}, 'label has 39 examples, but codes_0 has 40'),
    ({'codes_0': MAPS[0][:0], 'codes_1': MAPS[1][:0], 'label': LABELS[:0]}, 'codes_0 has no examples'),
    (changed('codes_0', (7, 2, 1), 7), r'codes_0\[7, 2, 1\] is 7, but with the size 7 in codes.json it must be 0 to 6'),
    (changed('codes_1', (39, 0, 3), -1), r'codes_1\[39, 0, 3\] is -1, but with the size 300'),
    ({'codes_0': MAPS[0].astype('u8') + 2**63}, r'codes_0\[0, 0, 0\] is 9223372036854775808'),
    (changed('label', 11, 3), r'label\[11\] is 3, but with the size 3 in codes.json it must be 0 to 2'),
]


@pytest.mark.parametrize('form', ['npz', 'npy'])
@pytest.mark.parametrize('arrays, message', WRONG_ARRAYS)
def test_wrong_arrays_are_named_with_both_sides(tmp_path, arrays, message, form):
    write_json(tmp_path)
    write_arrays(tmp_path, form, **arrays)
    with pytest.raises(ValueError, match=message) as error:
        own_codes.open_split(tmp_path, 'train', SPEC)
    assert str(tmp_path / 'train') in str(error.value) and '\n' not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    write_json(tmp_path)
    write_arrays(tmp_path, 'npy')
    path = tmp_path / 'train' / 'codes_1.npy'
    whole = path.read_bytes()
    for data, message in (
        (whole[:-1], r'it claims to be int64 \[40, 3, 4\], 3840 bytes, but holds 3839'),
        (whole + b'\0', 'but holds 3841'),
        (whole[:3], 'is no .npy file that can be read'),
        (b'', 'is no .npy file that can be read'),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            own_codes.open_split(tmp_path, 'train', SPEC)
        assert str(path) in str(error.value)
    np.save(path, np.array([print] * 40), allow_pickle=True)
    with pytest.raises(ValueError, match='holds pickled objects, which are not read'):
        own_codes.open_split(tmp_path, 'train', SPEC)


def test_a_split_has_one_form(tmp_path):
    write_json(tmp_path)
    with pytest.raises(
        ValueError, match='has neither: give the train split as train.npz, as a folder train of codes_0'
    ):
        own_codes.open_split(tmp_path, 'train', SPEC)
    for form in ('npz', 'npy'):
        write_arrays(tmp_path, form)
    with pytest.raises(ValueError, match=r'train\.npz and .*train: give'):
        own_codes.open_split(tmp_path, 'train', SPEC)


def test_a_large_array_is_not_held_in_memory(tmp_path):
    write_json(tmp_path, levels=['top'], shapes=[(64, 64)], codebook_sizes=[2], class_names=None, num_classes=0)
    (tmp_path / 'train').mkdir()
    count = 2**15
    np.lib.format.open_memmap(tmp_path / 'train' / 'codes_0.npy', 'w+', np.uint16, (count, 64, 64))  # 256 MB of zeros
    spec = own_codes.read_spec(tmp_path)
    tracemalloc.start()
    source = own_codes.open_split(tmp_path, 'train', spec)
    example = source[count - 1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == count and example['codes_0'].shape == (64, 64)
    assert peak < 2**27, f'{peak} bytes were allocated for an array of {count * 64 * 64 * 2}'


# (fields of codes.json, message)
WRONG_FIELDS = [
    ({'colour': 1}, "has the unknown field 'colour'; its fields are levels, shapes, codebook_sizes"),
    ({'levels': None}, 'lacks the field levels'),
    ({'shapes': None}, 'lacks the field shapes'),
    ({'shapes': [[5, 6]]}, 'levels has 2 items, shapes has 1 items, codebook_sizes has 2 items'),
    ({'shapes': [[5, 6], [3]]}, r'shapes\[1\] is \[3\]; it must be a tuple of 2 items'),
    ({'shapes': [[5, 6], [3, 0]]}, r'shapes\[1\]\[1\] is 0; it must be an integer from 1 to 16384'),
    ({'shapes': [[2**13, 2**13], [3, 4]]}, r'fine has a 8192x8192 map; it must have fewer than 2\*\*24 positions'),
    ({'codebook_sizes': [7, 2**20 + 1]}, r'codebook_sizes\[1\] is 1048577; it must be an integer from 2 to 1048576'),
    ({'codebook_sizes': [7, True]}, r'codebook_sizes\[1\] is True'),
    ({'levels': []}, r'levels is \[\]; it must be a tuple of 1 to 16 items'),
    ({'levels': ['fine', 3]}, r'levels\[1\] is 3; it must be a non-empty string'),
    ({'levels': ['fine', 'a.b']}, r"levels\[1\] is 'a.b'"),
    ({'levels': ['fine', 'items']}, r"levels\[1\] is 'items'"),
    ({'num_classes': -1}, 'num_classes is -1'),
    ({'num_classes': 4}, 'class_names has 3 items, but num_classes is 4'),
    ({'class_names': 'abc'}, "class_names is 'abc'; it must be a tuple"),
    ({'class_names': ['a', 'b', 'a']}, "class_names holds 'a' twice"),
    ({'class_names': None}, 'lacks the field num_classes'),
]


@pytest.mark.parametrize('fields, message', WRONG_FIELDS)
def test_wrong_fields_of_the_description(tmp_path, fields, message):
    write_json(tmp_path, **fields)
    with pytest.raises(ConfigError, match=rf'codes\.path: .*codes\.json.*{message}') as error:
        base.get_config(codes=tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text', ['', '{', '[]', '"x"', '{"levels": ' + '[' * 10**5])
def test_a_description_that_is_no_object(tmp_path, text):
    (tmp_path / 'codes.json').write_text(text)
    with pytest.raises(ConfigError, match=r'codes\.json cannot be read'):
        base.get_config(codes=tmp_path)


def test_a_missing_description(tmp_path):
    with pytest.raises(
        ConfigError, match=r'codes\.path: .*codes\.json does not exist: give a directory that vqvae2_jax'
    ):
        base.get_config(codes=tmp_path / 'none')
    write(tmp_path / 'codes')
    (tmp_path / 'codes' / 'codes.json').unlink()  # as after a write that was killed
    with pytest.raises(ConfigError, match=r'codes\.json does not exist'):
        base.get_config(codes=tmp_path / 'codes')


def test_an_extraction_needs_no_description(tmp_path):
    maps, labels = make_maps()
    batch = {'codes_0': maps[0], 'codes_1': maps[1], 'label': labels, 'index': np.arange(40)}
    for split in SPLITS:
        directory = tmp_path / split
        output = record.open_output(directory, codes.JOB, {}, {})
        write_shard(codes.shard_path(directory, 0, 1), [batch], SIZES)
        output.finish({'shapes': SHAPES, 'codebook_sizes': SIZES, 'num_classes': 3, 'class_names': NAMES}
                      | {'count': 40, 'split': split, 'shards': 1})  # fmt: skip
    config = base.get_config(codes=tmp_path)
    spec = build.code_spec(config)
    assert spec == CodeSpec(('bottom', 'top'), SHAPES, SIZES, 3, NAMES)
    check_examples(own_codes.open_split(tmp_path, 'test', spec), maps, labels)


def test_a_store_that_is_not_as_described(tmp_path):
    write(tmp_path)
    for name, value in (('codebook_sizes', (7, 301)), ('shapes', ((6, 5), (3, 4))), ('num_classes', 4)):
        write_json(tmp_path, **{name: value} | ({'class_names': None} if name == 'num_classes' else {}))
        with pytest.raises(
            ValueError, match=rf'train has {name}=.*, but codes\.json says .*: write both by vqvae2_jax'
        ):
            own_codes.open_split(tmp_path, 'train', own_codes.read_spec(tmp_path))


def test_a_damaged_store_names_the_function_that_writes_it(tmp_path):
    write(tmp_path)
    path = next((tmp_path / 'train').glob('*.array_record'))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r'is damaged.* call vqvae2_jax\.write_codes again'):
        own_codes.open_split(tmp_path, 'train', SPEC)


def test_the_examples_of_the_document_work(tmp_path, monkeypatch):
    text = (pathlib.Path(__file__).parents[1] / 'docs' / 'your_codes.md').read_text()
    writing, config, _ = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    (described,) = re.findall(r'```json\n(.*?)```', text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    np.save('maps.npy', np.random.default_rng(0).integers(0, 16_384, (50, 16, 16)))
    np.save('labels.npy', np.arange(50) % 10)
    exec(writing, {})
    (tmp_path / 'my_codes.py').write_text(config)
    config = load_config('my_codes.py')
    validate_config(config)
    prior = build.make_prior(config, 0)
    assert prior.shape == (16, 16) and prior.codebook_size == 16_384 and prior.num_classes == 10
    spec = own_codes.read_spec('codes')
    (tmp_path / 'codes' / 'codes.json').write_text(described)
    assert own_codes.read_spec('codes') == spec


class TestConfig:
    def config(self, directory):
        if not pathlib.Path(directory, 'codes.json').exists():
            write(directory)
        config = base.get_config(codes=directory)
        for prior in config.prior.values():
            prior.update(hidden_channels=8, residual_channels=8, num_residual_blocks=1, num_heads=2)
        return config

    def test_it_has_the_levels_of_the_codes_and_no_sections_of_images(self, tmp_path):
        config = self.config(tmp_path)
        validate_config(config)
        assert config.is_locked and 'data' not in config and 'vqvae' not in config
        assert set(config.prior) == {'fine', 'coarse'} == set(config.sample.temperature)
        assert config.codes.path == str(tmp_path)
        networks = build.networks(config)
        assert list(networks) == ['prior.fine', 'prior.coarse']
        fine, coarse = (networks[f'prior.{name}'][0] for name in ('fine', 'coarse'))
        assert (fine.shape, fine.codebook_size, fine.coarser_codebook_sizes) == ((5, 6), 7, (300,))
        assert (coarse.shape, coarse.codebook_size, coarse.coarser_codebook_sizes) == ((3, 4), 300, ())
        assert fine.num_classes == coarse.num_classes == 3

    def test_a_prior_of_another_config_can_be_copied(self, tmp_path):
        config, other = self.config(tmp_path), load_config('imagenet256')
        config.prior.coarse.update(other.prior.top)
        config.prior.fine = other.prior.bottom
        validate_config(config)
        assert config.prior.coarse == other.prior.top and config.prior.fine.training.steps == 754_000

    def test_the_settings_of_a_prior_describe_the_codes(self, tmp_path):
        settings = build.settings(self.config(tmp_path), 'prior.fine')
        assert settings['codes.shapes'] == [SHAPES[0], SHAPES[1]] and settings['codes.levels'] == ['fine', 'coarse']
        assert not any(name.startswith(('data.', 'vqvae.', 'codes.path')) for name in settings)

    def test_it_is_stored_without_its_path(self, tmp_path):
        config = self.config(tmp_path)
        stored = portable.from_json(portable.to_json(config))
        assert stored.codes.path == ''
        stored.codes.path = config.codes.path
        assert stored == config

    @pytest.mark.parametrize(
        'field, value, message',
        [
            ('evaluate.cas', True, 'evaluate.cas is True; it must be False, because codes.path='),
            ('evaluate.inception', 'x.npz', 'evaluate.inception is'),
            ('evaluate.references', ('train',), 'evaluate.references is'),
            ('evaluate.real', 'x', 'evaluate.real is'),
            ('likelihood.path', 'x', 'likelihood.path is'),
            ('codes.flip', True, 'codes.flip is True; it must be False'),
            ('codes.crops', 2, 'codes.crops is 2; it must be 0'),
            ('codes.path', '', "codes.path is ''; a config without the sections data and vqvae needs"),
            ('codes.path', 'none', 'codes.path: .*none/codes.json does not exist'),
            ('sample.labels', (3,), r'sample.labels holds \[3\], but codes.path has num_classes=3 has labels 0 to 2'),
        ],
    )
    def test_fields_that_cannot_work_are_refused(self, tmp_path, field, value, message):
        config = self.config(tmp_path)
        config[field.partition('.')[0]][field.partition('.')[2]] = value
        with pytest.raises(ConfigError, match=message):
            validate_config(config)

    def test_codes_with_other_levels_are_refused(self, tmp_path):
        config = self.config(tmp_path / 'codes')
        write(tmp_path / 'other', levels=('fine', 'rough'))
        config.codes.path = str(tmp_path / 'other')
        message = r"prior has the levels \['coarse', 'fine'\], but codes.path='.*other' has \['fine', 'rough'\]"
        with pytest.raises(ConfigError, match=message):
            validate_config(config)

    def test_a_config_with_images_takes_no_codes(self, config):
        config.codes.path = '/somewhere'
        message = re.escape("codes.path is '/somewhere', but this config has the sections data and vqvae")
        with pytest.raises(ConfigError, match=message):
            validate_config(config)
        with pytest.raises(ConfigError, match='the codes have the names of levels'):
            base.get_config(('top',), codes='/somewhere')

    def test_without_classes_nothing_takes_a_class(self, tmp_path):
        maps, _ = make_maps()
        write(tmp_path / 'codes', maps, class_names=())
        config = self.config(tmp_path / 'codes')
        validate_config(config)
        config.prior.fine.label_dropout = 0.1
        with pytest.raises(
            ConfigError, match='label_dropout is 0.1, but codes.path has num_classes=0; without classes'
        ):
            validate_config(config)
