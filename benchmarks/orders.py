"""What an order of drawing costs in likelihood: priors in raster and wavefront order, trained alike on the same codes.

  python -m benchmarks.orders --config=configs/cifar10_small.py

Trains stage 1, extracts the codes, and trains a prior for every level, number of attentions, order and seed: same data,
width, depth, batches and updates. Stopped, the same command continues. Rates must be constant (`decay`), so that the
curve of one training answers both questions: held-out nats after equal updates, and after the time in which the
fastest order has done all of its updates. That time is counted in seconds of pure training, of which a short training
afterwards measures the least: neither compilation nor evaluation counts. Trainings may share the machine with other
work; the last run of this command, when all are done, should not.

Prints a table, and writes orders.png and orders.json into the workdir: nats are those of the averaged weights on
`eval_examples` images; the mean over the seeds, and their range. Seconds an image are those of drawing 16 maps at once.
"""

import argparse
import importlib.util
import itertools
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks.timing import seconds
from vqvae2_jax import checks
from vqvae2_jax import config as configs
from vqvae2_jax.io import pictures, provenance
from vqvae2_jax.io.logging import read_metrics
from vqvae2_jax.jobs.codes import extract
from vqvae2_jax.jobs.stages import train_prior, train_vqvae
from vqvae2_jax.jobs.workdir import Run, load_trained, prior_directory
from vqvae2_jax.sampling.ancestral import sample, sample_keys

DRAWN = 16  # maps at once
TIMED = 50  # updates
COLUMNS = ('level', 'attentions', 'order', 'steps', 'ms an image', 'ms an update')
COLUMNS += ('equal updates: nats', 'against raster', 'equal time: nats', 'against raster')


