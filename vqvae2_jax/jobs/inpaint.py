"""--job=inpaint: samples parts of given images again, by mask and by level.

The images are encoded. Codes that the mask covers, in the chosen levels, are sampled again, the others stay. An
autoregressive order sees earlier positions only: new codes fit the known codes of earlier steps (in raster order those
above and to the left) and do not depend on later ones.
"""

import os
from collections.abc import Callable

import jax
import numpy as np

from vqvae2_jax import api
from vqvae2_jax.config import build
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.codes import name_levels
from vqvae2_jax.data.decode import UnreadableImage, decode_image, read_file, resize_and_crop
from vqvae2_jax.data.images import ImageSource
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.io import files, names, plots, record, remote
from vqvae2_jax.io.progress import Progress
from vqvae2_jax.io.record import JobError, Record
from vqvae2_jax.jobs import class_labels, workdir
from vqvae2_jax.jobs.workdir import Run

DIRECTORY = 'inpaint'
_GRAY = 128


def inpaint(run: Run) -> None:
    """Writes inpaint/<image>.png (original, original under the mask, variants) and .npz for every image.

    The images are those of inpaint.path. The record is that of the last call; files of other images stay.

    Raises:
      JobError: networks are missing, or a field of `inpaint` does not fit.
    """
    options = run.config.inpaint
    source, mask, levels = _checked_options(run)
    settings = {name: options[name] for name in ('path', 'mask', 'levels', 'label', 'count')}
    settings |= {'seed': run.config.sample.seed, 'dtype': run.config.sample.dtype}
    settings |= build.sampling_settings(run.config)
    inputs = {'images': source.digest, 'mask': files.digest_arrays(mask), **workdir.generator_digests(run)}
    directory = run.path(DIRECTORY)
    output = run.open_output(directory, 'inpaint', inputs, settings, replace=True)
    if output.state == record.DONE:
        print(f'inpaint: done ({output.results["images"]} images in {directory})', flush=True)
        return
    with jax.set_mesh(run.mesh):
        generator = workdir.load_generator(run, run.config.sample.dtype)  # it refuses before any file changes
    make_variants = make_inpainter(run, generator, levels)
    run.print_start(
        'inpaint', f'{len(source)} images, {options.count} variants each', parameters=workdir.generator_size(generator)
    )
    with run.lock(directory, output.job, output):
        written = _write_variants(run, output, source, mask, make_variants)
        processes.run_on_main_process(lambda: output.finish({'images': written}))
    print(f'inpaint: {options.count} variants of {written} images in {directory}', flush=True)


def _write_variants(run: Run, output: Record, source: ImageSource, mask: np.ndarray, make_variants: Callable) -> int:
    """Writes the files of all images; returns the number of readable ones."""
    output.files = {}  # the record is that of the last call
    processes.run_on_main_process(output.start)
    progress, written = Progress('inpaint', len(source)), 0
    for number in range(len(source)):
        try:
            image = source[number]['image']
        except UnreadableImage as error:
            if source.on_error == 'raise':
                raise
            print(f'inpaint: skipped {names.printable(error.example_name)}: {error.reason}', flush=True)
            continue
        with jax.set_mesh(run.mesh):
            variants = make_variants(number, image, mask)
        _write(output, output_name(number, source.example_name(number)), image, mask, variants)
        written += 1
        progress.update(number + 1)
    return written


def _checked_options(run: Run) -> tuple[ImageSource, np.ndarray, tuple[str, ...]]:
    """Returns the images, the mask bool [H, W] and the names of the levels to sample again."""
    options = run.config.inpaint
    if not options.path:
        raise JobError('inpaint.path is empty: give --config.inpaint.path=IMAGE, or a folder of images')
    source = run.folder(options.path, 'inpaint.path')
    levels = tuple(options.levels) or run.levels
    if unknown := sorted(set(levels) - set(run.levels)):
        raise JobError(f'inpaint.levels holds {unknown}; the levels are {", ".join(reversed(run.levels))}')
    classes = run.config.data.num_classes
    if classes:
        with options.ignore_type():
            options.label = class_labels.resolve(run, options.label, 'inpaint.label')
        if not 0 <= options.label < classes:
            names = class_labels.table(class_labels.names_in_codes(run))
            raise JobError(
                f'inpaint.label is {options.label}: give the class to sample, 0 to {classes - 1}'
                + f', or its name: {names}' * bool(names)
            )
        class_labels.print_names(run, [options.label], 'inpaint.label')
    return source, read_mask(options.mask, run.config.data.image_size), levels


