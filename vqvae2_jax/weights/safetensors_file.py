"""A generator in one .safetensors file: its arrays by path, and in the header a format version and the config.

  tensors   'vqvae/params/...', 'vqvae/codebook/...' and 'prior/<level>/params/...', in our names, float32 or bfloat16.
  metadata  'format', the version of this layout; 'vqvae2_jax', the version of the package that wrote the file;
            'specification', a JSON object with the fields of `generator.Specification`.

Every later version reads all formats up to its own.
"""

import contextlib
import dataclasses
import json
import os
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from etils import epath

from vqvae2_jax.config import build
from vqvae2_jax.config.fields import ConfigError
from vqvae2_jax.data.codes import CodeSpec
from vqvae2_jax.distributed import processes
from vqvae2_jax.generator import Generator, Specification
from vqvae2_jax.io import files, remote
from vqvae2_jax.version import __version__

FORMAT = 1
SUFFIX = '.safetensors'


def save(generator: Generator, path: epath.PathLike, *, dtype: str = 'float32') -> None:
    """Writes a generator to a .safetensors file, completely or not at all; of several processes, the first writes.

    Args:
      generator: the networks; on several processes, each array on every one.
      path: the file, also on a bucket.
      dtype: 'float32' or 'bfloat16', of the stored weights. Codebooks are always stored in float32, and `load` returns
        float32.

    Raises:
      ValueError: another suffix or dtype.
      WriteError: the file cannot be written.
    """
    path = remote.absolute(path)
    if path.suffix != SUFFIX:
        raise ValueError(f'{path}: the name of a file of weights ends with {SUFFIX}')
    if dtype not in ('float32', 'bfloat16'):
        raise ValueError(f'dtype is {dtype!r}; it must be float32 or bfloat16')
    tensors = {name: _stored(name, np.asarray(x), dtype) for name, x in _flatten(generator).items()}
    metadata = {
        'format': str(FORMAT),
        'vqvae2_jax': __version__,
        'specification': json.dumps(dataclasses.asdict(generator.specification)),
    }
    processes.run_on_main_process(lambda: files.write_bytes(path, safetensors.flax.save(tensors, metadata)))


def load(path: epath.PathLike) -> Generator:
    """Reads a generator from a .safetensors file, as float32 NumPy arrays.

    Args:
      path: the file, also on a bucket.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, was not written by `save`, or is of a newer format; or its arrays are not those
        of its config (the message shows both).
    """
    path, specification = os.fspath(path), load_specification(path)
    with _open(path, 'flax') as file:
        tensors = {name: _loaded(file.get_tensor(name)) for name in file.keys()}
    with_priors = any(name.startswith('prior/') for name in tensors)
    _check_arrays(path, tensors, specification.shapes(with_priors=with_priors))
    trees = flax.traverse_util.unflatten_dict(tensors, sep='/')
    params = tuple(trees['prior'][level]['params'] for level in specification.levels) if with_priors else ()
    return Generator(trees.get('vqvae', {}), params, specification)


def load_specification(path: epath.PathLike) -> Specification:
    """Reads the specification in the header of a file; it starts no backend of JAX. Raises as `load`."""
    path = os.fspath(path)
    with _open(path, 'np') as file:
        metadata = file.metadata() or {}
    if not metadata.keys() >= {'specification', 'format', 'vqvae2_jax'}:
        raise ValueError(
            f'{path} has no specification in its header: it was not written by vqvae2_jax.save. PyTorch weights of '
            'rosinality are read by --job=import'
        )
    if not metadata['format'].isdecimal() or int(metadata['format']) > FORMAT:
        raise ValueError(
            f'{path} has format {metadata["format"]}, written by version {metadata["vqvae2_jax"]}; this version '
            f'{__version__} reads formats up to {FORMAT}: install a newer one'
        )
    try:
        fields = json.loads(metadata['specification'])
        codes = fields.get('codes')  # of another tokenizer
        codes = codes and CodeSpec.from_json(codes)
        specification = Specification(fields['config'], tuple(fields['class_names']), codes)
        specification.to_config()
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path}: its specification is damaged: {error}') from error
    return specification


@contextlib.contextmanager
def _open(path, framework):
    try:
        with safetensors.safe_open(remote.local_copy(path), framework=framework) as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f'{path} is no .safetensors file, or is damaged: {error}') from error


def _check_arrays(path, tensors, generator) -> None:
    if different := build.different_arrays(tensors, _flatten(generator)):
        pairs = list(different.items())[:10]
        lines = '\n'.join(f'  {name}: file {found}, network {expected}' for name, (found, expected) in pairs)
        raise ValueError(f'{path} has other arrays than its networks ({len(different)}):\n{lines}')


def _flatten(generator: Generator) -> dict[str, Any]:
    levels = generator.specification.levels
    trees = {'vqvae': generator.variables}
    if generator.params:
        trees['prior'] = {level: {'params': x} for level, x in zip(levels, generator.params, strict=True)}
    return flax.traverse_util.flatten_dict(trees, sep='/')


def _stored(name, array, dtype):
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.float32 if name.startswith('vqvae/codebook/') else jnp.dtype(dtype))
    return jnp.asarray(array)


def _loaded(array: jax.Array) -> np.ndarray:
    return np.asarray(array, np.float32 if jnp.issubdtype(array.dtype, jnp.floating) else array.dtype)
