"""The Inception-v3 of FID and the Inception Score: TensorFlow's graph of 2015-12-05 (Heusel et al. 2017).

It differs from the published network and from torchvision's in three points: the average pools do not count their
padding, the last block pools by maximum, and batch norm has an epsilon of 1e-3. Batch norm is folded into the
convolutions (`from_state_dict`), as the network is never trained here. Layers are named as in pytorch-fid's state dict.

Shapes: B batch, H W images of any size, h w feature maps.
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqvae2_jax.models.pytorch_weights import convert_state_dict

SIZE = 299
_EPSILON = 1e-3


class Inception(nn.Module):
    """The network up to the last pool and, if `classes` is not 0, the logits.

    Attributes:
      classes: number of logits, 1008 in the original; 0: no logits.
    """

    classes: int = 0

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Maps images uint8 [B, H, W, 3] to {'features': float32 [B, 2048], 'logits': float32 [B, classes]}."""
        x = preprocess(images)  # [B, 299, 299, 3]
        x = self._conv(x, 'Conv2d_1a_3x3', 32, 3, stride=2)
        x = self._conv(x, 'Conv2d_2a_3x3', 32, 3, valid=True)
        x = self._conv(x, 'Conv2d_2b_3x3', 64, 3, pool=_shrink)
        x = self._conv(x, 'Conv2d_3b_1x1', 80, 1)
        x = self._conv(x, 'Conv2d_4a_3x3', 192, 3, valid=True, pool=_shrink)  # [B, 35, 35, 192]
        for name, pooled in (('Mixed_5b', 32), ('Mixed_5c', 64), ('Mixed_5d', 64)):
            x = self._block_35(x, name, pooled)
        x = self._to_17(x, 'Mixed_6a')
        for name, width in (('Mixed_6b', 128), ('Mixed_6c', 160), ('Mixed_6d', 160), ('Mixed_6e', 192)):
            x = self._block_17(x, name, width)
        x = self._to_8(x, 'Mixed_7a')
        x = self._block_8(x, 'Mixed_7b', _mean)
        x = self._block_8(x, 'Mixed_7c', functools.partial(nn.max_pool, window_shape=(3, 3), padding='SAME'))
        outputs = {'features': x.mean(axis=(1, 2))}
        if self.classes:
            # The Inception Score of the paper leaves out the bias.
            outputs['logits'] = nn.Dense(self.classes, use_bias=False, name='fc')(outputs['features'])
        return outputs

    def _conv(self, x, name, features, kernel, stride=1, *, valid=False, pool=lambda x: x):
        # A max pool commutes with relu and a mean pool with a 1x1 convolution: pooling between them is cheapest.
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = 'VALID' if stride == 2 else 'SAME'
        # Full float32 on every device, since FID is sensitive to rounding.
        options = {'precision': jax.lax.Precision.HIGHEST}
        if kernel == (1, 1):
            options['conv_general_dilated'] = _matmul
        x = nn.Conv(features, kernel, stride, padding=padding, name=name, **options)(x)
        # On XLA's CPU backend 'SAME' and a crop take a third of the time of 'VALID'.
        x = x[:, 1:-1, 1:-1] if valid else x
        return nn.relu(pool(x))

    def _chain(self, x, block, *layers):
        # layers: (name, features, kernel[, stride])
        for name, *shape in layers:
            x = self._conv(x, f'{block}.{name}', *shape)
        return x

    def _block_35(self, x, block, pooled):
        branches = [
            self._chain(x, block, ('branch1x1', 64, 1)),
            self._chain(x, block, ('branch5x5_1', 48, 1), ('branch5x5_2', 64, 5)),
            self._chain(x, block, ('branch3x3dbl_1', 64, 1), ('branch3x3dbl_2', 96, 3), ('branch3x3dbl_3', 96, 3)),
            self._conv(x, f'{block}.branch_pool', pooled, 1, pool=_mean),
        ]
        return jnp.concatenate(branches, axis=-1)

    def _to_17(self, x, block):
        double = ('branch3x3dbl_1', 64, 1), ('branch3x3dbl_2', 96, 3), ('branch3x3dbl_3', 96, 3, 2)
        branches = self._chain(x, block, ('branch3x3', 384, 3, 2)), self._chain(x, block, *double), _shrink(x)
        return jnp.concatenate(branches, axis=-1)

    def _block_17(self, x, block, width):
        across, down = (1, 7), (7, 1)
        single = ('branch7x7_1', width, 1), ('branch7x7_2', width, across), ('branch7x7_3', 192, down)
        double = (
            ('branch7x7dbl_1', width, 1),
            ('branch7x7dbl_2', width, down),
            ('branch7x7dbl_3', width, across),
            ('branch7x7dbl_4', width, down),
            ('branch7x7dbl_5', 192, across),
        )
        branches = [
            self._chain(x, block, ('branch1x1', 192, 1)),
            self._chain(x, block, *single),
            self._chain(x, block, *double),
            self._conv(x, f'{block}.branch_pool', 192, 1, pool=_mean),
        ]
        return jnp.concatenate(branches, axis=-1)

    def _to_8(self, x, block):
        single = ('branch3x3_1', 192, 1), ('branch3x3_2', 320, 3, 2)
        wide = (
            ('branch7x7x3_1', 192, 1),
            ('branch7x7x3_2', 192, (1, 7)),
            ('branch7x7x3_3', 192, (7, 1)),
            ('branch7x7x3_4', 192, 3, 2),
        )
        return jnp.concatenate([self._chain(x, block, *single), self._chain(x, block, *wide), _shrink(x)], axis=-1)

    def _block_8(self, x, block, pool):
        single = self._chain(x, block, ('branch3x3_1', 384, 1))
        double = self._chain(x, block, ('branch3x3dbl_1', 448, 1), ('branch3x3dbl_2', 384, 3))
        branches = [
            self._chain(x, block, ('branch1x1', 320, 1)),
            self._chain(single, block, ('branch3x3_2a', 384, (1, 3))),
            self._chain(single, block, ('branch3x3_2b', 384, (3, 1))),
            self._chain(double, block, ('branch3x3dbl_3a', 384, (1, 3))),
            self._chain(double, block, ('branch3x3dbl_3b', 384, (3, 1))),
            self._chain(pool(x), block, ('branch_pool', 192, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


def preprocess(images: jax.Array) -> jax.Array:
    """Resizes uint8 [B, H, W, 3] to float32 [B, 299, 299, 3] in [-1, 1]: bilinear, without antialiasing."""
    shape = (images.shape[0], SIZE, SIZE, images.shape[-1])
    return jax.image.resize(images.astype(jnp.float32) / 127.5 - 1, shape, 'bilinear', antialias=False)


def from_state_dict(state: Mapping[str, np.ndarray]) -> tuple[Inception, dict]:
    """Builds the network and its parameters from the arrays of pytorch-fid's state dict.

    Args:
      state: `<layer>.conv.weight` [out, in, h, w] and `<layer>.bn.*` [out] of every layer, and, for the Inception
        Score, `fc.weight` [1008, 2048].

    Returns:
      The module, and the collection `params` for it.

    Raises:
      ValueError: an array is missing or has another shape, or the arrays are those of torchvision's Inception-v3.
    """
    if any(name.startswith('AuxLogits.') for name in state):
        raise ValueError("these are the weights of torchvision's Inception-v3, which is not the network of FID")
    network = Inception(classes=(np.shape(state.get('fc.weight', ())) or (0,))[0])
    params = convert_state_dict(
        network,
        state,
        names_of=lambda layer: (f'{layer}.conv', f'{layer}.bn'),
        epsilon=_EPSILON,
        expected='the Inception-v3 of FID',
    )
    return network, params


def _matmul(x, kernel, *_, precision, **__):
    # A 1x1 convolution; XLA's CPU backend is twice as fast in this form.
    return jnp.matmul(x, kernel[0, 0], precision=precision)


def _shrink(x):
    # 3x3 max pool with stride 2. As slices, like the mean pool: XLA's CPU backend is ten times slower at windows.
    rows = functools.reduce(jnp.maximum, (x[:, i : i + x.shape[1] - 2 : 2] for i in range(3)))
    return functools.reduce(jnp.maximum, (rows[:, :, i : i + x.shape[2] - 2 : 2] for i in range(3)))


def _mean(x):
    # 3x3 mean pool that does not count padding
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = sum(x[:, i : i + height] for i in range(3))
    total = sum(rows[:, :, i : i + width] for i in range(3))
    inside = [np.convolve(np.ones(size), np.ones(3), 'same') for size in (height, width)]
    return total / jnp.asarray(np.multiply.outer(*inside)[..., None], x.dtype)
