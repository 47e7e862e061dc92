"""Speed of sampling: caches against rerunning the network, many positions at once against one by one.

  python -m benchmarks.sampling                       # batch 1 and 8; about a quarter of an hour on two cores
  python -m benchmarks.sampling --batch 64 --only wavefront
  python -m benchmarks.sampling --against ../other   # the ratio of the times to those of another checkout

The networks have the size of rosinality/vq-vae-2-pytorch's defaults: 256 channels, 16 residual blocks, kernel 5; top
32x32 with 4 attentions, bottom 64x64 without, conditioned on the top. Weights are random: the samples mean nothing, the
work is the same. Times are of calls of compiled programs, in seconds for the whole batch.

"Rerunning" is how that repository samples: the network runs over all rows so far for every position. It is timed on
eight heights of the map, from which the times of the others are interpolated.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import machine, measure_bandwidth, measure_products, seconds
from vqvae2_jax import xla_flags
from vqvae2_jax.config import base, build
from vqvae2_jax.sampling import ancestral
from vqvae2_jax.sampling.ancestral import sample_keys

SHAPES = {'top': (32, 32), 'bottom': (64, 64)}


def make(level, dtype, skew=None, **fields):
    """Makes the prior of a level; without a skew in raster order."""
    config = base.get_config()
    config.data.image_size = (256, 256)
    config.vqvae.update(downsample_factors=(4, 2), codebook_size=512)
    for prior in config.prior.values():
        prior.update(hidden_channels=256, residual_channels=256, num_residual_blocks=16, kernel_size=5, num_heads=8)
    config.prior.top.num_attention_layers = 4
    config.prior.bottom.num_cond_blocks = 3
    if skew is not None:
        config.prior[level].update(order='wavefront', skew=skew)
    return build.make_prior(config, ('bottom', 'top').index(level)).clone(dtype=dtype, **fields)


def name_of(skew):
    return 'raster' if skew is None else f'skew {skew}'


def inputs(prior, batch, array=jnp.zeros):
    """Returns codes and the tuple of coarser codes; with array=jax.ShapeDtypeStruct, their shapes."""
    height, width = prior.shape
    coarser = [array((batch, height // 2, width // 2), jnp.int32) for _ in prior.coarser_codebook_sizes]
    return array((batch, height, width), jnp.int32), tuple(coarser)


def weights(prior):
    """Returns random parameters of the prior, in its dtype."""
    codes, coarser = inputs(prior, 1)
    params = prior.init(jax.random.key(0), codes, None, coarser)['params']
    return jax.tree.map(lambda x: x.astype(prior.dtype), params)


def sampler(prior):
    """Returns a function (params, index int [B], coarser) -> codes."""

    sample_level = getattr(ancestral, 'sample_level', None) or ancestral.sample  # its name in older checkouts

    def sample_codes(params, index, coarser):
        return sample_level(prior, params, sample_keys(jax.random.key(0), index), None, coarser).codes

    return sample_codes


@functools.cache
def cached(level, batch, dtype, skew, **fields):
    """Measures the seconds to sample a batch of maps."""
    prior = make(level, dtype, skew, **fields)
    return seconds(sampler(prior), jax.jit(lambda: weights(prior))(), jnp.arange(batch), inputs(prior, batch)[1])


def rerunning(level, batch, dtype):
    """Estimates the seconds of rerunning the rows so far for every position of a batch of maps."""
    prior = make(level, dtype)
    params, (codes, coarser) = jax.jit(lambda: weights(prior))(), inputs(prior, batch)
    height, width = prior.shape
    heights = np.linspace(2, height, 8).round().astype(int) // 2 * 2
    times = []
    for rows in heights:
        part = prior.clone(shape=(int(rows), width))
        cut = {**params, 'row_embed': {'embedding': params['row_embed']['embedding'][:rows]}}
        above = tuple(c[:, : rows // 2] for c in coarser)
        condition = part.apply({'params': cut}, None, above, method='condition')  # once per image there too

        def run(params, codes, condition, part=part):
            return part.apply({'params': params}, codes, condition, method='compute_logits')[:, -1]

        times.append(seconds(run, cut, codes[:, :rows], condition))
    return float(width * np.interp(np.arange(1, height + 1), heights, times).sum())


def size_of(tree):
    """Returns the bytes of arrays or of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def lower_bound(level, dtype, bandwidth, skew=None):
    """Returns the seconds to read the weights of one step from memory once; the vertical ones serve a whole row."""
    prior = make(level, dtype, skew)
    size = {
        name: size_of(branch)
        for name, branch in jax.eval_shape(lambda: weights(prior)).items()
        if name.startswith(('vertical', 'horizontal', 'first', 'trunk', 'output', 'logits'))
    }
    per_row = sum(bytes_ for name, bytes_ in size.items() if name.startswith('vertical'))
    per_position = sum(size.values()) - per_row + per_row / prior.shape[1]
    return per_position / bandwidth


