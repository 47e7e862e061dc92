"""Images in .npz files, the format of sample sets here and in common evaluators.

    arr_0         uint8 [N, H, W, C] or [N, H, W], C 1 or 3
    label         int [N], optional; without it arr_1, as in the sample sets of ADM
    class_names   str [K], optional

np.savez('images.npz', arr_0=images, label=labels) makes one. Its pixels are read from disk on access; those of a
compressed file are held in memory. The .npz files of a folder are one set, in the order of their names; so are those of
a pattern such as 'samples/*.npz', in the fields that allow one. With data.splits=('train.npz', 'val.npz', 'test.npz')
these are files in the folder data.path.
"""

import os
import threading

import numpy as np
from PIL import Image

from vqvae2_jax.data.decode import to_channels
from vqvae2_jax.data.outputs import IMAGE_JOBS, job_of
from vqvae2_jax.io import npz, remote
from vqvae2_jax.io.record import JobError

_opened: dict[tuple, np.ndarray] = {}
_opening = threading.Lock()  # several threads ask for a file at once, and a compressed one must fit into memory


def _pixels(key: tuple, limit: int) -> np.ndarray:
    """arr_0 of a file, memory-mapped if possible, else of at most `limit` bytes; `key` has its path and state."""
    with _opening:
        if key not in _opened:
            path = key[0]
            try:
                member = npz.read_members(path)['arr_0']
                mappable = member.is_mappable
                _opened[key] = npz.memory_map(path, member) if mappable else npz.read(path, ('arr_0',), limit)['arr_0']
            except ValueError as error:  # its content is damaged, or it was replaced
                raise JobError(str(error)) from error
        return _opened[key]


def is_arrays(path: str) -> bool:
    """Returns whether a path is for `ArraysDataset`: an .npz or .npy file, or a folder of them that a job wrote."""
    return job_of(path) in IMAGE_JOBS if os.path.isdir(path) else path.endswith(('.npz', '.npy'))


def list_arrays(path: str, field: str, pattern: bool = False) -> list[str]:
    """Lists .npz files, in the order of their names.

    Args:
      path: an .npz file, or a folder that holds some. A folder that a job wrote stands for the images that it made.
      field: name of the config field, for messages.
      pattern: whether a path that does not exist may be a pattern of files.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the folder holds no .npz file.
    """
    if os.path.isdir(path):
        # Of a rejection's files only accepted.npz has images.
        names = [name for name in os.listdir(path) if name.endswith('.npz') and not name.startswith('.')]
        names = ['accepted.npz'] if job_of(path) == 'reject' else names
        if not names:
            raise ValueError(f'{field}: the folder {path!r} holds no .npz files.')
        return sorted(os.path.join(path, name) for name in names)
    paths = remote.expand(path) if pattern else [path] if os.path.exists(path) else []
    if not paths:
        hint = (
            ': give a folder to join its .npz files, since this field takes no pattern'
            if set('*?[') & set(path)
            else ''
        )
        raise FileNotFoundError(f'{field}: there is no file {path!r}{"" if pattern else hint}.')
    return paths


class ArraysDataset:
    """The images of .npz files (an `images.Dataset`). It holds labels, not pixels, so it pickles cheaply."""

    def __init__(
        self, path: str, num_classes: int, field: str = 'data.path', *, pattern: bool = False, max_bytes: int = 0
    ):
        """Opens the files.

        Args:
          path: see `list_arrays`.
          num_classes: 0 ignores the labels, every label is 0.
          field: name of the config field, for messages.
          pattern: see `list_arrays`.
          max_bytes: limit of the arrays that are held in memory, data.max_bytes.

        Raises:
          FileNotFoundError: no such file.
          ValueError: a file does not hold images, its labels do not fit num_classes, or the limit is too small.
        """
        files = [_File(each, num_classes, field) for each in list_arrays(path, field, pattern)]
        if len({file.class_names for file in files}) > 1 or len({file.shape for file in files}) > 1:
            raise ValueError(f'{field}: the files {path!r} differ in the shape of their images or in their classes.')
        # What is free will be less when pixels are first read, after those of other splits.
        self._limit, size = max_bytes or npz.default_limit(), sum(file.held for file in files)
        if size > self._limit:
            which = 'data.max_bytes' if max_bytes else 'half of the free memory'
            raise ValueError(
                f'{field}: {path!r} is compressed, so that it is held in memory, but its arrays claim {size} bytes of '
                f'memory, more than {self._limit}, {which}: write it by np.savez, or set '
                f'--config.data.max_bytes={size} if you trust it.'
            )
        self._keys = [file.key for file in files]
        self._image_bytes = int(np.prod(files[0].shape))
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

    def content_length(self, index: int) -> int:
        """Returns the bytes of an image's pixels."""
        return self._image_bytes

    def content(self, index: int) -> bytes:
        """Returns the pixels of an image."""
        key, row = self._locate(index)
        return _pixels(key, self._limit)[row].tobytes()

    def read(self, index: int, channels: int) -> tuple[Image.Image, int]:
        """Reads an upright image in mode 'L' or 'RGB', and its label; raises UnreadableImage."""
        key, row = self._locate(index)
        image = _pixels(key, self._limit)[row]
        label = 0 if self.stratify_by is None else int(self.stratify_by[index])
        return to_channels(Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image), channels), label


