"""Likelihood under the paper's dropout and under this project's: same training, same codes.

  python -m benchmarks.dropout --config=configs/cifar10_small.py

Trains stage 1, extracts the codes, and trains a prior for every level, variant and seed: same data, network, batches
and updates. `placement` is that of the dropout in residual blocks, `kind` that of attention (docs/configs.md); the
paper states after the blocks, and logits. Stopped, the same command continues; with a constant
learning rate, a longer training also answers for fewer updates.

Prints a table: held-out nats per code after the last update, mean over the seeds and their range, and the difference to
the first variant, in percent and beyond the ranges of both variants (0 if they overlap).
"""

import argparse
import datetime

import numpy as np

from benchmarks.orders import learning_curve, link, seed_argument
from benchmarks.timing import machine
from vqvae2_jax import load_config, xla_flags
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.jobs.extract_codes import extract_codes
from vqvae2_jax.jobs.train import train_vqvae
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.models.prior import ATTENTION_DROPOUT_KINDS, DROPOUT_PLACEMENTS

COLUMNS = ('level', 'placement', 'kind', 'nats per code', 'relative to the first', 'beyond both ranges')


def variant(run, level, placement, kind, seed, options):
    """Returns the run of one prior, in a workdir of its own with the same stage 1 and codes."""
    config = run.config.copy_and_resolve_references()
    config.seed = seed
    section = config.prior[level]
    section.update(dropout=options.rate, dropout_placement=placement, attention_dropout_kind=kind)
    section.attention_dropout = options.rate if section.num_attention_layers else 0.0
    section.training.update(image_every=0, steps=options.steps)
    validate_config(config)
    other = Run(config, run.path('dropout') / f'{level}-{placement}-{kind}-rate{options.rate}-seed{seed}')
    link(run, other)
    return other


def variants(config, level):
    """Returns (placement, kind) of each variant; a prior without attention has one kind."""
    kinds = ATTENTION_DROPOUT_KINDS if config.prior[level].num_attention_layers else ATTENTION_DROPOUT_KINDS[:1]
    return [(placement, kind) for kind in kinds for placement in DROPOUT_PLACEMENTS]


def nats_after(run, level, steps):
    """Returns held-out nats per code after so many updates; the training may have gone on further."""
    return dict(learning_curve(run, level).T)[steps]


def beyond(nats, base):
    """Returns by how much the range of `nats` lies above that of `base`, in percent of the mean of `base`, or 0."""
    return 100 * max(np.min(nats) - np.max(base), 0.0) / np.mean(base)


def main():
    xla_flags.set_cpu_flags()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', required=True)
    parser.add_argument('--workdir', help='runs/<name of the config> when not given')
    parser.add_argument('--levels', nargs='+', default=['top', 'bottom'])
    parser.add_argument('--rate', type=float, default=0.1, help='of both kinds of dropout')
    parser.add_argument('--steps', type=int, default=800)
    parser.add_argument('--seeds', type=seed_argument, nargs='+', default=[0, 1, 2])
    parser.add_argument('--data', help='data.path, where the config has another')
    options = parser.parse_args()
    config = load_config(options.config)
    config.data.path = options.data or config.data.path
    run = Run(config, options.workdir or f'runs/{config.name}')
    train_vqvae(run)
    extract_codes(run)

    print(f'{machine()}, {datetime.date.today()}, rate {options.rate}, {options.steps} updates, seeds {options.seeds}')
    print(f'| {" | ".join(COLUMNS)} |\n|{"---|" * len(COLUMNS)}')
    for level in options.levels:
        base = None
        for placement, kind in variants(config, level):
            runs = [variant(run, level, placement, kind, seed, options) for seed in options.seeds]
            nats = np.array([nats_after(r, level, options.steps) for r in runs])
            base = nats if base is None else base
            cells = [level, placement, kind if config.prior[level].num_attention_layers else '']
            cells += [f'{nats.mean():.4f} ({nats.min():.4f} to {nats.max():.4f})']
            cells += [f'{100 * (nats.mean() / base.mean() - 1):+.2f} %', f'{beyond(nats, base):.2f} %']
            print(f'| {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    main()
