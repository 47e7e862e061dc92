"""Processes (hosts) that work as one: start, who is the main process, agreement, and simulated hosts for plans."""

import functools
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

_simulated_process: dict = {}  # device -> process index, of devices that are not attached


def initialize_distributed() -> None:
    """Initializes JAX for several processes. Call it before anything else asks JAX for its devices.

    Cloud TPU, Slurm, Open MPI and Kubernetes are detected. Elsewhere three environment variables are needed:
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM away from preemption.py
    count, index = os.environ.get('JAX_NUM_PROCESSES'), os.environ.get('JAX_PROCESS_ID')
    known = {'num_processes': int(count), 'process_id': int(index)} if count and index else {}
    jax.distributed.initialize(shutdown_timeout_seconds=60, **known)  # how long a failed process waits for the others


def is_main_process() -> bool:
    """Returns whether this is process 0, which writes all files and prints the log."""
    return jax.process_index() == 0


def process_max(number: int) -> int:
    """Returns the maximum of the numbers of all processes; waits for all of them."""
    return int(np.max(multihost_utils.process_allgather(np.array(number)))) if jax.process_count() > 1 else number


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order; waits for all of them. A value must pickle."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    padded = np.zeros(process_max(len(data)), np.uint8)
    padded[: len(data)] = data  # bytes after the end of a pickle are ignored
    return [pickle.loads(row.tobytes()) for row in np.asarray(multihost_utils.process_allgather(padded))]


def process_any(flag: bool) -> bool:
    """Returns whether the flag is true on any process; waits for all of them."""
    return process_max(int(flag)) > 0


def run_on_main_process(function: Callable[[], Any]) -> Any:
    """Calls a function on process 0 while the others wait, and returns its result on all processes.

    The function runs no SPMD program. Its result must pickle.

    Raises:
      Exception: the one that the function raises, on process 0; the other processes exit with the same status.
    """
    if jax.process_count() == 1:
        return function()
    error, status, data = None, 0, b''
    if is_main_process():
        try:
            data = pickle.dumps(function())
        except BaseException as raised:  # noqa: BLE001 it is raised again when the other processes know of it
            error, status = raised, 1
            if isinstance(raised, SystemExit) and raised.code in range(1, 256):
                status = raised.code
    # One message of fixed size says how the call ended and how long its result is.
    status, length = multihost_utils.broadcast_one_to_all(np.array([status, len(data)]))
    if error is not None:
        raise error
    if status:
        raise SystemExit(int(status))
    buffer = np.zeros(int(length), np.uint8)
    buffer[:] = np.frombuffer(data, np.uint8) if is_main_process() else 0
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


@functools.cache
def num_processes(mesh: Mesh) -> int:
    """Returns how many processes have devices in a mesh."""
    return len({_process_of(device) for device in mesh.devices.flat})


def simulate_hosts(devices: Sequence, count: int) -> None:
    """For a plan: treats every `count` of these devices, which are not attached, as those of one process."""
    _simulated_process.update({device: index // count for index, device in enumerate(devices)})
    num_processes.cache_clear()


def _process_of(device):
    return _simulated_process.get(device, device.process_index)


def describe_mesh(mesh: Mesh) -> str:
    """Returns a line such as '8 x TPU v5 lite in 2 processes, mesh data=4 fsdp=2'."""
    names = ', '.join(sorted({device.device_kind for device in mesh.devices.flat}))
    count = num_processes(mesh)
    axes = ' '.join(f'{name}={size}' for name, size in mesh.shape.items())
    return f'{mesh.size} x {names} in {count} process{"es" * (count > 1)}, mesh {axes}'
