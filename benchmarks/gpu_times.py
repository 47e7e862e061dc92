"""Times for `benchmarks.gpu_run`: measured and modeled times of programs, and sampling under flags of XLA.

A check is a pair (name, function); the function returns `passed`, the line to print as `text`, and numbers.
"""

import functools
import statistics
import time

import jax
import numpy as np

from benchmarks import timing
from benchmarks.gpu_program import NO_DATA, WAVEFRONT, Case, make_program, versions
from vqvae2_jax.planning import gpu_kernels, hardware, programs

MAX_RATIO = 2  # of measured and modeled time, and its inverse
ROUNDS = 5  # of all variants, by turns
_LEAST_CALLS, _MOST_CALLS, _SECONDS = 3, 30, 4  # of a measurement

# The kinds of operations of CUDA graphs (command buffers) that XLA turns on by itself, as of jaxlib 0.10.2.
_KINDS = 'FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL'
VARIANTS = {  # options of the compiler, which are flags --<name>=<value> in XLA_FLAGS too
    'default': {},
    'with WHILE': {'xla_gpu_enable_command_buffer': f'{_KINDS},WHILE'},
    'with WHILE, graphs of one kernel': {
        'xla_gpu_enable_command_buffer': f'{_KINDS},WHILE',
        'xla_gpu_graph_min_graph_size': 1,
    },
    'no graphs': {'xla_gpu_enable_command_buffer': ''},
}


def device_checks(directory, rehearse):
    """Returns the check that there is a GPU."""

    def describe():
        device = jax.devices()[0]
        stats = device.memory_stats() or {}
        found = {'kind': device.device_kind, 'jax_backend': device.client.platform_version, **versions()}
        found |= {'compute_capability': getattr(device, 'compute_capability', ''), 'memory': stats.get('bytes_limit')}
        if rehearse or device.platform == 'gpu':
            return {'passed': True, 'text': f'{timing.machine()}, JAX {jax.__version__}', **found}
        text = (
            f'JAX finds no GPU, but {timing.machine()}. Run this where `python -c "import jax; print(jax.devices())"` '
        )
        text += 'prints a GPU (pip install ".[cuda13]"), or rehearse on this CPU: benchmarks/run_gpu.sh --rehearse'
        return {'passed': False, 'text': text, **found}

    return [('device', describe)]


def _fewer_blocks(count):
    # The compiler takes long for the unrolled blocks of a sampler.
    return [
        f'--config.prior.{level}.{field}={count}'
        for level, fields in {
            'top': ('num_residual_blocks', 'num_output_blocks'),
            'bottom': ('num_residual_blocks', 'num_cond_blocks'),
        }.items()
        for field in fields
    ] + ['--config.prior.top.num_attention_layers=1']


def cases(rehearse):
    """Returns the programs to measure, quick ones first: those of the paper's ImageNet model, for one GPU.

    Samplers have fewer blocks, as their titles say: a whole one takes minutes to compile.
    """
    codes, top, bottom, samples = (16, 16, 16, 2) if rehearse else (128, 32, 16, 64)
    config, data = ('tiny', []) if rehearse else ('imagenet256', [NO_DATA])
    batches = [
        f'--config.codes.batch_size={codes}',
        f'--config.prior.top.training.batch_size={top}',
        f'--config.prior.bottom.training.batch_size={bottom}',
    ]
    sample = [f'--config.sample.batch_size={samples}', *([] if rehearse else _fewer_blocks(5))]
    size = '' if rehearse else ', 5 blocks'
    return [
        Case('extraction', config, '', 'extract_codes', data + batches),
        Case('stage 1', config, '', 'vqvae', data + batches),
        Case(f'sampling, wavefront{size}', config, '', 'sample', data + sample + WAVEFRONT),
        Case(f'sampling, raster{size}', config, '', 'sample', data + sample),
        Case('bottom prior', config, '', 'prior.bottom', data + batches),
        Case('top prior', config, '', 'prior.top', data + batches),
    ]


def program_checks(directory, rehearse):
    """Returns the checks of measured against modeled times."""
    return [(case.title, functools.partial(_check_program, case, rehearse)) for case in cases(rehearse)]


