"""The autoregressive prior over one level's codes (VQ-VAE-2 section 3.2, tables 3 and 4): the base of both orders.

Gated residual convolutions, optional causal attention after every few of them, and a residual stack over the coarser
levels' codes and the class that conditions every block. `raster.py` and `wavefront.py` have the two networks.

The first layer excludes the code of the position itself, so the features at a position depend on codes of earlier
steps only. All later layers may therefore include the position itself. The same layers run over whole maps and, with
the caches of `causal.py`, step by step.

Shapes: B batch, H W this level's map, h w all of it or, with a cache, the part that is computed in one call, h_l w_l
map of a coarser level l, K codebook size, F hidden channels, R residual channels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqvae2_jax.models import attention
from vqvae2_jax.models.attention import CausalAttention
from vqvae2_jax.models.block_runner import NO_REMAT, REMAT_CHOICES, BlockRunner
from vqvae2_jax.models.gated_resnet import GatedBlock, GatedResNetStack, run_blocks
from vqvae2_jax.models.order import GenerationOrder
from vqvae2_jax.models.pointwise import elu
from vqvae2_jax.models.residual import ResidualStack

DROPOUT_PLACEMENTS = ('inside', 'after')
ATTENTION_DROPOUT_KINDS = ('keys', 'logits')
MAX_ATTENDED = 2**14  # positions of a map with attention, which computes a logit for every pair of them


class Prior(nn.Module):
    """p(codes of one level | codes of all coarser levels, class label); the base of `RasterPrior` and `WavefrontPrior`.

    Attributes:
      shape: (H, W).
      codebook_size: K.
      coarser_codebook_sizes: codebook size of every coarser level, finest first.
      num_classes: number of classes; 0: unconditional.
      label_dropout: share of training examples that get no class, for classifier-free guidance.
      hidden_channels: F.
      residual_channels: R.
      num_residual_blocks: number of gated blocks.
      kernel_size: kernel size of the gated blocks' convolutions, odd.
      num_attention_layers: number of attention layers, which are at equal distances between the blocks.
      num_heads: number of heads of an attention layer.
      num_output_blocks: number of 1x1 gated blocks before the logits.
      num_cond_blocks: number of residual blocks over the coarser levels.
      dropout: dropout rate of the gated blocks.
      dropout_placement: 'inside' a block, or 'after' it (section 3.2 of the paper).
      attention_dropout: dropout rate of the attention layers.
      attention_dropout_kind: 'keys', or 'logits' (section 3.2 of the paper); see `CausalAttention`.
      remat: activations of blocks and attention that the backward pass recomputes, see `BlockRunner`.
      scan_layers: train blocks of the same shape as a scan, which compiles one of them.
      dtype: dtype of the computation; logits are float32.
      attend: computes attention over whole maps, see `CausalAttention`.

    Raises:
      ValueError: fields that do not fit together; the message names them.
    """

    shape: tuple[int, int]
    codebook_size: int
    coarser_codebook_sizes: tuple[int, ...]
    num_classes: int
    label_dropout: float
    hidden_channels: int
    residual_channels: int
    num_residual_blocks: int
    kernel_size: int
    num_attention_layers: int
    num_heads: int
    num_output_blocks: int
    num_cond_blocks: int
    dropout: float
    dropout_placement: str
    attention_dropout: float
    attention_dropout_kind: str
    remat: str
    scan_layers: bool
    dtype: jnp.dtype
    attend: attention.Attend = dataclasses.field(default=attention.attend, kw_only=True)

    def setup(self):
        if self.kernel_size % 2 == 0:
            raise ValueError(f'kernel_size is {self.kernel_size}; it must be odd, so that it has a center')
        if self.num_attention_layers > self.num_residual_blocks:
            raise ValueError(
                f'num_attention_layers is {self.num_attention_layers}; it must be at most '
                f'num_residual_blocks={self.num_residual_blocks}'
            )
        if self.num_attention_layers and math.prod(self.shape) > MAX_ATTENDED:
            raise ValueError(
                f'num_attention_layers is {self.num_attention_layers}; on a {self.shape[0]}x{self.shape[1]} map it '
                f'must be 0, because attention takes at most {MAX_ATTENDED} positions'
            )
        choices = {'dropout_placement': DROPOUT_PLACEMENTS, 'attention_dropout_kind': ATTENTION_DROPOUT_KINDS}
        choices['remat'] = REMAT_CHOICES
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f'{field} is {getattr(self, field)!r}; it must be one of {", ".join(allowed)}')
        self.row_embed, self.column_embed = self._embed(self.shape[0]), self._embed(self.shape[1])
        self.output_blocks = self._blocks(self.num_output_blocks, nn.Dense)
        self.logits = nn.Dense(self.codebook_size)  # float32: at a logit of 10 the resolution of bfloat16 is 0.06
        if self.num_classes:
            self.class_embed = self._embed(self.num_classes + (self.label_dropout > 0))  # the last one: no class
        if self.coarser_codebook_sizes:
            self.coarser_embeds = [self._embed(size) for size in self.coarser_codebook_sizes]
            self.condition_in = nn.Conv(self.hidden_channels, (3, 3), dtype=self.dtype)
            self.condition_stack = ResidualStack(
                self.num_cond_blocks, self.residual_channels, relu_skip=False, dtype=self.dtype
            )

    def _embed(self, size: int) -> nn.Embed:
        # Rows of unit variance: they are the network's inputs, and the default's variance, 1 / size, is too small.
        return nn.Embed(size, self.hidden_channels, embedding_init=nn.initializers.normal(1.0), dtype=self.dtype)

    def _block_factory(self, make_conv) -> Callable[[], GatedBlock]:
        return functools.partial(
            GatedBlock, self.residual_channels, make_conv, self.dropout, self.dropout_placement, self.dtype
        )

    def _blocks(self, count: int, make_conv) -> list[GatedBlock]:
        return [self._block_factory(make_conv)() for _ in range(count)]

    def _stack(self, make_conv) -> GatedResNetStack:
        dropout = self.attention_dropout, self.attention_dropout_kind
        make_attention = functools.partial(
            CausalAttention, self.num_heads, self.order, *dropout, self.dtype, self.attend
        )
        make_block = self._block_factory(make_conv)
        return GatedResNetStack(self.num_residual_blocks, self.num_attention_layers, make_block, make_attention)

    @property
    def order(self) -> GenerationOrder:
        """The order in which positions are generated."""
        raise NotImplementedError

    def __call__(
        self,
        codes: jax.Array,
        labels: jax.Array | None = None,
        coarser: tuple[jax.Array, ...] = (),
        *,
        train: bool = False,
    ) -> jax.Array:
        """Computes the logits of every code given the earlier ones.

        Args:
          codes: codes of this level, int32 [B, H, W].
          labels: classes, int32 [B]; None if the prior has no classes.
          coarser: codes of every coarser level, finest first; each int32 [B, h_l, w_l].
          train: apply dropout and label dropout, which need the rng `dropout`.

        Returns:
          float32 [B, H, W, K].

        Raises:
          ValueError: labels or coarser codes are missing.
        """
        return self.compute_logits(codes, self.condition(labels, coarser, train=train), train=train)

    def compute_logits(self, codes: jax.Array, condition: jax.Array | None, *, train: bool = False) -> jax.Array:
        """Computes the logits float32 [B, H, W, K] of codes int32 [B, H, W], given the result of `condition`."""
        codes = codes.astype(jnp.int32)  # a narrow type cannot hold K, which stands for "off the map"
        return self._head(self._map_features(codes, condition, train=train), condition, train=train)

    def _map_features(self, codes, condition, *, train):
        """Returns the features [B, H, W, F] of whole maps; those of a position depend on earlier codes only."""
        raise NotImplementedError

    def _head(self, x, condition, *, train=False):
        # features [B, h, w, F] -> logits float32 [B, h, w, K]
        x, _ = run_blocks(self._runner(train), self.output_blocks, x, condition=condition, train=train)
        return self.logits(elu(x).astype(jnp.float32))

    def _runner(self, train):
        return BlockRunner(self.remat if train else NO_REMAT, self.scan_layers and train, self.dtype)

    def condition(
        self, labels: jax.Array | None = None, coarser: tuple[jax.Array, ...] = (), *, train: bool = False
    ) -> jax.Array | None:
        """Computes the conditioning input of all blocks from the class and the coarser levels.

        Args:
          labels: classes, int32 [B]; None if the prior has no classes. A prior with label dropout takes the label
            `num_classes` as "no class".
          coarser: codes of every coarser level, finest first; each int32 [B, h_l, w_l].
          train: apply dropout and label dropout, which need the rng `dropout`.

        Returns:
          [B, H, W, F]; [B, 1, 1, F] if there are classes but no coarser levels; None if there is neither.

        Raises:
          ValueError: labels or coarser codes are missing.
        """
        if self.num_classes and labels is None:
            raise ValueError(f'this prior is conditioned on {self.num_classes} classes: give it labels')
        if len(coarser) != len(self.coarser_codebook_sizes):
            raise ValueError(
                f'this prior needs the codes of {len(self.coarser_codebook_sizes)} coarser levels, not {len(coarser)}'
            )
        condition = None
        if self.coarser_codebook_sizes:
            maps = [embed(codes) for embed, codes in zip(self.coarser_embeds, coarser, strict=True)]
            condition = self.condition_in(jnp.concatenate([_resize(m, self.shape) for m in maps], axis=-1))
            condition = self.condition_stack(condition, self._runner(train))  # [B, H, W, F]
        if self.num_classes:
            if train and self.label_dropout:
                dropped = jax.random.bernoulli(self.make_rng('dropout'), self.label_dropout, labels.shape)
                labels = jnp.where(dropped, self.num_classes, labels)
            label = self.class_embed(labels)[:, None, None]  # [B, 1, 1, F]
            condition = label if condition is None else condition + label
        return condition


def _resize(x, shape):
    # [B, h, w, F] -> [B, H, W, F]: position (i, j) gets the features of (floor(i h / H), floor(j w / W))
    for axis, size in enumerate(shape, start=1):
        available = x.shape[axis]
        if size % available == 0:  # the gradient is a sum of neighbors then, and no scatter
            x = jnp.repeat(x, size // available, axis)
        else:
            x = jnp.take(x, np.arange(size) * available // size, axis)
    return x
