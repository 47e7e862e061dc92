"""Programs for GPUs, compiled without one: kernels, bytes, FLOPs and the time of a model (planning/gpu_kernels.py).

  pip install "jax[cuda13]==<the installed JAX>"                # no driver, no GPU; 4.8 GB
  python -m benchmarks.gpu_program                              # the paper's ImageNet model on H100: six rows
  python -m benchmarks.gpu_program --config=ffhq1024 --config.data.path=. --topology=h100:8 \
    --programs prior.top sample
  python -m benchmarks.gpu_program --config=folder256 --config.data.path=. --programs sample \
    --config.sample.batch_size=8 --config.prior.top.order=wavefront --config.prior.bottom.order=wavefront

Programs have the names of `--job=plan`. All numbers are of one GPU in one call: a training step, or a batch of samples.
FLOPs are those of products and convolutions. Useful FLOPs are, of a training step, three times those of the forward
pass, without recomputation. Utilization is the time of FLOPs at the peaks (useful ones at that of bfloat16) over the
modeled time.
"""

import argparse
import datetime
import functools
import importlib.metadata
import sys
from typing import NamedTuple

import jax
from etils import epath

from vqvae2_jax.config.fields import ConfigError
from vqvae2_jax.config.loading import load_config
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.io import files
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import plan
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.main import override_fields
from vqvae2_jax.planning import gpu_kernels, hardware, programs, table

COLUMNS = ('program', 'kernels', 'GB moved', 'TFLOP', 'modeled, ms', 'bytes alone', 'FLOPs alone', 'launches alone')
COLUMNS += ('utilization, useful FLOPs', 'all FLOPs', 'peak memory', 'kernels of an iteration')
WAVEFRONT = [
    f'--config.prior.{level}.{field}' for level in ('top', 'bottom') for field in ('order=wavefront', 'skew=2')
]
NO_DATA = '--config.data.path=.'  # nothing is read
PACKAGES = ('jax', 'jaxlib', 'jax-cuda13-plugin', 'jax-cuda12-plugin', 'flax')


class Case(NamedTuple):
    """A program to compile: title, config, topology, name of the program, overrides of fields."""

    title: str
    config: str
    topology: str
    program: str
    overrides: list[str]


def sampling(batch, order):
    overrides = [NO_DATA, f'--config.sample.batch_size={batch}', *(WAVEFRONT if order != 'raster' else [])]
    return Case(f'sample {batch}, {order}', 'imagenet256', 'h100:1', 'sample', overrides)


CASES = [
    Case('stage 1, a step of 128 images', 'imagenet256', 'h100:1', 'vqvae', [NO_DATA]),
    Case('top prior, 8 GPUs, a step of 1024', 'imagenet256', 'h100:8', 'prior.top', [NO_DATA]),
    *(sampling(batch, order) for batch in (64, 1) for order in ('raster', 'wavefront, skew 2')),
]


def make_program(case):
    """Builds the program of a case; returns it with the mesh of its devices: attached ones without a topology."""
    make, mesh = _make_programs(case.config, case.topology, *case.overrides)
    if case.program not in make:
        sys.exit(f'{case.config} has no program {case.program}, but {", ".join(make)}')
    with jax.set_mesh(mesh):
        return make[case.program](), mesh


@functools.cache  # the shapes of all weights take seconds
def _make_programs(name, topology, *overrides):
    devices = hardware.topology_devices(topology) if topology else None  # before JAX looks for GPUs
    config = load_config(name)
    if unknown := override_fields(config, overrides):
        sys.exit(f'unknown arguments: {" ".join(unknown)}')
    validate_config(config)
    run = Run(config, epath.Path('runs'), devices)
    return dict(plan.make_programs(run)), run.mesh


def compile_case(case, trips):
    """Compiles a program; returns it with its statistics and the peaks of its GPUs."""
    program, mesh = make_program(case)
    with jax.set_mesh(mesh):
        compiled = programs.compile_program(program, trips)
    if compiled.execution is None:
        sys.exit(f'{case.title}: {compiled.uncounted or "not compiled: JAX has no CUDA plugin here"}')
    return program, compiled, hardware.hardware_of(mesh.devices.flat[0])


def summary(program, compiled, gpu):
    """Returns the numbers of a row, by name; times in seconds, per GPU."""
    total = gpu_kernels.total(compiled.execution.kernels, gpu)
    loop = gpu_kernels.busiest_loop(compiled.execution.loops)
    return {
        'kernels': round(total.kernels),
        'bytes': total.bytes,
        'flops': total.flops,
        'useful_flops': program.cost.flops,
        'seconds': total.seconds,
        'memory_seconds': total.memory_seconds,
        'compute_seconds': total.compute_seconds,
        'launch_seconds': total.launch_seconds,
        'useful_utilization': program.cost.flops / gpu.flops / total.seconds,
        'utilization': total.compute_seconds / total.seconds,
        'peak_bytes': compiled.peak,
        'iteration_kernels': loop and round(loop.iteration.kernels),
        'iterations': loop and round(loop.iterations),
    }


