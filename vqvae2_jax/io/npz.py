"""Arrays of `.npz` and `.npy` files that need not be trusted: no pickle is read, and memory is bounded.

The zip archive lists the size of each member, and each member begins with a header of dtype and shape. Both are read
first: they must agree, and arrays that are read into memory must fit a limit. A decompressing read ends at the listed
size.
"""

import contextlib
import dataclasses
import errno
import io
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from vqvae2_jax.io import memory, regular, remote

_LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name
_NOT_PLAIN = 0x61  # flags of members that are encrypted or patches
_CHUNK = 2**20  # bytes
_MAX_SHOWN = 6  # arrays in a message
_SUFFIX = '.npy'
_MAX_HEADER = 10_000  # bytes, NumPy's own limit, which it checks after it has read the header
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


class _Unreadable(ValueError):
    """The message names the file."""

    def __init__(self, path: epath.PathLike, kind: str, error: Exception):
        # Some messages have several lines, or none; those of the operating system have a number and a name.
        reason = ' '.join(str(getattr(error, 'strerror', None) or error).split()) or type(error).__name__
        super().__init__(f'{os.fspath(path)!r} is no {kind} that can be read: {reason}')


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


class Members(Mapping):
    """The arrays of a file by name, in its order.

    To take one that is pickled, or claims another size than the archive, raises ValueError, which names the file. The
    others are as good as they were.
    """

    def __init__(self, path: epath.PathLike, members: dict[str, Member | ValueError], checksums: dict[str, int]):
        """Takes the arrays, with an error in place of each that cannot be read, and the CRC-32 of all."""
        self._path, self._members, self._checksums = path, members, checksums

    def checksum(self, name: str) -> int:
        """Returns the CRC-32 of an array and its header, also of one that cannot be read."""
        return self._checksums[name]

    def __getitem__(self, name: str) -> Member:
        member = self._members[name]
        if isinstance(member, ValueError):
            raise _Unreadable(self._path, '.npz file', member) from member
        return member

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __str__(self) -> str:
        words = [
            name if isinstance(member, ValueError) else f'{name} {member}' for name, member in self._members.items()
        ]
        more = f', ... ({len(words)} arrays)' if len(words) > _MAX_SHOWN else ''
        return ', '.join(words[:_MAX_SHOWN]) + more or 'no arrays'


def read_members(path: epath.PathLike) -> Members:
    """Reads the headers of all arrays of a file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no .npz file; the message names the file.
    """
    with _errors_name(path), _open(path) as archive:
        return _members(path, archive)


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
        members = _members(path, archive)
        names = list(members) if names is None else names
        if missing := [name for name in names if name not in members]:
            raise ValueError(f'it has no array {missing[0]!r}; it has {members}')
        chosen = {name: members[name] for name in names}
        check_bytes(sum(member.nbytes for member in chosen.values()), max_bytes)
        return {name: _read_values(archive, member) for name, member in chosen.items()}


def default_limit() -> int:
    """Returns the bytes that arrays may have without a limit of the user's: half of the free memory."""
    return memory.free() // 2


def check_bytes(size: int, max_bytes: int = 0) -> None:
    """Checks that arrays fit into memory.

    Args:
      size: bytes of all of them together.
      max_bytes: the limit; 0: half of the free memory.

    Raises:
      ValueError: they are larger.
    """
    limit = max_bytes or default_limit()
    if size > limit:
        which = 'the limit' if max_bytes else 'half of the free memory: free some, or use a machine with more'
        raise ValueError(f'its arrays claim {size} bytes of memory, more than {limit}, {which}')


def check_archive(path: str, max_bytes: int = 0) -> int:
    """Checks that a .pth file fits into memory. It is a zip archive, or in an old format without compression.

    Args:
      path: the file.
      max_bytes: as in `read`.

    Returns:
      Bytes of all that it holds.

    Raises:
      ValueError: it claims more, or is damaged.
    """
    with _errors_name(path, 'archive of arrays'), regular.open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                size = sum(info.file_size for info in archive.infolist())
        check_bytes(size, max_bytes)
    return size


