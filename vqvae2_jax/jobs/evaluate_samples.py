"""Numbers of sample sets for --job=evaluate, each kept in evaluation/sets/<name>/record.json."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vqvae2_jax.config import build
from vqvae2_jax.data import sample_store
from vqvae2_jax.distributed import processes
from vqvae2_jax.distributed.preemption import exit_together
from vqvae2_jax.evaluation import generative
from vqvae2_jax.evaluation.features import MAX_STORED_FEATURES, FeatureExtractor
from vqvae2_jax.io import files, record
from vqvae2_jax.io.record import DamagedError, Record
from vqvae2_jax.jobs import cas, feature_store, reject, workdir
from vqvae2_jax.jobs.workdir import REJECTION, SAMPLES, Run
from vqvae2_jax.metrics.classification import accuracy, per_class_accuracy
from vqvae2_jax.tasks.vqvae import ALL_LEVELS

DIRECTORY = 'evaluation'
# Part of the settings of all parts. Raise it when a number of report.json changes for the same inputs and settings: how
# a metric is computed, on which images, or the names of the results. Features have a version of their own.
METRICS_VERSION = 1
_SETS = 'sets'
_NOTE = 'the classifier that rejects also evaluates: class_accuracy_after_rejection is optimistic'


class Evaluation(NamedTuple):
    """A run that is being evaluated.

    Attributes:
      run: the run.
      network: the network whose features are compared: Inception, or else the classifier; None without both.
      classifier: the network that scores samples; None without classes.
      received_signal: from `stop_signals`.
    """

    run: Run
    network: FeatureExtractor | None
    classifier: FeatureExtractor | None
    received_signal: Callable[[], int]

    @property
    def split(self) -> str:
        return self.run.config.evaluate.split

    @property
    def reference(self) -> str:
        return self.run.config.evaluate.reference or self.split

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of every part."""
        versions = {'metrics_version': METRICS_VERSION, 'features_version': feature_store.FEATURES_VERSION}
        return {'evaluate.split': self.split, **versions}


def evaluate_part(
    e: Evaluation,
    name: str,
    inputs: dict[str, str],
    compute: Callable[[], dict],
    settings: dict[str, Any] | None = None,
    *,
    main_process_only: bool = False,
) -> dict[str, Any]:
    """Returns the results kept in evaluation/<name>; computes them if they are missing or anything has changed.

    Args:
      e: the evaluation.
      name: directory of the part.
      inputs: digests of its inputs.
      compute: returns the results. They are kept: an error that may not come again must raise, not become a result.
      settings: settings of this part besides `e.settings`.
      main_process_only: call `compute` on the main process alone.

    Raises:
      Interrupted: a stop signal came; the part is kept if it was complete.
    """
    settings = e.settings | (settings or {})
    output = e.run.open_output(e.run.path(DIRECTORY, name), 'evaluate', inputs, settings, replace=True)
    if output.state == record.DONE:
        return output.results
    results = files.to_json(processes.run_on_main_process(compute) if main_process_only else compute(), name)
    processes.run_on_main_process(lambda: output.finish(results))
    exit_together(e.received_signal)
    return results


def evaluate_set(e: Evaluation, cas_metrics: dict | None) -> None:
    """Evaluates the sample set sample.name into evaluation/sets/<name>; `cas_metrics` are those of its classifier."""
    run, name = e.run, e.run.config.sample.name

    def compute():
        samples = sample_store.read_set(run.sample_set_path(SAMPLES))
        fields = ('seed', *build.sampling_settings(run.config), 'dtype')
        results = {'count': samples.results['count']} | {field: samples.settings[field] for field in fields}
        results |= sample_metrics(e, samples)
        seconds = {'sample': samples.seconds}
        if cas_metrics is not None:
            results['cas'] = cas_metrics
            seconds['cas'] = record.read_done(run.path(cas.DIRECTORY, SAMPLES, name), 'cas').seconds
        return results | {'seconds': seconds}

    evaluate_part(e, f'{_SETS}/{name}', _set_inputs(e, name), compute, _set_settings(e))


