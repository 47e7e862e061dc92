"""The Python API: functions under jit and vmap and with sharded inputs, against the modules; load, save, export."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.flax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import vqvae2_jax as vq2
from tests import defaults, weights_format
from tests.test_sampling_program import make_generator
from vqvae2_jax import api
from vqvae2_jax.io import files
from vqvae2_jax.sampling.ancestral import sample_level
from vqvae2_jax.sampling.params import SamplingParams
from vqvae2_jax.weights import sources

LABELS = jnp.arange(4) % 3
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def generator():
    return make_generator()


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(1).integers(0, 256, (4, 16, 16, 1), np.uint8)


def keys(count=4):
    return vq2.sample_keys(jax.random.key(0), jnp.arange(count))


def assert_equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_codes_and_images_are_those_of_the_modules(generator, images):
    model, variables = generator.vqvae()
    pixels = images / np.float32(127.5) - 1
    output = jax.jit(model.apply)(variables, pixels)
    codes = vq2.encode(generator, images)
    assert_equal(codes, output.codes)
    assert_equal(vq2.encode(generator, pixels), codes)
    np.testing.assert_allclose(vq2.decode(generator, codes, dtype=jnp.float32), output.image, atol=1e-6)
    np.testing.assert_allclose(vq2.reconstruct(generator, pixels), output.image, atol=1e-6)
    preview = vq2.preview(generator, codes, level='top', dtype=jnp.float32)
    np.testing.assert_allclose(preview, output.previews[0], atol=1e-6)
    assert_equal(vq2.preview(generator, codes[1:]), vq2.preview(generator, codes))
    assert_equal(vq2.preview(generator, codes, level='bottom'), vq2.decode(generator, codes))
    reconstructed = vq2.reconstruct(generator, images)
    assert reconstructed.dtype == jnp.uint8
    np.testing.assert_allclose(reconstructed, (np.clip(output.image, -1, 1) + 1) * 127.5, atol=0.51)


def test_samples_are_drawn_level_by_level_and_decoded(generator):
    settings = dict(temperature={'top': 0.7}, guidance=2.0, top_k={'bottom': 3})
    samples = vq2.sample(generator, keys(), LABELS, **settings)
    codes = ()
    for index, (level, params) in enumerate((('top', SamplingParams(0.7, guidance=2.0)), ('bottom', None))):
        prior, variables = generator.prior(level)
        level_keys = jnp.stack([jax.random.fold_in(key, 1 - index) for key in keys()])
        params = params or SamplingParams(top_k=3, guidance=2.0)
        codes = (sample_level(prior, variables['params'], level_keys, LABELS, codes, params).codes, *codes)
    assert_equal(samples.codes, codes)
    assert_equal(samples.images, vq2.decode(generator, codes))
    top = vq2.sample_level(generator, 'top', keys(), LABELS, **settings)
    assert_equal((vq2.sample_level(generator, 'bottom', keys(), LABELS, (top,), **settings), top), codes)
    with pytest.raises(ValueError, match='codes are missing; they must be integers .* of the levels top'):
        vq2.sample_level(generator, 'bottom', keys(), LABELS)
    assert np.any(vq2.sample(generator, keys(), LABELS).codes[1] != codes[1])


def test_log_likelihood_is_that_of_the_logits(generator, images):
    codes = vq2.encode(generator, images)
    found = vq2.log_likelihood(generator, codes, LABELS)
    expected = []
    for index, level in enumerate(('bottom', 'top')):
        prior, variables = generator.prior(level)
        log_probs = jax.nn.log_softmax(defaults.apply(prior, variables, codes[index], LABELS, codes[index + 1 :]))
        expected.append(jnp.take_along_axis(log_probs, codes[index][..., None], -1).sum((1, 2, 3)))
    np.testing.assert_allclose(found.nats, jnp.stack(expected, axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.bits, -sum(expected) / np.log(2), rtol=1e-5)
    by_class = jnp.stack([vq2.log_likelihood(generator, codes, jnp.full(4, y)).nats.sum(1) for y in range(3)])
    marginal = vq2.log_likelihood(generator, codes).nats.sum(1)
    np.testing.assert_allclose(marginal, jax.nn.logsumexp(by_class, 0) - np.log(3), rtol=1e-5)


def test_codes_may_be_of_a_type_that_cannot_hold_their_number(images):
    generator = make_generator(codebook_size=256)  # 256 stands for "off the map", and is 0 in uint8
    codes = [np.array(x) for x in vq2.encode(generator, images)]
    narrow = [x.astype(np.uint8) for x in codes]
    assert_equal(vq2.log_likelihood(generator, narrow, LABELS), vq2.log_likelihood(generator, codes, LABELS))
    prior, variables = generator.prior('top')
    assert_equal(*(defaults.apply(prior, variables, jnp.asarray(x[1]), LABELS) for x in (narrow, codes)))


def test_a_mesh_with_explicit_axes_is_refused(generator, images):
    mesh = jax.make_mesh((4,), ('x',))
    sharded = jax.device_put(images, jax.NamedSharding(mesh, jax.P('x')))
    with pytest.raises(
        ValueError, match=r"\('x',\) has Explicit axes, .* axis_types=\(jax.sharding.AxisType.Auto,\) \* 1"
    ):
        vq2.encode(generator, sharded)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match='Explicit axes'):
        vq2.sample(generator, keys(), LABELS)


def test_inpainting_keeps_the_codes_outside_of_the_mask(generator, images):
    mask = np.zeros((16, 16), bool)
    mask[9:, :] = True
    kept = vq2.encode(generator, images)
    filled = vq2.inpaint(generator, keys(), images, mask, LABELS)
    for codes, before, first in zip(filled.codes, kept, (4, 2), strict=True):  # the first row of codes with a mask
        np.testing.assert_array_equal(codes[:, :first], before[:, :first])
        assert np.any(codes[:, first:] != before[:, first:])
    only = vq2.inpaint(generator, keys(), images, mask, LABELS, levels=('bottom',))
    np.testing.assert_array_equal(only.codes[1], kept[1])
    assert_equal(only.images, vq2.decode(generator, only.codes))
    # variants of one image, and a mask for each image
    variants = vq2.inpaint(generator, keys(), images[:1], mask, LABELS)
    assert_equal(jax.tree.map(lambda x: x[0], variants), jax.tree.map(lambda x: x[0], filled))
    masks = np.stack([mask, ~mask, mask, mask])
    mixed = vq2.inpaint(generator, keys(), images / np.float32(127.5) - 1, masks, LABELS)
    assert mixed.images.dtype == jnp.float32
    assert_equal([x[0] for x in mixed.codes], [x[0] for x in filled.codes])
    np.testing.assert_array_equal(mixed.codes[0][1, 5:], kept[0][1, 5:])


def test_code_maps_of_another_size_are_refused_by_the_priors(generator):
    large = np.zeros((1, 32, 32, 1), np.uint8)
    codes = vq2.encode(generator, large)
    assert vq2.decode(generator, codes).shape == large.shape  # stage 1 takes any size
    message = r'code maps are \(\(16, 16\), \(8, 8\)\), finest first; the priors model maps of \(\(8, 8\), \(4, 4\)\)'
    for function in (
        lambda: vq2.inpaint(generator, keys(1), large, np.ones((32, 32), bool), LABELS[:1]),
        lambda: vq2.log_likelihood(generator, codes, LABELS[:1]),
    ):
        with pytest.raises(ValueError, match=message):
            function()
    with pytest.raises(ValueError, match=r'code maps are \(\(8, 8\),\)'):
        vq2.sample_level(generator, 'bottom', keys(1), LABELS[:1], codes[1:])


def test_weights_in_bfloat16_are_saved_as_float32_and_not_exported(generator, tmp_path):
    half = generator.with_dtype('bfloat16')
    vq2.save(half, tmp_path / 'half.safetensors')
    tensors = safetensors.flax.load_file(tmp_path / 'half.safetensors')
    assert {x.dtype for x in tensors.values() if jnp.issubdtype(x.dtype, jnp.floating)} == {jnp.dtype('float32')}
    with pytest.raises(ValueError, match='the weights are bfloat16.*with_dtype'):
        vq2.export(half, tmp_path / 'half.npz')


@pytest.mark.parametrize('damage', [{'format': 'x'}, {'format': '99'}, {'specification': '[]'}, {'specification': '{'}])
def test_a_damaged_header_is_one_error(generator, tmp_path, damage):
    path = tmp_path / 'x.safetensors'
    vq2.save(generator, path)
    with safetensors.safe_open(path, 'np') as file:
        metadata = file.metadata() | damage
    safetensors.flax.save_file({'a': jnp.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match='has format|its specification is damaged'):
        vq2.load(path)


def calls(images):
    """Every function as (function of a generator and arrays [B, ...], arrays)."""
    codes = tuple(np.random.default_rng(2).integers(0, 16, (4, *shape), np.int32) for shape in ((8, 8), (4, 4)))
    mask, labels = np.ones((4, 16, 16), bool), np.asarray(LABELS)
    data = jax.random.key_data(keys())
    return {
        'encode': (vq2.encode, (images,)),
        'decode': (lambda g, *codes: vq2.decode(g, codes), codes),
        'preview': (lambda g, *codes: vq2.preview(g, codes), codes),
        'reconstruct': (vq2.reconstruct, (images,)),
        'sample': (
            lambda g, data, y: vq2.sample(g, jax.random.wrap_key_data(data), y, temperature=0.9),
            (data, labels),
        ),
        'inpaint': (
            lambda g, data, *rest: vq2.inpaint(g, jax.random.wrap_key_data(data), *rest),
            (data, images, mask, labels),
        ),
        'log_likelihood': (lambda g, y, *codes: vq2.log_likelihood(g, codes, y), (labels, *codes)),
    }


@pytest.mark.parametrize('name', calls(None))
def test_functions_work_under_jit_and_vmap_and_with_sharded_arrays(generator, images, name):
    function, arrays = calls(images)[name]
    expected = function(generator, *arrays)

    def assert_near(found):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)

    assert_near(jax.jit(function)(generator, *arrays))
    one_by_one = jax.vmap(function, in_axes=(None, *[0] * len(arrays)))(generator, *(x[:, None] for x in arrays))
    assert_near(jax.tree.map(lambda x: x[:, 0], one_by_one))
    # a mesh of the caller's own, with other axes than those of this package
    mesh = Mesh(np.array(jax.devices()[:4]), ('devices',))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (('devices',), ()))
    sharded = function(jax.device_put(generator, whole), *jax.device_put(arrays, split))
    assert_near(sharded)
    assert not jax.tree.leaves(sharded)[0].sharding.is_fully_replicated


def test_a_generator_is_compiled_once_for_equal_specifications(generator, images):
    vq2.encode(generator, images)
    before = vq2.encode._cache_size()
    other = jax.tree.map(lambda x: x + 0, make_generator())
    vq2.encode(other, images)
    fields = json.loads(other.specification.config) | {'seed': 7, 'name': 'other'}
    fields['vqvae']['training']['steps'] = 9
    specification = dataclasses.replace(other.specification, config=json.dumps(fields), class_names=('a', 'b', 'c'))
    assert specification == generator.specification and hash(specification) == hash(generator.specification)
    vq2.encode(other.replace(specification=specification), images)
    assert vq2.encode._cache_size() == before
    both = jax.tree.map(lambda a, b: (a + b) / 2, generator, other.replace(specification=specification))
    assert_equal(both.params, generator.params)
    fields['prior']['top']['order'] = 'wavefront'
    assert dataclasses.replace(specification, config=json.dumps(fields)) != specification


def test_bfloat16_changes_weights_and_arithmetic_of_the_priors(generator):
    half = generator.with_dtype('bfloat16')
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {jnp.dtype('bfloat16')}
    assert {prior.dtype for prior in half.specification.priors} == {jnp.dtype('bfloat16')}
    assert_equal(half.variables, generator.variables)
    assert vq2.sample(half, keys(), LABELS).codes[0].shape == (4, 8, 8)


def fill(generator, images, shape):
    return vq2.inpaint(generator, keys(), images, np.ones(shape, bool), LABELS)


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda g, x: vq2.encode(g, x[0]), r'images have the shape \(16, 16, 1\); it must be \[B, H, W, 1\]'),
        (lambda g, x: vq2.encode(g, x.astype(int)), 'images are int.*; they must be uint8, or float'),
        (lambda g, x: vq2.encode(g, x[:, :15]), r'data.image_size is 15x16 and must be divisible by 4'),
        (lambda g, x: vq2.decode(g, vq2.encode(g, x)[:1]), r'codes are int32\[4, 8, 8\]; .* of the levels bottom, top'),
        (lambda g, x: vq2.decode(g, [x / 2.0, x]), 'codes are float32'),
        (lambda g, x: vq2.decode(g, vq2.encode(g, x), dtype=jnp.float16), 'dtype is float16; images are uint8 or'),
        (
            lambda g, x: vq2.preview(g, vq2.encode(g, x), level='middle'),
            "no level 'middle'; the levels are top, bottom",
        ),
        (lambda g, x: vq2.sample(g, keys()), 'conditioned on 3 classes: give it labels'),
        (lambda g, x: vq2.sample(g, keys(), np.zeros(1, int)), r'labels have the shape \(1,\); they must be \[\d+\]'),
        (lambda g, x: vq2.sample_level(g, 'top', keys(), np.int32(0)), r'labels have the shape \(\); they must be'),
        (lambda g, x: vq2.log_likelihood(g, vq2.encode(g, x), np.zeros(7, int)), r'labels have the shape \(7,\)'),
        (lambda g, x: vq2.sample(g, keys(), LABELS, temperature={'tpo': 1}), "no level 'tpo'"),
        (lambda g, x: vq2.sample(g.replace(params=()), keys(), LABELS), 'has stage 1 alone'),
        (lambda g, x: g.prior('middle'), "no level 'middle'"),
        (lambda g, x: g.with_dtype('float16'), "dtype is 'float16'"),
        (lambda g, x: vq2.save(g, 'x.npz'), 'x.npz: the name of a file of weights ends with .safetensors, .pt, .pth'),
        (lambda g, x: vq2.save(g, 'x.pt', dtype='bfloat16'), 'weights for PyTorch are float32, not bfloat16'),
        (lambda g, x: fill(g, x, (8, 8)), r'images of the shape \(4, 16, 16, 1\) and a mask of \(8, 8\)'),
        (lambda g, x: fill(g, x, (16, 16, 1)), r'a mask of \(16, 16, 1\); the mask must be \[H, W\]'),
        (lambda g, x: fill(g, x, (2, 16, 16)), r'there are 4 keys, .* a mask of \(2, 16, 16\)'),
        (lambda g, x: fill(g, x[:2], (16, 16)), r'there are 4 keys, images of the shape \(2, 16, 16, 1\)'),
    ],
)
def test_bad_arguments_are_named(generator, images, call, message):
    with pytest.raises(ValueError, match=message):
        call(generator, images)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_saved_generator_is_loaded_again(generator, tmp_path, dtype):
    path = tmp_path / 'model.safetensors'
    vq2.save(generator, path, dtype=dtype)
    loaded = vq2.load(path)
    assert loaded.specification == generator.specification and loaded.variables['codebook'].keys()
    assert_equal(loaded.variables['codebook'], generator.variables['codebook'])
    assert {x.dtype.name for x in jax.tree.leaves(loaded)} == {'float32', 'int32'}
    expected = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, dtype), np.float32), generator.params)
    assert_equal(loaded.params, expected)
    vq2.save(generator.replace(params=()), tmp_path / 'stage1.safetensors')
    assert vq2.load(tmp_path / 'stage1.safetensors').params == ()


def test_damaged_and_foreign_files_of_weights_are_refused(generator, tmp_path):
    path = tmp_path / 'model.safetensors'
    vq2.save(generator, path)
    data, header = path.read_bytes(), int.from_bytes(path.read_bytes()[:8], 'little')
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match='is no .safetensors file, or is damaged'):
        vq2.load(path)
    path.write_bytes(safetensors.flax.save({'a': jnp.zeros(2)}))
    with pytest.raises(ValueError, match='has no specification in its header'):
        vq2.load(path)
    metadata = json.loads(data[8 : 8 + header])['__metadata__']
    tensors = safetensors.flax.load(data)
    path.write_bytes(safetensors.flax.save(tensors, metadata | {'format': '99'}))
    with pytest.raises(ValueError, match='has format 99, .* reads formats up to 1: install a newer one'):
        vq2.load(path)
    name = 'vqvae/codebook/quantizers_0/embedding'
    path.write_bytes(safetensors.flax.save(tensors | {name: tensors[name][:3]}, metadata))
    with pytest.raises(ValueError, match=rf'other arrays .*\n  {name}: file \(3, 8\), network \(16, 8\)'):
        vq2.load(path)
    with pytest.raises(ValueError, match='ends with .safetensors'):
        vq2.save(generator, tmp_path / 'model.npz')
    with pytest.raises(ValueError, match='dtype is .float16.; it must be float32 or bfloat16'):
        vq2.save(generator, path, dtype='float16')
    with pytest.raises(FileNotFoundError, match=r"no model 'nothing': give a name of the package \("):
        vq2.load('nothing')


def test_public_names_are_those_of_the_api():
    others = {
        '__version__',
        'load_config',
        'validate_config',
        'load',
        'save',
        'export',
        'write_codes',
        'Run',
        'run_job',
    }
    others |= {'read_metrics', 'draw_codes', 'image_grid', 'labeled_rows', 'set_cpu_flags'}
    assert set(vq2.__all__) == {*api.__all__} | others
    assert all(getattr(vq2, name) for name in vq2.__all__) and set(dir(vq2)) == set(vq2.__all__)
    assert vq2.load is sources.load and vq2.save is sources.save
    with pytest.raises(AttributeError, match='has no attribute .decoder'):
        vq2.decoder  # noqa: B018


_READER = """
import sys
import jax, jax.export, numpy as np
assert 'vqvae2_jax' not in sys.modules and 'flax' not in sys.modules
file = np.load(sys.argv[1])
encode, decode, sample = (jax.export.deserialize(bytearray(file[name])) for name in ('encode', 'decode', 'sample'))
weights = {name: file[name] for name in file.files if name.startswith('weights/')}
inputs = np.load(sys.argv[2])
codes = encode.call(weights, inputs['images'])
images, sampled = sample.call(weights, np.uint32(7), inputs['index'], inputs['labels'])
assert encode.platforms == ('cpu', 'cuda', 'tpu')
np.savez(sys.argv[3], top=codes[1], decoded=decode.call(weights, codes), images=images, sampled=sampled[0])
"""


@pytest.mark.parametrize(
    'order, batch',
    [
        pytest.param('raster', 1, marks=pytest.mark.system),
        ('raster', 3),
        pytest.param('wavefront', 3, marks=pytest.mark.system),
    ],
)
def test_an_exported_generator_runs_without_this_package(tmp_path, images, order, batch):
    generator, path = make_generator(order), tmp_path / 'model.npz'
    vq2.export(generator, path, temperature={'top': 0.8})
    index, labels = np.arange(batch, dtype=np.int32) + 5, np.arange(batch, dtype=np.int32) % 3
    np.savez(tmp_path / 'inputs.npz', images=images[:batch], index=index, labels=labels)
    arguments = [sys.executable, '-c', _READER, path, tmp_path / 'inputs.npz', tmp_path / 'outputs.npz']
    subprocess.run(arguments, check=True, cwd=tmp_path, env={'JAX_PLATFORMS': 'cpu', 'PATH': ''})
    found = np.load(tmp_path / 'outputs.npz')
    codes = vq2.encode(generator, images[:batch])
    np.testing.assert_array_equal(found['top'], codes[1])
    np.testing.assert_array_equal(found['decoded'], vq2.decode(generator, codes))
    keys = vq2.sample_keys(jax.random.key(7), index)
    samples = vq2.sample(generator, keys, labels, temperature={'top': 0.8})
    np.testing.assert_array_equal(found['sampled'], samples.codes[0])
    np.testing.assert_array_equal(found['images'], samples.images)


def test_files_of_earlier_versions_are_read():
    """Every version keeps its file and the digest of its arrays; `python -m tests.weights_format` adds one."""
    recorded = json.loads((weights_format.DIRECTORY / 'digests.json').read_text())
    assert list(recorded) == sorted(path.name for path in weights_format.DIRECTORY.glob('*.safetensors'))
    for name, digest in recorded.items():
        generator = vq2.load(weights_format.DIRECTORY / name)
        assert files.digest_arrays(generator) == digest
        assert vq2.sample(generator, keys(2), LABELS[:2]).images.shape == (2, 16, 16, 1)


@pytest.mark.parametrize('name', sources.packaged_names())
def test_models_of_the_package_have_cards_and_sample(name):
    generator = vq2.load(name)
    assert generator.params and (ROOT / 'docs' / f'model_{name}.md').exists()
    assert len(generator.specification.class_names) == generator.specification.num_classes
    assert generator.specification.to_config().name == name
