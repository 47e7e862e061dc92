"""Labeled 8-bit images of one size: embedded, from a folder or .npz files, or from prepared datasets.

The embedded images are those of Fashion-MNIST. Prepared datasets are those of Hugging Face and TensorFlow Datasets.

`open_images` opens one split as a random-access source. Sources hold names and indices, not pixels, so they pickle
cheaply into grain's worker processes. Pixels are decoded and resized on access.

A dataset has all images; a split is a list of indices into it. With data.splits=() one dataset is split at random, in a
reproducible way; otherwise each split has its own dataset. In both cases the order of a split is random, since some
metrics and pictures use its first examples alone.
"""

import collections
import dataclasses
import functools
import hashlib
import operator
import os
from typing import ClassVar, Protocol

import numpy as np
from PIL import Image

from vqvae2_jax.data.arrays import ArraysDataset, is_arrays
from vqvae2_jax.data.decode import MAX_PIXELS, UnreadableImage, random_crop, resize_and_crop
from vqvae2_jax.data.fashion import FashionDataset
from vqvae2_jax.data.folder import FilesDataset, Folder, find_images, open_folder
from vqvae2_jax.data.huggingface import HuggingFaceDataset
from vqvae2_jax.data.listing import Listing, LocalFolder
from vqvae2_jax.data.outputs import IMAGE_JOBS
from vqvae2_jax.data.remote_folder import open_remote_folder
from vqvae2_jax.data.splits import SPLITS, random_split
from vqvae2_jax.data.tfds_records import TfdsDataset
from vqvae2_jax.io import names, remote


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """The images and their form; the fields of config.data, whose types and defaults are in config/base.py.

    Attributes:
      name: 'fashion', 'folder', 'npz', 'huggingface' or a TFDS name.
      path: the folder, the .npz file or a folder of some (with splits: their folder), the dataset of Hugging Face (see
        `huggingface.HuggingFaceDataset`), or the TFDS data_dir ('': TFDS's default).
      image_size: (height, width).
      channels: 1 or 3.
      num_classes: 0 is unlabeled: every label is 0 and there are no class names.
      splits: () splits one set of images at random by held_out (of datasets 'train'); otherwise the names of
        (train, validation, test): subfolders, .npz files, or split strings of datasets such as 'train[:95%]'. The same
        name may serve twice.
      held_out: fractions of the set for (validation, test).
      split_seed: seed of that split, and of the order of every split.
      flip: training only: mirror half of the images.
      crop: training only: crop at a random position from 1 to decode.CROP_ZOOM times the size.
      on_error: for images that cannot be opened or decoded: 'raise', or 'skip' them in the loader.
      max_pixels: a stored image with more pixels counts as one that cannot be decoded.
      check_all: see `inspection.inspect`.
      max_bytes: limit of the arrays of compressed .npz files, which are held in memory; 0: half of the free memory.
      cache_bytes: limit of the remote images that the local disk of a process keeps.
      workers: grain worker processes.

    Raises:
      ValueError: two fields contradict each other; the message names one as data.<field>.
    """

    name: str
    path: str
    image_size: tuple[int, int]
    channels: int
    num_classes: int
    splits: tuple[str, ...]
    held_out: tuple[float, float]
    split_seed: int
    flip: bool
    crop: bool
    on_error: str
    max_pixels: int
    check_all: bool
    max_bytes: int
    cache_bytes: int
    workers: int

    def __post_init__(self):
        built_in = self.name == 'fashion'
        self._require('path', not self.path or not built_in, "'', as data.name='fashion' is built in")
        is_text = self.path == self.path.encode(errors='ignore').decode()
        self._require(
            'path',
            is_text or self.name in ('folder', 'npz'),
            'in UTF-8, as prepared datasets are read by libraries that need it',
        )
        self._require('splits', not self.splits or not built_in, "() for data.name='fashion'")
        self._require('held_out', sum(self.held_out) < 1, 'two fractions (validation, test) with a sum below 1')

    def _require(self, field: str, holds, wanted: str):
        if not holds:
            raise ValueError(f'data.{field} is {getattr(self, field)!r}; it must be {wanted}')


