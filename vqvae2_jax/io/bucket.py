"""Workdirs and data on a bucket (gs://...): epath writes and lists there, what needs local files works on copies."""

import atexit
import functools
import os
import shutil
import tempfile

import fsspec
from etils import epath


def is_remote(path) -> bool:
    """Whether a path lies on a bucket."""
    return '://' in os.fspath(path)


def absolute(path) -> epath.Path:
    """A path that means the same from any folder, and on a bucket is what it is."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).resolve()


def check_reachable(path: str) -> None:
    """Raises ValueError where the library for such a bucket is missing, or the bucket cannot be listed."""
    try:
        files, name = fsspec.core.url_to_fs(path)
        files.exists(name)
    except (ImportError, ValueError) as error:  # a library that is not installed, an unknown kind of bucket
        raise ValueError(f'{path}: {error} (pip install "vqvae2_jax[gcs]" brings what gs:// needs)') from error
    except Exception as error:  # each kind of bucket has its own errors, for names, networks and permissions
        raise ValueError(f'{path} cannot be reached: {error}') from error


def local_copy(path) -> str:
    """`path` itself where it is local; else a copy that lasts as long as this process.

    Args:
      path: of a file, a folder, or a pattern of files such as gs://bucket/samples/*.npz.

    Raises:
      FileNotFoundError: there is none.
    """
    path = os.fspath(path)
    if not is_remote(path):
        return path
    files, name = fsspec.core.url_to_fs(path)
    folder, last = tempfile.mkdtemp(dir=_copies()), os.path.basename(name)
    found = files.glob(name) if set('*?[') & set(last) else [name] if files.exists(name) else []
    if not found:
        raise FileNotFoundError(f'there is nothing at {path}')
    for each in found:
        files.get(each, os.path.join(folder, os.path.basename(each)), recursive=files.isdir(each))
    return os.path.join(folder, last)


def upload(local: str, path: epath.Path) -> None:
    """Copies a local file to a bucket; readers see all of it or nothing."""
    files, name = fsspec.core.url_to_fs(os.fspath(path))
    files.put_file(local, name)


@functools.cache
def _copies():
    folder = tempfile.mkdtemp(prefix='vqvae2_jax-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
