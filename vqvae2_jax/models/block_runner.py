"""Runs a chain of equal blocks: one by one, with rematerialization, or as a scan that compiles one block."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class BlockRunner(NamedTuple):
    """How training runs blocks. Neither option changes parameters or results, except for the units dropout drops.

    Attributes:
      remat: recompute a block's activations in the backward pass instead of storing them.
      scan: run the blocks as a scan, so that compile time does not grow with their number.
    """

    remat: bool = False
    scan: bool = False

    def run(
        self,
        call: Callable[[nn.Module, jax.Array, Any], jax.Array],
        blocks: Sequence[nn.Module],
        x: jax.Array,
        aux: Sequence[Any] | jax.Array | None = None,
    ) -> tuple[jax.Array, Sequence[jax.Array] | jax.Array]:
        """Applies the blocks one after the other. Call it inside a method of the module that owns them.

        Args:
          call: applies one block: (block, x, its entry of `aux` or None) -> x.
          blocks: bound modules of one class, with parameters of the same shapes.
          x: input of the first block, [B, h, w, F].
          aux: one more input for each block, as a sequence or an array [blocks, ...]; None: no such inputs.

        Returns:
          x after the last block, and x after every block: a list, or an array [blocks, ...] if they run as a scan.
        """
        if self.scan and len(blocks) > 1:
            return self._scan(call, blocks, x, aux)
        call, outputs = nn.remat(call) if self.remat else call, []
        for index, block in enumerate(blocks):
            x = call(block, x, None if aux is None else aux[index])
            outputs.append(x)
        return x, outputs

    def _scan(self, call, blocks, x, aux):
        # Parameters are stacked here, so their paths and checkpoints are the same with and without the scan.
        params = jax.tree.map(lambda *p: jnp.stack(p), *(block.variables['params'] for block in blocks))
        block, _ = blocks[0].unbind()
        keys = jax.random.split(blocks[0].make_rng('dropout'), len(blocks)) if blocks[0].has_rng('dropout') else None

        def body(x, inputs):
            params, key, block_aux = inputs
            rngs = {} if key is None else {'dropout': key}
            x = nn.apply(lambda bound: call(bound, x, block_aux), block)({'params': params}, rngs=rngs)
            return x, x

        if self.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        aux = aux if aux is None or isinstance(aux, jax.Array) else jnp.stack(aux)
        return jax.lax.scan(body, x, (params, keys, aux))


DEFAULT = BlockRunner()  # one by one, activations stored
