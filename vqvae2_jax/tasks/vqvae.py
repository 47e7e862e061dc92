"""Stage 1: the hierarchical VQ-VAE's objective (VQ-VAE-2 equation 2, the codebook term replaced by moving averages)."""

import dm_pix
import jax
import jax.numpy as jnp

from vqvae2_jax.metrics.codebook import perplexity
from vqvae2_jax.metrics.psnr import LEAST_MSE, psnr_from_mse
from vqvae2_jax.models.vqvae import VQVAE
from vqvae2_jax.tasks.task import Task, to_float

# How the metric `ssim` is computed, for reports.
SSIM_PROTOCOL = (
    'Gaussian window of 11 pixels, sigma 1.5, k1 0.01, k2 0.03, on [0, 1], mean over windows, channels and images'
)
_WINDOW = 11
ALL_LEVELS = 'all levels'  # label of the last row of images


def make_task(model: VQVAE, level_names: tuple[str, ...], commitment_weight: float, steps_per_epoch: int) -> Task:
    """Makes the task over batches {'image': uint8 [B, H, W, C]}.

    Args:
      model: the module.
      level_names: names of the levels, finest first, such as ('bottom', 'top'); metrics are named after them.
      commitment_weight: weight of the commitment loss, beta; the commitment is a mean over all elements, as in Sonnet.
      steps_per_epoch: a code counts as used when it was chosen within this many steps.
    """

    def init(key, batch):
        params_key, restart_key = jax.random.split(key)
        image = to_float(batch['image'])
        model_state = dict(model.init({'params': params_key, 'restart': restart_key}, image))
        return model_state.pop('params'), model_state

    def loss(params, model_state, batch, key):
        image = to_float(batch['image'])
        output, model_state = model.apply(
            {'params': params, **model_state}, image, train=True, mutable=['codebook'], rngs={'restart': key}
        )
        # 1. Reconstruction: squared error, a mean over all elements.
        mse = jnp.mean((output.image - image) ** 2)
        # 2. Commitment of every level.
        commitment = [jnp.mean(c) for c in output.commitment]
        # 3. The preview heads; model.preview_grad_scale decides how much of their gradient reaches anything else.
        preview = sum(jnp.mean((p - image) ** 2) for p in output.previews)
        total = mse + commitment_weight * sum(commitment) + preview
        # The reported error is that of the clipped image, as in evaluation.
        metrics = {'loss': total, 'mse': jnp.mean((jnp.clip(output.image, -1.0, 1.0) - image) ** 2)}
        for name, level_commitment, quantizer_metrics in zip(level_names, commitment, output.metrics, strict=True):
            metrics |= {
                f'commitment_{name}': level_commitment,
                f'perplexity_{name}': quantizer_metrics['perplexity'],
                f'used_{name}': jnp.mean(quantizer_metrics['age'] < steps_per_epoch),
                f'restarted_{name}': quantizer_metrics['restarted'],
            }
        return total, (model_state, metrics)

    def eval_step(params, model_state, batch):
        image = to_float(batch['image'])
        output = model.apply({'params': params, **model_state}, image)
        metrics = _image_errors(output.image, image)
        for name, codes in zip(level_names, output.codes, strict=True):
            flat = codes.reshape(codes.shape[0], -1)
            metrics[f'histogram_{name}'] = jax.vmap(lambda c: jnp.bincount(c, length=model.codebook_size))(flat)
        for name, preview in zip(level_names[1:], output.previews, strict=True):
            metrics |= _image_errors(preview, image, f'_{name}_only')
        return metrics

    def visualize(params, model_state, batch):
        image = to_float(batch['image'])
        output = model.apply({'params': params, **model_state}, image)
        return image, *reversed(output.previews), output.image

    image_labels = ('original', *(f'{name} only' for name in reversed(level_names[1:])), ALL_LEVELS)
    return Task(init, loss, eval_step, _reduce_metrics, 'mse', visualize, image_labels)


def _reduce_metrics(means):
    summary = {}
    for name, value in means.items():
        if name.startswith('histogram_'):
            level = name.removeprefix('histogram_')
            summary[f'used_{level}'] = float((value > 0).mean())
            summary[f'perplexity_{level}'] = perplexity(value)
        else:
            summary[name] = float(value)
            if name.startswith('mse'):
                summary[name.replace('mse', 'psnr')] = psnr_from_mse(max(float(value), LEAST_MSE), data_range=2.0)
    return summary


def _image_errors(reconstruction, image, suffix=''):
    # Each [B], for the clipped image, as a viewer sees it. The MSE is that of pixels in [-1, 1].
    clipped = jnp.clip(reconstruction, -1.0, 1.0)
    errors = {f'mse{suffix}': jnp.mean((clipped - image) ** 2, axis=(1, 2, 3))}
    if min(image.shape[1:3]) >= _WINDOW:
        errors[f'ssim{suffix}'] = dm_pix.ssim((clipped + 1) / 2, (image + 1) / 2, filter_size=_WINDOW)
    return errors
