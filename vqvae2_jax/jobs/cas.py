"""--job=cas: Classification Accuracy Score (Ravuri and Vinyals 2019; VQ-VAE-2 section 5.3).

A classifier that has seen generated images alone is tested on real ones: it can only know what the generator knows. One
is trained on samples, one on reconstructions of the training images, which bounds what the priors can reach; the one
trained on real images is the run's own classifier. Same network and training. The weights that are kept are the
best on a tenth of the generated images, held out: real images are for the test alone.
"""

import functools
import glob
import os

import jax
import numpy as np

from vqvae2_jax.config import build as configs
from vqvae2_jax.data import samples
from vqvae2_jax.data.images import ImageSpec, open_images
from vqvae2_jax.data.loader import eval_batches
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.distributed.preemption import stop_signals
from vqvae2_jax.evaluation import features
from vqvae2_jax.io import files
from vqvae2_jax.jobs import extract_codes, sample, train, workdir
from vqvae2_jax.jobs.workdir import JobError, Run
from vqvae2_jax.metrics.classification import per_class_accuracy, top_k_accuracy
from vqvae2_jax.tasks.task import to_uint8
from vqvae2_jax.tasks.vqvae import ALL_LEVELS

DIRECTORY, RECONSTRUCTIONS = 'cas', 'reconstructions'
SOURCES = {'reconstructions': RECONSTRUCTIONS, 'samples': sample.DIRECTORY}
_HELD_OUT = 0.1


def classification_accuracy_score(run: Run) -> None:
    """Writes reconstructions/, cas/reconstructions and cas/samples."""
    if not configs.has_classifier(run.config):
        raise JobError(f'data.num_classes={run.config.data.num_classes}: CAS needs classes')
    processes.run_on_main_process(lambda: reconstruct(run))
    for name, directory in SOURCES.items():
        _train(run, name, run.path(directory))


def reconstruct(run: Run) -> None:
    """Decodes the codes of the training images into reconstructions/, in the layout of samples/."""
    directory, source = run.path(RECONSTRUCTIONS), run.codes('train')
    size = run.config.codes.batch_size
    meta = {
        'schema': 1,
        'count': len(source),
        'batch_size': size,
        'split': 'train',
        'upstream': _origin(run),
        'version': files.package_version(),
    }
    if (directory / 'meta.json').exists():
        before, hint = samples.read_meta(directory), f'Delete {directory} to make them anew.'
        workdir.check_digests(str(directory), before['upstream'], meta['upstream'], hint)
        workdir.check_same(str(directory), {'batch_size': before['batch_size']}, {'batch_size': size}, hint)
    model, variables = configs.make_vqvae(run.config), workdir.load_vqvae(run).on_devices()
    files.write_json(directory / 'meta.json', meta)
    decode = jax.jit(lambda codes: to_uint8(model.apply(variables, extract_codes, method='decode')))
    keys = [f'codes_{level}' for level in range(len(run.levels))]
    ranges = samples.shard_ranges(len(source), size)
    done = 0
    while done < len(ranges) and samples.shard_path(directory, *ranges[done]).exists():
        done += 1
    batches = eval_batches(source, batch_size=size, start=min(done * size, len(source)))
    with stop_signals() as stopped:
        for (start, stop), batch in zip(ranges[done:], batches, strict=True):
            images = np.asarray(decode(tuple(sharding.make_global_batch({key: batch[key] for key in keys}).values())))
            arrays = {'arr_0': images, 'label': batch['label'], 'index': batch['index']}
            arrays = {name: array[: stop - start] for name, array in arrays.items()}
            samples.write_npz(samples.shard_path(directory, start, stop), arrays)
            if stopped():
                break
    print(f'reconstructions: {len(source)} training images in {directory}', flush=True)


def _train(run, name, directory):
    """Trains cas/<name> on the images of a directory."""
    samples.shard_paths(directory)  # all are there
    data = run.config.data
    spec = ImageSpec(
        name='npz',
        path=os.path.join(glob.escape(str(directory)), 'samples-*.npz'),
        image_size=data.image_size,
        channels=data.channels,
        num_classes=data.num_classes,
        held_out=(_HELD_OUT, 0.0),
    )
    augment = {'flip': run.config.classifier.flip, 'crop': run.config.classifier.crop}

    def images():
        try:
            train, validation = (open_images(spec, split) for split in ('train', 'validation'))
        except ValueError as error:
            count, classes = samples.read_meta(directory)['count'], data.num_classes
            raise JobError(f'CAS: {count} {name} of {classes} classes are too few to train on ({error})') from error
        return train.image_data(run, 'classifier', train, validation, **augment)

    make, upstream = functools.partial(train.classifier_task, run), {name: samples.digest(directory)}
    train.train_task(run, 'classifier', f'{DIRECTORY}/{name}', make, images, upstream)


def _origin(run):
    return {'vqvae': workdir.vqvae_record(run)['digest'], 'codes': extract_codes.current_codes_digest(run)}


def check_upstreams(run: Run) -> None:
    """Refuses when the classifiers were trained on other images than those there now."""
    directory = run.path(RECONSTRUCTIONS)
    hint = f'Delete {directory} and run --job=cas again.'
    workdir.check_digests('the reconstructions', samples.read_meta(directory)['upstream'], _origin(run), hint)
    for name, source in SOURCES.items():
        trained = workdir.trained_record(run, f'{DIRECTORY}/{name}', 'cas')
        current = {name: samples.digest(run.path(source))}
        hint = f'Delete {run.path(DIRECTORY, name)} and run --job=cas again.'
        workdir.check_digests(f'the classifier of {name}', trained['upstream'], current, hint)


def measure(run: Run, reconstruct, split: str) -> dict[str, dict]:
    """Accuracy on the real images of a split of classifiers trained on real images, reconstructions and samples.

    Args:
      reconstruct: measure.Seen's; the paper also tests on reconstructions.

    Returns:
      {'real': {...}, 'reconstructions': {...}, 'samples': {...}}, each with top1, top5 (where there are more classes
      than five), the same on reconstructed test images, by_class, and how many images it was trained on.
    """
    directories = {'real': 'classifier', **{name: f'{DIRECTORY}/{name}' for name in SOURCES}}
    judges = {
        name: features.classify(run, workdir.load_trained(run, directory, 'cas'))
        for name, directory in directories.items()
    }
    source, labels, logits = run.images(split), [], {}
    for batch in eval_batches(source, batch_size=run.config.sample.batch_size, **run.reading()):
        kept, images = batch['mask'], batch['image']
        labels.append(batch['label'][kept])
        for suffix, shown in (('', images), ('_reconstructed', reconstruct(images)[ALL_LEVELS])):
            for name, classifier_network in judges.items():
                logits.setdefault((name, suffix), []).append(classifier_network(shown)['logits'][kept])
    labels, names, found = np.concatenate(labels), source.class_names, {}
    for name in directories:
        count = samples.read_meta(run.path(SOURCES[name]))['count'] if name in SOURCES else len(run.images('train'))
        found[name] = {'count': count}
        scores = {suffix: np.concatenate(logits[name, suffix]) for suffix in ('', '_reconstructed')}
        for suffix, rows in scores.items():
            found[name] |= {f'top{k}{suffix}': top_k_accuracy(rows, labels, k) for k in (1, 5) if k < len(names)}
        each = per_class_accuracy(scores[''].argmax(axis=-1), labels, len(names))
        found[name]['by_class'] = dict(zip(names, each, strict=True))
    return found
