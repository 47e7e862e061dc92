"""The fields of the sections of sampling, rejection, evaluation and the page, for base.py."""

from vqvae2_jax.config.data_fields import MAX_CLASSES, seed_field
from vqvae2_jax.config.fields import Bool, Choice, Float, Int, Label, Name, Path, Text, Tuple
from vqvae2_jax.data.images import SPLITS

_BATCH = 2**20  # images

SAMPLE = {
    'name': Name(default='default', doc='of the set of samples: its directory is `samples/<name>`'),
    'count': Int(1, 10**9, default=1000, doc='samples wanted; may grow later'),
    'batch_size': Int(1, _BATCH, default=64, doc='samples generated at once, over all devices'),
    'shard_size': Int(1, _BATCH, default=1000, doc='images a file'),
    'seed': seed_field('of the samples; with its index and label it decides a sample'),
    'labels': Tuple(
        Label(0, MAX_CLASSES), range(10_001), default=(), doc='numbers or names, cycled through; `()`: all classes'
    ),
    'dtype': Choice(
        ('', 'float32', 'bfloat16'), default='', doc="of weights and caches while sampling; `''`: each prior's own"
    ),
}

# One value for each level.
SAMPLE_LEVELS = {
    'temperature': Float(0, 1000, default=1.0, doc='divides the logits; 0: always the likeliest code'),
    'top_k': Int(0, 2**20, default=0, doc='samples among that many likeliest codes; 0: all'),
    'top_p': Float(
        0, 1, low_open=True, default=1.0, doc='samples among the likeliest codes with this share of the probability'
    ),
    'guidance': Float(
        -1000,
        1000,
        default=1.0,
        doc='classifier-free: logits without class + `guidance` * (with - without); needs `label_dropout`; 1: off',
    ),
}

REJECT = {
    'keep_fraction': Float(0, 1, low_open=True, default=1.0, doc='fraction of the samples of each class to keep'),
    'threshold': Float(
        0,
        1,
        default=0.0,
        doc='keeps of these only samples whose class has at least this probability; may unbalance the classes',
    ),
    'classifier': Path(
        default='',
        doc="state dict (`.pth`, `.npz`) of a torchvision ResNet-50, -101 or -152 that replaces the run's classifier; "
        "same classes in the same order; `''`: the run's own",
    ),
}

EVALUATE = {
    'split': Choice(SPLITS, default='test', doc='whose images are reconstructed and evaluated'),
    'references': Tuple(
        Path(default='', doc=''),
        range(17),
        default=(),
        doc='references that FID compares samples and reconstructions with: splits, folders, `.npz` files of images '
        '(`arr_0`), or published statistics (`mu`, `sigma`). All other metrics use the first split in it; `()`, or no '
        'split: `split`',
    ),
    'inception': Path(
        default='',
        doc='weights of the FID Inception network: a `.pth` or `.npz` file, a pattern of several `.npz` if there is no '
        "such file, or `fetch`; `''`: the run's classifier replaces it, and its numbers are not called FID",
    ),
    'batch_size': Int(1, _BATCH, default=16, doc='images evaluated at once, over all devices'),
    'sweep': Tuple(
        Float(0, 1, low_open=True),
        range(1, 101),
        default=(1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1),
        doc='fractions of each class for the curves of rejection; all use as many images as the smallest fraction '
        'keeps, up to 50 000',
    ),
    'nearest': Int(
        0,
        100,
        default=0,
        doc='samples that the report shows beside the training images with the nearest features, so that copies are '
        'seen; needs the features of all training images; 0: none',
    ),
    'cas': Bool(
        default=False,
        doc='trains two more classifiers, on reconstructions and on samples: Classification Accuracy Score; '
        'needs classes',
    ),
    'real': Path(
        default='',
        doc='with `generated`, compares two sets instead of evaluating the run: folders, `.npz` files '
        '(`samples/*.npz`, a pattern if there is no such file), or splits of the data; needs `inception`',
    ),
    'generated': Path(default='', doc='the other set'),
}

SERVE = {
    'host': Text(
        True,
        default='127.0.0.1',
        doc='address of the page: the default can be reached from this machine only; `0.0.0.0`, from all that reach '
        'this machine, without a password',
    ),
    'port': Int(0, 65_535, default=7860, doc='its port; 0: a free one'),
    'max_bytes': Int(1, 2**40, default=2**24, doc='of an uploaded file; `data.max_pixels` limits its pixels'),
    'samples': Int(1, 1024, default=10, doc='generated at once'),
    'variants': Int(1, 1024, default=4, doc='of a filled image, generated at once'),
}
