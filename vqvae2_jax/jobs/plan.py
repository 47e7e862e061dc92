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

from vqvae2_jax.config import build
from vqvae2_jax.distributed import sharding
from vqvae2_jax.jobs import train, workdir
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.models.vqvae import map_shapes
from vqvae2_jax.planning import hardware, programs, table
from vqvae2_jax.planning.hardware import Accelerator
from vqvae2_jax.planning.programs import Compiled, Program
from vqvae2_jax.planning.table import format_bytes


def plan(run: Run) -> None:
    """Prints a table with a row per program, and what to change if one does not fit.

    Raises:
      JobError: parallel.fsdp does not divide the number of devices.
    """
    device = run.mesh.devices.flat[0]
    accelerator, lines = hardware.hardware_of(device), []
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
            lines += [f'{program.name}: {line}' for line in advice(run, program, compiled, accelerator)]
    with jax.set_mesh(run.mesh):
        print('\n' + '\n'.join([*table.notes(accelerator), *lines]), flush=True)


def advice(run: Run, program: Program, compiled: Compiled, accelerator: Accelerator | None) -> Iterator[str]:
    """Yields what to change if a program does not fit, else nothing.

    Args:
      run: the run.
      program: the program.
      compiled: its statistics.
      accelerator: the peaks of a device; None: unknown.
    """
    needed = compiled.peak or program.state
    if not compiled.error and (accelerator is None or needed <= accelerator.memory):
        return
    yield compiled.error or (
        f'needs {format_bytes(needed)}, but a {accelerator.name} has {format_bytes(accelerator.memory)}'
    )
    devices, fsdp = run.mesh.size, run.mesh.shape[sharding.FSDP]
    if program.name in ('sample', 'extract_codes'):
        section = 'sample' if program.name == 'sample' else 'codes'
        if program.batch_size > devices:  # batch sizes are multiples of the devices
            yield f'lower {section}.batch_size'
        if section == 'sample' and run.config.sample.dtype != 'bfloat16':
            yield 'halve weights and caches: --config.sample.dtype=bfloat16'
        elif program.batch_size <= devices:
            yield 'use devices with more memory'
        return
    section = run.config[program.name]
    steps = 2 * section.training.grad_accum_steps
    if accelerator and program.state > accelerator.memory / 4 and fsdp < devices:
        more = next(n for n in range(min(4 * fsdp, devices), devices + 1) if devices % n == 0)
        yield f'shard the state over more devices: --config.parallel.fsdp={more}'
    elif section.get('remat', 'blocks') != 'blocks':
        yield f'recompute activations in the backward pass: --config.{program.name}.remat=blocks'
    elif program.name != 'vqvae' and program.batch_size % (steps * devices) == 0:
        yield f'accumulate gradients over microbatches: --config.{program.name}.training.grad_accum_steps={steps}'
    else:
        yield 'use more devices, or a smaller batch'


def make_programs(run: Run) -> Iterator[Callable[[], programs.Program]]:
    """Yields a function per program, to be called inside `jax.set_mesh(run.mesh)`; iterate outside of it.

    Random keys and other small arrays are made here: nothing runs on devices that are not attached.
    """
    config, networks = run.config, build.networks(run.config)
    variables = {name: jax.eval_shape(model.init, *inputs) for name, (model, inputs) in networks.items()}
    data = config.data
    maps = map_shapes(data.image_size, config.vqvae.downsample_factors)
    for section in networks:
        training = build.train_config(config, section)
        if section.startswith('prior'):
            batch = programs.code_shapes(training.batch_size, maps)
        else:
            batch = programs.image_shapes(training.batch_size, data.image_size, data.channels)
        task = train.make_task(run, section, examples=1)
        yield functools.partial(programs.train_program, section, task, training, batch)
    model, stage_1 = networks['vqvae'][0], variables['vqvae']
    batch = programs.image_shapes(run.batch_size('codes'), data.image_size, data.channels)
    yield functools.partial(programs.encode_program, model, stage_1, batch)
    params = [variables[section]['params'] for section in run.prior_sections]
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
