"""An ImageNet classifier from its PyTorch state dict: torchvision's ResNet-50, -101 or -152 (He et al. 2016, v1.5).

It is not trained here: batch norm is folded into the convolutions. Layers are named as in torchvision.

Shapes: B batch, H W images of any size, S classes.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqvae2_jax.models.pytorch_weights import convert_state_dict

SIZE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of ImageNet's pixels in [0, 1]
_EPSILON = 1e-5
_WIDTHS = (64, 128, 256, 512)


class BottleneckResNet(nn.Module):
    """Four groups of bottleneck blocks; a group strides in the 3x3 convolution of its first block (v1.5).

    Attributes:
      num_classes: S.
      blocks: number of blocks of each group; (3, 4, 6, 3) is ResNet-50.
    """

    num_classes: int
    blocks: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Maps images uint8 [B, H, W, 3] to {'features': float32 [B, 2048], 'logits': float32 [B, S]}."""
        x = nn.relu(self._conv(preprocess(images), 'conv1', 64, 7, stride=2))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for group, (width, count) in enumerate(zip(_WIDTHS, self.blocks, strict=True), start=1):
            for block in range(count):
                x = self._block(x, f'layer{group}.{block}', width, stride=2 if group > 1 and not block else 1)
        features = x.mean(axis=(1, 2))
        return {'features': features, 'logits': nn.Dense(self.num_classes, name='fc')(features)}

    def _block(self, x, name, width, stride):
        y = nn.relu(self._conv(x, f'{name}.conv1', width, 1))
        y = nn.relu(self._conv(y, f'{name}.conv2', width, 3, stride))
        y = self._conv(y, f'{name}.conv3', 4 * width, 1)
        change = stride > 1 or x.shape[-1] != y.shape[-1]
        return nn.relu(y + (self._conv(x, f'{name}.downsample.0', 4 * width, 1, stride) if change else x))

    def _conv(self, x, name, features, kernel, stride=1):
        padding = [(kernel // 2, kernel // 2)] * 2
        precision = jax.lax.Precision.HIGHEST
        return nn.Conv(features, (kernel, kernel), stride, padding=padding, precision=precision, name=name)(x)


def preprocess(images: jax.Array) -> jax.Array:
    """Resizes uint8 [B, H, W, 3] to float32 [B, 224, 224, 3] with antialiasing and normalizes as in training."""
    x = images.astype(jnp.float32) / 255
    if x.shape[1:3] != (SIZE, SIZE):
        x = jax.image.resize(x, (x.shape[0], SIZE, SIZE, x.shape[-1]), 'bilinear')
    return (x - jnp.array(_MEAN)) / jnp.array(_STD)


def from_state_dict(state: Mapping[str, np.ndarray]) -> tuple[BottleneckResNet, dict]:
    """Builds the network and its parameters from torchvision's arrays.

    Args:
      state: torchvision's state dict of a ResNet-50, -101 or -152.

    Returns:
      The module, and the collection `params` for it.

    Raises:
      ValueError: the arrays belong to another network; the message names one.
    """
    blocks = tuple(len({k.split('.')[1] for k in state if k.startswith(f'layer{group}.')}) for group in range(1, 5))
    classes = np.shape(state.get('fc.weight', [0])) or (1,)  # the conversion refuses what is missing or has no axes
    network = BottleneckResNet(classes[0], blocks)
    params = convert_state_dict(
        network,
        state,
        names_of=lambda layer: (layer, norm_of(layer)),
        epsilon=_EPSILON,
        expected='a ResNet-50, -101 or -152',
    )
    return network, params


def norm_of(layer: str) -> str:
    """Returns the name of a convolution's batch norm: conv1 -> bn1, layer1.0.downsample.0 -> layer1.0.downsample.1."""
    *path, last = layer.split('.')
    return '.'.join([*path, last.replace('conv', 'bn') if 'conv' in last else '1'])
