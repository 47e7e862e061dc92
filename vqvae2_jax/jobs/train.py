"""The training jobs: stage 1, the priors, the classifier. Each brings a stage its data and its place on disk."""

import functools
from collections.abc import Callable

from vqvae2_jax.config import build as configs
from vqvae2_jax.data.loader import eval_batches, train_batches
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.io import files
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.extract_codes import current_codes_digest
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.tasks import classifier, prior, vqvae
from vqvae2_jax.tasks.task import Task
from vqvae2_jax.training.checkpoint import BestCheckpoint, CheckpointMismatch, read_record, remove_record, write_record
from vqvae2_jax.training.loop import Data, fit


def vqvae_task(run: Run, examples: int | None = None) -> Task:
    """Stage 1 of this run's config; `examples` in its training split (None: they are counted) make an epoch."""
    batch_size = run.config.vqvae.training.batch_size
    steps_per_epoch = -(-(examples or len(run.images('train'))) // batch_size)
    model = configs.make_vqvae(run.config)
    return vqvae.make_task(model, run.levels, run.config.vqvae.commitment_weight, steps_per_epoch)


def prior_task(run: Run, level: int, show: bool = True) -> Task:
    """One level's prior; with `show` it draws pictures, for which stage 1 is loaded."""
    model = configs.make_prior(run.config, level)
    return prior.make_task(model, level, len(run.levels), _decoder(run, level) if show else None)


def classifier_task(run: Run) -> Task:
    """The classifier."""
    return classifier.make_task(configs.make_classifier(run.config))


def train_vqvae(run: Run) -> None:
    """--job=vqvae"""
    augment = {'flip': run.config.data.flip, 'crop': run.config.data.crop}
    train_task(
        run,
        'vqvae',
        'vqvae',
        functools.partial(vqvae_task, run),
        functools.partial(image_data, run, 'vqvae', **augment),
        {'images': run.images_digest()},
    )


def train_prior(run: Run, level_name: str) -> None:
    """--job=prior --level=..."""

    def data():
        train, validation = (run.codes(split) for split in ('train', 'validation'))
        # Codes are read from memory-mapped files: worker processes would only cost.
        return _data(run, f'prior.{level_name}', train, validation, reading={})

    upstream = {'codes': current_codes_digest(run), 'vqvae': workdir.vqvae_record(run)['digest']}
    show = configs.training(run.config, f'prior.{level_name}').show_every > 0
    stage = functools.partial(prior_task, run, run.levels.index(level_name), show)
    train_task(run, f'prior.{level_name}', workdir.prior_directory(level_name), stage, data, upstream)


def train_classifier(run: Run) -> None:
    """--job=classifier"""
    if not configs.has_classifier(run.config):
        raise workdir.JobError(f'data.num_classes={run.config.data.num_classes}: there are no classes to tell apart')
    augment = {'flip': run.config.classifier.flip, 'crop': run.config.classifier.crop}
    data = functools.partial(image_data, run, 'classifier', **augment)
    upstream = {'images': run.images_digest()}
    train_task(run, 'classifier', 'classifier', functools.partial(classifier_task, run), data, upstream)


def train_task(
    run: Run,
    section: str,
    directory: str,
    make: Callable[[], Task],
    make_data: Callable[[], Data],
    upstream: dict[str, str],
) -> None:
    """Trains `section` into `directory` unless it is done, and records it."""
    settings, training = configs.settings(run.config, section), configs.training(run.config, section)
    path = run.path(directory)
    _check_started(path, section, settings, upstream)
    record = read_record(path)
    if record and record['steps'] >= training.steps:
        print(f'{directory}: done ({_line(record)})', flush=True)
        return
    stage = make()  # refuses before anything changes
    if processes.is_main_process():
        files.write_json(path / 'settings.json', {'settings': settings, 'upstream': upstream})
        remove_record(path)  # of fewer steps: from here on its weights may be replaced
    data = make_data()
    try:
        result = fit(stage, training, data, path, name=directory, seed=run.config.seed)
    except CheckpointMismatch:
        if record and processes.is_main_process():
            write_record(path, record)  # its weights are as they were
        raise
    finally:
        data.train.close()
    if processes.is_main_process():
        _record(path, directory, section, result, settings, upstream)


def _record(path, directory, section, result, settings, upstream):
    weights = BestCheckpoint(path)
    best = weights.best()
    record = {
        'schema': 1,
        'stage': section,
        'digest': files.digest_arrays(weights.load()),
        'steps': result['steps'],
        'best_step': best['step'],
        'validation': best['summary'],
        'seconds': result['seconds'],
        'parameters': result['parameters'],
        'upstream': upstream,
        'settings': settings,
        'version': files.package_version(),
    }
    write_record(path, record)
    print(f'{directory}: trained ({_line(record)})', flush=True)


def _check_started(path, section, settings, upstream):
    """Refuses to continue a training that was started otherwise."""
    started = path / 'settings.json'
    if not started.exists():
        return
    before = files.read_json(started)
    hint = f'Give another --workdir, go back to those settings, or delete {path} to train it anew.'
    workdir.check_same(f'the training in {path}', before['settings'], settings, hint)
    workdir.check_digests(
        f'the training in {path}', before['upstream'], upstream, f'Delete {path} to train {section} anew.'
    )


def image_data(run: Run, section: str, train=None, validation=None, **augment) -> Data:
    """This process's part of the images that `section` trains on: the run's, unless others are given."""
    train, validation = train or run.images('train'), validation or run.images('validation')
    return _data(run, section, train, validation, run.reading(), **augment)


def _data(run: Run, section: str, source, validation, reading, **augment) -> Data:
    training = configs.training(run.config, section)
    stop = min(training.eval_examples or len(validation), len(validation))
    shared = {'batch_size': training.batch_size, 'rows': sharding.process_local_rows(training.batch_size), **reading}
    return Data(
        train=train_batches(source, seed=run.config.seed, **augment, **shared),
        held_out=lambda: eval_batches(validation, stop=stop, **shared),
    )


def _decoder(run: Run, level: int):
    """Codes of `level` and coarser ones to images, by the trained stage 1."""
    # As constants on the host: pictures are made on one device of one process.
    model, variables = configs.make_vqvae(run.config), workdir.load_vqvae(run).collections

    def decode(codes):
        if level:
            return model.apply(variables, codes, level, method='preview')
        return model.apply(variables, codes, method='decode')

    return decode


def _line(record: dict) -> str:
    numbers = ', '.join(f'{k} {v:.4g}' for k, v in record['validation'].items())
    return f'best of {record["steps"]} steps is {record["best_step"]}: {numbers}; digest {record["digest"][:12]}'
