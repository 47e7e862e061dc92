"""--job=vqvae, prior, classifier: each gives its task and its data to the training loop, and records the result."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from etils import epath

from vqvae2_jax.config import build, portable
from vqvae2_jax.data.images import ImageSource
from vqvae2_jax.data.loader import eval_batches, train_batches
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.io import files, plots, record, trackers
from vqvae2_jax.io.record import JobError, Record
from vqvae2_jax.io.trackers import TrackerSpec
from vqvae2_jax.jobs import code_inputs, inspect_data, pretrained, remedies, workdir
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.kernels import select
from vqvae2_jax.planning import cost, hardware
from vqvae2_jax.tasks import classifier, prior, vqvae
from vqvae2_jax.tasks.task import Task, to_float
from vqvae2_jax.training import recovery
from vqvae2_jax.training.checkpoint import (
    CHECKPOINTS,
    BestCheckpoint,
    CheckpointMismatch,
    checkpoint_steps,
    finish_weights,
)
from vqvae2_jax.training.loop import Data, train


def make_task(
    run: Run,
    section: str,
    *,
    examples: int | None = None,
    visualize: bool = False,
    implementations: select.Implementations = select.REFERENCES,
) -> Task:
    """Makes the task that trains the network of a section of the config.

    Args:
      run: the run.
      section: 'vqvae', 'prior.<level>' or 'classifier'.
      examples: of stage 1: the number of images in an epoch; None: opens the training split.
      visualize: of a prior: loads stage 1 if there is one, for pictures.
      implementations: of functions of the network, for the devices of the run.

    Raises:
      JobError: images or stage 1 are needed and missing.
    """
    config = run.config
    if section == 'vqvae':
        steps_per_epoch = -(-(examples or len(run.images('train'))) // config.vqvae.training.batch_size)
        model = build.make_vqvae(config, implementations)
        return vqvae.make_task(model, run.levels, config.vqvae.commitment_weight, steps_per_epoch)
    if section == 'classifier':
        return classifier.make_task(build.make_classifier(config))
    level = run.prior_sections.index(section)
    decode = _decoder(run, level) if visualize else None
    return prior.make_task(build.make_prior(config, level, implementations), level, len(run.levels), decode)


def inputs(run: Run, section: str) -> dict[str, str]:
    """Returns the current digests of the inputs of a training.

    Args:
      run: the run.
      section: section of the config: 'vqvae', 'prior.<level>' or 'classifier'.

    Returns:
      The digests by name; for imported weights those of their record: the images are unknown.

    Raises:
      JobError: an input is missing.
      StaleInputError: another stage 1 made the codes.
    """
    if imported := workdir.imported_record(run, section):
        return imported.inputs
    if section.startswith('prior.'):
        stage_1 = {'vqvae': workdir.trained_record(run, 'vqvae').digest} if run.has_stage_1 else {}
        data = {'codes': code_inputs.codes_digest(run), **stage_1}
    else:
        data = {'images': run.images_digest()}
    return data | pretrained.input_digest(run, section)


def train_vqvae(run: Run) -> None:
    """Trains stage 1 (--job=vqvae).

    Raises:
      JobError: the workdir has imported weights; images are missing; as `train_network`.
    """
    _refuse_imported(run, 'vqvae', 'extract_codes')
    augment = {'flip': run.config.data.flip, 'crop': run.config.data.crop}
    train_network(run, 'vqvae', functools.partial(image_data, run, 'vqvae', **augment), inputs(run, 'vqvae'))


def train_prior(run: Run, level_name: str) -> None:
    """Trains the prior of a level (--job=prior --level=...).

    Raises:
      JobError: stage 1 or codes are missing; as `train_network`.
      StaleInputError: another stage 1 made the codes.
    """
    section = f'prior.{level_name}'
    _refuse_imported(run, section, 'sample')

    def make_data():
        # Codes are read from memory-mapped files: worker processes would only cost.
        return _make_data(run, section, run.codes('train'), run.codes('validation'), {})

    train_network(run, section, make_data, inputs(run, section))


def train_classifier(run: Run) -> None:
    """Trains the classifier (--job=classifier).

    Raises:
      JobError: there are no classes; images are missing; as `train_network`.
    """
    if not build.has_classifier(run.config):
        raise JobError(f'data.num_classes is {run.config.data.num_classes}: a classifier needs at least 2')
    augment = {'flip': run.config.classifier.flip, 'crop': run.config.classifier.crop}
    make_data = functools.partial(image_data, run, 'classifier', **augment)
    train_network(run, 'classifier', make_data, inputs(run, 'classifier'))


def _refuse_imported(run, section, next_job):
    if processes.run_on_main_process(lambda: workdir.imported_record(run, section)):
        directory, job = run.path(workdir.training_directory(section)), workdir.training_job(section)
        raise JobError(
            f'{directory} holds imported weights, which --job={job} would replace: give another --workdir to train '
            f'(from these weights, by --from), or continue with them, by --job={next_job}'
        )


def train_network(
    run: Run, section: str, make_data: Callable[[], Data], digests: dict[str, str], directory: str = ''
) -> None:
    """Trains the network of a section of the config, unless that is done, and records it.

    Args:
      run: the run.
      section: the section, such as 'prior.top'.
      make_data: opens the data; called only if there is something to train.
      digests: digests of the inputs, by name.
      directory: output of --job=cas, below the workdir; '': `workdir.training_directory(section)`.

    Raises:
      StaleInputError, SettingsChangedError: the training was started with other inputs or settings.
      JobError, NonFiniteLoss, CheckpointMismatch, Interrupted: as `loop.train`.
    """
    config, job = build.train_config(run.config, section), 'cas' if directory else workdir.training_job(section)
    directory = directory or workdir.training_directory(section)
    path, settings = run.path(directory), build.settings(run.config, section)

    def is_done(output):
        return output.state == record.DONE and output.results['steps'] >= config.steps

    if run.continue_from is None and processes.run_on_main_process(lambda: record.read_if_done(path)):
        output = processes.run_on_main_process(
            lambda: record.open_output(path, job, digests, settings, hint=_hint(run, section, path))
        )
        if is_done(output) and not output.find_damaged_together():
            print(f'{directory}: done ({_summary(output.results)})', flush=True)
            return
    with run.lock(path, job):
        processes.run_on_main_process(lambda: recovery.restore_record(path))
        if run.continue_from is not None:
            continue_training(run, section, path, digests, settings)
        output = run.open_output(path, job, digests, settings, hint=_hint(run, section, path))
        if is_done(output):  # since it was read
            print(f'{directory}: done ({_summary(output.results)})', flush=True)
            return
        _train(run, section, make_data, output, directory)


def _train(run: Run, section: str, make_data: Callable[[], Data], output: Record, directory: str) -> None:
    """Trains and records a network, under the lock of its directory."""
    config = build.train_config(run.config, section)
    implementations = select.for_device(run.mesh.devices.flat[0])
    task = make_task(run, section, visualize=config.image_every > 0, implementations=implementations)
    initial = pretrained.initial_weights(run, section, output.inputs)
    data = make_data()  # may refuse, as the task
    before = dataclasses.replace(output)
    tracker = TrackerSpec(run.config.tracker, run.config.name, output.settings) if run.config.tracker else None
    processes.run_on_main_process(lambda: trackers.check(tracker, output.directory))
    try:
        recovery.recover(output.directory, directory, has_record=output.state != record.MISSING)
        # FLOPs are counted in the references: a kernel may do more, or hide them.
        parameters, flops = _count(make_task(run, section, examples=1), data, config.batch_size, run.mesh)
        run.print_start(directory, data.description, parameters=parameters)
        output.files = {}  # even if fewer steps are done: the weights may be replaced
        processes.run_on_main_process(output.start)
        with remedies.of_training(run, section, output.directory):
            result = train(
                *(task, config, data, output.directory),
                **{'mesh': run.mesh, 'name': directory, 'seed': run.config.seed, 'output': output},
                **{'initial': initial, 'tracker': tracker, **flops},
            )
    except CheckpointMismatch:
        if before.state == record.DONE and processes.is_main_process():
            before.write()  # its weights are unchanged
        raise
    finally:
        data.train.close()
    results = processes.run_on_main_process(lambda: _finish(run, output, result))
    print(f'{directory}: trained ({_summary(results)})', flush=True)


def continue_training(run: Run, section: str, directory: epath.Path, digests: dict[str, str], settings: dict) -> None:
    """Goes back to the checkpoint --continue_from, with changed fields <section>.training.

    Later checkpoints move to abandoned/. The record of the training lists the changes.

    Args:
      run: the run; its `continue_from` is the step.
      section: section of the config.
      directory: directory of the training.
      digests: current digests of the inputs, by name.
      settings: the current settings of the training.

    Raises:
      JobError: there is no training or no sound checkpoint of this step, or no field of the training is changed.
      StaleInputError, SettingsChangedError: inputs or other settings have changed.
    """

    def go_back():
        output, step = record.read(directory), run.continue_from
        if output is None:
            raise JobError(f'--continue_from={step}: there is no training in {directory}')
        before, now, prefix = output.settings, files.to_json(settings, 'settings'), f'{section}.training.'
        # Anything else that differs is refused before anything changes.
        record.check_inputs(directory, output.inputs, digests, f'delete {directory} to train it again')
        others = [{k: v for k, v in fields.items() if not k.startswith(prefix)} for fields in (before, now)]
        record.check_settings_match(directory, *others)
        names = sorted(name for name in before.keys() | now.keys() if name.startswith(prefix))
        changed = [name for name in names if before.get(name) != now.get(name)]
        if not changed and output.changes and output.changes[-1][0] == step:
            return  # the same command, again
        if not changed:
            raise JobError(
                f'--continue_from={step}: no field of {section}.training is changed. Give one, such as '
                f'--config.{section}.training.learning_rate={run.config[section].training.learning_rate / 2:g}, or '
                'leave the flag out'
            )
        best = recovery.check_checkpoint(directory, step)
        recovery.go_back(directory, step, best)
        trackers.forget(directory)
        output.changes += [[step, name, before.get(name), now.get(name)] for name in changed]
        output.settings = now
        output.state, output.results, output.digest, output.files = record.STARTED, {}, '', {}
        output.write()
        print(f'{directory.name}: continuing from step {step}: {output.describe_changes()}', flush=True)

    processes.run_on_main_process(go_back)


def _hint(run: Run, section: str, directory: epath.Path) -> str:
    """Returns the advice about changed settings of a training."""
    steps = [step for step in checkpoint_steps(directory / CHECKPOINTS) if step < run.config[section].training.steps]
    other = f'give another --workdir, or delete {directory} to train it again.'
    if not steps or directory != run.path(workdir.training_directory(section)):  # a training of --job=cas
        return f'Go back to the recorded settings, {other}'
    return (
        f'Go back to the recorded settings, {other} Fields of {section}.training may change from a checkpoint on: '
        f'run your command with --job={workdir.training_job(section)} --continue_from={steps[-1]}.'
    )


def image_data(
    run: Run, section: str, train: ImageSource | None = None, val: ImageSource | None = None, **augment: bool
) -> Data:
    """Opens the images that a network is trained on.

    Args:
      run: the run.
      section: of the config, such as 'classifier'.
      train: the training images; None: the run's.
      val: the validation images; None: the run's.
      **augment: flip, crop.

    Raises:
      JobError: images are missing.
    """
    if train is None:
        inspect_data.print_inspection(run)
    train, val = train or run.images('train'), val or run.images('validation')
    return _make_data(run, section, train, val, run.loader_kwargs(), **augment)


def _make_data(run, section, train, val, loader_kwargs, **augment) -> Data:
    config = build.train_config(run.config, section)
    stop = min(config.eval_examples or len(val), len(val))
    with jax.set_mesh(run.mesh):
        rows = sharding.process_local_rows(config.batch_size)
    kwargs = {'batch_size': config.batch_size, 'rows': rows, **loader_kwargs}
    batches = train_batches(train, seed=run.config.seed, **augment, **kwargs)
    return Data(
        train=batches,
        val=lambda: eval_batches(val, stop=stop, **kwargs),
        first_batch=batches.peek(),
        description=f'{len(train)} training and {stop} validation examples, batch size {config.batch_size}',
    )


def _count(task, data, batch_size, mesh) -> tuple[int, dict[str, float]]:
    """Returns the number of parameters; FLOPs per step and FLOP/s of all devices, where their peak is known."""
    batch = {k: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for k, x in data.first_batch.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, model_state = jax.eval_shape(task.init, key, batch)
    parameters = workdir.num_parameters(params)
    device = hardware.hardware_of(mesh.devices.flat[0])
    if device is None:
        return parameters, {}
    forward = cost.count(task.loss, params, model_state, batch, key).flops
    # The backward pass does about twice the work of the forward pass. Recomputation (remat) is not counted.
    return parameters, {'flops_per_step': 3 * forward, 'peak_flops': device.flops * mesh.size}


def _finish(run, output, result) -> dict:
    best = BestCheckpoint(output.directory).best()
    results = {
        'steps': result['steps'],
        'best_step': best['step'],
        'val': best['metrics'],
        'parameters': result['parameters'],
        'config': portable.to_json(run.config),
    }
    finish_weights(output, results, seconds=result['seconds'])
    return results


def _decoder(run: Run, level: int):
    """Returns a function that decodes codes of `level` and coarser ones to images, by the trained stage 1.

    Without stage 1 it shows the codes of `level`, one color per code.
    """
    if not run.has_stage_1:
        palette = jnp.asarray(plots.code_palette(run.code_spec.codebook_sizes[level]))
        return lambda codes: to_float(palette[codes[0]])
    # The weights are host arrays: pictures are made on one device of one process.
    model, variables = build.make_vqvae(run.config), workdir.load_trained(run, 'vqvae').variables

    def decode(codes):
        return model.apply(variables, codes, level, method='decode')

    return decode


def _summary(results: dict) -> str:
    numbers = ', '.join(f'{name} {value:.4g}' for name, value in results['val'].items())
    return f'best of {results["steps"]} steps is {results["best_step"]}: {numbers}'
