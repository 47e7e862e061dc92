"""--job=evaluate: all numbers of a run, on images that nothing was trained or chosen on.

Parts are kept in evaluation/<part>/record.json, and features of images in features/ (see feature_store.py). A part is
computed again only if its inputs or settings change: a restart continues, and another sample set costs only its own
images.

With evaluate.real and evaluate.generated the job compares two sets of images instead (see compare.py).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from vqvae2_jax.config import build as configs
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.loader import eval_batches
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.distributed.batches import map_examples
from vqvae2_jax.distributed.preemption import Interrupted, stop_signals
from vqvae2_jax.evaluation import generative
from vqvae2_jax.evaluation.prior_likelihood import likelihood_report
from vqvae2_jax.evaluation.reconstruction import make_reconstruct_fn, reconstruction_report
from vqvae2_jax.io import record
from vqvae2_jax.io.progress import Progress
from vqvae2_jax.io.record import Record
from vqvae2_jax.jobs import cas, compare, feature_store, train, workdir
from vqvae2_jax.jobs.evaluate_samples import Evaluation, all_sets, evaluate_part, evaluate_set, reference_features
from vqvae2_jax.jobs.report_files import write_report
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
    classifier = feature_store.load_classifier(run) if configs.has_classifier(run.config) else None
    network = feature_store.load_inception(run) if options.inception else classifier
    data = f'{len(run.images(options.split))} {options.split} images'
    parameters = workdir.num_parameters(network.params) if network else None
    run.print_start('evaluate', data, parameters=parameters, batch='evaluate')
    try:
        with stop_signals() as stopped:
            parts = evaluate_parts(Evaluation(run, network, classifier, stopped))
            quality = generative.protocol(network, generative.IMAGES_OF_RUN) if network else None
            rows = _first_reconstructions(run)
            processes.run_on_main_process(lambda: write_report(run, parts, quality, rows))
    except Interrupted:
        print('evaluate: stopped; the same command continues', flush=True)
        raise


def check_inputs(run: Run) -> None:
    """Refuses outputs that were made from other inputs than the current ones.

    Raises:
      JobError: an output is missing; the message names the job that makes it.
      StaleInputError: with both digests.
    """
    workdir.check_images(run, 'vqvae', workdir.vqvae_record(run))
    for split, found in workdir.codes_records(run).items():
        images = {'images': run.images(split).digest}
        hint = f'delete {found.directory.parent} to extract the codes again'
        record.check_inputs(found.directory, {'images': found.inputs.get('images')}, images, hint)
    codes = {'codes': workdir.codes_digest(run)}
    for found in workdir.prior_records(run):
        hint = f'delete {found.directory} to train it again'
        record.check_inputs(found.directory, {'codes': found.inputs.get('codes')}, codes, hint)
    directory = run.set_path(SAMPLES)
    hint = f'delete {directory} and {record.job_command("sample")}'
    record.check_inputs(directory, sample_store.read_set(directory).inputs, workdir.generator_digests(run), hint)
    if not configs.has_classifier(run.config):
        return
    if configs.trains_classifier(run.config):
        trained = workdir.trained_record(run, 'classifier', 'classifier', 'classifier')
        workdir.check_images(run, 'classifier', trained)
    scores = record.read_done(run.set_path(REJECTION), 'reject')
    current = {'samples': sample_store.read_set(directory).digest, 'classifier': feature_store.classifier_digest(run)}
    record.check_inputs(scores.directory, scores.inputs, current, record.job_command('reject'))
    if configs.has_cas(run.config):
        cas.check_inputs(run)


def evaluate_parts(e: Evaluation) -> dict[str, Any]:
    """Computes all parts of the report that are not kept from before.

    Returns:
      The entries 'reconstruction', 'originals', 'likelihood', 'classifier', 'cas' and 'sets' of report.json.
    """
    run = e.run
    originals, quality = _reference_quality(e)
    reconstruction = _reconstruction(e)
    for name, metrics in quality.items():
        target = reconstruction if name == ALL_LEVELS else _level_of(reconstruction, name)
        target['quality'] = metrics
    parts = {'reconstruction': reconstruction, 'originals': originals, 'likelihood': _likelihood(e)}
    if e.classifier is not None:
        parts['classifier'] = _classifier_accuracy(e)
    own = None
    if configs.has_cas(run.config):
        parts['cas'] = {'real': _cas(e, 'real')} | {RECONSTRUCTIONS: _cas(e, RECONSTRUCTIONS)}
        own = _cas(e, SAMPLES)
    evaluate_set(e, own)
    return parts | {'sets': processes.run_on_main_process(lambda: all_sets(e))}


def _level_of(reconstruction, label):
    return reconstruction['levels'][label.removesuffix(' only')]['without_finer_levels']


def _on_main(compute: Callable[[], dict]) -> Callable[[], dict]:
    return lambda: processes.run_on_main_process(compute)


def _reconstruction(e: Evaluation) -> dict[str, Any]:
    run, config = e.run, e.run.config
    held_out, training = run.images(e.split), run.images('train')

    def compute():
        task, trained, batch_size = train.vqvae_task(run), workdir.load_vqvae(run), run.batch_size('evaluate')
        with jax.set_mesh(run.mesh):
            eval_fn = make_eval_fn(task, batch_size)
            weights = sharding.put_replicated((trained.params, trained.model_state))

            def metrics(source, name, stop):
                return eval_fn(*weights, feature_store.read_batches(run, source, name, e.stopped, stop=stop))

            found = metrics(held_out, 'reconstruction', len(held_out))
            train_metrics = metrics(training, 'reconstruction, training', min(len(training), _TRAIN_EXAMPLES))
        shapes = map_shapes(config.data.image_size, config.vqvae.downsample_factors)
        image_shape = (*config.data.image_size, config.data.channels)
        return reconstruction_report(found, train_metrics, run.levels, shapes, image_shape, config.vqvae.codebook_size)

    inputs = {'vqvae': workdir.vqvae_record(run).digest, 'images': held_out.digest, 'train': training.digest}
    return evaluate_part(e, 'reconstruction', inputs, {'split': e.split}, compute)


def _first_reconstructions(run: Run) -> dict[str, np.ndarray]:
    """Returns the first images of evaluate.split and their reconstructions, uint8 [N, H, W, C] by label."""
    task, trained, source = train.vqvae_task(run), workdir.load_vqvae(run), run.images(run.config.evaluate.split)
    batches = eval_batches(
        source, batch_size=_PICTURE_COLUMNS, stop=min(_PICTURE_COLUMNS, len(source)), **run.loader_kwargs()
    )
    with contextlib.closing(batches):
        batch = next(batches)
        image = batch['image'][batch['mask']]
    with jax.set_mesh(run.mesh):
        reconstruct = make_reconstruct_fn(task)
        weights = sharding.put_replicated((trained.params, trained.model_state))
        batch_size = sharding.pad_batch_size(_PICTURE_COLUMNS, run.mesh)
        rows = map_examples(functools.partial(reconstruct, *weights), {'image': image}, batch_size)
    return {label: rows[label] for label in task.image_labels}


def _reference_quality(e: Evaluation) -> tuple[dict, dict[str, dict]]:
    """Returns the part of the split's originals, and the metrics of the reconstructions of each row."""
    if e.network is None:
        return {}, {}
    real = reference_features(e, feature_store.image_features, e.reference)
    made = reference_features(e, feature_store.reconstruction_features, e.reference)
    rows = made.settings['rows']

    def compute():
        progress, results = Progress('reconstructions: metrics', len(rows), 'comparisons'), {}
        for number, row in enumerate(rows, start=1):
            results[row] = _quality(e.network.name, real, made, row=row)
            progress.update(number)
        return results

    inputs = {'real': real.digest, RECONSTRUCTIONS: made.digest}
    quality = evaluate_part(e, 'reconstruction_quality', inputs, {}, _on_main(compute))
    if e.reference == e.split:
        reason = 'evaluate.reference is evaluate.split: set it to another split'
        return {'quality': {'missing': reason}}, quality
    originals = reference_features(e, feature_store.image_features, e.split)
    inputs = {'real': real.digest, 'originals': originals.digest}
    compute_originals = _on_main(lambda: _quality(e.network.name, real, originals))
    return {'quality': evaluate_part(e, 'originals', inputs, {}, compute_originals)}, quality


