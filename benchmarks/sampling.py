"""How fast codes are drawn: caches against rerunning the network, many positions at once against one by one.

  python -m benchmarks.sampling                       # batch 1 and 8; about a quarter of an hour on two cores
  python -m benchmarks.sampling --batch 64 --only wavefront

The networks have the size of rosinality/vq-vae-2-pytorch's defaults: 256 channels, 16 residual blocks, kernel 5; top
32x32 with 4 attentions, bottom 64x64 without, conditioned on the top. Weights are random: what is drawn means nothing,
the work is the same. Times are of calls of compiled programs, in seconds for the whole batch.

"Rerunning" is what that repository's sampler does: the network runs over all rows so far for every position. It is
timed on eight of the map's heights, from which the time of the others is interpolated.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import machine, measure_bandwidth, measure_products, seconds
from tests.defaults import make_prior
from vqvae2_jax import xla_flags
from vqvae2_jax.sampling.ancestral import sample, sample_keys

NETWORK = dict(codebook_size=512, hidden_channels=256, residual_channels=256, num_residual_blocks=16, kernel_size=5)
LEVELS = {
    'top': dict(shape=(32, 32), num_attention_layers=4, num_heads=8),
    'bottom': dict(shape=(64, 64), coarser_codebook_sizes=(512,), num_cond_blocks=3),
}


def make(level, dtype, skew=None, **fields):
    """The prior of a level; without a skew in raster order."""
    fields = {**NETWORK, **LEVELS[level], **fields, 'dtype': dtype}
    return make_prior(**fields) if skew is None else make_prior(**fields, skew=skew)


def name_of(skew):
    return 'raster' if skew is None else f'skew {skew}'


def inputs(prior, batch, array=jnp.zeros):
    """Codes and the tuple of coarser codes; with array=jax.ShapeDtypeStruct, their shapes."""
    height, width = prior.shape
    coarser = [array((batch, height // 2, width // 2), jnp.int32) for _ in prior.coarser_codebook_sizes]
    return array((batch, height, width), jnp.int32), tuple(coarser)


def weights(prior):
    """The prior's parameters, in its dtype."""
    codes, coarser = inputs(prior, 1)
    params = prior.init(jax.random.key(0), codes, None, coarser)['params']
    return jax.tree.map(lambda x: x.astype(prior.dtype), params)


def sampler(prior):
    """A function (params, index int [B], coarser) -> codes."""

    def draw(params, index, coarser):
        return sample(prior, params, sample_keys(jax.random.key(0), index), None, coarser).codes

    return draw


@functools.cache
def cached(level, batch, dtype, skew, **fields):
    """Seconds to draw a batch of maps."""
    prior = make(level, dtype, skew, **fields)
    return seconds(sampler(prior), jax.jit(lambda: weights(prior))(), jnp.arange(batch), inputs(prior, batch)[1])


def rerunning(level, batch, dtype):
    """Seconds that rerunning the rows so far would take for every position of a batch of maps."""
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
            return part.apply({'params': params}, codes, condition, method='apply_with_cond')[:, -1]

        times.append(seconds(run, cut, codes[:, :rows], condition))
    return float(width * np.interp(np.arange(1, height + 1), heights, times).sum())


def size_of(tree):
    """Bytes of arrays or of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def floor(level, dtype, bandwidth, skew=None):
    """Seconds to read the weights that the sampler needs in a step, once; the vertical ones are for a whole row."""
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
    print('\n| level | batch | rerunning rows so far (s) | cached raster (s) | ratio | ms a step | floor, ms |')
    print('|---|---|---|---|---|---|---|')
    for batch in batches:
        total = np.zeros(2)
        for level in LEVELS:
            slow, fast = rerunning(level, batch, dtype), cached(level, batch, dtype, None)
            total += slow, fast
            step, least = fast / np.prod(LEVELS[level]['shape']), floor(level, dtype, bandwidth)
            print(
                f'| {level} | {batch} | {slow:.0f} | {fast:.1f} | {slow / fast:.0f}x | {1e3 * step:.2f} '
                f'| {1e3 * least:.2f} |',
                flush=True,
            )
        print(f'| both | {batch} | {total[0]:.0f} | {total[1]:.1f} | {total[0] / total[1]:.0f}x | | |', flush=True)


def growth_with_the_map(dtype):
    plain = dict(num_attention_layers=0, coarser_codebook_sizes=(), num_cond_blocks=0)
    small = cached('top', 1, dtype, None, **plain)
    large = cached('top', 1, dtype, None, **plain, shape=(64, 64))
    print(f'\n64x64 against 32x32, the same convolutional network, batch 1: {large / small:.2f}x the time', flush=True)


def wavefront_against_raster(batches, dtype, skews, bandwidth):
    print('\n| level | batch | order | steps | s for the batch | raster over it | ms a step | floor, ms |')
    print('|---|---|---|---|---|---|---|---|')
    for level in LEVELS:
        for batch in batches:
            raster = cached(level, batch, dtype, None)
            for skew in (None, *skews):
                steps = make(level, dtype, skew).order.steps
                time_, least = cached(level, batch, dtype, skew), floor(level, dtype, bandwidth, skew)
                print(
                    f'| {level} | {batch} | {name_of(skew)} | {steps} | {time_:.2f} | {raster / time_:.1f}x '
                    f'| {1e3 * time_ / steps:.2f} | {1e3 * least:.2f} |',
                    flush=True,
                )


def memory(dtype, skews):
    """Caches and other temporaries of the compiled sampler: what 8 more images of a batch add, over 8."""
    print('\n| level | order | MB an image | MB of weights |\n|---|---|---|---|')
    for level in LEVELS:
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


def main():
    xla_flags.set_cpu_flags()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 8])
    parser.add_argument('--skew', type=int, nargs='+', default=[1, 2, 3])
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--only', choices=('memory', 'raster', 'growth', 'wavefront'))
    options = parser.parse_args()
    dtype = jnp.dtype(options.dtype)
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
