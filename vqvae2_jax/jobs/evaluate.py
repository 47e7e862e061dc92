"""--job=evaluate: all numbers of a run, on images that nothing was trained or chosen on.

The report has the parts whose inputs exist: stage 1 alone gives the reconstructions, priors and codes the likelihoods,
a sample set its metrics. It says which parts are missing, and which job they wait for (see available.py).

Parts are kept in evaluation/<part>/record.json, and features of images in features/ (see feature_store.py). A part is
computed again only if its inputs or settings change: a restart continues, and another sample set costs only its own
images (see evaluate_samples.py).

With evaluate.real and evaluate.generated the job compares two sets of images instead (see compare.py).
"""

import contextlib
import functools
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np

from vqvae2_jax import api
from vqvae2_jax.config import build
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.codes import name_levels
from vqvae2_jax.data.images import ImageSource
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
from vqvae2_jax.jobs import (
    cas,
    code_inputs,
    compare,
    extract_codes,
    feature_store,
    reference_sets,
    reject,
    train,
    workdir,
)
from vqvae2_jax.jobs.available import find_missing
from vqvae2_jax.jobs.evaluate_samples import all_sets, count_by_class, evaluate_set
from vqvae2_jax.jobs.evaluation_parts import Evaluation, evaluate_part
from vqvae2_jax.jobs.report_files import DIRECTORY, Examples, write_report
from vqvae2_jax.jobs.workdir import RECONSTRUCTIONS, REJECTION, SAMPLES, SKIPPED, Run
from vqvae2_jax.metrics.classification import accuracy, per_class_accuracy, top_k_accuracy
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
    missing = processes.run_on_main_process(lambda: find_missing(run))
    for part, reason in missing.items():
        print(f'evaluate: without {part}: {reason}', flush=True)
    processes.run_on_main_process(lambda: check_inputs(run, missing))
    has_classifier = build.has_classifier(run.config) and 'classifier' not in missing
    classifier = feature_store.load_classifier(run) if has_classifier else None
    network = feature_store.load_inception(run) if options.inception else classifier
    source = run.data(options.split)
    data = f'{len(source)} {options.split} {source.kind}'
    parameters = workdir.num_parameters(network.params) if network else None
    run.print_start('evaluate', data, parameters=parameters, batch='evaluate')
    try:
        # Evaluations of other sets write the same parts and features.
        with run.lock(run.path(DIRECTORY), 'evaluate'), stop_signals() as received_signal:
            others = reference_sets.open_references(run, network)
            parts = evaluate_parts(Evaluation(run, network, classifier, received_signal, others, missing))
            quality = generative.protocol(network, generative.IMAGES_OF_RUN) if network else None
            examples = _first_reconstructions(run) if run.has_stage_1 else None
            processes.run_on_main_process(lambda: write_report(run, parts, missing, quality, examples))
    except Interrupted:
        print('evaluate: stopped; the same command continues', flush=True)
        raise


def check_inputs(run: Run, missing: Collection[str]) -> None:
    """Refuses outputs that were made from other inputs than the current ones.

    Args:
      run: the run.
      missing: parts of the report that are left out, from `find_missing`.

    Raises:
      JobError: an output is damaged; the message names the job that makes it.
      StaleInputError: with both digests.
    """
    for output, inputs, job in _outputs(run, missing):
        hint = f'delete {output.directory} and {record.job_command(job)}'
        record.check_inputs(output.directory, output.inputs, inputs, hint)


def _outputs(run: Run, missing: Collection[str]) -> Iterator[tuple[Record, dict[str, str], str]]:
    """Yields the record of every output that the report reads, the current digests of its inputs, and its job."""
    if run.has_stage_1:
        yield workdir.trained_record(run, 'vqvae'), train.inputs(run, 'vqvae'), 'vqvae'
    if 'likelihood' not in missing:
        for split, codes in code_inputs.codes_records(run).items() if run.has_stage_1 else ():
            yield codes, extract_codes.inputs(run, split), 'extract_codes'
        for section in run.prior_sections:
            yield workdir.trained_record(run, section), train.inputs(run, section), workdir.training_job(section)
    if 'samples' not in missing:
        yield sample_store.read_set(run.sample_set_path(SAMPLES)), workdir.generator_digests(run), 'sample'
    if not build.has_classifier(run.config):
        return
    if build.trains_classifier(run.config) and 'classifier' not in missing:
        trained = workdir.trained_record(run, 'classifier')
        yield trained, train.inputs(run, 'classifier'), 'classifier'
    if 'rejection' not in missing:
        yield record.read_done(run.sample_set_path(REJECTION), 'reject'), reject.inputs(run), 'reject'
    if build.has_cas(run.config) and 'cas' not in missing:
        yield sample_store.read_set(run.path(RECONSTRUCTIONS)), cas.inputs(run), 'cas'
        for source, directory in cas.directories(run).items():
            trained = workdir.trained_record(run, 'classifier', directory)
            yield trained, cas.classifier_inputs(run, source), 'cas'


def evaluate_parts(e: Evaluation) -> dict[str, Any]:
    """Computes all parts of the report that are not kept from before.

    Returns:
      Those of the entries 'reconstruction', 'originals', 'likelihood', 'classifier' and 'cas' of report.json that are
      not missing, and 'sets'.
    """
    parts = _image_parts(e) if e.run.has_stage_1 else {}
    if 'likelihood' not in e.missing:
        parts['likelihood'] = _likelihood(e)
    if e.classifier is not None:
        parts['classifier'] = _classifier_accuracy(e)
    if e.has_cas:
        parts['cas'] = {source: _cas(e, source) for source in ('real', RECONSTRUCTIONS)}
    if 'samples' not in e.missing:
        evaluate_set(e, _cas(e, SAMPLES) if e.has_cas else None)
    return parts | {'sets': processes.run_on_main_process(lambda: all_sets(e))}


