"""The prior in raster order: two stacks of gated residual convolutions (Gated PixelCNN), with attention.

The vertical stack covers all rows above. The horizontal stack covers the codes to the left and takes the features of
the vertical stack, so the receptive field has no blind spot. The code map is shifted by one row for the vertical stack
and by one column for the horizontal stack.

Shapes: B batch, H W this level's map, h w the decoded part of it, K codebook size, F hidden channels.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vqvae2_jax.models.causal import CausalConv
from vqvae2_jax.models.gated_resnet import run_blocks
from vqvae2_jax.models.order import GenerationOrder
from vqvae2_jax.models.prior import Prior


class RasterPrior(Prior):
    """The paper's order: one position at a time, row by row. Fields as in `Prior`."""

    def setup(self):
        super().setup()
        half = self.kernel_size // 2 + 1
        self.embed = self._embed(self.codebook_size + 1)  # the last one means "off the map"
        vertical = functools.partial(CausalConv, kernel_size=(half, self.kernel_size), stream='rows')
        horizontal = functools.partial(CausalConv, kernel_size=(1, half), stream='columns')
        # The features of the vertical stack also enter the residual stream here: through the blocks alone, which start
        # near the identity, the codes above would be learned late.
        self.vertical_first = vertical(self.hidden_channels, dtype=self.dtype)
        self.horizontal_first = horizontal(self.hidden_channels, dtype=self.dtype)
        self.vertical_blocks = self._blocks(self.num_residual_blocks, vertical)
        self.horizontal_trunk = self._stack(horizontal)

    @property
    def order(self) -> GenerationOrder:
        """Raster order."""
        return GenerationOrder.raster(self.shape)

    def _forward_full(self, codes, condition, *, train):
        rows, columns = jnp.arange(self.shape[0]), jnp.arange(self.shape[1])
        outside = self.codebook_size
        above = jnp.pad(codes, ((0, 0), (1, 0), (0, 0)), constant_values=outside)[:, :-1]  # [B, H, W]
        left = jnp.pad(codes, ((0, 0), (0, 0), (1, 0)), constant_values=outside)[:, :, :-1]  # [B, H, W]
        first, vertical = self._vertical(above, rows, condition, train=train)
        return self._horizontal(left, rows, columns, first, vertical, condition, train=train)

    def decode_row(self, above: jax.Array, rows: jax.Array, condition: jax.Array | None) -> tuple[jax.Array, ...]:
        """Computes the features of the vertical stack for one row, with the cache `rows`.

        Args:
          above: int32 [B, 1, W], the codes of the row above; K in the first row.
          rows: int32 [1], the index of the row.
          condition: [B, 1, W or 1, F] or None.

        Returns:
          [B, 1, W, F] for the first convolution and for each block.
        """
        first, outputs = self._vertical(above, rows, condition)
        return first, *outputs

    def _vertical(self, above, rows, condition, *, train=False):
        x = self.vertical_first(self.embed(above))
        x = x + self.row_embed(rows)[:, None] + self.column_embed(jnp.arange(self.shape[1]))
        return x, run_blocks(self._runner(train), self.vertical_blocks, x, condition=condition, train=train)[1]

    def decode_position(
        self,
        left: jax.Array,
        rows: jax.Array,
        columns: jax.Array,
        vertical: Sequence[jax.Array],
        condition: jax.Array | None,
    ) -> jax.Array:
        """Computes the logits of one position, with the caches `columns` and `attention`.

        Args:
          left: int32 [B, 1, 1], the code to the left; K in the first column.
          rows: int32 [1], the index of the row.
          columns: int32 [1], the index of the column.
          vertical: [B, 1, 1, F] for the first convolution and for each block, from `decode_row`.
          condition: [B, 1, 1, F] or None.

        Returns:
          float32 [B, 1, 1, K].
        """
        first, *vertical = vertical
        return self._head(self._horizontal(left, rows, columns, first, vertical, condition), condition)

    def _horizontal(self, left, rows, columns, first, vertical, condition, *, train=False):
        x = self.horizontal_first(self.embed(left)) + first  # [B, h, w, F]
        step = rows[0] * self.shape[1] + columns[0]  # used with a cache, for one position
        return self.horizontal_trunk(x, step, vertical, condition, train, self._runner(train))
