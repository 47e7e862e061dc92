"""Codes of any tokenizer, which replace stage 1: a directory of integer maps and labels with a description.

    codes.json               a JSON object with the fields of `codes.CodeSpec`
    train, validation, test  each of them in one of three forms, level 0 is the finest:
      <split>/               a store (codes.py), as `vqvae2_jax.write_codes` writes it
      <split>/codes_0.npy    integers [N, h, w], also codes_1.npy, ..., and label.npy, integers [N]
      <split>.npz            the same arrays in one file; those of a compressed file are held in memory

Without classes, labels are ignored and may be missing. A directory that --job=extract_codes has written, such as
runs/fashion/codes, is accepted without codes.json. docs/your_codes.md has examples.
"""

import collections
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vqvae2_jax.config.data_fields import MAX_CLASSES
from vqvae2_jax.config.fields import ConfigError, Int, Text, Tuple, show
from vqvae2_jax.data import codes
from vqvae2_jax.data.codes import CodeSource, CodeSpec
from vqvae2_jax.io import files, npz, record, regular, remote
from vqvae2_jax.io.record import Record

FILE = 'codes.json'
WRITER = 'write_codes'  # `job` of the records of the stores that this function writes
_LABEL = 'label'
_MAX_LEVELS = 16
_MAX_POSITIONS = 2**24  # of a map, as for the codes of stage 1
_MAX_JSON = 2**27  # bytes
_CHUNK = 2**26  # bytes of codes that are checked at once
_FIELDS = {
    'levels': Tuple(Text(True), range(1, _MAX_LEVELS + 1)),
    'shapes': Tuple(Tuple(Int(1, 2**14), (2,)), range(1, _MAX_LEVELS + 1)),
    'codebook_sizes': Tuple(Int(2, 2**20), range(1, _MAX_LEVELS + 1)),
    'num_classes': Int(0, MAX_CLASSES),
    'class_names': Tuple(Text(True), range(MAX_CLASSES + 1)),
}
# A level is a section of the config, a directory and a part of names in reports.
_LEVEL = re.compile(r'[A-Za-z][A-Za-z0-9_]{0,49}')


def make_spec(fields: Mapping[str, Any], origin: str) -> CodeSpec:
    """Checks all fields of a description of codes.

    Args:
      fields: those of `CodeSpec`. Names of classes may be missing; then they are unknown. The number of classes may be
        missing if their names are given.
      origin: the file or function that they come from, for messages.

    Raises:
      ValueError: a field is unknown, missing or not allowed, or two contradict each other; the message shows both.
    """
    if unknown := sorted(fields.keys() - _FIELDS.keys()):
        raise ValueError(f'{origin} has the unknown field {show(unknown[0])}; its fields are {", ".join(_FIELDS)}')
    fields = dict(fields)
    if 'class_names' in fields and 'num_classes' not in fields:
        fields['num_classes'] = len(_FIELDS['class_names'].check(f'{origin}: class_names', fields['class_names']))
    fields.setdefault('class_names', ())
    if missing := [name for name in _FIELDS if name not in fields]:
        raise ValueError(f'{origin} lacks the field {missing[0]}')
    spec = CodeSpec(**{name: field.check(f'{origin}: {name}', fields[name]) for name, field in _FIELDS.items()})
    lengths = {name: len(getattr(spec, name)) for name in ('levels', 'shapes', 'codebook_sizes')}
    if len(set(lengths.values())) > 1:
        counts = ', '.join(f'{name} has {count} items' for name, count in lengths.items())
        raise ValueError(f'{origin}: {counts}; each needs one per level, finest first')
    _check_level_names(spec.levels, origin)
    for level, (height, width) in zip(spec.levels, spec.shapes, strict=True):
        if height * width >= _MAX_POSITIONS:
            raise ValueError(f'{origin}: {level} has a {height}x{width} map; it must have fewer than 2**24 positions')
    names = spec.class_names
    if names and len(names) != spec.num_classes:
        raise ValueError(f'{origin}: class_names has {len(names)} items, but num_classes is {spec.num_classes}')
    if len(set(names)) < len(names):
        repeated = collections.Counter(names).most_common(1)[0][0]
        raise ValueError(f'{origin}: class_names holds {show(repeated)} twice; give each class a name of its own')
    return spec


def _check_level_names(levels, origin):
    for number, name in enumerate(levels):
        if not _LEVEL.fullmatch(name) or hasattr(ConfigDict, name):
            raise ValueError(
                f'{origin}: levels[{number}] is {show(name)}; it must be up to 50 letters, digits and _, of which the '
                'first is a letter, and no method of ConfigDict'
            )
    if len({name.lower() for name in levels}) < len(levels):
        raise ValueError(f'{origin}: levels is {list(levels)}; each level needs a name of its own, whatever the case')


