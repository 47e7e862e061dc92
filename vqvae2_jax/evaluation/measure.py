"""The numbers of a run: reconstruction, likelihood, and how like real images its samples are."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from vqvae2_jax.config import build as configs
from vqvae2_jax.data import samples
from vqvae2_jax.data.codes import CodeSource
from vqvae2_jax.data.loader import eval_batches
from vqvae2_jax.distributed import sharding
from vqvae2_jax.evaluation import generative
from vqvae2_jax.evaluation.features import MAX_STORED_FEATURES, FeatureStats, Network, in_batches
from vqvae2_jax.jobs import reject, sample, train, workdir
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.metrics import codebook as code_metrics
from vqvae2_jax.metrics.classification import accuracy, per_class_accuracy
from vqvae2_jax.models.vqvae import map_shapes
from vqvae2_jax.tasks.task import to_uint8
from vqvae2_jax.training.loop import make_eval_fn

_TRAIN_EXAMPLES = 10_000  # of the training split, for numbers that are compared with held-out ones


class Seen(NamedTuple):
    """One look at a split's images and their reconstructions."""

    reconstruction: dict  # its part of the report
    originals: dict  # the part of the report on the split's own images
    real: FeatureStats | None  # of evaluate.reference; None without a network to look with
    reconstructed: FeatureStats | None  # of the reconstructions of the same images
    # uint8 [N, H, W, C] -> what it is -> the same images: original, by ever more levels, by all
    reconstruct: Callable[[np.ndarray], dict[str, np.ndarray]]


def look(run: Run, network: Network | None) -> Seen:
    """Measures the errors of reconstruction on evaluate.split; with a network, looks at originals and reconstructions.

    It looks at evaluate.reference, by default the same split.
    """
    options = configs.options(run.config, 'evaluate')
    trained, stage = workdir.load_vqvae(run), train.vqvae_task(run)
    batch_size = run.config.sample.batch_size  # one process does this, on as many devices as it draws on

    def show(weights, images):
        rows = stage.show(*weights, {'image': images})
        return {name: to_uint8(row) for name, row in zip(stage.shown, rows, strict=True)}

    embed = in_batches(show, (trained.params, trained.variables), batch_size)

    def reconstruct(images):
        rows = embed(images)
        return {name: rows[name] for name in stage.shown}  # jit sorts the keys

    found = _reconstruction(run, stage, trained, options.split)
    if network is None:
        return Seen(found, {}, None, None, reconstruct)
    real, reconstructed = FeatureStats(network), [FeatureStats(network) for _ in run.levels]
    reference = run.images(options.reference or options.split)
    for batch in eval_batches(reference, batch_size=batch_size, **run.reading()):
        images = batch['image'][batch['mask']]
        if not len(images):  # none could be read
            continue
        _, *rows = reconstruct(images).values()
        real.add(images)
        for observed, row in zip(reconstructed, rows, strict=True):
            observed.add(row)
    *coarser, whole = (_compare(network, real, observed) for observed in reconstructed)
    found['quality'] = whole
    for name, numbers in zip(reversed(run.levels[1:]), coarser, strict=True):
        found['levels'][name]['without_finer_levels']['quality'] = numbers
    return Seen(found, _originals(run, network, real), real, reconstructed[-1], reconstruct)


def _originals(run: Run, network: Network, real: FeatureStats) -> dict:
    """Compares the images of evaluate.split with those of evaluate.reference: the best that a model can reach."""
    options = configs.options(run.config, 'evaluate')
    if options.reference in ('', options.split):
        return {'quality': {'missing': 'evaluate.reference is evaluate.split: set it to another split'}}
    observed = FeatureStats(network)
    for batch in eval_batches(run.images(options.split), batch_size=network.batch_size, **run.reading()):
        if len(images := batch['image'][batch['mask']]):
            observed.add(images)
    return {'quality': _compare(network, real, observed)}


def _compare(network, real, generated) -> dict:
    """The numbers, or why there are none: the rest of a report is worth having without them."""
    try:
        return generative.compare(network, real, generated)
    except ValueError as error:
        return {'missing': str(error)}


def _reconstruction(run: Run, stage, trained, split) -> dict:
    config = run.config
    evaluation = make_eval_fn(stage)
    weights = jax.device_put((trained.params, trained.variables), sharding.replicated_sharding())

    def summary(split, count=None):
        source = run.images(split)
        stop = min(count or len(source), len(source))
        batches = eval_batches(source, batch_size=config.sample.batch_size, stop=stop, **run.reading())
        return evaluation(*weights, batches)

    held_out, train = summary(split), summary('train', _TRAIN_EXAMPLES)
    shapes = map_shapes(config.data.image_size, config.vqvae.factors)
    image_shape = (*config.data.image_size, config.data.channels)
    sizes = (config.vqvae.codebook_size,) * len(shapes)
    levels = {}
    for name, shape in zip(run.levels, shapes, strict=True):
        levels[name] = {
            'codes': list(shape),
            'used': held_out[f'used_{name}'],
            'perplexity': held_out[f'perplexity_{name}'],
        }
        if name in run.levels[1:]:
            levels[name]['without_finer_levels'] = _errors(held_out, f'_{name}_only')
    ratio = code_metrics.compression_ratio(image_shape, shapes, sizes)
    return _errors(held_out) | {
        'train': _errors(train),
        'bits_per_image': 8 * float(np.prod(image_shape)) / ratio,
        'compression_ratio': ratio,
        'levels': levels,
    }


