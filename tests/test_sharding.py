"""Sharding of states and batches; a sharded state, recomputation and accumulation change a step only by rounding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from tests.defaults import make_prior, make_vqvae, train_config
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.distributed.batches import map_batches, map_examples
from vqvae2_jax.models.block_runner import DEFAULT, BlockRunner
from vqvae2_jax.tasks import prior, vqvae
from vqvae2_jax.training import loop

BATCH = 16
NO_STOP = {loop.SHOULD_STOP: np.zeros(BATCH, bool)}
ORDERS = {'raster': {}, 'wavefront': {'skew': 2}}


def prior_task(order='raster', **fields):
    shape = dict(shape=(4, 4), codebook_size=12, coarser_codebook_sizes=(12,), num_classes=3, kernel_size=3)
    shape |= dict(hidden_channels=16, residual_channels=16, num_residual_blocks=2, num_attention_layers=1, num_heads=2)
    shape |= dict(num_cond_blocks=1, num_output_blocks=1, dropout=0.0, attention_dropout=0.0) | ORDERS[order]
    model = make_prior(**shape | fields)
    return prior.make_task(model, 0, 1 + len(model.coarser_codebook_sizes))


def codes():
    rng = np.random.default_rng(0)
    shapes = {'codes_0': (BATCH, 4, 4), 'codes_1': (BATCH, 2, 2)}
    batch = {name: rng.integers(0, 12, shape).astype(np.int32) for name, shape in shapes.items()}
    return batch | {'label': np.arange(BATCH, dtype=np.int32) % 3}


def images():
    return {'image': np.random.default_rng(0).integers(0, 255, (BATCH, 8, 8, 1)).astype(np.uint8)}


def vqvae_task(**fields):
    shape = dict(hidden_channels=16, residual_channels=8, num_residual_blocks=1, codebook_size=12, codebook_dim=4)
    model = make_vqvae(downsample_factors=(2, 2), channels=1, **shape | fields)
    return vqvae.make_task(model, ('bottom', 'top'), 0.25, steps_per_epoch=3)


def train_a_little(task, batch, steps=3, fsdp=1, **fields):
    """The state after a few updates, on the host and on the devices."""
    config = train_config(steps=9, batch_size=BATCH, learning_rate=1e-2, warmup_steps=0, params_ema_decay=0.9, **fields)
    # Not Adam, which amplifies the rounding of gradients that are zero but for it.
    optimizer = optax.sgd(0.1, momentum=0.9)
    init = loop.make_init(task, optimizer)
    with jax.set_mesh(sharding.make_mesh(fsdp=fsdp)):
        batch = sharding.make_global_batch(batch | NO_STOP)
        layout = loop.state_sharding(jax.eval_shape(init, jax.random.key(0), batch))
        # An unsharded start is sharded afterwards: only the updates are compared.
        state = jax.device_put(jax.jit(init)(jax.random.key(0), batch), layout)
        step = loop.make_step(task, optimizer, config, layout)
        for _ in range(steps):
            state, metrics = step(state, batch)
    found = jax.device_get((state.params, state.ema_params, state.model_state, state.opt_state, metrics))
    return found, state


def assert_same(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)


@pytest.mark.parametrize('make, batch, fsdp', [(prior_task, codes(), 2), (vqvae_task, images(), 8)])
def test_a_sharded_state_trains_as_a_replicated_one(make, batch, fsdp, monkeypatch):
    monkeypatch.setattr(sharding, 'MIN_SHARDED_SIZE', 64)
    replicated, _ = train_a_little(make(), batch)
    sharded, state = train_a_little(make(), batch, fsdp=fsdp)
    assert_same(replicated, sharded)
    for tree in (state.params, state.ema_params, state.opt_state):
        big = [x for x in jax.tree.leaves(tree) if x.size >= 1024]
        assert big and all(x.addressable_shards[0].data.size == x.size // fsdp for x in big)
    for x in jax.tree.leaves(state.model_state):
        assert x.sharding.is_fully_replicated


def gradients(task):
    return jax.grad(lambda p: task.loss(p, {}, codes(), jax.random.key(1))[0])


@pytest.mark.parametrize('scan_layers', [False, pytest.param(True, marks=pytest.mark.system)])
@pytest.mark.parametrize('order', [pytest.param('raster', marks=pytest.mark.system), 'wavefront'])
def test_recomputing_changes_nothing_but_what_is_kept(order, scan_layers):
    shape = dict(
        num_residual_blocks=5, num_attention_layers=2, scan_layers=scan_layers
    )  # twice two blocks and attention, then one block
    plain, convs, again = (prior_task(order, remat=remat, **shape) for remat in ('none', 'blocks_but_convs', 'blocks'))
    params, _ = jax.jit(plain.init)(jax.random.key(0), codes())
    same_shapes = jax.tree.map(
        lambda a, b: a.shape == b.shape, params, jax.eval_shape(again.init, jax.random.key(0), codes())[0]
    )
    assert all(jax.tree.leaves(same_shapes))

    def kept(task):
        # Values that the backward pass takes from the forward one.
        _, backward = jax.eval_shape(
            lambda p: jax.vjp(lambda p: task.loss(p, {}, codes(), jax.random.key(1))[0], p), params
        )
        return sum(x.size for x in jax.tree.leaves(backward))

    def convolutions(task):
        return sum(name == 'conv_general_dilated' for name, _ in primitives(jax.make_jaxpr(gradients(task))(params)))

    expected = jax.jit(gradients(plain))(params)
    for task in (convs, again):
        found = jax.jit(gradients(task))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
    assert kept(again) < 0.3 * kept(plain) and kept(again) < kept(convs) < 0.7 * kept(plain)
    assert convolutions(plain) <= convolutions(convs) < convolutions(again)


@pytest.mark.system
@pytest.mark.parametrize('remat', ['none', 'blocks', 'blocks_but_convs'])
@pytest.mark.parametrize('order', ORDERS)
def test_a_loop_over_layers_changes_nothing_but_the_length_of_the_program(order, remat):
    def task(layers, scan_layers, attention_layers=2):
        fields = dict(num_residual_blocks=layers, num_cond_blocks=4, num_output_blocks=layers)
        fields |= dict(num_attention_layers=attention_layers)
        return prior_task(order, scan_layers=scan_layers, remat=remat, **fields)

    def length(*sizes):
        params, _ = jax.eval_shape(task(*sizes).init, jax.random.key(0), codes())
        text = jax.jit(gradients(task(*sizes))).lower(params).as_text()
        return sum('convolution' in line or 'dot_general' in line for line in text.splitlines())

    plain, looped = (
        task(8, looped, 3) for looped in (False, True)
    )  # three times two blocks and attention, then two blocks
    params, _ = jax.jit(plain.init)(jax.random.key(0), codes())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        jax.jit(gradients(plain))(params),
        jax.jit(gradients(looped))(params),
    )
    assert length(6, True, 3) == length(6, True) == length(4, True) < length(4, False) < length(6, False)


def primitives(jaxpr):
    """The name of every primitive in a jaxpr, also inside others, with its equation."""
    for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        yield equation.primitive.name, equation
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


def loops(remat, **fields):
    """The scans of a training of a prior in bfloat16 without conditions, by their equations."""
    shape = dict(shape=(8, 8), coarser_codebook_sizes=(), num_classes=0, dropout=0.1, attention_dropout=0.1)
    shape |= dict(num_residual_blocks=4, num_attention_layers=2, num_output_blocks=2, num_cond_blocks=0)
    task = prior_task(remat=remat, scan_layers=True, dtype=jnp.bfloat16, **shape | fields)
    batch = {'codes_0': np.zeros((BATCH, 8, 8), np.int32), 'label': np.zeros(BATCH, np.int32)}
    params, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
    loss = jax.grad(lambda p: task.loss(p, {}, batch, jax.random.key(1))[0])
    return [x for name, x in primitives(jax.make_jaxpr(loss)(params)) if name == 'scan']


@pytest.mark.parametrize('kind', ['keys', 'logits'])
@pytest.mark.parametrize('placement', ['inside', 'after'])
@pytest.mark.parametrize('remat', ['none', 'blocks', 'blocks_but_convs'])
def test_a_loop_over_layers_reads_no_array_that_is_the_same_in_every_step(remat, placement, kind):
    """JAX moves what does not depend on the step out of a loop, arrays of zeros and broadcast masks too."""
    found = loops(remat, dropout_placement=placement, attention_dropout_kind=kind)
    assert len(found) >= 6
    for loop_ in found:
        shared = [x.aval.shape for x in loop_.invars[: loop_.params['num_consts']]]
        assert max((np.prod(shape) for shape in shared), default=0) < BATCH * 8 * 8 * 16, shared


def test_a_loop_over_layers_takes_kernels_that_are_cast_before_it():
    kernels = [x.aval for scan in loops('blocks') for x in scan.invars if x.aval.shape[-2:] == (16, 16)]
    assert len(kernels) > 10 and all(x.dtype == jnp.bfloat16 for x in kernels)


class _Dropping(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(x) + self.param('bias', nn.initializers.zeros, ())


class _Chain(nn.Module):
    """Two chains of two."""

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
    for repeat in (DEFAULT, BlockRunner(scan=True), BlockRunner(remat='blocks', scan=True)):
        output = chain.apply(params, x, repeat, rngs={'dropout': jax.random.key(2)})
        np.testing.assert_allclose(
            jnp.mean(output > 0), 1 / 16, atol=0.03
        )  # 1 / 4 if both chains dropped the same units


@pytest.mark.parametrize('fsdp', [1, 2])
def test_accumulated_gradients_give_the_update_of_the_whole_batch(fsdp):
    whole, _ = train_a_little(prior_task(), codes())
    assert_same(whole, train_a_little(prior_task(), codes(), fsdp=fsdp, grad_accum_steps=2)[0])


def test_a_task_with_a_codebook_needs_its_whole_batch_at_once():
    with pytest.raises(ValueError, match='grad_accum_steps is 2, but a network with a codebook'):
        train_a_little(vqvae_task(), images(), grad_accum_steps=2)


def lowered_step(fsdp, **fields):
    """The text of a step of the prior before XLA's own sharding, which shows the constraints."""
    task, optimizer = prior_task(), optax.sgd(0.1)
    init, config = loop.make_init(task, optimizer), train_config(batch_size=BATCH, **fields)
    with jax.set_mesh(sharding.make_mesh(fsdp=fsdp)):
        batch = sharding.make_global_batch(codes() | NO_STOP)
        shapes = jax.eval_shape(init, jax.random.key(0), batch)
        layout = loop.state_sharding(shapes)
        step = loop.make_step(task, optimizer, config, layout)
        return step.lower(sharding.abstract_state(shapes, layout), batch)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_step_gathers_parameters_before_their_use_and_scatters_gradients(monkeypatch, accumulate):
    """Without the constraints XLA would also shard arithmetic along the parameters, or gather within the loop."""
    monkeypatch.setattr(sharding, 'MIN_SHARDED_SIZE', 64)
    shapes = jax.eval_shape(lambda: prior_task().init(jax.random.key(0), codes())[0])
    with jax.set_mesh(sharding.make_mesh(fsdp=2)):
        count = sum(not sharding.fsdp_sharding(x).is_fully_replicated for x in jax.tree.leaves(shapes))
    lines = [
        x for x in lowered_step(2, grad_accum_steps=accumulate).as_text().splitlines() if 'sharding_constraint' in x
    ]
    sharded = [line for line in lines if '"fsdp"' in line]
    total = len(jax.tree.leaves(shapes))
    assert count > 10
    # Gradients; accumulated, also the zeros and the sums of the loop.
    assert len(sharded) == count * (1 if accumulate == 1 else 3)
    assert len(lines) - len(sharded) == total + (total - count) * (1 if accumulate == 1 else 3)


