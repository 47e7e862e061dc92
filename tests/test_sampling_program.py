"""The compiled sampling program: weights are gathered before the loop, and results do not depend on the devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae2_jax import api
from vqvae2_jax.config import base, build
from vqvae2_jax.distributed import sharding

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
BATCH = 16
ORDERS = pytest.param('raster', marks=pytest.mark.system), 'wavefront'


@pytest.fixture(autouse=True)
def shard_small_arrays(monkeypatch):
    monkeypatch.setattr(sharding, 'MIN_SHARDED_SIZE', 64)


def make_config(order='raster'):
    """Two levels of 8x8 and 4x4 codes of 16x16 images, with as few channels as possible."""
    config = base.get_config()
    config.data.update(image_size=(16, 16), num_classes=3)
    config.vqvae.update(hidden_channels=8, residual_channels=8, num_residual_blocks=1, codebook_size=16, codebook_dim=8)
    for prior in config.prior.values():
        prior.update(order=order, label_dropout=0.1, hidden_channels=16, residual_channels=16, num_residual_blocks=2)
        prior.update(kernel_size=3, num_heads=2)
    config.prior.bottom.num_cond_blocks = 1
    config.prior.top.num_attention_layers = 1
    return config


def init(config, section):
    """A module of the config and random variables on the host."""
    model, (key, *shapes) = build.networks(config)[section]
    return model, jax.device_get(jax.jit(model.init)(key, *jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)))


def make_generator(order='raster', codebook_size=None):
    """A generator of the config with random weights on the host."""
    config = make_config(order)
    config.vqvae.codebook_size = codebook_size or config.vqvae.codebook_size
    (_, variables), *priors = (init(config, section) for section in ('vqvae', 'prior.bottom', 'prior.top'))
    rng = np.random.default_rng(0)  # an untrained codebook is zero
    codebook = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), variables['codebook'])
    params = tuple(prior['params'] for _, prior in priors)
    return api.Generator(variables | {'codebook': codebook}, params, api.Specification.of(config))


def sample(generator, index, labels):
    keys = api.sample_keys(jax.random.key(0), index)
    return api.sample(generator, keys, labels, temperature={'bottom': 0.9}, top_k={'bottom': 8}, guidance={'bottom': 2})


def make_arguments(generator):
    """The arguments of `sample`, on the current mesh."""
    index = np.arange(BATCH, dtype=np.int32)
    batch = {'index': index, 'label': index % 3}
    rows = sharding.process_local_rows(BATCH)
    batch = sharding.make_global_batch({name: values[rows] for name, values in batch.items()}, BATCH)
    return sharding.put_sharded(generator), batch['index'], batch['label']


def split_computations(text):
    """{name: lines} of the computations of an HLO module."""
    found, lines = {}, None
    for line in text.splitlines():
        if match := re.match(r'(?:ENTRY )?%?([\w.\-]+) .*\{$', line):
            lines = found.setdefault(match[1], [])
        elif lines is not None:
            lines.append(line)
    return found


def collectives_in_loops(text):
    """Lines of collective operations that run inside the loops of an HLO module, and how many loops it has."""
    computations = split_computations(text)
    bodies = {m[1] for lines in computations.values() for line in lines if (m := re.search(r'body=%?([\w.\-]+)', line))}
    reached, waiting = set(), list(bodies)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            called = re.findall(r'%?([\w.\-]+)', ' '.join(computations[name]))
            waiting += [word for word in called if word in computations]
    operation = re.compile(rf'= .*\b({"|".join(COLLECTIVES)})(-start)?\(')
    return [line.strip() for name in reached for line in computations[name] if operation.search(line)], len(bodies)


def compile_sampler(order):
    with jax.set_mesh(sharding.make_mesh(jax.devices()[:8], fsdp=2)):
        arguments = make_arguments(make_generator(order))
        return jax.jit(sample).lower(*arguments).compile().as_text(), arguments[0]


@pytest.mark.parametrize('order', ORDERS)
def test_no_collective_runs_inside_the_sampling_loop(order):
    text, generator = compile_sampler(order)
    arrays = jax.tree.leaves(generator.params)
    assert sum(not x.sharding.is_fully_replicated for x in arrays) > 10  # else the test shows nothing
    assert 'all-gather' in text  # before the loop
    found, loops = collectives_in_loops(text)
    assert loops >= 2 and not found, found


@pytest.mark.parametrize('order', ORDERS)
def test_the_test_above_finds_weights_that_are_gathered_in_every_step(order, monkeypatch):
    monkeypatch.setattr(sharding, 'constrain_replicated', lambda tree: tree)
    jax.clear_caches()  # `api.sample` is traced again
    try:
        found, _ = collectives_in_loops(compile_sampler(order)[0])
    finally:
        jax.clear_caches()
    assert found


def assert_equal(results):
    first, *others = results
    for other in others:
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('order', ORDERS)
def test_samples_are_equal_on_any_devices(order):
    generator, results = make_generator(order), []
    for devices, fsdp in ((1, 1), (2, 2), (8, 1), (8, 2)):
        with jax.set_mesh(sharding.make_mesh(jax.devices()[:devices], fsdp)):
            results.append(sharding.gather_rows(sample(*make_arguments(generator))))
    images, codes = results[0]
    assert images.dtype == np.uint8 and len(np.unique(codes[1].reshape(BATCH, -1), axis=0)) > BATCH // 2
    assert_equal(results)


def test_codes_and_reconstructions_are_equal_on_any_devices():
    image = np.random.default_rng(0).integers(0, 256, (BATCH, 16, 16, 1), np.uint8)
    generator, results = make_generator(), []
    for devices, fsdp in ((1, 1), (2, 2), (8, 1), (8, 2)):
        with jax.set_mesh(sharding.make_mesh(jax.devices()[:devices], fsdp)):
            held = sharding.put_sharded(generator)
            codes = api.encode(held, sharding.make_global_batch({'image': image})['image'])
            results.append(sharding.gather_rows((codes, api.decode(held, codes))))
    codes, images = results[0]
    assert len(np.unique(codes[0])) > 2 and images.dtype == np.uint8
    assert_equal(results)


def test_log_likelihoods_agree_on_any_devices():
    generator, image = make_generator(), np.random.default_rng(0).integers(0, 256, (BATCH, 16, 16, 1), np.uint8)
    batch = {'image': image, 'label': np.arange(BATCH, dtype=np.int32) % 3}
    for labeled in (True, False):
        results = []
        for devices in (1, 2, 8):
            with jax.set_mesh(sharding.make_mesh(jax.devices()[:devices])):
                held, shared = sharding.put_sharded(generator), sharding.make_global_batch(batch)
                codes = api.encode(held, shared['image'])
                found = api.log_likelihood(held, codes, shared['label'] if labeled else None)
                results.append(sharding.gather_rows(found))
        for other in results[1:]:
            np.testing.assert_allclose(results[0].nats, other.nats, rtol=1e-5)
