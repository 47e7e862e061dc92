"""The report for people: one HTML page, made from the content of report.json."""

from collections.abc import Sequence
from typing import Any

from vqvae2_jax.evaluation import html, report_text
from vqvae2_jax.evaluation.report_pictures import Pictures, SetPictures
from vqvae2_jax.io.logging import format_duration

_MANY_CLASSES = 20  # a longer table of classes is hidden until a click
_SAMPLING = ('temperature', 'top_k', 'top_p', 'guidance')


def render_html(report: dict[str, Any], pictures: Pictures) -> str:
    """Returns the page of a report.

    Args:
      report: the content of report.json.
      pictures: its pictures; missing ones are left out.
    """
    sections = {}
    if 'reconstruction' in report:
        sections['Reconstruction'] = _reconstruction(report['reconstruction'], report['originals'], pictures)
        sections['Codes'] = _codes(report, pictures)
    sections |= {
        'Likelihood': _likelihood(report['likelihood']) if 'likelihood' in report else [],
        'Samples': _samples(report, pictures),
        'Classes': _classes(report),
        'Classification Accuracy Score': _cas(report) if 'cas' in report else [],
        'Training': _training(report, pictures),
        'Protocol': [html.table(('', ''), [(name, _plain(value)) for name, value in report['protocol'].items()])],
    }
    sections = {title: parts for title, parts in sections.items() if parts}
    names = [(title.lower().replace(' ', '-'), title) for title in sections]
    parts = [_headline(report)]
    parts += [html.note(f'Without {part}: {reason}') for part, reason in report['missing'].items()]
    for name, title in names:
        parts += [html.heading(title, name=name), *sections[title]]
    return html.page(f'{report["config"]}: report', parts, names)


def render_comparison(report: dict[str, Any]) -> str:
    """Returns the page of a comparison of two sets of images, from the content of its report.json."""
    protocol = report['protocol']
    parts = [html.table(('', ''), list(report['quality'].items())), html.heading('Protocol')]
    parts.append(html.table(('', ''), [(name, _plain(value)) for name, value in protocol.items()]))
    return html.page(f'{protocol["generated"]["images"]} against {protocol["real"]["images"]}', parts)


def _plain(value):
    return '; '.join(f'{k}: {v}' for k, v in value.items()) if isinstance(value, dict) else str(value)


def _headline(report) -> str:
    # the main numbers, in large
    reconstruction, split = report.get('reconstruction'), report['protocol']['split']
    images = 'images' if reconstruction else 'maps'
    values = [(str(report['protocol']['counts'][split]), f'{split} {images}')]
    if reconstruction:
        values.append((f'{reconstruction["psnr"]:.2f} dB', 'PSNR of reconstructions'))
        values.append((f'{reconstruction["compression_ratio"]:.1f}x', 'smaller as codes'))
    if 'likelihood' in report:
        values.append((f'{report["likelihood"]["bits_per_image"]:.0f}', f'bits per {images[:-1]} under the priors'))
    for name, level in reversed(reconstruction['levels'].items()) if reconstruction else ():
        values.append((f'{level["codebook_usage"]:.0%}', f'codebook usage, {name}'))
    for name, entry in report['sets'].items() if len(report['sets']) == 1 else ():  # a table compares several
        quality = entry.get('quality', {})
        values += [
            (report_text.number(quality[k]), f'{report_text.LABELS[k]}, {name}')
            for k in ('fid', 'frechet_distance')
            if k in quality
        ]
        if 'class_accuracy' in entry:
            values.append((report_text.percent(entry['class_accuracy']), f'class accuracy, {name}'))
        if 'cas' in entry:
            values.append((report_text.percent(entry['cas']['top1']), f'CAS top-1, {name}'))
    return html.numbers(values)


def _reconstruction(report, originals, pictures) -> list[str]:
    levels = list(report['levels'].items())  # finest first
    rows = [('original images', originals)] if 'missing' not in originals.get('quality', {'missing': ''}) else []
    rows += [(f'{name} only', level['without_finer_levels']) for name, level in reversed(levels[1:])]
    rows += [('all levels', report), ('all levels, training images', report['train'])]
    shown = [key for key in report_text.LABELS if key in report.get('quality', {})]
    others = report.get('quality', {}).get('references')
    header = ('', 'PSNR, dB', 'MSE in [-1, 1]', 'MSE in [0, 1]', 'SSIM', *(report_text.LABELS[key] for key in shown))
    cells = [
        (
            name,
            f'{errors["psnr"]:.2f}' if 'psnr' in errors else '',
            *(report_text.number(errors.get(key, '')) for key in ('mse', 'mse_unit', 'ssim')),
            *(report_text.number(errors.get('quality', {}).get(key, '')) for key in shown),
        )
        for name, errors in rows
    ]
    return [
        html.table(header, cells),
        html.note(report_text.note(report.get('quality', {}))),
        *([_comparisons('reconstructions against', others, shown)] if others else []),
        html.gallery(
            pictures.reconstructions,
            'Images of the split, and their reconstructions from the coarse levels alone and from all levels',
            pictures.class_names,
            sharp=pictures.sharp,
        ),
    ]


