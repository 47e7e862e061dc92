"""Attention without logits in memory, by cuDNN.

It needs CUDA's plugin, also where it is only traced. `vqvae2_jax/models/attention.py` has the reference.
"""

import jax
import jax.numpy as jnp

from vqvae2_jax.models.attention import attend as reference


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes attention by cuDNN where it can; arguments and result are those of `models.attention.attend`.

    The mask is an added array for cuDNN, so its backward pass also writes the gradient of one, [1, 1, P, P], which
    nothing reads. cuDNN takes bfloat16 and float16, an even P, and d up to 128 in steps of 8; other arrays take the
    reference. XLA runs it on every device for its part of the batch.

    Raises:
      RuntimeError: CUDA's plugin is not installed.
    """
    positions, features = query.shape[1], query.shape[3]
    if query.dtype not in (jnp.bfloat16, jnp.float16) or positions % 2 or features % 8 or features > 128:
        return reference(query, key, value, mask)
    return jax.nn.dot_product_attention(query, key, value, mask=mask[None, None], implementation='cudnn')
