"""--job=evaluate: report.json and the pictures of a run, from the test split: nothing was trained or chosen on it."""

import contextlib
import datetime
import os
import platform

import jax
import numpy as np

from vqvae2_jax import config as configs
from vqvae2_jax import parallel
from vqvae2_jax.data.codes import CodeSource
from vqvae2_jax.data.images import SPLITS
from vqvae2_jax.data.loader import eval_batches
from vqvae2_jax.io import pictures, provenance
from vqvae2_jax.io.checkpoint import read_record
from vqvae2_jax.io.logging import format_duration, read_metrics
from vqvae2_jax.jobs import codes, reject, sample, samples, stages, workdir
from vqvae2_jax.jobs.train import make_evaluation
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.metrics import codes as code_metrics
from vqvae2_jax.metrics.classification import accuracy, per_class_accuracy
from vqvae2_jax.models.vqvae import map_shapes
from vqvae2_jax.stages.stage import to_uint8

DIRECTORY = 'report'
_TRAIN_EXAMPLES = 10_000  # of the training split, for numbers that are compared with the test split
_COLUMNS = 10


def evaluate(run: Run) -> None:
    """Writes report/: report.json, reconstructions.png, samples.png, accepted.png, curves.png; prints the summary."""
    directory = run.path(DIRECTORY)
    check_upstreams(run)
    vqvae = workdir.load_vqvae(run)
    report = {
        'schema': 1,
        'config': run.config.name,
        'protocol': _protocol(run),
        'reconstruction': _reconstruction(run, vqvae),
        'likelihood': _likelihood(run),
        'samples': _samples(run),
        'seconds': _seconds(run),
        'skipped_files': len(run.skipped()),
    }
    _picture_of_levels(run, vqvae, directory)
    _picture_of_samples(run, directory)
    _curves(run, directory, report['likelihood'])
    provenance.write_json(directory / 'report.json', report)
    _print(run, directory, report)


def check_upstreams(run: Run) -> None:
    """Refuses when samples or scores were made by other weights than those that the report would describe."""
    vqvae, learnt = workdir.vqvae_record(run), {'codes': codes.current_codes_digest(run)}
    workdir.check_images(run, 'vqvae', vqvae)
    codes.check_images(run, 'test')
    for name, prior in zip(run.levels, workdir.prior_records(run), strict=True):
        directory = workdir.prior_directory(name)
        recorded = {'codes': prior['upstream']['codes']}
        workdir.check_digests(directory, recorded, learnt, f'Delete {run.path(directory)} to train it anew.')
    meta = samples.read_meta(run.path(sample.DIRECTORY))
    remedy = f'Delete {run.path(sample.DIRECTORY)} and run --job=sample again.'
    workdir.check_digests('the samples', meta['upstream'], workdir.generator_digests(run), remedy)
    if configs.has_classifier(run.config):
        classifier, scores = workdir.trained_record(run, 'classifier', 'classifier'), reject.read_meta(run)
        workdir.check_images(run, 'classifier', classifier)
        current = {'samples': provenance.digest_json(meta), 'classifier': classifier['digest']}
        workdir.check_digests('the scores', scores['upstream'], current, 'Run --job=reject again.')


def _protocol(run: Run) -> dict:
    device = jax.devices()[0]
    return {
        'split': 'test',
        'counts': {split: len(run.images(split)) for split in SPLITS},
        'weights': 'averaged (training.weight_ema), best on the validation split',
        'mse': 'clipped pixels; mse_11 in [-1, 1], mse_01 in [0, 1]; PSNR of the mean over images of the MSE',
        'seed': run.config.seed,
        'config_digest': provenance.digest_json(run.config.to_dict()),
        'version': provenance.package_version(),
        'jax': jax.__version__,
        'device': f'{jax.device_count()} x {device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores',
        'machine': platform.machine(),
        'date': datetime.date.today().isoformat(),
    }


