"""The autoregressive prior over one level's codes (VQ-VAE-2 section 3.2, tables 3 and 4): what both orders share.

Residual gated convolutions, causal attention after every few of them where asked, a residual stack over the coarser
levels' codes and the class that conditions every block. `raster.py` and `wavefront.py` have the two networks.

Causality comes from the input alone: the features at a position describe only codes of earlier steps of the order, so
every layer may see its own position. The same methods run over whole maps and, with the caches of `causal.py`, over
what is drawn next.

Glossary of shapes: B batch, H W this level's map (h w: the part of it at hand), K codebook size, F hidden, R
residual channels.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqvae2_jax.models.block_runner import BlockRunner
from vqvae2_jax.models.causal import CausalAttention
from vqvae2_jax.models.gated_resnet import GatedBlock, GatedResNetStack, run_blocks
from vqvae2_jax.models.order import GenerationOrder
from vqvae2_jax.models.residual import ResidualStack

PLACEMENTS, KINDS = ('inside', 'after'), ('keys', 'logits')
MAX_ATTENDED = 2**14  # positions of a map with attention, whose logits are their square


class Prior(nn.Module):
    """p(codes of one level | codes of all coarser levels, class label); `RasterPrior` or `WavefrontPrior`."""

    shape: tuple[int, int]  # H, W
    codebook_size: int
    coarser_codebook_sizes: tuple[int, ...]  # finest first
    num_classes: int  # 0: unconditional
    label_dropout: float  # share of the training examples that hide their class, for classifier-free guidance
    hidden_channels: int
    residual_channels: int
    num_residual_blocks: int
    kernel_size: int
    num_attention_layers: int
    num_heads: int
    num_output_blocks: int  # 1x1 residual blocks on top
    num_cond_blocks: int  # residual blocks over the coarser levels
    dropout: float
    dropout_placement: str  # of every gated block; or 'after' it, as the paper states
    attention_dropout: float
    attention_dropout_kind: str  # or 'logits', as the paper states
    remat: bool  # training recomputes what is inside of blocks and attention instead of keeping it
    scan_layers: bool  # training runs what repeats as loops, which compiles one of each kind
    dtype: jnp.dtype

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
        for field, allowed in (('dropout_placement', PLACEMENTS), ('attention_dropout_kind', KINDS)):
            if getattr(self, field) not in allowed:
                raise ValueError(f'{field} is {getattr(self, field)!r}; it must be one of {", ".join(allowed)}')
        self.row_embed, self.column_embed = self._embed(self.shape[0]), self._embed(self.shape[1])
        self.output_blocks = self._blocks(self.num_output_blocks, nn.Dense)
        self.logits = nn.Dense(self.codebook_size)  # float32: bfloat16 has steps of 0.06 at a logit of 10
        if self.num_classes:
            self.class_embed = self._embed(self.num_classes + (self.label_dropout > 0))  # the last one: no class
        if self.coarser_codebook_sizes:
            self.coarser_embeds = [self._embed(size) for size in self.coarser_codebook_sizes]
            self.condition_in = nn.Conv(self.hidden_channels, (3, 3), dtype=self.dtype)
            self.condition_stack = ResidualStack(self.num_cond_blocks, self.residual_channels, self.dtype)

    def _embed(self, size: int) -> nn.Embed:
        # Unit-sized rows: lookups are this network's inputs, and the default would make them tiny (1 / size).
        return nn.Embed(size, self.hidden_channels, embedding_init=nn.initializers.normal(1.0), dtype=self.dtype)

    def _block(self, layer) -> Callable[[], GatedBlock]:
        return functools.partial(
            GatedBlock, self.residual_channels, layer, self.dropout, self.dropout_placement, self.dtype
        )

    def _blocks(self, count: int, layer) -> list[GatedBlock]:
        return [self._block(layer)() for _ in range(count)]

    def _trunk(self, layer) -> GatedResNetStack:
        dropout = self.attention_dropout, self.attention_dropout_kind
        attention = functools.partial(CausalAttention, self.num_heads, self.order, *dropout, self.dtype)
        return GatedResNetStack(self.num_residual_blocks, self.num_attention_layers, self._block(layer), attention)

    @property
    def order(self) -> GenerationOrder:
        """In which order the positions are drawn."""
        raise NotImplementedError

    def __call__(self, codes, labels=None, coarser=(), *, train: bool = False) -> jax.Array:
        """Logits [B, H, W, K] float32 of every code given the earlier ones.

        Args:
          codes: int32 [B, H, W].
          labels: int32 [B], when the prior has classes.
          coarser: int32 [B, h_l, w_l] of every coarser level, finest first.
          train: dropout on; needs rng `dropout`.
        """
        return self.apply_with_cond(codes, self.condition(labels, coarser, train=train), train=train)

    def apply_with_cond(self, codes, condition, *, train: bool = False) -> jax.Array:
        """As the call, with what `condition` gives in place of labels and coarser codes."""
        return self._head(self._whole(codes, condition, train=train), condition, train=train)

    def _whole(self, codes, condition, *, train):
        """Features [B, H, W, F] of whole maps, each position's of earlier codes only."""
        raise NotImplementedError

    def _head(self, x, condition, *, train=False):
        """Features [B, h, w, F] -> logits [B, h, w, K] float32."""
        x, _ = run_blocks(self._repeat(train), self.output_blocks, x, condition=condition, train=train)
        return self.logits(nn.elu(x).astype(jnp.float32))

    def _repeat(self, train):
        return BlockRunner(self.remat and train, self.scan_layers and train)

    def condition(self, labels=None, coarser=(), *, train: bool = False) -> jax.Array | None:
        """Class and coarser levels as one map [B, H, W, F], or [B, 1, 1, F] for the class alone; None for neither."""
        self._check_condition(labels, coarser)
        condition = None
        if self.coarser_codebook_sizes:
            maps = [embed(codes) for embed, codes in zip(self.coarser_embeds, coarser, strict=True)]
            grown = [
                jnp.repeat(jnp.repeat(m, self.shape[0] // m.shape[1], 1), self.shape[1] // m.shape[2], 2) for m in maps
            ]
            condition = self.condition_in(jnp.concatenate(grown, axis=-1))
            condition = self.condition_stack(condition, self._repeat(train))  # [B, H, W, F]
        if self.num_classes:
            if train and self.label_dropout:
                hidden = jax.random.bernoulli(self.make_rng('dropout'), self.label_dropout, labels.shape)
                labels = jnp.where(hidden, self.num_classes, labels)
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
