"""--job=cas: trains the classifiers of the Classification Accuracy Score (Ravuri and Vinyals 2019; VQ-VAE-2, 5.3).

A classifier trained on generated images alone is tested on real images. One is trained on samples; one on
reconstructions of the training images, which bounds what the priors can reach; the one trained on real images is the
run's own classifier. Network and training are the same. The best weights are chosen on a tenth of the generated images,
so real images serve for the test alone.
"""

import dataclasses
import functools

import jax

from vqvae2_jax import api
from vqvae2_jax.config import build
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.images import open_images
from vqvae2_jax.data.shards import ShardWriter, shard_ranges
from vqvae2_jax.distributed import processes
from vqvae2_jax.distributed.batches import map_missing
from vqvae2_jax.distributed.preemption import stop_signals
from vqvae2_jax.io import record
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import code_inputs, extract_codes, feature_store, train, workdir
from vqvae2_jax.jobs.workdir import RECONSTRUCTIONS, SAMPLES, Run

DIRECTORY = 'cas'
SOURCES = RECONSTRUCTIONS, SAMPLES  # of the training images of the classifiers
_HELD_OUT = 0.1  # fraction of the generated images that the best weights are chosen on


def classification_accuracy_score(run: Run) -> None:
    """Writes reconstructions/, cas/reconstructions and cas/samples/<sample.name>.

    Raises:
      JobError: the data have no classes, or samples or codes are missing.
      StaleInputError, SettingsChangedError: an output was made from other inputs or with other settings.
      Interrupted: a stop signal came; the same command continues.
    """
    if not build.has_classifier(run.config):
        raise JobError(f'data.num_classes={run.config.data.num_classes}: CAS needs classes')
    run.check_files(sample_store.read_set(run.sample_set_path(SAMPLES)))  # refuses before the work begins
    reconstruct(run)
    for source in SOURCES:
        _train(run, source)


def images_directory(run: Run, source: str) -> str:
    """Returns the directory of the training images, 'reconstructions' or 'samples/<sample.name>'.

    The classifier that is trained on them is in cas/<that directory>.
    """
    return source if source == RECONSTRUCTIONS else f'{source}/{run.config.sample.name}'


def directories(run: Run) -> dict[str, str]:
    """Returns the directory of the classifier trained on 'reconstructions' and on 'samples', below the workdir."""
    return {source: f'{DIRECTORY}/{images_directory(run, source)}' for source in SOURCES}


def inputs(run: Run) -> dict[str, str]:
    """Returns the current digests of the inputs of reconstructions/.

    Raises:
      JobError: stage 1 or codes are missing.
    """
    return {'vqvae': workdir.trained_record(run, 'vqvae').digest, 'codes': code_inputs.codes_digest(run)}


def classifier_inputs(run: Run, source: str) -> dict[str, str]:
    """Returns the current digests of the inputs of the classifier trained on 'reconstructions' or 'samples'.

    Raises:
      JobError: these images are not finished.
    """
    return {source: sample_store.read_set(run.path(images_directory(run, source))).digest}


def reconstruct(run: Run) -> None:
    """Decodes the codes of the training images into reconstructions/, in files as those of samples/ but without codes.

    Crops and mirror images are left out: those of a held-out image would be among those that the classifier trains on.
    A restart writes the missing files, of the recorded size. The function enters the run's mesh itself.

    Raises:
      JobError: stage 1 or codes of the training images are missing.
      StaleInputError: they are not those that existing reconstructions were made from.
      Interrupted: a stop signal came; the same call continues.
    """
    directory = run.path(RECONSTRUCTIONS)
    codes = record.read_done(run.path('codes', 'train'), 'extract_codes')
    count = codes.results['count'] // extract_codes.views_per_image(codes.settings)  # images come before their views
    # Of all sample sets, whose shards may differ in size: the size of the first one.
    before = processes.run_on_main_process(lambda: record.read_if_sound(directory))
    size = before.settings['shard_size'] if before else run.config.sample.shard_size
    output = run.open_output(directory, 'cas', inputs(run), {'split': 'train', 'shard_size': size})
    ranges = shard_ranges(count, size)
    missing = sample_store.missing_shards(output, ranges)
    if output.state == record.DONE:
        print(f'reconstructions: done ({count} images in {directory})', flush=True)
        return
    source = run.codes('train')

    def write(shard, arrays):
        arrays = {'arr_0': arrays['image'], 'label': arrays['label'], 'index': arrays['index'].astype('int64')}
        path = sample_store.shard_path(directory, *shard)
        sample_store.write_npz(path, arrays)
        output.add_files(path.name)

    writer = ShardWriter(missing, lambda *args: processes.run_on_main_process(lambda: write(*args)))
    with run.lock(directory, output.job, output), stop_signals() as received_signal:
        with jax.set_mesh(run.mesh):
            generator = workdir.load_generator(run, with_priors=False)
            parameters = workdir.generator_size(generator)
            run.print_start(RECONSTRUCTIONS, f'{count} codes', parameters=parameters, batch='codes')

            def decode(batch):
                codes = [batch[f'codes_{level}'] for level in range(len(run.levels))]
                return {'image': api.decode(generator, codes)}

            processes.run_on_main_process(output.start)
            read = functools.partial(
                feature_store.read_batches, run, source, RECONSTRUCTIONS, received_signal, section='codes'
            )
            for start, arrays in map_missing(decode, missing, read, run.batch_size('codes'), count):
                writer.add(start, arrays)
        processes.run_on_main_process(lambda: output.finish({'count': count}))
    print(f'reconstructions: {count} training images in {directory}', flush=True)


def _train(run: Run, source: str) -> None:
    """Trains the classifier on 'reconstructions' or 'samples'."""
    images = run.path(images_directory(run, source))
    image_set = sample_store.read_set(images)
    changes = {'splits': (), 'split_seed': 0, 'held_out': (_HELD_OUT, 0.0), 'on_error': 'raise'}

    def make_data():
        path = sample_store.local_files(images)
        spec = dataclasses.replace(build.image_spec(run.config), name='npz', path=path, **changes)
        try:
            train_images, val_images = (open_images(spec, split) for split in ('train', 'validation'))
        except ValueError as error:
            count, classes = image_set.results['count'], run.config.data.num_classes
            raise JobError(f'CAS: {count} {source} of {classes} classes are too few to train on ({error})') from error
        augment = {'flip': run.config.classifier.flip, 'crop': run.config.classifier.crop}
        return train.image_data(run, 'classifier', train_images, val_images, **augment)

    directory = directories(run)[source]
    train.train_network(run, 'classifier', make_data, classifier_inputs(run, source), directory)
