"""Google Cloud Storage (gs://...): epath reads and writes there; libraries that need local files get a copy."""

import atexit
import contextlib
import functools
import glob
import logging
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
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs the errors that it raises, with tracebacks
    # Directory listings are not cached: other processes write there.
    for name in ('gs', 'gcs'):
        fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path is on a bucket."""
    return os.fspath(path).startswith('gs://')


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns a local path as an absolute one, without `~` and links, and a path on a bucket as it is."""
    if not is_remote(path):
        return epath.Path(os.path.realpath(os.path.expanduser(path)))
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
        files, name = _address(path)
        there = files.exists(name.split('/')[0])
    except ImportError as error:
        raise ValueError(f'{path}: {error}: pip install -e ".[gcs]"') from error
    except Exception as error:  # gcsfs has many, for names, networks and permissions
        raise ValueError(f'{path} cannot be reached: {error}') from error
    if not there:
        raise ValueError(f'{path}: there is no such bucket, or it may not be listed with these credentials')


def expand(path: str) -> list[str]:
    """Returns the local files that a pattern names, sorted; a path that exists is no pattern and names itself."""
    return [path] if os.path.lexists(path) else sorted(glob.glob(path))


def local_copy(path: epath.PathLike, version: str = '', *, pattern: bool = False) -> str:
    """Returns a local path as it is, and copies a path on a bucket, once for as long as this process lives.

    Args:
      path: a file or a folder.
      version: identifies the content, if it may be replaced while this process lives; another version is copied again.
      pattern: whether a path where there is nothing may be a pattern of files, such as gs://bucket/samples/*.npz.
        Returned is a pattern of their copies.

    Raises:
      FileNotFoundError: there is nothing at the path.
      ValueError: a name on the bucket leads out of the folder.
    """
    return _cached_copy(os.fspath(path), version, pattern) if is_remote(path) else os.fspath(path)


@contextlib.contextmanager
def local(path: epath.PathLike) -> Iterator[str]:
    """Yields a local path as it is, and a copy of a path on a bucket, which is deleted after the context."""
    with tempfile.TemporaryDirectory(prefix='vqvae2_jax-') as folder:
        yield _copy(os.fspath(path), folder) if is_remote(path) else os.fspath(path)


def upload(file: str, path: epath.Path) -> None:
    """Copies a local file to a bucket; readers see all of it or nothing."""
    configure()
    files, name = _address(os.fspath(path))
    files.put_file(file, name)


def read_generation(path: epath.PathLike) -> tuple[bytes, str] | None:
    """Reads a small object and the generation that the content has; None if there is no object.

    Raises:
      OSError: the bucket does not answer, or refuses; the message names the path.
    """
    files, bucket, name = _split(path)
    with as_os_error(path):
        try:
            # By its generation, since a bucket that everybody may read may answer with an older content from a cache.
            generation = files.call('GET', 'b/{}/o/{}', bucket, name, json_out=True)['generation']
            _, data = files.call('GET', 'b/{}/o/{}', bucket, name, alt='media', generation=generation)
        except FileNotFoundError:  # or it was replaced between the two requests
            return None
    return data, generation


def write_if_generation(path: epath.PathLike, data: bytes, generation: str) -> bool:
    """Writes an object if its generation is still the given one; of all that try, one process succeeds.

    A request whose answer is lost is sent again, and then finds its own object: read it if the result is False.

    Args:
      path: the object.
      data: its new content.
      generation: the generation that was read; '0': there is no object yet.

    Returns:
      Whether it was written.

    Raises:
      OSError: as `read_generation`.
    """
    files, bucket, name = _split(path)
    place = files.base.removesuffix('storage/v1/') + 'upload/storage/v1/b/{}/o'
    options = {'uploadType': 'media', 'name': name, 'ifGenerationMatch': generation}
    with as_os_error(path):
        try:
            files.call('POST', place, bucket, data=data, headers={'Content-Type': 'application/json'}, **options)
        except FileExistsError:  # what gcsfs makes of status 412, "precondition failed"
            return False
    return True


def remove_if_generation(path: epath.PathLike, generation: str) -> bool:
    """Deletes an object if its generation is still the given one; arguments and result as `write_if_generation`."""
    files, bucket, name = _split(path)
    with as_os_error(path):
        try:
            files.call('DELETE', 'b/{}/o/{}', bucket, name, ifGenerationMatch=generation)
        except (FileExistsError, FileNotFoundError):
            return False
    return True


def _split(path):
    configure()
    files, name = _address(os.fspath(path))
    return files, *name.split('/', 1)


@contextlib.contextmanager
def as_os_error(path: epath.PathLike) -> Iterator[None]:
    """Within the context, errors of gcsfs and its libraries, which have no base class in common, are an OSError."""
    import aiohttp  # they come with gcsfs, which is optional
    import google.auth.exceptions
    from gcsfs.retry import HttpError

    try:
        yield
    except (HttpError, aiohttp.ClientError, google.auth.exceptions.GoogleAuthError) as error:
        raise OSError(f'{os.fspath(path)}: {error}') from error


def _address(path):
    """Returns the file system of a bucket, and the name that it has for a path; no character of it is special."""
    return fsspec.filesystem('gs'), path.removeprefix('gs://').rstrip('/')


def _copy(path, folder, pattern=False):
    configure()
    files, name = _address(path)
    parent, last = name.rpartition('/')[::2]
    found = [name] if files.exists(name) else files.glob(name) if pattern else []
    sources = [file for each in found for file in files.find(each) if not file.endswith('/')]
    if not sources:
        raise FileNotFoundError(f'there is nothing at {path}')
    folder = tempfile.mkdtemp(dir=folder)
    if outside := next((file for file in sources if {'.', '..', ''} & set(file.split('/'))), None):
        raise ValueError(f'{path} holds the name {outside!r}, which is none of a file here: rename it')
    targets = [os.path.join(folder, file.removeprefix(f'{parent}/')) for file in sources]
    for directory in {os.path.dirname(target) for target in targets}:
        os.makedirs(directory, exist_ok=True)
    files.get(sources, targets)  # lists are taken as they are, one path would be a pattern
    return os.path.join(folder, last)


@functools.cache
def _cached_copy(path, version, pattern):
    return _copy(path, _cache_folder(), pattern)


@functools.cache
def _cache_folder():
    folder = tempfile.mkdtemp(prefix='vqvae2_jax-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
