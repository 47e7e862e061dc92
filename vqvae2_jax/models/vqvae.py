"""The hierarchical VQ-VAE: N levels of codes from one list of downsampling factors (VQ-VAE-2 section 3.1, algorithm 1).

Levels are counted from the finest, 0 (bottom), to the coarsest, L - 1 (top); `downsample_factors[l]` is how much
smaller level l is than level l - 1, or than the image for l = 0: (4, 2) is ImageNet-256, (8, 2, 2) FFHQ-1024.

Glossary of shapes: B batch, H W image, C its channels, h_l w_l map of level l, K codebook size, D codebook dimension,
F hidden channels.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.lax import stop_gradient

from vqvae2_jax.models.quantizer import Quantizer
from vqvae2_jax.models.residual import ResidualStack
from vqvae2_jax.models.upsample import Upsample


class VQVAEOutput(NamedTuple):
    """A pass through all levels, finest first."""

    image: jax.Array  # [B, H, W, C] reconstruction, in the range of the input
    previews: tuple[
        jax.Array, ...
    ]  # of levels 1 .. L - 1: [B, H, W, C] what that level and the coarser ones know alone
    codes: tuple[jax.Array, ...]  # int32 [B, h_l, w_l]
    commitment: tuple[jax.Array, ...]  # [B]
    metrics: tuple[dict[str, jax.Array], ...]


def map_shapes(image_size: tuple[int, int], downsample_factors: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(height, width) of every level's map, finest first.

    Raises:
      ValueError: a factor is no power of two, or does not divide the map before it.
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
                f'divisible by {_product(downsample_factors)}'
            )
        height, width = height // factor, width // factor
        shapes.append((height, width))
    return tuple(shapes)


def _product(factors: tuple[int, ...]) -> int:
    result = 1
    for factor in factors:
        result *= factor
    return result


class Encoder(nn.Module):
    """Shrinks a map by `factor`: strided 4x4 convolutions, a 3x3 one, a residual stack."""

    factor: int
    hidden_channels: int
    residual_channels: int
    num_residual_blocks: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # [B, H, W, C] -> [B, H / factor, W / factor, F]
        halvings = self.factor.bit_length() - 1
        for i in range(halvings):
            x = nn.relu(
                nn.Conv(self.hidden_channels if i else self.hidden_channels // 2, (4, 4), (2, 2), dtype=self.dtype)(x)
            )
        x = nn.Conv(self.hidden_channels, (3, 3), dtype=self.dtype)(x)
        return nn.relu(ResidualStack(self.num_residual_blocks, self.residual_channels, self.dtype)(x))


class Decoder(nn.Module):
    """Grows a map by `factor`: a 3x3 convolution, a residual stack, transposed 4x4 convolutions."""

    factor: int
    features: int
    hidden_channels: int
    residual_channels: int
    num_residual_blocks: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # [B, h, w, D'] -> [B, h * factor, w * factor, features]
        x = nn.Conv(self.hidden_channels, (3, 3), dtype=self.dtype)(x)
        x = nn.relu(ResidualStack(self.num_residual_blocks, self.residual_channels, self.dtype)(x))
        halvings = self.factor.bit_length() - 1
        for _ in range(halvings - 1):
            x = nn.relu(Upsample(self.hidden_channels // 2, self.dtype)(x))
        return Upsample(self.features, self.dtype)(x)


class Preview(nn.Module):
    """A linear view of a level's decoded features as a full-size image: one 3x3 convolution and a pixel shuffle."""

    factor: int  # from the features' map to the image
    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        # [B, h, w, D] -> [B, h * factor, w * factor, C]
        pixels = nn.Conv(self.channels * self.factor**2, (3, 3), dtype=self.dtype)(nn.relu(features))
        return rearrange(pixels, 'b h w (i j c) -> b (h i) (w j) c', i=self.factor, j=self.factor)


