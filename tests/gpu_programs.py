"""Small programs with known counts. `python -m tests.gpu_programs` compiles them for an H100 and saves the texts.

That needs JAX's CUDA plugin, but no driver and no GPU. `tests/test_gpu_kernels.py` reads the saved texts, and compiles
the programs too where the plugin is installed. Loops have 7 iterations.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.lax import Precision
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vqvae2_jax.kernels.nearest import nearest
from vqvae2_jax.planning import hardware

DIRECTORY = pathlib.Path(__file__).parent / 'data' / 'hlo'
N = 256


def shape(*dimensions, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dimensions, dtype)


def bfloat16(*dimensions):
    return shape(*dimensions, dtype=jnp.bfloat16)


def convolution(x, kernel, precision=None):
    layout = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=layout, precision=precision)


def attention(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation='cudnn')


def gradient(function, count):
    """The gradient of the sum of squares, with respect to the first arguments."""
    return jax.grad(lambda *x: jnp.sum(function(*x).astype(jnp.float32) ** 2), tuple(range(count)))


def twice(x):
    """A Pallas (Mosaic) kernel that nobody counts."""

    def kernel(x, out):
        out[...] = 2 * x[...]

    block = pl.BlockSpec((128, 64), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        out_shape=shape(*x.shape),
        grid=(len(x) // 128,),
        in_specs=[block],
        out_specs=block,
        compiler_params=mosaic_gpu.CompilerParams(),
        name='twice',
    )(x)


def traced_bound(a, n):
    return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ a), (0, a))[1]


def known_bound(a):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ a), None), a, length=7)[0]


def branches(index, a):
    return jax.lax.switch(index, [lambda a: a @ a, lambda a: a @ a @ a, lambda a: a + 1], a)


def ring(cache, x):
    """Reads two rows of a cache and writes the next in place."""

    def step(carry, i):
        cache, x = carry
        x = jnp.tanh(jax.lax.dynamic_slice_in_dim(cache, i, 2).sum(0) + x)
        return (jax.lax.dynamic_update_slice(cache, x[None], (i + 2, 0, 0)), x), None

    return jax.lax.scan(step, (cache, x), jnp.arange(7))[0]


def columns(x):
    return jnp.tanh(x[:, :64])


IMAGE, KERNEL = (8, 32, 32, 64), (3, 3, 64, 128)
QUERY = bfloat16(4, N, 8, 64)
LIBRARIES = {'xla_gpu_enable_triton_gemm': False}  # products by cuBLAS, which an attached GPU may prefer
PROGRAMS = {  # name: function, shapes, options of the compiler
    'dot_highest': (lambda a, b: jnp.dot(a, b, precision=Precision.HIGHEST), (shape(N, N), shape(N, N)), {}),
    'dot_default': (jnp.dot, (shape(N, N), shape(N, N)), {}),
    'dot_bfloat16': (jnp.dot, (bfloat16(N, N), bfloat16(N, N)), {}),
    'cublas_highest': (lambda a, b: jnp.dot(a, b, precision='highest'), (shape(N, N), shape(N, N)), LIBRARIES),
    'cublas_batch': (jnp.matmul, (bfloat16(16, N, 64), bfloat16(16, 64, N)), LIBRARIES),
    'conv_highest': (lambda x, k: convolution(x, k, Precision.HIGHEST), (shape(*IMAGE), shape(*KERNEL)), {}),
    'conv_gradient': (gradient(convolution, 2), (bfloat16(*IMAGE), bfloat16(*KERNEL)), {}),
    'attention': (gradient(attention, 3), (QUERY, QUERY, QUERY, shape(1, 1, N, N, dtype=jnp.bool_)), {}),
    'nearest_float32': (nearest, (shape(1024, 64), shape(128, 64)), {}),
    'nearest_bfloat16': (nearest, (bfloat16(1024, 64), shape(128, 64)), {}),
    'twice': (twice, (shape(512, 64),), {}),
    'cholesky': (jnp.linalg.cholesky, (shape(64, 64),), {}),
    'known_bound': (known_bound, (bfloat16(N, N),), {}),
    'traced_bound': (traced_bound, (bfloat16(N, N), shape(dtype=jnp.int32)), {}),
    'branches': (branches, (shape(dtype=jnp.int32), bfloat16(N, N)), {}),
    'ring': (ring, (shape(9, 64, N), shape(64, N)), {}),
    'columns': (columns, (shape(1024, 1024),), {}),
    'rows_of_a_table': (lambda table, i: table[i], (shape(512, 64), shape(100_000, dtype=jnp.int32)), {}),
}


def compile_text(name: str) -> str:
    """Compiles a program for one H100 that is not attached; returns its text."""
    function, shapes, options = PROGRAMS[name]
    mesh = Mesh(np.array(hardware.topology_devices('h100:1')), ('data',), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for x in shapes]
    return jax.jit(function).lower(*inputs).compile(compiler_options=options or None).as_text()


def shorten(text: str) -> str:
    """Removes tables of files, shardings, the code of kernels, and configurations that nobody reads."""
    text = text[re.search(r'^(ENTRY )?%', text, re.MULTILINE).start() :]
    text = re.sub(r'(, )?frontend_attributes=\{([^{}"]|"[^"]*")*\}', '', text)
    text = re.sub(r'metadata=\{(op_name="[^"]*")?[^}]*\}', r'metadata={\1}', text)
    text = re.sub(r'\b(ir|module|kernel_hash) = "([^"\\]|\\.)*"', r'\1 = ""', text)
    lines = []
    for line in text.splitlines():
        if not re.search(r'custom-call\(|while\(', line):
            line = line.partition(', backend_config=')[0]
        lines.append(line.replace(', metadata={}', ''))
    return '\n'.join(lines).strip() + '\n'


def main():
    DIRECTORY.mkdir(exist_ok=True)
    for name in PROGRAMS:
        (DIRECTORY / f'{name}.txt').write_text(shorten(compile_text(name)))
        print(name, flush=True)


if __name__ == '__main__':
    main()
