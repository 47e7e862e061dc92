"""The training loop: the update, restarts after signals and kills, and the best weights."""

import os
import signal
import time
import types

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.defaults import make_vqvae, train_config
from vqvae2_jax.data.loader import eval_batches, train_batches
from vqvae2_jax.distributed import sharding
from vqvae2_jax.distributed.preemption import Interrupted
from vqvae2_jax.io import files
from vqvae2_jax.io.logging import RUNTIME_FIELDS, read_metrics
from vqvae2_jax.tasks import vqvae
from vqvae2_jax.tasks.task import Task
from vqvae2_jax.training import loop, optim, state
from vqvae2_jax.training.checkpoint import BestCheckpoint, CheckpointMismatch, Checkpoints
from vqvae2_jax.training.finite import NonFiniteLoss
from vqvae2_jax.training.loop import Data, make_eval_fn, train

BATCH = 16
NO_STOP = {loop.SHOULD_STOP: np.zeros(BATCH, bool)}


class Images:
    """Forty images of stripes and noise, 8x8."""

    def __len__(self):
        return 40

    def read(self, index, zoom=1.0, offset=(0.5, 0.5)):
        noise = np.random.default_rng(index).integers(0, 120, (8, 8, 1))
        stripes = 120 * (np.arange(8)[:, None, None] % (index % 4 + 2) == 0)
        return {'image': (noise + stripes).astype(np.uint8), 'label': np.int32(index % 3), 'index': np.int64(index)}

    __getitem__ = read


class Watched(grain.DatasetIterator):
    """Notes which examples each batch holds, and acts before it hands out a batch of a certain number."""

    def __init__(self, iterator, at=None, action=None):
        super().__init__()
        self.iterator, self.at, self.action, self.seen = iterator, at, action, {}

    def __next__(self):
        number = self.iterator.get_state()['next_batch']
        if number == self.at:
            self.at = None
            self.action()
        batch = next(self.iterator)
        self.seen[number] = batch['index'].tolist()
        return batch

    def get_state(self):
        return self.iterator.get_state()

    def set_state(self, state):
        self.iterator.set_state(state)
        self.seen = {number: rows for number, rows in self.seen.items() if number < state['next_batch']}


def small_task(num_residual_blocks=1):
    shape = dict(hidden_channels=8, residual_channels=4, num_residual_blocks=num_residual_blocks)
    shape |= dict(downsample_factors=(2, 2), channels=1, codebook_size=12, codebook_dim=4)
    model = make_vqvae(dead_code_threshold=0.3, **shape)
    return vqvae.make_task(model, ('bottom', 'top'), 0.25, steps_per_epoch=3)


# Log, evaluation and checkpoint fall on different steps, so a stop finds each of them at another distance.
CONFIG = train_config(
    steps=11, batch_size=BATCH, learning_rate=3e-3, warmup_steps=2, lr_schedule='cosine', clip_norm=0.5,
    weight_decay=1e-3, params_ema_decay=0.9, log_every=3, eval_every=4, save_every=5,
)  # fmt: skip


def train_small(directory, at=None, action=None, config=CONFIG):
    """Trains on the images; returns the iterator. Interrupted and `Killed` end it as they end a process."""
    images = Images()
    batches = train_batches(images, batch_size=BATCH, seed=4, flip=True)
    first, batches = batches.peek(), Watched(batches, at, action)
    data = Data(batches, lambda: eval_batches(images, batch_size=BATCH), first)
    try:
        train(small_task(), config, data, directory, mesh=sharding.make_mesh(), name='test', seed=3)
    except (Interrupted, Killed) as error:
        batches.ended = error
    return batches


class Killed(Exception):
    """No chance to save."""


def kill():
    raise Killed


