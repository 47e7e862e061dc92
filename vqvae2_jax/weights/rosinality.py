"""Weights of the VQ-VAE of github.com/rosinality/vq-vae-2-pytorch (its vqvae.py), from and to a PyTorch state dict.

That network is `VQVAE` with the downsampling factors (4, 2), at any width. Every array of its state dict has one place
here, with its axes in another order. Three things have no counterpart there: the preview head, which is imported as
zeros, so that images of the top codes alone are gray; the age of each code; and the number of codebook updates.

Weights that were trained before 2021-01-23 need `relu_skip` (`models.residual.ResidualBlock`): until then the first
ReLU of a residual block changed its input in place, so the skip connection carried the activated input. The state dict
does not say so.
"""

import io
from collections.abc import Mapping
from typing import Any

import flax
import numpy as np
from etils import epath

from vqvae2_jax.distributed import processes
from vqvae2_jax.generator import Generator, Specification
from vqvae2_jax.io import files, names, remote, state_dict
from vqvae2_jax.models.quantizer import NEVER

SUFFIXES = ('.pt', '.pth')
READABLE_SUFFIXES = (*SUFFIXES, '.npz')
FACTORS = (4, 2)

# Axes of theirs in the order of ours: ours = theirs.transpose(axes).
_CONVOLUTION = (2, 3, 1, 0)  # [out, in, h, w] -> [h, w, in, out]
_UPSAMPLING = (2, 3, 0, 1)  # of a transposed convolution: [in, out, h, w] -> [h, w, in, out]
_CODEBOOK = (1, 0)  # [D, K] -> [K, D]
_VECTOR = (0,)
_UPDATES = 10**6  # unknown: any number beyond the warm-up of the codebook's averages (quantizer.warm_decay)
_PIXELSNAIL = (
    'is a checkpoint of PixelSNAIL (train_pixelsnail.py), which is another network than the priors here, and cannot be '
    'imported: import the VQ-VAE and the extracted codes, and train the priors with --job=prior'
)


def read(path: str) -> dict[str, np.ndarray]:
    """Reads the state dict of a checkpoint, without the prefix `module.` of its names.

    Args:
      path: a .pt or .pth file (needs PyTorch), or an .npz file with the same names.

    Raises:
      FileNotFoundError: no such file.
      ImportError: a .pt file without PyTorch.
      ValueError: it holds no state dict, or one of PixelSNAIL.
    """
    try:
        state = state_dict.read(path)
    except ValueError as error:
        # train_pixelsnail.py stores its arguments beside the weights.
        if 'argparse.Namespace' in str(error.__cause__):
            raise ValueError(f'{names.printable(path)} {_PIXELSNAIL}') from error
        raise
    if 'background' in state and any(name.startswith('horizontal.') for name in state):
        raise ValueError(f'{names.printable(path)} {_PIXELSNAIL}')
    return state


def from_state_dict(state: Mapping[str, np.ndarray], specification: Specification) -> dict[str, Any]:
    """Converts a state dict to the variables of stage 1.

    Args:
      state: {name: array}.
      specification: describes the network; its widths must be those of the weights.

    Returns:
      All collections of stage 1, {'params': ..., 'codebook': ...}, as float32 NumPy arrays.

    Raises:
      ValueError: the network has other levels; names or shapes are not those of the network (the message shows both
        trees); or an array is not of finite floating-point numbers.
    """
    places = _places(specification)
    expected = _flatten(specification.shapes(with_priors=False).variables)
    needed = {name: _reordered(expected[path].shape, np.argsort(axes)) for path, (name, axes) in places.items()}
    found = {name: tuple(array.shape) for name, array in state.items()}
    if needed != found:
        raise ValueError(_describe_mismatch(found, needed))
    arrays = {path: np.zeros(x.shape, x.dtype) for path, x in expected.items()}
    for path, (name, axes) in places.items():
        array = np.asarray(state[name])
        if array.dtype.kind != 'f' or not np.isfinite(array).all():
            raise ValueError(f'{name} is {array.dtype}, or has numbers that are not finite: weights are finite floats')
        arrays[path] = np.ascontiguousarray(array.astype(np.float32).transpose(axes))
    for path in arrays:
        if path.endswith('/age'):
            arrays[path][...] = NEVER
        elif path.endswith('/updates'):
            arrays[path][...] = _UPDATES
    return flax.traverse_util.unflatten_dict(arrays, sep='/')


