"""The cost of a generation order in likelihood: raster and wavefront priors, same training, same codes.

  python -m benchmarks.orders --config=configs/cifar10_small.py

Trains stage 1, extracts the codes, and trains a prior for every level, number of attentions, order and seed: same data,
width, depth, batches and updates. Stopped, the same command continues. Rates must be constant (`lr_schedule`), so that
the curve of one training answers both questions: held-out nats after equal updates, and after the time in which the
fastest order has done all of its updates. That time is counted in seconds of pure training, which short trainings
measure afterwards, of all orders alternately: neither compilation nor evaluation counts. Trainings may share the
machine with other work; these, in the last run of this command, should not. `--trained=orders.json` takes the nats of
an earlier study: no prior is trained to the end, and only times are measured.

Prints a table, and writes orders.png and orders.json into the workdir: nats are those of the averaged weights on
`eval_examples` images; the mean over the seeds, and their range. Seconds per image are measured on 16 maps at once,
with weights that were not trained.
"""

import argparse
import datetime
import itertools
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks.timing import machine, seconds
from vqvae2_jax import load_config, xla_flags
from vqvae2_jax.config import base, build
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.io import files, plots
from vqvae2_jax.io.logging import read_metrics
from vqvae2_jax.jobs.extract_codes import extract_codes
from vqvae2_jax.jobs.train import train_prior, train_vqvae
from vqvae2_jax.jobs.workdir import Run, training_directory
from vqvae2_jax.sampling.ancestral import sample_keys, sample_level

MAPS = 16  # maps at once
TIMED = 50  # updates
TURNS = 2
COLUMNS = ('level', 'attention layers', 'order', 'steps', 'ms/image', 'ms/update')
COLUMNS += ('equal updates: nats', 'relative to raster', 'equal time: nats', 'relative to raster')


