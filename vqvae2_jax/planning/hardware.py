"""Accelerators: their peaks, as the vendors state them, and devices that are not attached."""

import importlib.util
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
      tf32: FLOP/s of GPUs for products of float32 at the default precision; 0: not a GPU.
      float32: FLOP/s of GPUs for products of float32 at `Precision.HIGHEST`.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    tf32: float = 0
    float32: float = 0

    @property
    def is_gpu(self) -> bool:
        """Whether kernels can be counted and timed, see `planning/gpu_kernels.py`."""
        return self.tf32 > 0

    def peak(self, precision: str) -> float:
        """Returns the FLOP/s of a GPU at 'bfloat16', 'tf32' or 'float32'."""
        return {'bfloat16': self.flops, 'tf32': self.tf32, 'float32': self.float32}[precision]


class _GpuTarget(NamedTuple):
    """The facts of a GPU that XLA's compiler needs, besides memory and bandwidth, as XLA's own descriptions say."""

    kind: str
    compute_capability: int
    cores: int
    fpus_per_core: int
    l2_cache: int  # bytes, as the next two
    memory_per_core: int
    memory_per_block: int
    clock: float  # GHz


_GPUS = {  # memory and bandwidth as XLA's descriptions say
    'a100': Accelerator('A100', 312e12, 85_100_068_864, 2_039_040_000_000, 156e12, 19.5e12),
    'h100': Accelerator('H100', 989e12, 84_942_979_072, 3_352_320_000_000, 494e12, 67e12),
    'h200': Accelerator('H200', 989e12, 151_397_597_184, 4_800_000_000_000, 494e12, 67e12),
    'b200': Accelerator('B200', 2250e12, 191_514_411_008, 7_672_320_000_000, 1125e12, 75e12),
}
_GPU_TARGETS = {
    'a100': _GpuTarget('NVIDIA A100-SXM4-80GB', 8, 108, 64, 41_943_040, 167_936, 166_912, 1.41),
    'h100': _GpuTarget('NVIDIA H100 80GB HBM3', 9, 132, 128, 52_428_800, 233_472, 232_448, 1.98),
    'h200': _GpuTarget('NVIDIA H200', 9, 132, 128, 52_428_800, 233_472, 232_448, 1.98),
    'b200': _GpuTarget('NVIDIA B200', 10, 148, 128, 132_644_864, 233_472, 232_448, 1.965),
}
_ACCELERATORS = {  # by device_kind
    'TPU v4': Accelerator('v4', 275e12, 32e9, 1228e9),
    'TPU v5 lite': Accelerator('v5e', 197e12, 16e9, 819e9),
    'TPU v5': Accelerator('v5p', 459e12, 95e9, 2765e9),
    'TPU v6 lite': Accelerator('v6e', 918e12, 32e9, 1640e9),
} | {target.kind: _GPUS[family] for family, target in _GPU_TARGETS.items()}
TPU_SLICES = {  # examples; any shape that divides into hosts of 2x2 devices works
    'v4': ('2x2x1', '2x2x4', '4x4x4', '4x4x8', '8x8x8'),
    'v5e': ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
    'v5p': ('2x2x1', '2x2x4', '4x4x4', '4x4x8', '8x8x8'),
    'v6e': ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
}
# The shares of a GPU's memory that JAX takes: by default, and at most, since driver and libraries need some too.
DEFAULT_GPU_SHARE, GPU_SHARE = 0.75, 0.95
GPU_SHARE_VARIABLE = 'XLA_PYTHON_CLIENT_MEM_FRACTION'  # which sets the share
_GPUS_PER_HOST = 8  # one process each, as launch/slurm.sh starts them
_simulated: dict[jax.Device, Accelerator] = {}  # CPU devices that a plan takes for GPUs


def hardware_of(device: jax.Device) -> Accelerator | None:
    """Returns the peaks of a device; None for CPUs and unknown accelerators."""
    return _simulated.get(device) or _ACCELERATORS.get(device.device_kind)