def _quality(network: str, real: Record, generated: Record, row: str = feature_store.IMAGES) -> dict[str, Any]:
    def compute():
        return generative.generative_metrics(
            network, feature_store.load_stats(real), feature_store.load_stats(generated, row)
        )

    return generative.metrics_or_reason(compute)


def _likelihood(e: Evaluation) -> dict[str, Any]:
    run, data = e.run, e.run.config.data
    records = workdir.prior_records(run)

    def compute():
        training, held_out = run.codes('train'), run.codes(e.split)
        counts = min(len(training), _TRAIN_EXAMPLES), len(held_out)
        nll_train, nll = zip(*_nll(e, training, held_out, counts), strict=True)

        def report():
            codes = [list(_read_codes(run, *pair)) for pair in ((training, counts[0]), (held_out, counts[1]))]
            parameters = [found.results['parameters'] for found in records]
            image_shape, size = (*data.image_size, data.channels), run.config.vqvae.codebook_size
            return likelihood_report(run.levels, nll, nll_train, codes[1], codes[0], parameters, size, image_shape)

        return processes.run_on_main_process(report)

    inputs = {'codes': workdir.codes_digest(run)} | {found.directory.name: found.digest for found in records}
    return evaluate_part(e, 'likelihood', inputs, {'split': e.split}, compute)


