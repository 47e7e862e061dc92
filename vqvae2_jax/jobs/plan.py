"""--job=plan: whether a config fits a machine and how long it takes, before paying for it.

Compiles the very programs of training and sampling, for the devices at hand or for a TPU slice that is not
(`--topology=v5e:4x8`), and prints what the compiler says of memory and communication beside what the chip can do.
"""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqvae2_jax import config as configs
from vqvae2_jax import optim, parallel
from vqvae2_jax.io.logging import format_duration
from vqvae2_jax.jobs import chips, cost, train
from vqvae2_jax.jobs.sample import compiled_draw, make_controls
from vqvae2_jax.jobs.workdir import JobError, Run
from vqvae2_jax.models.vqvae import map_shapes
from vqvae2_jax.stages import classifier, prior, vqvae

COLUMNS = ('job', 'batch', 'parameters', 'state', 'peak', 'TFLOP', 'XLA counts', 'traffic', 'step', 'steps', 'in all')
_COLLECTIVE = re.compile(
    r'= (\S.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\('
)
_WIDTHS = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's64': 8, 'u64': 8}  # bytes; others 4


class Program(NamedTuple):
    """A job's program, ready to be compiled."""

    compiled_by: object  # jitted function
    inputs: tuple  # shapes, with where they lie
    parameters: int
    state: int  # bytes on a chip of what lives from step to step
    cost: cost.Cost  # of a step, over all devices
    steps: int
    batch: int
    section: str  # of the config


class Compiled(NamedTuple):
    """What the compiler says of one device's part; None where it says nothing."""

    peak: int | None  # bytes
    flops: float | None
    traffic: int | None  # bytes that collectives bring to it in a step
    refused: str = ''


def devices_of(topology: str) -> list:
    """The devices to plan for: those of a TPU slice, or where none is named, those at hand.

    Raises:
      JobError: no such slice, or its compiler is missing.
    """
    try:
        return chips.topology_devices(topology) if topology else jax.devices()
    except (ValueError, ImportError) as error:
        raise JobError(str(error)) from error


def plan(run: Run) -> None:
    """Prints a table for the devices of the mesh in use, with a row for each job, and what to change."""
    device = parallel.mesh().devices.flat[0]
    chip, advice = chips.chip_of(device), []
    print(f'{run.config.name} on {parallel.mesh().size} x {device.device_kind}, parallel.fsdp={_fsdp()}', flush=True)
    print(f'\n| {" | ".join(COLUMNS)} |\n|{"---|" * len(COLUMNS)}', flush=True)
    for name in _jobs(run):
        own = parallel.make_mesh(parallel.of_one_process())  # a process draws on its own devices
        with parallel.use(own if name == 'sample' else parallel.mesh()):
            program = _sampling(run) if name == 'sample' else _training(run, name)
            compiled = _compile(program)
            print(_row(name, program, compiled, chip), flush=True)
            advice += [f'{name}: {line}' for line in _advice(run.config, program, compiled, chip)]
    print('\n' + '\n'.join([*_notes(chip), *advice]), flush=True)


def _fsdp():
    return parallel.mesh().shape[parallel.FSDP]


def _jobs(run):
    priors = [f'prior.{name}' for name in reversed(run.levels)]
    return ['vqvae', *priors, *(['classifier'] if configs.has_classifier(run.config) else []), 'sample']


def _training(run, section):
    config, training = run.config, configs.training(run.config, section)
    size = training.batch_size
    parallel.check_batch_size(size, f'{section}.training.batch_size', training.accumulate)
    stage, plain = (_stage(run, section, plain=plain) for plain in (False, True))
    shapes = {'label': ((size,), jnp.int32), train.STOP: ((size,), jnp.bool_)}
    if section.startswith('prior'):
        for level, shape in enumerate(map_shapes(config.data.image_size, config.vqvae.factors)):
            shapes[f'codes_{level}'] = ((size, *shape), jnp.int32)
    else:
        shapes['image'] = ((size, *config.data.image_size, config.data.channels), jnp.uint8)
    split = parallel.split_batch(size)
    batch = {k: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for k, (shape, dtype) in shapes.items()}
    optimizer, key = optim.make_optimizer(training), jax.random.key(0)
    state = jax.eval_shape(train.make_init(stage, optimizer), key, batch)
    layout = train.layout_of(state)
    forward = cost.count(lambda p, v, b: plain.loss(p, v, b, key), state.params, state.variables, batch)
    return Program(
        train.make_step(stage, optimizer, training, layout),
        (_placed(state, layout), batch),
        sum(x.size for x in jax.tree.leaves(state.params)),
        _bytes_on_a_chip(_placed(state, layout)),
        forward.times(3),  # the backward pass does about twice the work of the forward one
        training.steps,
        size,
        section,
    )


def _stage(run, section, plain):
    """The stage without its data; `plain` recomputes nothing."""
    if section == 'vqvae':
        return vqvae.make_stage(configs.make_vqvae(run.config), run.levels, run.config.vqvae.commitment_weight, 1)
    if section == 'classifier':
        return classifier.make_stage(configs.make_classifier(run.config))
    level = run.levels.index(section.removeprefix('prior.'))
    model = configs.make_prior(run.config, level)
    return prior.make_stage(model.clone(remat=False) if plain else model, level, len(run.levels))


