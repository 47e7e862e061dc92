"""Records of ArrayRecord files on gs://, s3:// and hf://, read one by one: each takes one request for its own bytes.

The library `array_record` opens local files, and files on gs:// from a record to the end of the file, of which it drops
the rest. So the footer of a file, which says where its records are, is read here, by the specification of
Riegeli/records (github.com/google/riegeli, doc/riegeli_records_file_format.md) and of ArrayRecord (cpp/layout.proto).
The library decodes: it gets a sparse file in memory that holds the footer and the bytes of one record, and compares all
checksums.

    chunks of records | footer: where each chunk is | postscript, the last 64 KiB: where the footer is
"""

import bisect
import collections
import concurrent.futures
import contextlib
import itertools
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader

from vqvae2_jax.io import remote
from vqvae2_jax.io.record import JobError

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 2**16, 24, 40  # bytes
_MAX_POSTSCRIPT = 512  # bytes; it has about 114
_CODECS = {ord('z'): 'zstd', ord('b'): 'brotli', ord('s'): 'snappy'}
_MAX_OPEN = 128  # files that a process keeps open, with two descriptors each
_THREADS = 32  # that read footers; they wait most of the time
_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'  # for random access

_open: 'collections.OrderedDict[RemoteShard, _Decoder]' = collections.OrderedDict()
_opening = threading.Lock()
_copied: dict[remote.RemoteFile, str] = {}
_copying = threading.Lock()


