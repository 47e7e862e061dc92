"""What an order of drawing costs in likelihood: priors in raster and wavefront order, trained alike on the same codes.

  python -m vqvae2_jax.main --config=configs/fashion.py --job=vqvae   # then --job=codes
  python benchmarks/orders.py --config=configs/fashion.py --workdir=runs/fashion --level=bottom

Every order is trained twice: with as many updates as raster, and for as long as raster took. Prints a line for each:
steps of sampling, seconds an update (compilation and evaluations shared out), updates, held-out nats per code (best of
the training; mean and range over the seeds), and the difference from raster. Stopped, the same command continues.
Fields of the prior can be overridden, as in --set attention_layers=2 heads=4 training.steps=800.
"""

import argparse
import ast
import importlib.util
import pathlib

import numpy as np
from etils import epath

from vqvae2_jax import checks
from vqvae2_jax import config as configs
from vqvae2_jax.data.loader import eval_batches, train_batches
from vqvae2_jax.io import provenance
from vqvae2_jax.io.checkpoint import Weights
from vqvae2_jax.jobs.codes import current_codes_digest
from vqvae2_jax.jobs.stages import prior_stage
from vqvae2_jax.jobs.train import Data, fit
from vqvae2_jax.jobs.workdir import Run, check_same
from vqvae2_jax.models.order import Order


def load_config(path, level, changes):
    """The config file's fields, complete, with `changes` ('a.b=value') made to the prior of `level`."""
    spec = importlib.util.spec_from_file_location('config', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = configs.complete(module.get_config())
    for change in changes:
        field, _, value = change.partition('=')
        config.prior[level].update_from_flattened_dict({field: ast.literal_eval(value)})
    return config


def train(run, level, order, steps, seed, directory):
    """Trains one prior, unless it is done; {'nll', 'seconds', 'steps'}."""
    section = run.config.prior[level]
    section.update({'order': 'raster'} if order == 'raster' else {'order': 'wavefront', 'slope': int(order)})
    section.training.update(steps=steps, eval_every=max(steps // 10, 1), show_every=0)
    checks.check(run.config)
    made_from = configs.settings(run.config, f'prior.{level}') | {'steps': steps, 'codes': current_codes_digest(run)}
    done, started = directory / 'result.json', directory / 'settings.json'
    if started.exists():
        remedy = f'Go back to those, delete {directory}, or give another --out.'
        check_same(f'the training in {directory}', provenance.read_json(started), made_from, remedy)
    provenance.write_json(started, made_from)
    if done.exists():
        return provenance.read_json(done)
    training = configs.training(run.config, f'prior.{level}')
    train_codes, held_out = run.codes('train'), run.codes('validation')
    data = Data(
        train=train_batches(train_codes, batch_size=training.batch_size, seed=seed),
        held_out=lambda: eval_batches(held_out, batch_size=training.batch_size),
    )
    stage = prior_stage(run, run.levels.index(level), show=False)
    try:
        result = fit(stage, training, data, directory, name=directory.name, seed=seed)
    finally:
        data.train.close()
    result['nll'] = Weights(directory).best()['summary']['nll']
    provenance.write_json(done, result)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', required=True)
    parser.add_argument('--workdir', required=True, help='of a run whose codes are extracted')
    parser.add_argument('--level', default='bottom')
    parser.add_argument('--slopes', type=int, nargs='*', default=[3, 2, 1])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--set', nargs='*', default=[], metavar='FIELD=VALUE')
    parser.add_argument('--equal', choices=('updates', 'both'), default='both')
    parser.add_argument('--out', help='folder of the trainings; WORKDIR/orders when not given')
    options = parser.parse_args()
    config = load_config(options.config, options.level, options.set)
    run = Run(config, epath.Path(options.workdir).resolve())
    out = epath.Path(options.out or pathlib.Path(options.workdir) / 'orders').resolve()
    steps = config.prior[options.level].training.steps

    found = {}
    for seed in options.seeds:
        for order in ('raster', *map(str, options.slopes)):
            place = out / f'{options.level}-{order}-seed{seed}'
            result = train(run, options.level, order, steps, seed, place)
            found.setdefault((order, 'updates'), []).append(result)
            if order != 'raster' and options.equal == 'both':
                raster = found['raster', 'updates'][-1]
                longer = round(steps * raster['seconds'] / result['seconds'])
                place = out / f'{options.level}-{order}-seed{seed}-time'
                found.setdefault((order, 'time'), []).append(train(run, options.level, order, longer, seed, place))

    shape = run.codes('validation')[0][f'codes_{run.levels.index(options.level)}'].shape
    base = np.mean([r['nll'] for r in found['raster', 'updates']])
    print('\n| order | equal | steps to sample | s an update | updates | nats per code | against raster |')
    print('|---|---|---|---|---|---|---|')
    for (order, equal), results in found.items():
        nll = np.array([r['nll'] for r in results])
        drawn = Order.raster(shape) if order == 'raster' else Order(shape, int(order))
        name = order if order == 'raster' else f'slope {order}'
        update = np.mean([r['seconds'] / r['steps'] for r in results])
        updates = np.mean([r['steps'] for r in results])
        print(
            f'| {name} | {equal} | {drawn.steps} | {update:.3f} | {updates:.0f} '
            f'| {nll.mean():.4f} ({nll.min():.4f} to {nll.max():.4f}) | {100 * (nll.mean() / base - 1):+.2f} % |'
        )


if __name__ == '__main__':
    main()
