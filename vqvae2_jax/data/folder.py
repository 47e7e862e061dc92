"""Images in a folder: one subfolder per class, or unlabeled.

    root/cat/one.jpg             classes: 'cat', 'dog' (sorted names are labels 0, 1)
    root/dog/poodle/two.PNG      any depth below the class folder
    root/three.webp              flat: no class folders, unlabeled

With data.splits=('train', 'val', 'test') each of root/train, root/val and root/test is such a folder.
"""

import collections
import functools
import os

import numpy as np
from PIL import Image

from vqvae2_jax.data import outputs
from vqvae2_jax.data.decode import SUFFIXES, decode_image

_SPLIT_LIKE = {'train', 'training', 'val', 'valid', 'validation', 'test'}


def list_images(root: str, ignored: collections.Counter | None = None) -> list[str]:
    """Lists all images below a folder; hidden files and folders are left out.

    Args:
      root: the folder.
      ignored: counts the other files by suffix, in lower case and with its dot, or 'without suffix'.

    Returns:
      Paths relative to `root`, sorted.
    """
    images = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith('.')]
        for name in files:
            if name.startswith('.'):
                continue
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES:
                images.append(os.path.relpath(os.path.join(folder, name), root))
            elif ignored is not None:
                # Messages have one line and can be printed.
                is_word = len(suffix) > 1 and suffix.isprintable() and ' ' not in suffix
                ignored[suffix if is_word else 'without suffix'] += 1
    return sorted(images)


def find_images(root: str, field: str, shown: str | None = None) -> list[str]:
    """Lists all images below a folder, as `list_images`, and prints how many other files it ignores.

    Args:
      root: the folder.
      field: name of the config field, for the error.
      shown: the folder's name in messages, if `root` is a local copy.

    Raises:
      ValueError: there are no images; the message names the suffixes of the other files.
    """
    ignored = collections.Counter()
    files, shown = list_images(root, ignored), shown or root
    if not files:
        instead = f', only {_suffixes(ignored)}' if ignored else ''
        raise ValueError(f'{field}: no images in {shown!r}{instead} (looked for {", ".join(SUFFIXES)} in any case).')
    outputs.refuse(root, {os.path.dirname(file) for file in files}, field)
    if ignored:
        count = ignored.total()
        _print_once(f'{shown!r}: ignored {count} file{"s" * (count != 1)}: {_suffixes(ignored)}')
    return files


@functools.cache
def _print_once(line: str) -> None:
    # several splits may come from one folder
    print(line, flush=True)


def _suffixes(counts: collections.Counter, limit: int = 8) -> str:
    """'3 .heic, 2 .txt': the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ', '.join(f'{count} {suffix}' for suffix, count in ordered[:limit]) + ', ...' * (len(ordered) > limit)


def subfolders(root: str) -> list[str]:
    """Returns the names of the folders directly in `root`, sorted, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.'))


class FilesDataset:
    """Unlabeled image files of one folder (an `images.Dataset`). It holds their names, not pixels."""

    stratify_by = None
    subfolder = ''  # the part of data.path that `root` is
    shown = None  # the folder's name in messages, if `root` is a local copy

    def __init__(self, root: str, files: list[str]):
        """`files`: paths relative to `root`."""
        self.root, self.files, self.class_names = root, files, ()
        self.labels = np.zeros(len(files), np.int32)

    def __len__(self) -> int:
        return len(self.files)

    def example_name(self, index: int) -> str:
        """Returns the path or name of an image, for messages."""
        return os.path.join(self.shown or self.root, self.files[index])

    def fingerprint(self, indices: np.ndarray) -> bytes:
        """Returns bytes that identify these images, their order and their labels, wherever the data are."""
        names = '\0'.join([self.subfolder, *(self.files[i] for i in indices), ''])  # no file name holds a NUL
        return names.encode('utf-8', 'surrogateescape') + self.labels[indices].astype('<i4').tobytes()

    def read(self, index: int, channels: int) -> tuple[Image.Image, int]:
        """Reads an upright image in mode 'L' or 'RGB', and its label; raises UnreadableImage."""
        with open(os.path.join(self.root, self.files[index]), 'rb') as file:
            data = file.read()
        return decode_image(data, channels, self.example_name(index)), int(self.labels[index])


