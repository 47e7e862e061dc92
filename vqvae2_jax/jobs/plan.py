"""--job=plan: whether a config fits the devices, and a lower bound of its time.

It compiles the programs that training, extraction and sampling run, for the attached devices or for TPUs or GPUs that
are not attached (`--topology=v5e:4x8`, `--topology=h100:8`). It prints memory, FLOPs and communication, the roofline
bound, and of GPUs the kernels and their modeled time. Where JAX's CUDA plugin is not installed, it compiles nothing for
GPUs that are not attached, and counts FLOPs and weights only.
"""

import functools
import sys
from collections.abc import Callable, Iterator

import jax

from vqvae2_jax.api import Specification
from vqvae2_jax.config import build
from vqvae2_jax.distributed import sharding
from vqvae2_jax.jobs import train
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.kernels import select
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
    for _, make in make_programs(run):
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
    """Yields why a program has no modeled time, and what to change if it does not fit; nothing if all is well.

    Args:
      run: the run.
      program: the program.
      compiled: its statistics.
      accelerator: the peaks of a device; None: unknown.
    """
    if compiled.uncounted:
        yield f'no modeled time: {compiled.uncounted}'
    needed, is_gpu = compiled.peak or program.state, accelerator and accelerator.is_gpu
    usable = accelerator and accelerator.memory * (hardware.GPU_SHARE if is_gpu else 1)
    if not compiled.error and (accelerator is None or needed <= usable):
        if is_gpu and needed > hardware.DEFAULT_GPU_SHARE * accelerator.memory:
            share = f'{hardware.GPU_SHARE_VARIABLE}={hardware.GPU_SHARE}'
            yield f'set {share}: JAX takes {hardware.DEFAULT_GPU_SHARE:.0%} of the memory of a GPU by default'
        return
    yield compiled.error or (
        f'needs {format_bytes(needed)}, but programs can use {format_bytes(usable)} of {accelerator.name}'
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


def make_programs(run: Run) -> Iterator[tuple[str, Callable[[], programs.Program]]]:
    """Yields the name of every program and a function that builds it; iterate outside of the mesh.

    The functions are called inside `jax.set_mesh(run.mesh)`. Random keys and other small arrays are made here: nothing
    runs on devices that are not attached.
    """
    config, maps = run.config, run.code_spec.shapes
    networks, implementations = build.networks(config), select.for_device(run.mesh.devices.flat[0])
    for section in networks:
        reference = train.make_task(run, section, examples=1)
        task = train.make_task(run, section, examples=1, implementations=implementations)
        training = build.train_config(config, section)
        if section.startswith('prior'):
            batch = programs.code_shapes(training.batch_size, maps)
        else:
            batch = programs.image_shapes(training.batch_size, config.data.image_size, config.data.channels)
        yield section, functools.partial(programs.train_program, section, task, reference, training, batch)
    generator = Specification.of(config).shapes()
    if run.has_stage_1:
        batch = programs.image_shapes(run.batch_size('codes'), config.data.image_size, config.data.channels)
        yield 'extract_codes', functools.partial(programs.encode_program, generator.replace(params=()), batch)
    if config.sample.dtype:
        generator = jax.eval_shape(lambda g: g.with_dtype(config.sample.dtype), generator)
    sizes = {'batch_size': run.batch_size('sample'), 'count': config.sample.count}
    settings = build.sampling_arguments(config)
    yield 'sample', functools.partial(programs.sample_program, generator, settings, **sizes)
