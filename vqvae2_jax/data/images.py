"""Labeled 8-bit images of one size, from the embedded Fashion-MNIST, a folder, an .npz file, or a TensorFlow Dataset.

`open_images` opens one split as a random-access source. Sources hold names and indices, not pixels, so they pickle
cheaply into grain's worker processes. Pixels are decoded and resized on access.

A dataset has all images; a split is a list of indices into it. With data.splits=() one dataset is split at random, in a
reproducible way; otherwise each split has its own dataset. In both cases the order of a split is random, since some
metrics and pictures use its first examples alone.
"""

import dataclasses
import functools
import hashlib
import numbers
import operator
import os
from typing import Protocol

import numpy as np
from PIL import Image

from vqvae2_jax.data.arrays import ArraysDataset
from vqvae2_jax.data.decode import resize_and_crop
from vqvae2_jax.data.fashion import FashionDataset
from vqvae2_jax.data.folder import FilesDataset, find_images, open_folder
from vqvae2_jax.data.tfds_records import TfdsDataset
from vqvae2_jax.io import gcs

SPLITS = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """Which images, and in what form. Built as ImageSpec(**config.data).

    Attributes:
      name: 'fashion', 'folder', 'npz' or a TFDS name.
      path: the folder, the .npz file (with splits: their folder), or the TFDS data_dir ('': TFDS's default).
      image_size: (height, width).
      channels: 1 or 3.
      num_classes: 0 is unlabelled: every label is 0 and there are no class names.
      splits: () cuts one pool at random by held_out (TFDS: the pool is 'train'); otherwise the names of (train,
        validation, test): subfolders, .npz files, or TFDS split strings such as 'train[:95%]'. The same name may serve
        twice.
      held_out: shares of the pool for (validation, test).
      split_seed: seed of that cut, and of the order of every split.
      flip: training only: mirror half of the images.
      crop: training only: crop at a random place from 1 to decode.CROP_ZOOM times the size.
      on_error: what to do with an undecodable image: 'raise', or 'skip' it in the loader.
      workers: grain worker processes.

    Raises:
      ValueError: a field is out of range; the message names it as data.<field>.
    """

    name: str
    path: str = ''
    image_size: tuple[int, int] = (28, 28)
    channels: int = 1
    num_classes: int = 0
    splits: tuple[str, ...] = ()
    held_out: tuple[float, float] = (0.1, 0.1)
    split_seed: int = 0
    flip: bool = False
    crop: bool = False
    on_error: str = 'raise'
    workers: int = 0

    def __post_init__(self):
        for field in ('image_size', 'splits', 'held_out'):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        size, held_out = self.image_size, self.held_out
        self._require('name', isinstance(self.name, str) and self.name, "'fashion', 'folder', 'npz' or a TFDS name")
        self._require('path', isinstance(self.path, str), 'a string')
        needed = self.name in ('folder', 'npz')
        self._require('path', self.path or not needed, f'the place of the images, as data.name is {self.name!r}')
        self._require('path', not self.path or self.name != 'fashion', "'', as data.name='fashion' is built in")
        pair = isinstance(size, tuple) and len(size) == 2
        self._require('image_size', pair and all(_is_int(n, 1) for n in size), 'two integers >= 1, (height, width)')
        self._require('channels', self.channels in (1, 3), '1 or 3')
        self._require('num_classes', _is_int(self.num_classes, 0), 'an integer >= 0')
        named = isinstance(self.splits, tuple) and all(isinstance(name, str) and name for name in self.splits)
        self._require('splits', named and len(self.splits) in (0, 3), '() or the names of (train, validation, test)')
        self._require('splits', not self.splits or self.name != 'fashion', "() for data.name='fashion'")
        pair = isinstance(held_out, tuple) and len(held_out) == 2
        shares = pair and all(isinstance(s, numbers.Real) and s >= 0 for s in held_out) and sum(held_out) < 1
        self._require('held_out', shares, 'two shares >= 0 (validation, test) that sum to less than 1')
        check_seed('data.split_seed', self.split_seed)
        self._require('flip', isinstance(self.flip, bool), 'a bool')
        self._require('crop', isinstance(self.crop, bool), 'a bool')
        self._require('on_error', self.on_error in ('raise', 'skip'), "'raise' or 'skip'")
        self._require('workers', _is_int(self.workers, 0), 'an integer >= 0')

    def _require(self, field: str, holds, wanted: str):
        if not holds:
            raise ValueError(f'data.{field}={getattr(self, field)!r}: must be {wanted}.')


