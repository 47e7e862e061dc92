"""The autoregressive prior over one level's codes (VQ-VAE-2 section 3.2, tables 3 and 4), in raster order.

Two stacks of residual gated convolutions (Gated PixelCNN): the vertical one sees all rows above, the horizontal one the
codes to the left and, through the vertical one, everything above; no position is out of reach. Causal attention follows
every few layers where asked. A residual stack over the coarser levels' codes and the class condition every block.

Causality comes from the input alone: the code map is shifted by one row for the vertical stack and by one column for
the horizontal one, and every layer after that may see its own position. The same methods run over whole maps and, with
the caches of `causal.py`, over one row or one position at a time.

Glossary of shapes: B batch, H W this level's map (h w: the part of it at hand), K codebook size, F hidden, R residual.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqvae2_jax.models.causal import CausalAttention, CausalConv
from vqvae2_jax.models.residual import ResidualStack

_SMALL = nn.initializers.variance_scaling(0.01, 'fan_in', 'truncated_normal')  # blocks start near the identity


def gate(y: jax.Array) -> jax.Array:
    """[..., 2 F] -> [..., F]: one half times the sigmoid of the other (PixelSNAIL; Gated PixelCNN adds a tanh)."""
    value, weight = jnp.split(y, 2, axis=-1)
    return value * nn.sigmoid(weight)


class GatedBlock(nn.Module):
    """x + gate(conv(elu(conv(elu(x))))), F -> R -> 2 F; `beside` joins inside, `condition` before the gate."""

    residual: int
    kernel: tuple[int, int]
    stream: str | None  # 'rows', 'columns', or None for 1x1 layers without a past
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, *, beside=None, condition=None, train=False):
        # x [B, h, w, F], beside [B, h, w, F], condition [B, h or 1, w or 1, F] -> [B, h, w, F]
        features = x.shape[-1]
        y = self._conv(self.residual, nn.initializers.lecun_normal())(nn.elu(x))
        if beside is not None:
            y = y + nn.Dense(self.residual, dtype=self.dtype)(nn.elu(beside))
        y = nn.Dropout(self.dropout, deterministic=not train)(nn.elu(y))
        y = self._conv(2 * features, _SMALL)(y)
        if condition is not None:
            y = y + nn.Dense(2 * features, dtype=self.dtype)(condition)
        return x + gate(y)

    def _conv(self, features, kernel_init):
        if self.stream is None:
            return nn.Dense(features, kernel_init=kernel_init, dtype=self.dtype)
        return CausalConv(features, self.kernel, self.stream, kernel_init=kernel_init, dtype=self.dtype)


class Prior(nn.Module):
    """p(codes of one level | codes of all coarser levels, class label)."""

    shape: tuple[int, int]  # H, W
    codebook_size: int
    coarser_codebook_sizes: tuple[int, ...] = ()  # finest first
    num_classes: int = 0  # 0: unconditional
    hidden: int = 512
    residual: int = 2048
    layers: int = 20
    kernel: int = 5
    attention_layers: int = 0
    heads: int = 8
    output_layers: int = 0  # 1x1 residual blocks on top
    condition_layers: int = 0  # residual blocks over the coarser levels
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        if self.kernel % 2 == 0:
            raise ValueError(f'kernel must be odd, so that it has a middle; it is {self.kernel}')
        if self.attention_layers > self.layers:
            raise ValueError(f'attention_layers={self.attention_layers} exceeds layers={self.layers}')
        height, width = self.shape
        half = self.kernel // 2 + 1
        block = {'residual': self.residual, 'dropout': self.dropout, 'dtype': self.dtype}
        depth = range(self.layers)
        self.embed = self._embed(self.codebook_size + 1)  # the last one stands for "outside the map"
        self.row_embed, self.column_embed = self._embed(height), self._embed(width)
        self.vertical_blocks = [GatedBlock(kernel=(half, self.kernel), stream='rows', **block) for _ in depth]
        self.horizontal_blocks = [GatedBlock(kernel=(1, half), stream='columns', **block) for _ in depth]
        self.attention = [
            CausalAttention(self.heads, height * width, self.attention_dropout, dtype=self.dtype)
            for _ in range(self.attention_layers)
        ]
        self.output_blocks = [GatedBlock(kernel=(1, 1), stream=None, **block) for _ in range(self.output_layers)]
        self.logits = nn.Dense(self.codebook_size)  # float32: bfloat16 has steps of 0.06 at a logit of 10
        if self.num_classes:
            self.class_embed = self._embed(self.num_classes)
        if self.coarser_codebook_sizes:
            self.coarser_embeds = [self._embed(size) for size in self.coarser_codebook_sizes]
            self.condition_in = nn.Conv(self.hidden, (3, 3), dtype=self.dtype)
            self.condition_stack = ResidualStack(self.condition_layers, self.residual, self.dtype)

    def _embed(self, size: int) -> nn.Embed:
        # Unit-sized rows: lookups are this network's inputs, and the default would make them tiny (1 / size).
        return nn.Embed(size, self.hidden, embedding_init=nn.initializers.normal(1.0), dtype=self.dtype)

    def __call__(self, codes, labels=None, coarser=(), *, train: bool = False) -> jax.Array:
        """Logits [B, H, W, K] float32 of every code given the earlier ones.

        Args:
          codes: int32 [B, H, W].
          labels: int32 [B], when the prior has classes.
          coarser: int32 [B, h_l, w_l] of every coarser level, finest first.
          train: dropout on; needs rng `dropout`.
        """
        condition = self.condition(labels, coarser, train=train)
        rows, columns = jnp.arange(self.shape[0]), jnp.arange(self.shape[1])
        outside = self.codebook_size
        above = jnp.pad(codes, ((0, 0), (1, 0), (0, 0)), constant_values=outside)[:, :-1]  # [B, H, W]
        left = jnp.pad(codes, ((0, 0), (0, 0), (1, 0)), constant_values=outside)[:, :, :-1]  # [B, H, W]
        vertical = self.vertical(above, rows, condition, train=train)
        return self.horizontal(left, rows, columns, vertical, condition, train=train)

    def condition(self, labels=None, coarser=(), *, train: bool = False) -> jax.Array | None:
        """Class and coarser levels as one map [B, H, W, F], or [B, 1, 1, F] for the class alone; None for neither."""
        self._check_condition(labels, coarser)
        condition = None
        if self.coarser_codebook_sizes:
            maps = [embed(codes) for embed, codes in zip(self.coarser_embeds, coarser, strict=True)]
            grown = [
                jnp.repeat(jnp.repeat(m, self.shape[0] // m.shape[1], 1), self.shape[1] // m.shape[2], 2) for m in maps
            ]
            condition = self.condition_stack(self.condition_in(jnp.concatenate(grown, axis=-1)))  # [B, H, W, F]
        if self.num_classes:
            label = self.class_embed(labels)[:, None, None]  # [B, 1, 1, F]
            condition = label if condition is None else condition + label
        return condition

    def _check_condition(self, labels, coarser):
        if self.num_classes and labels is None:
            raise ValueError(f'this prior is conditioned on {self.num_classes} classes: give it labels')
        if len(coarser) != len(self.coarser_codebook_sizes):
            raise ValueError(
                f'this prior needs the codes of {len(self.coarser_codebook_sizes)} coarser levels, not {len(coarser)}'
            )

    def vertical(self, above, rows, condition, *, train: bool = False) -> tuple[jax.Array, ...]:
        """What each layer knows of all rows above.

        Args:
          above: int32 [B, h, W], for each row at hand the codes of the row before it (K: outside the map).
          rows: int32 [h], their indices.
          condition: [B, h or 1, W or 1, F] or None.

        Returns:
          [B, h, W, F] for each layer.
        """
        x = self.embed(above) + self.row_embed(rows)[:, None] + self.column_embed(jnp.arange(self.shape[1]))
        outputs = []
        for block in self.vertical_blocks:
            x = block(x, condition=condition, train=train)
            outputs.append(x)
        return tuple(outputs)

    def horizontal(self, left, rows, columns, vertical, condition, *, train: bool = False) -> jax.Array:
        """Logits float32 [B, h, w, K].

        Args:
          left: int32 [B, h, w], for each position the code to its left (K: outside the map).
          rows, columns: int32 [h], [w], the positions' indices.
          vertical: each layer's [B, h, w, F] from `vertical`.
          condition: [B, h or 1, w or 1, F] or None.
        """
        x = self.embed(left) + self.row_embed(rows)[:, None] + self.column_embed(columns)  # [B, h, w, F]
        position = (rows[:, None] * self.shape[1] + columns[None, :]).reshape(-1)  # [h w]
        attention = iter(self.attention)
        every = self.layers // max(self.attention_layers, 1)
        for depth, (block, above) in enumerate(zip(self.horizontal_blocks, vertical, strict=True), start=1):
            x = block(x, beside=above, condition=condition, train=train)
            if self.attention_layers and depth % every == 0 and depth // every <= self.attention_layers:
                x = x + next(attention)(x, position, train=train)
        for block in self.output_blocks:
            x = block(x, condition=condition, train=train)
        return self.logits(nn.elu(x).astype(jnp.float32))
