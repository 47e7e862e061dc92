"""The store of discrete codes between the two stages.

A store is a directory:

    meta.json                              what is in it (CodesMeta); written last, so its presence means complete
    shard-00000-of-00004.array_record      ArrayRecord files, group_size:1 for random access, checksummed
    ...

Each record is one example, a fixed-length little-endian struct without padding:

    index    int64          position in the split of images
    label    int32
    codes_0  uint8/uint16/int32 [h_0, w_0], row-major; the finest level, of the narrowest type for its codebook size
    codes_1  likewise, the next coarser level
    ...

Example i is record i of the shards read one after the other in order of their numbers.
"""

import dataclasses
import functools
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping

import numpy as np
from array_record.python import array_record_data_source, array_record_module
from etils import epath

from vqvae2_jax.io import files, gcs

SCHEMA = 1
_META = 'meta.json'
_AGAIN = 'Run --job=codes again.'


@dataclasses.dataclass(frozen=True)
class CodesMeta:
    """What a store of codes holds and where it came from.

    Attributes:
      shapes: (h, w) of each level, finest first.
      codebook_sizes: K of each level, finest first.
      num_classes: 0 is unlabelled.
      class_names: by label; () if unlabelled.
      count: number of examples.
      split: of the images.
      shards: number of files.
      vqvae_digest: of the stage-1 checkpoint that made the codes.
      version: of the package that wrote the store.
    """

    shapes: tuple[tuple[int, int], ...]
    codebook_sizes: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    count: int
    split: str
    shards: int
    vqvae_digest: str
    version: str

    def __post_init__(self):
        if not self.shapes or len(self.shapes) != len(self.codebook_sizes):
            raise ValueError(f'shapes={self.shapes} and codebook_sizes={self.codebook_sizes} must agree.')
        if self.shards < 1 or self.count < 0:
            raise ValueError(f'shards={self.shards} must be >= 1, count={self.count} >= 0.')

    def to_json(self) -> str:
        return json.dumps({'schema': SCHEMA} | dataclasses.asdict(self), indent=2, ensure_ascii=False) + '\n'

    @classmethod
    def from_json(cls, text: str) -> 'CodesMeta':
        """Raises ValueError on another schema, or on fields that are missing or unknown."""
        fields = json.loads(text)
        schema = fields.pop('schema', None)
        if schema != SCHEMA:
            raise ValueError(f'codes of schema {schema!r}; this version of vqvae2_jax reads schema {SCHEMA}. {_AGAIN}')
        names = {field.name for field in dataclasses.fields(cls)}
        if names != fields.keys():
            raise ValueError(f'the fields {sorted(names ^ fields.keys())} are missing or unknown. {_AGAIN}')
        fields['shapes'] = tuple(tuple(shape) for shape in fields['shapes'])
        fields['codebook_sizes'] = tuple(fields['codebook_sizes'])
        fields['class_names'] = tuple(fields['class_names'])
        return cls(**fields)


def shard_path(directory: epath.PathLike, shard: int, shards: int) -> str:
    """Path of one shard, such as DIRECTORY/shard-00003-of-00010.array_record."""
    return os.fspath(epath.Path(directory) / f'shard-{shard:05d}-of-{shards:05d}.array_record')


def finished_shards(directory: epath.PathLike, shards: int) -> list[int]:
    """Numbers of the shards that are there, whole."""
    return [shard for shard in range(shards) if epath.Path(shard_path(directory, shard, shards)).exists()]


