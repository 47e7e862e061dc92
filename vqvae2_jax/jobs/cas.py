"""--job=cas: trains the classifiers of the Classification Accuracy Score (Ravuri and Vinyals 2019; VQ-VAE-2, 5.3).

A classifier trained on generated images alone is tested on real images. One is trained on samples; one on
reconstructions of the training images, which bounds what the priors can reach; the one trained on real images is the
run's own classifier. Network and training are the same. The best weights are chosen on a tenth of the generated images,
so real images serve for the test alone.
"""

import dataclasses
import functools
import glob
import os

import jax

from vqvae2_jax import inference
from vqvae2_jax.config import build as configs
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.images import open_images
from vqvae2_jax.data.shards import ShardWriter, shard_ranges
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.distributed.batches import map_missing
from vqvae2_jax.distributed.preemption import stop_signals
from vqvae2_jax.io import gcs, record
from vqvae2_jax.jobs import feature_store, train, workdir
from vqvae2_jax.jobs.workdir import RECONSTRUCTIONS, SAMPLES, JobError, Run

DIRECTORY = 'cas'
_HELD_OUT = 0.1  # fraction of the generated images that the best weights are chosen on


def classification_accuracy_score(run: Run) -> None:
    """Writes reconstructions/, cas/reconstructions and cas/samples/<sample.name>.

    Raises:
      JobError: the data have no classes, or samples or codes are missing.
      StaleInputError, SettingsChangedError: an output was made from other inputs or with other settings.
      Interrupted: a stop signal came; the same command continues.
    """
    if not configs.has_classifier(run.config):
        raise JobError(f'data.num_classes={run.config.data.num_classes}: CAS needs classes')
    sample_store.shard_paths(run.set_path(SAMPLES))  # refuses before the work begins
    reconstruct(run)
    for kind, (directory, images) in sources(run).items():
        _train(run, kind, directory, images)


def sources(run: Run) -> dict:
    """Returns kind -> (directory of the classifier below the workdir, its training images)."""
    return {
        RECONSTRUCTIONS: (f'{DIRECTORY}/{RECONSTRUCTIONS}', run.path(RECONSTRUCTIONS)),
        SAMPLES: (f'{DIRECTORY}/{SAMPLES}/{run.config.sample.name}', run.set_path(SAMPLES)),
    }


def reconstruct(run: Run) -> None:
    """Decodes the codes of the training images into reconstructions/, in the layout of samples/; a restart continues.

    Raises:
      JobError, StaleInputError, SettingsChangedError, Interrupted: as `classification_accuracy_score`.
    """
    directory = run.path(RECONSTRUCTIONS)
    count = record.read_done(run.path('codes', 'train'), 'extract_codes').results['count']
    before = processes.run_on_main_process(lambda: record.read(directory))
    # Of all sample sets, whose shards may differ in size: the size of the first one.
    size = before.settings.get('shard_size') if before else run.config.sample.shard_size
    output = run.open_output(directory, 'cas', _codes_digests(run), {'split': 'train', 'shard_size': size})
    ranges = shard_ranges(count, size)
    missing = processes.run_on_main_process(lambda: sample_store.missing_shards(directory, ranges))
    if output.state == record.DONE and not missing:
        print(f'reconstructions: done ({count} images in {directory})', flush=True)
        return
    with stop_signals() as stopped:
        _write_reconstructions(run, output, run.codes('train'), missing, stopped)
        processes.run_on_main_process(lambda: output.finish({'count': count}))
    print(f'reconstructions: {count} training images in {directory}', flush=True)


def _write_reconstructions(run, output, source, missing, stopped):
    batch_size = run.batch_size('codes')

    def write(limits, arrays):
        arrays = {'arr_0': arrays['image'], 'label': arrays['label'], 'index': arrays['index'].astype('int64')}
        path = sample_store.shard_path(output.directory, *limits)
        processes.run_on_main_process(lambda: sample_store.write_npz(path, arrays))

    writer = ShardWriter(missing, write)
    with jax.set_mesh(run.mesh):
        variables = workdir.load_vqvae(run).variables
        run.print_start(
            RECONSTRUCTIONS,
            f'{len(source)} codes',
            parameters=workdir.num_parameters(variables['params']),
            batch='codes',
        )
        decode = inference.make_decode_fn(configs.make_vqvae(run.config))
        decode = functools.partial(decode, sharding.put_sharded(variables))
        processes.run_on_main_process(output.start)
        read = functools.partial(feature_store.read_batches, run, source, RECONSTRUCTIONS, stopped, section='codes')
        for start, arrays in map_missing(decode, missing, read, batch_size, len(source)):
            writer.add(start, arrays)


def _train(run, kind, directory, images):
    """Trains a classifier on the images of a directory."""
    found = sample_store.read_set(images)
    sample_store.shard_paths(images)  # refuses a set that lacks files
    folder = str(images) if gcs.is_remote(images) else glob.escape(str(images))
    changes = {'splits': (), 'split_seed': 0, 'held_out': (_HELD_OUT, 0.0), 'on_error': 'raise'}

    def make_data():
        path = gcs.local_copy(os.path.join(folder, 'samples-*.npz'), found.digest)
        spec = dataclasses.replace(configs.image_spec(run.config), name='npz', path=path, **changes)
        try:
            train_images, val_images = (open_images(spec, split) for split in ('train', 'validation'))
        except ValueError as error:
            count, classes = found.results['count'], run.config.data.num_classes
            raise JobError(f'CAS: {count} {kind} of {classes} classes are too few to train on ({error})') from error
        augment = {'flip': run.config.classifier.flip, 'crop': run.config.classifier.crop}
        return train.image_data(run, 'classifier', train_images, val_images, **augment)

    make_task = functools.partial(train.classifier_task, run)
    train.train_task(run, 'classifier', directory, 'cas', make_task, make_data, {kind: found.digest})


def _codes_digests(run):
    return {'vqvae': workdir.vqvae_record(run).digest, 'codes': workdir.codes_digest(run)}


def check_inputs(run: Run) -> None:
    """Refuses classifiers that were trained on other images than the current ones.

    Raises:
      JobError: reconstructions or a classifier are missing.
      StaleInputError: with both digests.
    """
    directory = run.path(RECONSTRUCTIONS)
    hint = f'delete {directory} and {record.job_command("cas")}'
    record.check_inputs(directory, sample_store.read_set(directory).inputs, _codes_digests(run), hint)
    for kind, (place, images) in sources(run).items():
        trained = workdir.trained_record(run, place, 'cas', 'classifier')
        hint = f'delete {run.path(place)} and {record.job_command("cas")}'
        record.check_inputs(run.path(place), trained.inputs, {kind: sample_store.read_set(images).digest}, hint)
