"""--job=likelihood: nats of every level and bits of every image, of a split or of a folder; a score for outliers.

Without stage 1 the examples are the codes of a split.
"""

import csv
import io
import math
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np

from vqvae2_jax import api
from vqvae2_jax.data.codes import CodeSource
from vqvae2_jax.data.images import ImageSource
from vqvae2_jax.data.own_codes import ArrayCodes
from vqvae2_jax.distributed import processes
from vqvae2_jax.distributed.batches import map_batches
from vqvae2_jax.distributed.preemption import stop_signals
from vqvae2_jax.io import files, names, record
from vqvae2_jax.io.record import JobError, Record
from vqvae2_jax.jobs import feature_store, workdir
from vqvae2_jax.jobs.workdir import SKIPPED, Run

Source = ImageSource | CodeSource | ArrayCodes
DIRECTORY = 'likelihood'
FILE = 'images.csv'


def write_likelihood(run: Run) -> None:
    """Writes likelihood/<split>/images.csv or likelihood/of-<folder>/images.csv: images, least likely first.

    Raises:
      JobError: networks are missing, or no image can be read.
      Interrupted: a stop signal came; nothing was written.
    """
    options = run.config.likelihood
    source = run.folder(options.path, 'likelihood.path') if options.path else run.data(options.split)
    of_folder = f'of-{names.safe(os.path.basename(os.path.abspath(options.path)))}'  # no split has such a name
    directory = run.path(DIRECTORY, of_folder if options.path else options.split)
    inputs = {source.kind: source.digest, **workdir.generator_digests(run)}
    output = run.open_output(directory, 'likelihood', inputs, options.to_dict(), replace=True)
    if output.state == record.DONE:
        print(f'likelihood: done (see {directory / FILE})', flush=True)
        return
    labeled = not options.path and bool(run.code_spec.num_classes)  # images of a folder may be of any class
    with run.lock(directory, output.job, output), jax.set_mesh(run.mesh):
        generator = workdir.load_generator(run)  # it refuses before any file changes
        processes.run_on_main_process(output.start)
        with stop_signals() as received_signal:
            rows = _image_rows(run, source, generator, labeled, received_signal)
        _finish(run, output, source, rows)


def _finish(run: Run, output: Record, source: Source, rows: list[tuple]) -> None:
    """Writes and prints the results."""
    path = output.directory / FILE
    if not rows:
        raise JobError(
            f'likelihood: none of the {len(source)} images could be read; they are listed in {run.path(SKIPPED)}'
        )
    bits = np.array([row[-1] for row in rows])
    results = {'images': len(rows), 'bits_per_image': float(bits.mean())}
    processes.run_on_main_process(lambda: _write_csv(output, run.levels, rows, results))
    print(f'likelihood: {len(rows)} {source.kind}, {bits.mean():.1f} bits each ({bits.min():.1f} to {bits.max():.1f})')
    print(f'least likely: {names.printable(rows[0][0])}\nall {source.kind}: {path}', flush=True)


def _image_rows(
    run: Run, source: Source, generator: api.Generator, labeled: bool, received_signal: Callable[[], int]
) -> list[tuple]:
    """Returns (name, nats of every level, bits) of every readable image, least likely first."""
    batch_size, rows = run.batch_size('evaluate'), []
    run.print_start(
        'likelihood', f'{len(source)} {source.kind}', parameters=workdir.generator_size(generator), batch='evaluate'
    )

    def function(batch):
        if 'image' in batch:
            codes = api.encode(generator, batch['image'])
        else:
            codes = [batch[f'codes_{level}'] for level in range(len(run.levels))]
        return api.log_likelihood(generator, codes, batch['label'] if labeled else None)._asdict()

    batches = feature_store.read_batches(run, source, 'likelihood', received_signal)
    for batch in map_batches(function, batches, batch_size):
        nats = -batch['nats'].astype(np.float64)  # [B, L]
        for i in np.flatnonzero(batch['mask']):
            rows.append((source.example_name(int(batch['index'][i])), *nats[i], nats[i].sum() / math.log(2)))
    return sorted(rows, key=lambda row: -row[-1])


def _write_csv(output: Record, levels: tuple[str, ...], rows: list[tuple], results: dict[str, float]) -> None:
    files.write_bytes(output.directory / FILE, format_csv(levels, rows))
    output.add_files(FILE)
    output.finish(results)


def format_csv(levels: Sequence[str], rows: Sequence[tuple]) -> bytes:
    """Returns the content of images.csv.

    Args:
      levels: names of the levels.
      rows: (name of the image, nats of every level, bits) of each image. A name may hold line breaks and bytes that are
        not UTF-8, which are kept.
    """
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator='\n')
    writer.writerow(('image', *(f'nats_{name}' for name in levels), 'bits'))
    writer.writerows((name, *(round(float(x), 3) for x in numbers)) for name, *numbers in rows)
    return text.getvalue().encode('utf-8', 'surrogateescape')
