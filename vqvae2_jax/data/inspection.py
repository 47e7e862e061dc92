"""Facts about the images of a run, found before a training: counts, sizes, brightness, unreadable images and copies."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vqvae2_jax.data.decode import UnreadableImage
from vqvae2_jax.data.folder import FilesDataset
from vqvae2_jax.data.images import ImageSource
from vqvae2_jax.io.names import printable
from vqvae2_jax.io.progress import Progress

MAX_DECODED = 2000  # images of a split that are decoded
MAX_COMPARED = 50_000  # images of all splits; of a larger set, fewer files are compared
MAX_FILES = 5000  # files of a larger set that are compared
MAX_READ = 2**33  # bytes of images that are compared
DARK = 64  # an image is dark if 99.9 % of its pixels have at most this value, of 255
_UNKNOWN = -1  # length of an image in a record
_SAMPLED = 32  # records that are read for the mean of that length
_THREADS = min(max(os.cpu_count() or 1, 4), 16)  # each holds one decoded image
_MAX_ROWS = 20  # of the table of classes
_MAX_NAMED = 5  # unreadable images whose names are kept


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """Properties of one image: (height, width) as stored, and brightness from 0 to 255; or why it is unreadable."""

    size: tuple[int, int] = (0, 0)
    mean: float = 0.0
    brightest: int = 0  # 99.9 % of the pixels are at most this bright
    error: UnreadableImage | None = None


def inspect(sources: Mapping[str, ImageSource], check_all: bool = False) -> dict[str, Any]:
    """Finds the facts about the images of a run; prints progress if it takes long.

    A split is in random order, so its first images are a fair sample.

    Args:
      sources: the splits by name, in the order of the block.
      check_all: decode and compare all images; otherwise at most `MAX_DECODED` of each split are decoded, and at
        most `MAX_READ` bytes are compared, of more than `MAX_COMPARED` images at most `MAX_FILES` files and no
        records.

    Returns:
      Facts in JSON types, for `describe`; docs/files.md describes them.

    Raises:
      UnreadableImage: an image cannot be decoded, and `on_error` of its split is 'raise'.
    """
    decoded = {split: _decode_some(split, source, check_all) for split, source in sources.items()}
    return {
        'images': {split: len(source) for split, source in sources.items()},
        'image_size': list(next(iter(sources.values())).image_size),
        'ignored': _ignored(sources),
        'classes': _classes(sources, decoded),
        'decoded': {split: _summary(sources[split], found) for split, found in decoded.items()},
        'copies': _copies(sources, check_all),
    }


def _count(source, check_all):
    return len(source) if check_all else min(len(source), MAX_DECODED)


def _map(function: Callable[[int], Any], count: int, name: str, per_task: int = 8) -> Iterator[Any]:
    """Yields function(i) for i < count, computed in threads; an interrupt waits for the running tasks only."""
    progress, done = Progress(name, count), 0
    tasks = [range(start, min(start + per_task, count)) for start in range(0, count, per_task)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for results in pool.map(lambda task: [function(i) for i in task], tasks):  # an exception cancels the rest
            yield from results
            done += len(results)
            progress.update(done)


def _decode_some(split: str, source: ImageSource, check_all: bool) -> list[_Decoded]:
    decoded = list(_map(lambda i: _decode(source, i), _count(source, check_all), f'data: {split}'))
    errors = [image.error for image in decoded if image.error]
    if errors and source.on_error == 'raise':
        print(f'data: {split}: {len(errors)} of {len(decoded)} cannot be read', flush=True)
        raise errors[0]
    return decoded


def _decode(source: ImageSource, index: int) -> _Decoded:
    try:
        image, _ = source.dataset.read(int(source.indices[index]), source.channels)
    except UnreadableImage as error:
        return _Decoded(error=error)
    counts = np.asarray(image.convert('L').histogram())  # [256]
    mean = float(counts @ np.arange(256) / counts.sum())
    brightest = int(np.searchsorted(counts.cumsum(), 0.999 * counts.sum()))
    return _Decoded((image.height, image.width), mean, brightest)


def _summary(source: ImageSource, decoded: list[_Decoded]) -> dict[str, Any]:
    """Returns the facts about the decoded images of a split."""
    errors = [image.error for image in decoded if image.error]
    named = [[error.example_name, error.reason] for error in errors[:_MAX_NAMED]]
    facts = {'images': len(decoded), 'unreadable': {'images': len(errors), 'first': named}}
    readable = [image for image in decoded if not image.error]
    if readable:
        by_area = sorted((image.size for image in readable), key=lambda size: (size[0] * size[1], size))
        height, width = source.image_size
        facts |= {
            'smallest': list(by_area[0]),
            'largest': list(by_area[-1]),
            'enlarged': sum(size[0] < height or size[1] < width for size in by_area),
            'brightness': round(float(np.mean([image.mean for image in readable])), 1),
            'dark': sum(image.brightest <= DARK for image in readable),
        }
    return facts


def _ignored(sources) -> list[dict[str, Any]]:
    """Returns what the listings of folders left out; splits of one folder share a listing."""
    datasets = {id(source.dataset): source.dataset for source in sources.values()}.values()
    folders = [dataset for dataset in datasets if isinstance(dataset, FilesDataset)]
    return [{'folder': dataset.folder.path, 'notes': dataset.listing.notes()} for dataset in folders]


def _classes(sources, decoded) -> list[dict[str, Any]]:
    """Returns number, name and images of every class; 'images' is missing where labels take long to read."""
    names = next(iter(sources.values())).class_names
    classes = [{'label': label, 'name': name} for label, name in enumerate(names)]
    for split, source in sources.items():
        labels = source.labels
        if labels is None:
            continue
        counts = np.bincount(labels, minlength=len(names))
        failed = [labels[i] for i, image in enumerate(decoded[split]) if image.error]
        readable = counts - np.bincount(np.asarray(failed, int), minlength=len(names))
        for label, entry in enumerate(classes):
            entry.setdefault('images', {})[split] = int(counts[label])
            if split == 'train' and not readable[label]:
                entry['untrained'] = True
    return classes


def _copies(sources: Mapping[str, ImageSource], check_all: bool) -> dict[str, Any]:
    """Counts images that equal an earlier one of their split, or one of an earlier split."""
    lengths = {split: _lengths(split, source) for split, source in sources.items()}
    candidates, chosen = _choose(np.concatenate(list(lengths.values())), sources, check_all)
    known, within, across, start = {}, {}, [], 0
    for split, source in sources.items():
        indices = np.flatnonzero(chosen[start : start + len(source)])
        start += len(source)
        own, shared, repeated = {}, {earlier: [] for earlier in known}, []
        for index, key in zip(indices.tolist(), _keys(split, source, indices), strict=True):
            if not key:
                continue
            if key in own:
                repeated.append((own[key], index))
            else:
                own[key] = index
            for earlier, positions in known.items():
                if key in positions:
                    shared[earlier].append((positions[key], index))
        within[split] = _pairs(source, source, repeated)
        across += [
            {'split': split, 'also_in': earlier, **_pairs(sources[earlier], source, pairs)}
            for earlier, pairs in shared.items()
        ]
        known[split] = own
    compared = int(chosen.sum())
    facts = {'whole': compared == candidates, 'candidates': candidates, 'compared': compared}
    return facts | {'within': within, 'across': across}


def _lengths(split: str, source: ImageSource) -> np.ndarray:
    """Returns the length of every image in bytes, int64 [N]; `_UNKNOWN` if it is in a record, 0 if there is none."""

    def length(index):
        length = source.dataset.content_length(int(source.indices[index]))
        return _UNKNOWN if length is None else length

    lengths = _map(length, len(source), f'data: lengths of {split}', per_task=64)
    return np.fromiter(lengths, np.int64, len(source))


def _choose(lengths: np.ndarray, sources: Mapping[str, ImageSource], check_all: bool) -> tuple[int, np.ndarray]:
    """Chooses the images to compare, of those that may equal another one since they have its length.

    The images of rare lengths come first, since few of them have to be read to find a copy; of one length, those of the
    last split, since copies of it in another one harm most.

    Args:
      lengths: int [N], of all splits.
      sources: the splits.
      check_all: compare all of them.

    Returns:
      The number of images of a length that others have, and the choice, bool [N].
    """
    _, groups, sizes = np.unique(lengths, return_inverse=True, return_counts=True)
    group_sizes = sizes[groups]  # [N], number of images of the same length
    candidates = np.flatnonzero((group_sizes > 1) & (lengths != 0))[::-1]
    candidates = candidates[np.argsort(group_sizes[candidates], kind='stable')]
    count = len(candidates)
    if not check_all:
        limit = count
        if len(lengths) > MAX_COMPARED:
            are_files = any(isinstance(source.dataset, FilesDataset) for source in sources.values())
            limit = 0 if _UNKNOWN in lengths else MAX_FILES if are_files else count
        candidates = candidates[:limit]
        size = lengths[candidates]
        if _UNKNOWN in size:
            first = next(iter(sources.values()))
            size = np.full_like(size, np.mean([len(_content(first, i)) for i in range(min(len(first), _SAMPLED))]))
        candidates = candidates[np.cumsum(size) <= MAX_READ]
    chosen = np.zeros(len(lengths), bool)
    chosen[candidates] = True
    return count, chosen


def _keys(split: str, source: ImageSource, indices: np.ndarray) -> Iterator[bytes]:
    """Yields a digest of the content of images, b'' if it is empty or cannot be read."""

    def key(position):
        data = _content(source, indices[position])
        return hashlib.blake2b(data, digest_size=16).digest() if data else b''

    return _map(key, len(indices), f'data: comparing {split}')


def _content(source: ImageSource, index: int) -> bytes:
    """Returns an image as it is stored, b'' if it cannot be read."""
    try:
        return source.dataset.content(int(source.indices[index]))
    except UnreadableImage:
        return b''


def _pairs(first: ImageSource, second: ImageSource, pairs: list[tuple[int, int]]) -> dict[str, Any]:
    """Returns the facts about pairs (position in first, position in second) of equal images."""
    facts = {'images': len(pairs), 'example': []}
    if pairs:
        facts['example'] = [first.example_name(pairs[0][0]), second.example_name(pairs[0][1])]
    if first.labels is not None and second.labels is not None:
        labels, others = first.labels, second.labels
        facts['relabeled'] = sum(bool(labels[i] != others[j]) for i, j in pairs)
    return facts


def describe(facts: Mapping[str, Any]) -> str:
    """Returns the block of text that is printed before a training, without a line break at the end.

    What a folder's listing left out is not in it; opening the folder prints that.

    Args:
      facts: from `inspect`.
    """
    counts = ', '.join(f'{count} {split}' for split, count in facts['images'].items())
    lines = [f'{sum(facts["images"].values())} images: {counts}']
    lines += _class_lines(facts)
    for split, found in facts['decoded'].items():
        lines += _decoded_lines(split, found, facts)
    lines += _copies_lines(facts)
    return '\n'.join(f'data: {line}' for line in lines)


def _class_lines(facts) -> list[str]:
    classes = facts['classes']
    if not classes:
        return ['no classes']
    splits = list(classes[0].get('images', ()))
    head = ' '.join(f'{split:>10}' for split in splits)
    uncounted = '' if splits else ', whose images are not counted, since they are in more than 50,000 records'
    lines = [f'{len(classes)} classes{uncounted}', *[f' label {head}  name'] * bool(splits)]
    for entry in classes[:_MAX_ROWS]:
        numbers = ' '.join(f'{entry["images"][split]:>10}' for split in splits)
        lines.append(f'{entry["label"]:>6} {numbers}  {printable(entry["name"])}')
    if len(classes) > _MAX_ROWS:
        lines.append(f'   ... {len(classes) - _MAX_ROWS} more classes')
    if untrained := [f'{entry["label"]} {entry["name"]!r}' for entry in classes if entry.get('untrained')]:
        shown = ', '.join(untrained[:_MAX_ROWS]) + ', ...' * (len(untrained) > _MAX_ROWS)
        lines.append(f'warning: {len(untrained)} of {len(classes)} classes have no readable training images: {shown}')
    return lines


def _decoded_lines(split, found, facts) -> list[str]:
    count, failed = found['images'], found['unreadable']['images']
    line, warnings = f'{split}: decoded {count - failed} of {facts["images"][split]}', []
    if failed < count:
        smallest, largest = ('x'.join(map(str, found[name])) for name in ('smallest', 'largest'))
        sizes = f'size {smallest}' if smallest == largest else f'sizes {smallest} to {largest} (height x width)'
        line += f'; {sizes}; mean brightness {found["brightness"]:g} of 255'
        if found['enlarged']:
            size = 'x'.join(map(str, facts['image_size']))
            line += f'; {found["enlarged"]} smaller than data.image_size {size}, to be enlarged'
        if 2 * found['dark'] >= count - failed:
            warnings.append(
                f'warning: {split} is dark: in {found["dark"]} of {count - failed} images, 99.9 % of pixels are '
                f'at most {DARK} of 255. Values of 10 or 12 bits in 16-bit files look so; scale them to the full range'
            )
    if failed:
        name, reason = found['unreadable']['first'][0]
        warnings.append(f'warning: {split}: {failed} of {count} cannot be read, such as {printable(name)}: {reason}')
    return [line, *warnings]


def _copies_lines(facts) -> list[str]:
    copies, lines = facts['copies'], []
    for split, found in copies['within'].items():
        if found['images']:
            lines.append(
                f'{split}: {_copied(found, facts["images"][split])} repeat another image of {split}, {_names(found)}'
            )
    for found in copies['across']:
        if found['images']:
            number = _copied(found, facts['images'][found['split']])
            lines.append(f'warning: {found["split"]}: {number} are also in {found["also_in"]}, {_names(found)}')
    if copies['whole']:
        return [f'compared by content: {"some images are" if lines else "no image is"} there twice', *lines]
    found = f'{"some" if lines else "none"} of them are there twice' if copies['compared'] else 'that takes long'
    return [
        f'compared by content only {copies["compared"]} of {copies["candidates"]} images that may be copies '
        f'(data.check_all=True: all): {found}',
        *lines,
    ]


def _copied(found, total) -> str:
    relabeled = f' ({found["relabeled"]} with another label)' if found.get('relabeled') else ''
    return f'{found["images"]} of {total} images{relabeled}'


def _names(found) -> str:
    return f'such as {" and ".join(map(printable, found["example"]))}'
