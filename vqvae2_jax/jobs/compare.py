"""--job=evaluate with evaluate.real and evaluate.generated: FID and related metrics of any two sets of images."""

import datetime

import jax

from vqvae2_jax.data.images import SPLITS, ImageSource, open_native_size
from vqvae2_jax.distributed import processes
from vqvae2_jax.distributed.preemption import stop_signals
from vqvae2_jax.evaluation import generative
from vqvae2_jax.evaluation.features import FeatureExtractor
from vqvae2_jax.evaluation.report import render_comparison
from vqvae2_jax.io import files, record
from vqvae2_jax.io.record import JobError, Record
from vqvae2_jax.jobs import feature_store, workdir
from vqvae2_jax.jobs.workdir import SKIPPED, Run
from vqvae2_jax.version import __version__

DIRECTORY = 'comparison'
_SETS = ('real', 'generated')


def compare_sets(run: Run) -> None:
    """Writes comparison/report.json and report.html, and prints the metrics.

    An interrupted comparison continues. A finished one starts over, because digests of folders do not cover the pixels:
    other images may lie under the same names.

    Raises:
      JobError: a set or the weights of the network cannot be read, or there are no metrics of the two sets.
      Interrupted: a stop signal came; the same command continues.
    """
    options, directory = run.config.evaluate, run.path(DIRECTORY)
    sources = {name: _open(run, options[name], f'evaluate.{name}') for name in _SETS}
    network = feature_store.load_inception(run)
    data = ', '.join(f'{len(source)} {name} images' for name, source in sources.items())
    run.print_start('evaluate', data, parameters=workdir.num_parameters(network.params), batch='evaluate')
    inputs = {'network': network.digest} | {name: source.digest for name, source in sources.items()}
    settings = {name: options[name] for name in _SETS}
    output = run.open_output(directory, 'evaluate', inputs, settings, replace=True)
    with run.lock(directory, output.job, output):
        report, extracted = _compare(run, network, sources, output)
    metrics = report['quality']
    for name, value in metrics.items():
        print(f'{name:<27} {value:.5g}' if isinstance(value, float) else f'{name:<27} {value}')
    if 'inception_score' not in metrics:
        print(f'{"inception_score":<27} {report["protocol"]["inception_score"]}')
    if skipped := sum(len(sources[name]) - output.results['count'] for name, output in extracted.items()):
        print(f'skipped {skipped} unreadable images, listed in {run.path(SKIPPED)}')
    print(f'report: {directory / "report.html"}', flush=True)


def _compare(run: Run, network: FeatureExtractor, sources: dict[str, ImageSource], output: Record) -> tuple[dict, dict]:
    """Returns the report, which it writes, and the records of the features of each set."""
    extracted = {}
    try:
        with stop_signals() as received_signal:
            if output.state != record.STARTED:
                processes.run_on_main_process(lambda: _start(output))
            for name, source in sources.items():
                images, directory = {'images': source.digest}, output.directory / name
                extracted[name] = feature_store.write_features(
                    run, network, source, directory, images, received_signal, hash_images=True
                )
            return processes.run_on_main_process(lambda: _write(run, network, sources, extracted, output)), extracted
    except ValueError as error:
        if processes.is_main_process():
            files.remove(output.directory / record.FILE)  # the next call starts over
        raise error if isinstance(error, JobError) else JobError(f'evaluate: {error}') from error


def _open(run: Run, which: str, field: str) -> ImageSource:
    data = run.config.data
    options = data.on_error, data.max_pixels, data.max_bytes, data.cache_bytes
    try:
        return run.images(which) if which in SPLITS else open_native_size(which, field, *options)
    except (ValueError, OSError) as error:
        raise JobError(str(error)) from error


def _start(output):
    for name in _SETS:
        files.remove(output.directory / name)
    output.start()


def _write(run, network, sources, extracted, output) -> dict:
    """Writes the report; returns its content."""
    options, directory = run.config.evaluate, output.directory
    stats = [feature_store.load_stats(extracted[name]) for name in _SETS]
    metrics = generative.generative_metrics(network.name, *stats)
    sets = {
        name: {
            'images': options[name],
            'size': list(source.image_size),
            'pixels': feature_store.digest_images(extracted[name]),
        }
        for name, source in sources.items()
    }
    protocol = {
        **generative.protocol(network, generative.IMAGES_OF_SETS),
        **sets,
        'version': __version__,
        'jax': jax.__version__,
        'date': datetime.date.today().isoformat(),
    }
    report = {'schema': 2, 'protocol': protocol, 'quality': metrics}
    files.write_json(directory / 'report.json', report)
    files.write_bytes(directory / 'report.html', render_comparison(report).encode())
    output.add_files('report.json', 'report.html')
    output.finish(metrics)
    return report
