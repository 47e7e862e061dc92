"""Images in a folder: one subfolder per class, or unlabeled.

    root/cat/one.jpg             classes: 'cat', 'dog' (sorted names are labels 0, 1)
    root/dog/poodle/two.PNG      any depth below the class folder
    root/three.webp              flat: no class folders, unlabeled

With data.splits=('train', 'val', 'test') each of root/train, root/val and root/test is such a folder.
"""

import collections
import dataclasses
import functools
import heapq
import os
import stat
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from vqvae2_jax.data import outputs
from vqvae2_jax.data.decode import MAX_PIXELS, SUFFIXES, decode_image, read_file
from vqvae2_jax.io.names import printable

_SPLIT_LIKE = {'train', 'training', 'val', 'valid', 'validation', 'test'}
# Folders that operating systems and network drives make for thumbnails, deleted files and repairs, in lower case.
_SYSTEM_FOLDERS = {
    '#recycle',
    '#snapshot',
    '$recycle.bin',
    '@__thumb',
    '@eadir',
    '@recently-snapshot',
    '@recycle',
    '@tmp',
    '__macosx',
    'found.000',
    'lost+found',
    'network trash folder',
    'recycler',
    'system volume information',
    'temporary items',
}


@dataclasses.dataclass
class Listing:
    """The files below a folder.

    Attributes:
      images: paths relative to the folder, sorted.
      ignored: number of other files by suffix, in lower case and with its dot, or 'without suffix'.
      system_folders: number of folders of thumbnails and the like by name; they are not listed.
      repeated: links to folders that are listed under another path, or that hold this folder, sorted.
      unlisted: {path of a folder: why it cannot be listed}.
    """

    images: list[str] = dataclasses.field(default_factory=list)
    ignored: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    system_folders: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    repeated: list[str] = dataclasses.field(default_factory=list)
    unlisted: dict[str, str] = dataclasses.field(default_factory=dict)

    def notes(self) -> list[str]:
        """Returns what is left out, one line for each reason."""
        lines = []
        if count := self.ignored.total():
            lines.append(f'ignored {count} file{"s" * (count != 1)}: {_counts(self.ignored)}')
        if count := self.system_folders.total():
            lines.append(f'ignored {count} system folder{"s" * (count != 1)}: {_counts(self.system_folders)}')
        if count := len(self.repeated):
            links = 'links' if count > 1 else 'link'
            lines.append(f'ignored {count} {links} to folders above or listed already: {few(self.repeated, 3)}')
        if count := len(self.unlisted):
            lines.append(f'{count} folder{"s" * (count != 1)} cannot be listed: {self._unlisted()}')
        return lines

    def _unlisted(self):
        path, reason = next(iter(self.unlisted.items()))
        return f'{path!r} ({reason})' + ', ...' * (len(self.unlisted) > 1)


def list_images(root: str) -> Listing:
    """Lists all images below a folder, without hidden files and folders. It follows links.

    Each folder is listed once, under its own path rather than a link's, and a link never leads to a folder above
    `root`. So links may form loops. A folder with an image's name is listed as an image if there are no images in it.

    Args:
      root: the folder.
    """
    listing, named_like_images = Listing(), []
    # Paths of folders still to list, relative to root. Links come last, so that they do not hide what they lead to.
    pending, links, seen = [''], [], _parents([os.path.realpath(root)])
    while pending or links:
        folder = pending.pop() if pending else heapq.heappop(links)
        path = os.path.join(root, folder)
        try:
            real = os.path.realpath(path)  # some file systems give two folders one inode number
            if real in seen:
                listing.repeated.append(folder)
                continue
            seen.add(real)
            with os.scandir(path) as entries:
                found = list(entries)
        except OSError as error:
            listing.unlisted[folder or '.'] = error.strerror or str(error)
            continue
        if _is_image(folder):
            named_like_images.append(folder)
        for entry in found:
            name = os.path.join(folder, entry.name)
            if _is_folder(entry):
                if entry.name.lower() in _SYSTEM_FOLDERS:
                    listing.system_folders[printable(entry.name)] += 1
                elif not entry.name.startswith('.'):
                    if entry.is_symlink():
                        heapq.heappush(links, name)
                    else:
                        pending.append(name)
            elif entry.name.startswith('.'):
                continue
            elif _is_image(name):
                listing.images.append(name)
            else:
                suffix = os.path.splitext(name)[1].lower()
                # Messages have one line and can be printed.
                is_word = len(suffix) > 1 and suffix.isprintable() and ' ' not in suffix
                listing.ignored[suffix if is_word else 'without suffix'] += 1
    if named_like_images:
        listing.images += set(named_like_images) - _parents(listing.images)
    listing.images.sort()
    listing.repeated.sort()
    return listing


