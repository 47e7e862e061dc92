"""Accelerators that plans are made for: peaks as their makers state them."""

import os
from typing import NamedTuple

import jax

from vqvae2_jax.distributed import processes
from vqvae2_jax.jobs.workdir import JobError


class Chip(NamedTuple):
    """One chip, which is one device of JAX."""

    name: str
    flops: float  # dense bfloat16 a second
    memory: float  # bytes
    bandwidth: float  # bytes a second


_CHIPS = {  # by device_kind
    'TPU v4': Chip('v4', 275e12, 32e9, 1228e9),
    'TPU v5 lite': Chip('v5e', 197e12, 16e9, 819e9),
    'TPU v5': Chip('v5p', 459e12, 95e9, 2765e9),
    'TPU v6 lite': Chip('v6e', 918e12, 32e9, 1640e9),
    'NVIDIA H100 80GB HBM3': Chip('H100', 989e12, 80e9, 3350e9),
    'NVIDIA H200': Chip('H200', 989e12, 141e9, 4800e9),
}
KNOWN = {  # examples; any that divides into hosts of 2x2 chips works
    'v4': ('2x2x1', '2x2x4', '4x4x4', '4x4x8', '8x8x8'),
    'v5e': ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
    'v5p': ('2x2x1', '2x2x4', '4x4x4', '4x4x8', '8x8x8'),
    'v6e': ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
}
_GPUS_A_HOST = 8  # with one process, as launch/slurm.sh starts them
_GPUS = {'h100': 'NVIDIA H100 80GB HBM3', 'h200': 'NVIDIA H200'}
_stood_for: dict[jax.Device, Chip] = {}  # by CPU devices, in a plan for GPUs


def hardware_of(device) -> Chip | None:
    """What is known of a device; None for CPUs and the rest."""
    return _stood_for.get(device) or _CHIPS.get(device.device_kind)


def is_simulated(device) -> bool:
    """Whether programs can be counted for a device, but not compiled."""
    return device in _stood_for


def topology_devices(name: str) -> list:
    """The devices of a TPU slice such as 'v5e:4x8', without one; or CPU devices that stand for GPUs such as 'h100:8'.

    Raises:
      JobError: there is no such slice, and the message lists some; or libtpu, the compiler, is not installed.
    """
    kind, _, shape = name.partition(':')
    jax.config.update('jax_platforms', 'cpu')  # else JAX looks for the accelerators that are not there
    if kind in _GPUS and shape.isdecimal() and int(shape):
        jax.config.update('jax_num_cpu_devices', int(shape))
        _stood_for.update(dict.fromkeys(jax.devices(), _CHIPS[_GPUS[kind]]))
        processes.simulate_hosts(jax.devices(), _GPUS_A_HOST)
        return jax.devices()
    if kind not in KNOWN or not shape:
        raise JobError(f'--topology={name}: {_examples()}')
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise JobError(f'--topology={name} is compiled for by libtpu: pip install -e ".[tpu]"') from error
    from jax.experimental import topologies

    # No TPU answers for its name and neighbours here, and another plan may be under way.
    os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1', TPU_WORKER_HOSTNAMES='localhost')
    options = {'chip_config_name': 'megacore'} if kind == 'v4' else {}  # both cores of a chip as one device
    try:
        return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise JobError(f'--topology={name}: {str(error).splitlines()[0]}; {_examples()}') from error


def _examples():
    slices = [f'{kind}:{shape}' for kind, shapes in KNOWN.items() for shape in shapes]
    return 'there are ' + ', '.join(slices + [f'{kind}:8' for kind in _GPUS]) + ' (or any number of GPUs)'
