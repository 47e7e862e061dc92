"""Writes report/: report.json, report.html, the pictures of a run and of its sample sets. On the main process only."""

import datetime
import os
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vqvae2_jax.config import build
from vqvae2_jax.evaluation import report_pictures
from vqvae2_jax.evaluation.report import render_html
from vqvae2_jax.evaluation.report_pictures import Pictures, SetPictures
from vqvae2_jax.evaluation.report_text import summary
from vqvae2_jax.io import checksums, files, lock, plots, record
from vqvae2_jax.io.logging import read_metrics
from vqvae2_jax.io.plots import Panel
from vqvae2_jax.io.record import Record
from vqvae2_jax.jobs import cas, code_inputs, evaluate_samples, reference_sets, workdir
from vqvae2_jax.jobs.workdir import RECONSTRUCTIONS, SKIPPED, Run
from vqvae2_jax.tasks.vqvae import SSIM_PROTOCOL
from vqvae2_jax.version import __version__

DIRECTORY = 'report'
SCHEMA = 7


class Examples(NamedTuple):
    """Some images of the split that is evaluated.

    Attributes:
      images: the images and their reconstructions, uint8 [N, H, W, C], by label.
      class_names: the class of each image; () without classes.
      codes: int [N, h, w] of each level, finest first.
      codebooks: float [K, D] of each level, finest first.
    """

    images: dict[str, np.ndarray]
    class_names: Sequence[str]
    codes: Sequence[np.ndarray]
    codebooks: Sequence[np.ndarray]


def write_report(
    run: Run,
    parts: dict[str, Any],
    missing: dict[str, str],
    quality: dict[str, str] | None,
    examples: Examples | None,
) -> None:
    """Writes all files of the report, and prints a summary.

    Args:
      run: the run.
      parts: the parts of report.json, from `evaluate_parts`.
      missing: parts that are left out, with the reason of each.
      quality: protocol of the metrics of generated images; None: there are none.
      examples: images of the split that the report shows; None without stage 1.
    """
    directory = run.path(DIRECTORY)
    trainings = _trainings(run)
    report = {'schema': SCHEMA, 'config': run.config.name, 'protocol': _protocol(run, quality, trainings), **parts}
    report['missing'] = missing
    seconds = {name: training.seconds for name, training in trainings.items()}
    report |= {'seconds': seconds, 'skipped_files': len(run.skipped())}
    inputs = {name: files.digest_json(part) for name, part in parts.items()}
    output = record.open_output(directory, 'evaluate', inputs, {'config': _config_digest(run)}, replace=True)
    output.start()
    pictures = _write_pictures(run, report, examples)
    files.write_json(directory / 'report.json', report)
    files.write_bytes(directory / 'report.html', render_html(report, pictures).encode())
    not_report = record.FILE, lock.FILE
    output.files = {name: v for name, v in checksums.file_entries(directory).items() if name not in not_report}
    output.finish({'sets': list(report['sets'])})
    print(f'\n{summary(report)}')
    if report['skipped_files']:
        print(f'  skipped          {report["skipped_files"]} unreadable files, listed in {run.path(SKIPPED)}')
    print(f'\nreport: {directory / "report.html"} (and report.json)', flush=True)


def _write_pictures(run: Run, report: dict[str, Any], examples: Examples | None) -> Pictures:
    """Writes the PNG files of the report; returns the pictures of its page."""
    curves = _curve_panels(run, report.get('likelihood'))
    _write_panels(run.path(DIRECTORY, 'curves.png'), curves)
    return Pictures(
        curves=[plots.draw_panels([panel]) for panel in curves],
        sets={name: _write_set_pictures(run, name, entry) for name, entry in report['sets'].items()},
        **(_write_examples(run, report, examples) if examples else {}),
    )


def _write_examples(run: Run, report: dict[str, Any], examples: Examples) -> dict[str, Any]:
    """Writes the PNG files of stage 1; returns the fields of `Pictures`."""
    directory, images = run.path(DIRECTORY), list(examples.images.items())
    code_maps = [
        (f'{name} codes', report_pictures.code_colors(codebook)[codes])
        for name, codes, codebook in zip(run.levels, examples.codes, examples.codebooks, strict=True)
    ][::-1]
    levels, likelihood = report['reconstruction']['levels'], report.get('likelihood', {}).get('levels', {})
    usage = [
        report_pictures.usage_panel(name, likelihood[name]['code_counts'], levels[name]['perplexity'])
        for name in reversed(run.levels)
        if name in likelihood
    ]
    plots.save_png(directory / 'reconstructions.png', report_pictures.draw_rows(images))
    plots.save_png(directory / 'code_maps.png', report_pictures.draw_rows(code_maps))
    _write_panels(directory / 'code_usage.png', usage)
    return {
        'reconstructions': report_pictures.encode_rows(images),
        'class_names': examples.class_names,
        'code_maps': report_pictures.encode_rows(code_maps),
        'code_usage': [plots.draw_panels([panel]) for panel in usage],
        'sharp': report_pictures.is_small(images[0][1]),
    }


