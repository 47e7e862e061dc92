"""TensorFlow Datasets prepared as ArrayRecord files, read without TensorFlow.

The records are tf.train.Example messages. Only the features 'image' and 'label' are read. Image bytes go through
the same decoder as image files.
"""

import concurrent.futures
import functools
import os
import re
import tempfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vqvae2_jax.data.decode import MAX_PIXELS, UnreadableImage, decode_image
from vqvae2_jax.data.remote_records import RemoteRecords, open_records
from vqvae2_jax.io import remote

_DEFAULT_SPLIT = 'train'
_SHARD = re.compile(r'\d{5}-of-\d{5}')  # in the name of a file of records
_THREADS = 32  # that read labels from a store; they wait most of the time
_MAX_LABELED = 50_000  # records that are read for their labels alone


def _import_tfds():
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "data.name: only 'fashion', 'folder', 'npz' and 'huggingface' are built in; other names are TensorFlow "
            'Datasets and need `pip install tensorflow-datasets`.'
        ) from error
    return tfds


class TfdsDataset:
    """One split of a TFDS dataset (an `images.Dataset`). It pickles as a list of file names."""

    stratify_by = None

    def __init__(
        self,
        name: str,
        data_dir: str,
        split: str | None,
        num_classes: int,
        max_pixels: int = MAX_PIXELS,
        cache_bytes: int = 0,
    ):
        """Opens a prepared dataset.

        Args:
          name: TFDS name, such as 'cifar10' or 'oxford_flowers102:2.1.1'.
          data_dir: directory in which it was prepared; '': TFDS's default.
          split: TFDS split string such as 'train[:95%]'; None is all of 'train'.
          num_classes: 0 ignores the labels, every label is 0.
          max_pixels: data.max_pixels, see `decode.decode_image`.
          cache_bytes: data.cache_bytes, of a remote data_dir: see `remote_records.open_records`.

        Raises:
          ImportError: tensorflow_datasets is not installed.
          FileNotFoundError: the dataset is not prepared, or not as ArrayRecord; the message says how to prepare it.
          ValueError: no such split, no usable 'image' or 'label' feature, or another number of classes.
        """
        tfds = _import_tfds()
        directory = data_dir or os.fspath(tfds.core.constants.DATA_DIR)
        root = remote.pinned(directory.rstrip('/')) if remote.is_remote(directory) else ''
        listed = _list_dataset(root, name) if root else []
        builder = _prepared_builder(tfds, name, _copy_metadata(listed, root) if root else directory, directory)
        features = dict(builder.info.features.items())
        image = features.get('image')
        if not isinstance(image, tfds.features.Image) or image.np_dtype not in ('uint8', 'uint16'):
            raise ValueError(f"data.name={name!r} has no 8- or 16-bit image feature called 'image': it has {features}.")
        self.name, self._max_pixels = name, max_pixels
        self._full_name = builder.info.full_name  # with the version, which `name` need not hold
        self.split = split or _DEFAULT_SPLIT
        self.class_names = _class_names(tfds, name, features, num_classes)
        try:
            self._records = builder.as_data_source(split=self.split, file_format='array_record').data_source
            if root:
                instructions = builder.info.splits[self.split].file_instructions
                self._records = _remote_records(instructions, listed, directory, cache_bytes)
        except ValueError as error:
            raise ValueError(
                f'data.splits: cannot read {self.split!r} of {name!r}, which has {sorted(builder.info.splits)}: {error}'
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    @property
    def is_remote(self) -> bool:
        """Whether reading a record waits for a network."""
        return isinstance(self._records, RemoteRecords)

    def example_name(self, index: int) -> str:
        """Returns the path or name of an image, for messages."""
        return f'{self.name}/{self.split} record {index}'

    def fingerprint(self, indices: np.ndarray) -> bytes:
        """Returns bytes that identify these images, their order and their labels, wherever the data are."""
        head = f'{self._full_name}/{self.split} of {len(self)}, {len(self.class_names)} classes\n'
        return head.encode() + indices.astype('<i8').tobytes()

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """The labels, int32 [N], 0 for unreadable records; None if that means to read more than 50,000 records."""
        if len(self) > _MAX_LABELED:
            return None
        with concurrent.futures.ThreadPoolExecutor(_THREADS if self.is_remote else 1) as pool:
            return np.array(list(pool.map(self._known_label, range(len(self)))), np.int32)

    def content_length(self, index: int) -> None:
        """Returns None, since the length is known only when the record is read."""

    def content(self, index: int) -> bytes:
        """Returns the bytes of an image as it is stored; raises UnreadableImage."""
        return self._encoded(self._features(index), index)

    def read(self, index: int, channels: int) -> tuple[Image.Image, int]:
        """Reads an upright image in mode 'L' or 'RGB', and its label; raises UnreadableImage."""
        features = self._features(index)
        image = self._encoded(features, index)
        return decode_image(image, channels, self.example_name(index), self._max_pixels), self._label(features, index)

    def _features(self, index):
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            return tf_example_pb2.Example.FromString(self._records[index]).features.feature
        except (DecodeError, RuntimeError) as error:  # ArrayRecord raises RuntimeError for damage
            reason = ' '.join(str(error).split())
            raise UnreadableImage(self.example_name(index), f'the record is damaged: {reason}') from error

    def _encoded(self, features, index) -> bytes:
        images = features['image'].bytes_list.value
        if len(images) != 1:
            raise UnreadableImage(self.example_name(index), f'the record holds {len(images)} images')
        return images[0]

    def _label(self, features, index) -> int:
        if not self.class_names:
            return 0
        labels = list(features['label'].int64_list.value)
        if len(labels) != 1 or not 0 <= labels[0] < len(self.class_names):
            reason = f'the record has the labels {labels}, not one of 0 to {len(self.class_names) - 1}'
            raise UnreadableImage(self.example_name(index), reason)
        return labels[0]

    def _known_label(self, index) -> int:
        try:
            return self._label(self._features(index), index)
        except UnreadableImage:  # it is raised again when the image is read
            return 0


def _list_dataset(root: str, name: str) -> list[remote.RemoteFile]:
    """Lists the files of a dataset in a remote data_dir; [] if there are none."""
    try:
        return remote.list_files(f'{root}/{re.split("[:/]", name)[0]}')
    except FileNotFoundError:
        return []


def _copy_metadata(listed: Sequence[remote.RemoteFile], root: str) -> str:
    """Copies the files that describe a dataset, all but its records, to a local data_dir; returns that."""
    described = [file for file in listed if not _SHARD.search(file.path)]
    return remote.copy_files(described, root, tempfile.mkdtemp(dir=remote.cache_folder()))


def _remote_records(instructions, listed, data_dir: str, cache_bytes: int) -> Sequence[bytes]:
    """Opens the records of a split in a remote data_dir.

    Args:
      instructions: TFDS's, of all files of the split: filename, skip, take.
      listed: the files of the dataset.
      data_dir: the address.
      cache_bytes: see `open_records`.

    Raises:
      FileNotFoundError: a file is missing.
    """
    by_name = {file.path.rpartition('/')[2]: file for file in listed}
    parts = [(os.path.basename(each.filename), each.skip, each.skip + each.take) for each in instructions]
    if missing := [name for name, _, _ in parts if name not in by_name]:
        raise FileNotFoundError(f'data.path: {data_dir} lacks the file {missing[0]!r} of the dataset')
    return open_records([(by_name[name], start, stop) for name, start, stop in parts], cache_bytes)


def _prepared_builder(tfds, name: str, data_dir: str, directory: str):
    """Returns the builder of a dataset that is prepared in a local `data_dir`, which messages call `directory`."""
    recipe = (
        f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare() "
        'once, where TensorFlow is installed (reading needs none), and set data.path to that data_dir.'
    )
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"data.name={name!r} is neither 'fashion' nor 'folder' nor 'npz' nor 'huggingface' nor a TensorFlow "
            f'Dataset: no such name is known to TFDS or prepared under data.path={directory!r}.'
        ) from error
    if not builder.info.splits:
        raise FileNotFoundError(f'data.name={name!r} is not prepared under data.path={directory!r}. Run {recipe}')
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if 'array_record' not in formats:
        raise FileNotFoundError(
            f'data.name={name!r} under data.path={directory!r} is prepared as {", ".join(sorted(formats))}, which has '
            f'no random access; needed is array_record. For another data_dir, run {recipe}'
        )
    return builder


def _class_names(tfds, name: str, features, num_classes: int) -> tuple[str, ...]:
    if num_classes == 0:
        return ()
    label = features.get('label')
    if not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(
            f"data.num_classes={num_classes}, but {name!r} has no class feature called 'label': it has {features}. "
            'Set --config.data.num_classes=0 to use it without labels.'
        )
    if label.num_classes != num_classes:
        raise ValueError(
            f'data.num_classes={num_classes}, but {name!r} has {label.num_classes} classes: '
            f'set --config.data.num_classes={label.num_classes}.'
        )
    return tuple(label.names)
