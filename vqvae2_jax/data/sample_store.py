"""Sets of images in `.npz` shards of a fixed size, in the layout that the field's evaluators read (docs/files.md).

Samples and reconstructions are stored in this way. A set is a directory with a record (io/record.py), whose results
hold `count` and whose settings hold `shard_size`, and with files samples-START-STOP.npz of `shard_size` images (the
last one may hold fewer). N is the number of images of a file:

    arr_0    uint8 [N, H, W, C]; samples of a run without stage 1 have codes only
    label    int32 [N]
    index    int64 [N], the number of the sample; of reconstructions the position in the split of images
    codes_l  int32 [N, h_l, w_l] of level l, 0 is the finest
"""

import io
import re
from collections.abc import Sequence

import numpy as np
from etils import epath

from vqvae2_jax.data.shards import Range
from vqvae2_jax.io import files, npz, record, remote
from vqvae2_jax.io.record import Record

_SHARD = re.compile(r'samples-(\d+)-(\d+)\.npz')


def shard_path(directory: epath.Path, start: int, stop: int) -> epath.Path:
    """Returns the file of images start .. stop - 1."""
    return directory / f'samples-{start:08d}-{stop:08d}.npz'


def missing_shards(output: Record, ranges: Sequence[Range]) -> list[Range]:
    """Returns the ranges whose files are not complete."""
    return [r for r in ranges if shard_path(output.directory, *r).name not in output.files]


def stored_count(output: Record) -> int:
    """Returns how many images the files of a set reach up to, finished or not; 0 if there is none."""
    matches = [_SHARD.fullmatch(name) for name in output.files]
    return max((int(match[2]) for match in matches if match), default=0)


def shard_paths(output: Record) -> list[epath.Path]:
    """Returns the complete files of a set, in the order of their images."""
    return [output.directory / name for name in sorted(output.files) if _SHARD.fullmatch(name)]


def remove_others(output: Record, ranges: Sequence[Range]) -> None:
    """Removes files samples-START-STOP.npz whose (START, STOP) is not in `ranges`; other files stay.

    A set that has grown leaves its former, shorter last file behind.
    """
    own = {shard_path(output.directory, *r).name for r in ranges}
    for name in files.list_names(output.directory) - own:
        if _SHARD.fullmatch(name):
            files.remove(output.directory / name)
            output.files.pop(name, None)


def write_npz(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an uncompressed `.npz` file, over an existing one, completely or not at all."""
    if remote.is_remote(path):  # np.savez seeks in its file, which a bucket does not allow
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        files.write_bytes(path, buffer.getvalue())
        return
    size = sum(np.asarray(array).nbytes for array in arrays.values())
    with files.replace_file(path, size) as part, part.open('wb') as file:  # it is never in memory a second time
        np.savez(file, **arrays)


def read_npz(path: epath.Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Reads the named arrays of an `.npz` file; None: all."""
    return npz.read(path, names)


def local_files(directory: epath.Path) -> str:
    """Returns the folder of a finished set, or its local copy if it is on a bucket.

    All processes call this together.

    Raises:
      JobError: the set is not finished, or a file is damaged.
    """
    output = read_set(directory)
    output.refuse_damaged(output.find_damaged_together())
    return remote.local_copy(directory, output.digest)


def take(directory: epath.Path, index: np.ndarray) -> dict[str, np.ndarray]:
    """Reads some images of a finished set, from the files that hold them.

    Args:
      directory: the set.
      index: int [N], in any order.

    Returns:
      arr_0 uint8 [N, H, W, C], label int32 [N], index int64 [N], codes_l int32 [N, h_l, w_l], in the order of `index`.

    Raises:
      JobError: the set is not finished, or one of these files is damaged.
    """
    output = read_set(directory)
    size = output.settings['shard_size']
    index, result = np.asarray(index), {}
    all_paths = shard_paths(output)
    paths = {shard: all_paths[shard] for shard in np.unique(index // size)}
    output.refuse_damaged(output.find_damaged([path.name for path in paths.values()]))
    for shard, path in paths.items():
        positions = np.flatnonzero(index // size == shard)
        for name, values in read_npz(path).items():
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