def check_seed(field: str, value: object) -> None:
    """Raises ValueError, which names the field, unless the value is an integer in [0, 2**32).

    JAX would take the low 32 bits of a larger one: another seed than the one that is recorded.
    """
    if not _is_int(value, 0) or value >= 2**32:
        raise ValueError(f'{field} is {value!r}; a seed must be an integer from 0 to {2**32 - 1}')


def _is_int(value, minimum: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= minimum


class Dataset(Protocol):
    """All images of one origin, in a stable order.

    Attributes:
      class_names: by label; () if unlabeled.
      stratify_by: None, or int [N]: a random split takes the same share of each value.
    """

    class_names: tuple[str, ...]
    stratify_by: np.ndarray | None

    def __len__(self) -> int: ...

    def example_name(self, index: int) -> str:
        """Returns the path or name of an image, for messages."""

    def fingerprint(self, indices: np.ndarray) -> bytes:
        """Returns bytes that identify these images, their order and their labels, wherever the data are."""

    def read(self, index: int, channels: int) -> tuple[Image.Image, int]:
        """Reads an upright image in mode 'L' or 'RGB', and its label; raises UnreadableImage."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSource:
    """One split. source[i] is {'image': uint8 [H, W, C], 'label': int32, 'index': int64}; 'index' is i.

    Attributes:
      dataset: the images.
      indices: int64 [N], those of this split in the dataset.
      image_size: (H, W).
      channels: C.
      on_error: 'raise' or 'skip', for the loader; source[i] itself always raises UnreadableImage.
      require_equal_size: refuse images of another size than image_size instead of resizing and cropping them.
    """

    dataset: Dataset
    indices: np.ndarray
    image_size: tuple[int, int]
    channels: int
    on_error: str = 'raise'
    require_equal_size: bool = False

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label; () if unlabeled."""
        return self.dataset.class_names

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) of the fingerprint of this split; no pixel is read for it."""
        return hashlib.sha256(self.dataset.fingerprint(self.indices)).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.read(index)

    def example_name(self, index: int) -> str:
        """Returns the path or name of example `index`."""
        return self.dataset.example_name(int(self.indices[index]))

    def read(self, index: int, zoom: float = 1.0, offset: tuple[float, float] = (0.5, 0.5)) -> dict[str, np.ndarray]:
        """Reads source[index], cropped at `offset` from `zoom` times the size (see `decode.resize_and_crop`).

        Raises:
          IndexError: no such example.
          UnreadableImage: it cannot be decoded.
          ValueError: it has another size than the first, and require_equal_size is set.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f'example {index} of a split of {len(self)}')
        image, label = self.dataset.read(int(self.indices[index]), self.channels)
        if self.require_equal_size and (image.height, image.width) != tuple(self.image_size):
            raise ValueError(
                f'{self.example_name(index)} has {image.height}x{image.width} pixels, but '
                f'{self.dataset.example_name(0)} has {self.image_size[0]}x{self.image_size[1]}: '
                'all images of a set must have one size'
            )
        return {
            'image': resize_and_crop(image, self.image_size, zoom, offset),
            'label': np.int32(label),
            'index': np.int64(index),
        }


