"""Images in an .npz file, the format in which this project and the field's evaluators keep samples.

    arr_0         uint8 [N, H, W, C] or [N, H, W], C 1 or 3
    label         int [N], optional
    class_names   str [K], optional

np.savez('images.npz', arr_0=images, label=labels) makes one. Each process that reads the file holds it in memory.
With data.splits=('train.npz', 'val.npz', 'test.npz') these are files of the folder data.path.
"""

import functools
import os
import zipfile

import numpy as np
from PIL import Image

from vqvae2_jax.data.decode import to_channels


@functools.lru_cache(maxsize=3)  # the splits
def _pixels(path: str) -> np.ndarray:
    with np.load(path) as arrays:
        return arrays['arr_0']


class ArraysPool:
    """The images of one .npz file as a pool (see images.Pool). Holds labels, not pixels, so that it pickles cheaply."""

    def __init__(self, path: str, num_classes: int, field: str = 'data.path'):
        """Opens the file.

        Args:
          path: the .npz file.
          num_classes: 0 ignores the labels, every label is 0.
          field: of the config, for the messages.

        Raises:
          FileNotFoundError: no such file.
          ValueError: it does not hold images, or its labels do not fit num_classes.
        """
        self.path, self.field = path, field
        if not os.path.isfile(path):
            raise FileNotFoundError(f'{field}: there is no file {path!r}.')
        try:
            with zipfile.ZipFile(path) as file, np.load(path) as arrays:
                # Checksums of the arrays: what tells these images from others, with no pixel read.
                self._checksums = [info.CRC for name in ('arr_0', 'label') for info in _members(file, name)]
                labels = arrays['label'] if 'label' in arrays and num_classes else None
                names = [str(name) for name in arrays['class_names']] if 'class_names' in arrays else None
            images = _pixels(path)
        except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
            raise ValueError(f'{field}: {path!r} is no .npz file with images in arr_0 ({error}).') from error
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.ndim == 4 and images.shape[-1] not in (1, 3):
            raise ValueError(
                f'{field}: arr_0 of {path!r} is {images.dtype} {list(images.shape)}; '
                'images are uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3].'
            )
        self._count = len(images)
        self.strata, self.class_names = labels, ()
        if num_classes:
            self._check_labels(labels, num_classes)
            self.class_names = tuple(names or (str(i) for i in range(num_classes)))
            if len(self.class_names) != num_classes:
                raise ValueError(
                    f'data.num_classes={num_classes}, but {path!r} names {len(self.class_names)} classes: '
                    f'set --config.data.num_classes={len(self.class_names)}.'
                )

    def _check_labels(self, labels, num_classes):
        if labels is None:
            raise ValueError(
                f'data.num_classes={num_classes}, but {self.path!r} has no `label`: set --config.data.num_classes=0.'
            )
        if labels.shape != (len(self),) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f'label of {self.path!r} is {labels.dtype} {list(labels.shape)}, not int [{len(self)}].')
        if len(self) and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(
                f'data.num_classes={num_classes}, but {self.path!r} has labels from {labels.min()} to {labels.max()}.'
            )

    def __len__(self) -> int:
        return self._count

    def where(self, position: int) -> str:
        return f'{self.path}[{position}]'

    def identity(self, positions: np.ndarray) -> bytes:
        head = f'{self._checksums}, {len(self.class_names)} classes\n'
        return head.encode() + np.asarray(positions).astype('<i8').tobytes()

    def read(self, position: int, channels: int) -> tuple[Image.Image, int]:
        image = _pixels(self.path)[position]
        label = 0 if self.strata is None else int(self.strata[position])
        return to_channels(Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image), channels), label


def _members(file: zipfile.ZipFile, name: str) -> list[zipfile.ZipInfo]:
    return [info for info in file.infolist() if info.filename == f'{name}.npy']