def saved_state(directory, config=CONFIG, task=None):
    """The newest checkpoint's leaves by path, and its step."""
    iterator, checkpoints = train_batches(Images(), batch_size=BATCH, seed=4, flip=True), Checkpoints(directory)
    data, optimizer = Data(iterator, None, iterator.peek()), optim.make_optimizer(config)
    with jax.set_mesh(sharding.make_mesh()):
        restored, step, _ = loop.restore_or_init(
            task or small_task(), optimizer, data, checkpoints, seed=3, batch_size=BATCH
        )
    assert iterator.get_state() == {'next_batch': step}
    iterator.close()
    checkpoints.close()
    return leaves(restored), step


def leaves(tree):
    tree = tree.replace(key=jax.random.key_data(tree.key))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def reproducible_metrics(directory):
    return [{k: v for k, v in row.items() if k not in RUNTIME_FIELDS} for row in read_metrics(directory)]


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    return (directory := tmp_path_factory.mktemp('uninterrupted')), train_small(directory)


def test_a_checkpoint_of_another_network_is_refused(uninterrupted):
    with pytest.raises(CheckpointMismatch, match=r'(?s)checkpoints/\d+ does not fit the train state.*delete'):
        saved_state(uninterrupted[0], task=small_task(num_residual_blocks=2))


def first_state(task, config):
    images = [Images()[i] for i in range(BATCH)]
    batch = {name: np.stack([image[name] for image in images]) for name in images[0]}
    params, model_state = jax.jit(task.init)(jax.random.key(0), batch)
    optimizer = optim.make_optimizer(config)
    return state.create(params, model_state, jax.random.key(1), optimizer), batch, optimizer


def test_every_part_of_the_state_moves_in_a_step_and_the_key_stays():
    task, config = small_task(), train_config(steps=9, batch_size=BATCH, learning_rate=1e-3)
    before, batch, optimizer = first_state(task, config)
    old = leaves(before)
    with jax.set_mesh(sharding.make_mesh()):
        step = loop.make_step(task, optimizer, config, loop.state_sharding(before))
        after, metrics = step(before, sharding.make_global_batch(batch | NO_STOP))
    still = [name for name, value in leaves(after).items() if np.array_equal(value, old[name])]
    # The age of a code that is used in every batch stays 0.
    assert [name for name in still if 'age' not in name] == ['.key']
    assert float(metrics['loss']) > 0 and int(after.step) == 1


def test_eight_devices_train_as_one():
    config = train_config(steps=9, batch_size=BATCH, learning_rate=1e-3, params_ema_decay=0.9)
    task, mesh = small_task(), sharding.make_mesh()
    one, batch, optimizer = first_state(task, config)
    with jax.set_mesh(mesh):
        many = jax.device_put(jax.tree.map(jnp.copy, one), sharding.replicated_sharding())
        step = loop.make_step(task, optimizer, config, loop.state_sharding(one))

    @jax.jit
    def plain_step(state_, batch):
        key = jax.random.fold_in(state_.key, state_.step)
        gradients, (model_state, _) = jax.grad(task.loss, has_aux=True)(state_.params, state_.model_state, batch, key)
        return state.update(state_, gradients, model_state, optimizer, config.params_ema_decay)

    for _ in range(3):
        one = plain_step(one, batch)
        with jax.set_mesh(mesh):
            many, _ = step(many, sharding.make_global_batch(batch | NO_STOP))
    assert jax.device_count() == 8 and len(many.step.sharding.device_set) == 8
    one, many = leaves(one), leaves(many)
    assert one.keys() == many.keys()
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, atol=1e-5, rtol=1e-4, err_msg=name)
    counts = [value for name, value in many.items() if name.endswith("['counts']")]
    # Of the global batch, not of one device's shard; a restarted code adds its share.
    np.testing.assert_allclose(sorted(c.sum() for c in counts), [BATCH * 2 * 2, BATCH * 4 * 4], rtol=0.1)


@pytest.mark.parametrize('stop_signal, at', [(signal.SIGTERM, 6), (signal.SIGINT, 7)])
def test_stopped_and_continued_equals_never_stopped(tmp_path, uninterrupted, stop_signal, at):
    directory, whole = uninterrupted
    stopped = train_small(tmp_path, at, lambda: os.kill(os.getpid(), stop_signal))
    assert stopped.ended.code == 128 + stop_signal
    assert at < Checkpoints(tmp_path).latest_step() <= at + 2  # the steps at hand are finished, and nothing is lost
    assert signal.getsignal(stop_signal) is not signal.SIG_IGN
    continued = train_small(tmp_path)
    assert at < min(continued.seen) <= at + 2
    assert stopped.seen | continued.seen == whole.seen
    assert_same_run(tmp_path, directory)


