"""Writes the codes of any tokenizer for `base.get_config(codes=...)`, as stores (codes.py) with codes.json."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from numpy.typing import ArrayLike

from vqvae2_jax.config.fields import Float, Int, Tuple
from vqvae2_jax.data import codes, own_codes
from vqvae2_jax.data.images import SPLITS, random_split
from vqvae2_jax.data.own_codes import WRITER
from vqvae2_jax.data.shards import shard_ranges
from vqvae2_jax.io import files, record, remote

Maps = Sequence[ArrayLike]  # integers [N, h, w] of each level, finest first
_BATCH = 1024  # maps that are in memory at once


def write_codes(
    directory: epath.PathLike,
    maps: Maps | Mapping[str, Maps],
    labels: ArrayLike | Mapping[str, ArrayLike] | None = None,
    *,
    codebook_sizes: Sequence[int],
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    levels: Sequence[str] = (),
    held_out: tuple[float, float] = (0.1, 0.1),
    split_seed: int = 0,
    shard_size: int = 16_384,
) -> None:
    """Writes the codes of any tokenizer, on which priors can be trained without stage 1 (docs/your_codes.md).

    For example, of one level of 16x16 maps with 16 384 codes:

      write_codes('codes', [maps], labels, codebook_sizes=[16_384], class_names=['cat', 'dog'])

    Args:
      directory: a new or empty directory, also on a bucket.
      maps: the maps of each level, finest first, integers [N, h, w]. They may be memory maps: a part is read at a time.
        Or {'train': maps, 'validation': maps, 'test': maps}.
      labels: classes, integers [N], or {split: classes} if maps are given by split; None: there are no classes.
      codebook_sizes: of each level. Codes are 0 to size - 1.
      num_classes: number of classes; None: that of `class_names`.
      class_names: names of the classes by label; (): they have none.
      levels: names of the levels, finest first; (): ('top',), ('bottom', 'top'), ('bottom', 'middle', 'top') and so on.
      held_out: fractions of maps that are not given by split, for (validation, test), as data.held_out of images.
      split_seed: seed of that split, and of the order of every split.
      shard_size: maps a file.

    Raises:
      ValueError: an argument is not allowed or contradicts another one, a code or a label is not in its range, a split
        is empty, or the directory is not. Nothing is left of the directory then.
      WriteError: a file cannot be written.
    """
    splits = maps if isinstance(maps, Mapping) else {'': maps}
    labels = labels if isinstance(labels, Mapping) else dict.fromkeys(splits, labels)
    splits, labels = _checked_splits(splits, labels)
    first = next(iter(splits.values()))
    names = {'levels': tuple(levels) or codes.level_names(len(first)), 'class_names': tuple(class_names)}
    given = {} if num_classes is None else {'num_classes': num_classes}
    fields = {'shapes': [level.shape[1:] for level in first], 'codebook_sizes': tuple(codebook_sizes), **given}
    spec = own_codes.make_spec(names | fields, WRITER)
    _check_labels(labels, spec.num_classes)
    Int(1, 2**24).check(f'{WRITER}: shard_size', shard_size)
    parts = _choose_parts(splits, labels, held_out, split_seed)
    directory = remote.absolute(directory)
    if files.list_names(directory):
        raise ValueError(f'{directory} is not empty: give {WRITER} a new directory, or delete this one')
    try:
        for split, (given_as, indices) in parts.items():
            _write_split(directory / split, split, spec, splits[given_as], labels[given_as], indices, shard_size)
        files.write_json(directory / own_codes.FILE, dataclasses.asdict(spec))
    except BaseException:
        files.remove(directory)
        raise


def _checked_splits(splits, labels) -> tuple[dict[str, list], dict[str, np.ndarray | None]]:
    """Returns the arrays of every split and its labels, all of the right form."""
    if set(splits) not in ({''}, set(SPLITS)) or set(labels) != set(splits):
        raise ValueError(
            f'{WRITER}: maps are given for {sorted(splits)}, labels for {sorted(labels)}; give both for '
            f'{", ".join(SPLITS)}, or arrays that are split at random'
        )
    splits = {split: [_array(f'maps{_of(split)}', x) for x in maps] for split, maps in splits.items()}
    forms = {split: [level.shape[1:] for level in maps] for split, maps in splits.items()}
    if len({str(form) for form in forms.values()}) > 1 or any(not maps for maps in splits.values()):
        raise ValueError(f'{WRITER}: maps of the splits have the shapes {forms}; all need the same levels and sizes')
    labels = {split: None if x is None else np.asarray(x) for split, x in labels.items()}
    for split, maps in splits.items():
        classes, counts = labels[split], [len(level) for level in maps]
        if len(set(counts)) > 1 or not counts[0]:
            raise ValueError(f'{WRITER}: levels have {counts} maps{_of(split)}; all need one number of at least 1')
        if classes is not None and (classes.shape != (counts[0],) or not np.issubdtype(classes.dtype, np.integer)):
            form = f'{classes.dtype} {list(classes.shape)}'
            raise ValueError(f'{WRITER}: labels{_of(split)} are {form}; they must be integers [{counts[0]}]')
    return splits, labels


def _of(split):
    return f' of {split}' if split else ''


def _array(name, array):
    array = array if isinstance(getattr(array, 'dtype', None), np.dtype) else np.asarray(array)
    if len(array.shape) != 3 or not np.issubdtype(array.dtype, np.integer):
        form = f'{array.dtype} {list(array.shape)}'
        raise ValueError(f'{WRITER}: {name} hold an array {form}; a level needs integers [N, h, w]')
    return array


def _check_labels(labels, num_classes):
    for split, classes in labels.items():
        name = f'{WRITER}: labels{_of(split)}'
        if (classes is None) == bool(num_classes):
            there = 'there are none' if classes is None else f'there are {len(classes)}'
            raise ValueError(f'{name}: {there}, but the number of classes is {num_classes} (num_classes, class_names)')
        if classes is not None:
            own_codes.check_range(name, range(len(classes)), classes, num_classes, 'num_classes')


def _choose_parts(splits, labels, held_out, seed) -> dict[str, tuple[str, np.ndarray]]:
    """Returns for each split the key of its arrays and its indices in them, in random order."""
    Int(0, 2**32 - 1).check(f'{WRITER}: split_seed', seed)
    if '' not in splits:
        orders = {name: np.random.RandomState(seed).permutation(len(maps[0])) for name, maps in splits.items()}
        return {split: (split, orders[split]) for split in SPLITS}
    held_out = Tuple(Float(0, 1, high_open=True), (2,)).check(f'{WRITER}: held_out', held_out)
    count = len(splits[''][0])
    if sum(held_out) < 1:
        parts = random_split(count, held_out, seed, labels[''], labels[''])
    if sum(held_out) >= 1 or not all(map(len, parts.values())):
        raise ValueError(
            f'{WRITER}: held_out={held_out} leaves a split of {count} maps empty; change it, or give splits'
        )
    return {split: ('', indices) for split, indices in parts.items()}


def _write_split(directory, split, spec, maps, labels, indices, shard_size) -> None:
    """Writes one split as a store."""
    output = record.open_output(directory, WRITER, {}, {'split': split, 'shard_size': shard_size})
    output.start()
    ranges = shard_ranges(len(indices), shard_size)
    for number, (begin, end) in enumerate(ranges):
        path = codes.shard_path(directory, number, len(ranges))
        parts = np.split(indices[begin:end], range(_BATCH, end - begin, _BATCH))
        codes.write_shard(path, (_read_batch(spec, maps, labels, part) for part in parts), spec.codebook_sizes)
        output.add_files(path.name)
    meta = {name: getattr(spec, name) for name in ('shapes', 'codebook_sizes', 'num_classes', 'class_names')}
    output.finish(dataclasses.asdict(codes.CodesMeta(**meta, count=len(indices), split=split, shards=len(ranges))))


def _read_batch(spec, maps, labels, indices) -> dict[str, np.ndarray]:
    """Reads some examples, checks their codes and returns them as `codes.write_shard` takes them."""
    rows = np.sort(indices)  # some arrays, such as those of HDF5, are read in their order only
    places = np.searchsorted(rows, indices)
    levels = [np.asarray(level[rows]) for level in maps]
    for name, level, size in zip(spec.levels, levels, spec.codebook_sizes, strict=True):
        own_codes.check_range(f'{WRITER}: maps of {name}', rows, level, size, 'codebook_sizes')
    classes = np.zeros(len(rows), np.int32) if labels is None else labels[indices]
    return codes.name_levels(level[places] for level in levels) | {'label': classes, 'index': indices}
