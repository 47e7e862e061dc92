"""Runs a chain of equal blocks: one by one, with rematerialization, or as a scan that compiles one block."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


def _is_large_convolution(primitive, *arrays, **params):
    # Convolutions of a 1x1 kernel, and products, take little time for the memory of their outputs.
    if primitive is not jax.lax.conv_general_dilated_p:
        return False
    _, _, *window = params['dimension_numbers'].rhs_spec
    return any(arrays[1].shape[axis] > 1 for axis in window)


# The policies of `jax.checkpoint` by which training recomputes the inside of blocks in the backward pass: all of it, or
# all but the outputs of large convolutions.
_POLICIES = {'blocks': jax.checkpoint_policies.nothing_saveable, 'blocks_but_convs': _is_large_convolution}
NO_REMAT = 'none'
REMAT_CHOICES = (NO_REMAT, *_POLICIES)


class BlockRunner(NamedTuple):
    """How training runs blocks. No option changes parameters or results, except for the units dropout drops.

    Attributes:
      remat: one of `REMAT_CHOICES`, the activations that the backward pass recomputes instead of keeping them.
      scan: run the blocks as a scan, so that compile time does not grow with their number.
      dtype: a scan casts kernels to it once and not in every step; None: it does not cast.
    """

    remat: str = NO_REMAT
    scan: bool = False
    dtype: jnp.dtype | None = None

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
        outputs = []
        if self.remat != NO_REMAT:
            call = nn.remat(call, policy=_POLICIES[self.remat])
        for index, block in enumerate(blocks):
            x = call(block, x, None if aux is None else aux[index])
            outputs.append(x)
        return x, outputs

    def _scan(self, call, blocks, x, aux):
        # Parameters are stacked here, so their paths and checkpoints are the same with and without the scan.
        params = jax.tree.map(self._stack, *(block.variables['params'] for block in blocks))
        block, _ = blocks[0].unbind()
        keys = jax.random.split(blocks[0].make_rng('dropout'), len(blocks)) if blocks[0].has_rng('dropout') else None

        def body(x, inputs):
            params, key, block_aux = inputs
            rngs = {} if key is None else {'dropout': key}
            x = nn.apply(lambda bound: call(bound, x, block_aux), block)({'params': params}, rngs=rngs)
            return x, x

        if self.remat != NO_REMAT:
            body = jax.checkpoint(body, prevent_cse=False, policy=_POLICIES[self.remat])
        aux = aux if aux is None or isinstance(aux, jax.Array) else jnp.stack(aux)
        return jax.lax.scan(body, x, (params, keys, aux))

    def _stack(self, *arrays):
        is_kernel = arrays[0].ndim > 1  # scales and biases may be used in float32
        return jnp.stack([x.astype(self.dtype) if is_kernel and self.dtype else x for x in arrays])


DEFAULT = BlockRunner()  # one by one, activations stored
