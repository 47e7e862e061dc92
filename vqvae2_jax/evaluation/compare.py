"""--job=evaluate with evaluate.real and evaluate.generated: FID and its kin of any two sets of images."""

import datetime
import hashlib

import jax

from vqvae2_jax.config import build as configs
from vqvae2_jax.data.images import SPLITS, ImageSource, open_native_size
from vqvae2_jax.data.loader import eval_batches
from vqvae2_jax.evaluation import features, generative, html
from vqvae2_jax.io import files
from vqvae2_jax.jobs.workdir import JobError, Run

DIRECTORY = 'comparison'


def compare_sets(run: Run) -> None:
    """Writes comparison/report.json and report.html; prints the numbers."""
    options = configs.options(run.config, 'evaluate')
    sources = {name: _open(run, options[name], f'evaluate.{name}') for name in ('real', 'generated')}
    network = features.load_inception(options.inception, options.batch_size)
    try:
        seen = {name: _look(run, network, source) for name, source in sources.items()}
        digests = {name: digest for name, (_, digest) in seen.items()}
        numbers = generative.compare(network, seen['real'][0], seen['generated'][0])
    except ValueError as error:
        raise JobError(f'evaluate: {error}') from error
    sets = {
        name: {'images': options[name], 'size': list(source.image_size), 'pixels': digests[name]}
        for name, source in sources.items()
    }
    protocol = {
        **generative.protocol(network, generative.IMAGES_OF_SETS),
        **sets,
        'version': files.package_version(),
        'jax': jax.__version__,
        'date': datetime.date.today().isoformat(),
    }
    directory = run.path(DIRECTORY)
    files.write_json(directory / 'report.json', {'schema': 1, 'protocol': protocol, 'quality': numbers})
    parts = [html.table(('', ''), list(numbers.items())), html.heading('Protocol')]
    parts.append(html.table(('', ''), list(protocol.items())))
    text = html.page(f'{options.generated} beside {options.real}', parts)
    files.write_bytes(directory / 'report.html', text.encode())
    for name, value in numbers.items():
        print(f'{name:<27} {value:.5g}' if isinstance(value, float) else f'{name:<27} {value}')
    if 'inception_score' not in numbers:
        print(f'{"inception_score":<27} {protocol["inception_score"]}')
    print(f'report: {directory / "report.html"}', flush=True)


def _open(run: Run, which: str, field: str) -> ImageSource:
    try:
        return run.images(which) if which in SPLITS else open_native_size(which, field)
    except (ValueError, OSError) as error:
        raise JobError(str(error)) from error


def _look(run, network, source):
    """What the network sees in a set, and the SHA-256 of its pixels in the order in which they are read."""
    observed, pixels = features.FeatureStats(network), hashlib.sha256()
    for batch in eval_batches(source, batch_size=network.batch_size, **run.reading()):
        images = batch['image'][batch['mask']]
        pixels.update(images.tobytes())
        observed.add(images)
    return observed, pixels.hexdigest()
