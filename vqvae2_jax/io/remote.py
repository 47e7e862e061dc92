"""Files on Google Cloud Storage (gs://), S3 (s3://) and the Hugging Face Hub (hf://), through fsspec.

Data and weights may be on all three. A workdir is local or on gs://, where epath reads and writes it: its lock needs
conditional writes (io/lock_store.py), and its checkpoints a store that Orbax supports.
"""

import atexit
import contextlib
import dataclasses
import functools
import glob
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
from etils import epath

_PACKAGES = {'gs': 'gcsfs', 's3': 's3fs', 'hf': 'huggingface_hub'}  # that read the addresses of a scheme
_KINDS = 'gs://bucket/folder, s3://bucket/folder and hf://datasets/owner/name/folder'


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file as a listing found it.

    Attributes:
      path: its address; on hf:// with the commit.
      size: bytes.
      version: identifies its content among all that were ever at the address: the generation on gs://, the ETag on
        s3://, the hash of the file on hf://.
    """

    path: str
    size: int
    version: str


class Replaced(FileNotFoundError):
    """A file is gone, or has another content than when it was listed. The message names it."""


@functools.cache
def configure() -> None:
    """Configures epath and the libraries of fsspec once; importing this module does not."""
    # epath uses fsspec even if TensorFlow is installed, and gcsfs its plain kind of bucket. The tests cover only these.
    os.environ.setdefault('EPATH_USE_TF', 'false')
    os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs the errors that it raises, with tracebacks
    # Directory listings are not cached: other processes write there.
    for name in ('gs', 'gcs', 's3'):
        fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path is an address of gs://, s3:// or hf://."""
    scheme, separator, _ = os.fspath(path).partition('://')
    return bool(separator) and scheme in _PACKAGES


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns a local path as an absolute one, without `~` and links, and an address on gs:// as it is.

    Raises:
      ValueError: an address that cannot be written to.
    """
    if not is_remote(path):
        return epath.Path(os.path.realpath(os.path.expanduser(path)))
    _refuse_writing(os.fspath(path))
    configure()
    return epath.Path(path)


def _refuse_writing(path):
    if not path.startswith('gs://'):
        raise ValueError(
            f'{path}: a workdir, and all that is written, is local or on gs://, as locks and checkpoints need it; only '
            'data and weights to read may be here'
        )


def check(path: str, for_writing: bool = False) -> None:
    """Checks an address before it is used; local paths always pass.

    Args:
      path: the address.
      for_writing: whether it is one of a workdir.

    Raises:
      ValueError: there is no such kind of address, its library is not installed, or its bucket or repository cannot be
        reached.
    """
    if '://' not in path:
        return
    if not is_remote(path):
        kinds = 'gs://bucket/folder' if for_writing else _KINDS
        raise ValueError(f'{path}: there are local folders and {kinds}')
    if for_writing:
        _refuse_writing(path)
    configure()
    scheme = path.partition('://')[0]
    try:
        files, name = file_system(path)
        bucket, _, key = name.partition('/')
        if scheme == 's3':  # its `exists` hides the reason of a failure
            files.call_s3('list_objects_v2', Bucket=bucket, Prefix=key, MaxKeys=1)
        there = files.exists(bucket) if scheme == 'gs' else scheme == 's3' or bool(_pinned(files, name))
    except ImportError as error:
        reason = ' '.join(str(error).split())
        raise ValueError(f'{path}: {reason}: pip install {_PACKAGES[scheme]}') from error
    except Exception as error:  # the libraries have many, for names, networks and permissions
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(f'{path} cannot be reached: {reason}') from error
    if not there:
        raise ValueError(f'{path}: there is no such bucket, or it may not be listed with these credentials')


def expand(path: str) -> list[str]:
    """Returns the local files that a pattern names, sorted; a path that exists is no pattern and names itself."""
    return [path] if os.path.lexists(path) else sorted(glob.glob(path))


def exists(path: epath.PathLike) -> bool:
    """Returns whether there is a file or a folder at a local path or an address."""
    if not is_remote(path):
        return os.path.exists(path)
    configure()
    files, name = file_system(os.fspath(path))
    return files.exists(name)


def list_files(path: str, pattern: bool = False) -> list[RemoteFile]:
    """Lists the file at an address, or all files below it, sorted by address.

    Args:
      path: the address.
      pattern: whether an address where there is nothing may be a pattern of files, such as gs://bucket/samples/*.npz.

    Raises:
      FileNotFoundError: there is nothing.
      OSError: the store does not answer, or refuses.
    """
    configure()
    files, name = file_system(pinned(path))
    with _reading(path):
        found = [name] if not pattern or files.exists(name) else files.glob(name)
        infos = [pair for each in found for pair in _find(files, each)]
    scheme = path.partition('://')[0]
    listed = [
        RemoteFile(f'{scheme}://{name}', int(info['size']), _version(info))
        for name, info in infos
        if info['type'] == 'file' and not name.endswith('/')
    ]
    if not listed:
        raise FileNotFoundError(f'there is nothing at {path}')
    return sorted(listed, key=lambda file: file.path)


def _find(files, path):
    """Returns (name, facts) of the file at a path and of all files below it."""
    try:
        found = files.find(path, detail=True)
    except FileNotFoundError:
        return []
    return [(name, info or files.info(name)) for name, info in found.items()]  # a single file may come without facts


def _version(info: dict[str, Any]) -> str:
    """Returns the field of a listing that identifies the content of a file; each store has another one."""
    return str(info.get('generation') or info.get('ETag') or info.get('blob_id') or info.get('xet_hash') or '')


def pinned(path: str) -> str:
    """Returns an address on hf:// with the commit that its revision now is, so that all reads see one commit.

    Raises:
      FileNotFoundError: there is no such repository or revision.
      OSError: the hub does not answer, or refuses.
    """
    if not path.startswith('hf://'):
        return path
    files, name = file_system(path)
    with _reading(path):
        return f'hf://{_pinned(files, name)}'


def _pinned(files, name):
    resolved = files.resolve_path(name)
    if not hasattr(resolved, 'repo_id'):  # a bucket, which has no commits
        return name
    from huggingface_hub import HfApi

    info = HfApi(endpoint=files.endpoint, token=files.token).repo_info(
        resolved.repo_id, repo_type=resolved.repo_type, revision=resolved.revision
    )
    kind = '' if resolved.repo_type == 'model' else f'{resolved.repo_type}s/'
    return f'{kind}{resolved.repo_id}@{info.sha}/{resolved.path_in_repo}'.rstrip('/')


def read(file: RemoteFile, start: int = 0, stop: int | None = None) -> bytes:
    """Reads bytes start .. stop - 1 of a file, in one request; threads may read at once.

    Args:
      file: from `list_files`, of this or another process.
      start: first byte.
      stop: one past the last byte; None: the end of the file.

    Raises:
      Replaced: the file is gone or has another content than when it was listed.
      OSError: the store does not answer, or refuses; the message names the address.
    """
    configure()
    stop = file.size if stop is None else stop
    if start >= stop:
        return b''
    files, name = file_system(file.path)
    scheme = file.path.partition('://')[0]
    try:
        with _reading(file.path):
            data = _READERS[scheme](files, name, file.version, start, stop)
    except FileNotFoundError as error:
        raise Replaced(f'{file.path} was deleted or replaced after it was listed') from error
    if len(data) != stop - start:
        raise OSError(f'{file.path}: the store answered {len(data)} bytes instead of {stop - start}')
    return data


def _read_gs(files, name, version, start, stop):
    bucket, key = name.split('/', 1)
    # By its generation, since a bucket that everybody may read may answer with an older content from a cache.
    headers = {'Range': f'bytes={start}-{stop - 1}'}
    return files.call('GET', 'b/{}/o/{}', bucket, key, alt='media', generation=version, headers=headers)[1]


def _read_s3(files, name, version, start, stop):
    bucket, key = name.split('/', 1)
    try:
        options = {'Bucket': bucket, 'Key': key, 'IfMatch': version, 'Range': f'bytes={start}-{stop - 1}'}
        body = files.call_s3('get_object', **options)['Body']
    except OSError as error:
        response = getattr(error.__cause__, 'response', {})
        if response.get('Error', {}).get('Code') in ('PreconditionFailed', '412'):
            raise FileNotFoundError(name) from error
        raise
    return fsspec.asyn.sync(files.loop, body.read)


def _read_hf(files, name, version, start, stop):
    del version  # the name holds the commit
    return files.cat_file(name, start=start, end=stop, cache_type='none')


_READERS = {'gs': _read_gs, 's3': _read_s3, 'hf': _read_hf}


def local_copy(path: epath.PathLike, version: str = '', *, pattern: bool = False) -> str:
    """Returns a local path as it is, and copies a remote one, once for each content that it has.

    The copies stay for as long as this process lives.

    Args:
      path: a file or a folder.
      version: identifies the content; '': the store is asked.
      pattern: as in `list_files`. Returned is a pattern of the copies.

    Raises:
      FileNotFoundError: there is nothing at the path.
      ValueError: a name on the bucket leads out of the folder.
      OSError: as `list_files`.
    """
    path = os.fspath(path)
    return _cached_copy(path, version or _content(path, pattern), pattern) if is_remote(path) else path


@contextlib.contextmanager
def local(path: epath.PathLike) -> Iterator[str]:
    """Yields a local path as it is, and a copy of a remote one, which is deleted after the context."""
    with tempfile.TemporaryDirectory(prefix='vqvae2_jax-') as folder:
        yield _copy(os.fspath(path), folder) if is_remote(path) else os.fspath(path)


def upload(file: str, path: epath.Path) -> None:
    """Copies a local file to a bucket; readers see all of it or nothing."""
    configure()
    files, name = file_system(os.fspath(path))
    files.put_file(file, name)


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


@contextlib.contextmanager
def _reading(path):
    """Within the context, every error of a library is an OSError that names the path; a missing file stays one."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise OSError(f'{path} cannot be read: {reason}') from error


