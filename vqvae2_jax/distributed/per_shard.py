"""Custom kernels on a sharded batch.

XLA shards the operations that it knows. A custom kernel is opaque to it, so it would gather the batch on every device.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from vqvae2_jax.distributed.sharding import DATA, FSDP


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
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return function(batch, *others)
        shards = next((axes for axes in ((DATA, FSDP), (DATA,)) if _divides(mesh, axes, len(batch))), ())
        spec = PartitionSpec(shards)
        specs = spec, *[PartitionSpec()] * len(others)
        # Kernels do not state over which axes their results vary, which `check_vma` would check.
        return jax.shard_map(function, in_specs=specs, out_specs=spec, check_vma=False)(batch, *others)

    return sharded


def _divides(mesh, axes, size):
    return size % math.prod(mesh.shape[axis] for axis in axes) == 0