def is_simulated(device: jax.Device) -> bool:
    """Returns whether a CPU device stands for a GPU: FLOPs can be counted for it, but nothing compiled."""
    return device in _simulated


def has_gpu_compiler() -> bool:
    """Returns whether JAX's CUDA plugin is installed, which compiles for GPUs that are not attached."""
    return any(importlib.util.find_spec(f'jax_cuda{version}_plugin') for version in (12, 13))


def topology_devices(name: str) -> list[jax.Device]:
    """Returns devices that need not be attached.

    Args:
      name: a TPU slice such as 'v5e:4x8', or a number of A100, H100, H200 or B200 GPUs such as 'h100:8', in equal hosts
        of at most eight. Without the CUDA plugin, CPU devices stand for the GPUs, see `is_simulated`. The call creates
        them, so it has to come before the first JAX operation.

    Raises:
      RuntimeError: GPUs without the plugin, after JAX was initialized.
      JobError: there is no such slice (the message lists some), or its compiler is not installed or not usable.
    """
    family, _, shape = name.partition(':')
    jax.config.update('jax_platforms', 'cpu')  # else JAX looks for accelerators
    if family in _GPUS and shape.isdecimal() and int(shape):
        return _gpus(family, int(shape)) if has_gpu_compiler() else _simulated_gpus(family, int(shape))
    if family not in TPU_SLICES or not shape:
        raise JobError(f'--topology={name}: {_examples()}')
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise JobError(f'--topology={name} needs the TPU compiler libtpu: pip install "jax[tpu]"') from error
    # There is no TPU to ask for its name and neighbors, and another plan may be running.
    os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1', TPU_WORKER_HOSTNAMES='localhost')
    options = {'chip_config_name': 'megacore'} if family == 'v4' else {}  # both cores of a chip as one device
    return _described_devices(name, _examples(), platform='tpu', topology_name=name, **options)


def _gpus(family, count):
    per_host = _gpus_per_host(count)
    options = {'target_config': _target_config(family), 'topology': f'1x{count // per_host}x{per_host}'}
    help_text = 'is the CUDA plugin of the same version as jaxlib?'
    return _described_devices(f'{family}:{count}', help_text, platform='cuda', topology_name=family, **options)


def _described_devices(name, help_text, **options):
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(**options).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:  # the latter without a usable plugin
        raise JobError(f'--topology={name}: {str(error).splitlines()[0]}; {help_text}') from error


def _simulated_gpus(family, count):
    jax.config.update('jax_num_cpu_devices', count)
    _simulated.update(dict.fromkeys(jax.devices(), _GPUS[family]))
    processes.simulate_hosts(jax.devices(), _gpus_per_host(count))
    return jax.devices()


def _gpus_per_host(count):
    return max(n for n in range(1, _GPUS_PER_HOST + 1) if count % n == 0)


def _target_config(family):
    # the text of XLA's GpuTargetConfigProto
    gpu, target = _GPUS[family], _GPU_TARGETS[family]
    features = 'feature_extension: ACCELERATED_FEATURES' if target.compute_capability >= 9 else ''
    return f"""gpu_device_info {{
  cuda_compute_capability {{ major: {target.compute_capability} {features} }}
  core_count: {target.cores} fpus_per_core: {target.fpus_per_core} clock_rate_ghz: {target.clock}
  device_memory_size: {gpu.memory} memory_bandwidth: {gpu.bandwidth} l2_cache_size: {target.l2_cache}
  shared_memory_per_core: {target.memory_per_core} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {target.memory_per_block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA" device_description_str: "{target.kind}"
dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 minor: 0 }}"""


def _examples():
    slices = [f'{family}:{shape}' for family, shapes in TPU_SLICES.items() for shape in shapes]
    return 'choose one such as ' + ', '.join(slices + [f'{family}:8' for family in _GPUS]) + ' (any number of GPUs)'
