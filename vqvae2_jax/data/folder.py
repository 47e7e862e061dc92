"""Images in a folder: one subfolder per class, or unlabeled.

    root/cat/one.jpg             classes: 'cat', 'dog' (sorted names are labels 0, 1)
    root/dog/poodle/two.PNG      any depth below the class folder
    root/three.webp              flat: no class folders, unlabeled

With data.splits=('train', 'val', 'test') each of root/train, root/val and root/test is such a folder.
"""

import functools
import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vqvae2_jax.data import outputs
from vqvae2_jax.data.decode import MAX_PIXELS, SUFFIXES, decode_image
from vqvae2_jax.data.listing import Listing, count_text, few, join

_SPLIT_LIKE = {'train', 'training', 'val', 'valid', 'validation', 'test'}


class Folder(Protocol):
    """A folder of images, on a local disk (`listing.LocalFolder`) or remote (`remote_folder.RemoteFolder`).

    Attributes:
      path: its path or address, for messages.
      is_remote: whether reading a file waits for a network.
    """

    path: str
    is_remote: bool

    def exists(self) -> bool:
        """Returns whether it is a folder."""

    def below(self, name: str) -> 'Folder':
        """Returns a folder in it."""

    def list_images(self) -> Listing:
        """Lists all images below it."""

    def subfolders(self) -> list[str]:
        """Returns the names of the folders in it, sorted, without hidden ones and those of the system."""

    def class_folders(self) -> tuple[str, ...]:
        """Returns the names of its class folders: its subfolders, without links that `list_images` ignores."""

    def find_output(self, folders: Iterable[str]) -> tuple[str, str] | None:
        """Returns the first of some folders in it, or above them, that a job wrote, and that job; None: none is."""

    def read(self, file: str, example_name: str) -> bytes:
        """Reads a file below it; raises as `decode.read_file`."""

    def size(self, file: str) -> int:
        """Returns the bytes of a file; 0 if there is none."""


def find_images(folder: Folder, field: str, on_error: str = 'raise') -> Listing:
    """Lists all images below a folder and prints what the listing leaves out.

    Args:
      folder: the folder.
      field: name of the config field, for the error.
      on_error: 'raise' refuses folders below it that cannot be listed; 'skip' leaves them out.

    Raises:
      ValueError: there are no images (the message names the suffixes of the other files), a folder cannot be listed, or
        a job wrote the images.
    """
    listing, shown = folder.list_images(), folder.path
    if listing.unlisted and (on_error == 'raise' or '.' in listing.unlisted):
        remedy = '' if '.' in listing.unlisted else ', or set --config.data.on_error=skip to leave out such folders'
        raise ValueError(f'{field}: {shown!r}: {listing.notes()[-1]}. Repair the permissions{remedy}.')
    if not listing.images:
        instead = f', only {count_text(listing.ignored)}' if listing.ignored else ''
        raise ValueError(f'{field}: no images in {shown!r}{instead} (looked for {", ".join(SUFFIXES)} in any case).')
    if found := folder.find_output({os.path.dirname(file) for file in listing.images}):
        raise ValueError(outputs.refusal(*found, field))
    for line in listing.notes():
        _print_once(f'{shown!r}: {line}')
    return listing


@functools.cache
def _print_once(line: str) -> None:
    # several splits may come from one folder
    print(line, flush=True)


def fingerprint_of(files: Sequence[str], labels: np.ndarray, subfolder: str = '') -> bytes:
    """Returns the `fingerprint` of image files.

    Args:
      files: their paths, relative to the folder.
      labels: int [N].
      subfolder: the part of data.path that the folder is; '': it is data.path.
    """
    names = '\0'.join([subfolder, *files, ''])  # no file name holds a NUL
    return names.encode('utf-8', 'surrogateescape') + labels.astype('<i4').tobytes()


class FilesDataset:
    """Unlabeled image files of one folder (an `images.Dataset`). It holds their names, not pixels.

    Attributes:
      folder: the folder.
      listing: the files below it.
      files: paths of the images relative to it.
    """

    stratify_by = None
    subfolder = ''  # the part of data.path that `folder` is

    def __init__(self, folder: Folder, listing: Listing, max_pixels: int = MAX_PIXELS):
        """Takes the images of `listing`, whose paths are relative to `folder`; `max_pixels` is that of the config."""
        self.folder, self.listing, self.files, self.class_names = folder, listing, listing.images, ()
        self.labels, self._max_pixels = np.zeros(len(self.files), np.int32), max_pixels

    def __len__(self) -> int:
        return len(self.files)

    @property
    def is_remote(self) -> bool:
        """Whether reading an image waits for a network."""
        return self.folder.is_remote

    def example_name(self, index: int) -> str:
        """Returns the path or name of an image, for messages."""
        return os.path.join(self.folder.path, self.files[index])

    def fingerprint(self, indices: np.ndarray) -> bytes:
        """Returns bytes that identify these images, their order and their labels, wherever the data are."""
        return fingerprint_of([self.files[i] for i in indices], self.labels[indices], self.subfolder)

    def content(self, index: int) -> bytes:
        """Returns the bytes of an image as it is stored; raises as `decode.read_file`."""
        return self.folder.read(self.files[index], self.example_name(index))

    def content_length(self, index: int) -> int:
        """Returns the bytes of an image file; 0 if there is none."""
        return self.folder.size(self.files[index])

    def read(self, index: int, channels: int) -> tuple[Image.Image, int]:
        """Reads an upright image in mode 'L' or 'RGB', and its label; raises UnreadableImage."""
        image = decode_image(self.content(index), channels, self.example_name(index), self._max_pixels)
        return image, int(self.labels[index])


