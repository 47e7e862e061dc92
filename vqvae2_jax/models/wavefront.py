"""The prior in wavefront order: one stack of residual gated convolutions, all positions of a step at once.

A convolution sees what its window holds of the same and of earlier steps: the rows above as far as `skew` columns
further right in each, and those below from `skew` columns further left on. The first one, over the codes, sees earlier
steps only. With depth all earlier positions come into reach. Of the row above, position (i, j) sees the codes up to
column j + skew - 1, where raster order sees the whole row; in exchange it sees those of the row below up to column
j - skew - 1.

Glossary of shapes: B batch, H W this level's map, K codebook size, F hidden, n positions of a step.
"""

import functools

import jax
import jax.numpy as jnp

from vqvae2_jax.models.causal import WavefrontConv
from vqvae2_jax.models.order import GenerationOrder
from vqvae2_jax.models.prior import Prior


class WavefrontPrior(Prior):
    """Fewer steps than positions: W + skew (H - 1) of them, each exact."""

    skew: int  # how many columns each row is behind the one above

    def setup(self):
        super().setup()
        if self.kernel_size < 3:
            raise ValueError(f'kernel_size is {self.kernel_size}; in wavefront order it must be 3 or more')
        self.embed = self._embed(self.codebook_size)
        conv = functools.partial(WavefrontConv, kernel_size=self.kernel_size, order=self.order)
        self.first = conv(self.hidden_channels, strict=True, dtype=self.dtype)
        self.trunk = self._trunk(conv)

    @property
    def order(self) -> GenerationOrder:
        return GenerationOrder(self.shape, self.skew)

    def _whole(self, codes, condition, *, train):
        rows, columns = jnp.arange(self.shape[0])[:, None], jnp.arange(self.shape[1])
        return self._features(codes, rows, columns, condition, train=train)

    def diagonal(self, previous: jax.Array, step: jax.Array, condition: jax.Array | None) -> jax.Array:
        """Logits float32 [B, n, K] of the positions of `step`, as in `GenerationOrder.positions`.

        Those of positions off the map mean nothing.

        Args:
          previous: int32 [B, n], the codes of the step before (any where it has no position).
          step: int32 [].
          condition: [B, H or 1, W or 1, F] of the whole map, or None.
        """
        rows, columns, _ = self.order.positions(step)
        if condition is not None and condition.shape[1:3] != (1, 1):
            condition = condition[:, rows, columns][:, :, None]  # [B, n, 1, F]
        x = self._features(previous[..., None], rows[:, None], columns[:, None], condition, step)
        return self._head(x, condition)[:, :, 0]

    def _features(self, codes, rows, columns, condition, step=None, *, train=False):
        # rows and columns broadcast to the positions [h, w] at hand
        x = self.first(self.embed(codes)) + self.row_embed(rows) + self.column_embed(columns)  # [B, h, w, F]
        return self.trunk(x, step, None, condition, train, self._repeat(train))
