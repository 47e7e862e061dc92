"""The device mesh and the shardings on it.

Every program is written for the global batch and compiled with `jax.jit` over one mesh of two axes, `data` and `fsdp`.
A batch is sharded over both axes. Large arrays of a train state are sharded over `fsdp` and replicated over `data`.

The mesh is JAX's own context: callers enter `jax.set_mesh(mesh)` around SPMD programs only. A new thread starts without
a mesh and has to enter it itself.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP = 'data', 'fsdp'
# Arrays with fewer elements are replicated: sharding them saves less memory than its communication costs.
MIN_SHARDED_SIZE = 2**14
_GATHER_BYTES = 2**28  # an array is gathered in pieces of at most this size


def make_mesh(devices: Sequence | None = None, fsdp: int = 1) -> Mesh:
    """Creates the mesh.

    Args:
      devices: the devices; None: all of all processes.
      fsdp: number of neighboring devices that share one copy of a train state; at most the number of devices.

    Returns:
      A mesh of shape (devices / fsdp, fsdp) with axes `data` and `fsdp`.

    Raises:
      ValueError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fsdp = min(fsdp, len(devices))
    if fsdp < 1 or len(devices) % fsdp:
        choices = ', '.join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
        raise ValueError(f'parallel.fsdp is {fsdp}, but there are {len(devices)} devices: choose one of {choices}')
    shape = (len(devices) // fsdp, fsdp)
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Under Explicit axes, the default of jax.make_mesh, `codebook[codes]` and nn.Embed raise.
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def current_mesh() -> Mesh:
    """Returns the mesh of the enclosing `jax.set_mesh`. Not for use inside `jax.jit`.

    Raises:
      RuntimeError: there is none.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        raise RuntimeError('this needs a mesh: call it inside `with jax.set_mesh(sharding.make_mesh()):`')
    return mesh


def replicated_sharding() -> NamedSharding:
    """Returns the sharding under which every device holds the whole array."""
    return NamedSharding(current_mesh(), PartitionSpec())


def batch_sharding(batch_size: int | None = None) -> NamedSharding:
    """Returns the sharding of an array whose leading axis is the batch.

    Args:
      batch_size: the global batch size; None: a multiple of the number of devices. A batch that is only a multiple of
        the `data` axis is sharded over that axis alone; the devices along `fsdp` then do redundant compute.
    """
    mesh = current_mesh()
    all_devices = batch_size is None or batch_size % mesh.size == 0
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP) if all_devices else DATA))


def num_batch_shards(batch_size: int) -> int:
    """Returns the number of shards that `batch_sharding(batch_size)` splits a batch into."""
    mesh = current_mesh()
    return mesh.size if batch_size % mesh.size == 0 else mesh.shape[DATA]


def pad_batch_size(batch_size: int, mesh: Mesh) -> int:
    """Rounds a batch size up to a multiple of the number of devices, at least one a device."""
    return -(-max(batch_size, 1) // mesh.size) * mesh.size


def fsdp_sharding(array: Any) -> NamedSharding:
    """Returns the sharding of an array of a train state (or of its shape).

    The array is sharded over `fsdp` along its largest axis that divides, and replicated if none does or if it is small.
    """
    return NamedSharding(current_mesh(), _fsdp_spec(array.shape, current_mesh().shape[FSDP]))


def _fsdp_spec(shape, count):
    axes = [axis for axis, size in enumerate(shape) if size % count == 0]
    if count == 1 or math.prod(shape) < MIN_SHARDED_SIZE or not axes:
        return PartitionSpec()
    axis = max(axes, key=lambda a: shape[a])
    return PartitionSpec(*[None] * axis, FSDP)


def abstract_state(shapes: Any, shardings: Any) -> Any:
    """Returns a pytree of `jax.ShapeDtypeStruct` with shardings, from shapes and shardings of the same structure."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def constrain_sharded(tree: Any) -> Any:
    """Inside `jax.jit`: keeps arrays sharded as `fsdp_sharding` says, for example gradients like their parameters."""
    count = jax.sharding.get_abstract_mesh().shape[FSDP]
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _fsdp_spec(x.shape, count)), tree)


def refuse_explicit_axes(tree: Any) -> None:
    """Raises ValueError inside a mesh with Explicit axes, or for arrays on one: codebooks cannot be indexed there."""
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree)]
    for mesh in [jax.sharding.get_abstract_mesh(), *meshes]:
        if AxisType.Explicit in mesh.axis_types:
            raise ValueError(
                f'the mesh {mesh.axis_names} has Explicit axes, the default of jax.make_mesh, in which codebooks and '
                'embeddings cannot be indexed: make it with '
                f'axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}'
            )


