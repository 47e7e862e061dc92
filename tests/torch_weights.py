"""State dicts of the right shapes with seeded numbers: the same everywhere, so that PyTorch's outputs can be kept."""

from collections.abc import Mapping

import jax
import numpy as np


def seeded_state(
    params: Mapping, norm_of, classes: int, scale: tuple[float, float], bias: bool = False
) -> dict[str, np.ndarray]:
    """PyTorch's names of the folded convolutions `params` (shapes), with batch norm unfolded.

    Args:
      params: layer -> {'kernel': shape [h, w, in, out], ...}; a layer `fc` is left to `classes`.
      norm_of: name of a layer -> names of its convolution and of its batch norm.
      scale: range of the batch norms' weights, such that the numbers neither vanish nor explode with depth.
    """
    rng, state = np.random.default_rng(0), {}
    for layer in sorted(set(params) - {'fc'}):
        height, width, inputs, outputs = params[layer]['kernel'].shape
        conv, norm = norm_of(layer)
        kernel = rng.normal(size=(outputs, inputs, height, width)) * (2 / (height * width * inputs)) ** 0.5
        state[f'{conv}.weight'] = kernel.astype(np.float32)
        for name, low, high in (('weight', *scale), ('bias', -0.1, 0.1), ('running_var', 0.5, 2)):
            state[f'{norm}.{name}'] = rng.uniform(low, high, outputs).astype(np.float32)
        state[f'{norm}.running_mean'] = (0.1 * rng.normal(size=outputs)).astype(np.float32)
    if classes:
        state['fc.weight'] = (0.05 * rng.normal(size=(classes, 2048))).astype(np.float32)
        if bias:
            state['fc.bias'] = rng.normal(size=classes).astype(np.float32)
    return state


def inception_state(classes: int = 0) -> dict[str, np.ndarray]:
    """For models/inception.py, and for pytorch-fid."""
    from vqvae2_jax.models.inception import Inception

    return seeded_state(_shapes(Inception(), 299), lambda layer: (f'{layer}.conv', f'{layer}.bn'), classes, (0.5, 1.5))


def resnet50_state(classes: int = 10) -> dict[str, np.ndarray]:
    """For models/imported.py, and for torchvision."""
    from vqvae2_jax.models.torchvision_resnet import BottleneckResNet, norm_of

    shapes = _shapes(BottleneckResNet(classes, (3, 4, 6, 3)), 224)
    return seeded_state(shapes, lambda layer: (layer, norm_of(layer)), classes, (0.2, 0.6), bias=True)


def images(size: int) -> np.ndarray:
    """uint8 [2, size, size, 3], smooth enough to be images."""
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(2 * np.pi * (f * x + g * y) + f) for f, g in ((1, 2), (3, 1), (2, 5), (4, 0), (1, 1), (0, 3))]
    return (127.5 * (1 + np.stack(waves, -1).reshape(size, size, 2, 3).transpose(2, 0, 1, 3))).astype(np.uint8)


def _shapes(network, size):
    return jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), np.uint8))['params']
