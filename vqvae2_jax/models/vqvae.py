"""The hierarchical VQ-VAE: N levels of codes from one list of downsampling factors (VQ-VAE-2 section 3.1, algorithm 1).

Levels are numbered from the finest, 0 (bottom), to the coarsest, L - 1 (top). `downsample_factors[l]` is the ratio of
the map of level l - 1, or of the image for l = 0, to the map of level l: (4, 2) for ImageNet-256, (8, 2, 2) for
FFHQ-1024.

Shapes: B batch, H W image, C its channels, h_l w_l map of level l, K codebook size, D codebook dimension,
F hidden channels.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.lax import stop_gradient

from vqvae2_jax.models.quantizer import Nearest, Quantizer, nearest
from vqvae2_jax.models.residual import ResidualStack, relu
from vqvae2_jax.models.upsample import Upsample


class VQVAEOutput(NamedTuple):
    """The result of a forward pass. Tuples have one entry per level, finest first.

    Attributes:
      image: float32 [B, H, W, C], the reconstruction in the range of the input.
      previews: float32 [B, H, W, C] for the levels 1 to L - 1, images from that level and coarser ones alone.
      codes: int32 [B, h_l, w_l].
      commitment: float32 [B], mean squared distance of encoder outputs to their code vectors.
      metrics: metrics of the quantizer, see `Quantized`.
    """

    image: jax.Array
    previews: tuple[jax.Array, ...]
    codes: tuple[jax.Array, ...]
    commitment: tuple[jax.Array, ...]
    metrics: tuple[dict[str, jax.Array], ...]


def map_shapes(image_size: tuple[int, int], downsample_factors: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Returns (height, width) of every level's map, finest first.

    Args:
      image_size: (height, width) of the images.
      downsample_factors: one factor per level, finest first.

    Raises:
      ValueError: a factor is not a power of two, or does not divide the map before it.
    """
    shapes = []
    height, width = image_size
    for level, factor in enumerate(downsample_factors):
        if factor < 2 or factor & (factor - 1):
            raise ValueError(
                f'vqvae.downsample_factors is {tuple(downsample_factors)}, but {factor} is not a power of two: each '
                'must be one of 2, 4, 8, ...'
            )
        if height % factor or width % factor:
            raise ValueError(
                f'vqvae.downsample_factors is {tuple(downsample_factors)}: level {level} divides a {height}x{width} '
                f'map by {factor}, with a remainder. data.image_size is {image_size[0]}x{image_size[1]} and must be '
                f'divisible by {math.prod(downsample_factors)}'
            )
        height, width = height // factor, width // factor
        shapes.append((height, width))
    return tuple(shapes)