def read_spec(directory: epath.PathLike) -> CodeSpec:
    """Reads the description of the codes in a directory.

    Args:
      directory: local or on a bucket; the value of codes.path.

    Raises:
      ConfigError: there is none, or it is not allowed; the message names the file and the field.
    """
    directory = os.fspath(directory)
    try:
        # On a bucket the answer takes long, and jobs ask often.
        return _read_spec_once(directory) if remote.is_remote(directory) else _read_spec(directory)
    except (ValueError, OSError) as error:
        raise ConfigError(f'codes.path: {error}') from error


def _read_spec(directory) -> CodeSpec:
    remote.check(directory)
    directory = _locate(directory)
    path = directory / FILE
    if not path.exists():
        return _spec_of_extraction(directory)
    return _read_json(path, None if remote.is_remote(path) else _state(path))


_read_spec_once = functools.cache(_read_spec)


def _spec_of_extraction(directory) -> CodeSpec:
    """Returns the spec of a directory that --job=extract_codes has written."""
    output = record.read_if_done(directory / 'train')
    if output is None or output.job not in (codes.JOB, codes.IMPORT_JOB):
        raise ValueError(
            f'{directory / FILE} does not exist: give a directory that vqvae2_jax.{WRITER} or --job={codes.JOB} has '
            'written, or write this file (docs/your_codes.md)'
        )
    meta = codes.CodesMeta.from_results(output.results)
    fields = {name: getattr(meta, name) for name in ('shapes', 'codebook_sizes', 'num_classes', 'class_names')}
    levels = codes.level_names(len(meta.shapes))
    return make_spec({'levels': levels, **fields}, str(output.directory / record.FILE))


@functools.lru_cache(maxsize=16)
def _read_json(path, state) -> CodeSpec:
    """Returns the spec in a file; `state` differs if a local file has changed."""
    del state
    try:
        with path.open('rb') if remote.is_remote(path) else regular.open_file(path) as file:
            data = file.read(_MAX_JSON + 1)
        if len(data) > _MAX_JSON:
            raise ValueError(f'it has more than {_MAX_JSON} bytes')
        fields = json.loads(data)
        if not isinstance(fields, dict):
            raise ValueError('it is no JSON object')
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise ValueError(f'{path} cannot be read: {" ".join(str(reason).split())}') from error
    return make_spec(fields, str(path))