def _errors(summary, of='') -> dict[str, float]:
    found = {'psnr': summary[f'psnr{of}'], 'mse_11': summary[f'mse{of}'], 'mse_01': summary[f'mse{of}'] / 4}
    return found | ({'ssim': summary[f'ssim{of}']} if f'ssim{of}' in summary else {})


def likelihood(run: Run, split: str) -> dict:
    """Nats per code of every level, bits of an image, on a held-out split; and of the training images."""
    size = run.config.vqvae.codebook_size
    train, held_out = run.codes('train'), run.codes(split)
    train_codes, held_out_codes = _codes(train, min(len(train), _TRAIN_EXAMPLES)), _codes(held_out, len(held_out))
    levels, shapes = {}, []
    for level, (name, prior) in enumerate(zip(run.levels, workdir.load_priors(run), strict=True)):
        stage = train.prior_task(run, level, show=False)
        evaluation = make_eval_fn(stage)
        weights = jax.device_put(
            (prior.params, prior.variables), sharding.replicated_sharding()
        )  # once, not for every batch

        def nll(source, count, evaluation=evaluation, weights=weights):
            batches = eval_batches(source, batch_size=run.config.sample.batch_size, stop=count)
            return evaluation(*weights, batches)['nll']

        key = f'codes_{level}'
        shapes.append(held_out_codes[key].shape[1:])
        levels[name] = {
            'nll': nll(held_out, len(held_out)),
            'nll_train': nll(train, min(len(train), _TRAIN_EXAMPLES)),
            'unigram_entropy': code_metrics.unigram_entropy(held_out_codes[key], size),
            'positional_cross_entropy': code_metrics.positional_cross_entropy(
                train_codes[key], held_out_codes[key], size, alpha=1.0
            ),
            'parameters': prior.record['parameters'],
        }
    data = run.config.data
    subpixels = data.image_size[0] * data.image_size[1] * data.channels
    bits, bits_train = (
        code_metrics.bits_per_image([level[key] for level in levels.values()], shapes) for key in ('nll', 'nll_train')
    )
    return {
        'unit': 'nats per code',
        'levels': levels,
        'bits_per_image': bits,
        'bits_per_image_train': bits_train,
        'bits_per_subpixel': bits / subpixels,
    }


def _codes(source: CodeSource, count: int) -> dict[str, np.ndarray]:
    examples = [source[i] for i in range(count)]
    return {k: np.stack([e[k] for e in examples]) for k in examples[0] if k.startswith('codes_')}


def drawn(run: Run, network: Network | None, seen: Seen, classifier_network: Network | None) -> dict:
    """Measures the samples: by the classifier, and against real images, before and after rejection."""
    meta = samples.read_meta(run.path(sample.DIRECTORY))
    found = {name: meta[name] for name in ('count', 'seed', 'temperature', *configs.SAMPLING_DEFAULTS, 'dtype')}
    options, chosen = configs.options(run.config, 'evaluate'), []
    if classifier_network is not None:
        scores = samples.read_npz(run.path(reject.DIRECTORY, 'scores.npz'))
        chosen = generative.choose_samples(scores['log_probability'], scores['label'], options.sweep, len(seen.real))
    if network is not None:
        needed = functools.reduce(
            np.union1d, [share.positions for share in chosen], np.arange(min(meta['count'], MAX_STORED_FEATURES))
        )
        generated = _look_at_samples(run, network, needed)
        first = generated.take(slice(MAX_STORED_FEATURES))
        found['quality'] = _compare(network, seen.real, first)
        found['quality_against_reconstructions'] = _compare(network, seen.reconstructed, first)
    if classifier_network is None:
        return found
    points, note = generative.sweep(network, seen.real, seen.reconstructed, generated, needed, chosen, scores['score'])
    accepted, rejection = samples.read_npz(run.path(reject.DIRECTORY, 'accepted.npz')), reject.read_meta(run)
    kept = scores['predicted'][np.searchsorted(scores['index'], accepted['index'])]
    names = run.images(options.split).class_names
    each = per_class_accuracy(scores['predicted'], scores['label'], run.config.data.num_classes)
    return found | {
        'classifier_accuracy_on_real_images': _accuracy_on_real(run, classifier_network, options.split),
        'intended_class': accuracy(scores['predicted'], scores['label']),
        'intended_class_after_rejection': accuracy(kept, accepted['label']),
        'kept': rejection['keep'],
        'threshold': rejection['threshold'],
        'accepted': len(accepted['index']),
        'note': 'the classifier that rejects is the one that judges: the number after rejection is optimistic',
        'intended_class_by_class': dict(zip(names, each, strict=True)),
        'sweep': points,
        'sweep_note': note,
    }


def _look_at_samples(run, network, positions) -> FeatureStats:
    """Shows the network the samples `positions`, int [M], rising, and holds all their features."""
    directory = run.path(sample.DIRECTORY)
    meta, observed = samples.read_meta(directory), FeatureStats(network, held=len(positions))
    ranges = samples.shard_ranges(meta['count'], meta['batch_size'])
    for (start, stop), path in zip(ranges, samples.shard_paths(directory), strict=True):
        first, last = np.searchsorted(positions, (start, stop))
        if first < last:
            observed.add(samples.read_npz(path)['arr_0'][positions[first:last] - start])
    return observed


def _accuracy_on_real(run: Run, classifier_network: Network, split: str) -> float:
    predicted, labels = [], []
    for batch in eval_batches(run.images(split), batch_size=run.config.sample.batch_size, **run.reading()):
        predicted.append(classifier_network.embed(batch['image'])['logits'].argmax(axis=-1)[batch['mask']])
        labels.append(batch['label'][batch['mask']])
    return accuracy(np.concatenate(predicted), np.concatenate(labels))