def row(title, found):
    """Returns the line of the table, in Markdown."""
    times = [f'{1e3 * found[f"{name}seconds"]:,.1f}' for name in ('', 'memory_', 'compute_', 'launch_')]
    cells = [title, f'{found["kernels"]:,}', f'{found["bytes"] / 1e9:,.2f}', f'{found["flops"] / 1e12:,.2f}', *times]
    cells += [f'{found["useful_utilization"]:.1%}', f'{found["utilization"]:.1%}']
    cells += [table.format_bytes(found['peak_bytes'])]
    cells += [f'{found["iteration_kernels"]}, {found["iterations"]} times' if found['iterations'] else '']
    return f'| {" | ".join(cells)} |'


def details(execution, gpu, count):
    """Yields the lines about kinds of kernels, loops and the most expensive kernels."""
    yield '| kind | launches | GB | TFLOP | ms |\n|---|---|---|---|---|'
    for kind, total in gpu_kernels.by_kind(execution.kernels, gpu).items():
        cells = kind, f'{total.kernels:,.0f}', f'{total.bytes / 1e9:.3f}', f'{total.flops / 1e12:.3f}'
        yield f'| {" | ".join(cells)} | {1e3 * total.seconds:.3f} |'
    if execution.loops:
        yield '\n| loop | iterations | of one: kernels | GB | ms |\n|---|---|---|---|---|'
    for loop in sorted(execution.loops, key=lambda loop: -loop.iterations * loop.iteration.seconds)[:count]:
        one = loop.iteration
        cells = f'{loop.iterations:,.0f}', f'{one.kernels:,.0f}', f'{one.bytes / 1e9:.3f}', f'{1e3 * one.seconds:.3f}'
        yield f'| {loop.name} {_ending(loop.source)} | {" | ".join(cells)} |'
    yield '\n| ms | times | MB | GFLOP | kind | kernel | source |\n|---|---|---|---|---|---|---|'
    for kernel in sorted(execution.kernels, key=lambda kernel: -kernel.times * kernel.seconds(gpu))[:count]:
        cells = f'{1e3 * kernel.times * kernel.seconds(gpu):.3f}', f'{kernel.times:,.0f}', f'{kernel.bytes / 1e6:.2f}'
        flops = f'{sum(kernel.flops.values()) / 1e9:.2f}'
        yield f'| {" | ".join(cells)} | {flops} | {kernel.kind} | {kernel.name} | {_ending(kernel.source)} |'


def _ending(source):
    return f'`{source[-80:]}`' if source else ''


def versions():
    found = {name: version for name in PACKAGES if (version := _version(name))}
    return {'date': str(datetime.date.today()), **found}


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ''


def parse_arguments():
    """Returns the options and the cases to compile."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('--config', help='the six rows of the ImageNet model when not given')
    parser.add_argument('--topology', help='with --config: such as a100:1, h100:8, h200:64; h100:1 if not given')
    parser.add_argument(
        '--programs', nargs='+', help='with --config: names as in the table of --job=plan; vqvae if none'
    )
    parser.add_argument('--trips', type=float, help='mean number of iterations of loops that do not state it')
    parser.add_argument('--top', type=int, default=20, help='number of loops and of kernels to list')
    parser.add_argument('--output', help='writes <output>.json and <output>.md too')
    options, overrides = parser.parse_known_args()
    if not options.config and (options.topology or options.programs):
        parser.error('--topology and --programs need --config')
    if not options.config:
        return options, [case._replace(overrides=case.overrides + overrides) for case in CASES]
    topology, names = options.topology or 'h100:1', options.programs or ['vqvae']
    return options, [Case(name, options.config, topology, name, overrides) for name in names]


def main():
    options, cases = parse_arguments()
    lines, results, chapters = [f'| {" | ".join(COLUMNS)} |\n|{"---|" * len(COLUMNS)}'], {}, []
    for case in cases:
        print(f'compiling {case.title} ...', file=sys.stderr, flush=True)  # may take minutes
        try:
            program, compiled, gpu = compile_case(case, options.trips)
        except (ConfigError, JobError) as error:
            sys.exit(f'error: {error}')
        results[case.title] = case._asdict() | summary(program, compiled, gpu)
        lines.append(row(case.title, results[case.title]))
        chapters += [f'\n## {case.title}\n', *details(compiled.execution, gpu, options.top)]
        print('\n'.join([*(lines if len(lines) == 2 else lines[-1:])]), flush=True)
    print('\n'.join(chapters))
    if options.output:
        made = versions()
        files.write_json(epath.Path(f'{options.output}.json'), made | {'programs': results})
        head = [f'# {", ".join(f"{name} {value}" for name, value in made.items())}\n', *lines]
        epath.Path(f'{options.output}.md').write_text('\n'.join([*head, *chapters, '']))


if __name__ == '__main__':
    main()
