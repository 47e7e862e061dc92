"""The training loop of all tasks: sharded over the mesh, resumable to the bit.

A step is dispatched before the metrics of the previous one are read, so the devices never wait for Python.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from vqvae2_jax.data.loader import BatchIterator, read_all, read_next
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.distributed.preemption import stop_signals
from vqvae2_jax.io import plots
from vqvae2_jax.io.logging import MetricsLogger
from vqvae2_jax.io.record import JobError, Record
from vqvae2_jax.io.trackers import TrackerSpec
from vqvae2_jax.tasks.task import Task, to_uint8
from vqvae2_jax.training import optim
from vqvae2_jax.training import state as train_state
from vqvae2_jax.training.checkpoint import BestCheckpoint, Checkpoints
from vqvae2_jax.training.finite import SHOULD_STOP, MetricsBuffer, NonFiniteLoss, check_finite
from vqvae2_jax.training.profiler import Profiler
from vqvae2_jax.training.warnings import Warnings

_IMAGES_PER_ROW = 10

EvalFn = Callable[..., dict[str, float]]


class Data(NamedTuple):
    """The batches of a training: dicts of arrays [n, ...] of the rows that this process reads.

    Attributes:
      train: endless training batches; the state of this iterator is saved in checkpoints.
      val: returns an iterator over all validation batches, which have 'mask'.
      first_batch: the first batch of `train`; the shapes and the initial codebooks come from it.
      description: examples and batch size, as text for the log.
    """

    train: grain.DatasetIterator
    val: Callable[[], BatchIterator]
    first_batch: dict[str, np.ndarray]
    description: str = ''


def train(
    task: Task,
    config: optim.TrainConfig,
    data: Data,
    directory: epath.Path,
    *,
    mesh: Mesh,
    name: str,
    seed: int,
    flops_per_step: float | None = None,
    peak_flops: float | None = None,
    output: Record | None = None,
    initial: Callable[[], tuple[Any, Any]] | None = None,
    tracker: TrackerSpec | None = None,
) -> dict[str, Any]:
    """Trains a network, or continues from the last checkpoint, and keeps the best weights by `task.best_metric`.

    Args:
      task: the network and its objective.
      config: how long and how to train.
      data: training and validation batches.
      directory: where checkpoints/, weights/, pictures/, profile/ and metrics.jsonl are written.
      mesh: the devices. All processes call this together, outside any mesh.
      name: name of the training in the log.
      seed: seed of the initial weights and of all random numbers of the steps.
      flops_per_step: FLOPs of the model in one step, on all devices; None: the log has no utilization.
      peak_flops: peak FLOP/s of all devices together.
      output: the record of the directory, of which checkpoints get a copy.
      initial: reads (params, model_state) to start from, as host arrays; None: those of `task.init`.
      tracker: the tracker that gets a copy of the log; None: there is none.

    Returns:
      {'steps': number of updates done, 'seconds': training time over all restarts, 'parameters': their number}.

    Raises:
      NonFiniteLoss: a metric of a step or of an evaluation is not finite; the message names it and the step.
      CheckpointMismatch: the last checkpoint is of another network.
      Interrupted: SIGINT or SIGTERM came; everything is saved.
    """
    optimizer = optim.make_optimizer(config)
    with contextlib.closing(Checkpoints(directory, output)) as checkpoints, stop_signals() as received_signal:
        with jax.set_mesh(mesh):
            arguments = task, optimizer, data, checkpoints, seed, config.batch_size, initial
            state, start, pending = restore_or_init(*arguments)
            train_step = make_step(task, optimizer, config, state_sharding(state))
        steps = {'total_steps': config.steps, 'start_step': start, 'examples_per_step': config.batch_size}
        options = {'flops_per_step': flops_per_step, 'peak_flops': peak_flops, 'tracker': tracker}
        logger = MetricsLogger(directory, name=name, enabled=processes.is_main_process(), **steps, **options)
        if start:
            print(f'{name}: continuing from step {start}', flush=True)
        best = processes.run_on_main_process(lambda: BestCheckpoint(directory))  # all must agree on it
        profiler = Profiler(directory, config.profile_steps)
        warnings = Warnings(config, name, directory, logger.lines())
        loop = TrainLoop(task, config, data, mesh, train_step, checkpoints, best, logger, profiler, warnings)
        with contextlib.closing(logger), contextlib.closing(profiler), _with_saved_steps(checkpoints):
            step = loop.run(state, start, pending, received_signal)
    return {'steps': step, 'seconds': round(logger.seconds(), 1), 'parameters': optax.tree.size(state.params)}


@contextlib.contextmanager
def _with_saved_steps(checkpoints):
    """Notes the steps of the checkpoints in a NonFiniteLoss."""
    try:
        yield
    except NonFiniteLoss as error:
        error.saved_steps = checkpoints.steps()
        raise


class TrainLoop:
    """The steps between two starts of a process. SPMD programs run inside the mesh, files and pictures outside."""

    def __init__(self, task, config, data, mesh, train_step, checkpoints, best, logger, profiler, warnings):
        self.task, self.config, self.data, self.mesh, self.train_step = task, config, data, mesh, train_step
        self.checkpoints, self.best, self.logger, self.profiler = checkpoints, best, logger, profiler
        self.warnings = warnings
        with jax.set_mesh(mesh):
            self.eval_fn = make_eval_fn(task, config.batch_size)
        self.visualize_fn = jax.jit(task.visualize) if task.visualize else None
        self.stopping = False  # whether any process received a signal; it changes on all at the same step

    def run(
        self,
        state: train_state.TrainState,
        step: int,
        pending: list[dict[str, float]],
        received_signal: Callable[[], int],
    ) -> int:
        """Trains from `step` to the last step, or until a process is preempted.

        Args:
          state: after `step` updates; its buffers are donated.
          step: number of updates done.
          pending: metrics of steps that no log line holds yet.
          received_signal: returns the signal that this process received, or 0.

        Returns:
          The number of updates done.
        """
        config, buffer, previous = self.config, MetricsBuffer(pending), None
        while step < config.steps and not self.stopping:
            batch = read_next(self.data.train, received_signal)
            self.profiler.before_step(step + 1)
            with jax.set_mesh(self.mesh), jax.profiler.StepTraceAnnotation('train', step_num=step + 1):
                flags = {SHOULD_STOP: sharding.process_flags(bool(received_signal()))}
                state, metrics = self.train_step(state, sharding.make_global_batch(batch, config.batch_size) | flags)
            step += 1
            self.profiler.after_step(step, metrics)
            if previous is not None:
                self.stopping |= buffer.add(*previous)  # of step - 1, while this step runs
            previous = (step, metrics)
            last = step == config.steps
            if last or any(_due(step, n) for n in (config.log_every, config.eval_every, config.save_every)):
                self.stopping |= buffer.add(*previous)  # nothing is evaluated or saved before its loss is checked
                previous = None
                if last or _due(step, config.log_every):
                    self._log(step, 'train', buffer.means())
                if last or _due(step, config.eval_every):
                    self.eval_and_keep_best(state, step, received_signal)
                if self.visualize_fn and config.image_every and (last or _due(step, config.image_every)):
                    self._visualize(state, step)
                if last or _due(step, config.save_every):
                    self._save(state, step, buffer)
        self.stopping = processes.process_any(self.stopping or bool(received_signal()))
        if self.stopping:
            if previous is not None:
                buffer.add(*previous)
            self._save(state, step, buffer)
            self.checkpoints.wait()
            print(f'saved at step {step}; the same command continues from there', flush=True)
        return step

    def _log(self, step, prefix, metrics):
        if line := self.logger.write(step, prefix, metrics):
            _print(self.warnings.of_line(line))

    def _save(self, state, step, buffer):
        self.logger.flush()  # a resumed run continues the log from here
        if processes.is_main_process():
            _print(self.warnings.before_save(state))
        self.checkpoints.wait()  # its record names the weights that `pin` must keep
        self.checkpoints.save(step, state, self.data.train, buffer.rows, self.best.pin())

    def eval_and_keep_best(self, state: train_state.TrainState, step: int, received_signal: Callable[[], int]) -> None:
        """Evaluates the averaged weights on the validation split, and keeps them if they are the best so far."""
        with jax.set_mesh(self.mesh), contextlib.closing(self.data.val()) as batches:
            weights, batches = (state.ema_params, state.model_state), read_all(batches, received_signal)
            metrics = self.eval_fn(*weights, batches, f'in the evaluation at step {step}')
        self._log(step, 'validation', metrics)
        weights = {'params': state.ema_params, 'model_state': state.model_state}
        self.best.save_if_best(step, metrics, self.task.best_metric, weights)

    def _visualize(self, state, step):
        with jax.set_mesh(self.mesh):
            weights = sharding.replicate_to_host((state.ema_params, state.model_state))
        processes.run_on_main_process(lambda: self._save_image(weights, step))

    def _save_image(self, weights, step):
        with contextlib.closing(self.data.val()) as batches:
            batch = batches.peek()
        images = self.visualize_fn(*weights, {k: jnp.asarray(rows[:_IMAGES_PER_ROW]) for k, rows in batch.items()})
        rows = [(label, np.asarray(to_uint8(x))) for label, x in zip(self.task.image_labels, images, strict=True)]
        self.logger.image(step, 'validation', plots.labeled_rows(rows, scale=plots.visible_scale(rows[0][1])))


def _print(warnings):
    for warning in warnings:
        print(warning, flush=True)


def _due(step: int, every: int) -> bool:
    return step % every == 0


def restore_or_init(
    task: Task,
    optimizer: optax.GradientTransformation,
    data: Data,
    checkpoints: Checkpoints,
    seed: int,
    batch_size: int,
    initial: Callable[[], tuple[Any, Any]] | None = None,
) -> tuple[train_state.TrainState, int, list[dict[str, float]]]:
    """Restores the newest checkpoint, or makes a new state if there is none. Call it inside `jax.set_mesh`.

    Args:
      task: the network and its objective.
      optimizer: the optimizer, from `optim.make_optimizer`.
      data: its `first_batch` gives the shapes and the initial codebooks.
      checkpoints: the checkpoints of this training.
      seed: seed of the initial weights and of all random numbers of the steps.
      batch_size: number of examples of a global batch.
      initial: reads (params, model_state) to start from, as host arrays; None: those of `task.init`.

    Returns:
      The sharded state, its step, and the pending metrics; `data.train` continues after this step.

    Raises:
      CheckpointMismatch: the checkpoint is of another network.
    """
    batch = sharding.make_global_batch(data.first_batch, batch_size)
    init, key, step = make_init(task, optimizer), jax.random.key(seed), checkpoints.latest_step()
    shapes = jax.eval_shape(init, key, batch)
    shardings = state_sharding(shapes)
    if step is None:
        if initial is None:
            return jax.jit(init, out_shardings=shardings)(key, batch), 0, []
        params, model_state = initial()
        params, model_state = sharding.put_sharded(params), sharding.put_replicated(model_state)
        make_state = functools.partial(_make_state, optimizer)
        return jax.jit(make_state, out_shardings=shardings)(key, params, model_state), 0, []
    state, pending = checkpoints.restore(step, sharding.abstract_state(shapes, shardings), data.train)
    return state, step, pending


def make_init(
    task: Task, optimizer: optax.GradientTransformation
) -> Callable[[jax.Array, dict[str, jax.Array]], train_state.TrainState]:
    """Returns a function (key, batch) -> the state before the first step."""

    def init(key, batch):
        return _make_state(optimizer, key, *task.init(jax.random.fold_in(key, 0), batch))

    return init


def _make_state(optimizer, key, params, model_state):
    return train_state.create(params, model_state, jax.random.fold_in(key, 1), optimizer)


def state_sharding(state: train_state.TrainState) -> train_state.TrainState:
    """Returns the sharding of every array of a state, or of its shapes. Call it inside `jax.set_mesh`.

    Codebooks are replicated. The rest is sharded as `sharding.fsdp_sharding` says.
    """
    replicated = jax.tree.map(lambda _: sharding.replicated_sharding(), state.model_state)
    return jax.tree.map(sharding.fsdp_sharding, state).replace(model_state=replicated)


def make_step(
    task: Task, optimizer: optax.GradientTransformation, config: optim.TrainConfig, layout: train_state.TrainState
) -> Callable[[train_state.TrainState, dict], tuple[train_state.TrainState, dict[str, jax.Array]]]:
    """Makes the update of a train state. Call it and the returned function inside `jax.set_mesh`.

    Args:
      task: the network and its objective.
      optimizer: the optimizer, from `optim.make_optimizer`.
      config: how to train.
      layout: shardings of the state, from `state_sharding`.

    Returns:
      A jitted function (state, batch with `SHOULD_STOP`) -> (state, metrics []), which donates the state.
    """
    grad_fn = _accumulated_grad_fn(task, config.grad_accum_steps) if config.grad_accum_steps > 1 else _grad_fn(task)

    def step(state, batch):
        stop = jnp.any(batch.pop(SHOULD_STOP))
        key = jax.random.fold_in(state.key, state.step)
        # All-gathered here and not layer by layer: left to choose, XLA also shards arithmetic along the parameters.
        params = sharding.constrain_replicated(state.params)
        gradients, model_state, metrics = grad_fn(params, state.model_state, batch, key)
        gradients = sharding.constrain_sharded(gradients)
        metrics = {**metrics, 'gradient_norm': optax.tree.norm(gradients), SHOULD_STOP: stop}
        return train_state.update(state, gradients, model_state, optimizer, config.params_ema_decay), metrics

    return jax.jit(
        step, donate_argnums=0, in_shardings=(layout, None), out_shardings=(layout, sharding.replicated_sharding())
    )


def _grad_fn(task):
    def grad_fn(params, model_state, batch, key):
        value_and_grad = jax.value_and_grad(task.loss, has_aux=True)
        (_, (model_state, metrics)), gradients = value_and_grad(params, model_state, batch, key)
        return gradients, model_state, metrics

    return grad_fn


def _accumulated_grad_fn(task, count):
    """As `_grad_fn`, in `count` microbatches one after the other: the same mean gradient, in the memory of one."""
    micro_grad_fn = _grad_fn(task)

    def split(x):  # [B, ...] -> [count, B / count, ...], where every device keeps its rows
        return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)

    def grad_fn(params, model_state, batch, key):
        if model_state:
            raise ValueError(
                f'training.grad_accum_steps is {count}, but a network with a codebook needs the whole batch at once, '
                'whose statistics update the codebook: set it to 1'
            )

        def add(total, numbered):
            number, microbatch = numbered
            gradients, _, metrics = micro_grad_fn(params, model_state, microbatch, jax.random.fold_in(key, number))
            return sharding.constrain_sharded(jax.tree.map(jnp.add, total, gradients)), metrics

        zeros = sharding.constrain_sharded(jax.tree.map(jnp.zeros_like, params))
        total, metrics = jax.lax.scan(add, zeros, (jnp.arange(count), jax.tree.map(split, batch)))
        return jax.tree.map(lambda x: x / count, total), model_state, {k: v.mean() for k, v in metrics.items()}

    return grad_fn


def make_eval_fn(task: Task, batch_size: int | None = None) -> EvalFn:
    """Makes the evaluation over a validation split. Call it and the returned function inside `jax.set_mesh`.

    Args:
      task: the network and its metrics.
      batch_size: the global batch size; None: a batch has all rows.

    Returns:
      A function (params, model_state, batches of the rows of this process with 'mask') -> the metrics of
      `task.reduce_metrics`. Masked examples do not count. It raises JobError if none is left, and NonFiniteLoss for a
      mean that is not finite; a fourth argument says when, for its message.
    """

    @functools.partial(jax.jit, out_shardings=sharding.replicated_sharding())
    def masked_sums(params, model_state, batch):
        mask = batch.pop('mask')  # [B]
        values = task.eval_step(params, model_state, batch)  # each [B, ...]
        masked = {k: v * mask.reshape(-1, *(1,) * (v.ndim - 1)) for k, v in values.items()}
        return {k: jnp.sum(v, axis=0) for k, v in masked.items()}, jnp.sum(mask)

    def eval_fn(params, model_state, batches, when='in the evaluation'):
        totals, count = {}, 0
        for batch in batches:
            sums = masked_sums(params, model_state, sharding.make_global_batch(batch, batch_size))
            batch_sums, batch_count = jax.device_get(sums)
            count += int(batch_count)
            totals = {k: totals.get(k, 0) + v.astype(np.float64) for k, v in batch_sums.items()}
        if not count:
            raise JobError('no example to evaluate on can be read: repair the files that skipped.txt lists')
        means = {k: v / count for k, v in totals.items()}
        check_finite(means, when)
        return task.reduce_metrics(means)

    return eval_fn
