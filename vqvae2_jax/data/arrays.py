"""Images in .npz files, the format of sample sets here and in common evaluators.

    arr_0         uint8 [N, H, W, C] or [N, H, W], C 1 or 3
    label         int [N], optional
    class_names   str [K], optional

np.savez('images.npz', arr_0=images, label=labels) makes one. Its pixels are read from disk on access; those of a
compressed file are held in memory. A pattern such as 'samples/*.npz' joins several files, in the order of their names.
With data.splits=('train.npz', 'val.npz', 'test.npz') these are files in the folder data.path.
"""

import functools
import glob
import os
import zipfile

import numpy as np
from PIL import Image

from vqvae2_jax.data.decode import to_channels

_STORED_HEADER = 30  # bytes of a zip member's own header, before its name


@functools.lru_cache(maxsize=4096)
def _pixels(path: str, *state: int) -> np.ndarray:
    """arr_0 of a file, memory-mapped unless it is compressed. `state` tells apart files that replace each other."""
    with zipfile.ZipFile(path) as archive, archive.open('arr_0.npy') as member:
        info = archive.getinfo('arr_0.npy')
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(member)
        begin = member.tell()
    if info.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays['arr_0']
    with open(path, 'rb') as file:
        file.seek(info.header_offset)
        header = file.read(_STORED_HEADER)
    begin += info.header_offset + _STORED_HEADER + sum(np.frombuffer(header[26:30], '<u2').tolist())  # name and extra
    return np.memmap(path, dtype, 'r', begin, shape)


class ArraysDataset:
    """The images of .npz files (an `images.Dataset`). It holds labels, not pixels, so it pickles cheaply."""

    def __init__(self, pattern: str, num_classes: int, field: str = 'data.path'):
        """Opens the files.

        Args:
          pattern: path of an .npz file, or a pattern of several files.
          num_classes: 0 ignores the labels, every label is 0.
          field: name of the config field, for messages.

        Raises:
          FileNotFoundError: no such file.
          ValueError: a file does not hold images, or its labels do not fit num_classes.
        """
        paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
        if not paths:
            raise FileNotFoundError(f'{field}: there is no file {pattern!r}.')
        files = [_File(path, num_classes, field) for path in paths]
        if len({file.class_names for file in files}) > 1 or len({file.shape for file in files}) > 1:
            raise ValueError(f'{field}: the files {pattern!r} differ in the shape of their images or in their classes.')
        self._keys = [file.key for file in files]
        self._ends = np.cumsum([file.count for file in files])
        self._checksums = [checksum for file in files for checksum in file.checksums]
        self.class_names = files[0].class_names
        self.labels = self.stratify_by = np.concatenate([file.labels for file in files]) if num_classes else None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index):
        number = int(np.searchsorted(self._ends, index, side='right'))
        return self._keys[number], index - (int(self._ends[number - 1]) if number else 0)

    def example_name(self, index: int) -> str:
        """Returns the path or name of an image, for messages."""
        (path, *_), row = self._locate(index)
        return f'{path}[{row}]'

    def fingerprint(self, indices: np.ndarray) -> bytes:
        """Returns bytes that identify these images, their order and their labels, wherever the data are."""
        head = f'{self._checksums}, {len(self.class_names)} classes\n'
        return head.encode() + np.asarray(indices).astype('<i8').tobytes()

    def content(self, index: int, limit: int = -1) -> tuple[bytes, int]:
        """Returns the first `limit` bytes of an image's pixels, and the number of all."""
        key, row = self._locate(index)
        data = _pixels(*key)[row].tobytes()
        return data[: None if limit < 0 else limit], len(data)

    def read(self, index: int, channels: int) -> tuple[Image.Image, int]:
        """Reads an upright image in mode 'L' or 'RGB', and its label; raises UnreadableImage."""
        key, row = self._locate(index)
        image = _pixels(*key)[row]
        label = 0 if self.stratify_by is None else int(self.stratify_by[index])
        return to_channels(Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image), channels), label


class _File:
    """One file: its key (for `_pixels`), count, image shape, labels, class_names and checksums."""

    def __init__(self, path, num_classes, field):
        try:
            with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
                # Checksums of the arrays identify the images without reading pixels.
                self.checksums = [archive.getinfo(f'{name}.npy').CRC for name in ('arr_0', 'label') if name in arrays]
                self.labels = arrays['label'] if 'label' in arrays and num_classes else None
                names = [str(name) for name in arrays['class_names']] if 'class_names' in arrays else None
            state = os.stat(path)
            self.key = path, state.st_mtime_ns, state.st_size
            images = _pixels(*self.key)
        except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
            raise ValueError(f'{field}: {path!r} is no .npz file with images in arr_0 ({error}).') from error
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.ndim == 4 and images.shape[-1] not in (1, 3):
            raise ValueError(
                f'{field}: arr_0 of {path!r} is {images.dtype} {list(images.shape)}; '
                'images are uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3].'
            )
        self.count, self.shape, self.class_names = len(images), images.shape[1:], ()
        if num_classes:
            self._check_labels(path, num_classes)
            self.class_names = tuple(names or (str(i) for i in range(num_classes)))
            if len(self.class_names) != num_classes:
                raise ValueError(
                    f'data.num_classes={num_classes}, but {path!r} names {len(self.class_names)} classes: '
                    f'set --config.data.num_classes={len(self.class_names)}.'
                )

    def _check_labels(self, path, num_classes):
        labels = self.labels
        if labels is None:
            raise ValueError(
                f'data.num_classes={num_classes}, but {path!r} has no `label`: set --config.data.num_classes=0.'
            )
        if labels.shape != (self.count,) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f'label of {path!r} is {labels.dtype} {list(labels.shape)}, not int [{self.count}].')
        if self.count and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(
                f'data.num_classes={num_classes}, but {path!r} has labels from {labels.min()} to {labels.max()}.'
            )
