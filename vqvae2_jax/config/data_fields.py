"""The fields of config.data, for base.py."""

from vqvae2_jax.config.fields import Bool, Choice, Float, Int, Path, Text, Tuple
from vqvae2_jax.data.decode import MAX_PIXELS

MAX_CLASSES = 10**6


def seed_field(doc: str) -> Int:
    """Returns the field of a seed."""
    # JAX would take the low 32 bits of a larger one.
    return Int(0, 2**32 - 1, default=0, doc=doc)


DATA = {
    'name': Text(
        True,
        default='fashion',
        doc='`fashion` (in the package), `folder`, `npz`, `huggingface`, or the name of a TensorFlow dataset prepared '
        'as array_record',
    ),
    'path': Path(
        default='',
        doc='the folder; the .npz file (`arr_0`, `label`, `class_names`) or a folder of some, which are joined (with '
        '`splits`, the folder of them); for `huggingface` a folder that `save_to_disk` wrote, or a dataset of the hub, '
        "OWNER/NAME or OWNER/NAME@REVISION:CONFIG; or TFDS's data_dir, `''`: its default. All but datasets of the hub "
        'may also be on gs://, s3:// and hf://: images of a folder and records of TFDS are read there one by one, the '
        'rest is copied by every process',
    ),
    'image_size': Tuple(Int(1, 2**14), (2,), default=(28, 28), doc='(height, width); images are resized and cropped'),
    'channels': Choice((1, 3), default=1, doc='1: gray, 3: RGB'),
    'num_classes': Int(0, MAX_CLASSES, default=0, doc='0: unlabeled, without classifier and rejection'),
    'splits': Tuple(
        Text(True),
        (0, 3),
        default=(),
        doc='names of (train, validation, test): subfolders, .npz files or splits of datasets such as `train[:95%]`; '
        '`()`: all images are one set, split at random',
    ),
    'held_out': Tuple(
        Float(0, 1, high_open=True),
        (2,),
        default=(0.1, 0.1),
        doc='fractions of that set for (validation, test); their sum is below 1',
    ),
    'split_seed': seed_field('of that split, and of the order of every split'),
    'flip': Bool(default=False, doc='stage 1 trains on mirrored images too'),
    'crop': Bool(default=False, doc='stage 1 trains on crops at random places'),
    'on_error': Choice(
        ('raise', 'skip'),
        default='raise',
        doc='an image that cannot be opened or decoded; `skip` lists it in `skipped.txt`',
    ),
    'max_pixels': Int(
        1,
        2**40,
        default=MAX_PIXELS,
        doc='of an image as it is stored; a larger one counts as an image that cannot be decoded',
    ),
    'check_all': Bool(
        default=False,
        doc='before a training, decode all images, not 2000 of each split, and compare all by their content, also if '
        'there are more than 50,000',
    ),
    'max_bytes': Int(
        0,
        2**60,
        default=0,
        doc='limit of the arrays of compressed .npz files, which are held in memory; 0: half of the free memory',
    ),
    'cache_bytes': Int(
        0,
        2**60,
        default=2**32,
        doc='disk space of each process for remote data: images of a folder are kept up to this; ArrayRecord files of '
        'TFDS and of codes that are not larger together are copied before use, so that small records need no request '
        'each; at most half of the free space',
    ),
    'workers': Int(0, 1024, default=0, doc='processes that read images; 0: threads'),
}
