"""The blocks of the priors' networks: gated residual blocks, with causal attention after every few of them.

A block adds projections of inputs that do not depend on the codes of its own step. The sampler computes them once for
many steps: `project` puts them into the collection `projections`, and blocks that get this collection read them.

Shapes: B batch, h w the whole map or, with a cache, the part that is computed in one call, F hidden channels,
R residual channels.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqvae2_jax.models.attention import CausalAttention
from vqvae2_jax.models.block_runner import NO_REMAT, BlockRunner
from vqvae2_jax.models.pointwise import Dropout, elu
from vqvae2_jax.models.rms_norm import RMSNorm

PerBlock = Sequence[jax.Array] | jax.Array  # one array for each block: a sequence, or an array [blocks, ...]
_SMALL = nn.initializers.variance_scaling(0.01, 'fan_in', 'truncated_normal')  # blocks start near the identity


def gate(y: jax.Array) -> jax.Array:
    """Multiplies the first half of the features by the sigmoid of the second half (PixelSNAIL, Chen et al. 2018).

    Args:
      y: [..., 2 F].

    Returns:
      [..., F].
    """
    value, weight = jnp.split(y, 2, axis=-1)
    return value * nn.sigmoid(weight)


class GatedBlock(nn.Module):
    """x + gate(conv(elu(norm(conv(elu(x)))))) with channels F -> R -> 2 F.

    `aux` is added after the first convolution, `condition` before the gate, both through 1x1 layers. The norm lets all
    orders train at the same high learning rate. Without it the activations of the vertical stack in raster order, which
    has no output layer, grow until gradients explode. (The tanh of Gated PixelCNN bounds them too, but costs
    likelihood.)

    Attributes:
      residual_channels: R.
      make_conv: makes a convolution: (features, *, kernel_init, dtype) -> a causal layer of `causal.py`, or `nn.Dense`.
      dropout: dropout rate.
      dropout_placement: 'inside', before the second convolution (PixelSNAIL), or 'after', on the block's output.
      dtype: dtype of the computation.
    """

    residual_channels: int
    make_conv: Callable[..., nn.Module]
    dropout: float
    dropout_placement: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        aux: jax.Array | None = None,
        condition: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Applies the block.

        Args:
          x: [B, h, w, F].
          aux: [B, h, w, F], in raster order the features of the vertical stack; None: no such input.
          condition: [B, h or 1, w or 1, F], from `Prior.condition`; None: unconditional.
          train: apply dropout, which needs the rng `dropout`.

        Returns:
          [B, h, w, F].
        """
        features = x.shape[-1]
        y = self.make_conv(self.residual_channels, dtype=self.dtype)(elu(x))
        y = self._add_projection(y, 'aux', None if aux is None else elu(aux))
        y = elu(RMSNorm(dtype=self.dtype)(y))
        dropout = Dropout(self.dropout)
        y = dropout(y, train=train) if self.dropout_placement == 'inside' else y
        y = self.make_conv(2 * features, kernel_init=_SMALL, dtype=self.dtype)(y)
        y = self._add_projection(y, 'condition', condition)
        x = x + gate(y)
        return dropout(x, train=train) if self.dropout_placement == 'after' else x

    def _add_projection(self, y, name, x):
        if self.has_variable('projections', name):
            return y + self.get_variable('projections', name)
        if x is None:
            return y
        projection = nn.Dense(y.shape[-1], dtype=self.dtype)(x)
        if self.is_mutable_collection('projections') and not self.is_initializing():
            self.put_variable('projections', name, projection)
        return y + projection


def run_blocks(
    runner: BlockRunner,
    blocks: Sequence[GatedBlock],
    x: jax.Array,
    aux: PerBlock | None = None,
    condition: jax.Array | None = None,
    train: bool = False,
) -> tuple[jax.Array, PerBlock]:
    """Applies gated blocks one after the other.

    Args:
      runner: runs the blocks with remat or as a scan.
      blocks: bound modules whose parameters have the same shapes.
      x: [B, h, w, F].
      aux: [B, h, w, F] for each block, or None.
      condition: [B, h or 1, w or 1, F], the same for all blocks, or None.
      train: apply dropout, which needs the rng `dropout`.

    Returns:
      x after the last block, and x after every block, see `BlockRunner.run`.
    """

    def call(block, x, aux):
        return block(x, aux=aux, condition=condition, train=train)

    return runner.run(call, blocks, x, aux)


