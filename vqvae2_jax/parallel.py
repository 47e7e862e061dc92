"""Devices and processes: the only file that names them.

Programs are written for the global batch and compiled with `jax.jit` over one mesh of two axes; XLA adds the
communication. Batches are cut over both axes. Big arrays of a training state are cut over `fsdp` and copied along
`data`: with an `fsdp` of 1 every device holds the whole state.
"""

import collections
import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP = 'data', 'fsdp'
_SMALL = 2**14  # elements: the memory that cutting such an array saves is not worth its communication
_in_use: list[Mesh] = []  # innermost last
_imagined_process: dict = {}  # of devices that stand for those of other machines, in a plan
_all_devices = functools.cache(lambda: make_mesh())


def make_mesh(devices: Sequence | None = None, fsdp: int = 1) -> Mesh:
    """A mesh of these devices (None: all), of which `fsdp` neighbours (at most all) share one copy of a state.

    Raises:
      ValueError: `fsdp` does not divide their number.
    """
    devices = jax.devices() if devices is None else devices
    fsdp = min(fsdp, len(devices))
    if fsdp < 1 or len(devices) % fsdp:
        choices = ', '.join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
        raise ValueError(f'parallel.fsdp is {fsdp}, but there are {len(devices)} devices: choose one of {choices}')
    shape = (len(devices) // fsdp, fsdp)
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Auto is spelled out: under Explicit axes `codebook[codes]` and nn.Embed raise.
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def mesh() -> Mesh:
    """The mesh in `use`; else all devices along `data`."""
    return _in_use[-1] if _in_use else _all_devices()


@contextlib.contextmanager
def use(chosen: Mesh) -> Iterator[None]:
    """Within the context, `chosen` is the mesh of everything in this file."""
    _in_use.append(chosen)
    try:
        yield
    finally:
        _in_use.pop()


def replicated() -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh(), PartitionSpec())


def split_batch(rows: int | None = None) -> NamedSharding:
    """The leading axis is cut over all devices; over `data` alone where `rows` are too few for that.

    Then the devices along `fsdp`, which share a state, repeat each other's arithmetic.
    """
    return NamedSharding(mesh(), PartitionSpec((DATA, FSDP) if rows is None or ways(rows) == mesh().size else DATA))


def ways(rows: int) -> int:
    """In how many parts a batch of so many rows is cut."""
    return mesh().size if rows % mesh().size == 0 else mesh().shape[DATA]


def cut(array) -> NamedSharding:
    """The rule for states: an array is cut over `fsdp` along its largest axis that divides, unless it is small."""
    count = mesh().shape[FSDP]
    axes = [axis for axis, size in enumerate(array.shape) if size % count == 0]
    if count == 1 or math.prod(array.shape) < _SMALL or not axes:
        return replicated()
    axis = max(axes, key=lambda a: array.shape[a])
    return NamedSharding(mesh(), PartitionSpec(*[None] * axis, FSDP))


def placed(shapes: Any, layout: Any) -> Any:
    """Shapes that know where their arrays lie."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, layout)


def keep_cut(tree: Any) -> Any:
    """Inside a program: arrays that stay cut by the rule, like the parameters whose shapes they have."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, cut(x)), tree)


