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
import sys
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

    Of a slice that is not there it is the first process. For slices of v5e and v6e from 4x4 on, the TPU compiler takes
    programs for one chip or for all.
    """
    devices = tuple(d for d in mesh().devices.flat if _process_of(d) == jax.process_index())
    return [make_mesh(group) for group in ([devices] if _run_one_program(devices) else zip(devices))]


@functools.cache
def _run_one_program(devices: tuple) -> bool:
    """Whether the devices of each process run a program together and without all others; all processes ask together."""
    if devices[0].platform != 'tpu' or len(devices) == 1:
        return True
    with use(make_mesh(devices)):
        x = jax.ShapeDtypeStruct((len(devices),), np.float32, sharding=split_batch())
    try:
        jax.jit(lambda x: x.sum()).lower(x).compile()  # on some slices programs do that do not communicate
        refused = ''
    except jax.errors.JaxRuntimeError as error:  # the words differ, and the compiler has no code for this
        refused = str(error).splitlines()[0]
        print(f'the devices of one process take turns, as they run no program together: {refused}', file=sys.stderr)
    return not any_process(bool(refused))


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


def own_rows(rows: int) -> np.ndarray:
    """Which rows of a batch of so many this process reads: int, ascending.

    Those of its devices, wherever these lie in the mesh, so that any number of processes trains on the same batch.
    Where it is cut over `data` alone and the devices along `fsdp` belong to several processes, these share rows.
    """
    parts = split_batch(rows).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def put_batch(batch: dict[str, np.ndarray], rows: int | None = None) -> dict[str, jax.Array]:
    """This process's rows of a batch of so many (`own_rows`), on the devices as one global array per entry.

    Without `rows` it has all.
    """
    rows = rows or len(next(iter(batch.values())))
    layout, own = split_batch(rows), own_rows(rows)

    def put(values):
        def part(index):
            start, stop, _ = index[0].indices(rows)
            return values[slice(*np.searchsorted(own, (start, stop)))]

        return jax.make_array_from_callback((rows, *values.shape[1:]), layout, part)

    return {name: put(values) for name, values in batch.items()}


def put_flag(flag: bool) -> jax.Array:
    """What every process says for itself: bool, an entry for each device of the mesh."""
    return jax.make_array_from_callback((mesh().size,), split_batch(), lambda _: np.full(1, flag))


def start_processes() -> None:
    """Makes this process one of many that work as one; before anything else asks JAX for its devices.

    Cloud TPU, Slurm, Open MPI and Kubernetes say how many there are. Elsewhere the environment does:
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    jax.config.update('jax_enable_preemption_service', False)  # it takes SIGTERM away from io/interrupt.py
    count, index = os.environ.get('JAX_NUM_PROCESSES'), os.environ.get('JAX_PROCESS_ID')
    known = {'num_processes': int(count), 'process_id': int(index)} if count and index else {}
    jax.distributed.initialize(shutdown_timeout_seconds=60, **known)  # how long one that failed waits for the others


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


def on_each_alone(make: Callable[[], Callable]) -> list[Callable]:
    """What `make` returns on each of `meshes_alone`: functions that put arrays there, and run there, when called."""
    functions = []
    for chosen in meshes_alone():
        with use(chosen):
            functions.append(use(chosen)(make()))
    return functions


def in_turn(functions: Sequence[Callable], items: Iterable) -> Iterator[tuple]:
    """(item, result) of all items in order. Functions take turns; each starts its next before its last is awaited."""
    started = collections.deque()
    for function, item in zip(itertools.cycle(functions), items):
        started.append((item, function(item)))
        if len(started) == 2 * len(functions):
            yield started.popleft()
    yield from started


def highest(number: int) -> int:
    """The highest of all processes' numbers; waits for all of them."""
    return int(np.max(multihost_utils.process_allgather(np.array(number)))) if jax.process_count() > 1 else number


def any_process(flag: bool) -> bool:
    """Whether the flag is true on any process; waits for all of them."""
    return highest(int(flag)) > 0


def on_writer(work: Callable[[], None]) -> None:
    """What one process does, on the first of `meshes_alone`, while the others wait; they end too where it fails."""
    error, status = None, 0
    if is_writer():
        try:
            with use(meshes_alone()[0]):
                work()
        except BaseException as raised:  # noqa: BLE001 it is raised below, when the others have heard of it
            error, status = raised, 1
            if isinstance(raised, SystemExit) and raised.code in range(1, 256):
                status = raised.code
    status = highest(status)
    if error is not None:
        raise error
    if status:
        raise SystemExit(status)