def constrain_replicated(tree: Any) -> Any:
    """Inside `jax.jit`: all-gathers arrays, so that every device holds a full copy while they are in use.

    Outside of a mesh of `make_mesh` the arrays stay as they are.
    """
    if not _in_own_mesh():
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def _in_own_mesh():
    return jax.sharding.get_abstract_mesh().axis_names == (DATA, FSDP)


def batch_axes(batch_size: int) -> tuple[str, ...]:
    """Inside `jax.jit`: returns the mesh axes over which `batch_sharding` shards a batch; () if it does not divide."""
    shape = jax.sharding.get_abstract_mesh().shape
    if batch_size % (shape[DATA] * shape[FSDP]) == 0:
        return DATA, FSDP
    return () if batch_size % shape[DATA] else (DATA,)


def constrain_batch(tree: Any) -> Any:
    """Inside `jax.jit`: keeps arrays [B, ...] sharded along the batch, as `batch_sharding` says.

    Outside of a mesh of `make_mesh` the arrays stay as they are.
    """
    if not _in_own_mesh():
        return tree

    def constrain(x):
        axes = batch_axes(x.shape[0])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x

    return jax.tree.map(constrain, tree)


def put_replicated(tree: Any) -> Any:
    """Puts host arrays on the mesh, a full copy on every device. All processes hold the same values."""
    return _put(tree, lambda x: replicated_sharding())


def put_sharded(tree: Any) -> Any:
    """Puts host arrays on the mesh, sharded as `fsdp_sharding` says. All processes hold the same values."""
    return _put(tree, fsdp_sharding)


def _put(tree, sharding_of):
    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding_of(x), lambda index: x[index])

    return jax.tree.map(put, tree)


def replicate_to_host(tree: Any) -> Any:
    """Copies arrays of any sharding to NumPy arrays on every process; all processes call this together."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), _replicate(tree))


def gather_rows(tree: Any, main_process_only: bool = False) -> Any:
    """Copies global arrays [B, ...] that are sharded along their first axis to NumPy arrays.

    All processes call this together, inside `jax.set_mesh`. Large arrays are gathered piece by piece, so that no device
    has to hold all of one.

    Args:
      tree: the arrays.
      main_process_only: copies to process 0 only; the other processes get empty arrays [B, 0].

    Returns:
      Arrays [B, ...] on every process, unless `main_process_only`.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    copy = not main_process_only or jax.process_index() == 0

    def gather(x):
        size, pieces = max(_GATHER_BYTES * len(x) // x.nbytes, 1), []
        for start in range(0, len(x), size):
            piece = jax.block_until_ready(_replicate(x[start : start + size]))
            pieces.append(np.asarray(piece.addressable_data(0)) if copy else np.empty((len(piece), 0), x.dtype))
        return np.concatenate(pieces)

    return jax.tree.map(gather, tree)


def _replicate(tree):
    return jax.jit(_identity, out_shardings=replicated_sharding())(tree)


def _identity(tree):  # one function, which JAX compiles once; a lambda would be compiled at every call
    return tree


def process_local_rows(batch_size: int) -> np.ndarray:
    """Returns the indices of the rows of a global batch that this process reads: int [n], ascending.

    They are the rows of its own devices, wherever these are in the mesh, so the global batch does not depend on the
    number of processes. Processes share rows if the batch is sharded over `data` alone and the devices along `fsdp`
    belong to several processes.
    """
    slices = batch_sharding(batch_size).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def make_global_batch(batch: dict[str, np.ndarray], batch_size: int | None = None) -> dict[str, jax.Array]:
    """Creates global arrays [B, ...] from the rows of this process.

    Args:
      batch: arrays [n, ...] of the rows that `process_local_rows` returns.
      batch_size: B, the global batch size; None: `batch` has all rows.

    Returns:
      Arrays sharded as `batch_sharding` says.
    """
    batch_size = batch_size or len(next(iter(batch.values())))
    sharding = batch_sharding(batch_size)
    return {
        name: jax.make_array_from_process_local_data(sharding, values, (batch_size, *values.shape[1:]))
        for name, values in batch.items()
    }


def process_flags(flag: bool) -> jax.Array:
    """Creates a global bool [devices] in which every device holds the flag of its process."""
    return jax.make_array_from_callback((current_mesh().size,), batch_sharding(), lambda _: np.full(1, flag))
