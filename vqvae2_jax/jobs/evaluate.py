"""--job=evaluate: every number of a run, from images that nothing was trained or chosen on, with its protocol.

Or, with evaluate.real and evaluate.generated, the numbers of any two sets of images.
"""

import datetime
import os
import platform

import jax

from vqvae2_jax.config import build as configs
from vqvae2_jax.data import samples
from vqvae2_jax.data.images import SPLITS
from vqvae2_jax.evaluation import features, generative, measure, report
from vqvae2_jax.evaluation.compare import compare_sets
from vqvae2_jax.io import files
from vqvae2_jax.jobs import cas, extract_codes, reject, sample, workdir
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.tasks.vqvae import SSIM
from vqvae2_jax.training.checkpoint import read_record

DIRECTORY = 'report'


def evaluate(run: Run) -> None:
    """Writes report/: report.json, report.html and the pictures and plots in it; prints the summary."""
    options = configs.options(run.config, 'evaluate')
    if options.real or options.generated:
        compare_sets(run)
        return
    check_upstreams(run)
    classifier_network = features.load_classifier(run) if configs.has_classifier(run.config) else None
    # Images are compared by the Inception network where its weights are given, else by the classifier that judges.
    network = (
        features.load_inception(options.inception, options.batch_size) if options.inception else classifier_network
    )
    seen = measure.look(run, network)
    found = {
        'schema': 3,
        'config': run.config.name,
        'protocol': _protocol(run, network),
        'reconstruction': seen.reconstruction,
        'originals': seen.originals,
        'likelihood': measure.likelihood(run, options.split),
        'samples': measure.drawn(run, network, seen, classifier_network),
    }
    if configs.has_cas(run.config):
        found['cas'] = cas.measure(run, seen.reconstruct, options.split)
    found |= {'seconds': _seconds(run), 'skipped_files': len(run.skipped())}
    directory = run.path(DIRECTORY)
    files.write_json(directory / 'report.json', found)
    report.draw(run, directory, found, seen.reconstruct)
    report.write_page(run, directory, found)
    report.summarize(run, directory, found)


def check_upstreams(run: Run) -> None:
    """Refuses when samples or scores were made by other weights than those that the report would describe."""
    vqvae, learnt = workdir.vqvae_record(run), {'codes': extract_codes.current_codes_digest(run)}
    workdir.check_images(run, 'vqvae', vqvae)
    extract_codes.check_images(run, 'test')
    for name, prior in zip(run.levels, workdir.prior_records(run), strict=True):
        directory = workdir.prior_directory(name)
        recorded = {'codes': prior['upstream']['codes']}
        workdir.check_digests(directory, recorded, learnt, f'Delete {run.path(directory)} to train it anew.')
    meta = samples.read_meta(run.path(sample.DIRECTORY))
    hint = f'Delete {run.path(sample.DIRECTORY)} and run --job=sample again.'
    workdir.check_digests('the samples', meta['upstream'], workdir.generator_digests(run), hint)
    if configs.has_classifier(run.config):
        if configs.trains_classifier(run.config):
            workdir.check_images(run, 'classifier', workdir.trained_record(run, 'classifier', 'classifier'))
        scores = reject.read_meta(run)
        current = {'samples': samples.digest(run.path(sample.DIRECTORY)), 'classifier': features.classifier_digest(run)}
        workdir.check_digests('the scores', scores['upstream'], current, 'Run --job=reject again.')
        if configs.has_cas(run.config):
            cas.check_upstreams(run)


def _protocol(run: Run, network) -> dict:
    options, device = configs.options(run.config, 'evaluate'), jax.devices()[0]
    return {
        'split': options.split,
        'reference': options.reference or options.split,
        'counts': {split: len(run.images(split)) for split in SPLITS},
        'weights': 'averaged (training.weight_ema), best on the validation split',
        'mse': 'of what a viewer sees, so clipped; mse_11 in [-1, 1], mse_01 in [0, 1]; PSNR of the mean MSE',
        'ssim': SSIM,
        'quality': generative.protocol(network, generative.IMAGES_OF_RUN) if network else None,
        'seed': run.config.seed,
        'config_digest': files.digest_json(run.config.to_dict()),
        'version': files.package_version(),
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
        directories |= {f'cas_{name}': f'{cas.DIRECTORY}/{name}' for name in cas.SOURCES}
    seconds = {name: read_record(run.path(d))['seconds'] for name, d in directories.items()}
    return seconds | {'sample': files.read_json(run.path(sample.DIRECTORY, 'time.json'))['seconds']}
