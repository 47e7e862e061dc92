"""The store of discrete codes between the two stages.

A store is a directory:

    record.json                            the record of the job (io/record.py); its results are `CodesMeta`
    shard-00000-of-00004.array_record      ArrayRecord files, group_size:1 for random access, checksummed
    ...

Each ArrayRecord record is one example, a fixed-length little-endian struct without padding:

    index    int64          position in the split of images
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
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from array_record.python import array_record_data_source, array_record_module
from etils import epath

from vqvae2_jax.io import files, gcs, record

JOB = 'extract_codes'
_RUN_AGAIN = f'Run --job={JOB} again.'


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
                f'the results {different} are missing or unknown. Delete that directory and run --job={JOB} again.'
            )
        shapes = tuple(tuple(shape) for shape in results['shapes'])
        tuples = {name: tuple(results[name]) for name in ('codebook_sizes', 'class_names')}
        return cls(**{**results, **tuples, 'shapes': shapes})


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
    remote = gcs.is_remote(path)  # a file appears there only when it is complete
    name = f'{path.name}.unfinished-{uuid.uuid4().hex[:8]}'
    unfinished = epath.Path(tempfile.gettempdir() if remote else path.parent) / name
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
        if gcs.is_remote(path):
            gcs.upload(os.fspath(unfinished), path)
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
      meta: the contents.
    """

    meta: CodesMeta

    def __init__(self, directory: epath.PathLike):
        """Opens a store.

        Raises:
          JobError: the store is missing or not finished.
          ValueError: a file is damaged or missing, or the number of examples is not that of the record.
        """
        output = record.read_done(directory, JOB)
        try:
            self.meta = CodesMeta.from_results(output.results)
        except ValueError as error:
            raise ValueError(f'{output.directory / record.FILE}: {error}') from error
        shards = self.meta.shards
        # Other codes may replace these on a bucket while this process lives; the digest tells them apart.
        local = gcs.local_copy(directory, output.digest)
        paths = [os.fspath(shard_path(local, shard, shards)) for shard in range(shards)]
        count = sum(count_records(path) for path in paths)
        if count != self.meta.count:
            raise ValueError(
                f'{output.directory / record.FILE} says {self.meta.count} examples, '
                f'but its {shards} shards hold {count}. Delete {output.directory} and run --job={JOB} again.'
            )
        self._directory = os.fspath(directory)
        self._records = array_record_data_source.ArrayRecordDataSource(paths)
        self._dtype = _record_dtype(self.meta.shapes, self.meta.codebook_sizes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label; () if unlabeled."""
        return self.meta.class_names

    def __len__(self) -> int:
        return self.meta.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f'example {index} of {len(self)}')
        try:
            data = self._records[index]
        except RuntimeError as error:  # A checksum that does not match.
            raise ValueError(
                f'record {index} of {self._directory} is damaged: {error}. '
                f'Delete {self._directory} and run --job={JOB} again.'
            ) from error
        if len(data) != self._dtype.itemsize:
            raise ValueError(
                f'record {index} of {self._directory} has {len(data)} bytes, '
                f'but {record.FILE} implies {self._dtype.itemsize}. Delete {self._directory} and run --job={JOB} again.'
            )
        row = np.frombuffer(data, self._dtype)[0]
        levels = {f'codes_{n}': row[f'codes_{n}'].astype(np.int32) for n in range(len(self.meta.shapes))}  # [h, w]
        return levels | {'label': np.int32(row['label']), 'index': np.int64(row['index'])}


def count_records(path: epath.PathLike) -> int:
    """Returns the number of examples in a shard.

    Raises:
      ValueError: the file is damaged.
    """
    try:
        with gcs.local(path) as file:
            reader = array_record_module.ArrayRecordReader(file)
            count = reader.num_records()
            reader.close()
    except RuntimeError as error:
        raise ValueError(
            f'{path} is damaged: {error or "no valid ArrayRecord file"}. Delete it. {_RUN_AGAIN}'
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