def raster_against_rerunning(batches, dtype, bandwidth):
    print('\n| level | batch | rerunning rows so far (s) | cached raster (s) | ratio | ms/step | lower bound, ms |')
    print('|---|---|---|---|---|---|---|')
    for batch in batches:
        total = np.zeros(2)
        for level in SHAPES:
            slow, fast = rerunning(level, batch, dtype), cached(level, batch, dtype, None)
            total += slow, fast
            step, least = fast / np.prod(SHAPES[level]), lower_bound(level, dtype, bandwidth)
            print(
                f'| {level} | {batch} | {slow:.0f} | {fast:.1f} | {slow / fast:.0f}x | {1e3 * step:.2f} '
                f'| {1e3 * least:.2f} |',
                flush=True,
            )
        print(f'| both | {batch} | {total[0]:.0f} | {total[1]:.1f} | {total[0] / total[1]:.0f}x | | |', flush=True)


def growth_with_the_map(dtype):
    plain = dict(num_attention_layers=0)
    small = cached('top', 1, dtype, None, **plain)
    large = cached('top', 1, dtype, None, **plain, shape=(64, 64))
    print(f'\n64x64 against 32x32, the same convolutional network, batch 1: {large / small:.2f}x the time', flush=True)


def wavefront_against_raster(batches, dtype, skews, bandwidth):
    print('\n| level | batch | order | steps | s for the batch | speedup over raster | ms/step | lower bound, ms |')
    print('|---|---|---|---|---|---|---|---|')
    for level in SHAPES:
        for batch in batches:
            raster = cached(level, batch, dtype, None)
            for skew in (None, *skews):
                steps = make(level, dtype, skew).order.num_steps
                time_, least = cached(level, batch, dtype, skew), lower_bound(level, dtype, bandwidth, skew)
                print(
                    f'| {level} | {batch} | {name_of(skew)} | {steps} | {time_:.2f} | {raster / time_:.1f}x '
                    f'| {1e3 * time_ / steps:.2f} | {1e3 * least:.2f} |',
                    flush=True,
                )


def memory(dtype, skews):
    """Prints the caches and other temporaries of the compiled sampler per image, from batches of 8 and 16."""
    print('\n| level | order | MB per image | MB of weights |\n|---|---|---|---|')
    for level in SHAPES:
        for skew in (None, *skews):
            prior = make(level, dtype, skew)
            params = jax.eval_shape(lambda prior=prior: weights(prior))
            used = {batch: temporary_bytes(prior, params, batch) for batch in (8, 16)}
            per_image = (used[16] - used[8]) / 8
            print(f'| {level} | {name_of(skew)} | {per_image / 1e6:.1f} | {size_of(params) / 1e6:.0f} |', flush=True)


def temporary_bytes(prior, params, batch):
    index, (_, coarser) = jax.ShapeDtypeStruct((batch,), jnp.int32), inputs(prior, batch, jax.ShapeDtypeStruct)
    compiled = jax.jit(sampler(prior)).lower(params, index, coarser).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def sample_once(level, order, batch, dtype, rows):
    """Returns a function that samples a batch of maps with a compiled sampler."""
    prior = make(
        level, dtype, None if order == 'raster' else int(order), shape=(rows or SHAPES[level][0], SHAPES[level][1])
    )
    arguments = jax.jit(lambda: weights(prior))(), jnp.arange(batch), inputs(prior, batch)[1]
    compiled = jax.jit(sampler(prior)).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def against(other, levels, orders, batches, options):
    """Prints the times of this checkout and of another one."""
    print(f'\n| level | order | batch {timing.AGAINST}\n|---|---|---|---|---|---|---|')
    for level in levels:
        for order in orders:
            for batch in batches:
                cells = timing.against(__file__, other, ['--serve', level, order, str(batch), *options])
                print(f'| {level} | {order} | {batch} | {" | ".join(cells)} |', flush=True)


def main():
    xla_flags.set_cpu_flags()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 8])
    parser.add_argument('--skew', type=int, nargs='*', default=[1, 2, 3])
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--only', choices=('memory', 'raster', 'growth', 'wavefront'))
    parser.add_argument(
        '--against',
        metavar='CHECKOUT',
        help='compare with another checkout, in raster order and --skew, or --only one of them',
    )
    parser.add_argument('--level', choices=tuple(SHAPES), nargs='+', default=list(SHAPES), help='with --against')
    parser.add_argument('--rows', type=int, default=0, help='with --against: rows of the maps; 0: all')
    parser.add_argument('--serve', nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype = jnp.dtype(options.dtype)
    if options.serve:
        level, order, batch = options.serve
        timing.serve(sample_once(level, order, int(batch), dtype, options.rows))
        return
    if options.against:
        print(f'{machine()}, JAX {jax.__version__}, {dtype.name}')
        orders = ['raster'] * (options.only != 'wavefront') + [str(s) for s in options.skew] * (
            options.only != 'raster'
        )
        passed_on = ['--dtype', dtype.name, '--rows', str(options.rows)]
        against(options.against, options.level, orders, options.batch, passed_on)
        return
    bandwidth = measure_bandwidth()
    print(f'{machine()}, JAX {jax.__version__}, {dtype.name}')
    print(f'memory {bandwidth / 1e9:.1f} GB/s, a large matrix product {measure_products(dtype) / 1e9:.0f} GFLOP/s')
    if options.only in (None, 'memory'):
        memory(dtype, options.skew)
    if options.only in (None, 'raster'):
        raster_against_rerunning(options.batch, dtype, bandwidth)
    if options.only in (None, 'growth'):
        growth_with_the_map(dtype)
    if options.only in (None, 'wavefront'):
        wavefront_against_raster(options.batch, dtype, options.skew, bandwidth)


if __name__ == '__main__':
    main()
