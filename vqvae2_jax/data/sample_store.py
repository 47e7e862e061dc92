"""Sets of images in `.npz` shards of a fixed size, in the layout that the field's evaluators read (docs/files.md).

Samples and reconstructions are stored in this way. A set is a directory with a record (io/record.py), whose results
hold `count` and whose settings hold `shard_size`, and with files samples-START-STOP.npz of `shard_size` images (the
last one may hold fewer). N is the number of images of a file:

    arr_0    uint8 [N, H, W, C]
    label    int32 [N]
    index    int64 [N], the number of the sample; of reconstructions the position in the split of images
    codes_l  int32 [N, h_l, w_l] of level l, 0 is the finest
"""

import glob
import io
import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from vqvae2_jax.data.shards import Range, shard_ranges
from vqvae2_jax.distributed import processes
from vqvae2_jax.io import files, gcs, record
from vqvae2_jax.io.record import JobError, Record


def shard_path(directory: epath.Path, start: int, stop: int) -> epath.Path:
    """Returns the file of images start .. stop - 1."""
    return directory / f'samples-{start:08d}-{stop:08d}.npz'


def missing_shards(directory: epath.Path, ranges: Sequence[Range]) -> list[Range]:
    """Returns the ranges whose files do not exist."""
    names = files.list_names(directory)
    return [r for r in ranges if shard_path(directory, *r).name not in names]


def stored_count(directory: epath.Path) -> int:
    """Returns how many images the files of a set reach up to, finished or not; 0 if there is none."""
    return max((int(path.stem.rpartition('-')[2]) for path in directory.glob('samples-*.npz')), default=0)


def remove_others(directory: epath.Path, ranges: Sequence[Range]) -> None:
    """Removes files samples-START-STOP.npz whose (START, STOP) is not in `ranges`; other files stay.

    A set that has grown leaves its former, shorter last file behind.
    """
    own = {shard_path(directory, *r).name for r in ranges}
    for path in directory.glob('samples-*.npz'):
        if path.name not in own:
            path.unlink()


def write_npz(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an uncompressed `.npz` file, over an existing one, completely or not at all."""
    if gcs.is_remote(path):  # np.savez seeks in its file, which a bucket does not allow
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        files.write_bytes(path, buffer.getvalue())
        return
    with files.replace_file(path) as part, part.open('wb') as file:  # the content is never in memory a second time
        np.savez(file, **arrays)


def read_npz(path: epath.Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Reads the named arrays of an `.npz` file; None: all."""
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names or arrays.files}


def shard_paths(directory: epath.Path) -> list[epath.Path]:
    """Returns the files of a finished set, in the order of their images. All processes together; process 0 looks.

    Raises:
      JobError: the set is not finished, or files are missing.
    """
    return processes.run_on_main_process(lambda: _shard_paths(read_set(directory)))


def local_files(directory: epath.Path) -> str:
    """Returns a glob pattern of the files of a finished set, or of their local copies if it is on a bucket.

    All processes call this together.

    Raises:
      JobError: as `shard_paths`.
    """
    shard_paths(directory)
    folder = str(directory) if gcs.is_remote(directory) else glob.escape(str(directory))
    return gcs.local_copy(os.path.join(folder, 'samples-*.npz'), read_set(directory).digest)


def take(directory: epath.Path, index: np.ndarray) -> dict[str, np.ndarray]:
    """Reads some images of a finished set, from the files that hold them.

    Args:
      directory: the set.
      index: int [N], in any order.

    Returns:
      arr_0 uint8 [N, H, W, C], label int32 [N], index int64 [N], codes_l int32 [N, h_l, w_l], in the order of `index`.

    Raises:
      JobError: as `shard_paths`.
    """
    output = read_set(directory)
    paths, size = _shard_paths(output), output.settings['shard_size']
    index, result = np.asarray(index), {}
    for shard in np.unique(index // size):
        positions = np.flatnonzero(index // size == shard)
        for name, values in read_npz(paths[shard]).items():
            if name not in result:  # all images are held once: a set may have many
                result[name] = np.empty((len(index), *values.shape[1:]), values.dtype)
            result[name][positions] = values[index[positions] % size]
    return result


def read_set(directory: epath.Path) -> Record:
    """Reads the record of a finished set; its `digest` identifies the images.

    Raises:
      JobError: there is no finished set.
    """
    return record.read_done(directory, 'cas' if directory.parent.name != 'samples' else 'sample')


def _shard_paths(output):
    ranges = shard_ranges(output.results['count'], output.settings['shard_size'])
    if missing := missing_shards(output.directory, ranges):
        raise JobError(
            f'{output.directory} lacks {len(missing)} of {len(ranges)} files, first '
            f'{shard_path(output.directory, *missing[0]).name}: {record.job_command(output.job)}'
        )
    return [shard_path(output.directory, *r) for r in ranges]