class FolderDataset(FilesDataset):
    """The images below one folder, labeled by its class folders if it has any."""

    def __init__(
        self,
        folder: Folder,
        num_classes: int,
        class_names: tuple[str, ...] | None = None,
        subfolder: str = '',
        on_error: str = 'raise',
        max_pixels: int = MAX_PIXELS,
    ):
        """Lists the folder.

        Args:
          folder: the folder.
          num_classes: 0 ignores the folder structure, every label is 0; otherwise the number of class folders (1 also
            fits a flat folder).
          class_names: the classes to use (those of the training split); None: its class folders.
          subfolder: name of the folder below data.path; '': it is data.path.
          on_error: data.on_error, see `find_images`.
          max_pixels: data.max_pixels, see `decode.decode_image`.

        Raises:
          FileNotFoundError: no such folder.
          ValueError: no images at all or in a class folder, or the class folders do not fit num_classes.
        """
        if not folder.exists():
            raise FileNotFoundError(f'data.path: there is no folder {folder.path!r}.')
        super().__init__(folder, find_images(folder, 'data.path', on_error), max_pixels)
        self.subfolder = subfolder
        folders = [path.split(os.sep)[0] if os.sep in path else '' for path in self.files]
        self.class_names = self._classes(sorted(set(folders)), num_classes, class_names)
        label_of = {name: label for label, name in enumerate(self.class_names)}
        self.labels = np.array([label_of.get(folder, 0) for folder in folders], np.int32)

    def _classes(self, folders: list[str], num_classes: int, class_names: tuple[str, ...] | None) -> tuple[str, ...]:
        if num_classes == 0:
            return ()
        if folders == [''] and num_classes == 1:
            return (os.path.basename(os.path.abspath(self.folder.path)),)
        unlisted = [f'{path!r} ({why})' for path, why in self.listing.unlisted.items() if os.sep not in path]
        if unlisted and class_names is None:
            raise ValueError(
                f'data.path: class folders of {self.folder.path!r} cannot be listed: {join(unlisted)}. Repair '
                'their permissions, move them elsewhere, or set --config.data.num_classes=0.'
            )
        left_out = {*folders, *self.listing.repeated, *self.listing.unlisted}
        self._check_empty(sorted(set(self.folder.subfolders()) - left_out), some_allowed=class_names is not None)
        if folders == ['']:
            raise ValueError(
                f'data.num_classes={num_classes}, but the images in {self.folder.path!r} lie in no class folders: '
                'set --config.data.num_classes=0, or move the images of each class into a folder of their own.'
            )
        if folders[0] == '':
            stray = next(path for path in self.files if os.sep not in path)
            raise ValueError(
                f'data.path: {self.folder.path!r} has {len(folders) - 1} class folders and also images outside of '
                f'them, such as {stray!r}: move those into a class folder, or set --config.data.num_classes=0 to '
                'ignore classes.'
            )
        known = tuple(folders) if class_names is None else class_names
        if len(known) != num_classes:
            hint = ''
            if set(folders) <= _SPLIT_LIKE:
                hint = ' These look like splits: name them in data.splits, as (train, validation, test).'
            raise ValueError(
                f'data.num_classes={num_classes}, but {self.folder.path!r} has {len(known)} class folders: '
                f'{few(known)}. Set --config.data.num_classes={len(known)}.{hint}'
            )
        if unknown := sorted(set(folders) - set(known)):
            raise ValueError(
                f'data.splits: {self.folder.path!r} has class folders that the training split lacks: {few(unknown)}; '
                f'the training split has {few(known)}.'
            )
        return known

    def _check_empty(self, names: list[str], some_allowed: bool) -> None:
        """Refuses class folders without images; empty ones only unless `some_allowed`."""
        ignored = {name: self.folder.below(name).list_images().ignored for name in names}
        unread = [f'{name!r} (only {count_text(counts)})' for name, counts in ignored.items() if counts]
        where = f'data.path: class folders of {self.folder.path!r} without images'
        if unread:
            raise ValueError(
                f'{where}: {join(unread)}. Convert these files, as only {", ".join(SUFFIXES)} are read, '
                'or move folders that are not classes elsewhere.'
            )
        if names and not some_allowed:
            raise ValueError(f'{where}: {few(names)}. They hold no files: add images to them, or delete them.')


def open_folder(
    folder: Folder, num_classes: int, subfolder: str | None, train_subfolder: str | None, **options: Any
) -> FolderDataset:
    """Opens data.path, or one split's subfolder of it with the classes of the training split.

    Args:
      folder: data.path.
      num_classes: see `FolderDataset`.
      subfolder: subfolder of this split; None: the whole of data.path.
      train_subfolder: subfolder of the training split.
      **options: on_error and max_pixels.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: as `FolderDataset`.
    """
    if subfolder is None:
        return FolderDataset(folder, num_classes, **options)
    if not folder.exists():
        raise FileNotFoundError(f'data.path: there is no folder {folder.path!r}.')
    for name in (subfolder, train_subfolder):
        if not folder.below(name).exists():
            there = few(folder.subfolders()) or 'no subfolders'
            raise FileNotFoundError(f'data.splits names {name!r}, but {folder.path!r} has {there}.')
    # A flat training split has no class folders.
    is_other = num_classes and subfolder != train_subfolder
    of_train = folder.below(train_subfolder).class_folders() if is_other else ()
    return FolderDataset(folder.below(subfolder), num_classes, of_train or None, subfolder, **options)
