"""Loads a generator from its weights, and saves it."""

import os
import pathlib
from typing import Any

from etils import epath

from vqvae2_jax.generator import Generator, Specification
from vqvae2_jax.io import remote
from vqvae2_jax.weights import rosinality, run_directory, safetensors_file

_PACKAGED = pathlib.Path(__file__).parent / 'assets'
_HUB, _HUB_FILE = 'hf://', 'model.safetensors'
SAVED_SUFFIXES = (safetensors_file.SUFFIX, *rosinality.SUFFIXES)


def packaged_names() -> tuple[str, ...]:
    """Returns the names of the trained models that come with the package."""
    return tuple(sorted(path.stem for path in _PACKAGED.glob(f'*{safetensors_file.SUFFIX}')))


def load(source: epath.PathLike) -> Generator:
    """Loads the networks that make images, with their weights.

    Args:
      source: one of
        - the name of a trained model of the package, such as 'fashion';
        - a workdir with a trained stage 1, local or gs://; without priors if not all of them are trained. Or one with
          the priors of codes of another tokenizer, all trained;
        - a file NAME.safetensors that `save` wrote, local or on a bucket;
        - hf://OWNER/NAME, a model repository of the Hugging Face Hub with a file model.safetensors.

    Returns:
      The generator; its leaves are NumPy arrays.

    Raises:
      FileNotFoundError: there is nothing at `source`; the message lists the names of the package.
      ValueError: the weights are damaged, or do not fit their config.
      JobError: a workdir without a sound stage 1.
    """
    path, reader = _find(source)
    return reader.load(path)


def save(generator: Generator, path: epath.PathLike, *, dtype: str = 'float32') -> None:
    """Writes the weights of a generator to a file, completely or not at all; of several processes, the first writes.

    Args:
      generator: the networks; on several processes, each array on every one.
      path: NAME.safetensors, which `load` reads, with the config; or NAME.pt or NAME.pth, stage 1 alone with the names
        of rosinality's PyTorch code. Also on a bucket.
      dtype: 'float32' or 'bfloat16', of the weights in a .safetensors file. Codebooks are always stored in float32, and
        `load` returns float32.

    Raises:
      ValueError: another suffix or dtype, or PyTorch's network has no place for these arrays.
      ImportError: a .pt file without PyTorch.
      WriteError: the file cannot be written.
    """
    suffix = os.path.splitext(path)[1]
    if suffix == safetensors_file.SUFFIX:
        safetensors_file.save(generator, path, dtype=dtype)
    elif suffix not in rosinality.SUFFIXES:
        raise ValueError(f'{os.fspath(path)}: the name of a file of weights ends with {", ".join(SAVED_SUFFIXES)}')
    elif dtype != 'float32':
        raise ValueError(f'{os.fspath(path)}: weights for PyTorch are float32, not {dtype}')
    else:
        rosinality.save(generator, path)


def load_specification(source: epath.PathLike) -> Specification:
    """Reads the specification alone, without the weights; it starts no backend of JAX.

    Arguments and errors are those of `load`.
    """
    path, reader = _find(source)
    return reader.load_specification(path)


def _find(source) -> tuple[str, Any]:
    """Returns the file or workdir of a source, and the module that reads it."""
    text = os.fspath(source)
    if text in packaged_names():
        return os.fspath(_PACKAGED / f'{text}{safetensors_file.SUFFIX}'), safetensors_file
    if text.startswith(_HUB) and not text.endswith(safetensors_file.SUFFIX):
        return f'{text.rstrip("/")}/{_HUB_FILE}', safetensors_file
    text = os.path.expanduser(text)
    if text.endswith(safetensors_file.SUFFIX):
        return text, safetensors_file
    if remote.absolute(text).is_dir():
        return text, run_directory
    raise FileNotFoundError(
        f'there is no model {text!r}: give a name of the package ({", ".join(packaged_names()) or "there are none"}), '
        'a workdir, a .safetensors file, or hf://OWNER/NAME'
    )