class VQVAE(nn.Module):
    """Encoder, quantizer and decoder of every level.

    The decoder of level l sees the codes of level l and of all coarser ones, upsampled by transposed convolutions.
    Previews show what a level knows without the finer ones. The paper has such pictures without saying how they were
    made; here they are heads on the decoded features. With `preview_grad_scale` 0 no gradient passes from a
    head, and the model trains as if it were absent (the paper); above 0 the gradient passes scaled by it, and coarse
    levels carry more of the image.
    """

    downsample_factors: tuple[int, ...]
    channels: int
    hidden_channels: int
    residual_channels: int
    num_residual_blocks: int
    codebook_size: int
    codebook_dim: int
    codebook_ema_decay: float
    dead_code_threshold: float
    preview_grad_scale: float
    dtype: jnp.dtype

    def setup(self):
        widths = {
            'hidden_channels': self.hidden_channels,
            'residual_channels': self.residual_channels,
            'num_residual_blocks': self.num_residual_blocks,
            'dtype': self.dtype,
        }
        levels = range(len(self.downsample_factors))
        features = [self.channels] + [self.codebook_dim] * (len(self.downsample_factors) - 1)
        self.encoders = [Encoder(factor, **widths) for factor in self.downsample_factors]
        self.projections = [nn.Conv(self.codebook_dim, (1, 1), dtype=self.dtype) for _ in levels]
        self.quantizers = [
            Quantizer(self.codebook_size, self.codebook_dim, self.codebook_ema_decay, self.dead_code_threshold)
            for _ in levels
        ]
        self.decoders = [Decoder(self.downsample_factors[level], features[level], **widths) for level in levels]
        # upsamplers[l] brings all that is coarser than level l to its map.
        self.upsamplers = [
            [Upsample(self.codebook_dim, self.dtype) for _ in range(factor.bit_length() - 1)]
            for factor in self.downsample_factors[1:]
        ]
        self.previewers = [
            Preview(_product(self.downsample_factors[:level]), self.channels, self.dtype) for level in levels if level
        ]

    def __call__(self, image: jax.Array, *, train: bool = False) -> VQVAEOutput:
        """image [B, H, W, C] in [-1, 1]. Training needs rng `reseed` and the collection `codebook` mutable."""
        map_shapes(image.shape[1:3], self.downsample_factors)  # refuses what does not divide
        hidden, x = [], image  # what the encoders make, finest first: [B, h_l, w_l, F]
        for encoder in self.encoders:
            x = encoder(x)
            hidden.append(x)
        context, decoded, quantized, previews = None, None, {}, {}
        for level in reversed(
            range(len(self.downsample_factors))
        ):  # algorithm 1: the coarsest level is quantized first
            x = hidden[level] if decoded is None else jnp.concatenate([decoded, hidden[level]], axis=-1)
            quantized[level] = self.quantizers[level](self.projections[level](x), train=train)
            context = self._context(level, quantized[level].vectors, context)
            decoded = self.decoders[level](context)
            if level:
                features = stop_gradient(decoded) + self.preview_grad_scale * (decoded - stop_gradient(decoded))
                previews[level] = self.previewers[level - 1](features).astype(jnp.float32)
        ordered = [quantized[level] for level in range(len(self.downsample_factors))]
        return VQVAEOutput(
            image=decoded.astype(jnp.float32),
            previews=tuple(previews[level] for level in range(1, len(self.downsample_factors))),
            codes=tuple(q.codes for q in ordered),
            commitment=tuple(q.commitment for q in ordered),
            metrics=tuple(q.metrics for q in ordered),
        )

    def encode(self, image: jax.Array) -> tuple[jax.Array, ...]:
        """Codes of images [B, H, W, C]: int32 [B, h_l, w_l] per level, finest first."""
        return self(image).codes

    def decode(self, codes: tuple[jax.Array, ...]) -> jax.Array:
        """Images [B, H, W, C] of codes of every level, finest first."""
        *_, (_, decoded) = self._decode_from_coarsest(codes)
        return decoded.astype(jnp.float32)

    def preview(self, codes: tuple[jax.Array, ...], level: int) -> jax.Array:
        """Images [B, H, W, C] of what levels `level` .. L - 1 know alone; `codes` holds these, finest first.

        Raises:
          ValueError: level 0 needs no preview: `decode` is its image.
        """
        if not 0 < level < len(self.downsample_factors):
            raise ValueError(f'previews exist for levels 1 to {len(self.downsample_factors) - 1}, not {level}')
        padded = (None,) * level + tuple(codes)
        for current, decoded in self._decode_from_coarsest(padded):
            if current == level:
                return self.previewers[level - 1](decoded).astype(jnp.float32)

    def _decode_from_coarsest(self, codes):
        context = None
        for level in reversed(range(len(self.downsample_factors))):
            context = self._context(level, self.quantizers[level].lookup(codes[level]), context)
            yield level, self.decoders[level](context)

    def _context(self, level: int, vectors: jax.Array, coarser: jax.Array | None) -> jax.Array:
        # [B, h_l, w_l, D or 2 D]: this level's vectors beside all coarser ones, brought to its map
        vectors = vectors.astype(self.dtype)
        if coarser is None:
            return vectors
        for step in self.upsamplers[level]:
            coarser = step(coarser)
        return jnp.concatenate([coarser, vectors], axis=-1)