@pytest.mark.parametrize('at', [3, 10])
def test_killed_and_continued_equals_never_stopped(tmp_path, uninterrupted, at):
    directory, whole = uninterrupted
    killed = train_small(tmp_path, at, kill)
    assert isinstance(killed.ended, Killed)
    continued = train_small(tmp_path)
    assert min(continued.seen) == at // 5 * 5  # after the last periodic checkpoint, or from the start
    assert killed.seen | continued.seen == whole.seen
    assert_same_run(tmp_path, directory)


def assert_same_run(directory, reference):
    (found, step), (expected, expected_step) = saved_state(directory), saved_state(reference)
    assert step == expected_step == CONFIG.steps and found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert reproducible_metrics(directory) == reproducible_metrics(reference)
    assert kept(directory) == kept(reference)
    jax.tree.map(np.testing.assert_array_equal, BestCheckpoint(directory).load(), BestCheckpoint(reference).load())


def kept(directory):
    return {name: value for name, value in BestCheckpoint(directory).best().items() if name in ('step', 'metrics')}


def test_a_signal_during_the_last_step_is_not_swallowed(tmp_path):
    last = train_small(tmp_path, CONFIG.steps - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert last.ended.code == 143
    assert not train_small(tmp_path).seen  # all was done


def test_data_differ_between_epochs(uninterrupted):
    order = sum((rows for _, rows in sorted(uninterrupted[1].seen.items())), [])
    assert sorted(order[:40]) == sorted(order[40:80]) == list(range(40))
    assert order[:40] != order[40:80]


# A task that can be computed by hand: Adam moves w by the learning rate in every step.


class Numbers(grain.DatasetIterator):
    """Batch n is eight times the number n."""

    def __init__(self, at=None, action=None):
        super().__init__()
        self.number, self.at, self.action = 0, at, action

    def __next__(self):
        if self.number == self.at:
            self.action()
        self.number += 1
        return {'x': np.full(8, self.number - 1, np.float32)}

    def fall_back_to_threads(self):
        self.at = None

    def get_state(self):
        return {'number': self.number}

    def set_state(self, state):
        self.number = state['number']


def toy_task(distance=lambda w: jnp.abs(w - 3), bad_batch=-1, bad_gradient=-1):
    def loss(params, model_state, batch, key):
        number = jnp.mean(batch['x'])
        value = jnp.where(number == bad_batch, jnp.nan, -jnp.sum(params['w']))
        bad = number == bad_gradient
        nothing = jnp.sum(params['w'] - jax.lax.stop_gradient(params['w']))
        value += jnp.where(bad, jnp.sqrt(jnp.where(bad, nothing, 1.0)), 0.0)  # at 0 the root is 0, its slope infinite
        return value, (model_state, {'loss': value})

    def eval_step(params, model_state, batch):
        return {'distance': distance(params['w'][0]) + 0 * batch['x'], 'x': batch['x']}

    def init(key, batch):
        return {'w': jnp.zeros(2)}, {}

    def reduce_metrics(means):
        return {name: float(value) for name, value in means.items()}

    return Task(init, loss, eval_step, reduce_metrics, best_metric='distance')


def val():
    return Pass(count=1)


def train_toy(directory, task, data=None, val=val, **fields):
    defaults = {'steps': 8, 'learning_rate': 1.0, 'params_ema_decay': 0.0, 'eval_every': 1, 'save_every': 2}
    config = train_config(batch_size=8, **defaults | fields)
    data = Data(data or Numbers(), val, {'x': np.zeros(8, np.float32)})
    return train(task, config, data, directory, mesh=sharding.make_mesh(), name='toy', seed=0)


def test_the_best_weights_are_kept_and_not_the_last(tmp_path):
    result = train_toy(tmp_path, toy_task())
    assert result['steps'] == 8 and result['parameters'] == 2
    assert BestCheckpoint(tmp_path).best()['step'] == 3
    np.testing.assert_allclose(BestCheckpoint(tmp_path).load()['params']['w'], [3, 3], atol=1e-4)
    distances = [row['validation/distance'] for row in read_metrics(tmp_path) if 'validation/distance' in row]
    np.testing.assert_allclose(distances, [2, 1, 0, 1, 2, 3, 4, 5], atol=1e-3)


def test_the_weights_kept_are_the_averages(tmp_path):
    train_toy(tmp_path, toy_task(), steps=3, params_ema_decay=0.9)
    average = 0.0
    for step in range(3):
        decay = (1 + step) / (10 + step)
        average = decay * average + (1 - decay) * (step + 1)
    np.testing.assert_allclose(BestCheckpoint(tmp_path).load()['params']['w'], [average] * 2, rtol=1e-4)


@pytest.mark.parametrize('at', [4, 5])
def test_a_restart_keeps_the_best_weights(tmp_path, at):
    train_toy(tmp_path / 'whole', toy_task())
    with pytest.raises(Killed):
        train_toy(tmp_path / 'run', toy_task(), Numbers(at, kill))
    before = kept(tmp_path / 'run')
    train_toy(tmp_path / 'run', toy_task())
    assert kept(tmp_path / 'run') == before == kept(tmp_path / 'whole')
    expected = BestCheckpoint(tmp_path / 'whole').load()['params']['w']
    np.testing.assert_array_equal(BestCheckpoint(tmp_path / 'run').load()['params']['w'], expected)
    directory = BestCheckpoint(tmp_path / 'run').best()['directory']
    assert sorted(p.name for p in (tmp_path / 'run' / 'weights').iterdir()) == sorted([directory, 'best.json'])


def test_of_equals_the_later_weights_are_kept(tmp_path):
    train_toy(tmp_path, toy_task(distance=lambda w: 0 * w))
    assert BestCheckpoint(tmp_path).best()['step'] == 8
    np.testing.assert_allclose(BestCheckpoint(tmp_path).load()['params']['w'], [8, 8], atol=1e-3)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_loses_nothing(tmp_path):
    with pytest.raises(NonFiniteLoss, match='^loss is nan at step 6$'):
        train_toy(tmp_path, toy_task(bad_batch=5))
    assert Checkpoints(tmp_path).latest_step() == 4
    assert max(row['step'] for row in read_metrics(tmp_path)) == 5
    train_toy(tmp_path, toy_task())  # the cause removed, the same command goes on
    assert Checkpoints(tmp_path).latest_step() == 8
    np.testing.assert_allclose(BestCheckpoint(tmp_path).load()['params']['w'], [3, 3], atol=1e-4)


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path):
    with pytest.raises(NonFiniteLoss, match='gradient_norm is (nan|inf) at step 6'):  # where a checkpoint is due
        train_toy(tmp_path, toy_task(bad_gradient=5), eval_every=7)
    assert Checkpoints(tmp_path).latest_step() == 4
    train_toy(tmp_path, toy_task(), eval_every=7)
    np.testing.assert_allclose(BestCheckpoint(tmp_path).load()['params']['w'], [7, 7], atol=1e-3)


