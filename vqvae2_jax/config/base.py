"""The base config: every field once, with its default, its type, its allowed values and its meaning.

All experiments start from it:

    from vqvae2_jax.config import base


    def get_config():
        config = base.get_config()
        config.name = 'mine'
        config.vqvae.hidden_channels = 64
        return config

The config is locked: an unknown field and a value of another type are errors. The tables of docs/configs.md are made
from this file (`python -m tests.config_tables`).
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vqvae2_jax.config.data_fields import DATA, MAX_CLASSES, seed_field
from vqvae2_jax.config.fields import Bool, Choice, ConfigError, Field, Float, Int, Label, Name, Path, Tuple
from vqvae2_jax.config.job_fields import EVALUATE, REJECT, SAMPLE, SAMPLE_LEVELS, SERVE
from vqvae2_jax.data import codes as code_store
from vqvae2_jax.data import own_codes
from vqvae2_jax.data.images import SPLITS
from vqvae2_jax.io.trackers import TRACKERS
from vqvae2_jax.models.block_runner import NO_REMAT, REMAT_CHOICES
from vqvae2_jax.models.prior import ATTENTION_DROPOUT_KINDS, DROPOUT_PLACEMENTS

Schema = dict[str, Any]  # nested: field -> Field, section -> Schema

_STEPS = 10**9
_BATCH = 2**20  # images
_CHANNELS = 2**16
_BLOCKS = 256


def _share(default: float, doc: str) -> Float:
    return Float(0, 1, high_open=True, default=default, doc=doc)


def _dtype(doc: str) -> Choice:
    return Choice(('float32', 'bfloat16'), default='float32', doc=doc)


_CONFIG = {
    'name': Name(default='unnamed', doc='of the run: its directory is `runs/<name>` unless `--workdir` is given'),
    'seed': seed_field('of initial weights, shuffling, augmentation and dropout'),
    'tracker': Choice(
        ('', *TRACKERS), default='', doc="that gets a copy of every training's log (docs/files.md); `''`: none"
    ),
}

_TRAINING = {
    'steps': Int(1, _STEPS, default=10_000, doc='updates'),
    'batch_size': Int(1, _BATCH, default=32, doc='global; a multiple of the `data` axis times `grad_accum_steps`'),
    'learning_rate': Float(0, 10, low_open=True, default=3e-4, doc='of Adam, after the warm-up'),
    'warmup_steps': Int(0, _STEPS, default=0, doc='over which the rate rises from 0; at most `steps`'),
    'lr_schedule': Choice(('constant', 'cosine'), default='constant', doc='`cosine`: to 0 at `steps`'),
    'adam_b2': _share(0.999, "decay of Adam's second moment"),
    'weight_decay': Float(0, 1000, default=0.0, doc='decoupled, as in AdamW'),
    'clip_norm': Float(0, 1e9, default=0.0, doc='largest norm of the whole gradient; 0: no clipping'),
    'grad_accum_steps': Int(
        1,
        2**16,
        default=1,
        doc='microbatches of a batch, one after another, to save memory; the update is that of the whole batch, with '
        'other dropout masks. 1 for stage 1, whose codebook learns from whole batches',
    ),
    'params_ema_decay': _share(
        0.999, 'of the average of the weights that evaluation and later stages use; 0: the last weights'
    ),
    'log_every': Int(1, _STEPS, default=50, doc='steps between lines of the log'),
    'eval_every': Int(1, _STEPS, default=500, doc='steps between evaluations; the best weights are kept'),
    'eval_examples': Int(0, _STEPS, default=0, doc='of the validation split, at each evaluation; 0: all'),
    'image_every': Int(0, _STEPS, default=0, doc='steps between images; 0: never'),
    'save_every': Int(1, _STEPS, default=500, doc='steps between checkpoints'),
    'profile_steps': Tuple(
        Int(1, _STEPS), (0, 2), default=(), doc='(first, last): writes a `jax.profiler` trace of these steps'
    ),
    'warn_usage': _share(
        0.2, 'stage 1: warns of a level that uses less than this share of its codes, 5 log lines in a row; 0: never'
    ),
    'warn_perplexity': Float(
        0,
        2**20,
        default=1.2,
        doc='stage 1: warns of a level whose batches have a lower perplexity, 5 log lines in a row; 0: never',
    ),
    'warn_overfit': Float(
        0,
        1000,
        default=0.05,
        doc='priors: warns when the validation NLL is above its best by this share while that of training falls; '
        '0: never, as classifiers have it',
    ),
    'warn_free_space': Float(
        0, 1000, default=2.0, doc='warns of a disk that has less room than this many checkpoints; 0: never'
    ),
}

_VQVAE = {
    'hidden_channels': Int(2, _CHANNELS, default=128, doc='channels of encoders and decoders'),
    'residual_channels': Int(1, _CHANNELS, default=64, doc='channels inside their residual blocks'),
    'num_residual_blocks': Int(1, _BLOCKS, default=2, doc='of each encoder and decoder'),
    'relu_skip': Bool(
        default=False,
        doc='the skip connections of residual blocks carry relu(x) in place of x, as in PyTorch weights that were '
        'trained with a ReLU in place (docs/from_pytorch.md)',
    ),
    'codebook_size': Int(2, 2**20, default=512, doc='codes of each level'),
    'codebook_dim': Int(1, _CHANNELS, default=64, doc='length of a code vector'),
    'commitment_weight': Float(0, 1e6, default=0.25, doc='beta of the paper'),
    'codebook_ema_decay': _share(0.99, "of the codebook's moving averages; gamma of the paper"),
    'dead_code_threshold': _share(
        0.03, 'a code chosen less often than this fraction of an even share restarts from the batch; 0: never'
    ),
    'preview_grad_scale': Float(
        0,
        1000,
        default=0.0,
        doc="scale of the gradient of the coarse levels' previews that trains the model; 0: the paper",
    ),
    'dtype': _dtype('of the computation; the quantizer stays in float32'),
    'training': _TRAINING,
}

_CODES = {
    'path': Path(
        default='',
        doc='directory of the codes of another tokenizer, which replace stage 1 (docs/your_codes.md): '
        "`base.get_config(codes=...)` sets it; `''`: codes are extracted by stage 1",
    ),
    'batch_size': Int(1, _BATCH, default=256, doc='images encoded at once, over all devices'),
    'shard_size': Int(1, 2**24, default=16_384, doc='images a file; an interrupted extraction loses at most one file'),
    'flip': Bool(default=False, doc='extracts the codes of mirrored training images too: priors train on both'),
    'crops': Int(
        0,
        1_000,
        default=0,
        doc='extracts the codes of that many crops of every training image too, at random places: priors train on '
        'all. For few images; set `data.crop` as well, so that stage 1 knows such crops',
    ),
}

_PRIOR = {
    'order': Choice(
        ('raster', 'wavefront'),
        default='raster',
        doc='of generation: `raster`, one position at a time, by two stacks of blocks (the paper); `wavefront`, many '
        'positions at a time, by one stack',
    ),
    'skew': Int(
        1, 1024, default=2, doc='wavefront only: columns that each row lags behind the row above; at most the width'
    ),
    'hidden_channels': Int(1, _CHANNELS, default=512, doc='channels of the stacks'),
    'residual_channels': Int(1, _CHANNELS, default=2048, doc='channels inside their blocks'),
    'num_residual_blocks': Int(1, _BLOCKS, default=20, doc='of each stack'),
    'kernel_size': Int(1, 63, default=5, doc='of the convolutions; odd, and 3 or more in wavefront order'),
    'num_attention_layers': Int(
        0,
        _BLOCKS,
        default=0,
        doc='causal attention layers, one after every `num_residual_blocks // num_attention_layers` blocks; '
        'at most `num_residual_blocks`',
    ),
    'num_heads': Int(1, 1024, default=8, doc='of each attention layer; divides `hidden_channels`'),
    'num_output_blocks': Int(0, _BLOCKS, default=0, doc='1x1 residual blocks on top'),
    'num_cond_blocks': Int(0, _BLOCKS, default=0, doc="residual blocks over the coarser levels' codes"),
    'label_dropout': _share(0.0, 'fraction of training examples without their class, for guidance; needs classes'),
    'dropout': _share(0.0, 'rate of the dropout of each gated block'),
    'dropout_placement': Choice(
        DROPOUT_PLACEMENTS,
        default='inside',
        doc='`inside`: before the second convolution of the block (PixelSNAIL); `after`: on its output (the paper)',
    ),
    'attention_dropout': _share(0.0, 'rate of the dropout in attention'),
    'attention_dropout_kind': Choice(
        ATTENTION_DROPOUT_KINDS,
        default='keys',
        doc='`keys`: a dropped key gets no weight (DropKey); `logits`: dropout on the logits (the paper)',
    ),
    'remat': Choice(
        REMAT_CHOICES,
        default=NO_REMAT,
        doc='activations that training recomputes instead of keeping them: `blocks`, the inside of blocks and '
        'attention, for the least memory and about a third more compute; `blocks_but_convs`, the same but for the '
        'outputs of convolutions larger than 1x1, for little more compute; `none`',
    ),
    'scan_layers': Bool(
        default=False,
        doc='training runs blocks as a loop: compiles one block of each kind, and holds one or two more copies of '
        'their parameters',
    ),
    'dtype': _dtype('of the computation; logits stay in float32'),
    'training': _TRAINING,
}

_CLASSIFIER = {
    'widths': Tuple(
        Int(4, _CHANNELS),
        range(1, 9),
        default=(64, 128, 256, 512),
        doc='channels of each stage; every stage after the first halves the map',
    ),
    'blocks': Tuple(
        Int(1, 128), range(1, 9), default=(2, 2, 2, 2), doc='residual blocks of each stage; as many items as `widths`'
    ),
    'stem_stride': Int(1, 64, default=1, doc='2 for images of 128 pixels and more'),
    'dropout': _share(0.0, 'before the last layer'),
    'flip': Bool(default=False, doc='trains on mirrored images too'),
    'crop': Bool(default=False, doc='trains on crops at random places'),
    'dtype': _dtype('of the computation'),
    'training': _TRAINING | {'warn_overfit': dataclasses.replace(_TRAINING['warn_overfit'], default=0.0)},
}


def level_names(downsample_factors: Sequence[int]) -> tuple[str, ...]:
    """Returns the names of the levels that stage 1 makes, finest first (`data.codes.level_names`)."""
    return code_store.level_names(len(downsample_factors))


def schema(levels: Sequence[str] = ('bottom', 'top'), *, stage_1: bool = True) -> Schema:
    """Returns the type of every field.

    Args:
      levels: names of the levels, finest first.
      stage_1: False: without the sections `data` and `vqvae`, of a config with codes of another tokenizer.

    Returns:
      A nested dict in the order of docs/configs.md.
    """
    factors = Tuple(
        Int(2, 1024),
        range(1, 9),
        default=(2,) * len(levels),
        doc='how much smaller each level is than the one before, finest first; powers of two. They name the levels: '
        '`top`; `bottom`, `top`; `bottom`, `middle`, `top`; `bottom`, `level1`, ..., `top`',
    )
    inpaint = {
        'path': Path(default='', doc='the image file, or the folder of images, to inpaint'),
        'mask': Path(
            default='',
            doc="where to sample: `''`, everywhere; `top,left,bottom,right` in fractions of the cropped image, as "
            '`0.5,0,1,1` for its lower half; or an image file (also on a bucket), white where to sample',
        ),
        'levels': Tuple(Choice(tuple(levels)), range(9), default=(), doc='levels to sample; `()`: all'),
        'label': Label(
            -1,
            MAX_CLASSES,
            default=-1,
            doc='class of the sampled codes, its number or (on the command line) its name; -1: not given',
        ),
        'count': Int(1, 10_000, default=4, doc='variants of each image'),
    }
    return {
        **_CONFIG,
        **({'data': DATA} if stage_1 else {}),
        'parallel': {
            'fsdp': Int(
                1,
                2**20,
                default=1,
                doc='neighboring devices that share one copy of parameters, their average and the optimizer state; '
                'divides the number of devices; fewer devices all share one copy',
            )
        },
        **({'vqvae': {'downsample_factors': factors, **_VQVAE}} if stage_1 else {}),
        'codes': _CODES,
        'prior': dict.fromkeys(levels, _PRIOR),
        'classifier': _CLASSIFIER,
        'sample': {**SAMPLE, **{name: dict.fromkeys(levels, field) for name, field in SAMPLE_LEVELS.items()}},
        'reject': REJECT,
        'evaluate': EVALUATE,
        'inpaint': inpaint,
        'likelihood': {
            'split': Choice(SPLITS, default='test', doc='whose images are evaluated'),
            'path': Path(default='', doc='instead of a split: an image, or a folder of images, of unknown class'),
        },
        'reconstruct': {'path': Path(default='', doc='the image file, or the folder of images, to encode and decode')},
        'serve': SERVE,
    }


def get_config(levels: Sequence[str] | None = None, *, codes: epath.PathLike = '') -> ConfigDict:
    """Returns the base config.

    Args:
      levels: names of the levels, finest first (`level_names`); None: ('bottom', 'top').
      codes: directory of the codes of another tokenizer, which replace stage 1 (docs/your_codes.md). The config has no
        sections `data` and `vqvae` then, and the levels of these codes.

    Returns:
      A new ConfigDict with every field at its default: type-safe and locked.

    Raises:
      ConfigError: `levels` and `codes` are given, or there are no such codes.
    """
    if not codes:
        return default_config(('bottom', 'top') if levels is None else levels)
    if levels is not None:
        raise ConfigError(f'levels={tuple(levels)} and codes={os.fspath(codes)!r}: the codes have the names of levels')
    config = default_config(own_codes.read_spec(codes).levels, stage_1=False)
    config.codes.path = os.fspath(codes)
    return config


def default_config(levels: Sequence[str], *, stage_1: bool = True) -> ConfigDict:
    """Returns a new config with every field at its default, locked; arguments as in `schema`."""
    return ConfigDict(_defaults(schema(levels, stage_1=stage_1))).lock()


def _defaults(fields: Schema) -> dict[str, Any]:
    return {k: field.default if isinstance(field, Field) else _defaults(field) for k, field in fields.items()}
