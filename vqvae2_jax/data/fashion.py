"""Fashion-MNIST's 10 000 test images, embedded in the package: no download is needed.

The asset is one lossless PNG of 100 x 100 tiles of 28 px; the class of a tile is its row // 10. MIT license, see
assets/fashion_mnist_COPYRIGHT.
"""

import functools
import pathlib

import numpy as np
from PIL import Image

from vqvae2_jax.data.decode import to_channels

CLASS_NAMES = (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
)
_ASSET = pathlib.Path(__file__).parent / 'assets' / 'fashion_mnist_10000.png'
_PER_CLASS = 1000


@functools.cache
def _pixels() -> np.ndarray:
    """All images, uint8 [10000, 28, 28], in class order; loaded once per process."""
    with Image.open(_ASSET) as sheet:
        tiles = np.asarray(sheet.convert('L')).reshape(100, 28, 100, 28)  # [tile row, y, tile column, x]
    return tiles.transpose(0, 2, 1, 3).reshape(-1, 28, 28)


class FashionDataset:
    """The embedded images (an `images.Dataset`). It holds no pixels, so it pickles cheaply."""

    class_names: tuple[str, ...]

    def __init__(self, num_classes: int):
        """Creates the data set.

        Args:
          num_classes: 10, or 0 for unlabeled use: every label is 0.

        Raises:
          ValueError: another number.
        """
        if num_classes not in (0, len(CLASS_NAMES)):
            raise ValueError(
                f"data.num_classes={num_classes}, but data.name='fashion' has {len(CLASS_NAMES)} classes: "
                f'set --config.data.num_classes={len(CLASS_NAMES)}, or 0 to ignore the labels.'
            )
        self.class_names = CLASS_NAMES if num_classes else ()

    def __len__(self) -> int:
        return len(CLASS_NAMES) * _PER_CLASS

    @property
    def stratify_by(self) -> np.ndarray:
        """The class of each image, int64 [10000]: splits get the same share of every class."""
        return np.arange(len(self)) // _PER_CLASS

    @property
    def labels(self) -> np.ndarray:
        """The class of each image, int64 [10000], also if the labels are not used."""
        return self.stratify_by

    def example_name(self, index: int) -> str:
        """Returns the path or name of an image, for messages."""
        return f'fashion image {index}'

    def fingerprint(self, indices: np.ndarray) -> bytes:
        """Returns bytes that identify these images, their order and their labels, wherever the data are."""
        return f'fashion, {len(self.class_names)} classes\n'.encode() + indices.astype('<i8').tobytes()

    def content_length(self, index: int) -> int:
        """Returns the bytes of an image's pixels."""
        return _pixels()[index].nbytes

    def content(self, index: int) -> bytes:
        """Returns the pixels of an image."""
        return _pixels()[index].tobytes()

    def read(self, index: int, channels: int) -> tuple[Image.Image, int]:
        """Reads an upright image in mode 'L' or 'RGB', and its label; raises UnreadableImage."""
        label = index // _PER_CLASS if self.class_names else 0
        return to_channels(Image.fromarray(_pixels()[index]), channels), label
