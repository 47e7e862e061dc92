"""Writes report/: report.json, report.html, the pictures of a run and of its sample sets. On the main process only."""

import datetime
import os
import platform
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vqvae2_jax.config import build as configs
from vqvae2_jax.data.images import SPLITS
from vqvae2_jax.evaluation import report_plots
from vqvae2_jax.evaluation.report import render_html, summary
from vqvae2_jax.io import files, plots, record
from vqvae2_jax.io.logging import read_metrics
from vqvae2_jax.io.plots import Panel
from vqvae2_jax.jobs import cas, reject, sample, workdir
from vqvae2_jax.jobs.workdir import RECONSTRUCTIONS, REJECTION, SAMPLES, SKIPPED, Run
from vqvae2_jax.tasks.vqvae import SSIM
from vqvae2_jax.version import __version__

DIRECTORY = 'report'
SCHEMA = 4


def write_report(run: Run, parts: dict[str, Any], quality: dict[str, str] | None, rows: dict[str, np.ndarray]) -> None:
    """Writes all files of the report, and prints a summary.

    Args:
      run: the run.
      parts: the parts of report.json, from `evaluate_parts`.
      quality: protocol of the metrics of generated images; None: there are none.
      rows: images uint8 [N, H, W, C] of the split and their reconstructions, by label.
    """
    directory = run.path(DIRECTORY)
    report = {'schema': SCHEMA, 'config': run.config.name, 'protocol': _protocol(run, quality), **parts}
    report |= {'seconds': _seconds(run), 'skipped_files': len(run.skipped())}
    inputs = {name: files.digest_json(part) for name, part in parts.items()}
    output = record.open_output(directory, 'evaluate', inputs, {'config': _config_digest(run)}, replace=True)
    output.start()
    picture = plots.labeled_rows(list(rows.items()), scale=plots.visible_scale(next(iter(rows.values()))))
    plots.save_png(directory / 'reconstructions.png', picture)
    plots.plot_panels(directory / 'curves.png', _curve_panels(run, report['likelihood']))
    _write_set_pictures(run, report['sets'][run.config.sample.name])
    files.write_json(directory / 'report.json', report)
    files.write_bytes(directory / 'report.html', render_html(report, _read_pictures(directory, report)).encode())
    output.finish({'sets': list(report['sets'])})
    print(f'\n{summary(report)}')
    if report['skipped_files']:
        print(f'  skipped          {report["skipped_files"]} unreadable files, listed in {run.path(SKIPPED)}')
    print(f'\nreport: {directory / "report.html"} (and report.json)', flush=True)


def _write_set_pictures(run, entry):
    directory = run.set_path(DIRECTORY, 'sets')
    sources = {'samples.png': run.set_path(SAMPLES) / sample.PICTURE}
    if configs.has_classifier(run.config):
        sources['accepted.png'] = run.set_path(REJECTION) / reject.PICTURE
    for name, source in sources.items():
        files.write_bytes(directory / name, source.read_bytes())
    if entry.get('sweep'):
        plots.plot_panels(directory / 'rejection.png', report_plots.sweep_panels(entry['sweep']))
    else:
        (directory / 'rejection.png').unlink(missing_ok=True)


def _read_pictures(directory, report) -> dict[str, bytes]:
    names = ['reconstructions', 'curves']
    names += [f'sets/{name}/{picture}' for name in report['sets'] for picture in ('samples', 'accepted', 'rejection')]
    paths = {name.removeprefix('sets/'): directory / f'{name}.png' for name in names}
    return {name: path.read_bytes() for name, path in paths.items() if path.exists()}


def _curve_panels(run: Run, likelihood: dict) -> list[Panel]:
    def panel(section, directory, title, metric, ylabel, hlines=None, *, log_y=False):
        lines, labels = read_metrics(run.path(directory)), curve_labels(run.config, section)
        return report_plots.curve_panel(title, lines, metric, labels, ylabel, hlines, log_y=log_y)

    panels = [panel('vqvae', 'vqvae', 'vqvae: reconstruction', 'mse', 'MSE in [-1, 1]', log_y=True)]
    for name in reversed(run.levels):
        lines = {'unigram entropy': likelihood['levels'][name]['unigram_entropy']}
        place = f'prior.{name}', workdir.prior_directory(name), f'{name} prior'
        panels.append(panel(*place, 'nll', 'nats per code', lines))
    if configs.trains_classifier(run.config):
        panels.append(panel('classifier', 'classifier', 'classifier', 'nll', 'cross-entropy, nats'))
    return panels


def curve_labels(config: ConfigDict, section: str) -> tuple[str, str]:
    """Returns labels of the training and the validation curve of a section, such as 'prior.top'."""
    fields = config[section]
    augmented = {'vqvae': config.data, 'classifier': fields}.get(section)
    return report_plots.curve_labels(
        averaged=bool(fields.training.params_ema_decay),
        dropout=bool(fields.get('dropout') or fields.get('attention_dropout')),
        augmented=bool(augmented and (augmented.flip or augmented.crop)),
    )


def _config_digest(run):
    return files.digest_json(run.config.to_dict())


def _protocol(run: Run, quality: dict | None) -> dict:
    options, device = run.config.evaluate, jax.devices()[0]
    return {
        'split': options.split,
        'reference': options.reference or options.split,
        'counts': {split: len(run.images(split)) for split in SPLITS},
        'weights': 'averaged (training.params_ema_decay), best on the validation split',
        'mse': 'of the clipped image; mse in [-1, 1], mse_unit in [0, 1]; PSNR of the mean MSE',
        'ssim': SSIM,
        'quality': quality,
        'seed': run.config.seed,
        'config_digest': _config_digest(run),
        'version': __version__,
        'jax': jax.__version__,
        'device': f'{jax.device_count()} x {device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores',
        'machine': platform.machine(),
        'date': datetime.date.today().isoformat(),
    }


def _seconds(run: Run) -> dict[str, float]:
    directories = {'vqvae': 'vqvae', **{f'prior_{n}': workdir.prior_directory(n) for n in reversed(run.levels)}}
    if configs.trains_classifier(run.config):
        directories['classifier'] = 'classifier'
    if configs.has_cas(run.config):
        directories[f'cas_{RECONSTRUCTIONS}'] = f'{cas.DIRECTORY}/{RECONSTRUCTIONS}'
    return {name: record.read(run.path(directory)).seconds for name, directory in directories.items()}
