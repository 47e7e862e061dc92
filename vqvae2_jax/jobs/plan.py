"""--job=plan: whether a config fits the devices, and a lower bound of its time.

It compiles the programs that training, extraction and sampling run, for the attached devices or for a TPU slice that is
not attached (`--topology=v5e:4x8`). It prints memory, FLOPs and communication, and the roofline bound. For GPUs that
are not attached (`--topology=h100:8`) it compiles nothing and only counts FLOPs and weights.
"""

import functools
import sys
from collections.abc import Callable, Iterator

import jax
import optax

from vqvae2_jax.config import build as configs
from vqvae2_jax.jobs import train, workdir
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.models.vqvae import map_shapes
from vqvae2_jax.planning import hardware, programs, table
from vqvae2_jax.tasks.task import Task


def plan(run: Run) -> None:
    """Prints a table with a row per program, and what to change if one does not fit.

    Raises:
      JobError: parallel.fsdp does not divide the number of devices.
    """
    device = run.mesh.devices.flat[0]
    accelerator, advice = hardware.hardware_of(device), []
    name = f'{accelerator.name} (not compiled)' if hardware.is_simulated(device) else device.device_kind
    print(f'plan: {run.config.name} on {run.mesh.size} x {name}, parallel.fsdp={run.config.parallel.fsdp}', flush=True)
    print(f'\n{table.header()}', flush=True)
    for make in make_programs(run):
        with jax.set_mesh(run.mesh):
            program = make()
            if not hardware.is_simulated(device):
                print(f'compiling {program.name} ...', file=sys.stderr, flush=True)  # may take minutes
            compiled = programs.compile_program(program)
            print(table.row(program, compiled, accelerator), flush=True)
            is_training = program.name not in ('extract_codes', 'sample')
            lines = table.advice(
                program,
                compiled,
                accelerator,
                configs.train_config(run.config, program.name) if is_training else None,
                run.config[program.name].remat if program.name.startswith('prior') else None,
            )
            advice += [f'{program.name}: {line}' for line in lines]
    with jax.set_mesh(run.mesh):
        print('\n' + '\n'.join([*table.notes(accelerator), *advice]), flush=True)


def make_programs(run: Run) -> Iterator[Callable[[], programs.Program]]:
    """Yields a function per program, to be called inside `jax.set_mesh(run.mesh)`; iterate outside of it.

    Random keys and other small arrays are made here: nothing runs on devices that are not attached.
    """
    config, networks = run.config, configs.networks(run.config)
    variables = {name: jax.eval_shape(model.init, *inputs) for name, (model, inputs) in networks.items()}
    data = config.data
    maps = map_shapes(data.image_size, config.vqvae.downsample_factors)
    for section in networks:
        training = configs.train_config(config, section)
        if section.startswith('prior'):
            batch = programs.code_shapes(training.batch_size, maps)
        else:
            batch = programs.image_shapes(training.batch_size, data.image_size, data.channels)
        yield functools.partial(programs.train_program, section, _make_task(run, section), training, batch)
    model, stage_1 = networks['vqvae'][0], variables['vqvae']
    batch = programs.image_shapes(run.batch_size('codes'), data.image_size, data.channels)
    yield functools.partial(programs.encode_program, model, stage_1, batch)
    params = [variables[f'prior.{name}']['params'] for name in run.levels]
    params = jax.eval_shape(lambda p: optax.tree.cast(p, config.sample.dtype or None), params)
    yield functools.partial(
        programs.sample_program,
        model,
        workdir.make_priors(run, config.sample.dtype),
        stage_1,
        params,
        workdir.sampling_params(run),
        batch_size=run.batch_size('sample'),
        count=config.sample.count,
    )


def _make_task(run: Run, section: str) -> Task:
    """Makes the task of a section of the config, such as 'prior.top', without data and pictures."""
    if section == 'vqvae':
        return train.vqvae_task(run, examples=1)
    if section == 'classifier':
        return train.classifier_task(run)
    return train.prior_task(run, run.levels.index(section.removeprefix('prior.')), visualize=False)
