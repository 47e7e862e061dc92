"""The store of discrete codes between the two stages.

A store is a directory:

    record.json                            the record of the job or of `write_codes`; its results are `CodesMeta`
    shard-00000-of-00004.array_record      ArrayRecord files, group_size:1 for random access, checksummed
    ...

Each ArrayRecord record is one example, a fixed-length little-endian struct without padding:

    index    int64          position in the split of images, or in the arrays given to `write_codes`
    label    int32
    codes_0  uint8/uint16/int32 [h_0, w_0], row-major; the finest level, of the narrowest type for its codebook size
    codes_1  likewise, the next coarser level
    ...

Example i is record i of the concatenation of all shards, in the order of their numbers.
"""

import dataclasses
import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_data_source, array_record_module
from etils import epath

from vqvae2_jax.data.remote_records import RemoteRecords, RemoteShard, open_records
from vqvae2_jax.io import files, record, remote

JOB, IMPORT_JOB = 'extract_codes', 'import'  # the jobs that write codes


@dataclasses.dataclass(frozen=True)
class CodeSpec:
    """Describes the codes that priors are trained on, those of stage 1 or of another tokenizer.

    Attributes:
      levels: names of the levels, finest first.
      shapes: (h, w) of each level.
      codebook_sizes: K of each level.
      num_classes: 0 is unlabeled.
      class_names: names of the classes by label; () if they are unknown or if there are no classes.
    """

    levels: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    codebook_sizes: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> 'CodeSpec':
        """Returns the spec of the fields in JSON types, as `dataclasses.asdict` and JSON make them."""
        tuples = {name: tuple(fields[name]) for name in ('levels', 'codebook_sizes', 'class_names')}
        return cls(shapes=tuple(map(tuple, fields['shapes'])), num_classes=fields['num_classes'], **tuples)


def level_names(count: int) -> tuple[str, ...]:
    """Returns the names of `count` levels, finest first, unless the codes come with other ones.

    Up to three levels have the names of the paper: bottom, middle, top. More are bottom, level1, ..., top.
    """
    if count == 1:
        return ('top',)
    middle = ('middle',) if count == 3 else tuple(f'level{i}' for i in range(1, count - 1))
    return ('bottom', *middle, 'top')


@dataclasses.dataclass(frozen=True)
class CodesMeta:
    """The contents of a store of codes; the results in its record.

    Attributes:
      shapes: (h, w) of each level, finest first.
      codebook_sizes: K of each level, finest first.
      num_classes: 0 is unlabeled.
      class_names: names of the classes by label; () if unlabeled.
      count: number of examples.
      split: split of the images.
      shards: number of files.
    """

    shapes: tuple[tuple[int, int], ...]
    codebook_sizes: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    count: int
    split: str
    shards: int

    def __post_init__(self):
        if not self.shapes or len(self.shapes) != len(self.codebook_sizes):
            raise ValueError(f'shapes={self.shapes} and codebook_sizes={self.codebook_sizes} must agree.')
        if self.shards < 1 or self.count < 0:
            raise ValueError(f'shards={self.shards} must be >= 1, count={self.count} >= 0.')

    @classmethod
    def from_results(cls, results: dict[str, Any]) -> 'CodesMeta':
        """Converts the results of a record.

        Raises:
          ValueError: fields are missing or unknown, or do not agree.
        """
        if different := sorted({field.name for field in dataclasses.fields(cls)} ^ results.keys()):
            raise ValueError(
                f'the results {different} are missing or unknown. Delete that directory and write it again.'
            )
        shapes = tuple(tuple(shape) for shape in results['shapes'])
        tuples = {name: tuple(results[name]) for name in ('codebook_sizes', 'class_names')}
        return cls(**{**results, **tuples, 'shapes': shapes})


def name_levels(codes: Iterable[Any]) -> dict[str, Any]:
    """Returns the codes of all levels, finest first, as the fields of an example: {'codes_0': ..., 'codes_1': ...}."""
    return {f'codes_{level}': level_codes for level, level_codes in enumerate(codes)}