def test_the_rule(monkeypatch):
    monkeypatch.setattr(sharding, 'MIN_SHARDED_SIZE', 64)
    with jax.set_mesh(sharding.make_mesh(fsdp=4)):
        spec = {shape: sharding.fsdp_sharding(jax.ShapeDtypeStruct(shape, jnp.float32)).spec for shape in
                [(3, 3, 16, 64), (64, 16), (6, 1000), (5, 7, 9), (32,)]}  # fmt: skip
    assert spec == {
        (3, 3, 16, 64): P(None, None, None, 'fsdp'),
        (64, 16): P('fsdp'),
        (6, 1000): P(None, 'fsdp'),
        (5, 7, 9): P(),  # nothing divides
        (32,): P(),  # small
    }


def test_fsdp_that_does_not_divide():
    assert dict(sharding.make_mesh(fsdp=16).shape) == {'data': 1, 'fsdp': 8}  # at most all
    with pytest.raises(ValueError, match='fsdp is 3, but there are 8 devices: choose one of 1, 2, 4, 8'):
        sharding.make_mesh(fsdp=3)


def test_without_a_mesh_an_error_says_how_to_enter_it():
    with pytest.raises(RuntimeError, match='jax.set_mesh'):
        sharding.current_mesh()


@pytest.mark.parametrize('fsdp, rows, shards', [(1, 16, 8), (4, 16, 8), (4, 6, 2), (8, 3, 1)])
def test_a_batch_is_sharded_over_all_devices_or_over_data_alone(fsdp, rows, shards):
    with jax.set_mesh(sharding.make_mesh(fsdp=fsdp)):
        assert sharding.num_batch_shards(rows) == shards
        np.testing.assert_array_equal(sharding.process_local_rows(rows), np.arange(rows))
        batch = sharding.make_global_batch({'x': np.arange(rows * 2).reshape(rows, 2)}, rows)['x']
    assert batch.addressable_shards[0].data.shape == (rows // shards, 2)
    np.testing.assert_array_equal(batch, np.arange(rows * 2).reshape(rows, 2))


class Processes:
    """Two of four devices each, in a mesh whose neighbors belong to both."""

    def __init__(self, slices):
        self.slices = slices

    def addressable_devices_indices_map(self, shape):
        return self.slices


def test_a_process_reads_the_rows_of_its_devices(monkeypatch):
    slices = {'a': (slice(6, 8),), 'b': (slice(2, 4),), 'a, along fsdp': (slice(6, 8),)}
    monkeypatch.setattr(sharding, 'batch_sharding', lambda rows: Processes(slices))
    np.testing.assert_array_equal(sharding.process_local_rows(8), [2, 3, 6, 7])


@pytest.mark.parametrize('rows, padded', [(0, 8), (1, 8), (8, 8), (9, 16), (200, 200)])
def test_batches_are_padded_to_a_multiple_of_the_devices(rows, padded):
    assert sharding.pad_batch_size(rows, sharding.make_mesh(fsdp=2)) == padded


def test_rows_come_back_whole_and_in_order():
    x = np.arange(48.0).reshape(16, 3)
    with jax.set_mesh(sharding.make_mesh(fsdp=2)):
        found = sharding.gather_rows({'x': sharding.make_global_batch({'x': x})['x']})
        np.testing.assert_array_equal(sharding.replicate_to_host(sharding.put_sharded(x)), x)
    assert type(found['x']) is np.ndarray
    np.testing.assert_array_equal(found['x'], x)


def test_pieces_are_gathered_to_all_processes_or_to_the_main_one(monkeypatch):
    monkeypatch.setattr(sharding, '_GATHER_BYTES', 5 * 3 * 8)
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    x = np.arange(48).reshape(16, 3)
    with jax.set_mesh(sharding.make_mesh(fsdp=2)):
        batch = sharding.make_global_batch({'x': x, 'label': x[:, 0]}, 16)
        for rank in (0, 1):
            monkeypatch.setattr(jax, 'process_index', lambda rank=rank: rank)
            whole, own = sharding.gather_rows(batch), sharding.gather_rows(batch, main_process_only=True)
            np.testing.assert_array_equal(whole['x'], x)
            if rank == 0:
                np.testing.assert_array_equal(own['x'], x)
            else:  # the shards of such arrays are cut and joined like those of process 0
                assert own['x'].shape == own['label'].shape == (16, 0)


def test_weights_are_put_on_the_mesh_sharded_or_replicated(monkeypatch):
    monkeypatch.setattr(sharding, 'MIN_SHARDED_SIZE', 64)
    x = np.arange(256.0).reshape(8, 32)
    with jax.set_mesh(sharding.make_mesh(fsdp=4)):
        sharded, replicated = sharding.put_sharded(x), sharding.put_replicated(x)
    assert sharded.addressable_shards[0].data.shape == (8, 8) and replicated.is_fully_replicated
    np.testing.assert_array_equal(sharded, replicated)


def test_constraints_of_arrays_inside_a_program(monkeypatch):
    monkeypatch.setattr(sharding, 'MIN_SHARDED_SIZE', 64)
    x = np.arange(256.0).reshape(8, 32)
    with jax.set_mesh(sharding.make_mesh(fsdp=4)):
        sharded = jax.jit(lambda x: sharding.constrain_sharded(x + 0))(sharding.put_replicated(x))
        replicated = jax.jit(lambda x: sharding.constrain_replicated(x + 0))(sharding.put_sharded(x))
        batch = jax.jit(lambda x: sharding.constrain_batch({'x': x + 0, 'odd': x[:3]}))(sharding.put_replicated(x))
    assert sharded.sharding.spec == P(None, 'fsdp') and replicated.is_fully_replicated
    assert batch['x'].addressable_shards[0].data.shape == (1, 32) and batch['odd'].shape == (3, 32)
    np.testing.assert_array_equal(sharded, replicated)


def test_a_process_flag_is_held_by_its_devices():
    with jax.set_mesh(sharding.make_mesh(fsdp=2)):
        assert sharding.process_flags(True).tolist() == [True] * 8
        assert sharding.process_flags(False).shape == (8,)


def test_batches_are_mapped_in_order_with_their_labels_and_masks():
    batches = [{'x': np.full(8, i), 'label': np.arange(8), 'mask': np.arange(8) < 8 - i} for i in range(3)]
    with jax.set_mesh(sharding.make_mesh()):
        found = list(map_batches(jax.jit(lambda batch: {'y': 2 * batch['x']}), batches, 8))
        assert list(map_batches(None, [], 8)) == []
    assert [part.keys() for part in found] == [{'y', 'label', 'mask'}] * 3
    for part, batch in zip(found, batches, strict=True):
        np.testing.assert_array_equal(part['y'], 2 * batch['x'])
        np.testing.assert_array_equal(part['mask'], batch['mask'])


@pytest.mark.parametrize('count', [1, 8, 21])
def test_examples_of_any_number_are_mapped(count):
    x = np.arange(count * 2).reshape(count, 2)
    with jax.set_mesh(sharding.make_mesh()):
        found = map_examples(jax.jit(lambda batch: {'y': -batch['x']}), {'x': x}, 8)
    np.testing.assert_array_equal(found['y'], -x)


def test_the_mesh_is_described():
    assert processes.describe_mesh(sharding.make_mesh(fsdp=2)) == '8 x cpu in 1 process, mesh data=4 fsdp=2'
