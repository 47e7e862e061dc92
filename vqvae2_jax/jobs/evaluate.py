"""--job=evaluate: all numbers of a run, on images that nothing was trained or chosen on.

Parts are kept in evaluation/<part>/record.json, and features of images in features/ (see feature_store.py). A part is
computed again only if its inputs or settings change: a restart continues, and another sample set costs only its own
images (see evaluate_samples.py).

With evaluate.real and evaluate.generated the job compares two sets of images instead (see compare.py).
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from vqvae2_jax.config import build
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.loader import eval_batches
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.distributed.batches import map_examples
from vqvae2_jax.distributed.preemption import Interrupted, stop_signals
from vqvae2_jax.evaluation import generative
from vqvae2_jax.evaluation.prior_likelihood import likelihood_report
from vqvae2_jax.evaluation.reconstruction import make_reconstruct_fn, reconstruction_report
from vqvae2_jax.io import record
from vqvae2_jax.io.progress import track
from vqvae2_jax.io.record import Record
from vqvae2_jax.jobs import cas, compare, extract_codes, feature_store, reject, train, workdir
from vqvae2_jax.jobs.evaluate_samples import Evaluation, all_sets, evaluate_part, evaluate_set
from vqvae2_jax.jobs.report_files import DIRECTORY, write_report
from vqvae2_jax.jobs.workdir import RECONSTRUCTIONS, REJECTION, SAMPLES, Run
from vqvae2_jax.metrics.classification import accuracy, per_class_accuracy, top_k_accuracy
from vqvae2_jax.models.vqvae import map_shapes
from vqvae2_jax.tasks.vqvae import ALL_LEVELS
from vqvae2_jax.training.loop import make_eval_fn

_PICTURE_COLUMNS = 10
_TRAIN_EXAMPLES = 10_000  # of the training split, for numbers that are compared with held-out ones


def evaluate(run: Run) -> None:
    """Writes report/ from the sample set sample.name and all sets evaluated before; prints a summary.

    Raises:
      JobError: an input is missing.
      StaleInputError: an input is not the one that another was made from.
      Interrupted: a stop signal came; the same command continues.
    """
    options = run.config.evaluate
    if options.real or options.generated:
        compare.compare_sets(run)
        return
    processes.run_on_main_process(lambda: check_inputs(run))
    classifier = feature_store.load_classifier(run) if build.has_classifier(run.config) else None
    network = feature_store.load_inception(run) if options.inception else classifier
    data = f'{len(run.images(options.split))} {options.split} images'
    parameters = workdir.num_parameters(network.params) if network else None
    run.print_start('evaluate', data, parameters=parameters, batch='evaluate')
    try:
        # Evaluations of other sets write the same parts and features.
        with run.lock(run.path(DIRECTORY), 'evaluate'), stop_signals() as received_signal:
            parts = evaluate_parts(Evaluation(run, network, classifier, received_signal))
            quality = generative.protocol(network, generative.IMAGES_OF_RUN) if network else None
            pictures = _first_reconstructions(run)
            processes.run_on_main_process(lambda: write_report(run, parts, quality, pictures))
    except Interrupted:
        print('evaluate: stopped; the same command continues', flush=True)
        raise


def check_inputs(run: Run) -> None:
    """Refuses outputs that were made from other inputs than the current ones.

    Raises:
      JobError: an output is missing; the message names the job that makes it.
      StaleInputError: with both digests.
    """
    for output, inputs, job in _outputs(run):
        hint = f'delete {output.directory} and {record.job_command(job)}'
        record.check_inputs(output.directory, output.inputs, inputs, hint)


def _outputs(run: Run) -> Iterator[tuple[Record, dict[str, str], str]]:
    """Yields the record of every output that the report reads, the current digests of its inputs, and its job."""
    yield workdir.trained_record(run, 'vqvae'), train.inputs(run, 'vqvae'), 'vqvae'
    for split, codes in workdir.codes_records(run).items():
        yield codes, extract_codes.inputs(run, split), 'extract_codes'
    for section in run.prior_sections:
        yield workdir.trained_record(run, section), train.inputs(run, section), workdir.training_job(section)
    yield sample_store.read_set(run.sample_set_path(SAMPLES)), workdir.generator_digests(run), 'sample'
    if not build.has_classifier(run.config):
        return
    if build.trains_classifier(run.config):
        trained = workdir.trained_record(run, 'classifier')
        yield trained, train.inputs(run, 'classifier'), 'classifier'
    yield record.read_done(run.sample_set_path(REJECTION), 'reject'), reject.inputs(run), 'reject'
    if build.has_cas(run.config):
        yield sample_store.read_set(run.path(RECONSTRUCTIONS)), cas.inputs(run), 'cas'
        for source, directory in cas.directories(run).items():
            trained = workdir.trained_record(run, 'classifier', directory)
            yield trained, cas.classifier_inputs(run, source), 'cas'


def evaluate_parts(e: Evaluation) -> dict[str, Any]:
    """Computes all parts of the report that are not kept from before.

    Returns:
      The entries 'reconstruction', 'originals', 'likelihood', 'classifier', 'cas' and 'sets' of report.json.
    """
    has_cas = build.has_cas(e.run.config)
    originals, quality = _reference_quality(e)
    reconstruction = _reconstruction(e)
    for row, metrics in quality.items():
        level = reconstruction['levels'].get(row.removesuffix(' only'))  # None: from all levels
        (level['without_finer_levels'] if level else reconstruction)['quality'] = metrics
    parts = {'reconstruction': reconstruction, 'originals': originals, 'likelihood': _likelihood(e)}
    if e.classifier is not None:
        parts['classifier'] = _classifier_accuracy(e)
    if has_cas:
        parts['cas'] = {source: _cas(e, source) for source in ('real', RECONSTRUCTIONS)}
    evaluate_set(e, _cas(e, SAMPLES) if has_cas else None)
    return parts | {'sets': processes.run_on_main_process(lambda: all_sets(e))}


def _reconstruction(e: Evaluation) -> dict[str, Any]:
    run, config = e.run, e.run.config
    held_out, training = run.images(e.split), run.images('train')

    def compute():
        task, trained = train.make_task(run, 'vqvae'), workdir.load_trained(run, 'vqvae')
        with jax.set_mesh(run.mesh):
            eval_fn = make_eval_fn(task, run.batch_size('evaluate'))
            weights = sharding.put_replicated((trained.params, trained.model_state))

            def metrics(source, name, stop):
                return eval_fn(*weights, feature_store.read_batches(run, source, name, e.received_signal, stop=stop))

            held_out_metrics = metrics(held_out, 'reconstruction', len(held_out))
            train_metrics = metrics(training, 'reconstruction, training', min(len(training), _TRAIN_EXAMPLES))
        shapes = map_shapes(config.data.image_size, config.vqvae.downsample_factors)
        image_shape, codebook_size = (*config.data.image_size, config.data.channels), config.vqvae.codebook_size
        return reconstruction_report(held_out_metrics, train_metrics, run.levels, shapes, image_shape, codebook_size)

    inputs = {'vqvae': workdir.trained_record(run, 'vqvae').digest, 'images': held_out.digest, 'train': training.digest}
    return evaluate_part(e, 'reconstruction', inputs, compute)


def _first_reconstructions(run: Run) -> dict[str, np.ndarray]:
    """Returns the first images of evaluate.split and their reconstructions, uint8 [N, H, W, C] by label."""
    task, trained = train.make_task(run, 'vqvae'), workdir.load_trained(run, 'vqvae')
    source = run.images(run.config.evaluate.split)
    batches = eval_batches(
        source, batch_size=_PICTURE_COLUMNS, stop=min(_PICTURE_COLUMNS, len(source)), **run.loader_kwargs()
    )
    with contextlib.closing(batches):
        image = batches.peek()['image'][: len(source)]
    with jax.set_mesh(run.mesh):
        reconstruct = make_reconstruct_fn(task)
        weights = sharding.put_replicated((trained.params, trained.model_state))
        batch_size = sharding.pad_batch_size(_PICTURE_COLUMNS, run.mesh)
        pictures = map_examples(functools.partial(reconstruct, *weights), {'image': image}, batch_size)
    return {label: pictures[label] for label in task.image_labels}


def _reference_quality(e: Evaluation) -> tuple[dict, dict[str, dict]]:
    """Returns the part of the split's originals, and the metrics of the reconstructions of each row."""
    run, network = e.run, e.network
    if network is None:
        return {}, {}
    real = feature_store.image_features(run, network, e.reference, e.received_signal)
    reconstructed = feature_store.reconstruction_features(run, network, e.reference, e.received_signal)

    def compute(generated: Record, labels: dict[str, str]):
        real_stats, results = feature_store.load_stats(real), {}
        for row, label in labels.items():
            stats = feature_store.load_stats(generated, row)
            results[row] = generative.metrics_or_reason(network.name, real_stats, stats, label)
        return results

    rows = {row: f'reconstructions, {row}' for row in reconstructed.settings['rows']}
    inputs = {'real': real.digest, RECONSTRUCTIONS: reconstructed.digest}
    quality = evaluate_part(
        e, 'reconstruction_quality', inputs, lambda: compute(reconstructed, rows), main_process_only=True
    )
    if e.reference == e.split:
        reason = 'evaluate.reference is evaluate.split: set it to another split'
        return {'quality': {'missing': reason}}, quality
    originals = feature_store.image_features(run, network, e.split, e.received_signal)
    inputs = {'real': real.digest, 'originals': originals.digest}
    images = {feature_store.IMAGES: 'originals'}
    metrics = evaluate_part(
        e, 'originals', inputs, lambda: compute(originals, images)[feature_store.IMAGES], main_process_only=True
    )
    return {'quality': metrics}, quality


