"""Vector quantization with a codebook that follows the encoder by exponential moving averages.

VQ-VAE-2 section 2.1 and VQ-VAE (2017) appendix A.1, with four departures that the field learnt the hard way: the
codebook starts from encoder outputs of the first batch; its counts start where they match those vectors (from a count
of zero, one step sends unused codes to zero, or blows them up by 1 / epsilon); the averages forget fast at first, while
the encoder runs away from any codebook that lags a hundred steps behind (after 100 steps their mean age is 10 steps;
Sonnet's zero-debiased averages have 41); and codes that fall out of use restart from the current batch together
with their statistics.

Only restarts keep unused codes alive. Without them (`dead_code_threshold=0`, the paper) the smoothed count of a code
that no vector chooses stays above epsilon while its sum decays, so that its vector shrinks to zero: within about 100
steps from the start, and once its count has decayed to epsilon (more than 1000 steps at a decay of 0.99) later on.

Glossary of shapes: B batch, H W map, N = B * H * W vectors, K codebook size, D codebook dimension.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import Precision, stop_gradient

NEVER = 2**30  # the age of a code that was never chosen: above any epoch, and far from overflow
_EPSILON = 1e-5  # of the smoothing of the counts, as in Sonnet


class Quantized(NamedTuple):
    """What one lookup gives."""

    vectors: jax.Array  # [B, H, W, D] float32, the codes' vectors; gradients pass straight to the input
    codes: jax.Array  # [B, H, W] int32
    commitment: jax.Array  # [B] mean squared distance between input and vectors, per element (before beta)
    metrics: dict[str, jax.Array]  # scalars: perplexity of the batch, restarted codes, their age


class Statistics(NamedTuple):
    """The codebook and the moving averages that it is the quotient of."""

    codebook: jax.Array  # [K, D]
    counts: jax.Array  # [K] moving average of how many vectors of a batch choose the code
    sums: jax.Array  # [K, D] moving average of their sum


def nearest(vectors: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the nearest codebook row in squared Euclidean distance.

    Args:
      vectors: [..., D].
      codebook: [K, D].

    Returns:
      int32 [...]; the lowest index on ties. Computed in float32 at the highest matmul precision: at a TPU's
      or a tensor core's default precision one lookup in a hundred differs.
    """
    vectors, codebook = vectors.astype(jnp.float32), codebook.astype(jnp.float32)
    products = jnp.einsum('...d,kd->...k', vectors, codebook, precision=Precision.HIGHEST)  # [..., K]
    # |v|^2 is the same for every code, so it does not change which one is nearest.
    return jnp.argmin(jnp.sum(codebook**2, axis=-1) - 2 * products, axis=-1).astype(jnp.int32)


def initial_statistics(vectors: jax.Array, codebook_size: int, key: jax.Array) -> Statistics:
    """A codebook of vectors drawn from the first batch, [N, D], with the counts of an even share each."""
    codebook = _draw(vectors, codebook_size, key)
    counts = jnp.full((codebook_size,), vectors.shape[0] / codebook_size, jnp.float32)
    return Statistics(codebook, counts, counts[:, None] * codebook)


def warm_decay(decay: float, updates: jax.Array) -> jax.Array:
    """The decay after `updates` steps: the averages span the last tenth of them, until that is the span of `decay`."""
    return jnp.minimum(decay, (1 + updates) / (10 + updates))


def ema_update(old: Statistics, vectors: jax.Array, codes: jax.Array, decay: jax.Array, epsilon: float) -> Statistics:
    """The codebook update (VQ-VAE-2 section 2.1, unnumbered, after equation 2), with Laplace smoothing of the counts.

    N_i <- decay N_i + (1 - decay) n_i,  m_i <- decay m_i + (1 - decay) sum of vectors,  e_i = m_i / smoothed N_i.
    The sums run over the global batch: under a global-view jit no psum is needed.

    Args:
      old: statistics before the step.
      vectors: float32 [N, D].
      codes: int32 [N].
      decay: gamma, in [0, 1).
      epsilon: of the smoothing.
    """
    size = old.counts.shape[0]
    chosen = jax.nn.one_hot(codes, size, dtype=jnp.float32)  # [N, K]; a product, not a scatter: deterministic on GPUs
    counts = decay * old.counts + (1 - decay) * jnp.sum(chosen, axis=0)
    batch_sums = jnp.einsum('nk,nd->kd', chosen, vectors, precision=Precision.HIGHEST)
    sums = decay * old.sums + (1 - decay) * batch_sums
    total = jnp.sum(counts)
    smoothed = (counts + epsilon) / (total + size * epsilon) * total
    return Statistics(sums / smoothed[:, None], counts, sums)


