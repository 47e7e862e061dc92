"""--job=plan: whether a config fits a machine and how long it takes, before paying for it.

Compiles the very programs of training and sampling, for the devices at hand or for a TPU slice that is not
(`--topology=v5e:4x8`), and prints what the compiler says of memory and communication beside what the chip can do. For
GPUs that are not at hand (`--topology=h100:8`, in hosts of eight) it compiles nothing: arithmetic alone, without
activations.
"""

import itertools
import math
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vqvae2_jax.config import build as configs
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.io.logging import format_duration
from vqvae2_jax.jobs import train
from vqvae2_jax.jobs.sample import compiled_draw, make_all_sampling_params
from vqvae2_jax.jobs.workdir import Run, make_priors
from vqvae2_jax.models.vqvae import map_shapes
from vqvae2_jax.planning import cost, hardware
from vqvae2_jax.training import loop, optim

COLUMNS = ('job', 'batch', 'parameters', 'weights', 'optimizer', 'activations', 'peak')
COLUMNS += ('TFLOP', 'XLA counts', 'traffic', 'step', 'steps', 'in all')
_COLLECTIVE = re.compile(
    r'= (\S.*?) (all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-permute)(-start)?\('
)
_CALLED = re.compile(r'(?:calls|to_apply|branch_computations|(?:true|false)_computation)=\{?(%[^},]+(?:, %[^},]+)*)')
_LOOP = re.compile(r' while\(.*condition=%([\w.-]+), body=%([\w.-]+)')
_WIDTHS = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's64': 8, 'u64': 8}  # bytes; others 4


class Program(NamedTuple):
    """A job's program, ready to be compiled."""

    job: str  # of a training: its section of the config
    compiled_by: object  # jitted function
    inputs: tuple  # shapes, with where they lie
    parameters: int
    weights: int  # bytes on a chip: parameters, their average, codebooks
    optimizer: int  # bytes on a chip
    cost: cost.Cost  # of a step, on one device
    steps: int
    batch: int

    @property
    def state(self) -> int:
        """Bytes on a chip of what lives from step to step."""
        return self.weights + self.optimizer


class Compiled(NamedTuple):
    """What the compiler says of one device's part; None where it says nothing."""

    peak: int | None  # bytes
    flops: float | None
    traffic: int | None  # bytes that collectives bring to it in a step
    refused: str = ''


def plan(run: Run) -> None:
    """Prints a table for the devices of the mesh in use, with a row for each job, and what to change."""
    device = sharding.current_mesh().devices.flat[0]
    chip, advice = hardware.hardware_of(device), []
    name = f'{chip.name}, by arithmetic' if hardware.is_simulated(device) else device.device_kind
    print(f'{run.config.name} on {sharding.current_mesh().size} x {name}, parallel.fsdp={_fsdp()}', flush=True)
    print(f'\n| {" | ".join(COLUMNS)} |\n|{"---|" * len(COLUMNS)}', flush=True)
    for name in configs.networks(run.config):
        advice += _report(run.config, _training(run, name), chip)
    alone = parallel.meshes_alone()
    samplers = processes.num_processes(sharding.current_mesh()) * len(alone)
    with parallel.use(alone[0]):
        advice += _report(run.config, _sampling(run, samplers), chip)
    print('\n' + '\n'.join([*_notes(chip), *advice]), flush=True)


def _report(config, program, chip):
    """Prints a job's row; returns what to change."""
    compiled = _compile(program)
    print(_row(program, compiled, chip), flush=True)
    return [f'{program.job}: {line}' for line in _advice(config, program, compiled, chip)]


def _fsdp():
    return sharding.current_mesh().shape[sharding.FSDP]