class Dataset(Protocol):
    """All images of one origin, in a stable order.

    Attributes:
      class_names: names of the classes by label; () if unlabeled.
      stratify_by: None, or int [N]: a random split takes the same share of each value.
      labels: int [N]; None if there are none, or if they would take long to read.
    """

    class_names: tuple[str, ...]
    stratify_by: np.ndarray | None
    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def example_name(self, index: int) -> str:
        """Returns the path or name of an image, for messages."""

    def fingerprint(self, indices: np.ndarray) -> bytes:
        """Returns bytes that identify these images, their order and their labels, wherever the data are."""

    def content_length(self, index: int) -> int | None:
        """Returns the bytes of an image as it is stored; 0 if it cannot be read, None if it must be read for that."""

    def content(self, index: int) -> bytes:
        """Returns an image as it is stored; raises UnreadableImage."""

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
      crops: that many crops of every image follow, at random places: source[k N + i] is crop k of source[i].
      with_mirrored: all of these follow once more, in the same order, mirrored.
    """

    kind: ClassVar[str] = 'images'  # names the examples

    dataset: Dataset
    indices: np.ndarray
    image_size: tuple[int, int]
    channels: int
    on_error: str = 'raise'
    require_equal_size: bool = False
    crops: int = 0
    with_mirrored: bool = False

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label; () if unlabeled."""
        return self.dataset.class_names

    @property
    def labels(self) -> np.ndarray | None:
        """Labels int [N]; None if there are no classes, or if reading them takes long."""
        known = self.class_names and self.dataset.labels is not None
        return self.dataset.labels[self.indices] if known else None

    @property
    def is_remote(self) -> bool:
        """Whether reading an example waits for a network."""
        return getattr(self.dataset, 'is_remote', False)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) of the fingerprint of this split; no pixel is read for it."""
        return hashlib.sha256(self.dataset.fingerprint(self.indices)).hexdigest()

    def __len__(self) -> int:
        return len(self.indices) * (1 + self.crops) * (1 + self.with_mirrored)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.read(index)

    def example_name(self, index: int) -> str:
        """Returns the path or name of example `index`."""
        return self.dataset.example_name(int(self.indices[index % len(self.indices)]))

    def read(self, index: int, zoom: float = 1.0, offset: tuple[float, float] = (0.5, 0.5)) -> dict[str, np.ndarray]:
        """Reads source[index], cropped at `offset` from `zoom` times the size (see `decode.resize_and_crop`).

        Crops ignore both arguments: their places follow from `indices` alone.

        Raises:
          IndexError: no such example.
          UnreadableImage: it cannot be decoded.
          ValueError: it has another size than the first, and require_equal_size is set.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f'example {index} of a split of {len(self)}')
        mirrored, place = divmod(index, len(self.indices) * (1 + self.crops))
        crop, row = divmod(place, len(self.indices))
        image, label = self.dataset.read(int(self.indices[row]), self.channels)
        if crop:
            zoom, offset = random_crop(np.random.default_rng((int(self.indices[row]), crop)))
        if self.require_equal_size and (image.height, image.width) != tuple(self.image_size):
            raise ValueError(
                f'{names.printable(self.example_name(index))} has {image.height}x{image.width} pixels, but '
                f'the first image has {self.image_size[0]}x{self.image_size[1]}: '
                'all images of a set must have one size'
            )
        pixels = resize_and_crop(image, self.image_size, zoom, offset)
        return {
            'image': pixels[:, ::-1] if mirrored else pixels,
            'label': np.int32(label),
            'index': np.int64(index),
        }


def open_images(spec: ImageSpec, split: str, opened: dict | None = None) -> ImageSource:
    """Opens one split.

    Args:
      spec: the images.
      split: 'train', 'validation' or 'test'.
      opened: holds the datasets that several splits share, such as a folder, which takes long to list; the same dict
        for each of them. None: the dataset is opened again.

    Raises:
      ValueError: an unknown or empty split, no path, or data that does not fit the spec; the message names the field.
      FileNotFoundError: a folder or prepared dataset that is not there.
      ImportError: a TFDS name without tensorflow_datasets.
    """
    if split not in SPLITS:
        raise ValueError(f'split={split!r}: there are {", ".join(SPLITS)}.')
    if not spec.path and spec.name in ('folder', 'npz', 'huggingface'):  # jobs that read no images do without
        raise ValueError(f"data.path is ''; it must be the path of the images, as data.name is {spec.name!r}")
    named = spec.splits[SPLITS.index(split)] if spec.splits else None
    opened, key = {} if opened is None else opened, ('dataset', spec, named)
    if key not in opened:
        opened[key] = _open_named(spec, named)
    dataset = opened[key]
    if named:
        # In random order, since the order of a dataset is class by class.
        indices = np.random.RandomState(spec.split_seed).permutation(len(dataset))
    else:
        labels = dataset.labels if dataset.class_names else None
        indices = random_split(len(dataset), spec.held_out, spec.split_seed, dataset.stratify_by, labels)[split]
    if not len(indices):
        raise ValueError(
            f'data.held_out={spec.held_out} leaves the {split} split of {len(dataset)} images empty: '
            'change it, or name the splits in data.splits.'
        )
    return ImageSource(dataset, indices, spec.image_size, spec.channels, spec.on_error)


def _open_named(spec: ImageSpec, named: str | None) -> Dataset:
    """Opens the part of the images that data.splits names; None: all."""
    if spec.name == 'fashion':
        dataset = FashionDataset(spec.num_classes)
    elif spec.name == 'folder':
        train = spec.splits[0] if named else None
        options = {'on_error': spec.on_error, 'max_pixels': spec.max_pixels}
        folder = _open_folder(spec.path, spec.cache_bytes)
        dataset = open_folder(folder, spec.num_classes, named, train, **options)
    elif spec.name == 'npz':
        path = _local(spec.path)
        path = os.path.join(path, named) if named else path
        dataset = ArraysDataset(path, spec.num_classes, max_bytes=spec.max_bytes)
    elif spec.name == 'huggingface':
        path = spec.path if spec.path.startswith('hf://') else _local(spec.path)
        dataset = HuggingFaceDataset(path, named, spec.num_classes, spec.max_pixels)
    else:
        _check(spec.path, 'data.path')
        dataset = TfdsDataset(spec.name, spec.path, named, spec.num_classes, spec.max_pixels, spec.cache_bytes)
    _check_names(dataset.class_names)
    return dataset


