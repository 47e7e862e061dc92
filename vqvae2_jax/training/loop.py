"""The one training loop: any stage, sharded over all devices, resumable to the bit.

A step is dispatched before the metrics of the one before it are read, so that the device never waits for Python.
"""

import contextlib
import functools
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqvae2_jax.data.loader import read_all, read_next
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.distributed.preemption import Interrupted, stop_signals
from vqvae2_jax.io import plots
from vqvae2_jax.io.logging import RunLog
from vqvae2_jax.tasks.task import Task, to_uint8
from vqvae2_jax.training import optim
from vqvae2_jax.training import state as train_state
from vqvae2_jax.training.checkpoint import BestCheckpoint, Checkpoints

_SHOWN = 10  # images in a row of the pictures
SHOULD_STOP = 'stop'  # in a batch: for each device, whether its process was told to stop


class Data(NamedTuple):
    """Batches of one stage."""

    train: grain.DatasetIterator  # endless; its state is saved
    held_out: Callable[[], Iterator[dict]]  # one pass over the validation examples, with 'mask'; has close()


class NonFiniteLoss(FloatingPointError):
    """A loss, a gradient or another metric was NaN or infinite; nothing after the last checkpoint was saved."""


def fit(stage: Task, training: optim.Training, data: Data, directory, *, name: str, seed: int) -> dict:
    """Trains a stage, or goes on where its last checkpoint stands, and keeps the best weights by `stage.select`.

    Returns:
      {'steps': updates done, 'seconds': training time over all restarts, 'parameters': how many}.

    Raises:
      NonFiniteLoss: naming the steps.
      Interrupted: SIGINT or SIGTERM came; everything is saved.
    """
    optimizer = optim.make_optimizer(training)
    checkpoints, weights = Checkpoints(directory), BestCheckpoint(directory)
    layout, state, start, unlogged = _first_state(stage, optimizer, data.train, checkpoints, seed, training.batch_size)
    log = RunLog(
        directory,
        name=name,
        total_steps=training.steps,
        start_step=start,
        examples_per_step=training.batch_size,
        enabled=processes.is_main_process(),
    )
    if start:
        print(f'{name}: continuing from step {start}', flush=True)
    loop = TrainLoop(stage, training, data, checkpoints, weights, log, make_step(stage, optimizer, training, layout))
    try:
        with stop_signals() as stopped:
            step = loop.run(state, start, unlogged, stopped)
        if loop.stopping:  # the signal went to another process
            raise Interrupted(128 + signal.SIGTERM)
    finally:
        log.close()
        checkpoints.close()
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    return {'steps': step, 'seconds': round(log.seconds(), 1), 'parameters': parameters}