def _training(run, section):
    config, training = run.config, configs.training(run.config, section)
    stage, size = _stage(run, section), training.batch_size
    shapes = {'label': ((size,), jnp.int32)}
    if section.startswith('prior'):
        for level, shape in enumerate(map_shapes(config.data.image_size, config.vqvae.factors)):
            shapes[f'codes_{level}'] = ((size, *shape), jnp.int32)
    else:
        shapes['image'] = ((size, *config.data.image_size, config.data.channels), jnp.uint8)
    split = sharding.batch_sharding(size)
    batch = {k: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for k, (shape, dtype) in shapes.items()}
    batch[loop.SHOULD_STOP] = jax.ShapeDtypeStruct(
        (sharding.current_mesh().size,), jnp.bool_, sharding=sharding.batch_sharding()
    )
    optimizer, key = optim.make_optimizer(training), jax.random.key(0)
    state = jax.eval_shape(loop.make_init(stage, optimizer), key, batch)
    layout = loop.state_sharding(state)
    placed = sharding.abstract_state(state, layout)
    part = {k: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype) for k, x in batch.items()}
    forward = cost.count(lambda p, v, b: stage.loss(p, v, b, key), state.params, state.variables, part)
    return Program(
        section,
        loop.make_step(stage, optimizer, training, layout),
        (placed, batch),
        sum(x.size for x in jax.tree.leaves(state.params)),
        _bytes_on_a_chip((placed.params, placed.ema_params, placed.variables)),
        _bytes_on_a_chip(placed.opt_state),
        forward.times(3),  # the backward pass does about twice the work of the forward one
        training.steps,
        size,
    )


def _stage(run, section):
    """The stage, without its data."""
    if section == 'vqvae':
        return train.vqvae_task(run, examples=1)
    if section == 'classifier':
        return train.classifier_task(run)
    return train.prior_task(run, run.levels.index(section.removeprefix('prior.')), show=False)