def _likelihood(e: Evaluation) -> dict[str, Any]:
    run, config = e.run, e.run.config
    records = [workdir.trained_record(run, section) for section in run.prior_sections]

    def compute():
        training, held_out, nll = run.codes('train'), run.codes(e.split), []
        splits = {', training': (training, min(len(training), _TRAIN_EXAMPLES)), '': (held_out, len(held_out))}
        for section, name in zip(run.prior_sections, run.levels, strict=True):
            prior = workdir.load_trained(run, section)
            with jax.set_mesh(run.mesh):
                eval_fn = make_eval_fn(train.make_task(run, section), run.batch_size('evaluate'))
                weights = sharding.put_replicated((prior.params, prior.model_state))

                def nats(suffix, name=name, eval_fn=eval_fn, weights=weights):
                    codes, count = splits[suffix]
                    label = f'likelihood {name}{suffix}'
                    batches = feature_store.read_batches(run, codes, label, e.received_signal, stop=count)
                    return eval_fn(*weights, batches)['nll']

                nll.append([nats(suffix) for suffix in splits])

        def report():
            arrays = []
            for suffix, (codes, count) in splits.items():
                examples = [codes[i] for i in track(range(count), f'likelihood{suffix}: reading codes')]
                arrays.append([np.stack([x[f'codes_{level}'] for x in examples]) for level in range(len(run.levels))])
            parameters = [prior.results['parameters'] for prior in records]
            image_shape, size = (*config.data.image_size, config.data.channels), config.vqvae.codebook_size
            nll_train, nll_held_out = zip(*nll, strict=True)
            return likelihood_report(
                run.levels, nll_held_out, nll_train, arrays[1], arrays[0], parameters, size, image_shape
            )

        return processes.run_on_main_process(report)

    inputs = {'codes': workdir.codes_digest(run)} | {prior.directory.name: prior.digest for prior in records}
    return evaluate_part(e, 'likelihood', inputs, compute)


