"""Sets of samples on disk: `.npz` shards in the layout that the field's evaluators read (docs/files.md)."""

import io

import numpy as np
from etils import epath

from vqvae2_jax.io import files
from vqvae2_jax.jobs.workdir import JobError


def shard_path(directory: epath.Path, start: int, stop: int) -> epath.Path:
    """The file of samples start .. stop - 1."""
    return directory / f'samples-{start:08d}-{stop:08d}.npz'


def shard_ranges(count: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of every shard of a set."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def remove_others(directory: epath.Path, ranges: list[tuple[int, int]]) -> None:
    """Removes files that are not of the set, as the last, shorter one of a set before it grew: none is there twice."""
    own = {shard_path(directory, *r).name for r in ranges}
    for path in directory.glob('samples-*.npz'):
        if path.name not in own:
            path.unlink()


def write_npz(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or absent: an interrupted write leaves nothing under this name."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    files.write_bytes(path, buffer.getvalue())


def read_npz(path: epath.Path) -> dict[str, np.ndarray]:
    """All arrays of a file."""
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def shard_paths(directory: epath.Path) -> list[epath.Path]:
    """The files of a finished set, in the order of their samples.

    Raises:
      JobError: some are missing.
    """
    meta = read_meta(directory)
    paths = [shard_path(directory, *r) for r in shard_ranges(meta['count'], meta['batch_size'])]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        raise JobError(
            f'{directory} lacks {len(missing)} of {len(paths)} files, first {missing[0]}: '
            f'run --job={_job(directory)} again'
        )
    return paths


def take(directory: epath.Path, index: np.ndarray) -> dict[str, np.ndarray]:
    """The samples `index` [N] of a finished set, reading only the files that hold them.

    Returns:
      arr_0 uint8 [N, H, W, C], label int32 [N], index int64 [N], codes_l [N, h_l, w_l], in the order asked for.
    """
    paths, size = shard_paths(directory), read_meta(directory)['batch_size']
    index = np.asarray(index)
    rows = [None] * len(index)
    for shard in np.unique(index // size):
        arrays = read_npz(paths[shard])
        for position in np.flatnonzero(index // size == shard):
            # Copies: a view would hold the whole file.
            rows[position] = {name: values[index[position] % size].copy() for name, values in arrays.items()}
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def digest(directory: epath.Path) -> str:
    """Identifies a set by its meta.json; raises as `read_meta`."""
    return digest_meta(read_meta(directory))


def digest_meta(meta: dict) -> str:
    """Identifies a set by what meta.json is to hold, but for the version of the package."""
    return files.digest_json({k: v for k, v in meta.items() if k != 'version'})


def read_meta(directory: epath.Path) -> dict:
    """meta.json of a set.

    Raises:
      JobError: there is no such set.
    """
    path = directory / 'meta.json'
    if not path.exists():
        raise JobError(f'{directory} holds no images: run --job={_job(directory)} first')
    return files.read_json(path)


def _job(directory):
    return 'cas' if directory.name == 'reconstructions' else 'sample'