class Encoder(nn.Module):
    """Downsamples a map by `factor`: strided 4x4 convolutions, a 3x3 convolution, a residual stack."""

    factor: int
    hidden_channels: int
    residual_channels: int
    num_residual_blocks: int
    relu_skip: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, H / factor, W / factor, F]."""
        halvings = self.factor.bit_length() - 1
        for i in range(halvings):
            x = relu(
                nn.Conv(self.hidden_channels if i else self.hidden_channels // 2, (4, 4), (2, 2), dtype=self.dtype)(x)
            )
        x = nn.Conv(self.hidden_channels, (3, 3), dtype=self.dtype)(x)
        return relu(ResidualStack(self.num_residual_blocks, self.residual_channels, self.relu_skip, self.dtype)(x))


class Decoder(nn.Module):
    """Upsamples a map by `factor`: a 3x3 convolution, a residual stack, transposed 4x4 convolutions."""

    factor: int
    features: int
    hidden_channels: int
    residual_channels: int
    num_residual_blocks: int
    relu_skip: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, h, w, C] to [B, h * factor, w * factor, features]."""
        x = nn.Conv(self.hidden_channels, (3, 3), dtype=self.dtype)(x)
        x = relu(ResidualStack(self.num_residual_blocks, self.residual_channels, self.relu_skip, self.dtype)(x))
        halvings = self.factor.bit_length() - 1
        for _ in range(halvings - 1):
            x = relu(Upsample(self.hidden_channels // 2, self.dtype)(x))
        return Upsample(self.features, self.dtype)(x)


class Preview(nn.Module):
    """Maps a level's decoded features to a full-size image by one 3x3 convolution and a pixel shuffle."""

    factor: int  # the ratio of the image to the features' map
    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps features [B, h, w, D] to [B, h * factor, w * factor, C]."""
        pixels = nn.Conv(self.channels * self.factor**2, (3, 3), dtype=self.dtype)(relu(features))
        return rearrange(pixels, 'b h w (i j c) -> b (h i) (w j) c', i=self.factor, j=self.factor)


class VQVAE(nn.Module):
    """Encoder, quantizer and decoder of every level.

    The decoder of level l takes the codes of level l and of all coarser levels, upsampled by transposed convolutions.

    Previews are images decoded without the finer levels. The paper shows such images but does not say how they were
    made; here each is made by a head (`Preview`) on the decoded features. With `preview_grad_scale` 0 no gradient of a
    head reaches the rest of the model, which trains as in the paper; above 0, coarse levels carry more of the image.

    Attributes:
      downsample_factors: one factor per level, finest first; powers of two.
      channels: C.
      hidden_channels: F.
      residual_channels: number of channels inside a residual block.
      num_residual_blocks: number of residual blocks per encoder and decoder.
      relu_skip: see `ResidualBlock`.
      codebook_size: K.
      codebook_dim: D.
      codebook_ema_decay: decay of the codebook's moving averages.
      dead_code_threshold: see `Quantizer`.
      preview_grad_scale: share of the preview heads' gradient that reaches the decoded features.
      dtype: dtype of the computation; the quantizer and all outputs are float32.
      nearest: the lookup of the quantizers, see `Quantizer`.
    """

    downsample_factors: tuple[int, ...]
    channels: int
    hidden_channels: int
    residual_channels: int
    num_residual_blocks: int
    relu_skip: bool
    codebook_size: int
    codebook_dim: int
    codebook_ema_decay: float
    dead_code_threshold: float
    preview_grad_scale: float
    dtype: jnp.dtype
    nearest: Nearest = nearest

    def setup(self):
        widths = {
            'hidden_channels': self.hidden_channels,
            'residual_channels': self.residual_channels,
            'num_residual_blocks': self.num_residual_blocks,
            'relu_skip': self.relu_skip,
            'dtype': self.dtype,
        }
        levels = range(len(self.downsample_factors))
        features = [self.channels] + [self.codebook_dim] * (len(self.downsample_factors) - 1)
        self.encoders = [Encoder(factor, **widths) for factor in self.downsample_factors]
        self.projections = [nn.Conv(self.codebook_dim, (1, 1), dtype=self.dtype) for _ in levels]
        self.quantizers = [
            Quantizer(
                self.codebook_size, self.codebook_dim, self.codebook_ema_decay, self.dead_code_threshold, self.nearest
            )
            for _ in levels
        ]
        self.decoders = [Decoder(self.downsample_factors[level], features[level], **widths) for level in levels]
        # upsamplers[l] upsamples the context of the coarser levels to the map of level l.
        self.upsamplers = [
            [Upsample(self.codebook_dim, self.dtype) for _ in range(factor.bit_length() - 1)]
            for factor in self.downsample_factors[1:]
        ]
        self.previewers = [
            Preview(math.prod(self.downsample_factors[:level]), self.channels, self.dtype) for level in levels if level
        ]

    def __call__(self, image: jax.Array, *, train: bool = False) -> VQVAEOutput:
        """Encodes, quantizes and decodes images.

        Args:
          image: float32 [B, H, W, C] in [-1, 1].
          train: update the codebooks; needs the rng `restart` and the collection `codebook` mutable.

        Returns:
          The reconstruction, with codes, losses and metrics of every level.

        Raises:
          ValueError: the image size is not divisible by the downsampling factors.
        """
        map_shapes(image.shape[1:3], self.downsample_factors)  # checks divisibility
        hidden, x = [], image  # outputs of the encoders, finest first: [B, h_l, w_l, F]
        for encoder in self.encoders:
            x = encoder(x)
            hidden.append(x)
        context, decoded, quantized, previews = None, None, [], []
        # Algorithm 1: the coarsest level is quantized first.
        for level in reversed(range(len(self.downsample_factors))):
            x = hidden[level] if decoded is None else jnp.concatenate([decoded, hidden[level]], axis=-1)
            quantized.insert(0, self.quantizers[level](self.projections[level](x), train=train))
            context = self._context(level, quantized[0].vectors, context)
            decoded = self.decoders[level](context)
            if level:
                features = stop_gradient(decoded) + self.preview_grad_scale * (decoded - stop_gradient(decoded))
                previews.insert(0, self.previewers[level - 1](features).astype(jnp.float32))
        return VQVAEOutput(
            image=decoded.astype(jnp.float32),
            previews=tuple(previews),
            codes=tuple(q.codes for q in quantized),
            commitment=tuple(q.commitment for q in quantized),
            metrics=tuple(q.metrics for q in quantized),
        )

    def encode(self, image: jax.Array) -> tuple[jax.Array, ...]:
        """Encodes images float32 [B, H, W, C] in [-1, 1] to codes int32 [B, h_l, w_l] per level, finest first."""
        return self(image).codes

    def decode(self, codes: tuple[jax.Array, ...], level: int = 0) -> jax.Array:
        """Decodes codes to images: the codes of all levels to reconstructions, those of coarse levels to previews.

        Args:
          codes: int32 [B, h_l, w_l] of the levels `level` to L - 1, finest first.
          level: the finest level that is decoded; above 0 the image is a preview.

        Returns:
          Images, float32 [B, H, W, C].

        Raises:
          ValueError: level is not from 0 to L - 1, or the codes are not those of L - `level` levels.
        """
        num_levels = len(self.downsample_factors)
        if not 0 <= level < num_levels:
            raise ValueError(f'level is {level}; it must be from 0 to {num_levels - 1}')
        if len(codes) != num_levels - level:
            raise ValueError(
                f'decoding from level {level} needs the codes of {num_levels - level} levels, not {len(codes)}'
            )
        context = None
        for current, level_codes in zip(reversed(range(level, num_levels)), reversed(codes), strict=True):
            context = self._context(current, self.quantizers[current].lookup(level_codes), context)
        image = self.decoders[level](context)
        return (self.previewers[level - 1](image) if level else image).astype(jnp.float32)

    def _context(self, level: int, vectors: jax.Array, coarser: jax.Array | None) -> jax.Array:
        # [B, h_l, w_l, D for the coarsest level, else 2 D]: the upsampled context of the coarser levels,
        # concatenated with the code vectors of this level
        vectors = vectors.astype(self.dtype)
        if coarser is None:
            return vectors
        for step in self.upsamplers[level]:
            coarser = step(coarser)
        return jnp.concatenate([coarser, vectors], axis=-1)
