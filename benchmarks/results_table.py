"""Writes the tables of docs/results.md from the reports in benchmarks/results/: `python -m benchmarks.results_table`.

A directory there with a `report.json` is one measured model: a row of the table of networks, and for each of its sample
sets a row of the table of samples.
"""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

from vqvae2_jax.evaluation.report_text import all_seconds, percent
from vqvae2_jax.io import files
from vqvae2_jax.io.logging import format_duration

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENT, RESULTS = ROOT / 'docs' / 'results.md', ROOT / 'benchmarks' / 'results'
NETWORKS = (
    'model',
    'trained on',
    'evaluated on',
    'PSNR, dB',
    'SSIM',
    'rFID',
    'codes in use',
    'nats per code',
    'bits per image',
    'time',
)
SAMPLES = ('model', 'set', 'temperature', 'guidance', 'samples', 'FID', 'precision', 'recall', 'intended class', 'CAS')
_MARKED = re.compile(r'(<!-- table of (\w+) -->\n).*?(<!-- end of table -->)', re.DOTALL)


def updated(text: str, reports: dict[str, dict[str, Any]]) -> str:
    """Returns the document with the tables between its markers made from reports, {directory: report}."""
    tables = {'networks': (NETWORKS, _network_row), 'samples': (SAMPLES, _sample_rows)}

    def table(match):
        columns, rows_of = tables[match[2]]
        rows = [row for name, report in reports.items() for row in rows_of(name, report)]
        lines = [columns, ('---',) * len(columns), *rows]
        return match[1] + ''.join(f'| {" | ".join(line)} |\n' for line in lines) + match[3]

    return _MARKED.sub(table, text)


def read_reports(directory: pathlib.Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Returns the reports below a directory by the name of their directory."""
    return {path.parent.name: files.read_json(path) for path in sorted(directory.glob('*/report.json'))}


def _network_row(name: str, report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    counts, reconstruction, likelihood = report['protocol']['counts'], report['reconstruction'], report['likelihood']
    levels, split = dict(reversed(reconstruction['levels'].items())), report['protocol']['split']
    priors = ', '.join(f'{name} {likelihood["levels"][name]["nll"]:.3f}' for name in levels)
    usage = ', '.join(f'{level["codebook_usage"]:.0%}' for level in levels.values())
    yield (
        f'[{name}](../benchmarks/results/{name}/report.json)',
        f'{counts["train"]} images',
        f'{counts[split]} {split} images',
        f'{reconstruction["psnr"]:.2f}',
        f'{reconstruction["ssim"]:.3f}',
        _fid(reconstruction['quality']),
        usage,
        priors,
        f'{likelihood["bits_per_image"]:.0f}',
        f'{format_duration(sum(all_seconds(report).values()))}; {report["protocol"]["date"]}',
    )


def _sample_rows(name: str, report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for label, entry in report['sets'].items():
        quality = entry['quality']
        yield (
            name,
            label,
            *(_per_level(entry[field]) for field in ('temperature', 'guidance')),
            f'{quality["count"]}',
            _fid(quality),
            f'{quality["precision"]:.3f}',
            f'{quality["recall"]:.3f}',
            percent(entry.get('class_accuracy')),
            percent(entry.get('cas', {}).get('top1')),
        )


def _fid(quality: dict[str, Any]) -> str:
    return f'{quality["fid"]:.2f} ({quality["count_real"]} images)' if 'fid' in quality else ''


def _per_level(values: dict[str, float]) -> str:
    return ', '.join(f'{level} {value:g}' for level, value in reversed(values.items()))


if __name__ == '__main__':
    DOCUMENT.write_text(updated(DOCUMENT.read_text(), read_reports()))
