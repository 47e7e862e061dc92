"""How fast codes are drawn: caches against rerunning the network, many positions at once against one by one.

  python benchmarks/sampling.py                       # batch 1 and 8; about a quarter of an hour on two cores
  python benchmarks/sampling.py --batch 64 --only wavefront

The networks have the size of rosinality/vq-vae-2-pytorch's defaults: 256 channels, 16 residual blocks, kernel 5; top
32x32 with 4 attentions, bottom 64x64 without, conditioned on the top. Weights are random: what is drawn means nothing,
the work is the same. Times are of calls of compiled programs, in seconds for the whole batch.

"Rerunning" is what that repository's sampler does: the network runs over all rows so far for every position. It is
timed on eight of the map's heights, from which the time of the others is interpolated.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from vqvae2_jax.models.raster import RasterPrior
from vqvae2_jax.models.wavefront import WavefrontPrior
from vqvae2_jax.sampling.ancestral import sample, sample_keys

NETWORK = dict(codebook_size=512, hidden=256, residual=256, layers=16, kernel=5)
LEVELS = {
    'top': dict(shape=(32, 32), attention_layers=4, heads=8),
    'bottom': dict(shape=(64, 64), coarser_codebook_sizes=(512,), condition_layers=3),
}


def seconds(function, *arguments):
    """The time of a call of the compiled function: the best of five, or the only one where that takes long."""
    compiled = jax.jit(function).lower(*arguments).compile()
    times = []
    while not times or (len(times) < 5 and sum(times) < 5):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - begin)
    return min(times)


def build(level, batch, dtype, slope=None, **fields):
    """A prior, its weights, and inputs of a batch."""
    fields = {**NETWORK, **LEVELS[level], **fields, 'dtype': dtype}
    prior = RasterPrior(**fields) if slope is None else WavefrontPrior(**fields, slope=slope)
    height, width = prior.shape
    coarser = (jnp.zeros((batch, height // 2, width // 2), jnp.int32),) if prior.coarser_codebook_sizes else ()
    codes = jnp.zeros((batch, height, width), jnp.int32)
    params = jax.jit(prior.init)(jax.random.key(0), codes, None, coarser)['params']
    return prior, jax.tree.map(lambda x: x.astype(dtype), params), codes, coarser


@functools.cache
def cached(level, batch, dtype, slope=None, **fields):
    """Seconds to draw a batch of maps."""
    prior, params, _, coarser = build(level, batch, dtype, slope, **fields)

    def draw(params, keys, coarser):
        return sample(prior, params, keys, None, coarser).codes

    return seconds(draw, params, sample_keys(jax.random.key(0), jnp.arange(batch)), coarser)


def rerunning(level, batch, dtype):
    """Seconds that rerunning the rows so far would take for every position of a batch of maps."""
    prior, params, codes, coarser = build(level, batch, dtype)
    height, width = prior.shape
    heights = np.linspace(2, height, 8).round().astype(int) // 2 * 2
    times = []
    for rows in heights:
        part = prior.clone(shape=(int(rows), width))
        weights = {**params, 'row_embed': {'embedding': params['row_embed']['embedding'][:rows]}}
        above = tuple(c[:, : rows // 2] for c in coarser)
        condition = part.apply({'params': weights}, None, above, method='condition')  # once per image there too

        def run(weights, codes, condition, part=part):
            return part.apply({'params': weights}, codes, condition, method='given_condition')[:, -1]

        times.append(seconds(run, weights, codes[:, :rows], condition))
    return float(width * np.interp(np.arange(1, height + 1), heights, times).sum())


def floor(level, dtype, bandwidth):
    """Seconds to read the weights that the raster sampler needs at a position, once."""
    prior, params, *_ = build(level, 1, dtype)
    size = {
        name: sum(leaf.nbytes for leaf in jax.tree.leaves(branch))
        for name, branch in params.items()
        if name.startswith(('vertical', 'horizontal', 'attention', 'output', 'logits'))
    }
    per_row = sum(bytes_ for name, bytes_ in size.items() if name.startswith('vertical'))
    per_position = sum(size.values()) - per_row + per_row / prior.shape[1]
    return per_position / bandwidth


def measure_bandwidth():
    """Bytes a second of reading memory: the sum of 512 MiB."""
    x = jnp.ones((2**27,), jnp.float32)
    return x.nbytes / seconds(jnp.sum, x)


def raster_against_rerunning(batches, dtype, bandwidth):
    print('\n| level | batch | rerunning rows so far (s) | cached raster (s) | ratio | ms a step | floor, ms |')
    print('|---|---|---|---|---|---|---|')
    for batch in batches:
        total = np.zeros(2)
        for level in LEVELS:
            slow, fast = rerunning(level, batch, dtype), cached(level, batch, dtype)
            total += slow, fast
            step, least = fast / np.prod(LEVELS[level]['shape']), floor(level, dtype, bandwidth)
            print(
                f'| {level} | {batch} | {slow:.0f} | {fast:.1f} | {slow / fast:.0f}x | {1e3 * step:.2f} '
                f'| {1e3 * least:.2f} |',
                flush=True,
            )
        print(f'| both | {batch} | {total[0]:.0f} | {total[1]:.1f} | {total[0] / total[1]:.0f}x | | |', flush=True)


def growth_with_the_map(dtype):
    plain = dict(attention_layers=0, coarser_codebook_sizes=(), condition_layers=0)
    small = cached('top', 1, dtype, **plain)
    large = cached('top', 1, dtype, **plain, shape=(64, 64))
    print(f'\n64x64 against 32x32, the same convolutional network, batch 1: {large / small:.2f}x the time', flush=True)


def wavefront_against_raster(batches, dtype, slopes):
    print('\n| level | batch | order | steps | s for the batch | raster over it |')
    print('|---|---|---|---|---|---|')
    for level in LEVELS:
        for batch in batches:
            raster = cached(level, batch, dtype)
            rows = [('raster', np.prod(LEVELS[level]['shape']), raster)]
            for slope in slopes:
                steps = WavefrontPrior(**NETWORK, **LEVELS[level], slope=slope).order.steps
                rows.append((f'slope {slope}', steps, cached(level, batch, dtype, slope)))
            for name, steps, time_ in rows:
                print(f'| {level} | {batch} | {name} | {steps} | {time_:.2f} | {raster / time_:.1f}x |', flush=True)


def memory(dtype, slopes):
    """Caches and other temporaries of the compiled sampler: what 8 more images of a batch add, over 8."""
    print('\n| level | order | MB an image | MB of weights |\n|---|---|---|---|')
    for level in LEVELS:
        for slope in (None, *slopes):
            fields = {**NETWORK, **LEVELS[level], 'dtype': dtype}
            prior = RasterPrior(**fields) if slope is None else WavefrontPrior(**fields, slope=slope)
            used = {batch: temporary_bytes(prior, batch, dtype) for batch in (8, 16)}
            weights = jax.tree.leaves(abstract_weights(prior, 1, dtype))
            size = sum(x.size * x.dtype.itemsize for x in weights) / 1e6
            name = 'raster' if slope is None else f'slope {slope}'
            print(f'| {level} | {name} | {(used[16] - used[8]) / 8e6:.1f} | {size:.0f} |', flush=True)


def abstract_inputs(prior, batch):
    height, width = prior.shape
    codes = jax.ShapeDtypeStruct((batch, height, width), jnp.int32)
    coarser = jax.ShapeDtypeStruct((batch, height // 2, width // 2), jnp.int32)
    return codes, (coarser,) if prior.coarser_codebook_sizes else ()


def abstract_weights(prior, batch, dtype):
    codes, coarser = abstract_inputs(prior, batch)
    params = jax.eval_shape(prior.init, jax.random.key(0), codes, None, coarser)['params']
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)


def temporary_bytes(prior, batch, dtype):
    def draw(params, index, coarser):
        return sample(prior, params, sample_keys(jax.random.key(0), index), None, coarser).codes

    index = jax.ShapeDtypeStruct((batch,), jnp.int32)
    lowered = jax.jit(draw).lower(abstract_weights(prior, batch, dtype), index, abstract_inputs(prior, batch)[1])
    return lowered.compile().memory_analysis().temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 8])
    parser.add_argument('--slope', type=int, nargs='+', default=[1, 2, 3])
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--only', choices=('memory', 'raster', 'growth', 'wavefront'))
    options = parser.parse_args()
    dtype = jnp.dtype(options.dtype)
    bandwidth = measure_bandwidth()
    print(f'{jax.devices()[0].device_kind}, JAX {jax.__version__}, {dtype.name}; memory {bandwidth / 1e9:.1f} GB/s')
    if options.only in (None, 'memory'):
        memory(dtype, options.slope)
    if options.only in (None, 'raster'):
        raster_against_rerunning(options.batch, dtype, bandwidth)
    if options.only in (None, 'growth'):
        growth_with_the_map(dtype)
    if options.only in (None, 'wavefront'):
        wavefront_against_raster(options.batch, dtype, options.slope)


if __name__ == '__main__':
    main()
