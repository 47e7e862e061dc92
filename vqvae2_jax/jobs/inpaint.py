"""--job=edit: parts of given images drawn anew, by mask and by level.

The images become codes; those that the mask covers, in the levels named, are drawn again, the others stay. An
autoregressive order looks back only: what is drawn fits the kept codes of earlier steps (in raster order those above
and to the left), and does not know those that come later.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vqvae2_jax.config import build as configs
from vqvae2_jax.data import samples
from vqvae2_jax.data.decode import UnreadableImage, decode_image, fit
from vqvae2_jax.io import files, gcs, plots
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.sample import make_all_sampling_params
from vqvae2_jax.jobs.workdir import JobError, Run
from vqvae2_jax.sampling.ancestral import sample_levels
from vqvae2_jax.tasks.task import to_float, to_uint8

DIRECTORY = 'edits'
_GREY = 128


def edit(run: Run) -> None:
    """Writes edits/<image>.png (original, the same under the mask, variants) and .npz for every image of edit.path."""
    options = configs.options(run.config, 'edit')
    if not options.path:
        raise JobError('edit.path is empty: give --config.edit.path=IMAGE, or a folder of images')
    source = run.folder(options.path, 'edit.path')
    levels = tuple(options.levels) or run.levels
    if unknown := sorted(set(levels) - set(run.levels)):
        raise JobError(f'edit.levels holds {unknown}; the levels are {", ".join(reversed(run.levels))}')
    classes = run.config.data.num_classes
    if classes and not 0 <= options.label < classes:
        raise JobError(f'edit.label is {options.label}: give the class to draw, 0 to {classes - 1}')
    mask = read_mask(options.mask, run.config.data.image_size)
    draw = make_editor(run, levels)
    files.write_json(run.path(DIRECTORY, 'settings.json'), _settings(run, options, levels))
    for number in range(len(source)):
        try:
            image = source[number]['image']
        except UnreadableImage as error:
            if source.on_error == 'raise':
                raise
            print(f'edit: skipped {error.where}: {error.reason}', flush=True)
            continue
        images, codes = jax.device_get(draw(number, image, mask, options.label, np.arange(options.count)))
        name = os.path.splitext(os.path.basename(source.where(number)))[0]
        _write(run.path(DIRECTORY), f'{number:04d}-{name}', image, mask, images, codes)
    print(f'edit: {options.count} variants of {len(source)} images in {run.path(DIRECTORY)}', flush=True)


def _settings(run, options, levels):
    """For the record: how the latest variants were drawn."""
    return {
        'schema': 1,
        **options.to_dict(),
        'levels': list(levels),
        'seed': run.config.sample.seed,
        'control': {name: configs.make_sampling_params(run.config, name)._asdict() for name in run.levels},
        'upstream': workdir.generator_digests(run),
        'version': files.package_version(),
    }


def make_editor(run: Run, levels: tuple[str, ...]):
    """A function (number, image uint8 [H, W, C], mask bool [H, W], label, index int [B]) -> (images [B, ...], codes).

    Where the mask is True the codes of `levels` are drawn anew; a variant depends on the seed, `number` and its index.
    """
    config = run.config
    model, decoder, modules, weights = workdir.load_generator(run, config.sample.get('dtype'))
    key = jax.random.key(config.sample.seed)

    @jax.jit
    def draw(decoder, weights, controls, number, image, mask, label, index):
        kept = model.apply(decoder, to_float(image[None]), method='encode')
        kept = [jnp.repeat(codes, len(index), axis=0) for codes in kept]
        given = [
            jnp.where(_covered(mask, codes.shape[1:]), -1, codes) if name in levels else codes
            for name, codes in zip(run.levels, kept, strict=True)
        ]
        labels = jnp.full((len(index),), label) if config.data.num_classes else None
        codes = sample_levels(modules, weights, jax.random.fold_in(key, number), index, labels, controls, given)
        return to_uint8(model.apply(decoder, codes, method='decode')), codes

    return functools.partial(draw, decoder, weights, make_all_sampling_params(config))


def read_mask(mask: str, size: tuple[int, int]) -> np.ndarray:
    """bool [H, W], True where to draw anew, from '' (everywhere), 'top,left,bottom,right' in shares, or an image file.

    Raises:
      JobError: none of these.
    """
    height, width = size
    if not mask:
        return np.ones(size, bool)
    try:
        gcs.check(mask)
    except ValueError as error:
        raise JobError(f'edit.mask={error}') from error
    if epath.Path(mask).is_file():
        return _mask_of_file(mask, size)
    try:
        top, left, bottom, right = (float(share) for share in mask.split(','))
    except ValueError:
        raise JobError(
            f"edit.mask is {mask!r}: give '', 'top,left,bottom,right' in shares such as 0.5,0,1,1, or an image file"
        ) from None
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise JobError(f'edit.mask is {mask!r}: 0 <= top < bottom <= 1 and 0 <= left < right <= 1 must hold')
    rows, columns = (np.arange(n) + 0.5 for n in size)
    inside = ((rows >= top * height) & (rows < bottom * height))[:, None]
    inside = inside & (columns >= left * width) & (columns < right * width)
    return _not_empty(inside, mask)


def _mask_of_file(path, size):
    try:
        image = decode_image(epath.Path(path).read_bytes(), 1, path)
    except UnreadableImage as error:
        raise JobError(f'edit.mask: cannot decode the image {path}: {error.reason}') from error
    return _not_empty(fit(image, size)[..., 0] >= _GREY, path)  # cropped and resized as the images are


def _not_empty(mask, given):
    if not mask.any():
        raise JobError(
            f'edit.mask {given!r} covers no pixel of {mask.shape[0]}x{mask.shape[1]}: nothing would be drawn'
        )
    return mask


def _covered(mask, shape):
    # bool [H, W] -> [h, w]: codes with any masked pixel in their cell
    height, width = mask.shape
    cells = mask.reshape(shape[0], height // shape[0], shape[1], width // shape[1])
    return cells.any(axis=(1, 3))


def _write(directory, name, image, mask, images, codes):
    kept = np.where(mask[..., None], np.uint8(_GREY), image)
    row = np.concatenate([image[None], kept[None], images])
    plots.save_png(directory / f'{name}.png', plots.image_grid(row, len(row), scale=plots.visible_scale(row)))
    arrays = {'arr_0': images, 'mask': mask} | {f'codes_{level}': c for level, c in enumerate(codes)}
    samples.write_npz(directory / f'{name}.npz', arrays)