def _is_image(path):
    return os.path.splitext(path)[1].lower() in SUFFIXES


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def _parents(paths: Iterable[str]) -> set[str]:
    """Returns the folders, at any depth, that hold files."""
    found = set()
    for path in paths:
        while (path := os.path.dirname(path)) and path not in found:
            found.add(path)
    return found


def find_images(root: str, field: str, shown: str | None = None, on_error: str = 'raise') -> Listing:
    """Lists all images below a folder, as `list_images`, and prints what it leaves out.

    Args:
      root: the folder.
      field: name of the config field, for the error.
      shown: the folder's name in messages, if `root` is a local copy.
      on_error: 'raise' refuses folders below `root` that cannot be listed; 'skip' leaves them out.

    Raises:
      ValueError: there are no images (the message names the suffixes of the other files), or a folder cannot be listed.
    """
    listing, shown = list_images(root), shown or root
    if listing.unlisted and (on_error == 'raise' or '.' in listing.unlisted):
        remedy = '' if '.' in listing.unlisted else ', or set --config.data.on_error=skip to leave out such folders'
        raise ValueError(f'{field}: {shown!r}: {listing.notes()[-1]}. Repair the permissions{remedy}.')
    if not listing.images:
        instead = f', only {_counts(listing.ignored)}' if listing.ignored else ''
        raise ValueError(f'{field}: no images in {shown!r}{instead} (looked for {", ".join(SUFFIXES)} in any case).')
    outputs.refuse(root, {os.path.dirname(file) for file in listing.images}, field)
    for line in listing.notes():
        _print_once(f'{shown!r}: {line}')
    return listing


@functools.cache
def _print_once(line: str) -> None:
    # several splits may come from one folder
    print(line, flush=True)