class TrainLoop:
    """The loop's fixed parts, so that its few steps can be read one by one."""

    def __init__(self, stage, training, data, checkpoints, weights, log, step):
        self.stage, self.training, self.data = stage, training, data
        self.checkpoints, self.weights, self.log, self.train_step = checkpoints, weights, log, step
        self.evaluate = make_eval_fn(stage, training.batch_size)
        self.show = jax.jit(stage.show) if stage.show else None
        self.best = weights.best()
        self.stopping = False  # as soon as a signal to stop came to any process; on all of them at the same step

    def run(self, state, step, unlogged, stopped):
        training, window, previous = self.training, MetricsBuffer(unlogged), None
        while step < training.steps and not self.stopping:
            batch = read_next(self.data.train, stopped)
            batch = sharding.make_global_batch(batch, training.batch_size) | {
                SHOULD_STOP: sharding.process_flags(bool(stopped()))
            }
            state, metrics = self.train_step(state, batch)
            step += 1
            if previous is not None:
                self.stopping |= window.add(*previous)  # step - 1, while this step runs
            previous = (step, metrics)
            last = step == training.steps
            if last or any(_due(step, n) for n in (training.log_every, training.eval_every, training.save_every)):
                self.stopping |= window.add(*previous)  # nothing is logged, judged or saved on top of an unseen loss
                previous = None
                if last or _due(step, training.log_every):
                    self.log.write(step, 'train', window.means())
                self._look(state, step, last, stopped)
                if last or _due(step, training.save_every):
                    self._save(step, state, window)
        self.stopping = processes.process_any(self.stopping or bool(stopped()))
        if self.stopping:
            if previous is not None:
                window.add(*previous)
            self._save(step, state, window)
            self.checkpoints.wait()
            print(f'saved at step {step}; the same command continues from there', flush=True)
        return step

    def _save(self, step, state, window):
        self.log.flush()  # a resumed run continues the log from here
        self.checkpoints.save(step, state, self.data.train, window.rows)

    def _look(self, state, step, last, stopped):
        training = self.training
        if last or _due(step, training.eval_every):
            with contextlib.closing(self.data.held_out()) as batches:
                summary = self.evaluate(state.ema_params, state.variables, read_all(batches, stopped))
            self.log.write(step, 'validation', summary)
            # Equal counts as better, so that a run resumed from before its best step keeps the weights it finds again.
            select = self.stage.select
            if self.best is None or summary[select] <= self.best['summary'][select]:
                weights = {'params': state.ema_params, 'variables': state.variables}
                self.best = self.weights.save(step, summary, weights, self.best)
        if self.show and training.show_every and (last or _due(step, training.show_every)):
            weights = sharding.replicate_to_host((state.ema_params, state.variables))
            if processes.is_main_process():
                self._show(weights, step, stopped)

    def _show(self, weights, step, stopped):
        with contextlib.closing(self.data.held_out()) as batches:
            batch = {name: jnp.asarray(rows[:_SHOWN]) for name, rows in read_next(batches, stopped).items()}
        rows = [
            (name, np.asarray(to_uint8(images)))
            for name, images in zip(self.stage.shown, self.show(*weights, batch), strict=True)
        ]
        self.log.image(step, 'held_out', plots.labeled_rows(rows, scale=plots.visible_scale(rows[0][1])))


class MetricsBuffer:
    """Metrics since the last log line, of which some may date from before a restart."""

    def __init__(self, rows: list[dict[str, float]]):
        self.rows = rows

    def add(self, step: int, metrics: dict[str, jax.Array]) -> bool:
        """Waits for the metrics of a step; returns whether a process was to stop before it."""
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        # All of them: a loss is taken before its update, so that it alone would let a state of NaNs be saved.
        if wrong := [f'{name} is {value}' for name, value in row.items() if not math.isfinite(value)]:
            raise NonFiniteLoss(
                f'{", ".join(wrong)} at step {step}. Nothing of it was saved: the same command restarts from '
                'the last checkpoint. Lower training.learning_rate, or set training.clip_norm'
            )
        stop = bool(row.pop(SHOULD_STOP))
        self.rows.append(row)
        return stop

    def means(self) -> dict[str, float]:
        rows, self.rows = self.rows, []
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _due(step: int, every: int) -> bool:
    return step % every == 0


def _first_state(stage, optimizer, iterator, checkpoints, seed, batch_size):
    """Layout, state, step and unlogged metrics of the newest checkpoint, or of the start; the iterator stands there."""
    before = iterator.get_state()
    batch = sharding.make_global_batch(next(iterator), batch_size)
    iterator.set_state(before)
    init, key, step = make_init(stage, optimizer), jax.random.key(seed), checkpoints.latest_step()
    shapes = jax.eval_shape(init, key, batch)
    layout = state_sharding(shapes)
    if step is None:
        return layout, jax.jit(init, out_shardings=layout)(key, batch), 0, []
    state, unlogged = checkpoints.restore(step, sharding.abstract_state(shapes, layout), iterator)
    return layout, state, step, unlogged


def make_init(stage: Task, optimizer) -> Callable[..., train_state.TrainState]:
    """(key, batch) -> the state before the first step."""

    def init(key, batch):
        params, variables = stage.init(jax.random.fold_in(key, 0), batch)
        return train_state.create(params, variables, jax.random.fold_in(key, 1), optimizer)

    return init