def _sampling(run, samplers):
    """Of one of so many that draw at the same time, each by itself."""
    config, size, dtype = run.config, run.config.sample.batch_size, run.config.sample.get('dtype')
    networks = configs.networks(config)
    variables = {name: jax.eval_shape(model.init, *inputs) for name, (model, inputs) in networks.items()}
    weights = [variables[f'prior.{name}']['params'] for name in run.levels]
    weights = jax.eval_shape(lambda w: optax.tree.cast(w, dtype or None), weights)
    held = weights, variables['vqvae']
    held = sharding.abstract_state(held, jax.tree.map(lambda _: sharding.replicated_sharding(), held))
    split = sharding.batch_sharding(size)
    number = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split)
    inputs = (*held, make_all_sampling_params(config), number, number)
    draw = compiled_draw(config, networks['vqvae'][0], make_priors(run, dtype))
    counted = sum(x.size for x in jax.tree.leaves(weights))
    part = jax.ShapeDtypeStruct(split.shard_shape((size,)), jnp.int32)
    on_one = cost.count(draw.__wrapped__, *inputs[:-2], part, part)
    steps = -(-config.sample.count // (size * samplers))
    return Program('sample', draw, inputs, counted, _bytes_on_a_chip(held), 0, on_one, steps, size)


def _bytes_on_a_chip(tree):
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _compile(program) -> Compiled:
    if hardware.is_simulated(sharding.current_mesh().devices.flat[0]):
        return Compiled(None, None, None)
    print(f'compiling {program.job} ...', file=sys.stderr, flush=True)  # which may take minutes
    try:
        compiled = program.compiled_by.lower(*program.inputs).compile()
    except jax.errors.JaxRuntimeError as error:  # a compiler for accelerators refuses what cannot fit
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return Compiled(None, None, None, str(error).splitlines()[0])
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    flops = (compiled.cost_analysis() or {}).get('flops')
    return Compiled(peak + memory.temp_size_in_bytes, flops, collective_bytes(compiled.as_text()))


def collective_bytes(text: str) -> int | None:
    """Bytes that the collectives of a compiled program (XLA's text) give one device; a loop's as often as it runs.

    None where the text does not say how often that is.
    """
    computations, entry, lines = {}, '', []
    for line in text.splitlines():
        if head := re.match(r'(ENTRY )?%([\w.-]+) \(.*\{$', line):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith(' '):
            lines.append(line)
    found = {}  # TPU programs name the pieces of one collective, which runs beside other work, by one channel

    def walk(name, times):
        for line in computations.get(name, ()):
            if collective := _COLLECTIVE.search(line):
                channel = re.search(r'channel_id=\d+', line)
                key = channel[0] if channel else line
                found[key] = max(found.get(key, 0), times * _result_bytes(*collective.groups()))
            if loop := _LOOP.search(line):
                walk(loop[2], times * _trips(line, computations, loop[1]))
            for called in _CALLED.findall(line):
                for each in called.split(', '):
                    walk(each.removeprefix('%'), times)

    walk(entry, 1)
    total = sum(found.values())
    return None if math.isinf(total) else total


def _trips(loop, computations, condition):
    """How often a loop runs: as its line says, or by the number that its condition compares with; else infinity."""
    known = re.findall(r'known_trip_count":\{"n":"(\d+)"', loop)
    if not known:
        lines = computations.get(condition, [])
        called = [name.removeprefix('%') for line in lines for name in _CALLED.findall(line)]
        text = '\n'.join(itertools.chain(lines, *(computations.get(name, []) for name in called)))
        known = re.findall(r' constant\((\d+)\)', text)
    return max(map(int, known), default=math.inf)


def _result_bytes(shapes, kind, start):
    sizes = re.findall(r'(\w+)\[([\d,]*)\]', shapes)
    if start and kind != 'all-reduce':  # operands, then results, then perhaps what it waits for
        sizes = [size for size in sizes if size != ('u32', '')]
        sizes = sizes[len(sizes) // 2 :]
    return sum(_WIDTHS.get(width, 4) * math.prod(int(n) for n in size.split(',') if n) for width, size in sizes)


def _row(program, compiled, chip):
    seconds = _seconds(program, chip)
    cells = [program.job, program.batch, f'{program.parameters / 1e6:.3g} M']
    cells += [_bytes(program.weights), _bytes(program.optimizer), *_memory(program, compiled, chip)]
    cells.append(f'{sharding.num_batch_shards(program.batch) * program.cost.flops / 1e12:.3g}')
    cells.append(f'{compiled.flops * sharding.current_mesh().size / 1e12:.3g}' if compiled.flops else '')
    cells.append('' if compiled.traffic is None else _bytes(compiled.traffic))
    cells.append('' if seconds is None else f'{1e3 * seconds:.3g} ms')
    cells += [program.steps, '' if seconds is None else format_duration(seconds * program.steps)]
    return f'| {" | ".join(map(str, cells))} |'


def _memory(program, compiled, chip):
    """Cells of activations and peak."""
    if compiled.refused:
        return '', 'does not fit'
    if compiled.peak is None:
        return '', ''
    share = f' ({compiled.peak / chip.memory:.0%})' if chip else ''
    return _bytes(compiled.peak - program.state), _bytes(compiled.peak) + share


def _bytes(count):
    return f'{count / 1e9:.2f} GB' if count >= 1e8 else f'{count / 1e6:.2f} MB'


def _seconds(program, chip):
    """Of a step at the chip's peaks: no program is faster."""
    if chip is None:
        return None
    return max(program.cost.flops / chip.flops, program.cost.bytes / chip.bandwidth)


def _notes(chip):
    yield 'Memory is that of one chip. weights: parameters, their average, codebooks; activations: whatever else a'
    yield 'step needs at its peak, gradients and gathered parameters too. traffic: what collectives bring to a chip in'
    yield 'a step. TFLOP: of products and convolutions, all chips (of sample: of one batch), with nothing recomputed;'
    yield 'XLA counts the rest too, what is recomputed, and what loops hold (drawing, accumulate, scan_layers) once.'
    if hardware.is_simulated(sharding.current_mesh().devices.flat[0]):
        yield 'Nothing was compiled, which peak, XLA counts and traffic need: plan on such a machine for these.'
    if chip:
        yield (
            f'step: at the peak of {chip.name}, {chip.flops / 1e12:.0f} TFLOP/s in bfloat16 or '
            f'{chip.bandwidth / 1e9:.0f} GB/s, whichever takes longer; half of that peak is a good program.'
        )
    else:
        yield 'step: unknown, as the peak of these devices is; see vqvae2_jax/jobs/chips.py.'


def _advice(config, program, compiled, chip):
    needed = compiled.peak or program.state
    if not compiled.refused and (chip is None or needed <= chip.memory):
        return
    yield compiled.refused or f'needs {_bytes(needed)} of the {_bytes(chip.memory)} of a {chip.name}'
    if program.job == 'sample':
        yield 'lower sample.batch_size, or halve weights and caches: --config.sample.dtype=bfloat16'
        return
    devices, section = sharding.current_mesh().size, program.job
    parts = 2 * configs.training(config, section).accumulate
    if program.state > chip.memory / 4 and _fsdp() < devices:
        yield f'cut the state over more chips: --config.parallel.fsdp={min(4 * _fsdp(), devices)}'
    elif section.startswith('prior') and not config[section].get('remat', False):
        yield f'recompute instead of keeping: --config.{section}.remat=True'
    elif section != 'vqvae' and program.batch % (parts * devices) == 0:
        yield f'take the batch in parts: --config.{section}.training.accumulate={parts}'
    else:
        yield 'take more chips, or a smaller batch'
