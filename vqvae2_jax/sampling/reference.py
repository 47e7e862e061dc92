"""The slow definition of `sampling.ancestral.sample_level`: it reruns the full network for every step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqvae2_jax.models.prior import Prior
from vqvae2_jax.sampling.ancestral import Sampled
from vqvae2_jax.sampling.params import DEFAULT, SamplingParams, sample_codes


def sample_reference(
    prior: Prior,
    params: Any,
    keys: jax.Array,
    labels: jax.Array | None = None,
    coarser: tuple[jax.Array, ...] = (),
    sampling_params: SamplingParams = DEFAULT,
    known_codes: jax.Array | None = None,
) -> Sampled:
    """Samples the codes of one level; arguments and result are those of `sample`, whose checks it does not repeat."""
    height, width = prior.shape
    steps, positions = prior.order.step_map().reshape(-1), jnp.arange(height * width)

    def network(codes, labels):
        logits = prior.apply({'params': params}, codes.reshape(-1, height, width), labels, coarser)
        return logits.reshape(len(keys), height * width, -1)

    def one_step(sampled, step):
        logits = guided = network(sampled.codes, labels)
        if sampling_params.guidance is not None:
            without_class = network(sampled.codes, jnp.full_like(labels, prior.num_classes))
            guided = without_class + sampling_params.guidance * (logits - without_class)
        codes = sample_codes(keys, positions, guided, sampling_params)
        if known_codes is not None:
            known = known_codes.reshape(len(keys), -1)
            codes = jnp.where(known >= 0, known, codes)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], axis=-1)[..., 0]
        return jax.tree.map(lambda new, old: jnp.where(steps == step, new, old), Sampled(codes, log_probs), sampled)

    zeros = np.zeros((len(keys), height * width))
    sampled = Sampled(jnp.asarray(zeros, jnp.int32), jnp.asarray(zeros, jnp.float32))
    sampled, _ = jax.lax.scan(lambda s, step: (one_step(s, step), None), sampled, jnp.arange(prior.order.num_steps))
    return jax.tree.map(lambda x: x.reshape(-1, height, width), sampled)