class FolderDataset(FilesDataset):
    """The images below one folder, labeled by its class folders if it has any."""

    def __init__(
        self,
        root: str,
        num_classes: int,
        class_names: tuple[str, ...] | None = None,
        subfolder: str = '',
        shown: str | None = None,
    ):
        """Lists the folder.

        Args:
          root: the folder.
          num_classes: 0 ignores the folder structure, every label is 0; otherwise the number of class folders (1 also
            fits a flat folder).
          class_names: the classes to use (those of the training split); None: the class folders of `root`.
          subfolder: name of `root` below data.path; '': `root` is data.path.
          shown: the folder's name in messages, if `root` is a local copy.

        Raises:
          FileNotFoundError: no such folder.
          ValueError: no images at all or in a class folder, or the class folders do not fit num_classes.
        """
        if not os.path.isdir(root):
            raise FileNotFoundError(f'data.path: there is no folder {root!r}.')
        super().__init__(os.path.normpath(root), find_images(root, 'data.path', shown))
        self.subfolder, self.shown = subfolder, shown
        folders = [path.split(os.sep)[0] if os.sep in path else '' for path in self.files]
        self.class_names = self._classes(sorted(set(folders)), num_classes, class_names)
        label_of = {name: label for label, name in enumerate(self.class_names)}
        self.labels = np.array([label_of.get(folder, 0) for folder in folders], np.int32)

    def _classes(self, folders: list[str], num_classes: int, class_names: tuple[str, ...] | None) -> tuple[str, ...]:
        if num_classes == 0:
            return ()
        if folders == [''] and num_classes == 1:
            return (os.path.basename(os.path.abspath(self.root)),)
        self._check_empty(sorted(set(subfolders(self.root)) - set(folders)), some_allowed=class_names is not None)
        if folders == ['']:
            raise ValueError(
                f'data.num_classes={num_classes}, but the images in {self.root!r} lie in no class folders: '
                'set --config.data.num_classes=0, or move the images of each class into a folder of their own.'
            )
        if folders[0] == '':
            stray = next(path for path in self.files if os.sep not in path)
            raise ValueError(
                f'data.path: {self.root!r} has {len(folders) - 1} class folders and also images outside of them, '
                f'such as {stray!r}: move those into a class folder, or set --config.data.num_classes=0 to ignore '
                'classes.'
            )
        known = tuple(folders) if class_names is None else class_names
        if len(known) != num_classes:
            hint = ''
            if set(folders) <= _SPLIT_LIKE:
                hint = ' These look like splits: name them in data.splits, as (train, validation, test).'
            raise ValueError(
                f'data.num_classes={num_classes}, but {self.root!r} has {len(known)} class folders: {_few(known)}. '
                f'Set --config.data.num_classes={len(known)}.{hint}'
            )
        if unknown := sorted(set(folders) - set(known)):
            raise ValueError(
                f'data.splits: {self.root!r} has class folders that the training split lacks: {_few(unknown)}; '
                f'the training split has {_few(known)}.'
            )
        return known

    def _check_empty(self, names: list[str], some_allowed: bool) -> None:
        """Refuses class folders without images; empty ones only unless `some_allowed`."""
        ignored = {name: collections.Counter() for name in names}
        for name, counts in ignored.items():
            list_images(os.path.join(self.root, name), counts)
        unread = [f'{name!r} (only {_suffixes(counts)})' for name, counts in ignored.items() if counts]
        where = f'data.path: class folders of {self.shown or self.root!r} without images'
        if unread:
            raise ValueError(
                f'{where}: {_join(unread)}. Convert these files, as only {", ".join(SUFFIXES)} are read, '
                'or move folders that are not classes elsewhere.'
            )
        if names and not some_allowed:
            raise ValueError(f'{where}: {_few(names)}. They hold no files: add images to them, or delete them.')


def open_folder(
    path: str, num_classes: int, subfolder: str | None, train_subfolder: str | None, shown: str | None = None
) -> FolderDataset:
    """Opens data.path, or one split's subfolder of it with the classes of the training split.

    Args:
      path: data.path.
      num_classes: see `FolderDataset`.
      subfolder: subfolder of this split; None: the whole of data.path.
      train_subfolder: subfolder of the training split.
      shown: the name of data.path in messages, if `path` is a local copy.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: as `FolderDataset`.
    """
    if subfolder is None:
        return FolderDataset(path, num_classes, shown=shown)
    if not os.path.isdir(path):
        raise FileNotFoundError(f'data.path: there is no folder {path!r}.')
    there = subfolders(path)
    for name in (subfolder, train_subfolder):
        if not os.path.isdir(os.path.join(path, name)):
            raise FileNotFoundError(f'data.splits names {name!r}, but {path!r} has {_few(there) or "no subfolders"}.')
    train = os.path.join(path, train_subfolder)
    # A flat training split has no class folders.
    class_names = tuple(subfolders(train)) if num_classes and subfolder != train_subfolder else None
    shown = os.path.join(shown, subfolder) if shown else None
    return FolderDataset(os.path.join(path, subfolder), num_classes, class_names or None, subfolder, shown)


def _few(names) -> str:
    return _join([repr(name) for name in names])


def _join(items: list[str], limit: int = 12) -> str:
    return ', '.join(items[:limit]) + (f', ... ({len(items)} in all)' if len(items) > limit else '')
