"""VQ-VAE-2 in JAX: images -> hierarchical codes -> priors over codes -> new codes -> new images -> numbers.

Start at `vqvae2_jax.main` (the command line) or `vqvae2_jax.jobs` (the same verbs from Python).
"""

import os

__version__ = '0.2.0'

# On CPUs XLA has a library compute convolutions, YNNPACK, which is slow at the gradients of their kernels
# (docs/scale.md). XLA reads the flag when the first program is compiled; a user's own stays.
_LIBRARY = '--xla_cpu_experimental_ynn_fusion_type'
if _LIBRARY not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_LIBRARY}=-individual_convolution'.strip()
