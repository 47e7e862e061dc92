"""The lookup in a codebook as one kernel for GPUs, written in Pallas for Triton: distances never reach memory.

`models.quantizer.nearest` is its reference. Tensor cores have no products at the full precision of float32. But a
float32 is the exact sum of three bfloat16, and products of bfloat16 are exact in float32. Vectors in bfloat16 need
three such products, with the parts of the codebook. Other vectors need six: the other three are below the rounding of
float32. So codes equal those of the reference except where two distances differ by rounding only.

Shapes: N vectors, K codebook size, D codebook dimension.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vqvae2_jax.models import quantizer

ROWS, CODES = 256, 64  # vectors of a program, and codes whose distances it has in registers
_WARPS = 8
_PARTS = 3
_LEAST_DEPTH = 16  # of a product on tensor cores
# The deepest vectors that fit into the 163 KB of shared memory of an A100's block, in bfloat16 and in float32.
_MOST_DEPTH = {jnp.bfloat16: 128, jnp.float32: 64}


def nearest(vectors: jax.Array, codebook: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Finds the nearest codebook row in squared Euclidean distance, as `models.quantizer.nearest`.

    It cannot be differentiated. Deep vectors take the reference: D above 128 in bfloat16, above 64 in other dtypes.

    Args:
      vectors: [..., D], any float dtype.
      codebook: [K, D], any float dtype.
      interpret: run it in plain JAX, on any device.

    Returns:
      Indices of rows, int32 [...]; the lowest index on ties.
    """
    *shape, depth = vectors.shape
    dtype = jnp.bfloat16 if vectors.dtype == jnp.bfloat16 else jnp.float32
    if depth > _MOST_DEPTH[dtype]:
        return quantizer.nearest(vectors, codebook)
    vectors = vectors.astype(dtype)
    vectors = vectors.reshape(-1, depth)
    size, codebook = len(vectors), codebook.astype(jnp.float32)
    width = max(pl.next_power_of_2(depth), _LEAST_DEPTH)
    rows, missing = -size % ROWS, -len(codebook) % CODES
    vectors = jnp.pad(vectors, ((0, rows), (0, width - depth)))
    norms = jnp.pad(jnp.sum(codebook**2, axis=-1), (0, missing), constant_values=jnp.inf)
    codebook = jnp.pad(codebook, ((0, missing), (0, width - depth)))
    codes = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((len(vectors),), jnp.int32),
        grid=len(vectors) // ROWS,
        in_specs=[pl.BlockSpec((ROWS, width), lambda i: (i, 0)), pl.BlockSpec(), pl.BlockSpec()],
        out_specs=pl.BlockSpec((ROWS,), lambda i: (i,)),
        compiler_params=triton.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name='nearest',
    )(vectors, jnp.stack(_split(codebook)), norms)
    return codes[:size].reshape(shape)


def _split(x):
    """Returns three bfloat16 arrays whose sum is a float32 array."""
    parts = []
    for _ in range(_PARTS):
        # Truncated bit by bit: compilers may take a conversion there and back for the identity.
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(high.astype(jnp.bfloat16))
        x = x - high
    return parts


def _kernel(vectors_ref, codebook_ref, norms_ref, codes_ref):
    # Vectors [ROWS, D], the parts of the codebook [3, K, D], |e|^2 [K] -> codes [ROWS].
    vectors = vectors_ref[...]
    vectors = (vectors,) if vectors.dtype == jnp.bfloat16 else _split(vectors)
    pairs = [(i, j) for i in range(len(vectors)) for j in range(_PARTS) if i + j < _PARTS]

    def compare(chunk, best):
        codes = pl.ds(chunk * CODES, CODES)
        products = [
            jax.lax.dot_general(
                vectors[i], codebook_ref[j, codes, :], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            for i, j in sorted(pairs, key=sum, reverse=True)  # the smallest first
        ]
        distances = norms_ref[codes][None, :] - 2 * functools.reduce(jnp.add, products)  # [ROWS, CODES], less |v|^2
        nearer = distances < best[0]  # the first of equal distances stays
        return jnp.where(nearer, distances, best[0]), jnp.where(nearer, chunk, best[1])

    start = jnp.full((ROWS, CODES), jnp.inf, jnp.float32), jnp.zeros((ROWS, CODES), jnp.int32)
    distances, chunks = jax.lax.fori_loop(0, codebook_ref.shape[1] // CODES, compare, start)
    codes = chunks * CODES + jax.lax.broadcasted_iota(jnp.int32, (ROWS, CODES), 1)
    least = jnp.min(distances, axis=1, keepdims=True)
    codes_ref[...] = jnp.min(jnp.where(distances == least, codes, jnp.iinfo(jnp.int32).max), axis=1)
