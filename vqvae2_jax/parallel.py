"""Devices: the only file that names them.

Programs are written for the global batch and compiled with `jax.jit` over one mesh of two axes; XLA adds the
communication. Batches are cut over both axes. Big arrays of a training state are cut over `fsdp` and copied along
`data`: with an `fsdp` of 1 every device holds the whole state.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP = 'data', 'fsdp'
_SMALL = 2**14  # elements: the memory that cutting such an array saves is not worth its communication
_in_use: list[Mesh] = []  # innermost last
_all_devices = functools.cache(lambda: make_mesh())


def make_mesh(devices: Sequence | None = None, fsdp: int = 1) -> Mesh:
    """A mesh of these devices (None: all), of which `fsdp` neighbours share one copy of a state.

    Raises:
      ValueError: `fsdp` does not divide their number.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        choices = ', '.join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
        raise ValueError(f'parallel.fsdp is {fsdp}, but there are {len(devices)} devices: choose one of {choices}')
    # Auto is spelled out: make_mesh defaults to Explicit, under which `codebook[codes]` and nn.Embed raise.
    return jax.make_mesh((len(devices) // fsdp, fsdp), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2, devices=devices)


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


def split_batch() -> NamedSharding:
    """The leading axis is cut over all devices."""
    return NamedSharding(mesh(), PartitionSpec((DATA, FSDP)))


def cut(array) -> NamedSharding:
    """The rule for states: an array is cut over `fsdp` along its largest axis that divides, unless it is small."""
    count = mesh().shape[FSDP]
    axes = [axis for axis, size in enumerate(array.shape) if size % count == 0]
    if count == 1 or math.prod(array.shape) < _SMALL or not axes:
        return replicated()
    axis = max(axes, key=lambda a: array.shape[a])
    return NamedSharding(mesh(), PartitionSpec(*[None] * axis, FSDP))


def keep_cut(tree: Any) -> Any:
    """Inside a program: arrays that stay cut by the rule, like the parameters whose shapes they have."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, cut(x)), tree)


def copy_everywhere(tree: Any) -> Any:
    """Arrays that may be cut, whole on every device."""
    return jax.jit(lambda x: x, out_shardings=replicated())(tree)


def check_batch_size(batch_size: int, field: str, parts: int = 1) -> None:
    """Raises ValueError when a global batch, in `parts`, cannot be cut evenly; `field` names it in the message."""
    devices = mesh().size
    unit = devices * parts
    if batch_size < 1 or batch_size % unit:
        example = max(-(-batch_size // unit), 1) * unit
        among = f'{devices} devices' + (f' in {parts} parts' if parts > 1 else '')
        raise ValueError(
            f'{field} is {batch_size}, which {among} cannot share evenly: '
            f'choose a multiple of {unit}, for example --config.{field}={example}'
        )


def put_batch(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's part of a batch, on the devices as one global array per entry."""
    return {name: jax.make_array_from_process_local_data(split_batch(), value) for name, value in batch.items()}


def is_writer() -> bool:
    """True on the one process that writes logs and reports."""
    return jax.process_index() == 0
