"""Google Cloud Storage (gs://...): epath reads and writes there; libraries that need local files get a copy."""

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator

import fsspec
from etils import epath


@functools.cache
def configure() -> None:
    """Configures epath, gcsfs and fsspec once; importing this module does not.

    Every function of this module that takes a path calls it if the path is on a bucket.
    """
    # epath uses fsspec even if TensorFlow is installed, and gcsfs its plain kind of bucket. The tests cover only these.
    os.environ.setdefault('EPATH_USE_TF', 'false')
    os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    # Directory listings are not cached: other processes write there.
    for name in ('gs', 'gcs'):
        fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path is on a bucket."""
    return os.fspath(path).startswith('gs://')


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns a local path as an absolute one, and a path on a bucket as it is."""
    if not is_remote(path):
        return epath.Path(path).resolve()
    configure()
    return epath.Path(path)


def check(path: str) -> None:
    """Checks an address before it is used; local paths always pass.

    Raises:
      ValueError: the address is neither local nor gs://, or the bucket cannot be reached.
    """
    if '://' not in path:
        return
    if not is_remote(path):
        raise ValueError(f'{path}: there are local folders and buckets of Google Cloud Storage, gs://bucket/folder')
    configure()
    try:
        files, name = fsspec.core.url_to_fs(path)
        there = files.exists(name.split('/')[0])
    except ImportError as error:
        raise ValueError(f'{path}: {error}: pip install -e ".[gcs]"') from error
    except Exception as error:  # gcsfs has many, for names, networks and permissions
        raise ValueError(f'{path} cannot be reached: {error}') from error
    if not there:
        raise ValueError(f'{path}: there is no such bucket, or it may not be listed with these credentials')


def local_copy(path: epath.PathLike, version: str = '') -> str:
    """Returns a local path as it is, and copies a path on a bucket, once for as long as this process lives.

    Args:
      path: a file, a folder, or a pattern of files such as gs://bucket/samples/*.npz.
      version: identifies the content, if it may be replaced while this process lives; another version is copied again.

    Raises:
      FileNotFoundError: there is nothing at the path.
    """
    return _cached_copy(os.fspath(path), version) if is_remote(path) else os.fspath(path)


@contextlib.contextmanager
def local(path: epath.PathLike) -> Iterator[str]:
    """Yields a local path as it is, and a copy of a path on a bucket, which is deleted after the context."""
    with tempfile.TemporaryDirectory(prefix='vqvae2_jax-') as folder:
        yield _copy(os.fspath(path), folder) if is_remote(path) else os.fspath(path)


def upload(file: str, path: epath.Path) -> None:
    """Copies a local file to a bucket; readers see all of it or nothing."""
    configure()
    files, name = fsspec.core.url_to_fs(os.fspath(path))
    files.put_file(file, name)


def _copy(path, folder):
    configure()
    files, name = fsspec.core.url_to_fs(path)
    folder, last = tempfile.mkdtemp(dir=folder), os.path.basename(name)
    paths = files.glob(name) if set('*?[') & set(last) else [name] if files.exists(name) else []
    if not paths:
        raise FileNotFoundError(f'there is nothing at {path}')
    for each in paths:
        files.get(each, os.path.join(folder, os.path.basename(each)), recursive=files.isdir(each))
    return os.path.join(folder, last)


@functools.cache
def _cached_copy(path, version):
    return _copy(path, _cache_folder())


@functools.cache
def _cache_folder():
    folder = tempfile.mkdtemp(prefix='vqvae2_jax-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
