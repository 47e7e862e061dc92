"""The exact log-likelihood of codes under the priors, level by level, by the chain rule.

Shapes: B batch, h_l w_l map of level l, L levels, Y classes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vqvae2_jax.models.prior import Prior


def log_likelihood(
    priors: Sequence[Prior], params: Sequence[Any], codes: Sequence[jax.Array], labels: jax.Array | None = None
) -> jax.Array:
    """Computes log p(codes of a level | codes of the coarser levels, class) of every level.

    Args:
      priors: one module per level, finest first.
      params: the collection `params` of each prior, in the same order.
      codes: int32 [B, h_l, w_l] per level, finest first.
      labels: classes, int32 [B]; None if the priors have no classes, or to marginalize over uniform classes. The sum
        over the levels is then the log of the mean probability over the classes, and the value of a level is the
        difference that this level makes to the sum over the coarser ones.

    Returns:
      float32 [L, B], in nats, finest level first.
    """
    if labels is not None or not priors[0].num_classes:
        return _conditional(priors, params, codes, labels)
    batch = codes[0].shape[0]
    classes = jnp.arange(priors[0].num_classes)
    by_class = jax.lax.map(lambda y: _conditional(priors, params, codes, jnp.full((batch,), y)), classes)  # [Y, L, B]
    joint = jnp.cumsum(by_class[:, ::-1], axis=1)[:, ::-1]  # log-likelihood of a level and all coarser ones
    marginal = jax.nn.logsumexp(joint, axis=0) - jnp.log(len(classes))  # [L, B]
    return marginal - jnp.concatenate([marginal[1:], jnp.zeros((1, batch))])


def _conditional(priors, params, codes, labels):
    levels = []
    for level, (prior, weights) in enumerate(zip(priors, params, strict=True)):
        logits = prior.apply({'params': weights}, codes[level], labels, codes[level + 1 :])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, codes[level])
        levels.append(-jnp.sum(nll, axis=(1, 2)))
    return jnp.stack(levels)
