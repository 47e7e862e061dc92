"""Everything about a training run that must survive a restart, and nothing else."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """One pytree; checkpoints hold exactly this and the data iterator's state."""

    step: jax.Array  # int32 [], updates done
    key: jax.Array  # never split: each step uses fold_in(key, step)
    params: Any
    variables: Any  # mutable collections without gradients: {'codebook': ...} or {}
    ema_params: Any  # average of the weights, used by every evaluation
    opt_state: Any


def create(params: Any, variables: Any, key: jax.Array, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    # The average is a copy: a donated step may not be handed the same buffer twice.
    average = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), key, params, variables, average, optimizer.init(params))


def update(
    state: TrainState, gradients: Any, variables: Any, optimizer: optax.GradientTransformation, params_ema_decay: float
) -> TrainState:
    """The state after one step: optimizer, new variables, average of the weights."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # The average forgets the random start at first: its horizon grows with the steps up to 1 / (1 - params_ema_decay).
    decay = jnp.minimum(params_ema_decay, (1 + state.step) / (10 + state.step))
    average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema_params, params)
    return state.replace(
        step=state.step + 1, params=params, variables=variables, ema_params=average, opt_state=opt_state
    )
