"""Devices: the only file that names them.

Programs are written for the global batch and compiled with `jax.jit` over one mesh; XLA adds the communication.
"""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = 'data'


@functools.cache
def mesh() -> Mesh:
    """All devices along one axis, `data`."""
    # Auto is spelled out: make_mesh defaults to Explicit, under which `codebook[codes]` and nn.Embed raise.
    return jax.make_mesh((jax.device_count(),), (DATA,), axis_types=(AxisType.Auto,))


def replicated() -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh(), PartitionSpec())


def split_batch() -> NamedSharding:
    """The leading axis is cut over the devices."""
    return NamedSharding(mesh(), PartitionSpec(DATA))


def check_batch_size(batch_size: int, field: str) -> None:
    """Raises ValueError when a global batch cannot be cut evenly; `field` names it in the message."""
    devices = jax.device_count()
    if batch_size < 1 or batch_size % devices:
        example = max(-(-batch_size // devices), 1) * devices
        raise ValueError(
            f'{field} is {batch_size}, which {devices} devices cannot share evenly: '
            f'choose a multiple of {devices}, for example --config.{field}={example}'
        )


def put_batch(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's part of a batch, on the devices as one global array per entry."""
    return {name: jax.make_array_from_process_local_data(split_batch(), value) for name, value in batch.items()}


def is_writer() -> bool:
    """True on the one process that writes logs and reports."""
    return jax.process_index() == 0
