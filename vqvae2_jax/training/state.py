"""Everything about a training run that must survive a restart, and nothing else."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """One pytree; checkpoints hold exactly this and the data iterator's state.

    Attributes:
      step: int32 [], number of updates done.
      key: PRNG key []; never split, each step uses fold_in(key, step).
      params: parameters, which get gradients.
      model_state: collections without gradients, {'codebook': ...} or {}; see `tasks.task.Task`.
      ema_params: average of `params` over the steps; every evaluation and all later stages use it.
      opt_state: state of the optimizer.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    model_state: Any
    ema_params: Any
    opt_state: Any


def create(params: Any, model_state: Any, key: jax.Array, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step, from the results of `Task.init` and a key for the steps."""
    # The average is a copy: a donated step may not be handed the same buffer twice.
    average = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), key, params, model_state, average, optimizer.init(params))


def update(
    state: TrainState,
    gradients: Any,
    model_state: Any,
    optimizer: optax.GradientTransformation,
    params_ema_decay: float,
) -> TrainState:
    """Returns the state after one step.

    Args:
      state: the state before it.
      gradients: gradients of the loss, shaped as `state.params`.
      model_state: the new `TrainState.model_state`, from `Task.loss`.
      optimizer: the optimizer.
      params_ema_decay: decay of the averaged parameters, in [0, 1).
    """
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # The average forgets the random start at first: its horizon grows with the steps up to 1 / (1 - params_ema_decay).
    decay = jnp.minimum(params_ema_decay, (1 + state.step) / (10 + state.step))
    average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema_params, params)
    return state.replace(
        step=state.step + 1, params=params, model_state=model_state, ema_params=average, opt_state=opt_state
    )
