"""The report for people: pictures, plots, one HTML page with all of them, and the summary on the terminal."""

import contextlib

from vqvae2_jax.config import build as configs
from vqvae2_jax.data.loader import eval_batches
from vqvae2_jax.evaluation import html
from vqvae2_jax.io import files, plots
from vqvae2_jax.io.logging import format_duration, read_metrics
from vqvae2_jax.jobs import reject, sample, workdir
from vqvae2_jax.jobs.workdir import Run

_COLUMNS = 10
_MANY_CLASSES = 20  # are not shown one by one
_LABELS = {  # of numbers that the page shows, in this order
    'fid': 'FID',
    'frechet_distance': 'Fréchet distance',
    'kid': 'KID',
    'kernel_distance': 'kernel distance',
    'inception_score': 'Inception Score',
    'precision': 'precision',
    'recall': 'recall',
}


def draw(run: Run, directory, found: dict, reconstruct) -> None:
    """Writes the pictures and plots of a report; `reconstruct`: measure.Seen's."""
    _picture_of_levels(run, found['protocol']['split'], directory, reconstruct)
    drawn = {'samples.png': run.path(sample.DIRECTORY, 'samples.png')}
    if configs.has_classifier(run.config):
        drawn['accepted.png'] = run.path(reject.DIRECTORY, 'accepted.png')
    for name, source in drawn.items():
        files.write_bytes(directory / name, source.read_bytes())
    _curves(run, directory, found['likelihood'])
    if found['samples'].get('sweep'):
        _sweep(directory, found['samples']['sweep'])


def _picture_of_levels(run: Run, split: str, directory, reconstruct) -> None:
    with contextlib.closing(eval_batches(run.images(split), batch_size=_COLUMNS, **run.reading())) as batches:
        rows = reconstruct(next(batches)['image'])
    picture = plots.labeled_rows(list(rows.items()), scale=plots.visible_scale(next(iter(rows.values()))))
    plots.save_png(directory / 'reconstructions.png', picture)


def _curves(run: Run, directory, likelihood: dict) -> None:
    panels = [_panel(run, 'vqvae', 'vqvae', 'vqvae: reconstruction', 'mse', 'MSE in [-1, 1]', log_y=True)]
    for name in reversed(run.levels):
        place = f'prior.{name}', workdir.prior_directory(name), f'{name} prior'
        lines = {'unigram entropy': likelihood['levels'][name]['unigram_entropy']}
        panels.append(_panel(run, *place, 'nll', 'nats per code', lines))
    if configs.trains_classifier(run.config):
        panels.append(_panel(run, 'classifier', 'classifier', 'classifier', 'nll', 'cross-entropy, nats'))
    plots.plot_panels(directory / 'curves.png', panels)


def _panel(run, section, stage_directory, title, metric, ylabel, hlines=None, log_y=False) -> plots.Panel:
    lines = read_metrics(run.path(stage_directory))
    curves = {}
    for prefix, label in zip(('train', 'validation'), curve_labels(run.config, section), strict=True):
        points = [(line['step'], line[f'{prefix}/{metric}']) for line in lines if f'{prefix}/{metric}' in line]
        if points:
            curves[label] = tuple(zip(*points, strict=True))
    return plots.Panel(title, curves, ylabel, hlines or {}, log_y)


def curve_labels(config, section: str) -> tuple[str, str]:
    """Labels of the training and the held-out curve of a stage, with everything in which the two differ."""
    fields, train, held_out = config[section], [], []
    if configs.training(config, section).params_ema_decay:
        train.append('last weights')
        held_out.append('averaged weights')
    if fields.get('dropout') or fields.get('attention_dropout'):
        train.append('dropout')
    augmented = {'vqvae': config.data, 'classifier': fields}.get(section, {})
    if augmented.get('flip') or augmented.get('crop'):
        train.append('augmented')
    return tuple(', '.join([name, *notes]) for name, notes in (('train', train), ('held out', held_out)))


def _sweep(directory, points: list[dict]) -> None:
    distance = next(name for name in ('fid', 'frechet_distance') if name in points[0])
    x = 'inception_score' if all('inception_score' in p for p in points) else 'confidence'
    distances = {'against real images': distance, 'against reconstructions': f'{distance}_against_reconstructions'}
    curves = {label: [[p[x] for p in points], [p[key] for p in points]] for label, key in distances.items()}
    kept = f'kept {points[0]["kept"]:.0%} to {points[-1]["kept"]:.0%}'
    trade_off = {kept: [[p['recall'] for p in points], [p['precision'] for p in points]]}
    images = f'n = {points[0]["count"]}'
    label = {'inception_score': 'Inception Score', 'confidence': "classifier's confidence"}[x]
    plots.plot_panels(
        directory / 'rejection.png',
        [
            plots.Panel(f'quality, {kept}, {images}', curves, _LABELS[distance], xlabel=label),
            plots.Panel(f'precision and recall, {images}', trade_off, 'precision', xlabel='recall'),
        ],
    )