def gathered(tree: Any) -> Any:
    """Inside a program: arrays that may be cut, whole on every device, as long as they are in use."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, replicated()), tree)


def whole(tree: Any) -> Any:
    """Arrays that may be cut, whole on one device of this process; all processes call this together."""
    copied = jax.jit(lambda x: x, out_shardings=replicated())(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), copied)


def check_batch_size(batch_size: int, field: str, parts: int = 1, own: bool = False) -> None:
    """Raises ValueError when a batch cannot be cut evenly.

    Args:
      batch_size, field: the number, and the config's name for it.
      parts: that it is taken in, one after the other.
      own: it is for one process's devices, not for all.
    """
    devices, ways = (meshes_alone()[0].size,) * 2 if own else (mesh().size, mesh().shape[DATA])
    unit = devices * parts
    if batch_size < 1 or batch_size % (ways * parts):
        example = max(-(-batch_size // unit), 1) * unit
        among = f'{devices} devices' + (f' in {parts} parts' if parts > 1 else '')
        raise ValueError(
            f'{field} is {batch_size}, which {among} cannot share evenly: '
            f'choose a multiple of {unit}, for example --config.{field}={example}'
        )


def meshes_alone() -> list[Mesh]:
    """Meshes on which this process works by itself, on all at the same time: one of all its devices, or one of each.

    Of a slice that is not there it is the first process. For slices of v5e from 4x8 on, the TPU compiler takes programs
    for one chip or for all.
    """
    devices = tuple(d for d in mesh().devices.flat if _process_of(d) == jax.process_index())
    return [make_mesh(group) for group in ([devices] if _run_one_program(devices) else zip(devices))]


@functools.cache
def _run_one_program(devices: tuple) -> bool:
    """Whether these devices run a program together and without all others."""
    if devices[0].platform == 'tpu' and len(devices) > 1:
        with use(make_mesh(devices)):
            x = jax.ShapeDtypeStruct((len(devices),), np.float32, sharding=split_batch())
        try:
            jax.jit(lambda x: x + 1).lower(x).compile()
        except jax.errors.JaxRuntimeError as error:
            if 'all slice devices' not in str(error):  # the compiler's own words; it has no code for this
                raise
            return False
    return True


@functools.cache
def processes(mesh: Mesh) -> int:
    """How many processes have devices in a mesh."""
    return len({_process_of(device) for device in mesh.devices.flat})


def spread_over_processes(devices: Sequence, count: int) -> None:
    """For a plan: as if every `count` of these devices were those of a process of its own."""
    _imagined_process.update({device: index // count for index, device in enumerate(devices)})
    processes.cache_clear()


def _process_of(device):
    return _imagined_process.get(device, device.process_index)


def part_of_batch(rows: int) -> tuple[int, int]:
    """Which of how many equal parts of a batch this process reads: (index, count).

    There are as many as processes, unless processes share rows: where these are cut over `data` alone and the devices
    along `fsdp` belong to several, all of those read the same part.

    Raises:
      ValueError: two processes share a part of their rows.
    """
    cut_at: dict[int, set[int]] = {}
    for device, (rows_of_device,) in split_batch(rows).devices_indices_map((rows,)).items():
        cut_at.setdefault(_process_of(device), set()).add(rows_of_device.start or 0)
    parts = sorted({tuple(sorted(starts)) for starts in cut_at.values()})
    if len({start for part in parts for start in part}) < sum(map(len, parts)):
        raise ValueError(
            f'parallel.fsdp is {mesh().shape[FSDP]}: with a batch of {rows}, hosts would share a part of their rows: '
            f'choose a multiple of {mesh().size} for the batch, or another fsdp'
        )
    return parts.index(tuple(sorted(cut_at[jax.process_index()]))), len(parts)


def put_batch(batch: dict[str, np.ndarray], rows: int | None = None) -> dict[str, jax.Array]:
    """This process's part (`part_of_batch`) of a batch of so many rows, on the devices as one global array per entry.

    Without `rows` the processes of the mesh share none.
    """
    rows = rows or processes(mesh()) * len(next(iter(batch.values())))
    layout = split_batch(rows)
    return {
        name: jax.make_array_from_process_local_data(layout, value, (rows, *value.shape[1:]))
        for name, value in batch.items()
    }


def put_flag(flag: bool) -> jax.Array:
    """What every process says for itself: bool, an entry for each device of the mesh."""
    return jax.make_array_from_callback((mesh().size,), split_batch(), lambda _: np.full(1, flag))


def start_processes() -> None:
    """Makes this process one of many that work as one; before anything else asks JAX for its devices.

    Cloud TPU, Slurm, Open MPI and Kubernetes say how many there are. Elsewhere the environment does:
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    count, index = os.environ.get('JAX_NUM_PROCESSES'), os.environ.get('JAX_PROCESS_ID')
    if count and index:
        jax.distributed.initialize(num_processes=int(count), process_id=int(index))
    else:
        jax.distributed.initialize()


def summary() -> str:
    """The mesh in words: what is missing in it would train too, only longer."""
    kinds = ', '.join(sorted({device.device_kind for device in mesh().devices.flat}))
    return f'{mesh().size} x {kinds} in {processes(mesh())} processes, parallel.fsdp={mesh().shape[FSDP]}'


def is_writer() -> bool:
    """True on the one process that writes logs, records and reports."""
    return jax.process_index() == 0


def share(items: Sequence) -> list:
    """This process's part of what the processes do each on its own."""
    return list(items)[jax.process_index() :: jax.process_count()]


def in_turn(functions: Sequence[Callable], items: Iterable) -> Iterator[tuple]:
    """(item, result) of all items in order. Functions take turns; each starts its next before its last is awaited."""
    started = collections.deque()
    for function, item in zip(itertools.cycle(functions), items):
        started.append((item, function(item)))
        if len(started) == 2 * len(functions):
            yield started.popleft()
    yield from started


def any_process(flag: bool) -> bool:
    """Whether the flag is true on any process; waits for all of them."""
    return bool(np.any(multihost_utils.process_allgather(np.array(bool(flag))))) if jax.process_count() > 1 else flag


def on_writer(work: Callable[[], None]) -> None:
    """What one process does, on the first of `meshes_alone`, while the others wait."""
    if is_writer():
        with use(meshes_alone()[0]):
            work()
    any_process(False)