def output_name(number: int, example_name: str) -> str:
    """Returns the name of an image's outputs, without suffix: `NNNN-<name>`, unlike that of any other image."""
    return f'{number:04d}-{names.safe(os.path.splitext(os.path.basename(example_name))[0])}'


def make_inpainter(
    run: Run, generator: api.Generator, levels: tuple[str, ...]
) -> Callable[[int, np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    """Makes the function that inpaints one image; call that function inside `jax.set_mesh(run.mesh)`.

    Args:
      run: the run; its section `inpaint` gives the class and the number of variants.
      generator: the networks.
      levels: names of the levels that are sampled again.

    Returns:
      (number of the image, image uint8 [H, W, C], mask bool [H, W]) -> {'image': uint8 [count, H, W, C],
      'codes_l': int32 [count, h_l, w_l]} on process 0, which writes them. A variant depends on the seed, the
      number and its index alone.
    """
    options = run.config.inpaint
    seed, settings = run.config.sample.seed, build.sampling_arguments(run.config)

    @jax.jit
    def keys_of(number, index):
        return api.sample_keys(jax.random.fold_in(jax.random.key(seed), number), index)

    batch_size = sharding.pad_batch_size(options.count, run.mesh)

    def make_variants(number, image, mask):
        index = sharding.process_local_rows(batch_size).astype(np.int32)
        batch = {'index': index, 'label': np.full_like(index, max(options.label, 0))}
        batch = sharding.make_global_batch(batch, batch_size)
        keys = keys_of(np.int32(number), batch['index'])
        images, codes = api.inpaint(generator, keys, image[None], mask, batch['label'], levels=levels, **settings)
        variants = sharding.gather_rows({'image': images, **name_levels(codes)}, main_process_only=True)
        return {name: values[: options.count] for name, values in variants.items()}

    return make_variants


def read_mask(mask: str, size: tuple[int, int]) -> np.ndarray:
    """Reads inpaint.mask.

    Args:
      mask: '' (everywhere), 'top,left,bottom,right' as fractions of the size, or an image file, bright where to sample.
      size: (H, W) of the images.

    Returns:
      bool [H, W], True where codes are sampled again.

    Raises:
      JobError: it is none of these, or covers no pixel.
    """
    height, width = size
    if not mask:
        return np.ones(size, bool)
    try:
        remote.check(mask)
    except ValueError as error:
        raise JobError(f'inpaint.mask={error}') from error
    mask = os.path.expanduser(mask)
    if remote.exists(mask) and not os.path.isdir(mask):
        return _mask_of_file(mask, size)
    try:
        top, left, bottom, right = (float(share) for share in mask.split(','))
    except ValueError:
        raise JobError(
            f"inpaint.mask is {mask!r}: give '', 'top,left,bottom,right' in fractions such as 0.5,0,1,1, or an image"
        ) from None
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise JobError(f'inpaint.mask is {mask!r}: 0 <= top < bottom <= 1 and 0 <= left < right <= 1 must hold')
    rows, columns = (np.arange(n) + 0.5 for n in size)
    inside = ((rows >= top * height) & (rows < bottom * height))[:, None]
    inside = inside & (columns >= left * width) & (columns < right * width)
    return _not_empty(inside, mask)


def _mask_of_file(path, size):
    try:
        image = decode_image(read_file(remote.local_copy(path), path), 1, path)
    except UnreadableImage as error:
        raise JobError(f'inpaint.mask: cannot read the image {path}: {error.reason}') from error
    return _not_empty(resize_and_crop(image, size)[..., 0] >= _GRAY, path)  # cropped and resized as the images are


def _not_empty(mask, given):
    if not mask.any():
        raise JobError(
            f'inpaint.mask {given!r} covers no pixel of {mask.shape[0]}x{mask.shape[1]}: nothing would be sampled'
        )
    return mask


def _write(output, name, image, mask, variants):
    """Writes the files of one image, on the main process."""

    def write():
        masked = np.where(mask[..., None], np.uint8(_GRAY), image)
        row = np.concatenate([image[None], masked[None], variants['image']])
        plots.save_png(
            output.directory / f'{name}.png', plots.image_grid(row, len(row), scale=plots.visible_scale(row))
        )
        codes = {key: values for key, values in variants.items() if key != 'image'}
        sample_store.write_npz(output.directory / f'{name}.npz', {'arr_0': variants['image'], 'mask': mask, **codes})
        output.add_files(f'{name}.png', f'{name}.npz')

    processes.run_on_main_process(write)
