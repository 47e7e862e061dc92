"""What a stage is to the training loop: four pure functions and the name of the number to minimise."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Task(NamedTuple):
    """A model with its objective. `variables` are the mutable collections without gradients, {} where there are none.

    Shapes: B batch.
    """

    init: Callable[[jax.Array, Batch], tuple[Any, Any]]  # key, batch -> params, variables
    loss: Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, tuple[Any, Metrics]]]
    # params, variables, batch, key -> loss [], (new variables, metrics of scalars)
    evaluate: Callable[[Any, Any, Batch], Metrics]  # params, variables, batch -> one entry [B, ...] per example
    summarize: Callable[[dict], dict[str, float]]  # means over the examples -> the scalars to report
    select: str  # the weights with the smallest value of this summary are kept
    show: Callable[[Any, Any, Batch], tuple[jax.Array, ...]] | None = None
    # params, variables, batch -> rows of images in [-1, 1], each [N, H, W, C]
    shown: tuple[str, ...] = ()  # what the rows are


def as_floats(means: dict) -> dict[str, float]:
    """The summary of stages whose means are scalars already."""
    return {name: float(value) for name, value in means.items()}


def to_float(image: jax.Array) -> jax.Array:
    """uint8 pixels as float32 in [-1, 1]. (The paper does not state its range; [-1, 1] makes its MSE plausible.)"""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image: jax.Array) -> jax.Array:
    """Float images in [-1, 1], clipped and rounded to uint8."""
    return jnp.round((jnp.clip(image, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)