def _state(path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def open_split(directory: epath.PathLike, split: str, spec: CodeSpec) -> 'CodeSource | ArrayCodes':
    """Opens one split. Arrays are checked wholly, and again only if their files change; a store has checksums instead.

    Args:
      directory: the codes.
      split: 'train', 'validation' or 'test'.
      spec: describes the codes.

    Raises:
      ValueError: there is no such split, or it is not as the spec says; the message shows both sides.
      JobError: a store is damaged or not finished.
    """
    path = _find_split(directory, split)
    if (path / record.FILE).exists():
        return _open_store(path, spec)
    return _open_arrays(os.fspath(path), spec, None if remote.is_remote(path) else _states(path))


def stored_split(directory: epath.PathLike, split: str) -> Record | None:
    """Returns the record of a split that is a store, with checksums; None if it is arrays. Raises as `open_split`."""
    path = _find_split(directory, split)
    return record.read_done(path, WRITER) if (path / record.FILE).exists() else None


def _locate(directory) -> epath.Path:
    # Local folders and gs:// are read in place, other addresses are copied.
    directory = os.fspath(directory)
    in_place = not remote.is_remote(directory) or directory.startswith('gs://')
    return remote.absolute(directory if in_place else remote.local_copy(directory))


def _find_split(directory, split) -> epath.Path:
    directory = _locate(directory)
    found = [path for path in (directory / f'{split}.npz', directory / split) if path.exists()]
    if len(found) != 1:
        there = ' and '.join(map(str, found)) or 'neither'
        raise ValueError(
            f'codes.path: {directory} has {there}: give the {split} split as {split}.npz, as a folder {split} of '
            f'codes_0.npy, ... and label.npy, or as a store by vqvae2_jax.{WRITER}'
        )
    return found[0]


def _states(path) -> tuple:
    """Returns a value that differs if a local file, or one in a local folder, has changed."""
    if not path.is_dir():
        return _state(path)
    return tuple((name, _state(path / name)) for name in sorted(files.list_names(path)))


def _open_store(path, spec) -> CodeSource:
    source = CodeSource(path, job=WRITER)
    for name in ('shapes', 'codebook_sizes', 'num_classes'):
        if getattr(source.meta, name) != getattr(spec, name):
            raise ValueError(
                f'{path} has {name}={getattr(source.meta, name)}, but {FILE} says {getattr(spec, name)}: write both '
                f'by vqvae2_jax.{WRITER}'
            )
    return source


@functools.lru_cache(maxsize=8)
def _open_arrays(path, spec, state) -> 'ArrayCodes':
    del state
    return ArrayCodes(path, spec)


class ArrayCodes:
    """One split of codes in arrays as a random-access source with the examples of `CodeSource`.

    Arrays of .npy files and of uncompressed .npz files stay on disk; only the part that is read is in memory. The order
    of the examples is random, as that of images is, and 'index' is the position in the arrays.

    Attributes:
      kind: names the examples.
      class_names: names by label; () if they are unknown or if there are no classes.
      digest: identifies all codes and labels, as 64 hex digits.
    """

    kind = 'codes'
    class_names: tuple[str, ...]
    digest: str

    def __init__(self, path: epath.PathLike, spec: CodeSpec):
        """Opens a split and checks all of its codes and labels.

        Args:
          path: the .npz file, or the folder of .npy files; local or on a bucket.
          spec: describes the codes.

        Raises:
          ValueError: an array is missing, or not as the spec says; the message names the file and shows both sides.
        """
        path = os.fspath(path)
        expected = {f'codes_{n}': each for n, each in enumerate(zip(spec.shapes, spec.codebook_sizes, strict=True))}
        if spec.num_classes:
            expected[_LABEL] = (), spec.num_classes
        self._arrays = _read_arrays(path, expected)
        self._count = len(self._arrays['codes_0']) if self._arrays['codes_0'].ndim else 0
        self.class_names = spec.class_names
        for name, (shape, _) in expected.items():  # all that is quick comes first
            _check_form(path, name, self._arrays[name], (self._count, *shape))
        sha = hashlib.sha256()
        for name, (_, size) in expected.items():
            array = self._arrays[name]
            sha.update(f'{name} {array.dtype.str} {array.shape}\n'.encode())
            for start, part in _chunks(array):
                check_range(f'{path}: {name}', range(start, start + len(part)), part, size, FILE)
                sha.update(part.reshape(-1).view(np.uint8))
        self.digest = sha.hexdigest()
        # RandomState, as NumPy promises that its stream will never change.
        self._order = np.random.RandomState(0).permutation(self._count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._count:
            raise IndexError(f'example {index} of {self._count}')
        row = self._order[index]
        example = {name: np.array(array[row], np.int32) for name, array in self._arrays.items()}
        return {_LABEL: np.int32(0), **example, 'index': np.int64(row)}

    def example_name(self, index: int) -> str:
        """Returns the name of the example that has this 'index': the number itself."""
        return str(index)


def _read_arrays(path, names) -> dict[str, np.ndarray]:
    """Opens the named arrays of a split; it may have no codes of other levels."""
    local = remote.local_copy(path)
    if path.endswith('.npz'):
        members = npz.read_members(local)
        there = set(members)
    else:
        there = {name.removesuffix('.npy') for name in os.listdir(local) if name.endswith('.npy')}
    if missing := [name for name in names if name not in there]:
        raise ValueError(
            f'{path} has no array {missing[0]!r}; {FILE} asks for {", ".join(names)}, and there is '
            f'{", ".join(sorted(there)) or "none"}'
        )
    if more := sorted(name for name in there - set(names) if re.fullmatch(r'codes_\d+', name)):
        raise ValueError(f'{path} has the array {more[0]!r}, but {FILE} asks for {", ".join(names)} only')
    if not path.endswith('.npz'):
        return {name: npz.map_npy(os.path.join(local, f'{name}.npy')) for name in names}
    held = npz.read(local, [name for name in names if not members[name].is_mappable])
    return {name: held[name] if name in held else npz.memory_map(local, members[name]) for name in names}


def _check_form(path, name, array, expected):
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f'{path}: {name} has the dtype {array.dtype}; it must be one of integers')
    if array.ndim != len(expected) or array.shape[1:] != expected[1:]:
        form = ', '.join(['N', *map(str, expected[1:])])
        raise ValueError(f'{path}: {name} has the shape {list(array.shape)}, but {FILE} says [{form}]')
    if len(array) != expected[0]:
        raise ValueError(f'{path}: {name} has {len(array)} examples, but codes_0 has {expected[0]}')
    if not len(array):
        raise ValueError(f'{path}: {name} has no examples; each split needs at least one')


def check_range(name: str, rows: Sequence[int], values: np.ndarray, size: int, origin: str) -> None:
    """Checks that codes or labels are in their range.

    Args:
      name: name of the array in messages.
      rows: indices of these values in the array, [N].
      values: integers [N, ...].
      size: codebook size, or number of classes.
      origin: where the size is given.

    Raises:
      ValueError: one is not; the message has its place.
    """
    if not values.size or 0 <= values.min() <= values.max() < size:
        return
    first, *position = np.argwhere((values < 0) | (values >= size))[0].tolist()
    place, value = ', '.join(map(str, (rows[first], *position))), values[first, *position]
    raise ValueError(f'{name}[{place}] is {value}, but with the size {size} in {origin} it must be 0 to {size - 1}')


def _chunks(array) -> Iterator[tuple[int, np.ndarray]]:
    """Yields parts of an array with the index of their first example; only one of them is in memory."""
    rows = max(_CHUNK // max(array[:1].nbytes, 1), 1)
    for start in range(0, len(array), rows):
        yield start, np.ascontiguousarray(array[start : start + rows])
