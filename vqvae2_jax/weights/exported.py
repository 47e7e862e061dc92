"""Writes a generator to one file that runs with JAX alone, without this package: StableHLO programs and weights.

The file is an .npz. A program that reads it needs JAX, NumPy and flatbuffers:

  import jax, jax.export, numpy as np

  file = np.load('fashion.npz')
  encode, decode, sample = (
      jax.export.deserialize(bytearray(file[name])) for name in ('encode', 'decode', 'sample')
  )
  weights = {name: file[name] for name in file.files if name.startswith('weights/')}
  codes = encode.call(weights, images)                              # uint8 [B, H, W, C] -> int32 [B, h, w] per level
  images = decode.call(weights, codes)
  images, codes = sample.call(weights, np.uint32(0), index, labels)  # seed, int32 [B], int32 [B]

Sample `index` of a seed is the one that `--job=sample` draws with these weights and parameters.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath

from vqvae2_jax import api
from vqvae2_jax.data import sample_store
from vqvae2_jax.distributed import processes
from vqvae2_jax.generator import Generator
from vqvae2_jax.io import remote

SUFFIX = '.npz'
PLATFORMS = ('cpu', 'cuda', 'tpu')


def export(
    generator: Generator,
    path: epath.PathLike,
    *,
    platforms: Sequence[str] = PLATFORMS,
    **sampling_params: Any,
) -> None:
    """Writes the file, completely or not at all; of several processes, the first writes.

    Args:
      generator: the networks. Without priors, `sample` is left out; without stage 1, `encode` and `decode` are, and the
        images of `sample` are None.
      path: the file, with the suffix .npz.
      platforms: the platforms that the programs can run on.
      **sampling_params: temperature, top_k, top_p and guidance of `api.sample`.

    Raises:
      ValueError: another suffix, weights in bfloat16, or as `api.sample`.
      WriteError: the file cannot be written.
    """
    path = remote.absolute(path)
    if path.suffix != SUFFIX:
        raise ValueError(f'{path}: the name of an exported generator ends with {SUFFIX}')
    if any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(generator)):
        raise ValueError('the weights are bfloat16, which .npz files cannot hold: export with_dtype("float32")')
    leaves, structure = jax.tree_util.tree_flatten_with_path(generator)
    names = [f'weights/{jax.tree_util.keystr(key, simple=True, separator="/")}' for key, _ in leaves]
    weights = {name: np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}

    def restore(weights):
        return jax.tree_util.tree_unflatten(structure, [weights[name] for name in names])

    def encode(weights, images):
        return api.encode(restore(weights), images)

    def decode(weights, codes):
        return api.decode(restore(weights), codes)

    def sample(weights, seed, index, labels):
        keys = api.sample_keys(jax.random.key(seed), index)
        return tuple(api.sample(restore(weights), keys, labels, **sampling_params))

    specification = generator.specification
    (batch,) = jax.export.symbolic_shape('batch')
    codes = tuple(jax.ShapeDtypeStruct((batch, *shape), jnp.int32) for shape in specification.map_shapes)
    row, seed, programs = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.uint32), {}
    if specification.has_stage_1:
        images = jax.ShapeDtypeStruct((batch, *specification.image_size, specification.channels), jnp.uint8)
        programs |= {encode: (images,), decode: (codes,)}
    if generator.params:
        programs[sample] = (seed, row, row)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    exported = {
        function.__name__: jax.export.export(jax.jit(function), platforms=tuple(platforms))(shapes, *inputs)
        for function, inputs in programs.items()
    }
    arrays = {name: np.frombuffer(program.serialize(), np.uint8) for name, program in exported.items()}
    processes.run_on_main_process(lambda: sample_store.write_npz(path, arrays | weights))
