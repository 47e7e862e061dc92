"""Numbers of sample sets for --job=evaluate, each kept in evaluation/sets/<name>/record.json."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from vqvae2_jax.config import build
from vqvae2_jax.data import sample_store
from vqvae2_jax.distributed import processes
from vqvae2_jax.evaluation import generative
from vqvae2_jax.evaluation.features import MAX_STORED_FEATURES
from vqvae2_jax.evaluation.report_pictures import class_positions
from vqvae2_jax.io import record
from vqvae2_jax.io.record import DamagedError, Record
from vqvae2_jax.jobs import cas, feature_store, reference_sets, reject, sample, training_neighbors, workdir
from vqvae2_jax.jobs.evaluation_parts import DIRECTORY, Evaluation, evaluate_part
from vqvae2_jax.jobs.workdir import REJECTION, SAMPLES, Run
from vqvae2_jax.metrics.classification import accuracy, per_class_accuracy
from vqvae2_jax.tasks.vqvae import ALL_LEVELS

_SETS = 'sets'
_PICTURES = 'pictures.npz'
_NOTE = 'the classifier that rejects also evaluates: class_accuracy_after_rejection is optimistic'


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

    def write(output: Record, results: dict):
        sample_store.write_npz(output.directory / _PICTURES, _choose_pictures(e, results))
        output.add_files(_PICTURES)

    evaluate_part(e, f'{_SETS}/{name}', _set_inputs(e, name), compute, _set_settings(e), write=write)


def _choose_pictures(e: Evaluation, results: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the pictures that the report shows, as the arrays of pictures.npz; `results` are those of the set."""
    samples, arrays = sample_store.read_set(e.run.sample_set_path(SAMPLES)), {}
    orders = {'samples': np.arange(samples.results['count'])}
    labels = sample.sample_labels(samples.settings['labels'], samples.settings['num_classes'], orders['samples'])
    if e.has_rejection:
        rejection = record.read_done(e.run.sample_set_path(REJECTION), 'reject')
        accepted = sample_store.read_npz(rejection.file(reject.ACCEPTED), ('index', 'log_probability'))
        orders['accepted'] = accepted['index'][np.argsort(-accepted['log_probability'], kind='stable')]
    for name, order in orders.items():
        shown = sample_store.take(samples.directory, class_positions(labels, order))
        arrays |= {name: sample.images_or_codes(e.run, shown), f'{name}_label': shown['label']}
    if 'shown' in (pairs := results.get('nearest', {})):
        shown = sample_store.take(samples.directory, [pair['sample'] for pair in pairs['shown']])
        arrays |= {
            'nearest_samples': shown['arr_0'],
            'nearest_train': training_neighbors.read_training_images(e.run, pairs),
        }
    return arrays


def read_pictures(run: Run, name: str) -> dict[str, np.ndarray]:
    """Reads the pictures of a sample set that was evaluated.

    Returns:
      'samples' and, with classes, 'accepted': uint8 [N, H, W, C], class by class; 'samples_label' and
      'accepted_label': int32 [N]; with evaluate.nearest, 'nearest_samples' and 'nearest_train', uint8 [M, H, W, C]. {}
      if the file is damaged, which is printed.
    """
    output = record.read_done(run.path(DIRECTORY, _SETS, name), 'evaluate')
    try:
        return sample_store.read_npz(output.file(_PICTURES))
    except DamagedError as error:
        print(f'{error} and --config.sample.name={name}', flush=True)
        return {}


def all_sets(e: Evaluation) -> dict[str, dict]:
    """Returns the numbers of all sample sets evaluated so far, with the names of the inputs that changed since."""
    entries = {}
    path = e.run.path(DIRECTORY, _SETS)
    for directory in sorted(path.iterdir()) if path.exists() else ():
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
    options = e.run.config.evaluate
    settings = {f'evaluate.{name}': list(options[name]) for name in ('references', 'sweep')}
    return settings | ({'evaluate.nearest': options.nearest} if training_neighbors.is_on(e) else {})


def _set_inputs(e: Evaluation, name: str) -> dict[str, str]:
    """Returns the inputs that decide the numbers of a sample set."""
    run = e.run
    inputs = workdir.generator_digests(run)
    if run.has_stage_1:
        inputs |= {'images': run.images(e.split).digest, 'reference': run.images(e.reference).digest}
        inputs |= {f'reference {name}': reference.digest for name, reference in e.references.items()}
    outputs = {'samples': (SAMPLES,)}
    if e.network is not None:
        inputs['network'] = e.network.digest
    if training_neighbors.is_on(e):
        inputs['training images'] = run.images(training_neighbors.TRAIN).digest
    if e.has_rejection:
        outputs['rejection'] = (REJECTION,)
    if e.has_cas:
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
            if not e.has_rejection:
                return indices, [], None
            scores, fractions = _scores(run), run.config.evaluate.sweep
            points = generative.choose_samples(
                scores['log_probability'], scores['label'], fractions, real.results['count'], MAX_STORED_FEATURES
            )
            return functools.reduce(np.union1d, [p.indices for p in points], indices), points, scores['score']

        indices, points, probability = processes.run_on_main_process(choose)
        extracted = feature_store.sample_features(run, network, indices, e.received_signal)

        reference_sets.extract(run, network, e.references, e.received_signal)
        train = training_neighbors.extract(e) if training_neighbors.is_on(e) else None

        def compare():
            real_sets = {
                'quality': feature_store.load_stats(real),
                'quality_against_reconstructions': feature_store.load_stats(reconstructed, ALL_LEVELS),
            }
            generated = feature_store.load_stats(extracted, max_stored=len(indices))
            first = generated.take(slice(MAX_STORED_FEATURES))
            quality = {
                key: generative.metrics_or_reason(network.name, stats, first, f'samples, {key}')
                for key, stats in real_sets.items()
            }
            quality['references'] = reference_sets.compare(run, network, e.references, first, 'samples')
            if train is not None:
                quality['nearest'] = training_neighbors.compare(e, train, first, *real_sets.values())
            if not e.has_rejection:
                return quality
            sets = *real_sets.values(), generated
            sweep, note = generative.rejection_sweep(network.name, *sets, indices, points, probability)
            return quality | {'sweep': sweep, 'sweep_note': note}

        results = processes.run_on_main_process(compare)
    if e.has_rejection:
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
        'count_by_class': count_by_class(names, scores['label']),
        'accepted_by_class': count_by_class(names, accepted['label']),
    }


def count_by_class(class_names: Sequence[str], labels: np.ndarray) -> dict[str, int]:
    """Returns the number of examples of each class; `class_names` by label, `labels` int [N]."""
    counts = np.bincount(labels, minlength=len(class_names))
    return dict(zip(class_names, counts.tolist(), strict=True))