def project(blocks: Sequence[GatedBlock], aux: PerBlock | None, condition: jax.Array | None) -> None:
    """Computes what gated blocks add to their features, for the collection `projections`, which has to be mutable.

    Args:
      blocks: bound modules.
      aux: [B, h, w, F] for each block, or None.
      condition: [B, h or 1, w or 1, F], the same for all blocks, or None; one of the two is there.
    """
    for index, block in enumerate(blocks):
        block_aux = None if aux is None else aux[index]
        # The features of the block do not matter: its result is not used, so compilers remove what computes it.
        block(condition if aux is None else block_aux, aux=block_aux, condition=condition)


class BlocksWithAttention(nn.Module):
    """Holds gated blocks and the attention after them.

    `GatedResNetStack` applies them, so that each block is rematerialized on its own.
    """

    num_residual_blocks: int
    make_block: Callable[[], GatedBlock]
    make_attention: Callable[[], CausalAttention]

    def setup(self):
        self.blocks = [self.make_block() for _ in range(self.num_residual_blocks)]
        self.attend = self.make_attention()


class GatedResNetStack(nn.Module):
    """`num_residual_blocks` gated blocks, with `num_attention_layers` attention layers at equal distances.

    Attributes:
      num_residual_blocks: number of gated blocks.
      num_attention_layers: number of attention layers, at most the number of blocks.
      make_block: makes a gated block.
      make_attention: makes an attention layer.
    """

    num_residual_blocks: int
    num_attention_layers: int
    make_block: Callable[[], GatedBlock]
    make_attention: Callable[[], CausalAttention]

    def setup(self):
        self.blocks_per_attention = self.num_residual_blocks // max(self.num_attention_layers, 1)
        self.stacks = [
            BlocksWithAttention(self.blocks_per_attention, self.make_block, self.make_attention)
            for _ in range(self.num_attention_layers)
        ]
        num_rest = self.num_residual_blocks - self.blocks_per_attention * self.num_attention_layers
        self.rest = [self.make_block() for _ in range(num_rest)]

    def all_blocks(self) -> list[GatedBlock]:
        """Returns the gated blocks in the order in which they run."""
        return [block for stack in self.stacks for block in stack.blocks] + list(self.rest)

    def __call__(
        self,
        x: jax.Array,
        aux: PerBlock | None,
        condition: jax.Array | None,
        step: jax.Array | None,
        train: bool,
        runner: BlockRunner,
    ) -> jax.Array:
        """Applies the stack.

        Args:
          x: [B, h, w, F].
          aux: [B, h, w, F] for each block, or None.
          condition: [B, h or 1, w or 1, F], or None.
          step: int32 [], the step of the order that x belongs to; used with caches only.
          train: apply dropout, which needs the rng `dropout`.
          runner: runs the blocks with remat or as a scan.

        Returns:
          [B, h, w, F].
        """

        def attend(layer, x, _):
            return x + layer(x, step, train=train)

        def apply_part(part, x, aux):
            x, _ = run_blocks(runner, part.blocks, x, aux, condition, train)
            return runner.run(attend, [part.attend], x)[0]

        part_aux, rest_aux = None, None
        if aux is not None:
            size = self.blocks_per_attention
            part_aux = [aux[i * size : (i + 1) * size] for i in range(len(self.stacks))]
            rest_aux = aux[size * len(self.stacks) :]
        # Without remat here: the blocks inside a part are rematerialized one by one.
        x, _ = runner._replace(remat=NO_REMAT).run(apply_part, self.stacks, x, part_aux)
        return run_blocks(runner, self.rest, x, rest_aux, condition, train)[0]