def file_system(path: str) -> tuple[Any, str]:
    """Returns the file system of an address, and the name that it has for it; no character of it is special.

    Raises:
      ImportError: the library of this kind of address is not installed.
    """
    scheme, _, name = path.partition('://')
    return fsspec.filesystem(scheme), name.rstrip('/')


def _copy(path, folder, pattern=False):
    """Copies what is at an address to a new folder below `folder`; returns its path, or its pattern, there."""
    configure()
    path = pinned(path.rstrip('/'))
    is_pattern = pattern and not exists(path)
    listed = list_files(path, pattern)
    parent = (re.split(r'[*?[]', path)[0] if is_pattern else path).rpartition('/')[0]
    copies = copy_files(listed, parent, tempfile.mkdtemp(dir=folder))
    return copies + path.removeprefix(parent)


def copy_files(listed: Sequence[RemoteFile], parent: str, folder: str) -> str:
    """Copies files of one store to a local folder, under their names below `parent`; returns the folder.

    Raises:
      ValueError: a name leads out of the folder.
      OSError: as `list_files`.
    """
    names = [file.path.removeprefix(f'{parent}/') for file in listed]
    if outside := next((name for name in names if {'.', '..', ''} & set(name.split('/'))), None):
        raise ValueError(f'{parent}/{outside} has a name that no file here can have: rename it')
    targets = [os.path.join(folder, name) for name in names]
    for directory in {os.path.dirname(target) for target in targets}:
        os.makedirs(directory, exist_ok=True)
    files = file_system(parent)[0]
    with _reading(parent):
        # Lists are taken as they are, one path would be a pattern.
        files.get([file_system(file.path)[1] for file in listed], targets)
    return folder


def _content(path, pattern):
    """Returns one digest of the names, sizes and versions of all files at an address."""
    configure()
    listed = list_files(pinned(path.rstrip('/')), pattern)
    return hashlib.sha256(repr([(file.path, file.size, file.version) for file in listed]).encode()).hexdigest()


@functools.cache
def _cached_copy(path, version, pattern):
    return _copy(path, cache_folder(), pattern)


@functools.cache
def cache_folder() -> str:
    """Returns a folder for copies that is removed when this process ends; its worker processes may use it too."""
    folder = tempfile.mkdtemp(prefix='vqvae2_jax-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def cache_limit(cache_bytes: int) -> int:
    """Returns the limit data.cache_bytes, or half of the free space of the disk of `cache_folder` if that is less."""
    return min(cache_bytes, shutil.disk_usage(cache_folder()).free // 2)