def seed_argument(text: str) -> int:
    """Reads a seed from the command line."""
    try:
        return base.schema()['seed'].check('--seeds', int(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def variant(run, level, order, attention, seed):
    """Returns the run of one prior, in a workdir of its own with the same stage 1 and codes."""
    config = run.config.copy_and_resolve_references()
    config.seed = seed
    section = config.prior[level]
    section.update({'order': 'raster'} if order == 'raster' else {'order': 'wavefront', 'skew': int(order)})
    section.update(num_attention_layers=attention)
    section.training.image_every = 0
    validate_config(config)
    other = Run(config, run.path('orders') / f'{level}-{order}-attention{attention}-seed{seed}')
    link(run, other)
    return other


def link(run, other):
    """Lets another workdir have the run's stage 1 and codes."""
    other.workdir.mkdir(parents=True, exist_ok=True)
    for name in ('vqvae', 'codes'):
        if not other.path(name).exists():
            os.symlink(run.path(name), other.path(name))


def learning_curve(run, level):
    """Trains the prior, unless it is done; returns the updates [n] and held-out nats [n] of each evaluation."""
    train_prior(run, level)
    lines = read_metrics(run.path(training_directory(f'prior.{level}')))
    evaluated = [(line['step'], line['validation/nll']) for line in lines if 'validation/nll' in line]
    return np.array(evaluated, float).T


def seconds_an_update(run, level):
    """Returns the seconds of an update: the least between two log lines of a short training without evaluations."""
    config = run.config.copy_and_resolve_references()
    config.prior[level].training.update(steps=TIMED, log_every=TIMED // 5, eval_every=TIMED, save_every=TIMED)
    with tempfile.TemporaryDirectory() as directory:
        short = Run(config, epath.Path(directory))
        link(run, short)
        train_prior(short, level)
        lines = [
            line for line in read_metrics(short.path(training_directory(f'prior.{level}'))) if 'train/loss' in line
        ]
    return min((b['time'] - a['time']) / (b['step'] - a['step']) for a, b in itertools.pairwise(lines))


def seconds_an_image(run, level):
    """Returns the seconds to sample one of `MAPS` maps of the level."""
    prior, arguments = build.networks(run.config)[f'prior.{level}']
    key, *one = arguments
    params = jax.jit(prior.init)(key, *jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one))['params']
    _, labels, coarser = jax.tree.map(lambda x: jnp.zeros((MAPS, *x.shape[1:]), x.dtype), one)

    def sample_codes(params, labels, coarser):
        return sample_level(prior, params, sample_keys(jax.random.key(0), jnp.arange(MAPS)), labels, coarser).codes

    return seconds(sample_codes, params, labels, coarser) / MAPS


def learning_curves(run, level, attention, orders, seeds):
    """Returns {order: updates and held-out nats} for one level and one number of attention layers."""
    results_by_order = {}
    for order in orders:
        runs = [variant(run, level, order, attention, seed) for seed in seeds]
        updates, nats = zip(*[learning_curve(r, level) for r in runs], strict=True)
        results_by_order[order] = {'updates': updates[0].tolist(), 'nats': np.array(nats).tolist()}  # [n], [seeds, n]
    return results_by_order


def add_times(results_by_order, run, level, attention):
    """Adds steps, seconds, and the nats after equal updates and after equal time to learning curves."""
    runs = {order: variant(run, level, order, attention, seed=0) for order in results_by_order}
    updates = [{order: seconds_an_update(r, level) for order, r in runs.items()} for _ in range(TURNS)]
    for order, result in results_by_order.items():
        result['steps'] = build.make_prior(runs[order].config, run.levels.index(level)).order.num_steps
        result['seconds an image'] = seconds_an_image(runs[order], level)
        result['seconds an update'] = min(turn[order] for turn in updates)
    budget = min(result['updates'][-1] * result['seconds an update'] for result in results_by_order.values())
    for result in results_by_order.values():
        within = budget / result['seconds an update']
        result['equal updates'] = [curve[-1] for curve in result['nats']]
        result['equal time'] = [np.interp(within, result['updates'], curve) for curve in result['nats']]
        result['updates in equal time'] = round(within)


def name_of(order):
    return order if order == 'raster' else f'skew {order}'


def name_of_row(level, attention):
    return f'{level}, {attention} attentions'


def table(level, attention, results_by_order):
    """Yields the lines of the table."""
    first = next(iter(results_by_order.values()))
    for order, result in results_by_order.items():
        cells = [level, str(attention), name_of(order), str(result['steps'])]
        cells += [f'{1e3 * result["seconds an image"]:.1f}', f'{1e3 * result["seconds an update"]:.0f}']
        for budget in ('equal updates', 'equal time'):
            nats, base = np.array(result[budget]), np.mean(first[budget])
            cells.append(f'{nats.mean():.3f} ({nats.min():.3f} to {nats.max():.3f})')
            cells.append('' if result is first else f'{100 * (nats.mean() / base - 1):+.1f} %')
        yield f'| {" | ".join(cells)} |'


def panel(level, attention, results_by_order):
    """Makes the panel of nats over seconds of training."""
    curves = {
        name_of(order): (np.array(r['updates']) * r['seconds an update'], np.mean(r['nats'], axis=0))
        for order, r in results_by_order.items()
    }
    title = f'{level}, {attention or "no"} attention{"s" if attention > 1 else ""}'
    return plots.Panel(title, curves, 'held-out nats per code', xlabel='seconds of training')


def main():
    xla_flags.set_cpu_flags()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', required=True)
    parser.add_argument('--workdir', help='runs/<name of the config> when not given')
    parser.add_argument('--levels', nargs='+', default=['top', 'bottom'])
    parser.add_argument('--attention', type=int, nargs='+', default=[0, 2], help='numbers of attention layers')
    parser.add_argument('--skews', type=int, nargs='*', default=[3, 2])
    parser.add_argument('--seeds', type=seed_argument, nargs='+', default=[0, 1, 2])
    parser.add_argument('--trained', help='orders.json of a study whose levels, attentions and orders are timed here')
    options = parser.parse_args()
    config = load_config(options.config)
    validate_config(config)
    for level in options.levels:
        if (schedule := config.prior[level].training.lr_schedule) != 'constant':
            parser.error(
                f'prior.{level}.training.lr_schedule is {schedule!r}: curves may stop anywhere only at a constant rate'
            )
    keys = list(itertools.product(options.levels, options.attention))
    study = files.read_json(epath.Path(options.trained)) if options.trained else {}
    if study and (missing := [name for key in keys if (name := name_of_row(*key)) not in study]):
        parser.error(f'--trained={options.trained} does not hold {missing}: leave them out, or train them without it')
    run = Run(config, epath.Path(options.workdir or f'runs/{config.name}').resolve())
    train_vqvae(run)
    extract_codes(run)

    orders, results = ('raster', *map(str, options.skews)), {}
    for key in keys:
        results[key] = study.get(name_of_row(*key)) or learning_curves(run, *key, orders, options.seeds)
        add_times(results[key], run, *key)
    print(f'\n| {" | ".join(COLUMNS)} |\n|{"---|" * len(COLUMNS)}')
    for (level, attention), results_by_order in results.items():
        print('\n'.join(table(level, attention, results_by_order)))
    plots.plot_panels(
        run.path('orders.png'), [panel(*key, results_by_order) for key, results_by_order in results.items()]
    )
    when = {'timed': f'{datetime.date.today()}, {machine()}'}
    if study:
        when['trained'] = study.get('trained', study.get('timed'))
    named = {name_of_row(*key): results_by_order for key, results_by_order in results.items()}
    files.write_json(run.path('orders.json'), when | named)


if __name__ == '__main__':
    main()
