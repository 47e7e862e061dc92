"""The report for people: one HTML page, and a summary for the terminal. Both are made from report.json's content."""

from collections.abc import Mapping, Sequence
from typing import Any

from vqvae2_jax.evaluation import html
from vqvae2_jax.io.logging import format_duration

_MANY_CLASSES = 20  # no table of single classes from here on
_LABELS = {  # of metrics, in the order of the page
    'fid': 'FID',
    'frechet_distance': 'Fréchet distance',
    'kid': 'KID',
    'kernel_distance': 'kernel distance',
    'inception_score': 'Inception Score',
    'precision': 'precision',
    'recall': 'recall',
}
_SAMPLING = ('temperature', 'top_k', 'top_p', 'guidance')


def render_html(report: dict[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Returns the page of a report.

    Args:
      report: the content of report.json.
      pictures: PNG files by name: 'reconstructions', 'curves', and of each sample set '<set>/samples',
        '<set>/accepted', '<set>/rejection'. Missing ones are left out.
    """
    parts = [
        html.heading('Reconstruction'),
        *_reconstruction(report['reconstruction'], report['originals']),
        html.image(pictures.get('reconstructions'), 'Images of the split, and their reconstructions from each level'),
        html.heading('Likelihood'),
        *_likelihood(report['likelihood']),
        html.heading('Samples'),
        *_overview(report),
    ]
    for name, entry in report['sets'].items():
        parts += [html.heading(f'Sample set {name}', 3), *_sample_set(name, entry, report, pictures)]
    if 'cas' in report:
        parts += [html.heading('Classification Accuracy Score'), *_cas(report)]
    seconds = [(name, format_duration(value)) for name, value in all_seconds(report).items()]
    parts += [
        html.heading('Training'),
        html.image(pictures.get('curves'), 'Learning curves', plot=True),
        html.table(('job', 'time'), seconds),
        html.heading('Protocol'),
        html.table(('', ''), [(name, _plain(value)) for name, value in report['protocol'].items()]),
    ]
    return html.page(f'{report["config"]}: report', parts)


def render_comparison(report: dict[str, Any]) -> str:
    """Returns the page of a comparison of two sets of images, from the content of its report.json."""
    protocol = report['protocol']
    parts = [html.table(('', ''), list(report['quality'].items())), html.heading('Protocol')]
    parts.append(html.table(('', ''), [(name, _plain(value)) for name, value in protocol.items()]))
    return html.page(f'{protocol["generated"]["images"]} against {protocol["real"]["images"]}', parts)


def summary(report: dict[str, Any]) -> str:
    """Returns the main numbers of a report as text."""
    reconstruction, split = report['reconstruction'], report['protocol']['split']
    ssim = f', SSIM {reconstruction["ssim"]:.3f}' if 'ssim' in reconstruction else ''
    lines = [
        f'{report["config"]}: {report["protocol"]["counts"][split]} {split} images',
        f'  reconstruction   PSNR {reconstruction["psnr"]:.2f} dB{ssim}, '
        f'{reconstruction["compression_ratio"]:.1f}x smaller',
    ]
    for name, level in reversed(reconstruction['levels'].items()):
        likelihood = report['likelihood']['levels'][name]
        lines.append(
            f'  {name:<16} codebook usage {level["codebook_usage"]:.0%}, perplexity {level["perplexity"]:.1f}; '
            f'prior {likelihood["nll"]:.3f} nats per code (unigram entropy {likelihood["unigram_entropy"]:.3f}, '
            f'under per-position unigrams {likelihood["positional_cross_entropy"]:.3f})'
        )
    if 'quality' in reconstruction:
        lines.append(f'  reconstructions  {_quality_line(reconstruction["quality"])}')
    if 'classifier' in report:
        lines.append(f'  classifier       {report["classifier"]["accuracy_on_real_images"]:.1%} on real images')
    for name, entry in report['sets'].items():
        lines += _set_lines(name, entry)
    if 'cas' in report:
        rows = ', '.join(f'{name} {row["top1"]:.1%}' for name, row in _cas_rows(report).items())
        lines.append(f'  CAS              {rows} (accuracy on real images of a classifier trained on each source)')
    lines += [f'  changed          {change}' for change in report['protocol']['changes']]
    seconds = all_seconds(report)
    times = ', '.join(f'{name} {format_duration(value)}' for name, value in seconds.items())
    lines.append(f'  time             {times}; total {format_duration(sum(seconds.values()))}')
    return '\n'.join(lines)


def all_seconds(report: dict[str, Any]) -> dict[str, float]:
    """Returns the time of every job, those of the sample sets as '<job> <set>'."""
    of_sets = {
        f'{job} {name}': value for name, entry in report['sets'].items() for job, value in entry['seconds'].items()
    }
    return report['seconds'] | of_sets


def _set_lines(name, entry):
    lines = [f'  set {name}: {entry["count"]} samples{_stale(entry)}']
    if 'quality' in entry:
        lines.append(f'    quality        {_quality_line(entry["quality"])}')
    if 'class_accuracy' in entry:
        lines.append(
            f'    class accuracy {entry["class_accuracy"]:.1%}, after rejection '
            f'{entry["class_accuracy_after_rejection"]:.1%} ({_accepted(entry)})'
        )
    return lines


def _stale(entry):
    return f' (stale: changed since it was evaluated: {", ".join(entry["stale"])})' if entry['stale'] else ''


def _quality_line(quality):
    return ', '.join(f'{label} {_number(quality[k])}' for k, label in _LABELS.items() if k in quality) or _note(quality)


def _plain(value):
    return '; '.join(f'{k}: {v}' for k, v in value.items()) if isinstance(value, dict) else str(value)


def _number(value):
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def _note(quality):
    return f'No comparison: {quality["missing"]}.' if 'missing' in quality else quality.get('warning', '')


def _reconstruction(report, originals) -> list[str]:
    levels = list(report['levels'].items())  # finest first
    rows = [('original images', originals)] if 'missing' not in originals.get('quality', {'missing': ''}) else []
    rows += [(f'{name} only', level['without_finer_levels']) for name, level in reversed(levels[1:])]
    rows += [('all levels', report), ('all levels, training images', report['train'])]
    shown = [key for key in _LABELS if key in report.get('quality', {})]
    header = ('', 'PSNR, dB', 'MSE in [-1, 1]', 'MSE in [0, 1]', 'SSIM', *(_LABELS[key] for key in shown))
    cells = [
        (
            name,
            f'{errors["psnr"]:.2f}' if 'psnr' in errors else '',
            *(_number(errors.get(key, '')) for key in ('mse', 'mse_unit', 'ssim')),
            *(_number(errors.get('quality', {}).get(key, '')) for key in shown),
        )
        for name, errors in rows
    ]
    codes = [
        (name, 'x'.join(map(str, level['codes'])), f'{level["codebook_usage"]:.0%}', f'{level["perplexity"]:.1f}')
        for name, level in reversed(levels)
    ]
    return [
        html.table(header, cells),
        html.note(_note(report.get('quality', {}))),
        html.table(('level', 'codes', 'codebook usage', 'perplexity'), codes),
        html.note(f'{report["bits_per_image"]:.0f} bits per image, {report["compression_ratio"]:.1f} times smaller'),
    ]


def _likelihood(report) -> list[str]:
    unigrams = ('unigram entropy', 'cross-entropy under per-position unigrams')
    header = ('prior', 'nats per code', 'on training images', *unigrams, 'parameters')
    keys = ('nll', 'nll_train', 'unigram_entropy', 'positional_cross_entropy')
    rows = [
        (name, *(f'{level[key]:.3f}' for key in keys), f'{level["parameters"]:,}')
        for name, level in reversed(report['levels'].items())
    ]
    bits = f'{report["bits_per_image"]:.0f} bits per image, {report["bits_per_subpixel"]:.4f} bits per subpixel'
    return [html.table(header, rows), html.note(bits)]


def _overview(report) -> list[str]:
    # one row per sample set
    sets = report['sets']
    shown = [key for key in _LABELS if any(key in entry.get('quality', {}) for entry in sets.values())]
    columns = {'set': lambda name, e: name, 'samples': lambda name, e: e['count']}
    columns |= {f: lambda name, e, f=f: _per_level(e[f]) for f in _SAMPLING}
    columns |= {_LABELS[k]: lambda name, e, k=k: _number(e.get('quality', {}).get(k, '')) for k in shown}
    if any('class_accuracy' in entry for entry in sets.values()):
        columns['class accuracy'] = lambda name, e: _percent(e.get('class_accuracy'))
        columns['after rejection'] = lambda name, e: _percent(e.get('class_accuracy_after_rejection'))
    if any('cas' in entry for entry in sets.values()):
        columns['CAS top-1'] = lambda name, e: _percent(e.get('cas', {}).get('top1'))
    if any(entry['stale'] for entry in sets.values()):
        columns['state'] = lambda name, e: 'stale' if e['stale'] else ''
    return [html.table(tuple(columns), [[cell(n, e) for cell in columns.values()] for n, e in sets.items()])]


def _per_level(values):
    return ', '.join(f'{level} {value:g}' for level, value in reversed(values.items()))


def _percent(value):
    return '' if value is None else f'{value:.1%}'


def _sample_set(name, entry, report, pictures) -> list[str]:
    parts = []
    if entry['stale']:
        parts.append(
            html.note(
                f'Stale: {", ".join(entry["stale"])} changed since this set was evaluated. Make it again with '
                f'--config.sample.name={name}.',
                'stale',
            )
        )
    if 'quality' in entry:
        quality = entry['quality']
        compared = {'real images': quality, 'reconstructions': entry['quality_against_reconstructions']}
        shown = [key for key in _LABELS if key in quality]
        rows = [(against, *(_number(metrics.get(k, '')) for k in shown)) for against, metrics in compared.items()]
        parts.append(html.table(('samples against', *(_LABELS[k] for k in shown)), rows))
        parts.append(html.note(_note(quality)))
    caption = f'{entry["count"]} samples, unfiltered; one class per row, if each class has ten'
    parts.append(html.image(pictures.get(f'{name}/samples'), caption))
    if 'class_accuracy' not in entry:
        return parts
    rows = [
        ('real images', _percent(report['classifier']['accuracy_on_real_images'])),
        ('samples', _percent(entry['class_accuracy'])),
        (
            f'the {entry["accepted"]} accepted: {_accepted(entry)}',
            _percent(entry['class_accuracy_after_rejection']),
        ),
    ]
    parts += [html.table(('', 'class accuracy by the classifier'), rows), html.note(entry['note'])]
    parts.append(html.image(pictures.get(f'{name}/accepted'), 'After rejection, best first'))
    if entry.get('sweep'):
        caption = 'Rejection: quality against diversity'
        parts += [html.image(pictures.get(f'{name}/rejection'), caption, plot=True), _sweep_table(entry['sweep'])]
    return [*parts, html.note(entry.get('sweep_note', ''))]


def _sweep_table(points: Sequence[dict]) -> str:
    labels = {'kept_count': 'samples kept', 'count': 'n', 'confidence': 'confidence'} | _LABELS
    keys = [key for key in labels if all(key in p for p in points)]
    rows = [(f'{p["keep_fraction"]:.0%}', *(_number(p[key]) for key in keys)) for p in points]
    return html.table(('fraction kept', *(labels[key] for key in keys)), rows)


def _accepted(entry):
    threshold = f', with a score of at least {entry["threshold"]:g}' if entry['threshold'] else ''
    return f'the best {entry["keep_fraction"]:.0%} of each class{threshold}'


def _cas_rows(report):
    return report['cas'] | {f'samples {n}': e['cas'] for n, e in report['sets'].items() if 'cas' in e}


def _cas(report) -> list[str]:
    rows = _cas_rows(report)
    keys = [k for k in ('top1', 'top5', 'top1_reconstructed', 'top5_reconstructed') if k in report['cas']['real']]
    cells = [(name, row['count'], *(f'{row[key]:.1%}' for key in keys)) for name, row in rows.items()]
    note = (
        'Top-1 and top-5 accuracy on real held-out images, and on their reconstructions, of classifiers trained on '
        'each source.'
    )
    parts = [html.note(note), html.table(('trained on', 'images', *(k.replace('_', ', ') for k in keys)), cells)]
    classes = report['cas']['real']['by_class']
    if len(classes) <= _MANY_CLASSES:
        each = [(name, *(_percent(row['by_class'].get(name)) for row in rows.values())) for name in classes]
        parts.append(html.table(('top-1 of each class', *rows), each))
    return parts
