"""What the priors' networks consist of: residual gated blocks, and attention after every few of them.

Glossary of shapes: B batch, h w the part of the map at hand, F features, R residual.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqvae2_jax.models.block_runner import BlockRunner
from vqvae2_jax.models.causal import CausalAttention

_SMALL = nn.initializers.variance_scaling(0.01, 'fan_in', 'truncated_normal')  # blocks start near the identity


def gate(y: jax.Array) -> jax.Array:
    """[..., 2 F] -> [..., F]: one half times the sigmoid of the other (PixelSNAIL, Chen et al. 2018)."""
    value, weight = jnp.split(y, 2, axis=-1)
    return value * nn.sigmoid(weight)


class GatedBlock(nn.Module):
    """x + gate(conv(elu(norm(conv(elu(x)))))), F -> R -> 2 F; `beside` joins inside, `condition` before the gate.

    The norm lets all orders learn at the same, high rate. Without it the vertical stack in raster order, which no
    output holds back, grows until gradients explode. (Gated PixelCNN's tanh would hold it too, but costs likelihood.)
    """

    residual_channels: int
    layer: Callable[..., nn.Module]  # (features, kernel_init=, dtype=) -> a causal convolution, or nn.Dense
    dropout: float
    dropout_placement: str  # 'inside': before the second convolution (PixelSNAIL); 'after': on the block's output
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, *, beside=None, condition=None, train=False):
        # x [B, h, w, F], beside [B, h, w, F], condition [B, h or 1, w or 1, F] -> [B, h, w, F]
        features = x.shape[-1]
        y = self.layer(self.residual_channels, dtype=self.dtype)(nn.elu(x))
        if beside is not None:
            y = y + nn.Dense(self.residual_channels, dtype=self.dtype)(nn.elu(beside))
        y = nn.elu(nn.RMSNorm(dtype=self.dtype)(y))
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        y = dropout(y) if self.dropout_placement == 'inside' else y
        y = self.layer(2 * features, kernel_init=_SMALL, dtype=self.dtype)(y)
        if condition is not None:
            y = y + nn.Dense(2 * features, dtype=self.dtype)(condition)
        x = x + gate(y)
        return dropout(x) if self.dropout_placement == 'after' else x


def run_blocks(repeat: BlockRunner, blocks: Sequence[GatedBlock], x, beside=None, condition=None, train=False):
    """x [B, h, w, F] after the last block, and after each, as in `BlockRunner.run`; `beside` has an entry for each."""

    def call(block, x, beside):
        return block(x, beside=beside, condition=condition, train=train)

    return repeat.run(call, blocks, x, beside)


class BlocksWithAttention(nn.Module):
    """Blocks, then attention."""

    num_residual_blocks: int
    block: Callable[[], GatedBlock]
    attention: Callable[[], CausalAttention]

    def setup(self):
        self.blocks = [self.block() for _ in range(self.num_residual_blocks)]
        self.attend = self.attention()

    def __call__(self, x, step, beside, condition, train, repeat):
        # As in GatedResNetStack.
        def attend(layer, x, _):
            return x + layer(x, step, train=train)

        x, _ = run_blocks(repeat, self.blocks, x, beside, condition, train)
        return repeat.run(attend, [self.attend], x)[0]


class GatedResNetStack(nn.Module):
    """Blocks with attention after every few of them; `repeat` may run them as a loop of loops."""

    num_residual_blocks: int
    num_attention_layers: int
    block: Callable[[], GatedBlock]
    attention: Callable[[], CausalAttention]

    def setup(self):
        every = self.num_residual_blocks // max(self.num_attention_layers, 1)
        self.stacks = [BlocksWithAttention(every, self.block, self.attention) for _ in range(self.num_attention_layers)]
        self.rest = [self.block() for _ in range(self.num_residual_blocks - every * self.num_attention_layers)]

    def __call__(self, x, step, beside, condition, train, repeat) -> jax.Array:
        """x [B, h, w, F] after all blocks.

        Args:
          x: [B, h, w, F].
          step: int32 [] where x is streamed, of which the attentions' caches must know.
          beside: None, or [B, h, w, F] for each block.
          condition: None or [B, h or 1, w or 1, F].
          train: dropout on.
          repeat: how blocks are run.
        """

        def call(stack, x, beside):
            return stack(x, step, beside, condition, train, repeat)

        parts, rest = None, beside
        if beside is not None:
            every = self.num_residual_blocks // max(self.num_attention_layers, 1)
            parts = [beside[i * every : (i + 1) * every] for i in range(len(self.stacks))]
            rest = beside[every * len(self.stacks) :]
        # What is inside of a stack recomputes itself.
        x, _ = repeat._replace(remat=False).run(call, self.stacks, x, parts)
        return run_blocks(repeat, self.rest, x, rest, condition, train)[0]