def _counts(counts: collections.Counter, limit: int = 8) -> str:
    """'3 .heic, 2 .txt': the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ', '.join(f'{count} {suffix}' for suffix, count in ordered[:limit]) + ', ...' * (len(ordered) > limit)


def subfolders(root: str) -> list[str]:
    """Returns the names of the folders directly in `root`, sorted, without hidden ones and those of the system."""
    names = [entry.name for entry in os.scandir(root) if _is_folder(entry) and not entry.name.startswith('.')]
    return sorted(name for name in names if name.lower() not in _SYSTEM_FOLDERS)


def class_folders(root: str) -> tuple[str, ...]:
    """Returns the names of the class folders of a split: its subfolders, without links that `list_images` ignores."""
    names = subfolders(root)
    if any(os.path.islink(os.path.join(root, name)) for name in names):
        repeated = set(list_images(root).repeated)
        names = [name for name in names if name not in repeated]
    return tuple(names)


class FilesDataset:
    """Unlabeled image files of one folder (an `images.Dataset`). It holds their names, not pixels."""

    stratify_by = None
    subfolder = ''  # the part of data.path that `root` is
    shown = None  # the folder's name in messages, if `root` is a local copy

    def __init__(self, root: str, listing: Listing, max_pixels: int = MAX_PIXELS):
        """Takes the images of `listing`, whose paths are relative to `root`; `max_pixels` is that of the config."""
        self.root, self.listing, self.files, self.class_names = root, listing, listing.images, ()
        self.labels, self._max_pixels = np.zeros(len(self.files), np.int32), max_pixels

    def __len__(self) -> int:
        return len(self.files)

    def example_name(self, index: int) -> str:
        """Returns the path or name of an image, for messages."""
        return os.path.join(self.shown or self.root, self.files[index])

    def fingerprint(self, indices: np.ndarray) -> bytes:
        """Returns bytes that identify these images, their order and their labels, wherever the data are."""
        names = '\0'.join([self.subfolder, *(self.files[i] for i in indices), ''])  # no file name holds a NUL
        return names.encode('utf-8', 'surrogateescape') + self.labels[indices].astype('<i4').tobytes()

    def content(self, index: int) -> bytes:
        """Returns the bytes of an image as it is stored; raises as `decode.read_file`."""
        return read_file(os.path.join(self.root, self.files[index]), self.example_name(index))

    def content_length(self, index: int) -> int:
        """Returns the bytes of an image file; 0 if there is none."""
        try:
            status = os.stat(os.path.join(self.root, self.files[index]))
        except OSError:
            return 0
        return status.st_size if stat.S_ISREG(status.st_mode) else 0

    def read(self, index: int, channels: int) -> tuple[Image.Image, int]:
        """Reads an upright image in mode 'L' or 'RGB', and its label; raises UnreadableImage."""
        return decode_image(self.content(index), channels, self.example_name(index), self._max_pixels), int(
            self.labels[index]
        )


class FolderDataset(FilesDataset):
    """The images below one folder, labeled by its class folders if it has any."""

    def __init__(
        self,
        root: str,
        num_classes: int,
        class_names: tuple[str, ...] | None = None,
        subfolder: str = '',
        shown: str | None = None,
        on_error: str = 'raise',
        max_pixels: int = MAX_PIXELS,
    ):
        """Lists the folder.

        Args:
          root: the folder.
          num_classes: 0 ignores the folder structure, every label is 0; otherwise the number of class folders (1 also
            fits a flat folder).
          class_names: the classes to use (those of the training split); None: the class folders of `root`.
          subfolder: name of `root` below data.path; '': `root` is data.path.
          shown: the folder's name in messages, if `root` is a local copy.
          on_error: data.on_error, see `find_images`.
          max_pixels: data.max_pixels, see `decode.decode_image`.

        Raises:
          FileNotFoundError: no such folder.
          ValueError: no images at all or in a class folder, or the class folders do not fit num_classes.
        """
        if not os.path.isdir(root):
            raise FileNotFoundError(f'data.path: there is no folder {root!r}.')
        super().__init__(os.path.normpath(root), find_images(root, 'data.path', shown, on_error), max_pixels)
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
        unlisted = [f'{path!r} ({why})' for path, why in self.listing.unlisted.items() if os.sep not in path]
        if unlisted and class_names is None:
            raise ValueError(
                f'data.path: class folders of {self.shown or self.root!r} cannot be listed: {_join(unlisted)}. Repair '
                'their permissions, move them elsewhere, or set --config.data.num_classes=0.'
            )
        left_out = {*folders, *self.listing.repeated, *self.listing.unlisted}
        self._check_empty(sorted(set(subfolders(self.root)) - left_out), some_allowed=class_names is not None)
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
                f'data.num_classes={num_classes}, but {self.root!r} has {len(known)} class folders: {few(known)}. '
                f'Set --config.data.num_classes={len(known)}.{hint}'
            )
        if unknown := sorted(set(folders) - set(known)):
            raise ValueError(
                f'data.splits: {self.root!r} has class folders that the training split lacks: {few(unknown)}; '
                f'the training split has {few(known)}.'
            )
        return known

    def _check_empty(self, names: list[str], some_allowed: bool) -> None:
        """Refuses class folders without images; empty ones only unless `some_allowed`."""
        ignored = {name: list_images(os.path.join(self.root, name)).ignored for name in names}
        unread = [f'{name!r} (only {_counts(counts)})' for name, counts in ignored.items() if counts]
        where = f'data.path: class folders of {self.shown or self.root!r} without images'
        if unread:
            raise ValueError(
                f'{where}: {_join(unread)}. Convert these files, as only {", ".join(SUFFIXES)} are read, '
                'or move folders that are not classes elsewhere.'
            )
        if names and not some_allowed:
            raise ValueError(f'{where}: {few(names)}. They hold no files: add images to them, or delete them.')


def open_folder(
    path: str, num_classes: int, subfolder: str | None, train_subfolder: str | None, **options: Any
) -> FolderDataset:
    """Opens data.path, or one split's subfolder of it with the classes of the training split.

    Args:
      path: data.path.
      num_classes: see `FolderDataset`.
      subfolder: subfolder of this split; None: the whole of data.path.
      train_subfolder: subfolder of the training split.
      **options: on_error, max_pixels; and shown, the name of data.path in messages, if `path` is a local copy.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: as `FolderDataset`.
    """
    if subfolder is None:
        return FolderDataset(path, num_classes, **options)
    if not os.path.isdir(path):
        raise FileNotFoundError(f'data.path: there is no folder {path!r}.')
    for name in (subfolder, train_subfolder):
        if not os.path.isdir(os.path.join(path, name)):
            there = few(subfolders(path)) or 'no subfolders'
            raise FileNotFoundError(f'data.splits names {name!r}, but {path!r} has {there}.')
    # A flat training split has no class folders.
    is_other = num_classes and subfolder != train_subfolder
    of_train = class_folders(os.path.join(path, train_subfolder)) if is_other else ()
    options['shown'] = os.path.join(shown, subfolder) if (shown := options.get('shown')) else None
    return FolderDataset(os.path.join(path, subfolder), num_classes, of_train or None, subfolder, **options)


def few(names: Iterable[str], limit: int = 12) -> str:
    """Returns the first names, quoted, for messages."""
    return _join([repr(name) for name in names], limit)


def _join(items: list[str], limit: int = 12) -> str:
    return ', '.join(items[:limit]) + (f', ... ({len(items)} in all)' if len(items) > limit else '')