def load_config(path):
    """The config file's fields, complete."""
    spec = importlib.util.spec_from_file_location('config', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return configs.complete(module.get_config())


def variant(run, level, order, attention, seed):
    """The run of one prior, in a workdir of its own with the same stage 1 and codes."""
    config = run.config.copy_and_resolve_references()
    config.seed = seed
    section = config.prior[level]
    section.update({'order': 'raster'} if order == 'raster' else {'order': 'wavefront', 'slope': int(order)})
    section.update(attention_layers=attention)
    section.training.show_every = 0
    checks.check(config)
    found = Run(config, run.path('orders') / f'{level}-{order}-attention{attention}-seed{seed}')
    link(run, found)
    return found


def link(run, other):
    """Lets another workdir have the run's stage 1 and codes."""
    other.workdir.mkdir(parents=True, exist_ok=True)
    for name in ('vqvae', 'codes'):
        if not other.path(name).exists():
            os.symlink(run.path(name), other.path(name))


def learning_curve(run, level):
    """Trains the prior, unless it is done: updates [n] and held-out nats [n] of each evaluation."""
    train_prior(run, level)
    lines = read_metrics(run.path(prior_directory(level)))
    judged = [(line['step'], line['validation/nll']) for line in lines if 'validation/nll' in line]
    return np.array(judged, float).T


def seconds_an_update(run, level):
    """Of pure training: the least between two log lines of a short training of its own, with no evaluation between."""
    config = run.config.copy_and_resolve_references()
    config.prior[level].training.update(steps=TIMED, log_every=TIMED // 5, eval_every=TIMED, save_every=TIMED)
    with tempfile.TemporaryDirectory() as directory:
        short = Run(config, epath.Path(directory))
        link(run, short)
        train_prior(short, level)
        lines = [line for line in read_metrics(short.path(prior_directory(level))) if 'train/loss' in line]
    return min((b['time'] - a['time']) / (b['step'] - a['step']) for a, b in itertools.pairwise(lines))


def seconds_an_image(run, level):
    """Of drawing the level's maps with the trained weights, classes in turn, on codes of held-out images."""
    index = run.levels.index(level)
    prior, params = configs.make_prior(run.config, index), load_trained(run, prior_directory(level), 'prior').params
    examples = [run.codes('validation')[i] for i in range(DRAWN)]
    coarser = [jnp.stack([e[f'codes_{i}'] for e in examples]).astype(int) for i in range(index + 1, len(run.levels))]
    labels = jnp.arange(DRAWN) % prior.num_classes if prior.num_classes else None

    def draw(params, labels, coarser):
        return sample(prior, params, sample_keys(jax.random.key(0), jnp.arange(DRAWN)), labels, coarser).codes

    return seconds(draw, params, labels, tuple(coarser)) / DRAWN


def compare(run, level, attention, orders, seeds):
    """{order: what was measured}, for one level and one number of attentions."""
    found = {}
    for order in orders:
        runs = [variant(run, level, order, attention, seed) for seed in seeds]
        updates, nats = zip(*[learning_curve(r, level) for r in runs], strict=True)
        found[order] = {
            'steps': configs.make_prior(runs[0].config, run.levels.index(level)).order.steps,
            'seconds an image': seconds_an_image(runs[0], level),
            'seconds an update': seconds_an_update(runs[0], level),
            'updates': updates[0].tolist(),
            'nats': np.array(nats).tolist(),  # [seeds, n]
        }
    budget = min(result['updates'][-1] * result['seconds an update'] for result in found.values())
    for result in found.values():
        within = budget / result['seconds an update']
        result['equal updates'] = [curve[-1] for curve in result['nats']]
        result['equal time'] = [np.interp(within, result['updates'], curve) for curve in result['nats']]
        result['updates in equal time'] = round(within)
    return found


def name_of(order):
    return order if order == 'raster' else f'slope {order}'


def table(level, attention, found):
    """Its lines."""
    first = next(iter(found.values()))
    for order, result in found.items():
        cells = [level, str(attention), name_of(order), str(result['steps'])]
        cells += [f'{1e3 * result["seconds an image"]:.1f}', f'{1e3 * result["seconds an update"]:.0f}']
        for budget in ('equal updates', 'equal time'):
            nats, base = np.array(result[budget]), np.mean(first[budget])
            cells.append(f'{nats.mean():.3f} ({nats.min():.3f} to {nats.max():.3f})')
            cells.append('' if result is first else f'{100 * (nats.mean() / base - 1):+.1f} %')
        yield f'| {" | ".join(cells)} |'


def panel(level, attention, found):
    """Nats over seconds of training."""
    curves = {
        name_of(order): (np.array(r['updates']) * r['seconds an update'], np.mean(r['nats'], axis=0))
        for order, r in found.items()
    }
    title = f'{level}, {attention or "no"} attention{"s" if attention > 1 else ""}'
    return pictures.Panel(title, curves, 'held-out nats per code', xlabel='seconds of training')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', required=True)
    parser.add_argument('--workdir', help='runs/<name of the config> when not given')
    parser.add_argument('--levels', nargs='+', default=['top', 'bottom'])
    parser.add_argument('--attention', type=int, nargs='+', default=[0, 2], help='numbers of attention layers')
    parser.add_argument('--slopes', type=int, nargs='*', default=[3, 2])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    options = parser.parse_args()
    config = load_config(options.config)
    checks.check(config)
    for level in options.levels:
        if (decay := config.prior[level].training.decay) != 'constant':
            parser.error(
                f'prior.{level}.training.decay is {decay!r}: only under a constant rate may curves stop anywhere'
            )
    run = Run(config, epath.Path(options.workdir or f'runs/{config.name}').resolve())
    train_vqvae(run)
    extract(run)

    results = {}
    for level in options.levels:
        for attention in options.attention:
            orders = ('raster', *map(str, options.slopes))
            results[level, attention] = compare(run, level, attention, orders, options.seeds)
    print(f'\n| {" | ".join(COLUMNS)} |\n|{"---|" * len(COLUMNS)}')
    for (level, attention), found in results.items():
        print('\n'.join(table(level, attention, found)))
    pictures.plot_panels(run.path('orders.png'), [panel(*key, found) for key, found in results.items()])
    named = {f'{level}, {attention} attentions': found for (level, attention), found in results.items()}
    provenance.write_json(run.path('orders.json'), {'device': jax.devices()[0].device_kind, **named})


if __name__ == '__main__':
    main()
