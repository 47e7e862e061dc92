"""Converts PyTorch state dicts to the parameters of networks that are not trained here.

Batch norm is folded into the convolution before it.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def convert_state_dict(
    network: nn.Module,
    state: Mapping[str, np.ndarray],
    *,
    names_of: Callable[[str], tuple[str, str]],
    epsilon: float,
    expected: str,
) -> dict[str, dict[str, np.ndarray]]:
    """Converts the arrays of a state dict to a network's parameters.

    Args:
      network: a module that maps images uint8 [B, H, W, 3] of any size. All of its layers are convolutions with
        bias, apart from the dense layer `fc`.
      state: {name: array}, with a convolution without bias and a batch norm for each convolution of the network.
      names_of: name of a layer of the network -> names of its convolution and its batch norm in `state`.
      epsilon: the constant that batch norm adds to the variance.
      expected: the networks whose weights fit, for messages.

    Returns:
      The collection `params` of the network.

    Raises:
      ValueError: an array is missing or has another shape; the message names it.
    """
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)  # the network resizes them
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)['params']
    params = {}
    try:
        for layer in shapes:
            if layer == 'fc':
                params[layer] = {'kernel': _numbers(state, 'fc.weight', 2).T}
                if 'bias' in shapes[layer]:
                    params[layer]['bias'] = _numbers(state, 'fc.bias', 1)
            else:
                params[layer] = _fold_batch_norm(state, *names_of(layer), epsilon)
    except KeyError as error:
        raise ValueError(f'the weights lack {error.args[0]!r}: {expected} is expected') from error
    for layer, arrays in shapes.items():
        for name, needed in arrays.items():
            shape = params[layer][name].shape
            if shape != needed.shape:
                raise ValueError(f'{layer} {name} has the shape {shape}, not {needed.shape}: {expected} is expected')
    return params


def _fold_batch_norm(state, conv, norm, epsilon):
    kernel = _numbers(state, f'{conv}.weight', 4)
    names = ('weight', 'bias', 'running_mean', 'running_var')
    weight, bias, mean, variance = (_numbers(state, f'{norm}.{name}', 1, len(kernel)) for name in names)
    scale = weight / np.sqrt(variance + epsilon)
    return {'kernel': (kernel * scale[:, None, None, None]).transpose(2, 3, 1, 0), 'bias': bias - mean * scale}


def _numbers(state, name, axes, length=None):
    """Returns an array of the state dict, of float numbers with so many axes."""
    array = np.asarray(state[name])
    if array.dtype.kind != 'f' or array.ndim != axes or (length is not None and len(array) != length):
        wanted = f'{axes} axes' if length is None else f'{length} items'
        raise ValueError(f'{name} of the weights is {array.dtype} {list(array.shape)}, not float with {wanted}')
    return array
