"""A residual classifier (He et al. 2016, pre-activation) with group normalization.

Unlike batch norm, it has no running statistics, and the logits of an image do not depend on its batch or the devices.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp


class ResNet(nn.Module):
    """Stages of two-convolution blocks; each stage after the first halves the map.

    Shapes: B batch, H W C image, S classes.

    Attributes:
      num_classes: S.
      widths: number of channels of each stage.
      blocks: number of blocks of each stage.
      stem_stride: stride of the first convolution, such as 2 for images of 128 pixels and more.
      dropout: dropout rate before the last layer.
      dtype: dtype of the computation; logits are float32.
    """

    num_classes: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    stem_stride: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, image: jax.Array, *, train: bool = False, with_features: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Computes logits.

        Args:
          image: float32 [B, H, W, C] in [-1, 1].
          train: apply dropout, which needs the rng `dropout`.
          with_features: also return the features before the last layer.

        Returns:
          Logits, float32 [B, S], and with `with_features` also float32 [B, widths[-1]].

        Raises:
          ValueError: `widths` and `blocks` differ in length.
        """
        if len(self.widths) != len(self.blocks):
            raise ValueError(f'widths is {self.widths}; it must have as many items as blocks={self.blocks}')
        stride = (self.stem_stride, self.stem_stride)
        x = nn.Conv(self.widths[0], (3, 3), stride, use_bias=False, dtype=self.dtype)(image)
        for stage, (width, count) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for block in range(count):
                x = self._block(x, width, stride=2 if stage and not block else 1)
        features = jnp.mean(self._norm(x), axis=(1, 2)).astype(jnp.float32)  # [B, widths[-1]]
        logits = nn.Dense(self.num_classes)(nn.Dropout(self.dropout, deterministic=not train)(features))
        return (logits, features) if with_features else logits

    def _block(self, x, width, stride):
        y = self._norm(x)
        strides = (stride, stride)
        change = stride > 1 or x.shape[-1] != width
        shortcut = nn.Conv(width, (1, 1), strides, use_bias=False, dtype=self.dtype)(y) if change else x
        y = nn.Conv(width, (3, 3), strides, use_bias=False, dtype=self.dtype)(y)
        return shortcut + nn.Conv(width, (3, 3), use_bias=False, dtype=self.dtype)(self._norm(y))

    def _norm(self, x):
        return nn.relu(nn.GroupNorm(num_groups=math.gcd(32, x.shape[-1]), dtype=self.dtype)(x))