def restart_dead_codes(
    old: Statistics, vectors: jax.Array, threshold: float, key: jax.Array
) -> tuple[Statistics, jax.Array]:
    """Replaces the codes whose count fell below `threshold` times an even share by vectors of this batch.

    Their statistics restart at an even share too; otherwise the next update would undo the replacement.

    Args:
      old: statistics after the EMA update.
      vectors: float32 [N, D].

    Returns:
      The new statistics, and bool [K], which codes were replaced.
    """
    share = jnp.sum(old.counts) / old.counts.shape[0]
    dead = old.counts < threshold * share  # [K]
    fresh = _draw(vectors, old.counts.shape[0], key)  # [K, D]
    counts = jnp.where(dead, share, old.counts)
    codebook = jnp.where(dead[:, None], fresh, old.codebook)
    return Statistics(codebook, counts, jnp.where(dead[:, None], share * fresh, old.sums)), dead


def _draw(vectors: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """`count` rows of `vectors` [N, D], one at random from each of `count` equal parts: no row twice, and no sort of N.

    Where N < count some rows do come twice; a little noise tells them apart.
    """
    pick, shift, noise = jax.random.split(key, 3)
    available = vectors.shape[0]
    if available < count:
        rows = vectors[jax.random.randint(pick, (count,), 0, available)]
        return rows + 0.01 * jnp.std(vectors, axis=0) * jax.random.normal(noise, rows.shape)
    width = available // count
    start = jax.random.randint(shift, (), 0, available - width * count + 1)  # the parts leave a rest
    return vectors[start + width * jnp.arange(count) + jax.random.randint(pick, (count,), 0, width)]


class Quantizer(nn.Module):
    """EMA codebook in the mutable collection `codebook`.

    embedding [K, D], counts [K] and sums [K, D] are the `Statistics`; updates [] counts training steps, age [K] steps
    since a code was last chosen, `NEVER` or more if it never was: the share of codes used over an epoch is the share
    whose age is below its steps.
    """

    codebook_size: int
    codebook_dim: int
    codebook_ema_decay: float
    dead_code_threshold: float  # of an even share; 0: no restarts (the paper)

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool = False) -> Quantized:
        """Quantizes inputs [B, H, W, D] with the codebook from before this step; `train` then updates it.

        Training needs the rng stream `reseed` and the collection `codebook` mutable.
        """
        if inputs.shape[-1] != self.codebook_dim:
            raise ValueError(f'codebook_dim is {self.codebook_dim}, but the inputs have {inputs.shape[-1]} channels')
        inputs = inputs.astype(jnp.float32)
        flat = stop_gradient(inputs.reshape(-1, self.codebook_dim))  # [N, D]

        first = None
        if not self.has_variable('codebook', 'embedding'):
            first = initial_statistics(flat, self.codebook_size, self.make_rng('reseed'))
        codebook = self.variable('codebook', 'embedding', lambda: first.codebook)
        counts = self.variable('codebook', 'counts', lambda: first.counts)
        sums = self.variable('codebook', 'sums', lambda: first.sums)
        age = self.variable('codebook', 'age', lambda: jnp.full((self.codebook_size,), NEVER, jnp.int32))
        updates = self.variable('codebook', 'updates', lambda: jnp.zeros((), jnp.int32))

        codes = nearest(stop_gradient(inputs), codebook.value)  # [B, H, W]
        vectors = jnp.take(codebook.value, codes, axis=0)  # [B, H, W, D]
        commitment = jnp.mean((inputs - stop_gradient(vectors)) ** 2, axis=(1, 2, 3))
        histogram = jnp.bincount(codes.reshape(-1), length=self.codebook_size)  # [K]
        frequency = histogram / codes.size
        perplexity = jnp.exp(-jnp.sum(jax.scipy.special.xlogy(frequency, frequency)))
        replaced = jnp.zeros((self.codebook_size,), bool)
        if train and not self.is_initializing():
            old = Statistics(codebook.value, counts.value, sums.value)
            decay = warm_decay(self.codebook_ema_decay, updates.value)
            new = ema_update(old, flat, codes.reshape(-1), decay, _EPSILON)
            new, replaced = restart_dead_codes(new, flat, self.dead_code_threshold, self.make_rng('reseed'))
            codebook.value, counts.value, sums.value = new
            updates.value = updates.value + 1
            age.value = jnp.where(histogram > 0, 0, age.value + 1)
        metrics = {'perplexity': perplexity, 'restarted': jnp.sum(replaced), 'age': age.value}
        return Quantized(inputs + stop_gradient(vectors - inputs), codes, commitment, metrics)

    def lookup(self, codes: jax.Array) -> jax.Array:
        """Vectors [..., D] of codes [...]."""
        return jnp.take(self.get_variable('codebook', 'embedding'), codes, axis=0)
