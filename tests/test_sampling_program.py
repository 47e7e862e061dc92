"""The compiled sampling program: weights are gathered before the loop, and results do not depend on the devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae2_jax import inference
from vqvae2_jax.config import base, build
from vqvae2_jax.distributed import sharding
from vqvae2_jax.sampling.params import SamplingParams

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
BATCH = 16


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


@pytest.fixture(scope='module')
def vqvae():
    model, variables = init(make_config(), 'vqvae')
    rng = np.random.default_rng(0)  # an untrained codebook is zero
    codebook = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), variables['codebook'])
    return model, variables | {'codebook': codebook}


def make_priors(order):
    """Modules and parameters of both levels, finest first."""
    made = [init(make_config(order), f'prior.{name}') for name in ('bottom', 'top')]
    return [prior for prior, _ in made], [variables['params'] for _, variables in made]


def sampling_params():
    return SamplingParams(temperature=0.9, top_k=8, guidance=2.0), SamplingParams()


def make_arguments(vqvae, params):
    """The arguments of the sampling program, on the current mesh."""
    index = np.arange(BATCH, dtype=np.int32)
    batch = {'index': index, 'label': index % 3}
    rows = sharding.process_local_rows(BATCH)
    batch = sharding.make_global_batch({name: values[rows] for name, values in batch.items()}, BATCH)
    return sharding.put_sharded(vqvae[1]), sharding.put_sharded(params), sampling_params(), batch


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


def compile_sampler(vqvae, order):
    priors, params = make_priors(order)
    with jax.set_mesh(sharding.make_mesh(jax.devices()[:8], fsdp=2)):
        sample = inference.make_sample_fn(vqvae[0], priors, seed=0)
        arguments = make_arguments(vqvae, params)
        return sample.lower(*arguments).compile().as_text(), arguments


@pytest.mark.parametrize('order', ['raster', 'wavefront'])
def test_no_collective_runs_inside_the_sampling_loop(vqvae, order):
    text, (_, params, *_) = compile_sampler(vqvae, order)
    assert sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params)) > 10  # else the test shows nothing
    assert 'all-gather' in text  # before the loop
    found, loops = collectives_in_loops(text)
    assert loops >= 2 and not found, found


@pytest.mark.parametrize('order', ['raster', 'wavefront'])
def test_the_test_above_finds_weights_that_are_gathered_in_every_step(vqvae, order, monkeypatch):
    monkeypatch.setattr(sharding, 'constrain_replicated', lambda tree: tree)
    found, _ = collectives_in_loops(compile_sampler(vqvae, order)[0])
    assert found


@pytest.mark.parametrize('order', ['raster', 'wavefront'])
def test_samples_are_equal_on_any_devices(vqvae, order):
    priors, params = make_priors(order)
    results = []
    for devices, fsdp in ((1, 1), (2, 2), (8, 1), (8, 2)):
        with jax.set_mesh(sharding.make_mesh(jax.devices()[:devices], fsdp)):
            sample = inference.make_sample_fn(vqvae[0], priors, seed=0)
            results.append(sharding.gather_rows(sample(*make_arguments(vqvae, params))))
    first, *others = results
    assert first['image'].dtype == np.uint8 and len(np.unique(first['codes_1'].reshape(BATCH, -1), axis=0)) > BATCH // 2
    for other in others:
        for name in first:
            np.testing.assert_array_equal(first[name], other[name], err_msg=name)


def test_codes_and_reconstructions_are_equal_on_any_devices(vqvae):
    model, variables = vqvae
    image = np.random.default_rng(0).integers(0, 256, (BATCH, 16, 16, 1), np.uint8)
    results = []
    for devices, fsdp in ((1, 1), (2, 2), (8, 1), (8, 2)):
        with jax.set_mesh(sharding.make_mesh(jax.devices()[:devices], fsdp)):
            held = sharding.put_sharded(variables)
            codes = inference.make_encode_fn(model)(held, sharding.make_global_batch({'image': image}))
            results.append(sharding.gather_rows(codes | inference.make_decode_fn(model)(held, codes)))
    first, *others = results
    assert len(np.unique(first['codes_0'])) > 2 and first['image'].dtype == np.uint8
    for other in others:
        for name in first:
            np.testing.assert_array_equal(first[name], other[name], err_msg=name)


def test_log_likelihoods_agree_on_any_devices(vqvae):
    priors, params = make_priors('raster')
    image = np.random.default_rng(0).integers(0, 256, (BATCH, 16, 16, 1), np.uint8)
    batch = {'image': image, 'label': np.arange(BATCH, dtype=np.int32) % 3}
    for labeled in (True, False):
        results = []
        for devices in (1, 2, 8):
            with jax.set_mesh(sharding.make_mesh(jax.devices()[:devices])):
                function = inference.make_log_likelihood_fn(vqvae[0], priors, labeled=labeled)
                held = sharding.put_sharded(vqvae[1]), sharding.put_sharded(params)
                results.append(sharding.gather_rows(function(*held, sharding.make_global_batch(batch))))
        for other in results[1:]:
            np.testing.assert_allclose(results[0]['log_likelihood'], other['log_likelihood'], rtol=1e-5)
