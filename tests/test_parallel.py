"""How a step is computed changes nothing but rounding: parameters cut over devices, recomputation, accumulation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from vqvae2_jax.distributed import sharding
from vqvae2_jax.models.block_runner import DEFAULT, BlockRunner
from vqvae2_jax.models.raster import RasterPrior
from vqvae2_jax.models.vqvae import VQVAE
from vqvae2_jax.models.wavefront import WavefrontPrior
from vqvae2_jax.tasks import prior, vqvae
from vqvae2_jax.training import loop, optim

BATCH = 16
GO_ON = {loop.SHOULD_STOP: np.zeros(BATCH, bool)}
MODULES = {'raster': RasterPrior, 'wavefront': WavefrontPrior}


def prior_task(order='raster', **fields):
    shape = dict(hidden=16, residual=16, layers=2, kernel=3, attention_layers=1, heads=2, condition_layers=1)
    shape |= dict(output_layers=1) | fields
    model = MODULES[order]((4, 4), 12, (12,), num_classes=3, **shape)
    return prior.make_task(model, 0, 2)


def codes():
    rng = np.random.default_rng(0)
    shapes = {'codes_0': (BATCH, 4, 4), 'codes_1': (BATCH, 2, 2)}
    batch = {name: rng.integers(0, 12, shape).astype(np.int32) for name, shape in shapes.items()}
    return batch | {'label': np.arange(BATCH, dtype=np.int32) % 3}


def images():
    return {'image': np.random.default_rng(0).integers(0, 255, (BATCH, 8, 8, 1)).astype(np.uint8)}


def vqvae_task():
    model = VQVAE((2, 2), channels=1, hidden=16, residual=8, layers=1, codebook_size=12, codebook_dim=4)
    return vqvae.make_task(model, ('bottom', 'top'), 0.25, steps_per_epoch=3)


def train_a_little(stage, batch, steps=3, **fields):
    """The state after a few updates, on the host and as it lies on the devices."""
    training = optim.Training(steps=9, batch_size=BATCH, learning_rate=1e-2, params_ema_decay=0.9, **fields)
    # Not Adam, which blows up the rounding of gradients that are zero but for it.
    optimizer, batch = optax.sgd(0.1, momentum=0.9), sharding.make_global_batch(batch | GO_ON)
    init = loop.make_init(stage, optimizer)
    layout = loop.state_sharding(jax.eval_shape(init, jax.random.key(0), batch))
    # The plain start is cut afterwards: only the updates are compared.
    state = jax.device_put(jax.jit(init)(jax.random.key(0), batch), layout)
    step = loop.make_step(stage, optimizer, training, layout)
    for _ in range(steps):
        state, metrics = step(state, batch)
    found = jax.device_get((state.params, state.ema_params, state.variables, state.opt_state, metrics))
    return found, state


def assert_same(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)


@pytest.mark.parametrize('make, batch', [(prior_task, codes()), (vqvae_task, images())])
@pytest.mark.parametrize('fsdp', [2, 8])
def test_a_state_cut_over_devices_trains_as_a_whole_one(make, batch, fsdp, monkeypatch):
    monkeypatch.setattr(parallel, '_SMALL', 64)
    whole, _ = train_a_little(make(), batch)
    with parallel.use(sharding.make_mesh(fsdp=fsdp)):
        cut, state = train_a_little(make(), batch)
    assert_same(whole, cut)
    for tree in (state.params, state.ema_params, state.opt_state):
        big = [x for x in jax.tree.leaves(tree) if x.size >= 1024]
        assert big and all(x.addressable_shards[0].data.size == x.size // fsdp for x in big)
    for x in jax.tree.leaves(state.variables):
        assert x.sharding.is_fully_replicated


def gradients(stage):
    return jax.grad(lambda p: stage.loss(p, {}, codes(), jax.random.key(1))[0])


@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize('order', MODULES)
def test_recomputing_changes_nothing_but_what_is_kept(order, scan_layers):
    shape = dict(layers=5, attention_layers=2, scan_layers=scan_layers)  # twice two blocks and attention, and a block
    plain, again = prior_task(order, **shape), prior_task(order, remat=True, **shape)
    params, _ = jax.jit(plain.init)(jax.random.key(0), codes())
    same_shapes = jax.tree.map(
        lambda a, b: a.shape == b.shape, params, jax.eval_shape(again.init, jax.random.key(0), codes())[0]
    )
    assert all(jax.tree.leaves(same_shapes))

    def kept(stage):
        # Values that the backward pass takes from the forward one.
        _, backward = jax.eval_shape(
            lambda p: jax.vjp(lambda p: stage.loss(p, {}, codes(), jax.random.key(1))[0], p), params
        )
        return sum(x.size for x in jax.tree.leaves(backward))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        jax.jit(gradients(plain))(params),
        jax.jit(gradients(again))(params),
    )
    assert kept(again) < 0.3 * kept(plain)


@pytest.mark.system
@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize('order', MODULES)
def test_a_loop_over_layers_changes_nothing_but_the_length_of_the_program(order, remat):
    def stage(layers, scan_layers, attention_layers=2):
        fields = dict(layers=layers, condition_layers=4, attention_layers=attention_layers, output_layers=layers)
        return prior_task(order, scan_layers=scan_layers, remat=remat, **fields)

    def length(*sizes):
        params, _ = jax.eval_shape(stage(*sizes).init, jax.random.key(0), codes())
        text = jax.jit(gradients(stage(*sizes))).lower(params).as_text()
        return sum('convolution' in line or 'dot_general' in line for line in text.splitlines())

    plain, looped = (stage(8, looped, 3) for looped in (False, True))  # thrice two blocks and attention, and two blocks
    params, _ = jax.jit(plain.init)(jax.random.key(0), codes())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        jax.jit(gradients(plain))(params),
        jax.jit(gradients(looped))(params),
    )
    assert length(6, True, 3) == length(6, True) == length(4, True) < length(4, False) < length(6, False)


class _Dropping(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(x) + self.param('bias', nn.initializers.zeros, ())


class _Chain(nn.Module):
    """Of two chains of two."""

    inner: bool = False

    def setup(self):
        self.blocks = [_Dropping() if self.inner else _Chain(inner=True) for _ in range(2)]

    def __call__(self, x, repeat):
        def call(block, x, _):
            return block(x) if self.inner else block(x, repeat)

        return repeat.run(call, self.blocks, x)[0]


def test_a_loop_of_loops_drops_other_units_in_each_layer():
    keys = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
    chain, x = _Chain(), jnp.ones(1000)
    params = chain.init(keys, x, DEFAULT)
    for repeat in (DEFAULT, BlockRunner(scan=True), BlockRunner(remat=True, scan=True)):
        output = chain.apply(params, x, repeat, rngs={'dropout': jax.random.key(2)})
        np.testing.assert_allclose(jnp.mean(output > 0), 1 / 16, atol=0.03)  # 1 / 4, were both chains alike


@pytest.mark.parametrize('fsdp', [1, 2])
def test_a_batch_in_parts_gives_the_update_of_the_whole(fsdp):
    whole, _ = train_a_little(prior_task(), codes())
    with parallel.use(sharding.make_mesh(fsdp=fsdp)):
        assert_same(whole, train_a_little(prior_task(), codes(), accumulate=2)[0])


def test_a_stage_with_a_codebook_takes_its_batch_at_once():
    with pytest.raises(ValueError, match='takes its batch at once'):
        train_a_little(vqvae_task(), images(), accumulate=2)


def test_the_rule(monkeypatch):
    monkeypatch.setattr(parallel, '_SMALL', 64)
    with parallel.use(sharding.make_mesh(fsdp=4)):
        spec = {shape: sharding.fsdp_sharding(jax.ShapeDtypeStruct(shape, jnp.float32)).spec for shape in
                [(3, 3, 16, 64), (64, 16), (6, 1000), (5, 7, 9), (32,)]}  # fmt: skip
    assert spec == {
        (3, 3, 16, 64): P(None, None, None, 'fsdp'),
        (64, 16): P(
            'fsdp',
        ),
        (6, 1000): P(None, 'fsdp'),
        (5, 7, 9): P(),  # nothing divides
        (32,): P(),  # small
    }


def test_fsdp_that_does_not_divide():
    assert dict(sharding.make_mesh(fsdp=16).shape) == {'data': 1, 'fsdp': 8}  # at most all
    with pytest.raises(ValueError, match='fsdp is 3, but there are 8 devices: choose one of 1, 2, 4, 8'):
        sharding.make_mesh(fsdp=3)
