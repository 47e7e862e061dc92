"""Folds batch norm into the convolution before it, for networks that are not trained here."""

from collections.abc import Iterator, Mapping

import numpy as np


def fold_batch_norm(state: Mapping[str, np.ndarray], conv: str, norm: str, epsilon: float) -> dict[str, np.ndarray]:
    """Combines a convolution without bias and its batch norm.

    Args:
      state: a PyTorch state dict.
      conv: the convolution's name in it.
      norm: the batch norm's name.
      epsilon: of the batch norm.

    Returns:
      {'kernel': [h, w, in, out], 'bias': [out]}.

    Raises:
      KeyError: the state dict lacks an array.
    """
    scale = state[f'{norm}.weight'] / np.sqrt(state[f'{norm}.running_var'] + epsilon)
    return {
        'kernel': (state[f'{conv}.weight'] * scale[:, None, None, None]).transpose(2, 3, 1, 0),
        'bias': state[f'{norm}.bias'] - state[f'{norm}.running_mean'] * scale,
    }


def mismatches(params: Mapping, wanted: Mapping) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Compares the shapes of parameters {layer: {array: ...}} with those that a network needs.

    Yields:
      ('<layer> <array>', its shape, the needed shape) of every array that differs.
    """
    for layer, arrays in wanted.items():
        for name, array in arrays.items():
            if params[layer][name].shape != array.shape:
                yield f'{layer} {name}', params[layer][name].shape, array.shape