def _nll(e: Evaluation, training, held_out, counts) -> Iterator[tuple[float, float]]:
    """Yields nats per code of training and of held-out codes, for every level."""
    run, batch_size = e.run, e.run.batch_size('evaluate')
    for level, (name, prior) in enumerate(zip(run.levels, workdir.load_priors(run), strict=True)):
        with jax.set_mesh(run.mesh):
            eval_fn = make_eval_fn(train.prior_task(run, level, visualize=False), batch_size)
            weights = sharding.put_replicated((prior.params, prior.model_state))

            def nll(source, count, what, eval_fn=eval_fn, weights=weights):
                batches = feature_store.read_batches(run, source, what, e.stopped, stop=count)
                return eval_fn(*weights, batches)['nll']

            values = (
                nll(training, counts[0], f'likelihood {name}, training'),
                nll(held_out, counts[1], f'likelihood {name}'),
            )
        yield values


def _read_codes(run: Run, source, count: int) -> Iterator[np.ndarray]:
    """Yields the codes int [N, h, w] of the first examples, for every level."""
    progress, examples = Progress('likelihood: reading codes', count), []
    for i in range(count):
        examples.append(source[i])
        progress.update(i + 1)
    for level in range(len(run.levels)):
        yield np.stack([example[f'codes_{level}'] for example in examples])


def _classifier_accuracy(e: Evaluation) -> dict[str, Any]:
    found = feature_store.image_features(e.run, e.classifier, e.classifier.name, e.split, e.stopped)

    def compute():
        logits, labels = feature_store.load_logits(found)
        return {'accuracy_on_real_images': accuracy(logits.argmax(axis=-1), labels)}

    return evaluate_part(e, 'classifier', {'features': found.digest}, {}, _on_main(compute))


def _cas(e: Evaluation, kind: str) -> dict[str, Any]:
    """Accuracy on real images of the classifier trained on `kind`: 'real', 'reconstructions' or 'samples'."""
    run = e.run
    if kind == 'real':
        directory, job, count = 'classifier', 'classifier', len(run.images('train'))
        name = f'{cas.DIRECTORY}/real' if run.config.reject.classifier else 'classifier'
    else:
        (directory, images), job = cas.sources(run)[kind], 'cas'
        name, count = directory, sample_store.read_set(images).results['count']
    trained = workdir.trained_record(run, directory, job, 'classifier')

    def compute():
        network = feature_store.load_own_classifier(run, directory, job)
        found = {
            '': feature_store.image_features(run, network, name, e.split, e.stopped),
            '_reconstructed': feature_store.reconstruction_features(run, network, name, e.split, e.stopped),
        }
        return processes.run_on_main_process(lambda: {'count': count} | _cas_metrics(run.images(e.split), found))

    inputs = {'classifier': trained.digest, 'images': run.images(e.split).digest}
    inputs['vqvae'] = workdir.vqvae_record(run).digest
    place = f'{cas.DIRECTORY}/real' if kind == 'real' else directory
    return evaluate_part(e, place, inputs, {'split': e.split}, compute)


def _cas_metrics(source, found: dict[str, Record]) -> dict[str, Any]:
    names, results = source.class_names, {}
    for suffix, row in (('', feature_store.IMAGES), ('_reconstructed', ALL_LEVELS)):
        logits, labels = feature_store.load_logits(found[suffix], row)
        results |= {f'top{k}{suffix}': top_k_accuracy(logits, labels, k) for k in (1, 5) if k < len(names)}
        if not suffix:
            each = per_class_accuracy(logits.argmax(axis=-1), labels, len(names))
    return results | {'by_class': dict(zip(names, each, strict=True))}