def shard_path(directory: epath.PathLike, shard: int, shards: int) -> epath.Path:
    """Returns the path of one shard, such as DIRECTORY/shard-00003-of-00010.array_record."""
    return epath.Path(directory) / f'shard-{shard:05d}-of-{shards:05d}.array_record'


def write_shard(
    path: epath.PathLike, batches: Iterable[Mapping[str, np.ndarray]], codebook_sizes: tuple[int, ...]
) -> int:
    """Writes one shard, under a temporary name until it is complete.

    Args:
      path: see `shard_path`; its directory is created if it does not exist.
      batches: dicts of 'codes_0', 'codes_1', ... (integers [B, h, w], finest first), 'label' and 'index' (integers
        [B]), and optionally 'mask' (bool [B]): rows where it is False are left out.
      codebook_sizes: K of each level, finest first.

    Returns:
      The number of examples written.

    Raises:
      ValueError: a code outside its codebook.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_remote = remote.is_remote(path)  # a file appears there only when it is complete
    name = f'{path.name}.unfinished-{uuid.uuid4().hex[:8]}'
    unfinished = epath.Path(tempfile.gettempdir() if is_remote else path.parent) / name
    # Fast compression: on codes, stronger settings cost much time and gain little.
    with files.writing(path):
        return _write_records(batches, codebook_sizes, path, unfinished)


def _write_records(batches, codebook_sizes, path, unfinished) -> int:
    writer = array_record_module.ArrayRecordWriter(os.fspath(unfinished), 'group_size:1,zstd:1')
    count = 0
    try:
        for batch in batches:
            for row in _pack(batch, codebook_sizes):
                writer.write(row.tobytes())
                count += 1
        writer.close()
        if remote.is_remote(path):
            remote.upload(os.fspath(unfinished), path)
        else:
            unfinished.replace(path)
    finally:
        if writer.is_open():
            writer.close()
        unfinished.unlink(missing_ok=True)
    return count


class CodeSource:
    """A store of codes as a random-access source; pickles as a list of file names.

    source[i] is {'codes_0': int32 [h_0, w_0] (finest), 'codes_1': ..., 'label': int32, 'index': int64}.

    Attributes:
      kind: names the examples.
      meta: the contents.
      digest: that of its record.
    """

    kind = 'codes'
    meta: CodesMeta
    digest: str

    def __init__(self, directory: epath.PathLike, *, job: str = JOB, cache_bytes: int = 0):
        """Opens a store.

        Args:
          directory: the store.
          job: the job or function that writes it, for the message if there is no record.
          cache_bytes: data.cache_bytes, of a store on a bucket: see `remote_records.open_records`.

        Raises:
          JobError: the store is missing or not finished.
          ValueError: a file is damaged or missing, or the number of examples is not that of the record.
        """
        output = record.read_done(directory, job)
        self.digest = output.digest
        self._remedy = f'Delete {output.directory}, then {record.job_command(output.job)}'
        try:
            self.meta = CodesMeta.from_results(output.results)
        except ValueError as error:
            raise ValueError(f'{output.directory / record.FILE}: {error}') from error
        self._records = _open_shards(directory, self.meta.shards, cache_bytes, output.job)
        if len(self._records) != self.meta.count:
            raise ValueError(
                f'{output.directory / record.FILE} says {self.meta.count} examples, but its {self.meta.shards} shards '
                f'hold {len(self._records)}. {self._remedy}'
            )
        self._directory = os.fspath(directory)
        self._dtype = _record_dtype(self.meta.shapes, self.meta.codebook_sizes)

    @property
    def is_remote(self) -> bool:
        """Whether reading an example waits for a network."""
        return isinstance(self._records, RemoteRecords)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label; () if unlabeled."""
        return self.meta.class_names

    def example_name(self, index: int) -> str:
        """Returns the name of the example that has this 'index': the number itself."""
        return str(index)

    def __len__(self) -> int:
        return self.meta.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f'example {index} of {len(self)}')
        try:
            data = self._records[index]
        except RuntimeError as error:  # A checksum that does not match.
            raise ValueError(f'record {index} of {self._directory} is damaged: {error}. {self._remedy}') from error
        if len(data) != self._dtype.itemsize:
            raise ValueError(
                f'record {index} of {self._directory} has {len(data)} bytes, '
                f'but {record.FILE} implies {self._dtype.itemsize}. {self._remedy}'
            )
        row = np.frombuffer(data, self._dtype)[0]
        levels = {f'codes_{n}': row[f'codes_{n}'].astype(np.int32) for n in range(len(self.meta.shapes))}  # [h, w]
        return levels | {'label': np.int32(row['label']), 'index': np.int64(row['index'])}


