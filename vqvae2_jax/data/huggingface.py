"""Image datasets of Hugging Face: folders that `save_to_disk` wrote, and datasets of the hub.

The library `datasets` reads them from memory-mapped Arrow files. Images go through the same decoder as image files.
"""

import functools
import hashlib
import os
import re
from typing import Any

import numpy as np
from PIL import Image

from vqvae2_jax.data.decode import MAX_PIXELS, UnreadableImage, decode_image, read_file
from vqvae2_jax.data.listing import few

_HUB = re.compile(
    r'(?:hf://datasets/)?(?P<name>\w[\w.-]*(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?(?::(?P<config>[\w.-]+))?'
)
_DEFAULT_SPLIT = 'train'
_BATCH = 1000  # rows that are read at once, without the bytes of their images
_MAX_HASHED = 256  # images whose bytes are part of the fingerprint


class HuggingFaceDataset:
    """One split of a dataset of images (an `images.Dataset`). It pickles as a list of Arrow files.

    The image column is 'image', or else the only one of type Image; the label column is 'label', or else the only one
    of type ClassLabel.
    """

    def __init__(self, path: str, split: str | None, num_classes: int, max_pixels: int = MAX_PIXELS):
        """Opens a dataset.

        Args:
          path: a local folder that `save_to_disk` of a Dataset or a DatasetDict wrote; or a dataset of the hub, as
            OWNER/NAME or OWNER/NAME@REVISION:CONFIG, with or without 'hf://datasets/' before it.
          split: a split such as 'train' or 'train[:95%]'; None: all of 'train', or of the only one.
          num_classes: 0 ignores the labels, every label is 0.
          max_pixels: data.max_pixels, see `decode.decode_image`.

        Raises:
          ImportError: the library is not installed.
          FileNotFoundError: there is no such folder or dataset.
          ValueError: no such split, no usable column, or another number of classes.
        """
        datasets = _import_datasets()
        rows, self.split = _open_split(datasets, path, split)
        self.path, self._max_pixels = path, max_pixels
        self._image = _find_column(rows, datasets.Image, 'image', f'data.path: {path!r}', 'cast_column')
        self._label, self.class_names = None, ()
        if num_classes:
            where = f'data.num_classes={num_classes}, but {path!r}'
            self._label = _find_column(rows, datasets.ClassLabel, 'label', where, 'class_encode_column')
            self.class_names = tuple(rows.features[self._label].names)
            if len(self.class_names) != num_classes:
                raise ValueError(
                    f'{where} has {len(self.class_names)} classes: '
                    f'set --config.data.num_classes={len(self.class_names)}.'
                )
        columns = [self._image, *([self._label] if self._label else [])]
        self._rows = rows.select_columns(columns).cast_column(self._image, datasets.Image(decode=False))
        self._lengths, labels = self._scan()
        # The image of a label that is none, such as -1 in a test split, counts as unreadable.
        self.labels = np.where((labels >= 0) & (labels < num_classes), labels, 0) if num_classes else None
        self.stratify_by = self.labels

    def _scan(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the bytes of every image (0: none), int64 [N], and every label (-1: none), int32 [N]."""
        import pyarrow.compute as pc

        lengths, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        for batch in self._rows.with_format('arrow').iter(_BATCH):
            stored = batch[self._image]
            found = pc.binary_length(pc.struct_field(stored, 'bytes')).fill_null(0).to_numpy().astype(np.int64)
            paths = pc.struct_field(stored, 'path')
            for row in np.flatnonzero(found == 0):  # images that are files of their own
                path = paths[int(row)].as_py()
                found[row] = os.path.getsize(path) if path and os.path.isfile(path) else 0
            lengths.append(found)
            if self._label:
                labels.append(batch[self._label].fill_null(-1).to_numpy().astype(np.int32))
        return np.concatenate(lengths), np.concatenate(labels)

    def __len__(self) -> int:
        return len(self._lengths)

    def example_name(self, index: int) -> str:
        """Returns the path or name of an image, for messages."""
        return f'{self.path}/{self.split} row {index}'

    @functools.cached_property
    def _digest(self) -> bytes:
        """Of the lengths of all images, the bytes of some, and all labels."""
        sha = hashlib.sha256(self._lengths.astype('<i8').tobytes())
        for index in np.unique(np.linspace(0, len(self) - 1, _MAX_HASHED).astype(int)) if len(self) else ():
            try:
                sha.update(hashlib.sha256(self.content(int(index))).digest())
            except UnreadableImage:  # it is raised again when the image is read
                continue
        if self.labels is not None:
            sha.update(self.labels.astype('<i4').tobytes())
        return sha.digest()

    def fingerprint(self, indices: np.ndarray) -> bytes:
        """Returns bytes that identify these images, their order and their labels, wherever the data are."""
        head = f'huggingface, {len(self)} images, {len(self.class_names)} classes\n'
        return head.encode() + self._digest + indices.astype('<i8').tobytes()

    def content_length(self, index: int) -> int:
        """Returns the bytes of an image as it is stored; 0 if there is none."""
        return int(self._lengths[index])

    def content(self, index: int) -> bytes:
        """Returns the bytes of an image as it is stored; raises UnreadableImage."""
        return self._bytes(self._rows[index], index)

    def read(self, index: int, channels: int) -> tuple[Image.Image, int]:
        """Reads an upright image in mode 'L' or 'RGB', and its label; raises UnreadableImage."""
        row, name = self._rows[index], self.example_name(index)
        label = row[self._label] if self._label else 0
        if self._label and (label is None or not 0 <= label < len(self.class_names)):
            raise UnreadableImage(name, f'it has the label {label}, not one of 0 to {len(self.class_names) - 1}')
        return decode_image(self._bytes(row, index), channels, name, self._max_pixels), label

    def _bytes(self, row: dict[str, Any], index: int) -> bytes:
        stored = row[self._image] or {}
        if stored.get('bytes'):
            return stored['bytes']
        if not stored.get('path'):
            raise UnreadableImage(self.example_name(index), 'the row has no image')
        return read_file(stored['path'], self.example_name(index))


def _import_datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"data.name='huggingface' needs the library datasets ({error}): pip install datasets"
        ) from error
    return datasets


def _open_split(datasets, path: str, split: str | None) -> tuple[Any, str]:
    """Returns the rows of a split, and the name of the split."""
    found = _open(datasets, path)
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {_DEFAULT_SPLIT: found}
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else _DEFAULT_SPLIT
    sizes = {name: len(rows) for name, rows in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise ValueError(f'data.splits: cannot read {split!r} of {path!r}, which has {sizes}: {error}') from error
    rows = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return rows[0] if len(rows) == 1 else datasets.concatenate_datasets(rows), split


def _open(datasets, path: str):
    """Opens all splits of a dataset."""
    if os.path.isdir(path):
        try:
            return datasets.load_from_disk(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f'data.path: {path!r} was not written by `save_to_disk` of the library datasets. A folder of images '
                'needs --config.data.name=folder; a dataset of the hub of this name is hf://datasets/OWNER/NAME.'
            ) from error
    if not (match := _HUB.fullmatch(path)):
        raise FileNotFoundError(f'data.path: there is no folder {path!r}, and no dataset of the hub has such a name.')
    try:
        return datasets.load_dataset(match['name'], match['config'], revision=match['revision'])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = ' '.join(str(error).split())
        raise FileNotFoundError(
            f'data.path: there is no folder {path!r}, and no dataset of the hub can be read by that name: {reason}'
        ) from error


def _find_column(rows, kind: type, preferred: str, where: str, remedy: str) -> str:
    """Returns the column of a kind that is called `preferred`, or the only one."""
    names = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if preferred in names or len(names) == 1:
        return preferred if preferred in names else names[0]
    if names:
        raise ValueError(
            f'{where} has several columns of type {kind.__name__}, {few(names)}: rename the one to use to '
            f'{preferred!r} by rename_column and save_to_disk.'
        )
    raise ValueError(
        f'{where} has no column of type {kind.__name__}, but {few(rows.features)}: make one by {remedy} and '
        'save_to_disk' + (', or set --config.data.num_classes=0.' if preferred == 'label' else '.')
    )