class RemoteRecords:
    """Consecutive records of several files as one random-access sequence. It pickles as a list of files.

    Reading raises as `RemoteShard.read`.
    """

    def __init__(self, parts: Sequence[tuple['RemoteShard', int, int]]):
        """Takes (file, first record, one past the last record) of each part, in order."""
        self._parts = list(parts)
        self._ends = list(itertools.accumulate(stop - start for _, start, stop in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f'record {index} of {len(self)}')
        number = bisect.bisect_right(self._ends, index)
        shard, start, _ = self._parts[number]
        return shard.read(index - (self._ends[number - 1] if number else 0) + start)


def open_records(
    parts: Sequence[tuple[remote.RemoteFile, int, int | None]], cache_bytes: int
) -> 'RemoteRecords | ArrayRecordDataSource':
    """Opens consecutive records of several files.

    Args:
      parts: (file, first record, one past the last record; None: the end of the file) in order.
      cache_bytes: if the files are not larger together, they are copied, once for this process; the records of larger
        ones are read one by one.

    Raises:
      RuntimeError: a file is damaged, of which the number of records had to be read.
      JobError: a file was deleted or replaced, or the store does not answer.
    """
    files = dict.fromkeys(file for file, _, _ in parts)
    if sum(file.size for file in files) <= remote.cache_limit(cache_bytes):
        copies = _copy(files)
        ranges = ['' if stop is None else f'[{start}:{stop}]' for _, start, stop in parts]
        return ArrayRecordDataSource([copies[file] + part for (file, _, _), part in zip(parts, ranges, strict=True)])
    shards = {file: RemoteShard(file) for file in files}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        stops = pool.map(lambda part: shards[part[0]].count() if part[2] is None else part[2], parts)
        return RemoteRecords([(shards[file], start, stop) for (file, start, _), stop in zip(parts, stops, strict=True)])


def _copy(files: Iterable[remote.RemoteFile]) -> dict[remote.RemoteFile, str]:
    """Copies files to the local disk, unless an earlier call did; returns the paths of the copies."""
    with _copying, _store_errors():
        by_folder = collections.defaultdict(list)
        for file in files:
            if file not in _copied:
                by_folder[file.path.rpartition('/')[0]].append(file)
        for parent, missing in by_folder.items():
            folder = remote.copy_files(missing, parent, tempfile.mkdtemp(dir=remote.cache_folder()))
            _copied.update({file: os.path.join(folder, file.path.rpartition('/')[2]) for file in missing})
        return _copied


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except remote.Replaced as error:
        raise JobError(f'{error}: leave it as it is during a run. The same command continues') from error
    except OSError as error:
        raise JobError(f'{error}. Correct this; then the same command continues') from error


class RemoteShard:
    """One file. Its footer is read with the first record, in two requests."""

    def __init__(self, file: remote.RemoteFile):
        """Takes the file as a listing found it; records are only read while it has that content."""
        self.file, self._footer, self._lock = file, None, threading.Lock()

    def __getstate__(self):
        return self.file

    def __setstate__(self, file):
        self.__init__(file)

    def count(self) -> int:
        """Returns the number of records; raises as `read`."""
        footer = self._read_footer()
        self._decoder(footer)  # it compares the checksum of the footer
        return int(footer.records[-1])

    def read(self, position: int) -> bytes:
        """Reads a record; several threads may read at once.

        Raises:
          RuntimeError: the record or the footer is damaged.
          JobError: the file was deleted or replaced, or the store does not answer.
        """
        footer = self._read_footer()
        if not 0 <= position < footer.records[-1]:
            raise RuntimeError(f'there are {footer.records[-1]} records in {self.file.path}, so none is {position}')
        chunk = int(np.searchsorted(footer.records, position, side='right')) - 1
        start, stop = footer.offsets[chunk : chunk + 2].tolist()
        data = self._read_bytes(start, stop)
        return self._decoder(footer).read(position, start, data)

    def _read_footer(self) -> '_Footer':
        with self._lock:
            if self._footer is None:
                size = self.file.size
                if size < _BLOCK:
                    raise RuntimeError(f'{self.file.path} has {size} bytes, too few for an ArrayRecord file')
                postscript = self._read_bytes(size - _BLOCK, size - _BLOCK + _MAX_POSTSCRIPT)
                begin = _read_chunk(postscript, size - _BLOCK, self.file.path, lambda records: _fields(records[0])[1])
                if not 0 <= begin < size - _BLOCK:
                    raise RuntimeError(f'{self.file.path} is damaged: its footer begins at {begin} of {size} bytes')
                data = self._read_bytes(begin, size - _BLOCK)
                pieces = (begin, data.rstrip(b'\0')), (size - _BLOCK, postscript)
                self._footer = _Footer(size, pieces, self.file.path)
            return self._footer

    def _read_bytes(self, start, stop):
        with _store_errors():
            return remote.read(self.file, start, stop)

    def _decoder(self, footer: '_Footer') -> '_Decoder':
        """Returns the open decoder of this file; closes that of the file that was read least recently, if needed."""
        with _opening:
            if self not in _open:
                _open[self] = _Decoder(footer)
                if len(_open) > _MAX_OPEN:
                    _open.popitem(last=False)  # it closes when no thread reads it any more
            _open.move_to_end(self)
            return _open[self]


class _Footer:
    """Where the chunks of a file are.

    Attributes:
      size: bytes of the file.
      pieces: (offset, bytes) of the footer and of the postscript.
      offsets: int64 [C + 1], of each chunk, and of the end of the last one.
      records: int64 [C + 1], number of records before each chunk, and of all.
    """

    def __init__(self, size: int, pieces: Sequence[tuple[int, bytes]], path: str):
        self.size, self.pieces = size, pieces
        begin, data = pieces[0]
        offsets, counts = _read_chunk(data, begin, path, _places_and_counts)
        self.offsets, self.records = np.append(offsets, begin), np.cumsum([0, *counts])


class _Decoder:
    """The library's reader of a sparse file, in which only the footer and one chunk are not a hole."""

    def __init__(self, footer: _Footer):
        self._size, self._lock = footer.size, threading.Lock()
        self._file, path = _temporary_file()
        weakref.finalize(self, os.close, self._file)
        os.ftruncate(self._file, self._size)
        for offset, data in footer.pieces:
            os.pwrite(self._file, data, offset)
        try:
            self._reader = ArrayRecordReader(path, _OPTIONS, file_reader_buffer_size=2**15)
        finally:
            if not path.startswith('/proc/'):
                os.unlink(path)
        if not self._reader.ok():
            raise RuntimeError('the footer is damaged: its checksum differs')

    def read(self, position: int, offset: int, chunk: bytes) -> bytes:
        """Decodes the record `position`, which is in the chunk at `offset`; raises RuntimeError for damage."""
        with self._lock:
            os.pwrite(self._file, chunk, offset)
            try:
                return self._reader.read([position])[0]
            finally:  # a hole again; the library has the footer in memory
                os.ftruncate(self._file, 0)
                os.ftruncate(self._file, self._size)


def _temporary_file() -> tuple[int, str]:
    """Returns a descriptor of an empty file, and a path that opens the same file; in memory on Linux."""
    if hasattr(os, 'memfd_create'):
        descriptor = os.memfd_create('array_record')
        return descriptor, f'/proc/self/fd/{descriptor}'
    return tempfile.mkstemp(dir=remote.cache_folder())


def _read_chunk(data: bytes, begin: int, path: str, convert: Callable[[list[bytes]], Any]) -> Any:
    """Reads the records of a simple chunk of Riegeli.

    Args:
      data: bytes of a file from the beginning of the chunk.
      begin: offset of these bytes in the file.
      path: the file, for messages.
      convert: takes the records; all errors of bytes that are no such chunk become one.

    Raises:
      RuntimeError: the bytes are damaged.
    """
    try:
        data = _without_block_headers(data, begin)
        size, kind = int.from_bytes(data[8:16], 'little'), data[24]
        body = data[_CHUNK_HEADER : _CHUNK_HEADER + size]
        if kind != ord('r') or len(body) != size:
            raise ValueError('there is no chunk of records')
        length, position = _varint(body, 1)
        sizes = _decompress(body[position : position + length], body[0])
        values = _decompress(body[position + length :], body[0])
        records, start = [], 0
        for size in _varints(sizes):
            records.append(values[start : start + size])
            start += size
        return convert(records)
    except (LookupError, ValueError, OverflowError, OSError, MemoryError) as error:
        raise RuntimeError(f'{path} is damaged, or no ArrayRecord file: {error}') from error


def _without_block_headers(data: bytes, begin: int) -> bytes:
    """Removes the header that interrupts a file at every multiple of 64 KiB."""
    parts, position = [], 0
    while position < len(data):
        if (begin + position) % _BLOCK == 0:
            position += _BLOCK_HEADER
        end = position + _BLOCK - (begin + position) % _BLOCK
        parts.append(data[position:end])
        position = end
    return b''.join(parts)


def _decompress(data: bytes, compression: int) -> bytes:
    import pyarrow  # large, and needed for remote records alone

    if compression == 0:
        return data
    size, position = _varint(data, 0)
    return pyarrow.decompress(data[position:], size, _CODECS[compression], asbytes=True)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns the number that begins at a position, seven bits a byte, and the position after it."""
    number, shift = 0, 0
    while True:
        byte = data[position]
        number |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return number, position


def _varints(data: bytes) -> list[int]:
    numbers, position = [], 0
    while position < len(data):
        number, position = _varint(data, position)
        numbers.append(number)
    return numbers


def _places_and_counts(records: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the offset of every chunk and the number of its records, int64 [C], from the records of a footer."""
    chunks = [_fields(message) for message in records[1:]]  # after its metadata
    return tuple(np.array([fields[number] for fields in chunks], np.int64) for number in (1, 3))


def _fields(message: bytes) -> dict[int, int]:
    """Returns the fields of a protocol buffer whose fields are all varints, by number."""
    numbers = _varints(message)
    return {tag >> 3: value for tag, value in zip(numbers[::2], numbers[1::2], strict=True)}