def _reconstruction(run: Run, trained) -> dict:
    config = run.config
    stage = stages.vqvae_stage(run)
    batches = eval_batches(run.images('test'), batch_size=config.vqvae.training.batch_size, **run.reading())
    summary = make_evaluation(stage)(trained.params, trained.variables, batches)
    shapes = map_shapes(config.data.image_size, config.vqvae.factors)
    image_shape = (*config.data.image_size, config.data.channels)
    levels = {}
    for name, shape in zip(run.levels, shapes, strict=True):
        levels[name] = {
            'codes': list(shape),
            'used': summary[f'used_{name}'],
            'perplexity': summary[f'perplexity_{name}'],
        }
        if f'mse_{name}_only' in summary:
            levels[name]['psnr_without_finer_levels'] = summary[f'psnr_{name}_only']
    return {
        'psnr': summary['psnr'],
        'mse_11': summary['mse'],
        'mse_01': summary['mse'] / 4,
        'compression_ratio': code_metrics.compression_ratio(
            image_shape, shapes, (config.vqvae.codebook_size,) * len(shapes)
        ),
        'levels': levels,
    }


def _likelihood(run: Run) -> dict:
    size = run.config.vqvae.codebook_size
    train, test = (run.codes(split) for split in ('train', 'test'))
    train_codes, test_codes = _codes(train, min(len(train), _TRAIN_EXAMPLES)), _codes(test, len(test))
    levels, shapes = {}, []
    for level, (name, prior) in enumerate(zip(run.levels, workdir.load_priors(run), strict=True)):
        stage = stages.prior_stage(run, level, show=False)
        batch_size = run.config.prior[name].training.batch_size
        measure = make_evaluation(stage)

        def nll(source, count, measure=measure, prior=prior, batch_size=batch_size):
            batches = eval_batches(source, batch_size=batch_size, stop=count)
            return measure(prior.params, prior.variables, batches)['nll']

        key = f'codes_{level}'
        shapes.append(test_codes[key].shape[1:])
        levels[name] = {
            'nll': nll(test, len(test)),
            'nll_train': nll(train, min(len(train), _TRAIN_EXAMPLES)),
            'empirical_entropy': code_metrics.empirical_entropy(test_codes[key], size),
            'positional_entropy': code_metrics.positional_entropy(train_codes[key], test_codes[key], size, alpha=1.0),
            'parameters': prior.record['parameters'],
        }
    bits = code_metrics.bits_per_image([level['nll'] for level in levels.values()], shapes)
    pixels = run.config.data.image_size[0] * run.config.data.image_size[1] * run.config.data.channels
    return {'unit': 'nats per code', 'levels': levels, 'bits_per_image': bits, 'bits_per_subpixel': bits / pixels}


def _codes(source: CodeSource, count: int) -> dict[str, np.ndarray]:
    examples = [source[i] for i in range(count)]
    return {k: np.stack([e[k] for e in examples]) for k in examples[0] if k.startswith('codes_')}


def _samples(run: Run) -> dict:
    meta = samples.read_meta(run.path(sample.DIRECTORY))
    found = {name: meta[name] for name in ('count', 'seed', 'temperature', *configs.CONTROLS, 'dtype')}
    if not configs.has_classifier(run.config):
        return found
    trained = workdir.load_trained(run, 'classifier', 'classifier')
    batches = eval_batches(run.images('test'), batch_size=run.config.classifier.training.batch_size, **run.reading())
    real = make_evaluation(stages.classifier_stage(run))(trained.params, trained.variables, batches)
    scores = samples.read_npz(run.path(reject.DIRECTORY, 'scores.npz'))
    accepted = samples.read_npz(run.path(reject.DIRECTORY, 'accepted.npz'))
    predicted = dict(zip(scores['index'].tolist(), scores['predicted'].tolist(), strict=True))
    kept = np.array([predicted[index] for index in accepted['index'].tolist()])
    names = run.images('test').class_names
    each = per_class_accuracy(scores['predicted'], scores['label'], run.config.data.num_classes)
    return found | {
        'classifier_accuracy_on_real_images': real['accuracy'],
        'intended_class': accuracy(scores['predicted'], scores['label']),
        'intended_class_after_rejection': accuracy(kept, accepted['label']),
        'kept': reject.read_meta(run)['keep'],
        'note': 'the classifier that rejects is the one that judges: the number after rejection is optimistic',
        'intended_class_by_class': dict(zip(names, each, strict=True)),
    }


