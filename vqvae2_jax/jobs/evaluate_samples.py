"""Numbers of sample sets for --job=evaluate, each kept in evaluation/sets/<name>/record.json."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vqvae2_jax.config import build as configs
from vqvae2_jax.data import sample_store
from vqvae2_jax.distributed import processes
from vqvae2_jax.distributed.preemption import exit_together
from vqvae2_jax.evaluation import generative
from vqvae2_jax.evaluation.features import MAX_STORED_FEATURES, FeatureExtractor, FeatureStats
from vqvae2_jax.io import files, record
from vqvae2_jax.io.progress import Progress
from vqvae2_jax.io.record import Record
from vqvae2_jax.jobs import cas, feature_store, reject, workdir
from vqvae2_jax.jobs.workdir import REJECTION, SAMPLES, Run
from vqvae2_jax.metrics.classification import accuracy, per_class_accuracy
from vqvae2_jax.tasks.vqvae import ALL_LEVELS

DIRECTORY = 'evaluation'
_SETS = 'sets'
_NOTE = 'the classifier that rejects also evaluates: class_accuracy_after_rejection is optimistic'


class Evaluation(NamedTuple):
    """A run that is being evaluated.

    Attributes:
      run: the run.
      network: whose features are compared: Inception, or else the classifier; None without both.
      classifier: that scores samples; None without classes.
      stopped: of `stop_signals`.
    """

    run: Run
    network: FeatureExtractor | None
    classifier: FeatureExtractor | None
    stopped: Callable[[], int]

    @property
    def split(self) -> str:
        return self.run.config.evaluate.split

    @property
    def reference(self) -> str:
        return self.run.config.evaluate.reference or self.split


def evaluate_part(
    e: Evaluation, place: str, inputs: dict[str, str], settings: dict[str, Any], compute: Callable[[], dict]
) -> dict[str, Any]:
    """Returns the results kept in evaluation/<place>; computes them if they are missing or anything has changed."""
    output = e.run.open_output(e.run.path(DIRECTORY, place), 'evaluate', inputs, settings, replace=True)
    if output.state == record.DONE:
        return output.results
    results = files.to_json(compute(), place)
    exit_together(e.stopped)
    processes.run_on_main_process(lambda: output.finish(results))
    return results


def reference_features(e: Evaluation, extract: Callable[..., Record], split: str) -> Record:
    """Calls one of feature_store's functions with the network of the evaluation."""
    return extract(e.run, e.network, e.network.name, split, e.stopped)


def evaluate_set(e: Evaluation, own_cas: dict | None) -> None:
    """Evaluates the sample set sample.name into evaluation/sets/<name>."""
    run, name = e.run, e.run.config.sample.name

    def compute():
        found = sample_store.read_set(run.path(SAMPLES, name))
        fields = ('seed', *configs.sampling_settings(run.config), 'dtype')
        results = {'count': found.results['count']} | {field: found.settings[field] for field in fields}
        results |= _sample_metrics(e, found)
        seconds = {'sample': found.seconds}
        if own_cas is not None:
            results['cas'] = own_cas
            seconds['cas'] = record.read(run.path(cas.DIRECTORY, SAMPLES, name)).seconds
        return results | {'seconds': seconds}

    evaluate_part(e, f'{_SETS}/{name}', *_set_inputs(e, name), compute)


def _set_inputs(e: Evaluation, name: str) -> tuple[dict, dict]:
    """Returns the inputs and settings that decide the numbers of a sample set."""
    run, config = e.run, e.run.config
    inputs = {'images': run.images(e.split).digest, 'reference': run.images(e.reference).digest}
    inputs |= workdir.generator_digests(run)
    outputs = {'samples': (SAMPLES,)}
    if e.network is not None:
        inputs['network'] = e.network.digest
    if e.classifier is not None:
        outputs['rejection'] = (REJECTION,)
    if configs.has_cas(config):
        outputs['cas'] = cas.DIRECTORY, SAMPLES
    for key, parts in outputs.items():
        found = record.read(run.path(*parts, name))
        inputs[key] = found.digest if found and found.state == record.DONE else 'missing'
    settings = {'evaluate.split': e.split, 'evaluate.reference': e.reference}
    return inputs, settings | {'evaluate.sweep': list(config.evaluate.sweep)}


