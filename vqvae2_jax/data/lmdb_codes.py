"""Codes that extract_code.py of github.com/rosinality/vq-vae-2-pytorch wrote: an LMDB with one pickle per image.

Key '0', '1', ... holds a pickled `CodeRow`, key 'length' their number in decimal digits. A pickle is a program that may
call any function of Python. `read_row` admits only the instructions that a row consists of, and only the names of
`CodeRow` and of NumPy's arrays. It resolves these names to classes of this module, which make arrays from bytes of the
pickle; no function of another module is called. The file of the database is read by the LMDB library, which trusts it.
"""

import hashlib
import io
import os
import pickle
import pickletools
import re
from typing import NamedTuple

import numpy as np

from vqvae2_jax.io import names, regular
from vqvae2_jax.io.state_dict import PICKLE_ERRORS

FILE = 'data.mdb'
_MAX_BYTES = 2**26  # of one row: both maps of a 4096x4096 image in int64 are smaller
# The instructions of a row in protocols 3 to 5: numbers, texts, bytes, tuples, names, and how objects are made of them.
_OPCODES = frozenset(
    'PROTO FRAME STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINUNICODE BINBYTES '
    'SHORT_BINBYTES BYTEARRAY8 MARK TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT MEMOIZE BINGET '
    'LONG_BINGET GLOBAL STACK_GLOBAL NEWOBJ REDUCE BUILD'.split()
)


class CodeRow(NamedTuple):
    """The codes of one image.

    Attributes:
      top: int [h, w], codes of the coarse level.
      bottom: int [h, w], codes of the fine level.
      filename: 'class/name' of the image file.
    """

    top: np.ndarray
    bottom: np.ndarray
    filename: str


class CodeRows:
    """The rows of a database, by number. Use it in a `with` statement."""

    def __init__(self, path: str):
        """Opens a database.

        Args:
          path: its directory, which holds data.mdb.

        Raises:
          FileNotFoundError: there is no database.
          ImportError: the library lmdb is not installed.
          ValueError: it is damaged, cut off, or holds other entries.
        """
        self._path = names.printable(path)
        if not os.path.isfile(os.path.join(path, FILE)):
            raise FileNotFoundError(f'{self._path} holds no {FILE}: give the directory that extract_code.py wrote')
        try:
            import lmdb
        except ImportError as error:
            raise ImportError(f'{self._path} needs the library lmdb to be read: pip install lmdb') from error
        try:
            self._environment = lmdb.open(path, readonly=True, create=False, lock=False, readahead=False)
        except lmdb.Error as error:
            raise ValueError(f'{self._path} is no LMDB that can be read: {error}') from error
        try:
            self._transaction = self._environment.begin(buffers=True)
            self._length = self._check()
        except (lmdb.Error, ValueError) as error:
            self._environment.close()
            raise ValueError(f'{self._path} holds no codes of extract_code.py: {error}') from error

    def _check(self) -> int:
        status, info = self._environment.stat(), self._environment.info()
        size = os.path.getsize(os.path.join(self._environment.path(), FILE))
        # Reading a page beyond the end of the file would kill the process.
        if (needed := (info['last_pgno'] + 1) * status['psize']) > size:
            raise ValueError(f'{FILE} has {size} bytes of {needed}: it is cut off')
        text = bytes(self._transaction.get(b'length', b''))
        if not re.fullmatch(rb'[0-9]{1,18}', text):
            raise ValueError(f"'length' is {text[:20]!r}, not a number")
        if int(text) != status['entries'] - 1:
            raise ValueError(f"'length' is {int(text)}, but there are {status['entries'] - 1} rows")
        return int(text)

    def __enter__(self) -> 'CodeRows':
        return self

    def __exit__(self, *_) -> None:
        self._transaction.abort()
        self._environment.close()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> CodeRow:
        """Reads row `index`.

        Raises:
          ValueError: it is missing, or as `read_row`; the message names the database and the row.
        """
        value = self._transaction.get(str(index).encode())
        try:
            if value is None:
                raise ValueError('it is missing')
            if len(value) > _MAX_BYTES:
                raise ValueError(f'it has {len(value)} bytes, more than {_MAX_BYTES}')
            return read_row(bytes(value))
        except ValueError as error:
            raise ValueError(f'row {index} of {self._path} cannot be read: {error}') from error


def digest(path: str) -> str:
    """Returns the SHA-256 of the file of a database, as 64 hex digits."""
    with regular.open_file(os.path.join(path, FILE)) as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def read_row(data: bytes) -> CodeRow:
    """Reads one pickled row.

    Raises:
      ValueError: it is damaged, names anything but `CodeRow` and arrays of integers, or holds something else.
    """
    try:
        for opcode, argument, _ in pickletools.genops(data):  # refuses lengths beyond the end of the data
            if opcode.name not in _OPCODES:
                raise ValueError(f'it has the instruction {opcode.name}, which no row needs')
            if opcode.name == 'LONG_BINPUT' and argument > len(data):  # pickle makes room for all smaller ones
                raise ValueError(f'it stores an object as number {argument} in {len(data)} bytes')
        row = _Unpickler(io.BytesIO(data)).load()
        if not isinstance(row, CodeRow) or not isinstance(row.filename, str):
            raise ValueError('it holds no CodeRow with a filename')
        return CodeRow(_values(row.top), _values(row.bottom), row.filename)
    except PICKLE_ERRORS as error:
        raise ValueError(' '.join(str(error).split()) or type(error).__name__) from error


class _Dtype:
    """In place of `numpy.dtype`."""

    def __init__(self, name, *_):
        self.name, self.order = name, '='

    def __setstate__(self, state):
        self.order = state[1]


class _Array:
    """In place of `numpy.ndarray`, and of the function that makes an array whose content follows as its state."""

    def __init__(self, *_):
        self.values = None

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        self.values = _make_array(data, dtype, shape, 'F' if is_fortran else 'C')


class _BufferArray(_Array):
    """In place of the function that makes an array from its bytes, in protocol 5."""

    def __init__(self, data, dtype, shape, order):
        self.values = _make_array(data, dtype, shape, order)


_FUNCTIONS = {('multiarray', '_reconstruct'): _Array, ('numeric', '_frombuffer'): _BufferArray}
_CLASSES = {('dataset', 'CodeRow'): CodeRow, ('numpy', 'ndarray'): _Array, ('numpy', 'dtype'): _Dtype} | {
    (f'numpy.{core}.{module}', name): stand_in
    for core in ('core', '_core')  # before NumPy 2, and since
    for (module, name), stand_in in _FUNCTIONS.items()
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(
                f'it names {names.printable(f"{module}.{name}")}, but only CodeRow and arrays are read'
            )
        return _CLASSES[module, name]


def _make_array(data, dtype, shape, order) -> np.ndarray:
    if type(dtype) is not _Dtype or not all(isinstance(x, str) for x in (dtype.name, dtype.order)):
        raise ValueError('it holds an array of an unknown type')
    if not re.fullmatch('[iu][1248]', dtype.name) or dtype.order not in tuple('<>=|'):
        raise ValueError('it holds an array that is not of integers')
    if not isinstance(data, bytes | bytearray) or order not in ('C', 'F'):
        raise ValueError('it holds an array without its bytes')
    return np.frombuffer(data, np.dtype(dtype.order + dtype.name)).reshape(shape, order=order)


def _values(array) -> np.ndarray:
    if not isinstance(array, _Array) or not isinstance(array.values, np.ndarray) or array.values.ndim != 2:
        raise ValueError('its codes are no map [h, w] of integers')
    return array.values