def memory_map(path: str, member: Member) -> np.ndarray:
    """Maps an array of a local file that `Member.is_mappable`, read-only.

    Raises:
      ValueError: the file ends before the array.
    """
    with _errors_name(path), regular.open_file(path) as file:
        file.seek(member.info.header_offset)
        header = file.read(_LOCAL_HEADER)
        begin = member.info.header_offset + _LOCAL_HEADER + member.begin
        begin += sum(np.frombuffer(header[26:30], '<u2').tolist())  # lengths of the name and of the extra field
        if begin + member.nbytes > os.fstat(file.fileno()).st_size:
            raise ValueError('it ends before its last array')
        return np.memmap(file, member.dtype, 'r', begin, member.shape)


def map_npy(path: str) -> np.ndarray:
    """Maps the array of a local .npy file, read-only.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no .npy file, is pickled, or has another size than its header claims; the message names it.
    """
    with _errors_name(path, '.npy file'), regular.open_file(path) as file:
        shape, fortran, dtype = _parse_header(file, os.path.basename(path))
        begin, size, there = file.tell(), math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size
        if begin + size != there:
            raise ValueError(f'it claims to be {dtype} {list(shape)}, {size} bytes, but holds {there - begin}')
        if not size:  # nothing can be mapped
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, 'r', begin, shape, 'F' if fortran else 'C')


@contextlib.contextmanager
def _errors_name(path, kind='.npz file') -> Iterator[None]:
    try:
        yield
    except _Unreadable:
        raise
    except (*_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that of a seek to where a damaged list says
            raise
        raise _Unreadable(path, kind, error) from error


@contextlib.contextmanager
def _open(path) -> Iterator[zipfile.ZipFile]:
    with epath.Path(path).open('rb') if remote.is_remote(path) else regular.open_file(path) as file:
        if file.read(6) == b'\x93NUMPY':
            raise ValueError(
                "it is an .npy file, a single array: write it into an .npz file by np.savez('NEW.npz', "
                "arr_0=np.load('OLD.npy'))"
            )
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            yield archive


def _members(path, archive) -> Members:
    found, checksums = {}, {}
    for info in archive.infolist():
        if info.filename.endswith(_SUFFIX):
            name = info.filename.removesuffix(_SUFFIX)
            checksums[name] = info.CRC
            try:
                found[name] = _read_header(archive, name, info)
            except _ERRORS as error:
                found[name] = error if isinstance(error, ValueError) else ValueError(str(error) or type(error).__name__)
    return Members(path, found, checksums)


def _read_header(archive, name, info) -> Member:
    if info.flag_bits & _NOT_PLAIN or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f'array {name!r} is encrypted or compressed in a way that np.savez does not use')
    with archive.open(info) as stream:
        shape, fortran, dtype = _parse_header(stream, name)
        member = Member(info, dtype, shape, fortran, stream.tell())
    if member.begin + member.nbytes != info.file_size:
        raise ValueError(
            f'array {name!r} claims to be {member}, {member.nbytes} bytes, but its entry has '
            f'{info.file_size - member.begin}'
        )
    return member


def _parse_header(stream, name) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads the header of an array from the start of its bytes; returns its shape, whether it is Fortran, its dtype."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f'array {name!r} has the format {version}, not that of plain numbers or text')
    old = version == (1, 0)
    size = stream.read(2 if old else 4)
    if (length := int.from_bytes(size, 'little')) > _MAX_HEADER:
        raise ValueError(f'array {name!r} has a header of {length} bytes, more than {_MAX_HEADER}')
    read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(io.BytesIO(size + stream.read(length)))
    if dtype.hasobject:
        raise ValueError(f'array {name!r} holds pickled objects, which are not read')
    if min(shape, default=0) < 0 or (math.prod(shape) and not dtype.itemsize):
        raise ValueError(f'array {name!r} claims to be {dtype} {list(shape)}')
    return shape, fortran, dtype


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