def to_state_dict(generator: Generator) -> dict[str, np.ndarray]:
    """Converts stage 1 of a generator to a state dict: the inverse of `from_state_dict`, without the preview head.

    rosinality's class loads it with `strict=True`, if it is made with the same widths. With `relu_skip` it needs the
    class as it was before 2021-01-23.

    Raises:
      ValueError: stage 1 has other levels.
    """
    arrays, places = _flatten(generator.variables), _places(generator.specification)
    return {
        name: np.array(np.asarray(arrays[path]).transpose(np.argsort(axes)), np.float32, order='C')
        for path, (name, axes) in places.items()
    }


def save(generator: Generator, path: epath.PathLike) -> None:
    """Writes stage 1 of a generator as a state dict, completely or not at all.

    Args:
      generator: the networks.
      path: the file, with the suffix .pt or .pth, also on a bucket.

    Raises:
      ValueError: another suffix, or as `to_state_dict`.
      ImportError: PyTorch is not installed.
      WriteError: the file cannot be written.
    """
    path = remote.absolute(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f'{path}: the name of a PyTorch file ends with {" or ".join(SUFFIXES)}')
    state = to_state_dict(generator)
    try:
        import torch
    except ImportError as error:
        raise ImportError(f'{path} needs PyTorch to be written: pip install torch') from error
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, buffer)
    processes.run_on_main_process(lambda: files.write_bytes(path, buffer.getvalue()))


def _places(specification: Specification) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns {path of an array of ours: (its name in the state dict, axes)}."""
    model = specification.vqvae
    if model.downsample_factors != FACTORS:
        raise ValueError(
            f"vqvae.downsample_factors is {model.downsample_factors}; rosinality's VQ-VAE has the levels of {FACTORS}"
        )
    blocks = model.num_residual_blocks
    layers = {
        'projections_0': ('quantize_conv_b', _CONVOLUTION),
        'projections_1': ('quantize_conv_t', _CONVOLUTION),
        'upsamplers_0_0': ('upsample_t', _UPSAMPLING),
    }
    # Their lists of layers count the ReLUs between convolutions too.
    for ours, theirs, count in (('encoders_0', 'enc_b', 3), ('encoders_1', 'enc_t', 2)):
        layers |= {f'{ours}/Conv_{i}': (f'{theirs}.blocks.{2 * i}', _CONVOLUTION) for i in range(count)}
        layers |= _residual_layers(ours, theirs, 2 * count - 1, blocks)
    for ours, theirs, count in (('decoders_0', 'dec', 2), ('decoders_1', 'dec_t', 1)):
        layers[f'{ours}/Conv_0'] = f'{theirs}.blocks.0', _CONVOLUTION
        layers |= _residual_layers(ours, theirs, 1, blocks)
        first = blocks + 2
        layers |= {f'{ours}/Upsample_{i}': (f'{theirs}.blocks.{first + 2 * i}', _UPSAMPLING) for i in range(count)}
    places = {}
    for ours, (theirs, axes) in layers.items():
        places[f'params/{ours}/kernel'] = f'{theirs}.weight', axes
        places[f'params/{ours}/bias'] = f'{theirs}.bias', _VECTOR
    for ours, theirs in (('quantizers_0', 'quantize_b'), ('quantizers_1', 'quantize_t')):
        places[f'codebook/{ours}/embedding'] = f'{theirs}.embed', _CODEBOOK
        places[f'codebook/{ours}/sums'] = f'{theirs}.embed_avg', _CODEBOOK
        places[f'codebook/{ours}/counts'] = f'{theirs}.cluster_size', _VECTOR
    return places


def _residual_layers(ours, theirs, first, blocks):
    return {
        f'{ours}/ResidualStack_0/blocks_{block}/Conv_{i}': (f'{theirs}.blocks.{first + block}.conv.{k}', _CONVOLUTION)
        for block in range(blocks)
        for i, k in enumerate((1, 3))
    }


def _flatten(variables) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(variables, sep='/')


def _reordered(shape, axes):
    return tuple(shape[axis] for axis in axes)


def _describe_mismatch(found, needed) -> str:
    rows = [('array', 'file', 'network', '')]
    for name in [*needed, *sorted(found.keys() - needed.keys())]:
        sides = [str(list(shapes[name])) if name in shapes else '-' for shapes in (found, needed)]
        rows.append((names.printable(name), *sides, '' if sides[0] == sides[1] else '  differs'))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ['  '.join(text.ljust(width) for text, width in zip(row, (*widths, 0), strict=True)) for row in rows]
    different = sum(bool(row[3]) for row in rows)
    return (
        f"{different} arrays differ from rosinality's VQ-VAE with the widths of the config. Its own widths are "
        'hidden_channels=128, residual_channels=32, num_residual_blocks=2, codebook_size=512, codebook_dim=64 of '
        'vqvae, and data.channels=3:\n' + '\n'.join(line.rstrip() for line in lines)
    )