def _codes(report, pictures) -> list[str]:
    reconstruction = report['reconstruction']
    rows = [
        (name, 'x'.join(map(str, level['codes'])), f'{level["codebook_usage"]:.0%}', f'{level["perplexity"]:.1f}')
        for name, level in reversed(reconstruction['levels'].items())
    ]
    bits, ratio = reconstruction['bits_per_image'], reconstruction['compression_ratio']
    return [
        html.table(('level', 'codes', 'codebook usage', 'perplexity'), rows),
        html.note(f'{bits:.0f} bits per image, {ratio:.1f} times smaller'),
        html.gallery(
            pictures.code_maps,
            'Code maps of the images above. Codes with similar vectors have similar colors: red, green and blue are '
            'ranks along three principal components of the codebook',
            pictures.class_names,
        ),
        html.plots(pictures.code_usage, 'How often each code occurs in the split'),
    ]


def _likelihood(report) -> list[str]:
    unigrams = ('unigram entropy', 'cross-entropy under per-position unigrams')
    header = ('prior', 'nats per code', 'on training images', *unigrams, 'parameters')
    keys = ('nll', 'nll_train', 'unigram_entropy', 'positional_cross_entropy')
    rows = [
        (name, *(f'{level[key]:.3f}' for key in keys), f'{level["parameters"]:,}')
        for name, level in reversed(report['levels'].items())
    ]
    bits = f'{report["bits_per_image"]:.0f} bits per image'
    if 'bits_per_subpixel' in report:
        bits += f', {report["bits_per_subpixel"]:.4f} bits per subpixel'
    return [html.table(header, rows), html.note(bits)]


def _samples(report, pictures) -> list[str]:
    sets = report['sets']
    parts = [
        html.heading(name, 3)
        + ''.join(_sample_set(name, entry, report, pictures.sets.get(name, SetPictures()), pictures.sharp))
        for name, entry in sets.items()
    ]
    return [*_overview(sets), html.columns(parts)] if sets else []


def _overview(sets) -> list[str]:
    # one column per sample set
    shown = [key for key in report_text.LABELS if any(key in entry.get('quality', {}) for entry in sets.values())]
    rows = {'samples': lambda e: e['count'], 'seed': lambda e: e['seed']}
    rows |= {f: lambda e, f=f: _per_level(e[f]) for f in _SAMPLING}
    rows |= {report_text.LABELS[k]: lambda e, k=k: report_text.number(e.get('quality', {}).get(k, '')) for k in shown}
    if any('class_accuracy' in entry for entry in sets.values()):
        rows['class accuracy'] = lambda e: report_text.percent(e.get('class_accuracy'))
        rows['class accuracy after rejection'] = lambda e: report_text.percent(e.get('class_accuracy_after_rejection'))
    if any('cas' in entry for entry in sets.values()):
        rows['CAS top-1'] = lambda e: report_text.percent(e.get('cas', {}).get('top1'))
    if any(entry['stale'] for entry in sets.values()):
        rows['state'] = lambda e: 'stale' if e['stale'] else ''
    cells = [(label, *(cell(entry) for entry in sets.values())) for label, cell in rows.items()]
    return [html.table(('sample set', *sets), cells)]


def _per_level(values):
    return ', '.join(f'{level} {value:g}' for level, value in reversed(values.items()))


def _sample_set(name, entry, report, pictures: SetPictures, sharp) -> list[str]:
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
        shown = [key for key in report_text.LABELS if key in quality]
        compared |= entry.get('references', {})
        parts.append(_comparisons('samples against', compared, shown))
        parts.append(html.note(report_text.note(quality)))
    form = '' if 'reconstruction' in report else ' (code maps, one color per code, the coarsest level on the left)'
    of_each = ' of each class' if len(pictures.samples) > 1 else ''
    caption = f'{entry["count"]} samples{form}, unfiltered: the first ones{of_each}'
    parts.append(html.gallery(pictures.samples, caption, sharp=sharp))
    parts += _nearest(entry['nearest'], pictures, sharp) if 'nearest' in entry else []
    if 'class_accuracy' not in entry:
        return parts
    classifier = report.get('classifier')
    rows = [
        *([('real images', report_text.percent(classifier['accuracy_on_real_images']))] if classifier else []),
        ('samples', report_text.percent(entry['class_accuracy'])),
        (
            f'the {entry["accepted"]} accepted: {report_text.accepted(entry)}',
            report_text.percent(entry['class_accuracy_after_rejection']),
        ),
    ]
    parts += [html.table(('', 'class accuracy by the classifier'), rows), html.note(entry['note'])]
    parts.append(html.gallery(pictures.accepted, 'After rejection, best first', sharp=sharp))
    if entry.get('sweep'):
        caption = 'Rejection: quality against diversity'
        parts += [html.plots(pictures.rejection, caption), _sweep_table(entry['sweep'])]
    return [*parts, html.note(entry.get('sweep_note', ''))]