def write_page(run: Run, directory, found: dict) -> None:
    """report.html, with everything in it."""
    parts = [
        html.heading('Reconstruction'),
        _reconstruction_table(run, found['reconstruction'], found['originals']),
        html.picture(directory / 'reconstructions.png', 'Images of the split, and what each level makes of them'),
        html.heading('Likelihood'),
        _likelihood_table(found['likelihood']),
        html.heading('Samples'),
        *_samples(directory, found['samples']),
    ]
    if 'cas' in found:
        parts += [html.heading('Classification Accuracy Score'), *_cas(found['cas'])]
    parts += [
        html.heading('Training'),
        html.picture(directory / 'curves.png', 'Learning curves', plot=True),
        html.table(('stage', 'time'), [(k, format_duration(v)) for k, v in found['seconds'].items()]),
        html.heading('Protocol'),
        html.table(('', ''), [(k, _plain(v)) for k, v in found['protocol'].items()]),
    ]
    files.write_bytes(directory / 'report.html', html.page(f'{run.config.name}: report', parts).encode())


def _plain(value) -> str:
    return '; '.join(f'{k}: {v}' for k, v in value.items()) if isinstance(value, dict) else str(value)


def _number(value) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def _caution(quality: dict) -> str:
    missing = f'No comparison: {quality["missing"]}.' if 'missing' in quality else ''
    return missing or quality.get('warning', '')


def _reconstruction_table(run: Run, found: dict, originals: dict) -> str:
    rows = [('original images', originals)] if 'missing' not in originals.get('quality', {'missing': ''}) else []
    rows += [(f'{name} only', found['levels'][name]['without_finer_levels']) for name in reversed(run.levels[1:])]
    rows += [('all levels', found), ('all levels, training images', found['train'])]
    shown = [key for key in _LABELS if key in found.get('quality', {})]
    header = ('', 'PSNR, dB', 'MSE in [-1, 1]', 'MSE in [0, 1]', 'SSIM', *(_LABELS[key] for key in shown))
    cells = [
        (
            name,
            f'{e["psnr"]:.2f}' if 'psnr' in e else '',
            *(_number(e.get(k, '')) for k in ('mse_11', 'mse_01', 'ssim')),
        )
        + tuple(_number(e.get('quality', {}).get(key, '')) for key in shown)
        for name, e in rows
    ]
    codes = [
        (name, 'x'.join(map(str, level['codes'])), f'{level["used"]:.0%}', f'{level["perplexity"]:.1f}')
        for name, level in reversed(found['levels'].items())
    ]
    smaller = f'{found["bits_per_image"]:.0f} bits an image, {found["compression_ratio"]:.1f} times smaller'
    parts = [
        html.table(header, cells),
        html.note(_caution(found.get('quality', {}))),
        html.table(('level', 'codes', 'used', 'perplexity'), codes),
        html.note(smaller),
    ]
    return ''.join(parts)


def _likelihood_table(found: dict) -> str:
    unigrams = ('unigram entropy', 'cross-entropy under per-position unigrams')
    header = ('prior', 'nats per code', 'on training images', *unigrams, 'parameters')
    keys = ('nll', 'nll_train', 'unigram_entropy', 'positional_cross_entropy')
    rows = [
        (name, *(f'{level[key]:.3f}' for key in keys), f'{level["parameters"]:,}')
        for name, level in reversed(found['levels'].items())
    ]
    bits = f'{found["bits_per_image"]:.0f} bits an image, {found["bits_per_subpixel"]:.4f} bits a subpixel'
    return html.table(header, rows) + html.note(bits)