def terminate():
    """As a signal to the whole process group does: it reaches this process and ends its workers."""
    os.kill(os.getpid(), signal.SIGTERM)
    raise RuntimeError('Worker process was terminated unexpectedly')


def raise_own():
    raise RuntimeError('their own')


def test_workers_that_a_signal_ended_are_done_without_until_the_stop(tmp_path):
    with pytest.raises(Interrupted):
        train_toy(tmp_path, toy_task(), Numbers(5, terminate))
    assert Checkpoints(tmp_path).latest_step() == 6  # other processes need this one's part of the batch
    with pytest.raises(RuntimeError, match='their own'):
        train_toy(tmp_path, toy_task(), Numbers(7, raise_own))  # without a signal it is an error


class Pass:
    """The validation batch, `count` times; notes its end."""

    def __init__(self, action=lambda: None, count=2):
        self.batches = [{'x': np.arange(8, dtype=np.float32), 'mask': np.ones(8, bool)}] * count
        self.action, self.closed = action, False

    def __iter__(self):
        return self

    def __next__(self):
        self.action()
        if not self.batches:
            raise StopIteration
        return self.batches.pop()

    def peek(self):
        return self.batches[-1]

    def fall_back_to_threads(self):
        self.action = lambda: None

    def close(self):
        self.closed = True


