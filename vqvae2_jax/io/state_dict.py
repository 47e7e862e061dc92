"""Weights that others trained: PyTorch state dicts from .pth and .npz files, as NumPy arrays; no pickle is executed."""

import hashlib
import http.client
import os
import pickle
import urllib.request

import numpy as np
from etils import epath

from vqvae2_jax.io import files, names, npz, remote

# Errors that pickle raises for damaged and hostile data.
PICKLE_ERRORS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)
# Errors that PyTorch raises for damaged files, and for tensors that NumPy has no form for.
_DAMAGE = (*PICKLE_ERRORS, AssertionError, RuntimeError)


def read(path: str, pattern: bool = False) -> dict[str, np.ndarray]:
    """Name -> array.

    Args:
      path: a .pth or .pt file (needs PyTorch), or an .npz file; also one on gs://, s3:// or hf://, which is copied.
      pattern: whether a path that does not exist may be a pattern such as 'weights_part*.npz' for several .npz files
        that make one state dict together.

    Raises:
      FileNotFoundError: no such file.
      OSError: a store does not answer, or refuses.
      ImportError: a .pth file without PyTorch.
      ValueError: a file of another format, or one that holds something else.
    """
    path = os.path.expanduser(path)
    remote.check(path)
    path = remote.local_copy(path, pattern=pattern)
    paths = remote.expand(path) if pattern else [path] * os.path.lexists(path)
    if not paths:
        raise FileNotFoundError(f'there is no file {path!r}')
    state: dict[str, np.ndarray] = {}
    for each in paths:
        state |= _read_torch(each) if each.endswith(('.pth', '.pt')) else npz.read(each)
    return state


def fetch(url: str, sha256: str, path: epath.Path) -> None:
    """Downloads a file to `path`, unless it is there; its SHA-256 is checked either way, before it appears.

    Raises:
      OSError: no network; the message says where to put the file by hand.
      ValueError: other bytes than expected.
    """
    by_hand = f'Download {url} on another machine and put it at {path}.'
    there = path.exists()
    try:
        data = path.read_bytes() if there else _download(url)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f'{url} cannot be fetched ({error}). {by_hand}') from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise ValueError(f'{path if there else url} has the SHA-256 {digest}, not {sha256}. {by_hand}')
    if not there:
        files.write_bytes(path, data)


def _download(url):
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read()


def _read_torch(path):
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f'{path!r} needs PyTorch to be read: pip install torch, or give the weights as .npz'
        ) from error
    size = npz.check_archive(path)
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except _DAMAGE as error:
        raise ValueError(f'{path!r} is no state dict, or holds more than arrays, which is not read') from error
    state = state.get('state_dict', state) if isinstance(state, dict) else state  # training scripts wrap it
    if not isinstance(state, dict):
        raise ValueError(f'{path!r} holds a {type(state).__name__}, not a state dict, {{name: array}}')
    tensors = {str(name): tensor.detach() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    arrays, storages = {}, {}
    for name, tensor in tensors.items():
        try:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if tensor.numel() * tensor.element_size() > storage.nbytes() or sum(storages.values()) > size:
                raise ValueError('it claims more bytes than the file holds')
            tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            arrays[name.removeprefix('module.')] = tensor.numpy()
        except _DAMAGE as error:  # also sparse and quantized ones
            raise ValueError(f'{path!r}: {names.printable(name)!r} is no plain array: {_line(error)}') from error
    return arrays


def _line(error):
    return ' '.join(str(error).split('\n')[0].split()) or type(error).__name__