def state_sharding(state: train_state.TrainState) -> train_state.TrainState:
    """Where each array of a state (or its shape) lies: codebooks whole on every device, the rest by `parallel.cut`."""
    whole = jax.tree.map(lambda _: sharding.replicated_sharding(), state.variables)
    return jax.tree.map(sharding.fsdp_sharding, state).replace(variables=whole)


def make_step(stage: Task, optimizer, training: optim.Training, layout: train_state.TrainState):
    """One donated, jitted update: (state, batch with `SHOULD_STOP`) -> (state, metrics)."""
    gradient = _accumulated(stage, training.accumulate) if training.accumulate > 1 else _gradient(stage)

    def step(state, batch):
        stop = jnp.any(batch.pop(SHOULD_STOP))
        key = jax.random.fold_in(state.key, state.step)
        # Gathered here and not layer by layer: left to choose, XLA cuts arithmetic along the parameters too.
        gradients, variables, metrics = gradient(
            sharding.constrain_replicated(state.params), state.variables, batch, key
        )
        gradients = sharding.constrain_sharded(gradients)
        metrics = {**metrics, 'gradient_norm': optax.tree.norm(gradients), SHOULD_STOP: stop}
        return train_state.update(state, gradients, variables, optimizer, training.params_ema_decay), metrics

    return jax.jit(
        step, donate_argnums=0, in_shardings=(layout, None), out_shardings=(layout, sharding.replicated_sharding())
    )


def _gradient(stage):
    def gradient(params, variables, batch, key):
        loss = jax.value_and_grad(stage.loss, has_aux=True)
        (_, (variables, metrics)), gradients = loss(params, variables, batch, key)
        return gradients, variables, metrics

    return gradient


def _accumulated(stage, parts):
    """As `_gradient`, part of the batch after part: the same mean gradient, in the memory of one part."""
    of_part = _gradient(stage)

    def take(x):  # [B, ...] -> [parts, B / parts, ...], where each device keeps its rows
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    def gradient(params, variables, batch, key):
        if variables:
            raise ValueError('a stage with a codebook takes its batch at once: its statistics are those of the batch')

        def add(total, numbered):
            number, part = numbered
            gradients, _, metrics = of_part(params, variables, part, jax.random.fold_in(key, number))
            return sharding.constrain_sharded(jax.tree.map(jnp.add, total, gradients)), metrics

        zeros = sharding.constrain_sharded(jax.tree.map(jnp.zeros_like, params))
        total, metrics = jax.lax.scan(add, zeros, (jnp.arange(parts), jax.tree.map(take, batch)))
        return jax.tree.map(lambda x: x / parts, total), variables, {k: v.mean() for k, v in metrics.items()}

    return gradient


def make_eval_fn(stage: Task, batch_size: int | None = None) -> Callable[[Any, Any, Iterator[dict]], dict[str, float]]:
    """(params, variables, batches with 'mask') -> summary, exact on a padded last batch.

    Args:
      batch_size: the global one, when processes work together.

    Raises:
      ValueError: no example was left unmasked.
    """

    @functools.partial(jax.jit, out_shardings=sharding.replicated_sharding())
    def sums(params, variables, batch):
        mask = batch.pop('mask')  # [B]
        values = stage.evaluate(params, variables, batch)  # each [B, ...]
        masked = {k: v * mask.reshape(-1, *(1,) * (v.ndim - 1)) for k, v in values.items()}
        return {k: jnp.sum(v, axis=0) for k, v in masked.items()}, jnp.sum(mask)

    def evaluate(params, variables, batches):
        totals, count = {}, 0
        for batch in batches:
            batch_sums, batch_count = jax.device_get(
                sums(params, variables, sharding.make_global_batch(batch, batch_size))
            )
            count += int(batch_count)
            totals = {k: totals.get(k, 0) + v.astype(np.float64) for k, v in batch_sums.items()}
        if not count:
            raise ValueError('the validation split has no readable example; raise data.held_out or repair the files')
        return stage.summarize({k: v / count for k, v in totals.items()})

    return evaluate
