"""How likely the priors find codes: the exact log-likelihood of every level, by the chain rule over the levels.

Glossary of shapes: B batch, L levels, Y classes.
"""

import jax
import jax.numpy as jnp
import optax


def log_likelihood(priors, params, codes, labels=None) -> jax.Array:
    """log p(codes of a level | codes of the coarser ones, class) in nats, float32 [L, B], finest level first.

    Args:
      priors, params: one per level, finest first.
      codes: int32 [B, h_l, w_l] per level, finest first.
      labels: int32 [B]. None where the priors have classes: unknown, every class as likely as another. The sum over the
        levels is then the logarithm of the mean over the classes, and a level's share of it is what it adds to that of
        the coarser ones.
    """
    if labels is not None or not priors[0].num_classes:
        return _given_class(priors, params, codes, labels)
    batch = codes[0].shape[0]
    classes = jnp.arange(priors[0].num_classes)
    each = jax.lax.map(lambda y: _given_class(priors, params, codes, jnp.full((batch,), y)), classes)  # [Y, L, B]
    joint = jnp.cumsum(each[:, ::-1], axis=1)[:, ::-1]  # of a level and all coarser ones
    marginal = jax.nn.logsumexp(joint, axis=0) - jnp.log(len(classes))  # [L, B]
    return marginal - jnp.concatenate([marginal[1:], jnp.zeros((1, batch))])


def _given_class(priors, params, codes, labels):
    levels = []
    for level, (prior, weights) in enumerate(zip(priors, params, strict=True)):
        logits = prior.apply({'params': weights}, codes[level], labels, codes[level + 1 :])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, codes[level])
        levels.append(-jnp.sum(nll, axis=(1, 2)))
    return jnp.stack(levels)
