"""Arrays of `.npz` files that need not be trusted: no pickle is read, and memory is bounded before it is used.

The zip archive lists the size of each member, and each member begins with a header of dtype and shape. Both are read
first: they must agree, and what is read into memory must fit a limit. A decompressing read ends at the listed size.
"""

import contextlib
import dataclasses
import errno
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import psutil
from etils import epath

_LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name
_NOT_PLAIN = 0x61  # flags of members that are encrypted or patches
_CHUNK = 2**20  # bytes
_SUFFIX = '.npy'
# What zipfile, zlib and NumPy raise for damaged or hostile files.
_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
    NotImplementedError,
    ArithmeticError,
    SyntaxError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    EOFError,
)


@dataclasses.dataclass(frozen=True)
class Member:
    """One array of a file, as its headers describe it.

    Attributes:
      info: the entry of the zip archive.
      dtype: the dtype.
      shape: the shape.
      fortran: whether the first axis varies fastest.
      begin: bytes of the header before the values.
    """

    info: zipfile.ZipInfo
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_mappable(self) -> bool:
        """Whether the values can be memory-mapped: they are not compressed, and in C order."""
        return self.info.compress_type == zipfile.ZIP_STORED and not self.fortran

    def __str__(self) -> str:
        return f'{self.dtype} {list(self.shape)}'


def read_members(path: epath.PathLike) -> dict[str, Member]:
    """Reads the headers of all arrays of a file.

    Returns:
      {name: member}, in the order of the file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no .npz file, or an array is pickled or claims another size than the archive; the message names
        the file.
    """
    with _errors_name(path), _open(path) as archive:
        return _members(archive)


def read(path: epath.PathLike, names: Sequence[str] | None = None, max_bytes: int = 0) -> dict[str, np.ndarray]:
    """Reads arrays into memory.

    Args:
      path: the file, also on a bucket.
      names: of the arrays; None: all.
      max_bytes: limit of all of them together; 0: half of the free memory.

    Returns:
      {name: array}.

    Raises:
      FileNotFoundError: no such file.
      ValueError: as `read_members`; an array is missing or damaged, or they claim more than the limit.
    """
    with _errors_name(path), _open(path) as archive:
        members = _members(archive)
        names = list(members) if names is None else names
        if missing := [name for name in names if name not in members]:
            raise ValueError(f'it has no array {missing[0]!r}; it has {describe(members)}')
        check_size((members[name] for name in names), max_bytes)
        return {name: _read_values(archive, members[name]) for name in names}


def check_size(members: Iterable[Member], max_bytes: int = 0) -> None:
    """Checks that arrays fit into memory together.

    Args:
      members: the arrays.
      max_bytes: the limit; 0: half of the free memory.

    Raises:
      ValueError: they claim more.
    """
    _check_bytes(sum(member.nbytes for member in members), max_bytes)


def _check_bytes(size, max_bytes):
    limit = max_bytes or psutil.virtual_memory().available // 2
    if size > limit:
        which = 'the limit' if max_bytes else 'half of the free memory'
        raise ValueError(f'its arrays claim {size} bytes of memory, more than {limit}, {which}')


def check_archive(path: str, max_bytes: int = 0) -> None:
    """Checks that a zip archive, such as a .pth file, fits into memory when it is unpacked; other files pass.

    Args:
      path: the file.
      max_bytes: as in `read`.

    Raises:
      ValueError: its list claims more, or is damaged.
    """
    with _errors_name(path, 'archive of arrays'):
        _check_regular(epath.Path(path))
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _check_bytes(sum(info.file_size for info in archive.infolist()), max_bytes)


def memory_map(path: str, member: Member) -> np.ndarray:
    """Maps an array of a local file that `Member.is_mappable`, read-only.

    Raises:
      ValueError: the file ends before the array.
    """
    with _errors_name(path), open(path, 'rb') as file:
        file.seek(member.info.header_offset)
        header = file.read(_LOCAL_HEADER)
        begin = member.info.header_offset + _LOCAL_HEADER + member.begin
        begin += sum(np.frombuffer(header[26:30], '<u2').tolist())  # lengths of the name and of the extra field
        if begin + member.nbytes > os.fstat(file.fileno()).st_size:
            raise ValueError('it ends before its last array')
        return np.memmap(file, member.dtype, 'r', begin, member.shape)


def describe(members: dict[str, Member], limit: int = 6) -> str:
    """Returns the names, dtypes and shapes of arrays in words."""
    words = [f'{name} {member}' for name, member in members.items()]
    return ', '.join(words[:limit]) + (f', ... ({len(words)} arrays)' if len(words) > limit else '') or 'no arrays'


@contextlib.contextmanager
def _errors_name(path, kind='.npz file') -> Iterator[None]:
    try:
        yield
    except (*_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that of a seek to where a damaged list says
            raise
        # Some messages have several lines, or none.
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(f'{os.fspath(path)!r} is no {kind} that can be read: {reason}') from error


@contextlib.contextmanager
def _open(path) -> Iterator[zipfile.ZipFile]:
    path = epath.Path(path)
    _check_regular(path)
    with path.open('rb') as file:
        if file.read(6) == b'\x93NUMPY':
            raise ValueError(
                "it is an .npy file, a single array: write it into an .npz file by np.savez('NEW.npz', "
                "arr_0=np.load('OLD.npy'))"
            )
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            yield archive


def _check_regular(path):
    if path.exists() and not path.is_file():
        raise ValueError('it is a folder or a special file')  # a pipe would block whoever opens it


def _members(archive) -> dict[str, Member]:
    infos = {info.filename.removesuffix(_SUFFIX): info for info in archive.infolist()}
    return {name: _read_header(archive, name, info) for name, info in infos.items() if info.filename.endswith(_SUFFIX)}


def _read_header(archive, name, info) -> Member:
    if info.flag_bits & _NOT_PLAIN or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f'array {name!r} is encrypted or compressed in a way that np.savez does not use')
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f'array {name!r} has the format {version}, not that of plain numbers or text')
        old = version == (1, 0)
        read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
        member = Member(info, dtype, shape, fortran, stream.tell())
    if dtype.hasobject:
        raise ValueError(f'array {name!r} holds pickled objects, which are not read')
    if min(shape, default=0) < 0 or (math.prod(shape) and not dtype.itemsize):
        raise ValueError(f'array {name!r} claims to be {member}')
    if member.begin + member.nbytes != info.file_size:
        raise ValueError(
            f'array {name!r} claims to be {member}, {member.nbytes} bytes, but its entry has '
            f'{info.file_size - member.begin}'
        )
    return member


def _read_values(archive, member) -> np.ndarray:
    array = np.empty(member.shape, member.dtype, order='F' if member.fortran else 'C')
    values = memoryview((array.T if member.fortran else array).reshape(-1).view(np.uint8)) if array.size else b''
    with archive.open(member.info) as stream:
        stream.read(member.begin)
        filled = 0
        while filled < len(values):
            count = stream.readinto(values[filled : filled + _CHUNK])
            if not count:
                raise ValueError('it ends before its last array')
            filled += count
        stream.read(1)  # at the end zipfile compares the checksum
    return array