def all_sets(e: Evaluation) -> dict[str, dict]:
    """Returns the numbers of all sample sets evaluated so far, with the names of the inputs that changed since."""
    entries, root = {}, e.run.path(DIRECTORY, _SETS)
    for directory in sorted(root.iterdir()):
        found = record.read(directory)
        if found is None or found.state != record.DONE:
            continue
        stale = []
        for before, now in zip((found.inputs, found.settings), _set_inputs(e, directory.name), strict=True):
            stale += [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        entries[directory.name] = {'stale': stale} | found.results
    return entries


def _sample_metrics(e: Evaluation, found: Record) -> dict[str, Any]:
    run, name, results = e.run, found.directory.name, {}
    points, scores = [], None
    if e.network is not None:
        real = reference_features(e, feature_store.image_features, e.reference)
        made = reference_features(e, feature_store.reconstruction_features, e.reference)
        points, scores, indices = processes.run_on_main_process(lambda: _choose(e, found, real.results['count']))
        extracted = feature_store.sample_features(run, e.network, e.network.name, name, indices, e.stopped)
        compute = functools.partial(_compare_samples, e, real, made, extracted, indices, points, scores)
        results = processes.run_on_main_process(compute)
    if e.classifier is not None:
        results |= processes.run_on_main_process(lambda: _class_accuracy(run, name))
    return results


def _choose(e: Evaluation, found: Record, real_count: int):
    """Returns the points of the sweep, all scores, and the ascending indices of all samples that the metrics need."""
    points, scores = [], None
    indices = np.arange(min(found.results['count'], MAX_STORED_FEATURES))
    if e.classifier is not None:
        scores = sample_store.read_npz(e.run.path(REJECTION, found.directory.name, reject.SCORES))
        fractions = e.run.config.evaluate.sweep
        points = generative.choose_samples(
            scores['log_probability'], scores['label'], fractions, real_count, MAX_STORED_FEATURES
        )
        indices = functools.reduce(np.union1d, [point.indices for point in points], indices)
    return points, scores, indices


def _compare_samples(e, real, made, extracted, indices, points, scores) -> dict[str, Any]:
    name = e.network.name
    progress = Progress('samples: metrics', 2 + len(points), 'comparisons')
    try:
        stats = feature_store.load_stats(real, max_stored=MAX_STORED_FEATURES)
        reconstructed = feature_store.load_stats(made, ALL_LEVELS, max_stored=MAX_STORED_FEATURES)
        generated = feature_store.load_stats(extracted, max_stored=len(indices))
    except ValueError as error:
        results = dict.fromkeys(('quality', 'quality_against_reconstructions'), {'missing': str(error)})
        return results | ({'sweep': [], 'sweep_note': f'Left out: {error}.'} if points else {})

    def metrics(against: FeatureStats, number: int):
        first = generated.take(slice(MAX_STORED_FEATURES))
        found = generative.metrics_or_reason(lambda: generative.generative_metrics(name, against, first))
        progress.update(number)
        return found

    results = {'quality': metrics(stats, 1), 'quality_against_reconstructions': metrics(reconstructed, 2)}
    if e.classifier is not None:
        sets = stats, reconstructed, generated
        sweep, note = generative.rejection_sweep(
            name, *sets, indices, points, scores['score'], progress=lambda done: progress.update(2 + done)
        )
        results |= {'sweep': sweep, 'sweep_note': note}
    return results


def _class_accuracy(run: Run, name: str) -> dict[str, Any]:
    rejection = record.read_done(run.path(REJECTION, name), 'reject')
    scores = sample_store.read_npz(rejection.directory / reject.SCORES)
    accepted = sample_store.read_npz(rejection.directory / reject.ACCEPTED, ('index', 'label'))
    kept = scores['predicted'][np.searchsorted(scores['index'], accepted['index'])]
    each = per_class_accuracy(scores['predicted'], scores['label'], run.config.data.num_classes)
    names = run.images(run.config.evaluate.split).class_names
    return {
        'class_accuracy': accuracy(scores['predicted'], scores['label']),
        'class_accuracy_after_rejection': accuracy(kept, accepted['label']),
        'keep_fraction': rejection.settings['keep_fraction'],
        'threshold': rejection.settings['threshold'],
        'accepted': len(accepted['index']),
        'note': _NOTE,
        'class_accuracy_by_class': dict(zip(names, each, strict=True)),
    }