def _open_shards(directory, shards: int, cache_bytes: int, job: str) -> Sequence[bytes]:
    """Opens the records of all shards; raises ValueError if one is damaged or missing."""
    paths = [os.fspath(shard_path(directory, shard, shards)) for shard in range(shards)]
    if not remote.is_remote(directory):
        for path in paths:
            count_records(path, job)
        return array_record_data_source.ArrayRecordDataSource(paths)
    listed = {file.path: file for file in remote.list_files(os.fspath(directory))}
    if missing := [path for path in paths if path not in listed]:
        raise ValueError(f'{missing[0]} is missing. Delete that directory, then {record.job_command(job)}')
    try:
        return open_records([(listed[path], 0, None) for path in paths], cache_bytes)
    except RuntimeError as error:
        remedy = f'Delete that directory, then {record.job_command(job)}'
        raise ValueError(f'codes of {directory} are damaged: {error}. {remedy}') from error


def count_records(path: epath.PathLike, job: str = JOB) -> int:
    """Returns the number of examples in a shard.

    Args:
      path: the file.
      job: the job or function that writes it, for the message.

    Raises:
      ValueError: the file is damaged.
    """
    try:
        if remote.is_remote(path):
            return RemoteShard(remote.list_files(os.fspath(path))[0]).count()
        reader = array_record_module.ArrayRecordReader(os.fspath(path))
        count = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise ValueError(
            f'{path} is damaged: {error or "no valid ArrayRecord file"}. Delete it, then {record.job_command(job)}'
        ) from error
    return count


def _record_dtype(shapes: Iterable[tuple[int, int]], codebook_sizes: Iterable[int]) -> np.dtype:
    """Returns the struct of one example."""
    levels = [
        (f'codes_{n}', '<u1' if size <= 2**8 else '<u2' if size <= 2**16 else '<i4', tuple(shape))
        for n, (shape, size) in enumerate(zip(shapes, codebook_sizes, strict=True))
    ]
    return np.dtype([('index', '<i8'), ('label', '<i4'), *levels])


def _pack(batch: Mapping[str, np.ndarray], codebook_sizes: tuple[int, ...]) -> np.ndarray:
    """Converts one batch to structs, [number of rows in the mask]."""
    levels = [np.asarray(batch[f'codes_{n}']) for n in range(len(codebook_sizes))]  # [B, h, w] each
    for n, (codes, size) in enumerate(zip(levels, codebook_sizes, strict=True)):
        if codes.size and not 0 <= codes.min() <= codes.max() < size:
            raise ValueError(f'codes_{n} run from {codes.min()} to {codes.max()}, but its codebook has {size} entries.')
    records = np.empty(len(batch['index']), _record_dtype([codes.shape[1:] for codes in levels], codebook_sizes))
    records['index'], records['label'] = batch['index'], batch['label']
    for n, codes in enumerate(levels):
        records[f'codes_{n}'] = codes
    return records[np.asarray(batch['mask'])] if 'mask' in batch else records
