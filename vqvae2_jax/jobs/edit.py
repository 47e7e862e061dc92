"""--job=edit: parts of given images drawn anew, by mask and by level.

The images become codes; those that the mask covers, in the levels named, are drawn again, the others stay. An
autoregressive order looks back only: what is drawn fits the kept codes of earlier steps (in raster order those above
and to the left), and does not know those that come later.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vqvae2_jax import config as configs
from vqvae2_jax import parallel
from vqvae2_jax.io import pictures
from vqvae2_jax.jobs import samples, workdir
from vqvae2_jax.jobs.workdir import JobError, Run
from vqvae2_jax.sampling.ancestral import sample_levels
from vqvae2_jax.stages.stage import to_float, to_uint8

DIRECTORY = 'edits'
_GREY = 128


def edit(run: Run) -> None:
    """Writes edits/<image>.png (original, what is kept, variants) and .npz for every image of edit.path."""
    options = configs.options(run.config, 'edit')
    if not options.path:
        raise JobError('edit.path is empty: give --config.edit.path=IMAGE, or a folder of images')
    source = run.folder(options.path)
    levels = tuple(options.levels) or run.levels
    if unknown := sorted(set(levels) - set(run.levels)):
        raise JobError(f'edit.levels holds {unknown}; the levels are {", ".join(reversed(run.levels))}')
    classes = run.config.data.num_classes
    if classes and not 0 <= options.label < classes:
        raise JobError(f'edit.label is {options.label}: give the class to draw, 0 to {classes - 1}')
    mask = read_mask(options.mask, run.config.data.image_size)
    draw = make_editor(run, levels)
    for number in range(len(source)):
        image = source[number]['image']
        index = number * options.count + np.arange(options.count)
        images, codes = jax.device_get(draw(image, mask, options.label, index.astype(np.int32)))
        name = os.path.splitext(os.path.basename(source.where(number)))[0]
        _write(run.path(DIRECTORY), f'{number:04d}-{name}', image, mask, images, codes)
    print(f'edit: {options.count} variants of {len(source)} images in {run.path(DIRECTORY)}', flush=True)


def make_editor(run: Run, levels: tuple[str, ...]):
    """A function (image uint8 [H, W, C], mask bool [H, W], label, index int [B]) -> (images uint8 [B, ...], codes).

    Where the mask is True the codes of `levels` are drawn anew; variant i depends on the seed and on index[i].
    """
    config = run.config
    vqvae, priors = workdir.load_vqvae(run), workdir.load_priors(run)
    model = configs.make_vqvae(config)
    modules = [configs.make_prior(config, level) for level in range(len(run.levels))]
    controls = tuple(configs.make_control(config, name) for name in run.levels)
    weights = jax.device_put([prior.params for prior in priors], parallel.replicated())
    decoder = vqvae.on_devices()
    key = jax.random.key(config.sample.seed)

    @jax.jit
    def draw(decoder, weights, controls, image, mask, label, index):
        kept = model.apply(decoder, to_float(image[None]), method='encode')
        kept = [jnp.repeat(codes, len(index), axis=0) for codes in kept]
        given = [
            jnp.where(_covered(mask, codes.shape[1:]), -1, codes) if name in levels else codes
            for name, codes in zip(run.levels, kept, strict=True)
        ]
        labels = jnp.full((len(index),), label) if config.data.num_classes else None
        codes = sample_levels(modules, weights, key, index, labels, controls, given)
        return to_uint8(model.apply(decoder, codes, method='decode')), codes

    return lambda image, mask, label, index: draw(decoder, weights, controls, image, mask, label, index)


def read_mask(mask: str, size: tuple[int, int]) -> np.ndarray:
    """bool [H, W], True where to draw anew, from '' (everywhere), 'top,left,bottom,right' in shares, or an image file.

    Raises:
      JobError: none of these.
    """
    height, width = size
    if not mask:
        return np.ones(size, bool)
    if os.path.isfile(mask):
        with Image.open(mask) as image:  # white: draw anew
            return np.asarray(image.convert('L').resize((width, height), Image.Resampling.NEAREST)) >= _GREY
    try:
        top, left, bottom, right = (float(share) for share in mask.split(','))
    except ValueError:
        raise JobError(
            f"edit.mask is {mask!r}: give '', 'top,left,bottom,right' in shares such as 0.5,0,1,1, or an image file"
        ) from None
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise JobError(f'edit.mask is {mask!r}: 0 <= top < bottom <= 1 and 0 <= left < right <= 1 must hold')
    rows, columns = (np.arange(n) + 0.5 for n in size)
    inside = (rows >= top * height) & (rows < bottom * height)
    return inside[:, None] & (columns >= left * width) & (columns < right * width)


def _covered(mask, shape):
    # bool [H, W] -> [h, w]: codes with any masked pixel in their cell
    height, width = mask.shape
    cells = mask.reshape(shape[0], height // shape[0], shape[1], width // shape[1])
    return cells.any(axis=(1, 3))


def _write(directory, name, image, mask, images, codes):
    kept = np.where(mask[..., None], np.uint8(_GREY), image)
    row = np.concatenate([image[None], kept[None], images])
    pictures.save_png(directory / f'{name}.png', pictures.image_grid(row, len(row), scale=pictures.visible_scale(row)))
    arrays = {'arr_0': images, 'mask': mask} | {f'codes_{level}': c for level, c in enumerate(codes)}
    samples.write_npz(directory / f'{name}.npz', arrays)