def _write_set_pictures(run: Run, name: str, entry: dict[str, Any]) -> SetPictures:
    directory, arrays = run.path(DIRECTORY, 'sets', name), evaluate_samples.read_pictures(run, name)
    images = run.images(run.config.evaluate.split) if run.has_stage_1 else run.code_spec
    class_names, rows = images.class_names, {}
    for kind in ('samples', 'accepted'):
        if kind in arrays:
            rows[kind] = report_pictures.class_rows(arrays[kind], arrays[f'{kind}_label'], class_names)
            plots.save_png(directory / f'{kind}.png', report_pictures.draw_rows(rows[kind]))
        else:
            files.remove(directory / f'{kind}.png')
    if 'nearest_samples' in arrays:
        rows['nearest'] = report_pictures.nearest_rows(arrays['nearest_samples'], arrays['nearest_train'])
        plots.save_png(directory / 'nearest.png', report_pictures.draw_rows(rows['nearest']))
    else:
        files.remove(directory / 'nearest.png')
    panels = report_pictures.sweep_panels(entry['sweep']) if entry.get('sweep') else []
    _write_panels(directory / 'rejection.png', panels)
    encoded = {kind: report_pictures.encode_rows(images) for kind, images in rows.items()}
    return SetPictures(**encoded, rejection=[plots.draw_panels([panel]) for panel in panels])


def _write_panels(path, panels):
    if panels:
        plots.plot_panels(path, panels)
    else:
        files.remove(path)


def _curve_panels(run: Run, likelihood: dict | None) -> list[Panel]:
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

    panels = []
    if run.has_stage_1:
        panels.append(panel('vqvae', 'vqvae', 'vqvae: reconstruction', 'mse', 'MSE in [-1, 1]', log_y=True))
    for name in reversed(run.levels):
        lines = {'unigram entropy': likelihood['levels'][name]['unigram_entropy']} if likelihood else {}
        section = f'prior.{name}'
        panels.append(
            panel(section, workdir.training_directory(section), f'{name} prior', 'nll', 'nats per code', lines)
        )
    if build.trains_classifier(run.config):
        panels.append(panel('classifier', 'classifier', 'classifier', 'nll', 'cross-entropy, nats'))
    for each in panels if likelihood else ():
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
    augmentation = config.data if section == 'vqvae' else fields if section == 'classifier' else None
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
    changes = [f'{name}: {r.describe_changes()}' for name, r in trainings.items() if r.changes]
    for name, training in trainings.items():
        if training.job == workdir.IMPORT:
            changes.append(f'{name}: trained elsewhere, imported from {training.results["source"]}')
        elif workdir.FROM in training.inputs:
            changes.append(f'{name}: started from other weights, {training.inputs[workdir.FROM]}')
    of_images = {
        'mse': 'of the clipped image; mse in [-1, 1], mse_unit in [0, 1]; PSNR of the mean MSE',
        'ssim': SSIM_PROTOCOL,
        'quality': quality,
    }
    return {
        'split': options.split,
        'reference': reference_sets.first_split(run),
        'counts': code_inputs.data_counts(run),
        'weights': 'averaged (training.params_ema_decay), best on the validation split',
        **(of_images if run.has_stage_1 else {}),
        'seed': run.config.seed,
        'changes': changes,
        'config_digest': _config_digest(run),
        'version': __version__,
        'jax': jax.__version__,
        'device': f'{jax.device_count()} x {device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores',
        'machine': platform.machine(),
        'date': datetime.date.today().isoformat(),
    }


def _trainings(run: Run) -> dict[str, Record]:
    """Returns the records of all finished trainings of the run, except those of sample sets."""
    trained = ['vqvae'] if run.has_stage_1 else []
    trained += [workdir.training_directory(section) for section in reversed(run.prior_sections)]
    trained += ['classifier'] if build.trains_classifier(run.config) else []
    directories = {name: name for name in trained}
    if build.has_cas(run.config):
        directories[f'cas_{RECONSTRUCTIONS}'] = cas.directories(run)[RECONSTRUCTIONS]
    records = {name: record.read_if_done(run.path(path)) for name, path in directories.items()}
    return {name: output for name, output in records.items() if output}
