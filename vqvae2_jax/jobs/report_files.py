"""Writes report/: report.json, report.html, the pictures of a run and of its sample sets. On the main process only."""

import datetime
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vqvae2_jax.config import build
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.images import SPLITS
from vqvae2_jax.evaluation.report import render_html, summary
from vqvae2_jax.io import checksums, files, lock, plots, record
from vqvae2_jax.io.logging import read_metrics
from vqvae2_jax.io.plots import Panel
from vqvae2_jax.io.record import Record
from vqvae2_jax.jobs import cas, reject, sample, workdir
from vqvae2_jax.jobs.workdir import RECONSTRUCTIONS, REJECTION, SAMPLES, SKIPPED, Run
from vqvae2_jax.tasks.vqvae import SSIM_PROTOCOL
from vqvae2_jax.version import __version__

DIRECTORY = 'report'
SCHEMA = 5
_DISTANCES = {'fid': 'FID', 'frechet_distance': 'Fréchet distance'}


def write_report(
    run: Run, parts: dict[str, Any], quality: dict[str, str] | None, images: dict[str, np.ndarray]
) -> None:
    """Writes all files of the report, and prints a summary.

    Args:
      run: the run.
      parts: the parts of report.json, from `evaluate_parts`.
      quality: protocol of the metrics of generated images; None: there are none.
      images: images uint8 [N, H, W, C] of the split and their reconstructions, by label.
    """
    directory = run.path(DIRECTORY)
    trainings = _trainings(run)
    report = {'schema': SCHEMA, 'config': run.config.name, 'protocol': _protocol(run, quality, trainings), **parts}
    seconds = {name: training.seconds for name, training in trainings.items()}
    report |= {'seconds': seconds, 'skipped_files': len(run.skipped())}
    inputs = {name: files.digest_json(part) for name, part in parts.items()}
    output = record.open_output(directory, 'evaluate', inputs, {'config': _config_digest(run)}, replace=True)
    output.start()
    picture = plots.labeled_rows(list(images.items()), scale=plots.visible_scale(next(iter(images.values()))))
    plots.save_png(directory / 'reconstructions.png', picture)
    if panels := _curve_panels(run, report['likelihood']):
        plots.plot_panels(directory / 'curves.png', panels)
    else:
        files.remove(directory / 'curves.png')
    _write_set_pictures(run, report['sets'][run.config.sample.name])
    files.write_json(directory / 'report.json', report)
    files.write_bytes(directory / 'report.html', render_html(report, _read_pictures(directory, report)).encode())
    not_report = record.FILE, lock.FILE
    output.files = {name: v for name, v in checksums.file_entries(directory).items() if name not in not_report}
    output.finish({'sets': list(report['sets'])})
    print(f'\n{summary(report)}')
    if report['skipped_files']:
        print(f'  skipped          {report["skipped_files"]} unreadable files, listed in {run.path(SKIPPED)}')
    print(f'\nreport: {directory / "report.html"} (and report.json)', flush=True)


def _write_set_pictures(run, entry):
    directory = run.sample_set_path(DIRECTORY, 'sets')
    sources = {'samples.png': sample_store.read_set(run.sample_set_path(SAMPLES)).file(sample.PICTURE)}
    if build.has_classifier(run.config):
        rejection = record.read_done(run.sample_set_path(REJECTION), 'reject')
        sources['accepted.png'] = rejection.file(reject.PICTURE)
    for name, source in sources.items():
        files.write_bytes(directory / name, source.read_bytes())
    if entry.get('sweep'):
        plots.plot_panels(directory / 'rejection.png', _sweep_panels(entry['sweep']))
    else:
        files.remove(directory / 'rejection.png')


def _read_pictures(directory, report) -> dict[str, bytes]:
    names = ['reconstructions', 'curves']
    names += [f'sets/{name}/{picture}' for name in report['sets'] for picture in ('samples', 'accepted', 'rejection')]
    paths = {name.removeprefix('sets/'): directory / f'{name}.png' for name in names}
    return {name: path.read_bytes() for name, path in paths.items() if path.exists()}