def _image_parts(e: Evaluation) -> dict[str, Any]:
    """Computes the parts 'reconstruction' and 'originals'."""
    originals, quality = _reference_quality(e)
    reconstruction = _reconstruction(e)
    for row, metrics in quality.items():
        level = reconstruction['levels'].get(row.removesuffix(' only'))  # None: from all levels
        (level['without_finer_levels'] if level else reconstruction)['quality'] = metrics
    return {'reconstruction': reconstruction, 'originals': originals}


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
        image_shape, codebook_size = (*config.data.image_size, config.data.channels), config.vqvae.codebook_size
        shapes = run.code_spec.shapes
        return reconstruction_report(held_out_metrics, train_metrics, run.levels, shapes, image_shape, codebook_size)

    inputs = {'vqvae': workdir.trained_record(run, 'vqvae').digest, 'images': held_out.digest, 'train': training.digest}
    return evaluate_part(e, 'reconstruction', inputs, compute)


def _first_reconstructions(run: Run) -> Examples:
    """Returns the first readable images of evaluate.split, with their reconstructions and codes."""
    task, trained = train.make_task(run, 'vqvae'), workdir.load_trained(run, 'vqvae')
    source = run.images(run.config.evaluate.split)
    image, label = _first_images(run, source)
    with jax.set_mesh(run.mesh):
        weights = sharding.put_replicated((trained.params, trained.model_state))
        reconstruct = functools.partial(make_reconstruct_fn(task), *weights)
        generator = workdir.load_generator(run, with_priors=False)
        batch_size = sharding.pad_batch_size(_PICTURE_COLUMNS, run.mesh)
        pictures = map_examples(reconstruct, {'image': image}, batch_size)
        codes = map_examples(lambda b: name_levels(api.encode(generator, b['image'])), {'image': image}, batch_size)
    levels = range(len(run.levels))
    return Examples(
        images={row: pictures[row] for row in task.image_labels},
        class_names=[source.class_names[i] for i in label] if source.class_names else (),
        codes=[codes[f'codes_{level}'] for level in levels],
        codebooks=[trained.model_state['codebook'][f'quantizers_{level}']['embedding'] for level in levels],
    )


def _first_images(run: Run, source: ImageSource) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first readable images of a split, uint8 [N, H, W, C], and their labels, int32 [N]."""
    images, labels = [], []
    batches = eval_batches(source, batch_size=_PICTURE_COLUMNS, skip_log=str(run.path(SKIPPED)))
    with contextlib.closing(batches):
        for batch in batches:
            images += list(batch['image'][batch['mask']])
            labels += list(batch['label'][batch['mask']])
            if len(images) >= _PICTURE_COLUMNS:
                break
    return np.stack(images[:_PICTURE_COLUMNS]), np.stack(labels[:_PICTURE_COLUMNS])


def _reference_quality(e: Evaluation) -> tuple[dict, dict[str, dict]]:
    """Returns the part of the split's originals, and the metrics of the reconstructions of each row."""
    run, network = e.run, e.network
    if network is None:
        return {}, {}
    real = feature_store.image_features(run, network, e.reference, e.received_signal)
    reconstructed = feature_store.reconstruction_features(run, network, e.reference, e.received_signal)

    reference_sets.extract(run, network, e.references, e.received_signal)

    def compute(generated: Record, labels: dict[str, str]):
        real_stats, results = feature_store.load_stats(real), {}
        for row, label in labels.items():
            stats = feature_store.load_stats(generated, row)
            results[row] = generative.metrics_or_reason(network.name, real_stats, stats, label)
            if row == ALL_LEVELS:
                results[row]['references'] = reference_sets.compare(run, network, e.references, stats, label)
        return results

    rows = {row: f'reconstructions, {row}' for row in reconstructed.settings['rows']}
    inputs = {'real': real.digest, RECONSTRUCTIONS: reconstructed.digest}
    inputs |= {f'reference {name}': reference.digest for name, reference in e.references.items()}
    quality = evaluate_part(
        e, 'reconstruction_quality', inputs, lambda: compute(reconstructed, rows), main_process_only=True
    )
    if e.reference == e.split:
        reason = 'the images are compared with themselves: set evaluate.references to another split'
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
            image_shape = (*config.data.image_size, config.data.channels) if run.has_stage_1 else None
            nll_train, nll_held_out = zip(*nll, strict=True)
            codes = arrays[1], arrays[0], run.code_spec.codebook_sizes
            return likelihood_report(run.levels, nll_held_out, nll_train, *codes, parameters, image_shape)

        return processes.run_on_main_process(report)

    inputs = {'codes': code_inputs.codes_digest(run)} | {prior.directory.name: prior.digest for prior in records}
    return evaluate_part(e, 'likelihood', inputs, compute)


def _classifier_accuracy(e: Evaluation) -> dict[str, Any]:
    features = feature_store.image_features(e.run, e.classifier, e.split, e.received_signal)

    def compute():
        logits, labels = feature_store.load_logits(features)
        predicted, names = logits.argmax(axis=-1), e.run.images(e.split).class_names
        return {
            'accuracy_on_real_images': accuracy(predicted, labels),
            'accuracy_by_class': dict(zip(names, per_class_accuracy(predicted, labels, len(names)), strict=True)),
            'count_by_class': count_by_class(names, labels),
        }

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
