"""Batch norm folded into the convolution before it, for networks that only judge."""

from collections.abc import Iterator, Mapping

import numpy as np


def fold(state: Mapping[str, np.ndarray], conv: str, norm: str, epsilon: float) -> dict[str, np.ndarray]:
    """Kernel [h, w, in, out] and bias [out] from PyTorch's arrays of a convolution without bias and of its batch norm.

    Raises:
      KeyError: one of them is not in the state dict.
    """
    scale = state[f'{norm}.weight'] / np.sqrt(state[f'{norm}.running_var'] + epsilon)
    return {
        'kernel': (state[f'{conv}.weight'] * scale[:, None, None, None]).transpose(2, 3, 1, 0),
        'bias': state[f'{norm}.bias'] - state[f'{norm}.running_mean'] * scale,
    }


def mismatches(params: Mapping, wanted: Mapping) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """'<layer> <array>', its shape, and the shape that a network of `wanted` parameters needs, where they differ."""
    for layer, arrays in wanted.items():
        for name, array in arrays.items():
            if params[layer][name].shape != array.shape:
                yield f'{layer} {name}', params[layer][name].shape, array.shape
