"""Sizes and checksums of files, as records hold them (io/record.py).

An entry is [bytes, checksum]. The checksum is 'sha256:<hex>' of a local file. On a bucket it is the store's own,
'md5:<base64>' or 'crc32c:<base64>', which a listing gives without reading the file.
"""

import base64
import concurrent.futures
import hashlib
import json
import os
from collections.abc import Collection
from typing import Any

import fsspec
from etils import epath

from vqvae2_jax.io import files, remote

_SEAL = 'checksum'
_MAX_SINGLE = 4  # objects of a bucket that are asked for one by one, instead of by a listing
_THREADS = 8  # hashing and reading release the lock of the interpreter
_MAX_CACHED = 1 << 16
_cache: dict[tuple, str] = {}  # (path, inode, bytes, time of the last change, algorithm) -> checksum


def file_entries(directory: epath.PathLike, names: Collection[str] | None = None) -> dict[str, list]:
    """Returns the entries of files below a directory.

    Args:
      directory: the directory.
      names: paths relative to it, with '/'; None: all files below it.

    Returns:
      {name: [bytes, checksum]}, sorted by name. Names without a file are left out.
    """
    if remote.is_remote(directory):
        listed = _list_remote(directory, names)
        wanted = listed.keys() if names is None else names
        return {name: list(listed[name]) for name in sorted(wanted) if name in listed}
    names = sorted(_list_local(directory) if names is None else names)
    paths = [os.path.join(directory, name) for name in names]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        entries = dict(zip(names, pool.map(_local_entry, paths), strict=True))
    return {name: entry for name, entry in entries.items() if entry is not None}


def find_damaged(directory: epath.PathLike, recorded: dict[str, list]) -> dict[str, str]:
    """Compares files below a directory with their entries.

    Returns:
      {name: reason} of files that differ, such as 'it is missing'; {} if all are as recorded.
    """
    if remote.is_remote(directory):
        listed = _list_remote(directory) if recorded else {}
        problems = ((name, _compare_remote(directory, name, entry, listed)) for name, entry in recorded.items())
    else:
        paths = [os.path.join(directory, name) for name in recorded]
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            problems = list(zip(recorded, pool.map(_compare_local, paths, recorded.values()), strict=True))
    return {name: problem for name, problem in problems if problem}


def write_sealed(path: epath.PathLike, fields: dict[str, Any]) -> None:
    """Writes a JSON file that holds its own checksum, in the field 'checksum'; raises as `files.write_json`."""
    fields = files.to_json(fields, epath.Path(path).name)
    files.write_json(path, {**fields, _SEAL: files.digest_json(fields)})


def read_sealed(path: epath.PathLike) -> dict[str, Any]:
    """Reads what `write_sealed` wrote, without the checksum.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged.
    """
    fields = json.loads(epath.Path(path).read_text())
    if not isinstance(fields, dict) or _SEAL not in fields:
        raise ValueError('it has no checksum')
    checksum = fields.pop(_SEAL)
    if checksum != files.digest_json(fields):
        raise ValueError('its content differs from its checksum')
    return fields


def _list_local(directory):
    names = []
    for folder, _, filenames in os.walk(directory):
        filenames = [name for name in filenames if not files.PARTIAL.fullmatch(name)]
        names += [os.path.relpath(os.path.join(folder, name), directory).replace(os.sep, '/') for name in filenames]
    return names


def _list_remote(directory, names=None) -> dict[str, tuple[int, str]]:
    """Returns (bytes, checksum) of objects below a directory of a bucket: all, or at least those of `names`."""
    remote.configure()
    system, root = fsspec.core.url_to_fs(os.fspath(directory))
    with remote.as_os_error(directory):
        if names is not None and len(names) <= _MAX_SINGLE:
            paths = [f'{root}/{name}' for name in names]
            infos = {path: system.info(path) for path in paths if system.exists(path)}
        else:
            infos = system.find(root, detail=True)
    entries = {}
    for path, info in infos.items():
        algorithm = 'md5' if info.get('md5Hash') else 'crc32c'  # composite objects have no MD5
        checksum = info.get('md5Hash') or info.get('crc32c', '')
        entries[path.removeprefix(root).lstrip('/')] = int(info['size']), f'{algorithm}:{checksum}'
    return entries


def _local_entry(path):
    try:
        return [os.path.getsize(path), _hash_file(path, 'sha256')]
    except FileNotFoundError:
        return None


def _hash_file(path: str, algorithm: str) -> str:
    """Returns the checksum of a local file, from memory if the file has not changed since the last call."""
    with open(path, 'rb') as file:
        state = os.fstat(file.fileno())
        key = path, state.st_ino, state.st_size, state.st_mtime_ns, algorithm
        if key not in _cache:
            if len(_cache) >= _MAX_CACHED:
                _cache.clear()
            digest = hashlib.file_digest(file, algorithm)
            text = digest.hexdigest() if algorithm == 'sha256' else base64.b64encode(digest.digest()).decode()
            _cache[key] = f'{algorithm}:{text}'
        return _cache[key]


def _compare_local(path, entry) -> str:
    """Returns how a local file differs from its entry; '' if it does not."""
    size, checksum = entry
    algorithm = checksum.partition(':')[0]
    try:
        if os.path.getsize(path) != size:
            return f'it has {os.path.getsize(path)} bytes instead of {size}'
        # A set copied from a bucket may have CRC32C, which Python cannot compute: then the size decides.
        differs = algorithm in ('sha256', 'md5') and _hash_file(path, algorithm) != checksum
    except FileNotFoundError:
        return 'it is missing'
    except OSError as error:
        return f'it cannot be read: {error.strerror}'
    return 'its content has changed' if differs else ''


def _compare_remote(directory, name, entry, listed) -> str:
    """Returns how an object of a bucket differs from its entry; '' if it does not."""
    if name not in listed:
        return 'it is missing'
    (size, checksum), (now, checksum_now) = entry, listed[name]
    if size != now:
        return f'it has {now} bytes instead of {size}'
    if checksum.partition(':')[0] != checksum_now.partition(':')[0]:  # the set was copied from a disk
        with remote.local(epath.Path(directory) / name) as path:
            return _compare_local(path, entry)
    return 'its content has changed' if checksum != checksum_now else ''