def all_sets(e: Evaluation) -> dict[str, dict]:
    """Returns the numbers of all sample sets evaluated so far, with the names of the inputs that changed since."""
    entries = {}
    for directory in sorted(e.run.path(DIRECTORY, _SETS).iterdir()):
        try:
            output = record.read(directory)
        except DamagedError as error:  # of another set: this call has written the record of its own
            print(f'{error}. To evaluate it again, set --config.sample.name={directory.name}', flush=True)
            continue
        if output is None or output.state != record.DONE:
            continue
        stale = []
        current = _set_inputs(e, directory.name), e.settings | _set_settings(e)
        for before, now in zip((output.inputs, output.settings), current, strict=True):
            # Of a set that has more than this config asks for, such as CAS, the rest decides.
            stale += [key for key in sorted(now) if before.get(key) != now[key]]
        entries[directory.name] = {'stale': stale} | output.results
    return entries


def _set_settings(e: Evaluation) -> dict[str, Any]:
    return {'evaluate.reference': e.reference, 'evaluate.sweep': list(e.run.config.evaluate.sweep)}


def _set_inputs(e: Evaluation, name: str) -> dict[str, str]:
    """Returns the inputs that decide the numbers of a sample set."""
    run = e.run
    inputs = {'images': run.images(e.split).digest, 'reference': run.images(e.reference).digest}
    inputs |= workdir.generator_digests(run)
    outputs = {'samples': (SAMPLES,)}
    if e.network is not None:
        inputs['network'] = e.network.digest
    if e.classifier is not None:
        outputs['rejection'] = (REJECTION,)
    if build.has_cas(run.config):
        outputs['cas'] = cas.DIRECTORY, SAMPLES
    for key, parts in outputs.items():
        output = record.read_if_done(run.path(*parts, name))
        inputs[key] = output.digest if output else 'missing'
    return inputs


def sample_metrics(e: Evaluation, samples: Record) -> dict[str, Any]:
    """Computes the metrics of the sample set sample.name.

    Args:
      e: the evaluation.
      samples: the record of the set.

    Returns:
      Entries of the set in report.json: 'quality', 'quality_against_reconstructions', 'sweep', 'class_accuracy', ...
    """
    run, network, results = e.run, e.network, {}
    if network is not None:
        real = feature_store.image_features(run, network, e.reference, e.received_signal)
        reconstructed = feature_store.reconstruction_features(run, network, e.reference, e.received_signal)

        def choose():
            # The first samples, and those of the sweep, which need not be among the first.
            indices = np.arange(min(samples.results['count'], MAX_STORED_FEATURES))
            if e.classifier is None:
                return indices, [], None
            scores, fractions = _scores(run), run.config.evaluate.sweep
            points = generative.choose_samples(
                scores['log_probability'], scores['label'], fractions, real.results['count'], MAX_STORED_FEATURES
            )
            return functools.reduce(np.union1d, [p.indices for p in points], indices), points, scores['score']

        indices, points, probability = processes.run_on_main_process(choose)
        extracted = feature_store.sample_features(run, network, indices, e.received_signal)

        def compare():
            references = {
                'quality': feature_store.load_stats(real),
                'quality_against_reconstructions': feature_store.load_stats(reconstructed, ALL_LEVELS),
            }
            generated = feature_store.load_stats(extracted, max_stored=len(indices))
            first = generated.take(slice(MAX_STORED_FEATURES))
            quality = {
                key: generative.metrics_or_reason(network.name, stats, first, f'samples, {key}')
                for key, stats in references.items()
            }
            if e.classifier is None:
                return quality
            sets = *references.values(), generated
            sweep, note = generative.rejection_sweep(network.name, *sets, indices, points, probability)
            return quality | {'sweep': sweep, 'sweep_note': note}

        results = processes.run_on_main_process(compare)
    if e.classifier is not None:
        results |= processes.run_on_main_process(lambda: _class_accuracy(run))
    return results


def _scores(run: Run) -> dict[str, np.ndarray]:
    rejection = record.read_done(run.sample_set_path(REJECTION), 'reject')
    return sample_store.read_npz(rejection.file(reject.SCORES))


def _class_accuracy(run: Run) -> dict[str, Any]:
    rejection, scores = record.read_done(run.sample_set_path(REJECTION), 'reject'), _scores(run)
    accepted = sample_store.read_npz(rejection.file(reject.ACCEPTED), ('index', 'label'))
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