def test_an_evaluation_whose_workers_a_signal_ended_is_finished(tmp_path):
    passes = []

    def ended_once():
        passes.append(Pass(terminate) if len(passes) == 2 else Pass())
        return passes[-1]

    with pytest.raises(Interrupted):
        train_toy(tmp_path, toy_task(), val=ended_once)
    assert Checkpoints(tmp_path).latest_step() == 4
    assert [row['step'] for row in read_metrics(tmp_path) if 'validation/distance' in row] == [1, 2, 3, 4]
    with pytest.raises(RuntimeError, match='their own'):
        train_toy(tmp_path, toy_task(), val=lambda: Pass(raise_own))


def test_passes_over_the_validation_examples_are_closed(tmp_path):
    opened = []

    def open_one():
        opened.append(Pass())
        return opened[-1]

    task = toy_task()._replace(image_labels=('x',), visualize=lambda *_: [jnp.zeros((1, 8, 8, 1))])
    train_toy(tmp_path, task, val=open_one, image_every=4)
    assert len(opened) == 8 + 2 and all(one.closed for one in opened)


def test_evaluation_is_exact_on_a_ragged_last_batch():
    source = [{'x': np.float32(value), 'index': np.int64(i)} for i, value in enumerate(np.arange(21) ** 2)]
    with jax.set_mesh(sharding.make_mesh()):
        mean = make_eval_fn(toy_task())
        found = mean({'w': jnp.ones(2)}, {}, eval_batches(source, batch_size=8))
        np.testing.assert_allclose(found['x'], np.mean(np.arange(21) ** 2), rtol=1e-6)
        assert found['distance'] == 2
        with pytest.raises(ValueError, match='no example to evaluate on'):
            mean({'w': jnp.ones(2)}, {}, [{'x': np.ones(8, np.float32), 'mask': np.zeros(8, bool)}])


@pytest.mark.parametrize('value', [jnp.nan, jnp.inf])
def test_an_evaluation_that_is_not_finite_stops_with_its_step_and_keeps_nothing_of_it(tmp_path, value):
    task = toy_task(distance=lambda w: jnp.where(w > 4.5, value, 5 - w))
    with pytest.raises(NonFiniteLoss, match=f'^distance is {value} in the evaluation at step 5$') as error:
        train_toy(tmp_path, task)
    assert max(error.value.saved_steps) == 4 == Checkpoints(tmp_path).latest_step()
    assert BestCheckpoint(tmp_path).best()['step'] == 4
    assert max(row['step'] for row in read_metrics(tmp_path) if 'validation/distance' in row) == 4
    with pytest.raises(NonFiniteLoss, match='at step 1$') as error:
        train_toy(tmp_path / 'other', toy_task(distance=lambda w: w * jnp.nan))
    assert not error.value.saved_steps and not BestCheckpoint(tmp_path / 'other').best()


def test_a_nan_of_stage_1_is_found_before_the_psnr_is_taken():
    with jax.set_mesh(sharding.make_mesh()):
        before, batch, _ = first_state(small_task(), CONFIG)
        broken = jax.tree.map(lambda x: x * jnp.nan, before.params)
        eval_fn = make_eval_fn(small_task())
        with pytest.raises(NonFiniteLoss, match='^mse is nan.* in the evaluation'):
            eval_fn(broken, before.model_state, [batch | {'mask': np.ones(BATCH, bool)}])


