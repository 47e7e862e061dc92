"""The prior in raster order: two stacks of gated residual convolutions (Gated PixelCNN), with attention.

The vertical stack covers all rows above. The horizontal stack covers the codes to the left and takes the features of
the vertical stack, so the receptive field has no blind spot. The code map is shifted by one row for the vertical stack
and by one column for the horizontal stack.

Shapes: B batch, H W this level's map, K codebook size, F hidden channels.
"""

import functools

import jax
import jax.numpy as jnp

from vqvae2_jax.models.causal import CausalConv
from vqvae2_jax.models.gated_resnet import PerBlock, project, run_blocks
from vqvae2_jax.models.order import GenerationOrder
from vqvae2_jax.models.prior import Prior


class RasterPrior(Prior):
    """The paper's order: one position at a time, row by row. The fields are those of `Prior`."""

    def setup(self):
        super().setup()
        half = self.kernel_size // 2 + 1
        self.embed = self._embed(self.codebook_size + 1)  # the last one means "off the map"
        vertical = functools.partial(CausalConv, kernel_size=(half, self.kernel_size), cache_name='rows')
        horizontal = functools.partial(CausalConv, kernel_size=(1, half), cache_name='columns')
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

    def _map_features(self, codes, condition, *, train):
        off_map = self.codebook_size
        above = jnp.pad(codes, ((0, 0), (1, 0), (0, 0)), constant_values=off_map)[:, :-1]  # [B, H, W]
        left = jnp.pad(codes, ((0, 0), (0, 0), (1, 0)), constant_values=off_map)[:, :, :-1]  # [B, H, W]
        vertical = self.vertical_features(above, jnp.arange(self.shape[0]), condition, train=train)
        return self._horizontal(left, vertical, condition, train=train)

    def vertical_features(
        self, above: jax.Array, rows: jax.Array, condition: jax.Array | None, *, train: bool = False
    ) -> tuple[jax.Array, PerBlock]:
        """Computes the features of the vertical stack: for whole maps, or for one row with the cache `rows`.

        Args:
          above: int32 [B, H, W] or [B, 1, W], the code above every position; K in the first row.
          rows: int32 [H] or [1], the indices of the rows.
          condition: the part of the result of `condition` that belongs to these rows, or None.
          train: apply dropout, which needs the rng `dropout`.

        Returns:
          Features after the first convolution, [B, H or 1, W, F], and after each block, of the same shape.
        """
        x = self.vertical_first(self.embed(above))
        x = x + self.row_embed(rows)[:, None] + self.column_embed(jnp.arange(self.shape[1]))
        return x, run_blocks(self._runner(train), self.vertical_blocks, x, condition=condition, train=train)[1]

    def decode_row(self, above: jax.Array, row: jax.Array, condition: jax.Array | None) -> jax.Array:
        """Computes all that the positions of a row have in common, with the cache `rows`.

        It also fills the collection `projections` of the blocks that `decode_position` runs.

        Args:
          above: int32 [B, W], the codes above; K in the first row.
          row: int32 [], the index of the row.
          condition: the part of the result of `condition` that belongs to the row, [B, 1, W or 1, F], or None.

        Returns:
          Features of the vertical stack after the first convolution, [B, 1, W, F].
        """
        first, blocks = self.vertical_features(above[:, None], row[None], condition)
        project(self.horizontal_trunk.all_blocks(), blocks, condition)
        if condition is not None:
            project(self.output_blocks, None, condition)
        return first

    def decode_position(self, left: jax.Array, step: jax.Array, first: jax.Array) -> jax.Array:
        """Computes the logits of one position, with the caches `columns` and `attention`.

        It needs the collection `projections` of `decode_row` at the position: each array [B, 1, 1, features].

        Args:
          left: int32 [B, 1], the code to the left; K in the first column.
          step: int32 [], row * W + column of the position.
          first: the result of `decode_row` at the position, [B, 1, 1, F].

        Returns:
          float32 [B, 1, K].
        """
        return self._head(self._horizontal(left[:, None], (first, None), None, step), None)[:, 0]

    def _horizontal(self, left, vertical, condition, step=None, *, train=False):
        first, blocks = vertical
        x = self.horizontal_first(self.embed(left)) + first
        return self.horizontal_trunk(x, blocks, condition, step, train, self._runner(train))
