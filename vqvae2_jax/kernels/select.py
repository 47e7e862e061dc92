"""Selects implementations of functions of the models by the devices. No other file does.

Every implementation has a reference in plain JAX, which modules use unless they are given another one. Kernels cannot
be exported for several platforms. So only training and its plan ask for them, never a config or a saved specification.
"""

from typing import NamedTuple

import jax

from vqvae2_jax.distributed import per_shard
from vqvae2_jax.kernels import attention, nearest
from vqvae2_jax.models import attention as reference
from vqvae2_jax.models import quantizer

_LEAST_CAPABILITY = 8.0  # of an NVIDIA GPU with bfloat16 on its tensor cores
_LARGE_BLOCKS = (8.0, 9.0, 10.0, 10.3)  # A100, H100, H200, B200, B300: others have 99 KB of shared memory for a block


class Implementations(NamedTuple):
    """Functions that modules take as arguments.

    Attributes:
      nearest: see `Quantizer`.
      attend: see `CausalAttention`.
    """

    nearest: quantizer.Nearest = quantizer.nearest
    attend: reference.Attend = reference.attend


REFERENCES = Implementations()


def for_device(device: jax.Device) -> Implementations:
    """Returns the implementations for training on devices like this one, which need not be attached.

    Args:
      device: one of the mesh; all are of one kind. Programs are compiled inside `jax.set_mesh`.
    """
    capability = _capability(device) if device.platform == 'gpu' else 0.0
    if capability < _LEAST_CAPABILITY:
        return REFERENCES
    lookup = per_shard.over_batch(nearest.nearest) if capability in _LARGE_BLOCKS else quantizer.nearest
    return Implementations(lookup, attention.attend)


def _capability(device) -> float:
    try:
        return float(device.compute_capability)
    except ValueError:  # AMD's are names
        return 0.0
