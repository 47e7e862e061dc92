"""The part of --job=import that reads codes: an LMDB of rosinality's extract_code.py becomes codes/<split>.

The splits are those of a folder with the same files, by data.held_out and data.split_seed, and so is the digest of the
images: jobs that read both codes and images accept that folder.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence

import numpy as np

from vqvae2_jax.data import codes as store
from vqvae2_jax.data import lmdb_codes
from vqvae2_jax.data.folder import few, fingerprint_of
from vqvae2_jax.data.images import SPLITS, random_split
from vqvae2_jax.data.lmdb_codes import CodeRows
from vqvae2_jax.data.shards import shard_ranges
from vqvae2_jax.distributed.preemption import exit_together, stop_signals
from vqvae2_jax.io import names, record
from vqvae2_jax.io.progress import track
from vqvae2_jax.io.record import JobError, Record
from vqvae2_jax.jobs import extract_codes, workdir
from vqvae2_jax.jobs.workdir import IMPORT, Run

_BATCH = 256  # rows in memory


def import_codes(run: Run, source: str) -> None:
    """Writes codes/<split> for all splits; finished files are kept.

    The database does not say which stage 1 made the codes. They are recorded as those of the one in the workdir.

    Args:
      run: the run.
      source: the directory of the database.

    Raises:
      JobError: stage 1 is missing, or classes, maps or codes are not those of the config.
      ValueError, OSError, ImportError: the database cannot be read.
      StaleInputError, SettingsChangedError: the codes in the workdir are others.
      Interrupted: a stop signal came; the same command continues.
    """
    if splits := run.config.data.splits:
        raise JobError(f'data.splits is {splits}, but a database of codes has one set: set --config.data.splits="()"')
    with CodeRows(source) as rows, stop_signals() as received_signal:
        if not record.read_if_sound(run.path('vqvae')):
            raise JobError('codes need the stage 1 that made them: import it first, by --job=import --from=NAME.pt')
        vqvae = workdir.trained_record(run, 'vqvae').digest
        digest, filenames = lmdb_codes.digest(source), []
        for index in track(range(len(rows)), 'codes: reading names', 'rows'):
            filenames.append(rows[index].filename)
            exit_together(received_signal)
        order = sorted(range(len(rows)), key=filenames.__getitem__)  # as a folder is listed
        filenames = [filenames[index] for index in order]
        labels, class_names = _labels(run, filenames)
        parts = _split(run, labels, class_names)
        outputs = {}
        for split, indices in parts.items():
            fingerprint = fingerprint_of([filenames[index] for index in indices], labels[indices])
            inputs = {'vqvae': vqvae, 'images': hashlib.sha256(fingerprint).hexdigest(), extract_codes.LMDB: digest}
            settings = extract_codes.settings(run, split)
            outputs[split] = run.open_output(run.path('codes', split), IMPORT, inputs, settings)
        for split, output in outputs.items():
            if output.state != record.DONE:
                _write_split(run, output, rows, np.array(order)[parts[split]], labels[parts[split]], received_signal)
                extract_codes.finish(output, class_names, _paths(output, len(parts[split])))
            print(f'codes {split}: {output.results["count"]} imported, in {output.directory}', flush=True)


def _labels(run: Run, filenames: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the labels int32 [N] by the directories of the files, and the names of the classes."""
    count = run.config.data.num_classes
    if not count:
        return np.zeros(len(filenames), np.int32), ()
    folders = [filename.replace('\\', '/').rpartition('/')[0] for filename in filenames]
    class_names = tuple(sorted(set(folders)))
    if len(class_names) != count:
        raise JobError(
            f'data.num_classes={count}, but the files lie in {len(class_names)} directories: {few(class_names)}. Set '
            f'--config.data.num_classes={len(class_names)}, or 0 to ignore the classes'
        )
    label_of = {name: label for label, name in enumerate(class_names)}
    return np.array([label_of[folder] for folder in folders], np.int32), class_names


def _split(run: Run, labels: np.ndarray, class_names: tuple[str, ...]) -> dict[str, np.ndarray]:
    data = run.config.data
    parts = random_split(len(labels), data.held_out, data.split_seed, labels=labels if class_names else None)
    if empty := [split for split in SPLITS if not len(parts[split])]:
        raise JobError(
            f'data.held_out={data.held_out} leaves the {empty[0]} split of {len(labels)} rows empty: change it'
        )
    return parts


def _paths(output: Record, count: int) -> list:
    shards = len(shard_ranges(count, output.settings['shard_size']))
    return [store.shard_path(output.directory, shard, shards) for shard in range(shards)]


def _write_split(run, output, rows, numbers, labels, received_signal) -> None:
    """Writes the missing files of a split: rows `numbers` of the database, in this order."""
    ranges = shard_ranges(len(numbers), output.settings['shard_size'])
    begin, before = time.monotonic(), output.seconds
    with run.lock(output.directory, IMPORT, output):
        output.start()
        for path, (start, stop) in zip(_paths(output, len(numbers)), ranges, strict=True):
            if path.name in output.files:
                continue
            batches = _batches(run, rows, numbers, labels, range(start, stop))
            store.write_shard(path, batches, tuple(output.settings['codebook_sizes']))
            output.add_files(path.name, seconds=before + time.monotonic() - begin)
            exit_together(received_signal)


def _batches(run: Run, rows: CodeRows, numbers: np.ndarray, labels: np.ndarray, indices: range) -> Iterator[dict]:
    shapes = run.code_spec.shapes
    for first in range(indices.start, indices.stop, _BATCH):
        batch = range(first, min(first + _BATCH, indices.stop))
        read = [rows[numbers[index]] for index in batch]
        for number, row in zip(numbers[batch], read, strict=True):
            if (found := (row.bottom.shape, row.top.shape)) != shapes:
                raise JobError(
                    f'row {number} ({names.printable(row.filename)}) has maps of {found[0]} and {found[1]}, but '
                    f'data.image_size={run.config.data.image_size} makes {shapes[0]} and {shapes[1]} at '
                    f'vqvae.downsample_factors={run.config.vqvae.downsample_factors}'
                )
        levels = store.name_levels(
            np.stack(maps) for maps in zip(*((row.bottom, row.top) for row in read), strict=True)
        )
        yield levels | {'label': labels[batch], 'index': np.array(batch)}
