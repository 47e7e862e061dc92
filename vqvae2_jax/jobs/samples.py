"""Sets of samples on disk: `.npz` shards in the layout that the field's evaluators read (docs/files.md)."""

import io

import numpy as np
from etils import epath

from vqvae2_jax.io import provenance
from vqvae2_jax.jobs.workdir import JobError


def shard_path(directory: epath.Path, start: int, stop: int) -> epath.Path:
    """The file of samples start .. stop - 1."""
    return directory / f'samples-{start:08d}-{stop:08d}.npz'


def shard_ranges(count: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of every shard of a set."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def write_npz(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or absent: an interrupted write leaves nothing under this name."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    provenance.write_bytes(path, buffer.getvalue())


def read_npz(path: epath.Path) -> dict[str, np.ndarray]:
    """All arrays of a file."""
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def read_set(directory: epath.Path) -> dict[str, np.ndarray]:
    """All samples of a finished set: arr_0 uint8 [N, H, W, C], label int32 [N], index int64 [N], codes_l.

    Raises:
      JobError: shards are missing.
    """
    meta = read_meta(directory)
    paths = [shard_path(directory, *r) for r in shard_ranges(meta['count'], meta['batch_size'])]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        raise JobError(
            f'{directory} lacks {len(missing)} of {len(paths)} files, first {missing[0]}: run --job=sample again'
        )
    parts = [read_npz(p) for p in paths]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_meta(directory: epath.Path) -> dict:
    """meta.json of a set.

    Raises:
      JobError: there is no such set.
    """
    path = directory / 'meta.json'
    if not path.exists():
        raise JobError(f'{directory} holds no samples: run --job=sample first')
    return provenance.read_json(path)
