"""Custom kernels on a sharded batch.

XLA shards the operations that it knows. A custom kernel is opaque to it, so it would gather the batch on every device.
"""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from vqvae2_jax.distributed.sharding import batch_axes


def over_batch(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes a function run on every device's shard of the batch.

    Args:
      function: (batch [B, ...], other arrays) -> array [B, ...]; a row of the result depends on the same row of the
        batch and on the other arrays.

    Returns:
      The same function of whole arrays, for programs that `jax.jit` compiles inside `jax.set_mesh`. The batch is
      sharded as `sharding.constrain_batch` says, and the other arrays are replicated. Without a mesh it is `function`.
    """

    def sharded(batch, *others):
        if jax.sharding.get_abstract_mesh().empty:
            return function(batch, *others)
        spec = PartitionSpec(batch_axes(len(batch)))
        specs = spec, *[PartitionSpec()] * len(others)
        # Kernels do not state over which axes their results vary, which `check_vma` would check.
        return jax.shard_map(function, in_specs=specs, out_specs=spec, check_vma=False)(batch, *others)

    return sharded