def _samples(directory, found: dict) -> list[str]:
    parts = []
    if 'quality' in found:
        quality = found['quality']
        shown = [key for key in _LABELS if key in quality]
        compared = {'real images': quality, 'reconstructions': found['quality_against_reconstructions']}
        rows = [(name, *(_number(numbers.get(k, '')) for k in shown)) for name, numbers in compared.items()]
        parts.append(html.table(('samples against', *(_LABELS[k] for k in shown)), rows))
        parts.append(html.note(_caution(quality)))
    parts.append(
        html.picture(directory / 'samples.png', f'{found["count"]} samples, nothing filtered: one class a row')
    )
    if 'intended_class' not in found:
        return parts
    rows = [
        ('real images', f'{found["classifier_accuracy_on_real_images"]:.1%}'),
        ('samples', f'{found["intended_class"]:.1%}'),
        (f'the {found["accepted"]} accepted: {_accepted(found)}', f'{found["intended_class_after_rejection"]:.1%}'),
    ]
    parts += [html.table(('', 'the classifier sees the class'), rows), html.note(found['note'])]
    parts.append(html.picture(directory / 'accepted.png', 'After rejection, the best first'))
    if found['sweep']:
        parts.append(html.picture(directory / 'rejection.png', 'Acceptance rate: quality against diversity', plot=True))
        points = found['sweep']
        labels = {'kept_count': 'samples kept', 'count': 'n', 'confidence': 'confidence'} | _LABELS
        keys = [key for key in labels if all(key in p for p in points)]
        rows = [(f'{p["kept"]:.0%}', *(_number(p[key]) for key in keys)) for p in points]
        parts.append(html.table(('share kept', *(labels[key] for key in keys)), rows))
    parts.append(html.note(found['sweep_note']))
    return parts


def _accepted(found: dict) -> str:
    above = f', from {found["threshold"]:g} on' if found['threshold'] else ''
    return f'the best {found["kept"]:.0%} of each class{above}'


def _cas(found: dict) -> list[str]:
    keys = [k for k in ('top1', 'top5', 'top1_reconstructed', 'top5_reconstructed') if k in found['real']]
    rows = [(name, row['count'], *(f'{row[key]:.1%}' for key in keys)) for name, row in found.items()]
    note = (
        'Top-1 and top-5 on real held-out images, and on their reconstructions, of classifiers trained on each source.'
    )
    parts = [html.note(note), html.table(('trained on', 'images', *(k.replace('_', ', ') for k in keys)), rows)]
    classes = found['real']['by_class']
    if len(classes) <= _MANY_CLASSES:
        shares = [[row['by_class'][name] for row in found.values()] for name in classes]
        each = [
            (name, *('' if share is None else f'{share:.1%}' for share in row))
            for name, row in zip(classes, shares, strict=True)
        ]
        parts.append(html.table(('top-1 of each class', *found), each))
    return parts


def summarize(run: Run, directory, found: dict) -> None:
    """Prints the report's main numbers."""
    reconstruction, drawn, split = found['reconstruction'], found['samples'], found['protocol']['split']
    print(f'\n{run.config.name}: {found["protocol"]["counts"][split]} {split} images')
    ssim = f', SSIM {reconstruction["ssim"]:.3f}' if 'ssim' in reconstruction else ''
    print(
        f'  reconstruction   PSNR {reconstruction["psnr"]:.2f} dB{ssim}, '
        f'{reconstruction["compression_ratio"]:.1f}x smaller'
    )
    for name, level in reversed(reconstruction['levels'].items()):
        likelihood = found['likelihood']['levels'][name]
        print(
            f'  {name:<16} {level["used"]:.0%} of the codebook used, perplexity {level["perplexity"]:.1f}; '
            f'prior {likelihood["nll"]:.3f} nats per code (unigram entropy {likelihood["unigram_entropy"]:.3f}, '
            f'under per-position unigrams {likelihood["positional_cross_entropy"]:.3f})'
        )
    if 'quality' in drawn:
        for name, quality in (
            ('reconstructions', reconstruction['quality']),
            ('samples', drawn['quality']),
        ):
            numbers = ', '.join(f'{label} {_number(quality[k])}' for k, label in _LABELS.items() if k in quality)
            print(f'  {name:<16} {numbers or _caution(quality)}')
    if 'intended_class' in drawn:
        print(
            f'  classifier       {drawn["classifier_accuracy_on_real_images"]:.1%} right on real images; '
            f'{drawn["count"]} samples show their class {drawn["intended_class"]:.1%} of the time, '
            f'{drawn["intended_class_after_rejection"]:.1%} after rejection ({_accepted(drawn)})'
        )
    if 'cas' in found:
        rows = ', '.join(f'{name} {row["top1"]:.1%}' for name, row in found['cas'].items())
        print(f'  trained on       {rows} (accuracy on real images)')
    times = ', '.join(f'{name} {format_duration(seconds)}' for name, seconds in found['seconds'].items())
    print(f'  time             {times}; {format_duration(sum(found["seconds"].values()))} in all')
    if found['skipped_files']:
        print(f'  skipped          {found["skipped_files"]} unreadable files, listed in {run.path(workdir.SKIPPED)}')
    print(f'\nreport: {directory / "report.html"} (and report.json)', flush=True)
