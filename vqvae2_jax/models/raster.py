"""The prior in raster order: two stacks of residual gated convolutions (Gated PixelCNN), with attention.

The vertical stack sees all rows above, the horizontal one the codes to the left and, through the vertical one,
everything above; no position is out of reach. The code map is shifted by one row for the vertical stack and by one
column for the horizontal one.

Glossary of shapes: B batch, H W this level's map (h w: the part of it at hand), K codebook size, F hidden.
"""

import functools

import jax
import jax.numpy as jnp

from vqvae2_jax.models.causal import CausalConv
from vqvae2_jax.models.gated_resnet import run_blocks
from vqvae2_jax.models.order import GenerationOrder
from vqvae2_jax.models.prior import Prior


class RasterPrior(Prior):
    """The paper's order: row by row, position by position."""

    def setup(self):
        super().setup()
        half = self.kernel_size // 2 + 1
        self.embed = self._embed(self.codebook_size + 1)  # the last one stands for "outside the map"
        vertical = functools.partial(CausalConv, kernel_size=(half, self.kernel_size), stream='rows')
        horizontal = functools.partial(CausalConv, kernel_size=(1, half), stream='columns')
        # All codes within reach enter the sum that the blocks add to: through the blocks alone, which start near the
        # identity, those above would be learnt late.
        self.vertical_first = vertical(self.hidden_channels, dtype=self.dtype)
        self.horizontal_first = horizontal(self.hidden_channels, dtype=self.dtype)
        self.vertical_blocks = self._blocks(self.num_residual_blocks, vertical)
        self.horizontal_trunk = self._trunk(horizontal)

    @property
    def order(self) -> GenerationOrder:
        return GenerationOrder.raster(self.shape)

    def _whole(self, codes, condition, *, train):
        rows, columns = jnp.arange(self.shape[0]), jnp.arange(self.shape[1])
        outside = self.codebook_size
        above = jnp.pad(codes, ((0, 0), (1, 0), (0, 0)), constant_values=outside)[:, :-1]  # [B, H, W]
        left = jnp.pad(codes, ((0, 0), (0, 0), (1, 0)), constant_values=outside)[:, :, :-1]  # [B, H, W]
        first, vertical = self._vertical(above, rows, condition, train=train)
        return self._horizontal(left, rows, columns, first, vertical, condition, train=train)

    def vertical(self, above, rows, condition) -> tuple[jax.Array, ...]:
        """What each layer knows of all rows above, the first convolution included.

        Args:
          above: int32 [B, h, W], for each row at hand the codes of the row before it (K: outside the map).
          rows: int32 [h], their indices.
          condition: [B, h or 1, W or 1, F] or None.

        Returns:
          [B, h, W, F] for the first convolution, and for each block.
        """
        first, outputs = self._vertical(above, rows, condition)
        return first, *outputs

    def _vertical(self, above, rows, condition, *, train=False):
        x = self.vertical_first(self.embed(above))
        x = x + self.row_embed(rows)[:, None] + self.column_embed(jnp.arange(self.shape[1]))
        return x, run_blocks(self._repeat(train), self.vertical_blocks, x, condition=condition, train=train)[1]

    def horizontal(self, left, rows, columns, vertical, condition) -> jax.Array:
        """Logits float32 [B, h, w, K].

        Args:
          left: int32 [B, h, w], for each position the code to its left (K: outside the map).
          rows, columns: int32 [h], [w], the positions' indices.
          vertical: [B, h, w, F] each, from `vertical`.
          condition: [B, h or 1, w or 1, F] or None.
        """
        first, *vertical = vertical
        return self._head(self._horizontal(left, rows, columns, first, vertical, condition), condition)

    def _horizontal(self, left, rows, columns, first, vertical, condition, *, train=False):
        x = self.horizontal_first(self.embed(left)) + first  # [B, h, w, F]
        step = rows[0] * self.shape[1] + columns[0]  # where one position is at hand
        return self.horizontal_trunk(x, step, vertical, condition, train, self._repeat(train))
