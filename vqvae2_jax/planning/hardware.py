"""Accelerators: their peaks, as the vendors state them, and devices that are not attached."""

import os
from typing import NamedTuple

import jax

from vqvae2_jax.distributed import processes
from vqvae2_jax.io.record import JobError


class Accelerator(NamedTuple):
    """The peaks of one device of JAX.

    Attributes:
      name: such as 'v5e'.
      flops: dense bfloat16 FLOP/s.
      memory: bytes.
      bandwidth: of the memory, bytes/s.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float


_ACCELERATORS = {  # by device_kind
    'TPU v4': Accelerator('v4', 275e12, 32e9, 1228e9),
    'TPU v5 lite': Accelerator('v5e', 197e12, 16e9, 819e9),
    'TPU v5': Accelerator('v5p', 459e12, 95e9, 2765e9),
    'TPU v6 lite': Accelerator('v6e', 918e12, 32e9, 1640e9),
    'NVIDIA H100 80GB HBM3': Accelerator('H100', 989e12, 80e9, 3350e9),
    'NVIDIA H200': Accelerator('H200', 989e12, 141e9, 4800e9),
}
TPU_SLICES = {  # examples; any shape that divides into hosts of 2x2 devices works
    'v4': ('2x2x1', '2x2x4', '4x4x4', '4x4x8', '8x8x8'),
    'v5e': ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
    'v5p': ('2x2x1', '2x2x4', '4x4x4', '4x4x8', '8x8x8'),
    'v6e': ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
}
_GPUS_PER_HOST = 8  # one process each, as launch/slurm.sh starts them
_GPUS = {'h100': 'NVIDIA H100 80GB HBM3', 'h200': 'NVIDIA H200'}
_simulated: dict[jax.Device, Accelerator] = {}  # CPU devices that a plan takes for GPUs


def hardware_of(device: jax.Device) -> Accelerator | None:
    """Returns the peaks of a device; None for CPUs and unknown accelerators."""
    return _simulated.get(device) or _ACCELERATORS.get(device.device_kind)


def is_simulated(device: jax.Device) -> bool:
    """Returns whether a CPU device stands for a GPU: FLOPs can be counted for it, but nothing compiled."""
    return device in _simulated


def topology_devices(name: str) -> list[jax.Device]:
    """Returns devices that need not be attached.

    Args:
      name: a TPU slice such as 'v5e:4x8', or a number of H100 or H200 GPUs such as 'h100:8'. CPU devices stand for
        the GPUs, see `is_simulated`. The call creates them, so it has to come before the first JAX operation.

    Raises:
      RuntimeError: GPUs, after JAX was initialized.
      JobError: there is no such slice (the message lists some), or libtpu, its compiler, is not installed.
    """
    family, _, shape = name.partition(':')
    jax.config.update('jax_platforms', 'cpu')  # else JAX looks for accelerators
    if family in _GPUS and shape.isdecimal() and int(shape):
        jax.config.update('jax_num_cpu_devices', int(shape))
        _simulated.update(dict.fromkeys(jax.devices(), _ACCELERATORS[_GPUS[family]]))
        processes.simulate_hosts(jax.devices(), _GPUS_PER_HOST)
        return jax.devices()
    if family not in TPU_SLICES or not shape:
        raise JobError(f'--topology={name}: {_examples()}')
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise JobError(f'--topology={name} needs the TPU compiler libtpu: pip install -e ".[tpu]"') from error
    from jax.experimental import topologies

    # There is no TPU to ask for its name and neighbors, and another plan may be running.
    os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1', TPU_WORKER_HOSTNAMES='localhost')
    options = {'chip_config_name': 'megacore'} if family == 'v4' else {}  # both cores of a chip as one device
    try:
        return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise JobError(f'--topology={name}: {str(error).splitlines()[0]}; {_examples()}') from error


def _examples():
    slices = [f'{family}:{shape}' for family, shapes in TPU_SLICES.items() for shape in shapes]
    return 'choose one such as ' + ', '.join(slices + [f'{family}:8' for family in _GPUS]) + ' (any number of GPUs)'