def test_images_are_made_outside_the_mesh_on_one_device(tmp_path):
    def visualize(params, model_state, batch):
        assert jax.sharding.get_abstract_mesh().empty
        return [jnp.zeros((len(batch['x']), 8, 8, 1))]

    train_toy(tmp_path, toy_task()._replace(image_labels=('x',), visualize=visualize), image_every=4)
    assert sorted(path.name for path in (tmp_path / 'pictures').iterdir()) == ['validation-4.png', 'validation-8.png']


def overfit_task():
    """The training NLL falls with every step; the validation NLL rises from step 3 on."""
    task = toy_task(distance=lambda w: 10 + jnp.abs(w - 3))

    def loss(*arguments):
        value, (model_state, metrics) = task.loss(*arguments)
        return value, (model_state, {'nll': 100 + value, **metrics})

    def reduce_metrics(means):
        return {'nll': float(means['distance']), 'distance': float(means['distance'])}

    return task._replace(loss=loss, reduce_metrics=reduce_metrics)


def test_warnings_are_printed_once_also_over_a_restart(tmp_path, capsys):
    fields = {'warn_overfit': 0.15, 'log_every': 1}
    train_toy(tmp_path, overfit_task(), **fields)
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning: ')]
    assert len(warned) == 1 and warned[0].startswith('warning: toy, step 5: the validation nll is 12, 20.0% above')
    train_toy(tmp_path, overfit_task(), **fields, steps=10)
    assert 'warning: ' not in capsys.readouterr().out
    train_toy(tmp_path / 'other', overfit_task(), **fields | {'warn_overfit': 0.0})
    assert 'warning: ' not in capsys.readouterr().out


def test_a_disk_that_the_next_checkpoint_may_fill_is_warned_of_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files.shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=100))
    train_toy(tmp_path, toy_task())  # four saves
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning: ')]
    assert len(warned) == 1 and f'the disk of {tmp_path} has 0.0001 MB left' in warned[0]
    train_toy(tmp_path / 'other', toy_task(), warn_free_space=0.0)
    assert 'warning: ' not in capsys.readouterr().out


def traces(directory):
    return list((directory / 'profile').rglob('*.xplane.pb'))


def test_a_profile_of_some_steps_is_written(tmp_path):
    train_toy(tmp_path, toy_task(), profile_steps=(3, 5))
    (trace,) = traces(tmp_path)
    assert trace.stat().st_size and b'train' in trace.read_bytes()


def test_a_stop_within_the_profiled_steps_ends_the_profile_and_the_restart_continues_it(tmp_path):
    with pytest.raises(Interrupted):
        train_toy(tmp_path, toy_task(), Numbers(4, lambda: os.kill(os.getpid(), signal.SIGTERM)), profile_steps=(3, 7))
    assert len(traces(tmp_path)) == 1 and Checkpoints(tmp_path).latest_step() < 7
    time.sleep(1)  # traces are named by the second
    assert train_toy(tmp_path, toy_task(), profile_steps=(3, 7))['steps'] == 8
    assert len(traces(tmp_path)) == 2


def test_rates_and_utilization_are_logged(tmp_path, capsys):
    batch = Numbers()
    data = Data(batch, val, {'x': np.zeros(8, np.float32)})
    config = train_config(steps=4, batch_size=8, learning_rate=1.0, log_every=1, eval_every=4, save_every=4)
    rates = {'flops_per_step': 50.0, 'peak_flops': 1e6}
    train(toy_task(), config, data, tmp_path, mesh=sharding.make_mesh(), name='toy', seed=0, **rates)
    lines = [row for row in read_metrics(tmp_path) if 'train/loss' in row]
    assert 'train/steps_per_second' not in lines[0]  # which has compiled
    for line in lines[1:]:
        assert line['train/examples_per_second'] == pytest.approx(8 * line['train/steps_per_second'])
        assert line['train/utilization'] == pytest.approx(50e-6 * line['train/steps_per_second'])
    assert '% of peak FLOP/s' in capsys.readouterr().out