def open_images(spec: ImageSpec, split: str) -> ImageSource:
    """Opens one split.

    Args:
      spec: which images.
      split: 'train', 'validation' or 'test'.

    Raises:
      ValueError: an unknown or empty split, or data that does not fit the spec; the message names the field.
      FileNotFoundError: a folder or prepared dataset that is not there.
      ImportError: a TFDS name without tensorflow_datasets.
    """
    if split not in SPLITS:
        raise ValueError(f'split={split!r}: there are {", ".join(SPLITS)}.')
    named = spec.splits[SPLITS.index(split)] if spec.splits else None
    if spec.name == 'fashion':
        dataset = FashionDataset(spec.num_classes)
    elif spec.name == 'folder':
        train, shown = spec.splits[0] if named else None, spec.path if gcs.is_remote(spec.path) else None
        dataset = open_folder(_local(spec.path), spec.num_classes, named, train, shown)
    elif spec.name == 'npz':
        path = _local(spec.path)
        dataset = ArraysDataset(os.path.join(path, named) if named else path, spec.num_classes)
    else:
        dataset = TfdsDataset(spec.name, spec.path, named, spec.num_classes)
    if named:
        indices = np.random.RandomState(spec.split_seed).permutation(
            len(dataset)
        )  # a dataset's order is class by class
    else:
        indices = random_split(len(dataset), spec.held_out, spec.split_seed, dataset.stratify_by)[split]
    if not len(indices):
        raise ValueError(
            f'data.held_out={spec.held_out} leaves the {split} split of {len(dataset)} images empty: '
            'change it, or name the splits in data.splits.'
        )
    return ImageSource(dataset, indices, spec.image_size, spec.channels, spec.on_error)


def open_all(path: str, spec: ImageSpec, field: str) -> ImageSource:
    """Opens all images below a folder (sorted by name), of .npz files (in their order), or one image; unlabeled.

    Args:
      path: the folder or file.
      spec: size and channels.
      field: of the config, for messages.

    Raises:
      ValueError: there are no images.
      FileNotFoundError: there is no such file or folder.
    """
    shown, path = path, _local(path, field)
    if path.endswith('.npz'):
        dataset = ArraysDataset(path, num_classes=0, field=field)
    elif not os.path.exists(path):
        raise FileNotFoundError(f'{field}: there is no file or folder {path!r}.')
    elif os.path.isfile(path):
        dataset = FilesDataset(os.path.dirname(path) or '.', [os.path.basename(path)])
    else:
        dataset = FilesDataset(path, find_images(path, field, shown))
    return ImageSource(dataset, np.arange(len(dataset)), tuple(spec.image_size), spec.channels, spec.on_error)


def open_native_size(path: str, field: str) -> ImageSource:
    """Opens all images of a folder or of .npz files, in RGB and at their own size, in a fixed random order.

    The order is random since some metrics use the first images, or blocks of them, which sorted by name would be of
    few classes. All images must have one size; reading one of another size raises ValueError.

    Args:
      path: the folder or file.
      field: of the config, for messages.

    Raises:
      ValueError: there are no images.
      FileNotFoundError: there is no such file or folder.
    """
    source = open_all(path, ImageSpec('folder', path, channels=3), field)
    first, _ = source.dataset.read(0, 3)
    order = np.random.RandomState(0).permutation(len(source.dataset))
    return dataclasses.replace(source, indices=order, image_size=(first.height, first.width), require_equal_size=True)


@functools.cache
def _local(path, field='data.path'):
    try:
        gcs.check(path)
        return gcs.local_copy(path)
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(f'{field}: {error}') from error


def random_split(
    count: int, held_out: tuple[float, float], seed: int, stratify_by: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Splits range(count) at random; every prefix of a split is a random sample too.

    Args:
      count: number of images.
      held_out: shares for (validation, test); a share above 0 gets at least one example of each stratum.
      seed: of the random order.
      stratify_by: int [count]; the images of each value are split in the same shares. None: all together.

    Returns:
      {'train', 'validation', 'test'}: int64 indices, disjoint.
    """
    # RandomState, as NumPy promises that its stream will never change: neither will a split.
    generator = np.random.RandomState(seed)
    order = generator.permutation(count)
    groups = (
        [order] if stratify_by is None else [order[stratify_by[order] == value] for value in np.unique(stratify_by)]
    )
    splits = {split: [] for split in SPLITS}
    for group in groups:
        sizes = [max(1, round(share * len(group))) if share else 0 for share in held_out]
        validation, test, train = np.split(group, np.cumsum(sizes))
        for split, part in zip(SPLITS, (train, validation, test), strict=True):
            splits[split].append(part)
    return {split: generator.permutation(np.concatenate(parts)) for split, parts in splits.items()}
