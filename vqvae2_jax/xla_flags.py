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

    Call it before the first computation: XLA reads XLA_FLAGS once, when JAX starts its backend. A value that the user
    has set is kept.

    Returns:
      Whether the flag was added.
    """
    return _runs_on_cpu() and add_flag(CPU_FLAG, _VALUE)


def add_flag(name: str, value: str) -> bool:
    """Adds a flag to XLA_FLAGS, unless it is set already, or the installed jaxlib does not know it.

    An XLA that does not know a flag aborts the process; that of a plugin for an accelerator may not know it.

    Returns:
      Whether the flag was added.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    if name in flags or not _jaxlib_knows(name):
        return False
    os.environ['XLA_FLAGS'] = f'{flags} --{name}={value}'.strip()
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


def _jaxlib_knows(name: str) -> bool:
    # Flags are C strings, between two zero bytes. The descriptor of DebugOptions also holds the names of removed flags.
    string = b'\0' + name.encode() + b'\0'
    for path in pathlib.Path(importlib.util.find_spec('jaxlib').origin).parent.glob('*.so'):
        with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(string) >= 0:
                return True
    return False
