"""VQ-VAE-2 in JAX: images -> hierarchical codes -> priors over codes -> new codes -> new images -> numbers.

Start at `vqvae2_jax.main` (the command line) or `vqvae2_jax.jobs` (the same verbs from Python).
"""

__version__ = '0.2.0'