def _nearest(nearest, pictures, sharp) -> list[str]:
    if 'missing' in nearest:
        return [html.note(f'Nearest training images: {nearest["missing"]}')]
    kinds = ('median_distance', 'low_distance')
    rows = [(name, *(report_text.number(nearest[kind][name]) for kind in kinds)) for name in nearest[kinds[0]]]
    caption = (
        f'The samples that are nearest to training images, and below each the nearest of {nearest["count_train"]} '
        'training images by features'
    )
    return [
        html.table(('distance to the nearest training image', 'median', '1 % are below'), rows),
        html.note('Samples whose distances are far below those of held-out images are copies; look at the pictures.'),
        html.gallery(pictures.nearest, caption, sharp=sharp),
    ]


def _comparisons(title, compared, shown) -> str:
    # one row per set of images that is compared with
    header = (title, *(report_text.LABELS[k] for k in shown), 'images', 'compared with')
    rows = [
        (against, *(report_text.number(m.get(k, '')) for k in shown), m.get('count', ''), report_text.real_count(m))
        for against, m in compared.items()
    ]
    missing = [html.note(f'{against}: {report_text.note(m)}') for against, m in compared.items() if 'missing' in m]
    return html.table(header, rows) + ''.join(missing)


def _sweep_table(points: Sequence[dict]) -> str:
    labels = {'kept_count': 'samples kept', 'count': 'n', 'confidence': 'confidence'} | report_text.LABELS
    keys = [key for key in labels if all(key in p for p in points)]
    rows = [(f'{p["keep_fraction"]:.0%}', *(report_text.number(p[key]) for key in keys)) for p in points]
    return html.table(('fraction kept', *(labels[key] for key in keys)), rows)


def _cas(report) -> list[str]:
    rows = report_text.cas_rows(report)
    keys = [k for k in ('top1', 'top5', 'top1_reconstructed', 'top5_reconstructed') if k in report['cas']['real']]
    cells = [(name, row['count'], *(f'{row[key]:.1%}' for key in keys)) for name, row in rows.items()]
    note = (
        'Top-1 and top-5 accuracy on real held-out images, and on their reconstructions, of classifiers trained on '
        'each source.'
    )
    return [html.note(note), html.table(('trained on', 'images', *(k.replace('_', ', ') for k in keys)), cells)]


def _classes(report) -> list[str]:
    # one row per class, with a group of columns for the real images and for each sample set
    classifier, cas = report.get('classifier'), report.get('cas', {})
    if classifier is None:
        return []
    split = report['protocol']['split']
    groups = {f'{split} images': {'images': classifier['count_by_class']}}
    real = groups[f'{split} images']
    real['classifier'] = _percents(classifier['accuracy_by_class'])
    for source, row in cas.items():
        if row['by_class'] != classifier['accuracy_by_class']:  # else it is the same classifier
            real[f'CAS, {source}'] = _percents(row['by_class'])
    for name, entry in report['sets'].items():
        if 'count_by_class' not in entry:  # no classes, or a stale set of an earlier version
            continue
        columns = {
            'samples': entry['count_by_class'],
            'as intended': _percents(entry['class_accuracy_by_class']),
            'accepted': entry['accepted_by_class'],
        }
        groups[f'sample set {name}'] = columns | (
            {'CAS': _percents(entry['cas']['by_class'])} if 'cas' in entry else {}
        )
    columns = [column for group in groups.values() for column in group.values()]
    names = classifier['count_by_class']
    table = html.table(
        ('class', *(header for group in groups.values() for header in group)),
        [(name, *(column.get(name, '') for column in columns)) for name in names],
        [('', 1), *((text, len(group)) for text, group in groups.items())],
    )
    note = (
        'Accuracy of the classifier on real images; share of samples that it assigns to the intended class; samples '
        'that rejection keeps.'
    )
    note += ' CAS: top-1 accuracy on real images of classifiers trained on each source.' if cas else ''
    return [html.note(note), table if len(names) <= _MANY_CLASSES else html.details(f'{len(names)} classes', table)]


def _percents(values):
    return {name: report_text.percent(value) for name, value in values.items()}


def _training(report, pictures) -> list[str]:
    seconds = [(name, format_duration(value)) for name, value in report_text.all_seconds(report).items()]
    return [html.plots(pictures.curves, 'Learning curves'), html.table(('job', 'time'), seconds)]
