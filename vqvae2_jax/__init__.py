"""VQ-VAE-2 in JAX: images -> hierarchical codes -> priors over codes -> new codes -> new images -> metrics.

Start at `vqvae2_jax.main` (the command line) or `vqvae2_jax.jobs` (the same jobs from Python). Importing the package
changes no environment variable and no state of another library; `vqvae2_jax.xla_flags` has the flag that makes
training on a CPU fast.
"""

from vqvae2_jax.config.loading import load_config
from vqvae2_jax.version import __version__

__all__ = ['__version__', 'load_config']
