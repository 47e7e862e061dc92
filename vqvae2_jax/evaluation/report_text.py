"""The main numbers of a report as text, and words that the page shares with it."""

from typing import Any

from vqvae2_jax.io.logging import format_duration

LABELS = {  # of metrics, in the order of the page
    'fid': 'FID',
    'frechet_distance': 'Fréchet distance',
    'kid': 'KID',
    'kernel_distance': 'kernel distance',
    'inception_score': 'Inception Score',
    'precision': 'precision',
    'recall': 'recall',
}


def summary(report: dict[str, Any]) -> str:
    """Returns the main numbers of a report as text."""
    reconstruction, split = report.get('reconstruction', {}), report['protocol']['split']
    count = report['protocol']['counts'][split]
    lines = [f'{report["config"]}: {count} {split} {"images" if reconstruction else "codes"}']
    if reconstruction:
        ssim = f', SSIM {reconstruction["ssim"]:.3f}' if 'ssim' in reconstruction else ''
        lines.append(
            f'  reconstruction   PSNR {reconstruction["psnr"]:.2f} dB{ssim}, '
            f'{reconstruction["compression_ratio"]:.1f}x smaller'
        )
    lines += _level_lines(reconstruction.get('levels', {}), report.get('likelihood', {}).get('levels', {}))
    if 'quality' in reconstruction:
        lines.append(f'  reconstructions  {quality_line(reconstruction["quality"])}')
    if 'classifier' in report:
        lines.append(f'  classifier       {report["classifier"]["accuracy_on_real_images"]:.1%} on real images')
    for name, entry in report['sets'].items():
        lines += _set_lines(name, entry)
    if 'cas' in report:
        rows = ', '.join(f'{name} {row["top1"]:.1%}' for name, row in cas_rows(report).items())
        lines.append(f'  CAS              {rows} (accuracy on real images of a classifier trained on each source)')
    lines += [f'  without          {part}: {reason}' for part, reason in report['missing'].items()]
    lines += [f'  changed          {change}' for change in report['protocol']['changes']]
    seconds = all_seconds(report)
    times = ', '.join(f'{name} {format_duration(value)}' for name, value in seconds.items())
    lines.append(f'  time             {times}; total {format_duration(sum(seconds.values()))}')
    return '\n'.join(lines)


def _level_lines(reconstructions, likelihoods):
    names = reversed(reconstructions or likelihoods)
    for name in names:
        parts = []
        if level := reconstructions.get(name):
            parts.append(f'codebook usage {level["codebook_usage"]:.0%}, perplexity {level["perplexity"]:.1f}')
        if prior := likelihoods.get(name):
            parts.append(
                f'prior {prior["nll"]:.3f} nats per code (unigram entropy {prior["unigram_entropy"]:.3f}, '
                f'under per-position unigrams {prior["positional_cross_entropy"]:.3f})'
            )
        yield f'  {name:<16} {"; ".join(parts)}'


def _set_lines(name, entry):
    lines = [f'  set {name}: {entry["count"]} samples{_stale(entry)}']
    if 'quality' in entry:
        lines.append(f'    quality        {quality_line(entry["quality"])}')
    for name, metrics in entry.get('references', {}).items():
        counts = f' ({metrics["count"]} against {real_count(metrics)} images)' if 'count' in metrics else ''
        lines.append(f'    against {name}: {quality_line(metrics)}{counts}')
    if 'median_distance' in entry.get('nearest', {}):
        medians = ', '.join(f'{name} {number(value)}' for name, value in entry['nearest']['median_distance'].items())
        lines.append(f'    median distance to the nearest training image: {medians}')
    if 'class_accuracy' in entry:
        lines.append(
            f'    class accuracy {entry["class_accuracy"]:.1%}, after rejection '
            f'{entry["class_accuracy_after_rejection"]:.1%} ({accepted(entry)})'
        )
    return lines


def all_seconds(report: dict[str, Any]) -> dict[str, float]:
    """Returns the time of every job, those of the sample sets as '<job> <set>'."""
    of_sets = {
        f'{job} {name}': value for name, entry in report['sets'].items() for job, value in entry['seconds'].items()
    }
    return report['seconds'] | of_sets


def _stale(entry):
    return f' (stale: changed since it was evaluated: {", ".join(entry["stale"])})' if entry['stale'] else ''


def quality_line(quality: dict[str, Any]) -> str:
    """Returns the metrics of a comparison of two sets of images, or why there are none."""
    return ', '.join(f'{label} {number(quality[k])}' for k, label in LABELS.items() if k in quality) or note(quality)


def number(value: Any) -> str:
    """Returns a value as text, floats with four digits."""
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def percent(value: float | None) -> str:
    """Returns a fraction as a percentage; '' for None."""
    return '' if value is None else f'{value:.1%}'


def note(quality: dict[str, Any]) -> str:
    """Returns the warning of a comparison, or why there is none."""
    return f'No comparison: {quality["missing"]}.' if 'missing' in quality else quality.get('warning', '')


def real_count(metrics: dict[str, Any]) -> int | str:
    """Returns the number of images of the reference of a comparison."""
    count = metrics.get('count_real', '')
    return 'unknown' if count is None else count


def accepted(entry: dict[str, Any]) -> str:
    """Returns which samples of a set rejection keeps."""
    threshold = f', with a score of at least {entry["threshold"]:g}' if entry['threshold'] else ''
    return f'the best {entry["keep_fraction"]:.0%} of each class{threshold}'


def cas_rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the results of all CAS classifiers, {source: a row of 'cas'}."""
    return report['cas'] | {f'samples {n}': e['cas'] for n, e in report['sets'].items() if 'cas' in e}
