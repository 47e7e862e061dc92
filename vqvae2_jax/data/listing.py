"""The image files below a folder on a local disk: links, system folders, and folders that cannot be listed."""

import collections
import dataclasses
import heapq
import os
import stat
from collections.abc import Iterable
from typing import ClassVar

from vqvae2_jax.data import outputs
from vqvae2_jax.data.decode import SUFFIXES, read_file
from vqvae2_jax.io.names import printable

# Folders that operating systems and network drives make for thumbnails, deleted files and repairs, in lower case.
SYSTEM_FOLDERS = {
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

    def ignore(self, name: str) -> None:
        """Counts a file that is no image."""
        suffix = os.path.splitext(name)[1].lower()
        # Messages have one line and can be printed.
        is_word = len(suffix) > 1 and suffix.isprintable() and ' ' not in suffix
        self.ignored[suffix if is_word else 'without suffix'] += 1

    def notes(self) -> list[str]:
        """Returns what is left out, one line for each reason."""
        lines = []
        if count := self.ignored.total():
            lines.append(f'ignored {count} file{"s" * (count != 1)}: {count_text(self.ignored)}')
        if count := self.system_folders.total():
            lines.append(f'ignored {count} system folder{"s" * (count != 1)}: {count_text(self.system_folders)}')
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
    pending, links, seen = [''], [], parents([os.path.realpath(root)])
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
        if is_image(folder):
            named_like_images.append(folder)
        for entry in found:
            name = os.path.join(folder, entry.name)
            if _is_folder(entry):
                if entry.name.lower() in SYSTEM_FOLDERS:
                    listing.system_folders[printable(entry.name)] += 1
                elif not entry.name.startswith('.'):
                    if entry.is_symlink():
                        heapq.heappush(links, name)
                    else:
                        pending.append(name)
            elif entry.name.startswith('.'):
                continue
            elif is_image(name):
                listing.images.append(name)
            else:
                listing.ignore(name)
    if named_like_images:
        listing.images += set(named_like_images) - parents(listing.images)
    listing.images.sort()
    listing.repeated.sort()
    return listing


def is_image(path: str) -> bool:
    """Returns whether a name has the suffix of an image."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def parents(paths: Iterable[str]) -> set[str]:
    """Returns the folders, at any depth, that hold files."""
    found = set()
    for path in paths:
        while (path := os.path.dirname(path)) and path not in found:
            found.add(path)
    return found


def subfolders(root: str) -> list[str]:
    """Returns the names of the folders directly in `root`, sorted, without hidden ones and those of the system."""
    names = [entry.name for entry in os.scandir(root) if _is_folder(entry) and not entry.name.startswith('.')]
    return sorted(name for name in names if name.lower() not in SYSTEM_FOLDERS)


def class_folders(root: str) -> tuple[str, ...]:
    """Returns the names of the class folders of a split: its subfolders, without links that `list_images` ignores."""
    names = subfolders(root)
    if any(os.path.islink(os.path.join(root, name)) for name in names):
        repeated = set(list_images(root).repeated)
        names = [name for name in names if name not in repeated]
    return tuple(names)


def count_text(counts: collections.Counter, limit: int = 8) -> str:
    """Returns counts in words, the most frequent first, such as '3 .heic, 2 .txt'."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ', '.join(f'{count} {suffix}' for suffix, count in ordered[:limit]) + ', ...' * (len(ordered) > limit)


def few(names: Iterable[str], limit: int = 12) -> str:
    """Returns the first names, quoted, for messages."""
    return join([repr(name) for name in names], limit)


def join(items: list[str], limit: int = 12) -> str:
    """Returns the first items, and how many there are, for messages."""
    return ', '.join(items[:limit]) + (f', ... ({len(items)} in all)' if len(items) > limit else '')


@dataclasses.dataclass(frozen=True)
class LocalFolder:
    """A folder on a local disk (a `folder.Folder`).

    Attributes:
      path: its path.
    """

    path: str
    is_remote: ClassVar[bool] = False

    def exists(self) -> bool:
        """Returns whether it is a folder."""
        return os.path.isdir(self.path)

    def below(self, name: str) -> 'LocalFolder':
        """Returns a folder in it."""
        return LocalFolder(os.path.normpath(os.path.join(self.path, name)))

    def list_images(self) -> Listing:
        """Lists all images below it."""
        return list_images(self.path)

    def subfolders(self) -> list[str]:
        """Returns the names of the folders in it, sorted, without hidden ones and those of the system."""
        return subfolders(self.path)

    def class_folders(self) -> tuple[str, ...]:
        """Returns the names of its class folders."""
        return class_folders(self.path)

    def find_output(self, folders: Iterable[str]) -> tuple[str, str] | None:
        """Returns the first of some folders in it, or above them, that a job wrote, and that job; None: none is."""
        return outputs.find_output(self.path, folders)

    def read(self, file: str, example_name: str) -> bytes:
        """Reads a file below it; raises as `decode.read_file`."""
        return read_file(os.path.join(self.path, file), example_name)

    def size(self, file: str) -> int:
        """Returns the bytes of a file; 0 if there is none."""
        try:
            status = os.stat(os.path.join(self.path, file))
        except OSError:
            return 0
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
