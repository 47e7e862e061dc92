"""A task: everything that the training loop needs to know about a model and its objective, as pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Visualize = Callable[[Any, Any, Batch], tuple[jax.Array, ...]]


class Task(NamedTuple):
    """A model with its objective.

    Shapes: B batch. `params` is the collection `params` of the module; `model_state` are its other collections, which
    training updates without gradients: {'codebook': ...} or {}.

    Attributes:
      init: (key, batch) -> params, model_state.
      loss: (params, model_state, batch, key) -> loss [], (new model_state, metrics of the training batch, each []).
      eval_step: (params, model_state, batch) -> metrics of every example, each [B, ...].
      reduce_metrics: means of the metrics of `eval_step` over the validation examples -> scalars to report.
      best_metric: name of a reported scalar; the weights with its smallest value are kept.
      visualize: (params, model_state, batch) -> rows of images in [-1, 1], each [N, H, W, C]; None: no pictures.
      image_labels: one label for each row of images.
    """

    init: Callable[[jax.Array, Batch], tuple[Any, Any]]
    loss: Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, tuple[Any, Metrics]]]
    eval_step: Callable[[Any, Any, Batch], Metrics]
    reduce_metrics: Callable[[dict], dict[str, float]]
    best_metric: str
    visualize: Visualize | None = None
    image_labels: tuple[str, ...] = ()


def make_likelihood_task(
    model: nn.Module,
    targets_and_inputs: Callable[[Batch], tuple[jax.Array, tuple]],
    visualize: Visualize | None = None,
    image_labels: tuple[str, ...] = (),
) -> Task:
    """Makes the task of a module that returns logits and is trained by maximum likelihood.

    Its metrics are `nll`, in nats, and `accuracy`: means over the targets of an example.

    Args:
      model: called as `model(*inputs, train=...)`, it returns logits float32 [B, ..., K] for targets in [0, K). With
        train=True it may use the rng `dropout`. Its only collection is `params`.
      targets_and_inputs: batch -> (targets int32 [B, ...], inputs of the model).
      visualize: see `Task`.
      image_labels: see `Task`.
    """

    def init(key, batch):
        return model.init(key, *targets_and_inputs(batch)[1])['params'], {}

    def per_example(logits, targets):
        axes = tuple(range(1, targets.ndim))
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)  # [B, ...] nats
        correct = jnp.argmax(logits, axis=-1) == targets
        return {'nll': jnp.mean(nll, axes), 'accuracy': jnp.mean(correct, axes)}

    def loss(params, model_state, batch, key):
        targets, inputs = targets_and_inputs(batch)
        logits = model.apply({'params': params}, *inputs, train=True, rngs={'dropout': key})
        metrics = {name: jnp.mean(value) for name, value in per_example(logits, targets).items()}
        return metrics['nll'], (model_state, {'loss': metrics['nll'], **metrics})

    def eval_step(params, model_state, batch):
        targets, inputs = targets_and_inputs(batch)
        return per_example(model.apply({'params': params}, *inputs), targets)

    def reduce_metrics(means):
        return {name: float(value) for name, value in means.items()}

    return Task(init, loss, eval_step, reduce_metrics, 'nll', visualize, image_labels)


def to_float(image: jax.Array) -> jax.Array:
    """Converts uint8 pixels to float32 in [-1, 1]. (The paper does not state its range; [-1, 1] fits its MSE.)"""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image: jax.Array) -> jax.Array:
    """Converts float images in [-1, 1] to uint8; values outside are clipped."""
    return jnp.round((jnp.clip(image, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)
