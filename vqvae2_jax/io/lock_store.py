"""Files that many processes create, renew and remove, each only as it was last read: the storage of io/lock.py.

No content is ever written twice. Therefore "the file has the content that was read" means "nobody wrote it since".
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import secrets

from etils import epath

from vqvae2_jax.io import remote

_MAX_BYTES = 4096
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
# Opening neither waits for the other end of a FIFO nor follows a link; nobody makes a lock that is one.
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK


class LocalStore:
    """A file on a local or network file system. All methods raise OSError if the file system does."""

    def __init__(self, path: str):
        self._path = path

    def create(self, content: bytes) -> None:
        """Creates the file, unless there is one; only one process succeeds. Makes its directory."""
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        part = self._part()
        # FileNotFoundError: the part was removed, or the directory is being deleted.
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            try:
                _write_new(part, content)
                os.link(part, self._path)  # unlike open('x'), readers never find a part of the content
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                _write_new(self._path, content)
            finally:
                pathlib.Path(part).unlink(missing_ok=True)

    def read(self) -> bytes | None:
        """Returns the content, or None if there is no file."""
        try:
            return _read(self._path)
        except FileNotFoundError:
            return None

    def renew(self, token: bytes, content: bytes) -> bool:
        """Overwrites a content that holds the token by one of the same length.

        It is written in place. If the file was removed after it was opened, the write goes nowhere, and a new file of
        that name stays as it is.

        Returns:
          Whether the file has the new content.
        """
        try:
            with open(os.open(self._path, os.O_RDWR | _FLAGS), 'r+b', buffering=0) as file:
                if token not in file.read(_MAX_BYTES):
                    return False
                os.pwrite(file.fileno(), content, 0)
                os.fsync(file.fileno())  # on a network file system, other machines see it
        except FileNotFoundError:
            return False
        return self.read() == content

    def remove(self, content: bytes) -> bool:
        """Removes the file if it still has the content that was read.

        All who remove it hold its flock, so that nobody else removes it between the comparison and the rename; then it
        cannot be another file. The kernel drops the flock of a process that dies.

        On a file system without flock another process may remove the file, and create a new one, in between. The
        renamed file is compared again, and put back if it is another. If a third process creates one before that, the
        owner of the one in between stops at its next heartbeat.

        Returns:
          Whether this call removed it.
        """
        try:
            with open(os.open(self._path, os.O_RDWR | _FLAGS), 'r+b', buffering=0) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                except OSError:
                    pass  # a file system without flock
                if self.read() != content:
                    return False
                aside = self._part()
                os.rename(self._path, aside)
                moved = _read(aside)
                if moved != content:  # also if its owner continues after a suspension and has renewed it
                    self.create(moved)
                os.unlink(aside)
                return moved == content
        except FileNotFoundError:
            return False

    def _part(self):
        # A killed process leaves it. The owner of the lock removes it (`files.remove_partial`); whoever still uses it
        # finds that there is a lock.
        return f'{self._path}.{secrets.token_hex(8)}.{os.getpid()}.part'


class BucketStore:
    """An object on gs://, with the methods of `LocalStore`. Each change is conditional on the generation it read."""

    def __init__(self, path: str):
        self._path = path

    def create(self, content: bytes) -> None:
        """Creates the object, unless there is one."""
        write_if_generation(self._path, content, '0')

    def read(self) -> bytes | None:
        """Returns the content, or None if there is no object."""
        found = read_generation(self._path)
        return found and found[0]

    def renew(self, token: bytes, content: bytes) -> bool:
        """Replaces a content that holds the token; returns whether the object has the new content."""
        found = read_generation(self._path)
        if not found or token not in found[0]:
            return False
        # The answer to a request may be lost. Sent again, it fails.
        return write_if_generation(self._path, content, found[1]) or self.read() == content

    def remove(self, content: bytes) -> bool:
        """Removes the object if it still has the content that was read; returns whether it did."""
        found = read_generation(self._path)
        return bool(found) and found[0] == content and remove_if_generation(self._path, found[1])


def read_generation(path: epath.PathLike) -> tuple[bytes, str] | None:
    """Reads a small object and the generation that the content has; None if there is no object.

    Raises:
      OSError: the bucket does not answer, or refuses; the message names the path.
    """
    files, bucket, name = _split(path)
    with remote.as_os_error(path):
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
    with remote.as_os_error(path):
        try:
            files.call('POST', place, bucket, data=data, headers={'Content-Type': 'application/json'}, **options)
        except FileExistsError:  # what gcsfs makes of status 412, "precondition failed"
            return False
    return True


def remove_if_generation(path: epath.PathLike, generation: str) -> bool:
    """Deletes an object if its generation is still the given one; arguments and result as `write_if_generation`."""
    files, bucket, name = _split(path)
    with remote.as_os_error(path):
        try:
            files.call('DELETE', 'b/{}/o/{}', bucket, name, ifGenerationMatch=generation)
        except (FileExistsError, FileNotFoundError):
            return False
    return True


def _split(path):
    remote.configure()
    files, name = remote.file_system(os.fspath(path))
    return files, *name.split('/', 1)


def _read(path):
    with open(os.open(path, os.O_RDONLY | _FLAGS), 'rb', buffering=0) as file:
        return file.read(_MAX_BYTES)


def _write_new(path, content):
    with open(path, 'xb') as file:
        try:
            file.write(content)
            file.flush()
        except OSError:
            os.unlink(path)
            raise