def _sampling(run):
    """Of one process, which draws on its own devices."""
    config, size = run.config, run.config.sample.batch_size
    parallel.check_batch_size(size, 'sample.batch_size')
    key, dtype = jax.random.key(0), config.sample.get('dtype') or None
    shapes = map_shapes(config.data.image_size, config.vqvae.factors)
    codes = tuple(jax.ShapeDtypeStruct((1, *shape), jnp.int32) for shape in shapes)
    label = jax.ShapeDtypeStruct((1,), jnp.int32) if config.data.num_classes else None
    image = jax.ShapeDtypeStruct((1, *config.data.image_size, config.data.channels), jnp.float32)
    modules = [configs.make_prior(config, level) for level in range(len(run.levels))]
    weights = [
        jax.eval_shape(module.init, key, codes[level], label, codes[level + 1 :])['params']
        for level, module in enumerate(modules)
    ]
    if dtype:
        modules = [module.clone(dtype=jnp.dtype(dtype)) for module in modules]
        weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), weights)
    model = configs.make_vqvae(config)
    decoder = jax.eval_shape(model.init, {'params': key, 'reseed': key}, image)
    whole = jax.tree.map(lambda _: parallel.replicated(), (weights, decoder))
    weights, decoder = _placed((weights, decoder), whole)
    number = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=parallel.split_batch(size))
    inputs = (weights, decoder, make_controls(config), number, number)
    draw = compiled_draw(config, model, modules)
    counted = sum(x.size for x in jax.tree.leaves(weights))
    processes = max(jax.process_count(), 1)
    steps = -(-config.sample.count // (size * processes))
    state = _bytes_on_a_chip((weights, decoder))
    return Program(draw, inputs, counted, state, cost.count(draw, *inputs), steps, size, 'sample')


def _placed(tree, layout):
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, layout)


def _bytes_on_a_chip(tree):
    leaves = [x for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _compile(program) -> Compiled:
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


def collective_bytes(text: str) -> int:
    """Bytes that the collectives of a compiled program (XLA's text) give one device; a loop's count once."""
    total = 0
    for shapes in _COLLECTIVE.findall(text):
        for kind, sizes in re.findall(r'(\w+)\[([\d,]*)\]', shapes):
            total += _WIDTHS.get(kind, 4) * math.prod(int(size) for size in sizes.split(',') if size)
    return total


def _row(name, program, compiled, chip):
    devices = parallel.mesh().size
    seconds = _seconds(program, chip, devices)
    cells = [name, program.batch, f'{program.parameters / 1e6:.3g} M', _bytes(program.state)]
    cells += ['does not fit' if compiled.refused else _bytes(compiled.peak), f'{program.cost.flops / 1e12:.3g}']
    cells.append(f'{compiled.flops * devices / 1e12:.3g}' if compiled.flops else '')
    cells.append('' if compiled.traffic is None else _bytes(compiled.traffic))
    cells.append('' if seconds is None else f'{1e3 * seconds:.3g} ms')
    cells += [program.steps, '' if seconds is None else format_duration(seconds * program.steps)]
    return f'| {" | ".join(map(str, cells))} |'


def _bytes(count):
    return f'{count / 1e9:.2f} GB' if count >= 1e8 else f'{count / 1e6:.2f} MB'


def _seconds(program, chip, devices):
    """Of a step at the chip's peaks: no program is faster."""
    if chip is None:
        return None
    return max(program.cost.flops / chip.flops, program.cost.bytes / chip.bandwidth) / devices


def _notes(chip):
    yield 'state, peak: memory of one chip, for what lives from step to step, and at most; traffic: what collectives'
    yield 'bring to it in a step. TFLOP: of products and convolutions, all chips, with nothing recomputed; XLA counts'
    yield 'the rest too, what is recomputed, and the inside of loops (sampling, accumulation) once.'
    if chip:
        yield (
            f'step: at the peak of {chip.name}, {chip.flops / 1e12:.0f} TFLOP/s in bfloat16 or '
            f'{chip.bandwidth / 1e9:.0f} GB/s, whichever takes longer; half of that peak is a good program.'
        )
    else:
        yield 'step: unknown, as the peak of these devices is; see vqvae2_jax/jobs/chips.py.'


def _advice(config, program, compiled, chip):
    if not compiled.refused and (chip is None or compiled.peak <= chip.memory):
        return
    yield compiled.refused or f'needs {_bytes(compiled.peak)} of the {_bytes(chip.memory)} of a {chip.name}'
    if program.section == 'sample':
        yield 'lower sample.batch_size, or halve weights and caches: --config.sample.dtype=bfloat16'
        return
    devices, section = parallel.mesh().size, program.section
    parts = 2 * configs.training(config, section).accumulate
    if program.state > chip.memory / 4 and _fsdp() < devices:
        yield f'cut the state over more chips: --config.parallel.fsdp={min(4 * _fsdp(), devices)}'
    elif section.startswith('prior') and not config[section].get('remat', False):
        yield f'recompute instead of keeping: --config.{section}.remat=True'
    elif section != 'vqvae' and program.batch % (parts * devices) == 0:
        yield f'take the batch in parts: --config.{section}.training.accumulate={parts}'
    else:
        yield 'take more chips, or a smaller batch'
