"""Vector quantization with a codebook updated by exponential moving averages.

VQ-VAE-2 section 2.1 and VQ-VAE (2017) appendix A.1, with four common departures:
- The codebook is initialized with encoder outputs of the first batch.
- The counts start at N / K and the sums at the counts times those vectors. If both started at zero, one step would set
  unused codes to zero, or multiply them by 1 / epsilon.
- The averages have a short horizon at first, since the encoder changes fast. After 100 steps their mean age is 10
  steps; that of Sonnet's zero-debiased averages is 41.
- Dead codes are restarted at vectors of the current batch, together with their statistics (Jukebox, Dhariwal et al.
  2020).

Without restarts (`dead_code_threshold=0`, the paper) unused codes do not recover. The smoothed count of such a code
stays above epsilon while its sum decays, so its vector shrinks to zero: at the start of training within about 100
steps, later once its count has decayed to epsilon (more than 1000 steps at a decay of 0.99).

Shapes: B batch, H W map, N = B * H * W vectors, K codebook size, D codebook dimension.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import Precision, stop_gradient

Nearest = Callable[[jax.Array, jax.Array], jax.Array]  # vectors [B, H, W, D], codebook [K, D] -> codes int32 [B, H, W]

NEVER = 2**30  # the age of a code that was never assigned: more than any epoch, and far from overflow
_EPSILON = 1e-5  # smooths the counts, as in Sonnet


class Quantized(NamedTuple):
    """The result of a quantizer.

    Attributes:
      vectors: float32 [B, H, W, D], the code vectors; gradients pass straight through to the input.
      codes: int32 [B, H, W].
      commitment: float32 [B], mean squared distance between input and vectors, per element (before beta).
      metrics: 'perplexity' of the batch [], 'restarted' codes [], and 'age' [K], see `Quantizer`.
    """

    vectors: jax.Array
    codes: jax.Array
    commitment: jax.Array
    metrics: dict[str, jax.Array]


class Statistics(NamedTuple):
    """The codebook, which is the quotient of two moving averages.

    Attributes:
      codebook: float32 [K, D], sums / counts.
      counts: float32 [K], moving average of the number of vectors per batch that are assigned to a code.
      sums: float32 [K, D], moving average of the sum of these vectors.
    """

    codebook: jax.Array
    counts: jax.Array
    sums: jax.Array


def nearest(vectors: jax.Array, codebook: jax.Array) -> jax.Array:
    """Finds the nearest codebook row in squared Euclidean distance.

    Args:
      vectors: [..., D], any float dtype.
      codebook: [K, D], any float dtype.

    Returns:
      Indices of rows, int32 [...]; the lowest index on ties. Computed in float32 at the highest matmul precision: at
      the default precision of TPUs and tensor cores one lookup in a hundred differs.
    """
    vectors, codebook = vectors.astype(jnp.float32), codebook.astype(jnp.float32)
    products = jnp.einsum('...d,kd->...k', vectors, codebook, precision=Precision.HIGHEST)  # [..., K]
    # |v|^2 is the same for all codes, so it is left out.
    return jnp.argmin(jnp.sum(codebook**2, axis=-1) - 2 * products, axis=-1).astype(jnp.int32)


def initial_statistics(vectors: jax.Array, codebook_size: int, key: jax.Array) -> Statistics:
    """Makes a codebook of distinct random vectors of the first batch, with equal counts N / K.

    If there are fewer vectors than codes, vectors repeat, with a little noise.

    Args:
      vectors: encoder outputs of the first batch, [N, D], any float dtype.
      codebook_size: K.
      key: key of the random choice of vectors.

    Returns:
      The statistics before the first update.
    """
    codebook = _random_rows(vectors, codebook_size, key)
    counts = jnp.full((codebook_size,), vectors.shape[0] / codebook_size, jnp.float32)
    return Statistics(codebook, counts, counts[:, None] * codebook)


def warm_decay(decay: float, updates: jax.Array) -> jax.Array:
    """Returns the decay of the next update: (1 + updates) / (10 + updates), at most `decay`.

    Args:
      decay: the decay after many updates, in [0, 1).
      updates: number of updates so far, int [].
    """
    return jnp.minimum(decay, (1 + updates) / (10 + updates))


def sum_by_code(vectors: jax.Array, codes: jax.Array, codebook_size: int) -> jax.Array:
    """Sums the vectors of every code, as a product with one-hot vectors.

    Unlike a scatter, it is deterministic on GPUs; XLA's deterministic scatter (`xla_gpu_deterministic_ops`) moves more
    than ten times the bytes. Products of bfloat16 vectors with ones and zeros are exact at any precision.

    Args:
      vectors: [N, D], any float dtype.
      codes: the code of each vector, int32 [N].
      codebook_size: K.

    Returns:
      The sums, float32 [K, D], added in float32.
    """
    chosen = jax.nn.one_hot(codes, codebook_size, dtype=vectors.dtype)  # [N, K]
    options = {'precision': Precision.HIGHEST, 'preferred_element_type': jnp.float32}
    return jnp.einsum('nk,nd->kd', chosen, vectors, **options)


def ema_update(
    old: Statistics, batch_counts: jax.Array, batch_sums: jax.Array, decay: jax.Array, epsilon: float
) -> Statistics:
    """Updates the codebook (VQ-VAE-2 section 2.1, after equation 2), with Laplace smoothing of the counts.

    N_i <- decay N_i + (1 - decay) n_i,  m_i <- decay m_i + (1 - decay) sum of vectors,  e_i = m_i / smoothed N_i.
    The sums run over the global batch, since `jax.jit` compiles the global program.

    Args:
      old: statistics before the step.
      batch_counts: n_i, the number of vectors of the batch that are assigned to a code, [K].
      batch_sums: the sum of these vectors, float32 [K, D].
      decay: gamma, in [0, 1).
      epsilon: smoothing constant of the counts.

    Returns:
      The statistics after the step.
    """
    counts = decay * old.counts + (1 - decay) * batch_counts
    sums = decay * old.sums + (1 - decay) * batch_sums
    total, size = jnp.sum(counts), counts.shape[0]
    smoothed = (counts + epsilon) / (total + size * epsilon) * total
    return Statistics(sums / smoothed[:, None], counts, sums)


def restart_dead_codes(
    old: Statistics, vectors: jax.Array, threshold: float, key: jax.Array
) -> tuple[Statistics, jax.Array]:
    """Replaces codes whose count is below `threshold` times the mean count by vectors of this batch.

    Their statistics restart at the mean count too; otherwise the next update would undo the replacement.

    Args:
      old: statistics after the EMA update.
      vectors: [N, D], any float dtype.
      threshold: share of the mean count below which a code is replaced; 0: none.
      key: key of the random choice of vectors.

    Returns:
      The new statistics, and which codes are replaced, bool [K].
    """
    mean = jnp.sum(old.counts) / old.counts.shape[0]
    dead = old.counts < threshold * mean  # [K]
    new = _random_rows(vectors, old.counts.shape[0], key)  # [K, D]
    counts = jnp.where(dead, mean, old.counts)
    codebook = jnp.where(dead[:, None], new, old.codebook)
    return Statistics(codebook, counts, jnp.where(dead[:, None], mean * new, old.sums)), dead


def _random_rows(vectors: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """Returns `count` rows of vectors [N, D] in float32, a random one of each of `count` equal parts.

    They are distinct, without a sort. If N < count some rows are repeated; noise makes them distinct.
    """
    pick, shift, noise = jax.random.split(key, 3)
    available = vectors.shape[0]
    if available < count:
        vectors = vectors.astype(jnp.float32)
        rows = vectors[jax.random.randint(pick, (count,), 0, available)]
        return rows + 0.01 * jnp.std(vectors, axis=0) * jax.random.normal(noise, rows.shape)
    width = available // count
    start = jax.random.randint(shift, (), 0, available - width * count + 1)  # N may not be divisible
    picked = start + width * jnp.arange(count) + jax.random.randint(pick, (count,), 0, width)
    return vectors[picked].astype(jnp.float32)


class Quantizer(nn.Module):
    """Quantizer with an EMA codebook in the mutable collection `codebook`.

    The collection has the `Statistics` (embedding [K, D], counts [K], sums [K, D]), the number of training steps
    (updates []) and the steps since each code was last assigned (age [K]; `NEVER` or more if it never was). The
    codebook usage of an epoch is the share of codes whose age is below its number of steps.

    Attributes:
      codebook_size: K.
      codebook_dim: D.
      codebook_ema_decay: decay of the moving averages.
      dead_code_threshold: restart codes whose count is below this multiple of the mean count; 0: never (the paper).
      nearest: the lookup; another one computes the same as `nearest`.
    """

    codebook_size: int
    codebook_dim: int
    codebook_ema_decay: float
    dead_code_threshold: float
    nearest: Nearest = nearest

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool = False) -> Quantized:
        """Quantizes inputs with the codebook from before this step.

        Args:
          inputs: [B, H, W, D], any float dtype.
          train: update the codebook; needs the rng `restart` and the collection `codebook` mutable.

        Returns:
          Code vectors, codes, commitment and metrics.

        Raises:
          ValueError: the number of channels of the inputs is not D.
        """
        if inputs.shape[-1] != self.codebook_dim:
            raise ValueError(f'codebook_dim is {self.codebook_dim}, but the inputs have {inputs.shape[-1]} channels')
        flat = stop_gradient(inputs.reshape(-1, self.codebook_dim))  # [N, D], in the dtype of the inputs

        first = None
        if not self.has_variable('codebook', 'embedding'):
            first = initial_statistics(flat, self.codebook_size, self.make_rng('restart'))
        codebook = self.variable('codebook', 'embedding', lambda: first.codebook)
        counts = self.variable('codebook', 'counts', lambda: first.counts)
        sums = self.variable('codebook', 'sums', lambda: first.sums)
        age = self.variable('codebook', 'age', lambda: jnp.full((self.codebook_size,), NEVER, jnp.int32))
        updates = self.variable('codebook', 'updates', lambda: jnp.zeros((), jnp.int32))

        codes = self.nearest(stop_gradient(inputs), stop_gradient(codebook.value))  # [B, H, W]
        inputs = inputs.astype(jnp.float32)
        vectors = jnp.take(codebook.value, codes, axis=0)  # [B, H, W, D]
        commitment = jnp.mean((inputs - stop_gradient(vectors)) ** 2, axis=(1, 2, 3))
        histogram = jnp.bincount(codes.reshape(-1), length=self.codebook_size)  # [K]
        frequency = histogram / codes.size
        perplexity = jnp.exp(-jnp.sum(jax.scipy.special.xlogy(frequency, frequency)))
        replaced = jnp.zeros((self.codebook_size,), bool)
        if train and not self.is_initializing():
            old = Statistics(codebook.value, counts.value, sums.value)
            decay = warm_decay(self.codebook_ema_decay, updates.value)
            batch_sums = sum_by_code(flat, codes.reshape(-1), self.codebook_size)
            new = ema_update(old, histogram, batch_sums, decay, _EPSILON)
            new, replaced = restart_dead_codes(new, flat, self.dead_code_threshold, self.make_rng('restart'))
            codebook.value, counts.value, sums.value = new
            updates.value = updates.value + 1
            age.value = jnp.where(histogram > 0, 0, age.value + 1)
        metrics = {'perplexity': perplexity, 'restarted': jnp.sum(replaced), 'age': age.value}
        return Quantized(inputs + stop_gradient(vectors - inputs), codes, commitment, metrics)

    def lookup(self, codes: jax.Array) -> jax.Array:
        """Returns the vectors float32 [..., D] of codes int [...]."""
        return jnp.take(self.get_variable('codebook', 'embedding'), codes, axis=0)