def _check_program(case, rehearse):
    program, mesh = make_program(case)
    with jax.set_mesh(mesh):
        begin = time.monotonic()
        executable = programs.compile_executable(program)
        found = {'compile_seconds': time.monotonic() - begin, 'batch_size': program.batch_size}
        found['overrides'] = case.overrides
        found['seconds'] = median_seconds(make_call(program, executable))
        gpu = hardware.hardware_of(mesh.devices.flat[0])
        compiled = programs.statistics(executable) if gpu else programs.Compiled()
    rate = f'{1 / found["seconds"]:.3g} steps/s, {program.batch_size / found["seconds"]:.4g} images/s'
    if gpu is None:
        why = (
            'no modeled time: there is no model of a CPU'
            if rehearse
            else (
                f'no modeled time: the peaks of {mesh.devices.flat[0].device_kind} are not in '
                'vqvae2_jax/planning/hardware.py; add them'
            )
        )
        return found | {'passed': rehearse, 'text': f'{1e3 * found["seconds"]:.4g} ms measured, {why}; {rate}'}
    found['utilization'] = program.cost.flops / gpu.flops / found['seconds']
    rate += f', utilization {found["utilization"]:.1%}; compiled in {found["compile_seconds"]:.0f} s'
    found['peak_bytes'] = compiled.peak
    if compiled.execution is None:
        text = f'{1e3 * found["seconds"]:.4g} ms measured, no modeled time: {compiled.uncounted}; {rate}'
        return found | {'passed': False, 'text': text}
    total = gpu_kernels.total(compiled.execution.kernels, gpu)
    found |= {'kernels': round(total.kernels), 'bytes': total.bytes, 'flops': total.flops}
    found |= {f'modeled_{name}': getattr(total, name) for name in total._fields if name.endswith('seconds')}
    result = compare_times(found['seconds'], total.seconds)
    return found | result | {'text': f'{result["text"]}; {rate}'}


def compare_times(measured, modeled):
    """Compares the measured time of a program with the modeled one, in seconds; the result of a check."""
    ratio = measured / modeled
    text = f'{1e3 * measured:.4g} ms measured, {1e3 * modeled:.4g} ms modeled, ratio {ratio:.2f}'
    text += f' (fails outside {1 / MAX_RATIO} to {MAX_RATIO})'
    return {'passed': 1 / MAX_RATIO <= ratio <= MAX_RATIO, 'text': text, 'ratio': ratio}


def make_call(program, executable):
    """Returns a function that runs a program on random weights; a training continues from call to call."""
    inputs = jax.tree_util.tree_map_with_path(_fill, program.inputs)
    if not program.optimizer:
        return lambda: executable(*inputs)
    state, batch = inputs

    def step():
        nonlocal state
        state, metrics = executable(state, batch)
        return state, metrics

    return step


def _fill(path, x):
    """Returns an array of a shape: small random floats, random pixels, zeros of codes, labels and the optimizer."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x  # parameters of sampling
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.split(jax.random.key(0), x.shape), x.sharding)
    values = np.zeros(x.shape, x.dtype)
    if x.dtype == np.uint8:
        values = np.resize(_random_block().view(np.uint8), x.shape)
    elif jax.dtypes.issubdtype(x.dtype, np.floating) and 'opt_state' not in jax.tree_util.keystr(path):
        values = np.resize(_random_block(), x.shape).astype(x.dtype)
    return jax.device_put(values, x.sharding)


@functools.cache
def _random_block():
    # Repeated, since a host takes minutes to draw all weights.
    return np.random.default_rng(0).normal(scale=0.02, size=2**22).astype(np.float32)


def median_seconds(call):
    """Returns the median of the seconds of several calls, after one that is not counted."""
    jax.block_until_ready(call())
    times = []
    while len(times) < _LEAST_CALLS or (len(times) < _MOST_CALLS and sum(times) < _SECONDS):
        times.append(_seconds(call))
    return statistics.median(times)


def _seconds(call):
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def flag_checks(directory, rehearse):
    """Returns the comparisons of sampling under flags of XLA; on a CPU, which has none of them, of equal variants."""
    variants = dict.fromkeys(VARIANTS, {}) if rehearse else VARIANTS
    chosen = [case for case in cases(rehearse) if case.program == 'sample']
    if not rehearse:
        fewer = [(case.title.replace('5', '2'), case.overrides + _fewer_blocks(2)) for case in chosen]
        chosen = [case._replace(title=title, overrides=o) for case, (title, o) in zip(chosen, fewer, strict=True)]
    return [(case.title, functools.partial(_check_flags, case, variants, rehearse)) for case in reversed(chosen)]


def _check_flags(case, variants, rehearse):
    program, mesh = make_program(case)
    with jax.set_mesh(mesh):
        lowered = program.function.lower(*program.inputs)
        inputs = jax.tree_util.tree_map_with_path(_fill, program.inputs)
        executables = {name: lowered.compile(compiler_options=options or None) for name, options in variants.items()}
        codes = {name: jax.device_get(executable(*inputs)) for name, executable in executables.items()}
        times = {name: [] for name in variants}
        for _ in range(ROUNDS):
            for name, executable in executables.items():
                times[name].append(_seconds(functools.partial(executable, *inputs)))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(variants))
    expected = jax.tree.leaves(codes[first])
    same = all(np.array_equal(x, y) for c in codes.values() for x, y in zip(jax.tree.leaves(c), expected, strict=True))
    shown = ', '.join(f'{name} {1e3 * s:.4g} ms ({s / seconds[first]:.2f})' for name, s in seconds.items())
    found = {'passed': same, 'seconds': seconds, 'options': dict(variants), 'batch_size': program.batch_size}
    text = shown if same else f'{shown}; the samples of the variants differ'
    return found | {'text': f'{text}; equal variants, since a CPU has no such flags' if rehearse else text}