def _seconds(run: Run) -> dict[str, float]:
    directories = {'vqvae': 'vqvae', **{f'prior_{n}': workdir.prior_directory(n) for n in reversed(run.levels)}}
    if configs.has_classifier(run.config):
        directories['classifier'] = 'classifier'
    seconds = {name: read_record(run.path(d))['seconds'] for name, d in directories.items()}
    return seconds | {'sample': provenance.read_json(run.path(sample.DIRECTORY, 'time.json'))['seconds']}


def _picture_of_levels(run: Run, trained, directory) -> None:
    stage = stages.vqvae_stage(run)
    with contextlib.closing(eval_batches(run.images('test'), batch_size=_COLUMNS, **run.reading())) as batches:
        batch = next(batches)
    weights = jax.device_put((trained.params, trained.variables), parallel.replicated())
    rows = jax.jit(stage.show)(*weights, {'image': batch['image']})
    rows = [(label, np.asarray(to_uint8(images))) for label, images in zip(stage.shown, rows, strict=True)]
    picture = pictures.labelled_rows(rows, scale=pictures.visible_scale(rows[0][1]))
    pictures.save_png(directory / 'reconstructions.png', picture)


def _picture_of_samples(run: Run, directory) -> None:
    drawn = {'samples.png': run.path(sample.DIRECTORY, 'samples.png')}
    if configs.has_classifier(run.config):
        drawn['accepted.png'] = run.path(reject.DIRECTORY, 'accepted.png')
    for name, source in drawn.items():
        provenance.write_bytes(directory / name, source.read_bytes())


def _curves(run: Run, directory, likelihood: dict) -> None:
    panels = [_panel(run, 'vqvae', 'vqvae: reconstruction', 'mse', 'MSE in [-1, 1]', log_y=True)]
    for name in reversed(run.levels):
        lines = {'entropy of the codes': likelihood['levels'][name]['empirical_entropy']}
        panels.append(_panel(run, workdir.prior_directory(name), f'{name} prior', 'nll', 'nats per code', lines))
    if configs.has_classifier(run.config):
        panels.append(_panel(run, 'classifier', 'classifier', 'nll', 'cross-entropy, nats'))
    pictures.plot_panels(directory / 'curves.png', panels)


def _panel(run, stage_directory, title, metric, ylabel, hlines=None, log_y=False) -> pictures.Panel:
    lines = read_metrics(run.path(stage_directory))
    curves = {}
    for prefix, label in (('train', 'train'), ('validation', 'held out')):
        points = [(line['step'], line[f'{prefix}/{metric}']) for line in lines if f'{prefix}/{metric}' in line]
        if points:
            curves[label] = tuple(zip(*points, strict=True))
    return pictures.Panel(title, curves, ylabel, hlines or {}, log_y)


def _print(run: Run, directory, report: dict) -> None:
    reconstruction, drawn = report['reconstruction'], report['samples']
    print(f'\n{run.config.name}: {report["protocol"]["counts"]["test"]} test images')
    print(
        f'  reconstruction   PSNR {reconstruction["psnr"]:.2f} dB, {reconstruction["compression_ratio"]:.1f}x smaller'
    )
    for name, level in reversed(reconstruction['levels'].items()):
        likelihood = report['likelihood']['levels'][name]
        print(
            f'  {name:<16} {level["used"]:.0%} of the codebook used, perplexity {level["perplexity"]:.1f}; '
            f'prior {likelihood["nll"]:.3f} nats per code (entropy {likelihood["empirical_entropy"]:.3f}, '
            f'by position {likelihood["positional_entropy"]:.3f})'
        )
    if 'intended_class' in drawn:
        print(
            f'  classifier       {drawn["classifier_accuracy_on_real_images"]:.1%} right on real images; '
            f'{drawn["count"]} samples show their class {drawn["intended_class"]:.1%} of the time, '
            f'{drawn["intended_class_after_rejection"]:.1%} after rejection (kept {drawn["kept"]:.0%})'
        )
    times = ', '.join(f'{name} {format_duration(seconds)}' for name, seconds in report['seconds'].items())
    print(f'  time             {times}; {format_duration(sum(report["seconds"].values()))} in all')
    if report['skipped_files']:
        print(f'  skipped          {report["skipped_files"]} unreadable files, listed in {run.path(workdir.SKIPPED)}')
    print(f'\npictures: {directory}/*.png\nreport:   {directory / "report.json"}', flush=True)