def _classifier_accuracy(e: Evaluation) -> dict[str, Any]:
    features = feature_store.image_features(e.run, e.classifier, e.split, e.received_signal)

    def compute():
        logits, labels = feature_store.load_logits(features)
        return {'accuracy_on_real_images': accuracy(logits.argmax(axis=-1), labels)}

    return evaluate_part(e, 'classifier', {'features': features.digest}, compute, main_process_only=True)


def _cas(e: Evaluation, source: str) -> dict[str, Any]:
    """Accuracy on real images of the classifier trained on `source`: 'real', 'reconstructions' or 'samples'."""
    run, images = e.run, e.run.images(e.split)
    if source == 'real':
        directory, count, part = 'classifier', len(run.images('train')), f'{cas.DIRECTORY}/real'
        name = part if run.config.reject.classifier else directory
    else:
        directory = name = part = cas.directories(run)[source]
        count = sample_store.read_set(run.path(cas.images_directory(run, source))).results['count']
    network = feature_store.load_own_classifier(run, directory)
    of_images = feature_store.image_features(run, network, e.split, e.received_signal, name)
    of_reconstructions = feature_store.reconstruction_features(run, network, e.split, e.received_signal, name)

    def compute():
        results, classes = {'count': count}, images.class_names
        logits, labels = feature_store.load_logits(of_images)
        each = per_class_accuracy(logits.argmax(axis=-1), labels, len(classes))
        again = feature_store.load_logits(of_reconstructions, ALL_LEVELS)
        for suffix, outputs in (('', (logits, labels)), ('_reconstructed', again)):
            results |= {f'top{k}{suffix}': top_k_accuracy(*outputs, k) for k in (1, 5) if k < len(classes)}
        return results | {'by_class': dict(zip(classes, each, strict=True))}

    inputs = {'images': of_images.digest, RECONSTRUCTIONS: of_reconstructions.digest}
    return evaluate_part(e, part, inputs, compute, main_process_only=True)
