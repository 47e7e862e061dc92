"""Kernels against their references, in interpret mode on CPU devices, and the selection of implementations."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_sharding import images, train_a_little, vqvae_task
from vqvae2_jax.config import build
from vqvae2_jax.distributed import per_shard, sharding
from vqvae2_jax.jobs import train
from vqvae2_jax.kernels import attention, nearest, select
from vqvae2_jax.models import quantizer

lookup = functools.partial(nearest.nearest, interpret=True)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(
    'shape, codes', [((3, 5, 7, 5), 1), ((1, 1), 7), ((2, 16, 16, 64), 100), ((600, 33), 200), ((2000, 8), 512)]
)
def test_the_lookup_is_its_reference_but_for_ties(dtype, shape, codes):
    rng = np.random.default_rng(0)
    # A common offset, so that rounding to fewer than 24 bits changes codes.
    vectors = jnp.asarray(30 + rng.normal(size=shape), dtype)
    codebook = jnp.asarray(30 + rng.normal(size=(codes, shape[-1])), jnp.float32)
    found, expected = lookup(vectors, codebook), quantizer.nearest(vectors, codebook)
    assert found.shape == expected.shape and found.dtype == jnp.int32
    exact = np.asarray(vectors, np.float64)[..., None, :] - np.asarray(codebook, np.float64)
    distances = (exact**2).sum(-1)
    chosen = np.take_along_axis(distances, np.asarray(found)[..., None], -1)[..., 0]
    # Rounding is relative to |e|^2, of which the kernel and the reference compare differences.
    rounding = 4 * np.finfo(np.float32).eps * 31**2 * shape[-1]
    np.testing.assert_array_less(chosen - distances.min(-1), rounding)
    apart = np.sort(distances, -1)[..., 1:2] - distances.min(-1, keepdims=True) > 2 * rounding
    same = np.asarray(found == expected)[..., None]
    assert codes == 1 or same[apart].all()


def test_deep_vectors_take_the_reference():
    for dtype, most in ((jnp.bfloat16, 128), (jnp.float16, 64), (jnp.float32, 64)):
        shapes = [jax.ShapeDtypeStruct((4, depth), dtype) for depth in (most, most + 1)]
        kernels = ['pallas_call' in str(jax.make_jaxpr(lookup)(shape, shape)) for shape in shapes]
        assert kernels == [True, False]


def test_the_lowest_index_wins_a_tie_within_and_across_chunks():
    rows = np.random.default_rng(0).integers(-8, 8, (200, 16)).astype(np.float32)
    rows[[40, 67, 70, 190]] = rows[3]  # 67 has the place of 3 in the next chunk
    rows[[128, 130, 131]] = rows[64]
    vectors = jnp.asarray(rows)
    expected = quantizer.nearest(vectors, rows)
    assert expected[190] == 3 and expected[131] == 64
    np.testing.assert_array_equal(lookup(vectors, rows), expected)
    np.testing.assert_array_equal(lookup(vectors.astype(jnp.bfloat16), rows), expected)


def test_codes_that_fill_the_last_chunk_are_never_found():
    codebook = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    found = lookup(jnp.zeros((3, 16)), codebook)  # nearer to a row of zeros than to the codebook
    assert found.tolist() == [np.argmin((codebook**2).sum(-1))] * 3


def test_three_parts_are_a_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(-10, 10).repeat(50), jnp.float32)
    parts = jax.jit(nearest._split)(x)
    assert all(part.dtype == jnp.bfloat16 for part in parts)
    np.testing.assert_array_equal(sum(np.asarray(part, np.float64) for part in parts), np.asarray(x, np.float64))


@pytest.mark.parametrize('batch, rows', [(16, 2), (4, 1), (3, 3)])
def test_every_device_looks_up_its_own_rows(batch, rows):
    shapes = []

    def recording(vectors, codebook):
        shapes.append(vectors.shape)
        return lookup(vectors, codebook)

    vectors, codebook = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(batch, 3, 5), (9, 5)]))
    with jax.set_mesh(sharding.make_mesh(fsdp=2)):
        shard = sharding.batch_sharding(batch) if batch > 3 else sharding.replicated_sharding()
        found = jax.jit(per_shard.over_batch(recording), in_shardings=(shard, sharding.replicated_sharding()))
        compiled = found.lower(vectors, codebook).compile()
        np.testing.assert_array_equal(found(vectors, codebook), quantizer.nearest(vectors, codebook))
    assert set(shapes) == {(rows, 3, 5)}
    assert 'all-gather' not in compiled.as_text()


def test_without_a_mesh_the_function_gets_the_whole_batch():
    vectors, codebook = jnp.eye(5)[None], jnp.eye(5)[::-1]
    assert per_shard.over_batch(lookup)(vectors, codebook).tolist() == [[4, 3, 2, 1, 0]]


@pytest.mark.system
def test_training_with_the_kernel_is_training_with_the_reference():
    states = [
        train_a_little(vqvae_task(nearest=function), images(), fsdp=2)[0]
        for function in (quantizer.nearest, per_shard.over_batch(lookup))
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *states)


def device(platform, **fields):
    return types.SimpleNamespace(platform=platform, **fields)


@pytest.mark.parametrize('capability', ['8.0', '9.0', '10.0'])
def test_recent_nvidia_gpus_get_kernels(capability):
    selected = select.for_device(device('gpu', compute_capability=capability))
    assert selected.nearest is not quantizer.nearest and selected.attend is attention.attend


@pytest.mark.parametrize('capability', ['8.6', '8.9', '12.0'])
def test_gpus_with_small_blocks_get_attention_alone(capability):
    selected = select.for_device(device('gpu', compute_capability=capability))
    assert selected == select.Implementations(attend=attention.attend)


@pytest.mark.parametrize(
    'other', [device('cpu'), device('tpu'), *(device('gpu', compute_capability=c) for c in ('7.5', 'gfx942'))]
)
def test_other_devices_get_references(other):
    assert select.for_device(other) == select.REFERENCES


def test_modules_use_references_unless_training_gives_others(config, monkeypatch):
    assert build.make_vqvae(config).nearest is quantizer.nearest
    given = select.Implementations(nearest=lookup)
    assert build.networks(config, given)['vqvae'][0].nearest is lookup

    def stop(*_, implementations, **__):
        raise StopIteration(implementations)

    monkeypatch.setattr(train, 'make_task', stop)
    monkeypatch.setattr(select, 'for_device', lambda _: given)
    with pytest.raises(StopIteration) as stopped:
        train._train(types.SimpleNamespace(config=config, mesh=sharding.make_mesh()), 'vqvae', None, None, '')
    assert stopped.value.value is given
