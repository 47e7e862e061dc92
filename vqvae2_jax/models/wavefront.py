"""The prior in wavefront order: one stack of gated residual convolutions, all positions of a step at once.

A convolution covers the positions in its window that belong to the same or earlier steps. The first one, over the
codes, covers earlier steps only. With depth the receptive field reaches all earlier positions. In the row above,
position (i, j) depends on the columns up to j + skew - 1, whereas in raster order it depends on the whole row; in the
row below it depends on the columns up to j - skew - 1.

Shapes: B batch, H W this level's map, K codebook size, F hidden channels, n positions of a step.
"""

import functools

import jax
import jax.numpy as jnp

from vqvae2_jax.models.causal import WavefrontConv
from vqvae2_jax.models.gated_resnet import project
from vqvae2_jax.models.order import GenerationOrder
from vqvae2_jax.models.prior import Prior


class WavefrontPrior(Prior):
    """Generates a map in W + skew (H - 1) exact steps, which are fewer than the positions.

    Attributes:
      skew: number of columns that a row is behind the row above. The other fields are those of `Prior`.
    """

    skew: int

    def setup(self):
        super().setup()
        if self.kernel_size < 3:
            raise ValueError(f'kernel_size is {self.kernel_size}; in wavefront order it must be 3 or more')
        self.embed = self._embed(self.codebook_size)
        conv = functools.partial(WavefrontConv, kernel_size=self.kernel_size, order=self.order)
        self.first = conv(self.hidden_channels, strict=True, dtype=self.dtype)
        self.trunk = self._stack(conv)

    @property
    def order(self) -> GenerationOrder:
        """Wavefront order with this skew."""
        return GenerationOrder(self.shape, self.skew)

    def _map_features(self, codes, condition, *, train):
        rows, columns = jnp.arange(self.shape[0])[:, None], jnp.arange(self.shape[1])
        return self._features(codes, rows, columns, condition, train=train)

    def project_condition(self, condition: jax.Array) -> None:
        """Fills the collection `projections` with the results of the blocks' layers over the condition.

        Args:
          condition: the result of `condition`, [B, H or 1, W or 1, F].
        """
        project([*self.trunk.all_blocks(), *self.output_blocks], None, condition)

    def decode_step(self, previous: jax.Array, step: jax.Array, condition: jax.Array | None) -> jax.Array:
        """Computes the logits of one step, with the caches `diagonals` and `attention`.

        Args:
          previous: int32 [B, n], the codes of the previous step; any codes at positions off the map and in step 0.
            Their number decides how many positions of the step are computed, see `GenerationOrder.phases`.
          step: int32 [], the number of the step.
          condition: the result of `condition` at the positions of the step, [B, n or 1, 1, F], or None: unconditional,
            or there is the collection `projections` at these positions, [B, n or 1, 1, features] each.

        Returns:
          float32 [B, n, K] at the positions that `self.order.positions(step, n)` returns; undefined off the map.
        """
        rows, columns, _ = self.order.positions(step, previous.shape[1])
        x = self._features(previous[..., None], rows[:, None], columns[:, None], condition, step)
        return self._head(x, condition)[:, :, 0]

    def _features(self, codes, rows, columns, condition, step=None, *, train=False):
        # rows and columns broadcast to the positions [h, w] of `codes`
        x = self.first(self.embed(codes)) + self.row_embed(rows) + self.column_embed(columns)  # [B, h, w, F]
        return self.trunk(x, None, condition, step, train, self._runner(train))
