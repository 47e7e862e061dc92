"""Digests, and files that are written completely or not at all."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from vqvae2_jax.io import names, remote

PARTIAL = re.compile(r'\..*\.\d+\.part|.*\.unfinished-[0-9a-f]{8}')  # of `replace_file`, and of the store of codes


class WriteError(OSError):
    """A file below the workdir cannot be written. The message says why and what to do. It is printed in one line."""


_REMEDIES = {
    errno.ENOSPC: 'Make room on this disk',
    errno.EDQUOT: 'Make room within the quota',
    errno.EROFS: 'Give another --workdir, or make the disk writable',
    errno.EACCES: 'Give another --workdir, or change the permissions',
    errno.EPERM: 'Give another --workdir, or change the permissions',
    errno.EIO: 'Check the disk, or give another --workdir',
}


guards: list[Callable[[epath.PathLike], None]] = []  # called before every write; io/lock.py adds its check


@contextlib.contextmanager
def writing(path: epath.PathLike, size: int | None = None) -> Iterator[None]:
    """Turns the errors of a failed write or deletion inside the context into one clear error.

    These are an OSError from any library, and errors of TensorStore and ArrayRecord that name a failed system call.

    Args:
      path: the file or directory.
      size: bytes to write, for the message; None: unknown.

    Raises:
      WriteError: the write failed.
      JobError: this process has lost the lock of the directory (io/lock.py).
    """
    for guard in guards:
        guard(path)
    try:
        with remote.as_os_error(path) if remote.is_remote(path) else contextlib.nullcontext():
            yield
    except WriteError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if (number := _error_number(error)) is None:
            if isinstance(error, OSError) and remote.is_remote(path):  # such errors have no number
                raise WriteError(
                    f'{path} cannot be written: {error}. Correct this; then the same command continues'
                ) from error
            raise
        amount = f' ({size:,} bytes)' if size else ''
        parts = [f'{path} cannot be written{amount}: {os.strerror(number)}']
        if (free := free_bytes(path)) is not None:
            parts.append(f'{free:,} bytes are free')
        parts.append(f'{_REMEDIES.get(number, "Remove the cause")}; then the same command continues')
        raise WriteError('. '.join(parts)) from error


def free_bytes(path: epath.PathLike) -> int | None:
    """Returns the free space of the disk that holds a path, which need not exist; None on a bucket."""
    if remote.is_remote(path):
        return None
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def _error_number(error: BaseException | None) -> int | None:
    """Returns the number of the failed system call behind an error; None if there was none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if match := re.search(r"os_error_code='(\d+)'", str(error)):  # of TensorStore
            return int(match[1])
        if match := re.match(r'\w+\(\) failed: ([^;]+);', str(error)):  # of ArrayRecord
            return next((number for number in errno.errorcode if os.strerror(number) == match[1]), None)
        error = error.__cause__
    return None


def digest_arrays(tree: Any) -> str:
    """SHA-256 (64 hex digits) of a pytree of arrays: key paths in sorted order, dtypes, shapes and bytes.

    It depends neither on the order of insertion nor on whether a level is a dict, a FrozenDict or a dataclass with the
    same names. Arrays must be addressable from this process.

    Raises:
      TypeError: a leaf is not an array of numbers; the message names its path.
    """
    leaves = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        # A list of names, not one joined string: {"a/b": x} and {"a": {"b": x}} are different trees.
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        leaves.append((names, leaf))
    sha = hashlib.sha256()
    for names, leaf in sorted(leaves, key=lambda item: item[0]):
        array = np.asarray(leaf)
        if array.dtype.hasobject or array.dtype.kind in 'USmM':
            raise TypeError(
                f'digest_arrays: leaf {"/".join(names)!r} is {type(leaf).__name__} of dtype {array.dtype}; '
                'only arrays of numbers have a digest'
            )
        header = json.dumps([names, array.dtype.name, list(array.shape)])
        sha.update(header.encode() + b'\n')
        # Through uint8 because bfloat16 and its kin do not offer the buffer protocol.
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return sha.hexdigest()


def digest_json(obj: Any) -> str:
    """SHA-256 (64 hex digits) of a JSON value; the order of keys does not matter, and a tuple equals a list.

    Raises:
      TypeError, ValueError: as `write_json`.
    """
    text = json.dumps(to_json(obj, 'obj'), sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: epath.PathLike, obj: Any) -> None:
    """Writes `obj` as pretty JSON; a reader sees the old file or the new one, never a part. Makes parent folders.

    NumPy scalars are written as numbers. Key order is kept.

    Raises:
      TypeError: a key is not a string, or a value has no JSON form; the message names it.
      ValueError: a float is NaN or infinite (JSON has neither); the message names it.
    """
    text = json.dumps(to_json(obj, epath.Path(path).name), indent=2) + '\n'
    write_bytes(path, text.encode())


def read_json(path: epath.PathLike) -> Any:
    """Reads what `write_json` wrote.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not whole JSON; the message says where it breaks.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist; run the job that writes it first, or correct the path')
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f'{path} is not whole JSON ({error}); delete it and rerun the job that writes it') from error


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes a file under a temporary name beside it and renames it, so that a killed job leaves no torn file."""
    with replace_file(path, len(data)) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def replace_file(path: epath.PathLike, size: int | None = None) -> Iterator[epath.Path]:
    """Yields a temporary path beside `path` for a file to write; it gets its name when the context ends without error.

    On a bucket, where no file is ever torn, it is `path` itself.

    Args:
      path: the file.
      size: bytes to write, for messages; None: unknown.

    Raises:
      WriteError: the file cannot be written.
    """
    path = epath.Path(path)
    if remote.is_remote(path):
        with writing(path, size):
            yield path
        return
    part = path.parent / f'.{names.shorten(path.name)}.{os.getpid()}.part'
    with writing(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            if path.is_dir():  # damage
                path.rmtree()
            part.replace(path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def remove(path: epath.Path) -> None:
    """Removes a file, or a directory with all files below it; does nothing if there is none.

    Raises:
      WriteError: it cannot be removed.
    """
    with writing(path):
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


def remove_partial(directory: epath.PathLike) -> None:
    """Removes temporary files of dead processes below a directory. Call it while no other process writes there."""
    if remote.is_remote(directory):  # files appear there only when they are complete
        return
    for folder, _, filenames in os.walk(directory):
        for name in filenames:
            if PARTIAL.fullmatch(name):
                remove(epath.Path(folder) / name)


def list_names(directory: epath.PathLike) -> set[str]:
    """Returns the names in a directory, from one listing; an empty set if there is no directory.

    On a bucket this is much faster than to ask for every file.
    """
    try:
        return {path.name for path in epath.Path(directory).iterdir()}
    except (FileNotFoundError, NotADirectoryError):  # a file in its place is an error of the first write
        return set()


def to_json(value: Any, name: str) -> Any:
    """Converts a value to JSON's own types: NumPy scalars become numbers, tuples become lists.

    Args:
      value: the value.
      name: name of the value in messages, such as 'settings'.

    Raises:
      TypeError: a key is not a string, or a value has no JSON form.
      ValueError: a float is NaN or infinite.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f'{name} is {value}, which JSON cannot hold; find out why, or write null on purpose')
        return value
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(
                    f'{name} has the key {key!r} ({type(key).__name__}); JSON keys are strings, '
                    'so it would not read back the same'
                )
        return {key: to_json(item, f'{name}.{key}') for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item, f'{name}[{i}]') for i, item in enumerate(value)]
    raise TypeError(
        f'{name} is a {type(value).__name__}, which has no JSON form; convert it to numbers, strings, '
        'lists or dicts first'
    )
