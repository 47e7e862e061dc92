"""Folders of images on gs://, s3:// and hf://: one listing, then one request for each image when it is read.

Images that fit data.cache_bytes are kept on the local disk, so that later epochs read them there. These are the first
ones of the listing: training reads every image equally often, so it does not matter which ones are kept, and all worker
processes know them without counting.
"""

import bisect
import contextlib
import functools
import hashlib
import os
import posixpath
from collections.abc import Iterable

import numpy as np

from vqvae2_jax.data import outputs
from vqvae2_jax.data.decode import UnreadableImage
from vqvae2_jax.data.listing import SYSTEM_FOLDERS, Listing, is_image, parents
from vqvae2_jax.io import record, remote
from vqvae2_jax.io.record import JobError


class RemoteFolder:
    """A folder as one listing found it (a `folder.Folder`). It pickles with the names, sizes and versions.

    Attributes:
      path: its address as it was given.
    """

    is_remote = True

    def __init__(self, path: str, root: str, names: list[str], facts: np.ndarray, cache: str):
        """Takes a listing; `open_remote_folder` makes one.

        Args:
          path: the address of the folder, for messages.
          root: the same; on hf:// with the commit that was listed.
          names: paths of all files relative to it, sorted.
          facts: of every file, a structured array [N] of 'size' (bytes), 'version' (see `remote.RemoteFile`), and
            'kept', whether the local disk keeps it.
          cache: the local folder that keeps files.
        """
        self.path, self._root, self._names, self._facts, self._cache = path, root, names, facts, cache

    def exists(self) -> bool:
        """Returns whether there is a file in it: stores have no empty folders."""
        return bool(self._names)

    def below(self, name: str) -> 'RemoteFolder':
        """Returns a folder in it."""
        name = posixpath.normpath(name)
        if name == '.':
            return self
        first, last = (bisect.bisect_left(self._names, name + end) for end in ('/', chr(ord('/') + 1)))
        names = [each[len(name) + 1 :] for each in self._names[first:last]]
        facts = self._facts[first:last]
        return RemoteFolder(f'{self.path}/{name}', f'{self._root}/{name}', names, facts, self._cache)

    def list_images(self) -> Listing:
        """Lists all images below it, by the rules of `listing.list_images`."""
        listing, listed = Listing(), {'': True}  # folder -> whether it is listed

        def is_listed(folder):
            if folder not in listed:
                above, _, last = folder.rpartition('/')
                listed[folder] = is_listed(above)
                if listed[folder] and last.lower() in SYSTEM_FOLDERS:
                    listing.system_folders[last] += 1
                    listed[folder] = False
                elif last.startswith('.'):
                    listed[folder] = False
            return listed[folder]

        for name in self._names:
            folder, _, last = name.rpartition('/')
            if not is_listed(folder) or last.startswith('.'):
                continue
            if is_image(name):
                listing.images.append(name)
            else:
                listing.ignore(name)
        named_like_images = {folder for folder, is_there in listed.items() if is_there and is_image(folder)}
        listing.images = sorted({*listing.images, *(named_like_images - parents(listing.images))})
        return listing

    def subfolders(self) -> list[str]:
        """Returns the names of the folders in it, sorted, without hidden ones and those of the system."""
        names = {name.partition('/')[0] for name in self._names if '/' in name}
        return sorted(name for name in names if not name.startswith('.') and name.lower() not in SYSTEM_FOLDERS)

    def class_folders(self) -> tuple[str, ...]:
        """Returns the names of its class folders: stores have no links."""
        return tuple(self.subfolders())

    def find_output(self, folders: Iterable[str]) -> tuple[str, str] | None:
        """Returns the first of some folders in it, or above them, that a job wrote, and that job; None: none is."""
        for folder in sorted({'', *folders, *parents(f'{folder}/x' for folder in folders)}):
            name = posixpath.join(folder, record.FILE)
            if 0 < self.size(name) <= outputs.MAX_BYTES and (job := outputs.job_in(self.read(name, name))):
                return posixpath.join(self.path, folder).rstrip('/'), job
        return None

    def read(self, file: str, example_name: str) -> bytes:
        """Reads a file, from the local disk if it is kept there.

        Raises:
          UnreadableImage: it is gone, or was replaced after the listing.
          JobError: the store does not answer, or refuses.
        """
        if (index := self._find(file)) is None:
            raise UnreadableImage(example_name, 'it is a folder')
        facts = self._facts[index]
        found = remote.RemoteFile(f'{self._root}/{file}', int(facts['size']), facts['version'].decode())
        path = os.path.join(self._cache, hashlib.sha256(f'{found.path}\n{found.version}'.encode()).hexdigest())
        if facts['kept']:
            with contextlib.suppress(FileNotFoundError), open(path, 'rb') as kept:
                return kept.read()
        try:
            data = remote.read(found)
        except remote.Replaced as error:
            raise UnreadableImage(example_name, 'it was deleted or replaced after the folder was listed') from error
        except OSError as error:
            raise JobError(f'{error}. Correct this; then the same command continues') from error
        if facts['kept']:
            with contextlib.suppress(OSError):  # without room, it is not kept
                _write(path, data)
        return data

    def size(self, file: str) -> int:
        """Returns the bytes of a file; 0 if there is none."""
        index = self._find(file)
        return 0 if index is None else int(self._facts[index]['size'])

    def _find(self, file):
        index = bisect.bisect_left(self._names, file)
        return index if index < len(self._names) and self._names[index] == file else None


def _write(path, data):
    """Writes a file that other threads and processes may write too."""
    part = f'{path}.{os.getpid()}.{os.urandom(4).hex()}'
    try:
        with open(part, 'xb') as file:
            file.write(data)
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


@functools.cache
def open_remote_folder(path: str, cache_bytes: int) -> tuple[RemoteFolder, str]:
    """Lists a folder, once for as long as this process lives.

    Args:
      path: the address of a folder or a file.
      cache_bytes: limit of the images that the local disk keeps; it is at most half of the free space.

    Returns:
      The folder and ''; if there is a file at the address, its folder with that file alone, and its name.

    Raises:
      FileNotFoundError: there is nothing.
      OSError: the store does not answer, or refuses.
    """
    path = path.rstrip('/')
    root = remote.pinned(path)
    listed = remote.list_files(root)
    name = ''
    if [file.path for file in listed] == [root]:
        root, _, name = root.rpartition('/')
        path = path.rpartition('/')[0]
    names = [file.path.removeprefix(f'{root}/') for file in listed]
    cache = remote.cache_folder()
    versions = [file.version.encode() for file in listed]
    kinds = [('size', '<i8'), ('version', f'S{max(1, *map(len, versions))}'), ('kept', '?')]
    facts = np.zeros(len(names), kinds)
    facts['size'], facts['version'] = [file.size for file in listed], versions
    images = np.array([is_image(name) for name in names])
    facts['kept'] = images & (np.cumsum(facts['size'] * images) <= remote.cache_limit(cache_bytes))
    return RemoteFolder(path, root, names, facts, cache), name
