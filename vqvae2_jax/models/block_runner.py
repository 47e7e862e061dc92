"""Many blocks of one shape, one after the other: as a chain, recomputed, or as a loop that compiles one of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class BlockRunner(NamedTuple):
    """How training runs blocks; neither changes parameters or results (but for which units dropout drops)."""

    remat: bool = False  # recompute what is inside of a block in the backward pass instead of keeping it
    scan: bool = False  # a loop: the program, and the time to compile it, no longer grow with the number of blocks

    def run(self, call: Callable, blocks: Sequence[nn.Module], x: jax.Array, each=None) -> tuple[jax.Array, Sequence]:
        """x after the last block, and after each of them (where there is a loop as one array, blocks first).

        Args:
          call: (block, x, its part of `each`) -> x.
          blocks: bound modules of one class and shape.
          x: [B, h, w, F].
          each: a sequence or an array with something for every block, or None.
        """
        if self.scan and len(blocks) > 1:
            return self._loop(call, blocks, x, each)
        call, outputs = nn.remat(call) if self.remat else call, []
        for index, block in enumerate(blocks):
            x = call(block, x, None if each is None else each[index])
            outputs.append(x)
        return x, outputs

    def _loop(self, call, blocks, x, each):
        # Parameters lie as they do without the loop, so that a checkpoint is one of both.
        params = jax.tree.map(lambda *p: jnp.stack(p), *(block.variables['params'] for block in blocks))
        block, _ = blocks[0].unbind()
        keys = jax.random.split(blocks[0].make_rng('dropout'), len(blocks)) if blocks[0].has_rng('dropout') else None

        def body(x, inputs):
            params, key, own = inputs
            rngs = {} if key is None else {'dropout': key}
            x = nn.apply(lambda bound: call(bound, x, own), block)({'params': params}, rngs=rngs)
            return x, x

        if self.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        each = each if each is None or isinstance(each, jax.Array) else jnp.stack(each)
        return jax.lax.scan(body, x, (params, keys, each))


DEFAULT = BlockRunner()