def _sweep_panels(points: Sequence[dict[str, Any]]) -> list[Panel]:
    """Returns the plots of a rejection sweep (VQ-VAE-2 figure 7), from `generative.rejection_sweep`."""
    distance = next(name for name in _DISTANCES if name in points[0])
    x = 'inception_score' if all('inception_score' in p for p in points) else 'confidence'
    distances = {'against real images': distance, 'against reconstructions': f'{distance}_against_reconstructions'}
    curves = {label: ([p[x] for p in points], [p[key] for p in points]) for label, key in distances.items()}
    kept = f'kept {points[0]["keep_fraction"]:.0%} to {points[-1]["keep_fraction"]:.0%}'
    trade_off = {kept: ([p['recall'] for p in points], [p['precision'] for p in points])}
    images = f'n = {points[0]["count"]}'
    xlabel = {'inception_score': 'Inception Score', 'confidence': 'mean confidence of the classifier'}[x]
    return [
        Panel(f'quality, {kept}, {images}', curves, _DISTANCES[distance], xlabel=xlabel),
        Panel(f'precision and recall, {images}', trade_off, 'precision', xlabel='recall'),
    ]


def _curve_panels(run: Run, likelihood: dict) -> list[Panel]:
    """Returns the learning curves of all trainings; those of the priors with the unigram entropy of their codes."""

    def panel(section, directory, title, metric, ylabel, hlines=None, *, log_y=False):
        curves, path = {}, run.path(directory)
        try:
            lines = read_metrics(path)
        except FileNotFoundError:  # the report does without it
            lines = []
        for prefix, label in zip(('train', 'validation'), curve_labels(run.config, section), strict=True):
            points = [(line['step'], line[f'{prefix}/{metric}']) for line in lines if f'{prefix}/{metric}' in line]
            if points:
                curves[label] = tuple(zip(*points, strict=True))
        return Panel(title, curves, ylabel, hlines or {}, log_y)

    panels = [panel('vqvae', 'vqvae', 'vqvae: reconstruction', 'mse', 'MSE in [-1, 1]', log_y=True)]
    for name in reversed(run.levels):
        lines = {'unigram entropy': likelihood['levels'][name]['unigram_entropy']}
        section = f'prior.{name}'
        panels.append(
            panel(section, workdir.training_directory(section), f'{name} prior', 'nll', 'nats per code', lines)
        )
    if build.trains_classifier(run.config):
        panels.append(panel('classifier', 'classifier', 'classifier', 'nll', 'cross-entropy, nats'))
    for each in panels:
        if not each.curves:
            print(f'{each.title}: its metrics.jsonl is missing or empty, so curves.png leaves it out', flush=True)
    return [each for each in panels if each.curves]


def curve_labels(config: ConfigDict, section: str) -> tuple[str, str]:
    """Returns labels of the training and the validation curve, with everything in which the two differ.

    Args:
      config: the complete config.
      section: the section of the network, such as 'prior.top'.
    """
    fields = config[section]
    augmentation = {'vqvae': config.data, 'classifier': fields}.get(section)
    differences = {
        'last weights': fields.training.params_ema_decay,
        'dropout': fields.get('dropout') or fields.get('attention_dropout'),
        'augmented': augmentation and (augmentation.flip or augmentation.crop),
    }
    train = ', '.join(['train', *(name for name, differs in differences.items() if differs)])
    return train, 'held out, averaged weights' if differences['last weights'] else 'held out'


def _config_digest(run):
    return files.digest_json(run.config.to_dict())


def _protocol(run: Run, quality: dict | None, trainings: dict[str, Record]) -> dict:
    options, device = run.config.evaluate, jax.devices()[0]
    return {
        'split': options.split,
        'reference': options.reference or options.split,
        'counts': {split: len(run.images(split)) for split in SPLITS},
        'weights': 'averaged (training.params_ema_decay), best on the validation split',
        'mse': 'of the clipped image; mse in [-1, 1], mse_unit in [0, 1]; PSNR of the mean MSE',
        'ssim': SSIM_PROTOCOL,
        'quality': quality,
        'seed': run.config.seed,
        'changes': [f'{name}: {r.describe_changes()}' for name, r in trainings.items() if r.changes],
        'config_digest': _config_digest(run),
        'version': __version__,
        'jax': jax.__version__,
        'device': f'{jax.device_count()} x {device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores',
        'machine': platform.machine(),
        'date': datetime.date.today().isoformat(),
    }


def _trainings(run: Run) -> dict[str, Record]:
    """Returns the records of all trainings of the run, except those of sample sets."""
    trained = ['vqvae', *(workdir.training_directory(section) for section in reversed(run.prior_sections))]
    trained += ['classifier'] if build.trains_classifier(run.config) else []
    directories = {name: name for name in trained}
    if build.has_cas(run.config):
        directories[f'cas_{RECONSTRUCTIONS}'] = cas.directories(run)[RECONSTRUCTIONS]
    jobs = {workdir.training_directory(section): workdir.training_job(section) for section in run.prior_sections}
    return {name: record.read_done(run.path(path), jobs.get(path, path)) for name, path in directories.items()}
