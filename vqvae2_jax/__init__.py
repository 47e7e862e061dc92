"""VQ-VAE-2 in JAX: images -> hierarchical codes -> priors over codes -> new codes -> new images -> metrics.

From Python, `load` a generator and call the functions of `vqvae2_jax.api`, which this package exports:

    import vqvae2_jax as vq2

    images, codes = vq2.sample(vq2.load('fashion'), vq2.sample_keys(jax.random.key(0), jnp.arange(10)), jnp.arange(10))

`run_job` runs the jobs of the command line, `vqvae2_jax.main`, from Python. Importing the package changes no
environment variable and no state of another library; `vqvae2_jax.xla_flags` has the flag that makes training on a CPU
fast.
"""

import importlib
from typing import TYPE_CHECKING

from vqvae2_jax.config.loading import load_config
from vqvae2_jax.version import __version__

if TYPE_CHECKING:
    from vqvae2_jax.api import (
        Generator,
        LogLikelihood,
        Samples,
        Specification,
        decode,
        encode,
        inpaint,
        log_likelihood,
        preview,
        reconstruct,
        sample,
        sample_keys,
        sample_level,
    )
    from vqvae2_jax.config.validation import validate_config
    from vqvae2_jax.data.codes_writer import write_codes
    from vqvae2_jax.io.logging import read_metrics
    from vqvae2_jax.io.plots import draw_codes, image_grid, labeled_rows
    from vqvae2_jax.jobs.pipeline import run_job
    from vqvae2_jax.jobs.workdir import Run
    from vqvae2_jax.weights.exported import export
    from vqvae2_jax.weights.sources import load, save
    from vqvae2_jax.xla_flags import set_cpu_flags

__all__ = [
    'Generator',
    'LogLikelihood',
    'Run',
    'Samples',
    'Specification',
    '__version__',
    'decode',
    'draw_codes',
    'encode',
    'export',
    'image_grid',
    'inpaint',
    'labeled_rows',
    'load',
    'load_config',
    'log_likelihood',
    'preview',
    'read_metrics',
    'reconstruct',
    'run_job',
    'sample',
    'sample_keys',
    'sample_level',
    'save',
    'set_cpu_flags',
    'validate_config',
    'write_codes',
]
_MODULES = {  # of the names that `api` does not have
    'Run': 'jobs.workdir',
    'draw_codes': 'io.plots',
    'export': 'weights.exported',
    'image_grid': 'io.plots',
    'labeled_rows': 'io.plots',
    'load': 'weights.sources',
    'read_metrics': 'io.logging',
    'run_job': 'jobs.pipeline',
    'save': 'weights.sources',
    'set_cpu_flags': 'xla_flags',
    'validate_config': 'config.validation',
    'write_codes': 'data.codes_writer',
}


def __getattr__(name: str):
    # Imported at the first use: JAX and Flax take seconds, and the command line prepares the terminal before.
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_MODULES.get(name, "api")}'), name)


def __dir__() -> list[str]:
    return sorted(__all__)
