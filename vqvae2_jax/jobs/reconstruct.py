"""--job=reconstruct: reconstructions and codes of a user's images, with the error of each."""

import csv
import functools
import io
import itertools

import jax
import numpy as np

from vqvae2_jax import api
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.codes import name_levels
from vqvae2_jax.distributed import processes
from vqvae2_jax.distributed.batches import map_batches
from vqvae2_jax.distributed.preemption import stop_signals
from vqvae2_jax.io import files, plots, record
from vqvae2_jax.io.record import JobError, Record
from vqvae2_jax.jobs import feature_store, inpaint, workdir
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.metrics.psnr import LEAST_MSE, psnr_from_mse

DIRECTORY = 'reconstruct'
PICTURE, TABLE = 'images.png', 'images.csv'
_COLUMNS = 10  # images in the picture


def reconstruct(run: Run) -> None:
    """Writes reconstruct/: a .png and an .npz per image of reconstruct.path, images.csv and images.png.

    The record is that of the last call; files of other images stay.

    Raises:
      JobError: stage 1 is missing, or no image can be read.
      Interrupted: a stop signal came; the same command starts over.
    """
    path = run.config.reconstruct.path
    if not path:
        raise JobError('reconstruct.path is empty: give --config.reconstruct.path=IMAGE, or a folder of images')
    source, directory = run.folder(path, 'reconstruct.path'), run.path(DIRECTORY)
    inputs = {'images': source.digest, 'vqvae': workdir.trained_record(run, 'vqvae').digest}
    output = run.open_output(directory, DIRECTORY, inputs, {'path': path}, replace=True)
    if output.state == record.DONE:
        print(f'reconstruct: done ({output.results["images"]} images in {directory})', flush=True)
        return
    with run.lock(directory, output.job, output), jax.set_mesh(run.mesh), stop_signals() as received_signal:
        generator = workdir.load_generator(run, with_priors=False)  # it refuses before any file changes
        parameters = workdir.generator_size(generator)
        run.print_start(DIRECTORY, f'{len(source)} images', parameters=parameters, batch='codes')
        output.files = {}  # the record is that of the last call
        processes.run_on_main_process(output.start)
        batches = feature_store.read_batches(run, source, DIRECTORY, received_signal, section='codes')
        function, rows, shown = functools.partial(_reconstruct, generator), [], []
        for batch in map_batches(function, batches, run.batch_size('codes'), main_process_only=True):
            write = functools.partial(_write, output, source, batch, rows, shown)
            processes.run_on_main_process(write)
        results = processes.run_on_main_process(lambda: _finish(output, rows, shown))
    print(f'reconstruct: {results["images"]} images in {directory}, PSNR {results["psnr"]:.2f} dB on average')
    print(f'the first ones: {directory / PICTURE}\nall images: {directory / TABLE}', flush=True)


def _reconstruct(generator, batch):
    codes = api.encode(generator, batch['image'])
    return {'original': batch['image'], 'image': api.decode(generator, codes), **name_levels(codes)}


def _write(output: Record, source, batch: dict[str, np.ndarray], rows: list, shown: list) -> None:
    """Writes the files of a batch, on the main process; adds to `rows` (name, PSNR) and to `shown` (both images)."""
    written = []
    for i in np.flatnonzero(batch['mask']):
        number = int(batch['index'][i])
        example_name, original, image = source.example_name(number), batch['original'][i], batch['image'][i]
        name = inpaint.output_name(number, example_name)
        plots.save_png(output.directory / f'{name}.png', image)
        codes = {key: values[i] for key, values in batch.items() if key.startswith('codes_')}
        sample_store.write_npz(output.directory / f'{name}.npz', {'arr_0': image, **codes})
        written += [f'{name}.png', f'{name}.npz']
        error = np.mean((original.astype(np.float64) - image) ** 2)
        rows.append((example_name, psnr_from_mse(max(error, LEAST_MSE), 255)))
        if len(shown) < _COLUMNS:
            shown.append((original, image))
    output.add_files(*written)


def _finish(output: Record, rows: list, shown: list) -> dict[str, float]:
    """Writes the table, the picture and the record."""
    pairs = list(itertools.chain(*zip(*shown, strict=True)))  # originals in the first row
    grid = plots.image_grid(np.stack(pairs), len(shown), scale=plots.visible_scale(pairs[0][None]))
    plots.save_png(output.directory / PICTURE, grid)
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator='\n')
    writer.writerows([('image', 'psnr'), *((name, round(psnr, 2)) for name, psnr in rows)])
    files.write_bytes(output.directory / TABLE, text.getvalue().encode('utf-8', 'surrogateescape'))
    output.add_files(PICTURE, TABLE)
    results = {'images': len(rows), 'psnr': float(np.mean([psnr for _, psnr in rows]))}
    output.finish(results)
    return results
