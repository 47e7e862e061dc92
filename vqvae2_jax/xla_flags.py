"""The XLA flag that makes training on a CPU fast. The command line sets it; library users call `set_cpu_flags`."""

import importlib.metadata
import importlib.util
import mmap
import os
import pathlib
import pkgutil

import jax

# By default XLA's CPU backend computes convolutions with YNNPACK, which is slow at the gradients of their kernels
# (docs/scale.md). This value leaves them to Eigen.
CPU_FLAG = 'xla_cpu_experimental_ynn_fusion_type'
_VALUE = '-individual_convolution'


def set_cpu_flags() -> bool:
    """Adds the flag to the environment variable XLA_FLAGS, if JAX will run on a CPU.

    Call it before the first computation: XLA reads XLA_FLAGS once, when JAX starts its backend. An XLA that does not
    know a flag aborts the process, so the flag is added only if the installed jaxlib contains its name and no plugin
    for an accelerator will be loaded. A value that the user has set is kept.

    Returns:
      Whether the flag was added.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    if CPU_FLAG in flags or not _runs_on_cpu() or not _jaxlib_contains(CPU_FLAG.encode()):
        return False
    os.environ['XLA_FLAGS'] = f'{flags} --{CPU_FLAG}={_VALUE}'.strip()
    return True


def _runs_on_cpu() -> bool:
    # jax.default_backend() would start the backend, and after that it is too late to set flags.
    platforms = jax.config.jax_platforms
    return platforms == 'cpu' if platforms else not _has_plugin()


def _has_plugin() -> bool:
    """Whether a plugin for an accelerator is installed, looked up as JAX does; its device may be missing."""
    if importlib.util.find_spec('libtpu') or importlib.metadata.entry_points(group='jax_plugins'):
        return True
    namespace = importlib.util.find_spec('jax_plugins')
    return namespace is not None and any(pkgutil.iter_modules(namespace.submodule_search_locations))


def _jaxlib_contains(name: bytes) -> bool:
    for path in pathlib.Path(importlib.util.find_spec('jaxlib').origin).parent.glob('*.so'):
        with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(name) >= 0:
                return True
    return False