def _check_names(class_names):
    if repeated := [name for name, count in collections.Counter(class_names).items() if count > 1]:
        labels = [label for label, name in enumerate(class_names) if name == repeated[0]]
        raise ValueError(
            f'data.path: the classes {", ".join(map(str, labels))} have one name, {repeated[0]!r}: give each class a '
            'name of its own, or set --config.data.num_classes=0 to ignore the classes.'
        )


def open_all(path: str, spec: ImageSpec, field: str) -> ImageSource:
    """Opens all images below a folder (sorted by name), of .npz files (in their order), or one image; unlabeled.

    Args:
      path: the folder or file.
      spec: size and channels.
      field: name of the config field, for messages.

    Raises:
      ValueError: there are no images.
      FileNotFoundError: there is no such file or folder.
    """
    dataset = _open_dataset(path, field, spec.on_error, spec.max_pixels, spec.max_bytes, spec.cache_bytes)
    return ImageSource(dataset, np.arange(len(dataset)), tuple(spec.image_size), spec.channels, spec.on_error)


def _open_dataset(path, field, on_error, max_pixels, max_bytes, cache_bytes, pattern=False):
    if remote.is_remote(path) and not path.endswith(('.npz', '.npy')):
        folder, name = _list_remote(path, cache_bytes, field)
        if name:
            return FilesDataset(folder, Listing([name]), max_pixels)
        found = folder.find_output(())
        if not found or found[1] not in IMAGE_JOBS:
            return FilesDataset(folder, find_images(folder, field, on_error), max_pixels)
    shown, path = path, _local(path, field, pattern)
    if is_arrays(path):
        if os.path.isdir(path):
            print(f'{field}: a job wrote {shown!r}; the images are those of its .npz files', flush=True)
        return ArraysDataset(path, 0, field, pattern=pattern, max_bytes=max_bytes)
    if not os.path.exists(path):
        raise FileNotFoundError(f'{field}: there is no file or folder {path!r}.')
    if os.path.isdir(path):
        folder = LocalFolder(path)
        return FilesDataset(folder, find_images(folder, field, on_error), max_pixels)
    return FilesDataset(LocalFolder(os.path.dirname(path) or '.'), Listing([os.path.basename(path)]), max_pixels)


def open_native_size(
    path: str,
    field: str,
    on_error: str = 'raise',
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = 0,
    cache_bytes: int = 0,
) -> ImageSource:
    """Opens all images of a folder or of .npz files, in RGB and at their own size, in a fixed random order.

    The order is random since some metrics use the first images, or blocks of them, which sorted by name would be of
    few classes. All images must have one size; reading one of another size raises ValueError.

    Args:
      path: the folder or file, or a pattern of .npz files if there is no such file.
      field: name of the config field, for messages.
      on_error: as in `ImageSource`.
      max_pixels: as in `ImageSpec`.
      max_bytes: as in `ImageSpec`.
      cache_bytes: as in `ImageSpec`.

    Raises:
      ValueError: there are no images; the first one cannot be read, with 'skip' none.
      FileNotFoundError: there is no such file or folder.
    """
    dataset = _open_dataset(path, field, on_error, max_pixels, max_bytes, cache_bytes, pattern=True)
    for index in range(len(dataset)):
        try:
            first, _ = dataset.read(index, 3)
            break
        except UnreadableImage:
            if on_error != 'skip' or index == len(dataset) - 1:
                raise
    order = np.random.RandomState(0).permutation(len(dataset))
    return ImageSource(dataset, order, (first.height, first.width), 3, on_error, require_equal_size=True)


def _open_folder(path, cache_bytes, field='data.path') -> Folder:
    if not remote.is_remote(path):
        _check(path, field)
        return LocalFolder(os.path.normpath(path))
    folder, name = _list_remote(path, cache_bytes, field)
    if name:
        raise FileNotFoundError(f'{field}: {path!r} is a file, not a folder.')
    return folder


def _list_remote(path, cache_bytes, field):
    _check(path, field)
    try:
        return open_remote_folder(path, cache_bytes)
    except OSError as error:
        raise FileNotFoundError(f'{field}: {error}') from error


@functools.cache
def _local(path, field='data.path', pattern=False):
    _check(path, field)
    try:
        return remote.local_copy(path, pattern=pattern)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f'{field}: {error}') from error


def _check(path, field):
    try:
        remote.check(path)
    except ValueError as error:
        raise FileNotFoundError(f'{field}: {error}') from error