def write_shard(
    path: epath.PathLike, batches: Iterable[Mapping[str, np.ndarray]], codebook_sizes: tuple[int, ...]
) -> int:
    """Writes one shard, under a temporary name until it is whole.

    Args:
      path: see shard_path; the directory is made if need be.
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
    remote = gcs.is_remote(path)  # where a file is there once it is whole
    name = f'{path.name}.unfinished-{uuid.uuid4().hex[:8]}'
    unfinished = epath.Path(tempfile.gettempdir() if remote else path.parent) / name
    # Fast compression: on codes, stronger settings cost much time and gain little.
    writer = array_record_module.ArrayRecordWriter(os.fspath(unfinished), 'group_size:1,zstd:1')
    count = 0
    try:
        for batch in batches:
            for record in _pack(batch, codebook_sizes):
                writer.write(record.tobytes())
                count += 1
        writer.close()
        if remote:
            gcs.upload(os.fspath(unfinished), path)
        else:
            unfinished.replace(path)
    finally:
        if writer.is_open():
            writer.close()
        unfinished.unlink(missing_ok=True)
    return count


def write_meta(directory: epath.PathLike, meta: CodesMeta) -> None:
    """Writes meta.json; call it when all shards are written."""
    files.write_bytes(epath.Path(directory) / _META, meta.to_json().encode())


def read_meta(directory: epath.PathLike) -> CodesMeta:
    """Reads meta.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is of another schema.
    """
    path = epath.Path(directory) / _META
    if not path.exists():
        raise FileNotFoundError(f'no codes in {directory}: {path} is missing. Run --job=codes first.')
    try:
        return CodesMeta.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


class CodeSource:
    """A store of codes as a random-access source; pickles as a list of file names.

    source[i] is {'codes_0': int32 [h_0, w_0] (finest), 'codes_1': ..., 'label': int32, 'index': int64}.
    """

    def __init__(self, directory: epath.PathLike):
        """Opens a store.

        Raises:
          FileNotFoundError: meta.json or a shard is missing.
          ValueError: a damaged file, or another number of records than meta.json says.
        """
        self.meta = read_meta(directory)
        paths = [shard_path(directory, shard, self.meta.shards) for shard in range(self.meta.shards)]
        missing = sorted(set(range(self.meta.shards)) - set(finished_shards(directory, self.meta.shards)))
        if missing:
            raise FileNotFoundError(
                f'{paths[missing[0]]} is missing ({len(missing)} of the {self.meta.shards} shards are). {_AGAIN}'
            )
        if gcs.is_remote(directory):
            paths = _local(os.fspath(directory), self.meta)
        count = sum(count_records(path) for path in paths)
        if count != self.meta.count:
            raise ValueError(
                f'{epath.Path(directory) / _META} says {self.meta.count} examples, '
                f'but its {self.meta.shards} shards hold {count}. {_AGAIN}'
            )
        self._directory = os.fspath(directory)
        self._records = array_record_data_source.ArrayRecordDataSource(paths)
        self._dtype = _record_dtype(self.meta.shapes, self.meta.codebook_sizes)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.meta.class_names

    def __len__(self) -> int:
        return self.meta.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f'example {index} of {len(self)}')
        try:
            data = self._records[index]
        except RuntimeError as error:  # A checksum that does not match.
            raise ValueError(f'record {index} of {self._directory} is damaged: {error}. {_AGAIN}') from error
        if len(data) != self._dtype.itemsize:
            raise ValueError(
                f'record {index} of {self._directory} has {len(data)} bytes, '
                f'but {_META} implies {self._dtype.itemsize}. {_AGAIN}'
            )
        record = np.frombuffer(data, self._dtype)[0]
        levels = {f'codes_{n}': record[f'codes_{n}'].astype(np.int32) for n in range(len(self.meta.shapes))}  # [h, w]
        return levels | {'label': np.int32(record['label']), 'index': np.int64(record['index'])}


@functools.lru_cache(maxsize=4)
def _local(directory, meta):
    """Paths of the shards in a copy of a store on a bucket. `meta`: one that was replaced is another store."""
    copy = gcs.local_copy(directory)
    return [shard_path(copy, shard, meta.shards) for shard in range(meta.shards)]


def count_records(path: str) -> int:
    """Raises ValueError on a damaged file."""
    try:
        with gcs.local(path) as file:
            reader = array_record_module.ArrayRecordReader(file)
            count = reader.num_records()
            reader.close()
    except RuntimeError as error:
        raise ValueError(f'{path} is damaged: {error or "no valid ArrayRecord file"}. Delete it. {_AGAIN}') from error
    return count


def _record_dtype(shapes: Iterable[tuple[int, int]], codebook_sizes: Iterable[int]) -> np.dtype:
    """The struct of one record."""
    levels = [
        (f'codes_{n}', '<u1' if size <= 2**8 else '<u2' if size <= 2**16 else '<i4', tuple(shape))
        for n, (shape, size) in enumerate(zip(shapes, codebook_sizes, strict=True))
    ]
    return np.dtype([('index', '<i8'), ('label', '<i4'), *levels])


def _pack(batch: Mapping[str, np.ndarray], codebook_sizes: tuple[int, ...]) -> np.ndarray:
    """One batch as records, [number of rows in the mask]."""
    levels = [np.asarray(batch[f'codes_{n}']) for n in range(len(codebook_sizes))]  # [B, h, w] each
    for n, (codes, size) in enumerate(zip(levels, codebook_sizes, strict=True)):
        if codes.size and not 0 <= codes.min() <= codes.max() < size:
            raise ValueError(f'codes_{n} run from {codes.min()} to {codes.max()}, but its codebook has {size} entries.')
    records = np.empty(len(batch['index']), _record_dtype([codes.shape[1:] for codes in levels], codebook_sizes))
    records['index'], records['label'] = batch['index'], batch['label']
    for n, codes in enumerate(levels):
        records[f'codes_{n}'] = codes
    return records[np.asarray(batch['mask'])] if 'mask' in batch else records
