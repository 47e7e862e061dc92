"""A task: everything that the training loop needs to know about a model and its objective, as pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Task(NamedTuple):
    """A model with its objective. Shapes: B batch.

    `model_state` below are the mutable collections without gradients, {'codebook': ...} or {}.

    Attributes:
      init: (key, batch) -> params, model_state.
      loss: (params, model_state, batch, key) -> loss [], (new model_state, metrics [] of the training batch).
      eval_step: (params, model_state, batch) -> metrics [B, ...] of every example.
      reduce_metrics: metrics, as means over the validation examples, -> the scalars to report.
      best_metric: the weights with the smallest value of this reported scalar are kept.
      visualize: (params, model_state, batch) -> rows of images in [-1, 1], each [N, H, W, C]; None: no pictures.
      image_labels: one for each row.
    """

    init: Callable[[jax.Array, Batch], tuple[Any, Any]]
    loss: Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, tuple[Any, Metrics]]]
    eval_step: Callable[[Any, Any, Batch], Metrics]
    reduce_metrics: Callable[[dict], dict[str, float]]
    best_metric: str
    visualize: Callable[[Any, Any, Batch], tuple[jax.Array, ...]] | None = None
    image_labels: tuple[str, ...] = ()


def as_floats(means: dict) -> dict[str, float]:
    """Returns means as Python floats: `reduce_metrics` of tasks whose means are scalars already."""
    return {name: float(value) for name, value in means.items()}


def to_float(image: jax.Array) -> jax.Array:
    """Converts uint8 pixels to float32 in [-1, 1]. (The paper does not state its range; [-1, 1] fits its MSE.)"""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image: jax.Array) -> jax.Array:
    """Converts float images in [-1, 1] to uint8; values outside are clipped."""
    return jnp.round((jnp.clip(image, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)