class _File:
    """One file: its key (for `_pixels`), count, image shape, labels, class_names, checksums and bytes to hold."""

    def __init__(self, path, num_classes, field):
        self._path, self._field = path, field
        try:
            members = npz.read_members(path)
        except ValueError as error:
            raise ValueError(f'{field}: {error}.') from error
        images = self._images(members)
        self.count, self.shape, self.class_names = images.shape[0], images.shape[1:], ()
        self.held = 0 if images.is_mappable else images.nbytes
        label = 'label'
        if num_classes and 'label' not in members and 'arr_1' in members:
            adm = self._member(members, 'arr_1')
            label = 'arr_1' if adm.shape == (self.count,) and adm.dtype.kind in 'iu' else 'label'
        # Checksums of the arrays identify the images without reading pixels.
        self.checksums = [members.checksum(name) for name in ('arr_0', label) if name in members]
        state = os.stat(path)
        self.key = path, state.st_mtime_ns, state.st_size
        if num_classes:
            self._read_labels(members, label, num_classes)

    def _member(self, members, name) -> npz.Member:
        try:
            return members[name]
        except ValueError as error:
            raise ValueError(f'{self._field}: {error}.') from error

    def _images(self, members: npz.Members) -> npz.Member:
        """Returns arr_0; refuses a file without images."""
        where = f'{self._field}: {self._path!r}'
        if 'arr_0' not in members:
            raise ValueError(
                f'{where} is no .npz file with images in arr_0, it has {members}: write images of '
                "another name by np.savez('NEW.npz', arr_0=images, label=labels)."
            )
        images = self._member(members, 'arr_0')
        if (advice := _advice(images)) is not None:
            raise ValueError(
                f'{self._field}: arr_0 of {self._path!r} is {images}; images are uint8 [N, H, W], '
                f'[N, H, W, 1] or [N, H, W, 3]{advice}.'
            )
        return images

    def _read_labels(self, members, label, num_classes):
        if label not in members:
            raise ValueError(
                f'data.num_classes={num_classes}, but {self._path!r} has no `label`: set --config.data.num_classes=0.'
            )
        labels = self._member(members, label)
        names = self._member(members, 'class_names') if 'class_names' in members else None
        if labels.shape != (self.count,) or labels.dtype.kind not in 'iu':
            raise ValueError(f'{label} of {self._path!r} is {labels}, not int [{self.count}].')
        if names is not None and (len(names.shape) != 1 or names.dtype.kind not in 'US'):
            raise ValueError(f'class_names of {self._path!r} is {names}, not text [{num_classes}].')
        try:
            arrays = npz.read(self._path, (label, 'class_names') if names else (label,))
        except ValueError as error:
            raise ValueError(f'{self._field}: {error}.') from error
        self.labels = arrays[label]
        self.class_names = _names(arrays['class_names']) if names else tuple(map(str, range(num_classes)))
        if len(self.class_names) != num_classes:
            raise ValueError(
                f'data.num_classes={num_classes}, but {self._path!r} names {len(self.class_names)} classes: '
                f'set --config.data.num_classes={len(self.class_names)}.'
            )
        if not 0 <= self.labels.min() <= self.labels.max() < num_classes:
            raise ValueError(
                f'data.num_classes={num_classes}, but {self._path!r} has labels from {self.labels.min()} to '
                f'{self.labels.max()}.'
            )


def _advice(images: npz.Member) -> str | None:
    """Returns None for images, else how to make the array images, if that is clear."""
    shape = images.shape
    if not all(shape):
        return ': it holds no pixels'
    if images.dtype == np.uint8 and (len(shape) == 2 or len(shape) == 3 and shape[-1] in (1, 3)):
        return ': this looks like a single image, which arr_0=image[None] makes a set'  # not many of 3 pixels in width
    if len(shape) not in (3, 4):
        return ''
    if len(shape) == 4 and shape[-1] not in (1, 3):
        if shape[1] in (1, 3):
            return ': channels come last, as in arr_0=images.transpose(0, 2, 3, 1)'
        return ': leave out alpha, as in arr_0=images[..., :3]' if shape[-1] == 4 else ''
    return (
        None if images.dtype == np.uint8 else ': scale other numbers to 0 to 255 and convert them by astype(np.uint8)'
    )


def _names(names: np.ndarray) -> tuple[str, ...]:
    return tuple(name.decode('utf-8', 'surrogateescape') if isinstance(name, bytes) else str(name) for name in names)
