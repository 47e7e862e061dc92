"""Opens regular files only: a named pipe would block the process that opens it."""

import errno
import os
import stat
from typing import BinaryIO

from etils import epath

_TYPES = {
    stat.S_IFDIR: 'folder',
    stat.S_IFIFO: 'named pipe',
    stat.S_IFSOCK: 'socket',
    stat.S_IFCHR: 'device',
    stat.S_IFBLK: 'device',
}


class NotRegular(OSError):
    """A folder or a special file where a file is needed; the message says which."""


def open_file(path: epath.PathLike) -> BinaryIO:
    """Opens a file of this machine to read its bytes.

    Raises:
      NotRegular: it is a folder or a special file.
      OSError: there is no such file, or it cannot be opened.
    """
    _check(os.stat(path))  # before it is opened, as opening a device may do something
    # It may have been replaced since then. O_NONBLOCK says nothing to regular files.
    file = open(path, 'rb', opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    try:
        _check(os.fstat(file.fileno()))
    except NotRegular:
        file.close()
        raise
    return file


def _check(status):
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise NotRegular(errno.EINVAL, f'it is a {_TYPES.get(kind, "special file")}, not a file')
