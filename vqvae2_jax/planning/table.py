"""The table of a plan: one row per program, and notes."""

from collections.abc import Iterator

import jax

from vqvae2_jax.distributed import sharding
from vqvae2_jax.io.logging import format_duration
from vqvae2_jax.planning import gpu_kernels, hardware
from vqvae2_jax.planning.hardware import Accelerator
from vqvae2_jax.planning.programs import Compiled, Program

COLUMNS = ('job', 'batch', 'parameters', 'weights', 'optimizer', 'activations', 'peak')
COLUMNS += ('TFLOP', 'XLA TFLOP', 'collectives', 'kernels', 'moved', 'modeled', 'bound', 'steps', 'total')


def header() -> str:
    """Returns the first two lines of the table, in Markdown."""
    return f'| {" | ".join(COLUMNS)} |\n|{"---|" * len(COLUMNS)}'


def row(program: Program, compiled: Compiled, accelerator: Accelerator | None) -> str:
    """Returns the line of a program, in Markdown; call it inside `jax.set_mesh`.

    Args:
      program: the program.
      compiled: its statistics.
      accelerator: the peaks of a device; None: unknown.
    """
    bound, devices = roofline_bound(program, accelerator), sharding.current_mesh().size
    total = None if bound is None or program.steps is None else format_duration(bound * program.steps)
    cells = [
        program.name,
        program.batch_size,
        f'{program.parameters / 1e6:.3g} M',
        format_bytes(program.weights),
        format_bytes(program.optimizer),
        *_memory(program, compiled, accelerator),
        f'{sharding.num_batch_shards(program.batch_size) * program.cost.flops / 1e12:.3g}',
        f'{compiled.flops * devices / 1e12:.3g}' if compiled.flops else None,
        None if compiled.collective_bytes is None else format_bytes(compiled.collective_bytes),
        *_kernels(compiled, accelerator),
        None if bound is None else _milliseconds(bound),
        program.steps,
        total,
    ]
    return f'| {" | ".join("" if cell is None else str(cell) for cell in cells)} |'


def roofline_bound(program: Program, accelerator: Accelerator | None) -> float | None:
    """Returns the seconds of a step at the peaks of a device, below which no program is; None: unknown peaks."""
    if accelerator is None:
        return None
    return max(program.cost.flops / accelerator.flops, program.cost.bytes / accelerator.bandwidth)


def notes(accelerator: Accelerator | None) -> Iterator[str]:
    """Yields the lines that explain the columns; call it inside `jax.set_mesh`."""
    yield 'Memory and collectives are per device. weights: parameters, their moving average, codebooks. activations:'
    yield 'the rest of the peak, such as gradients and gathered parameters. collectives: bytes received per step.'
    yield 'TFLOP: matrix products and convolutions of one step on all devices, without recomputation. XLA TFLOP: also'
    yield 'elementwise work and recomputation, but a loop (sampling, grad_accum_steps, scan_layers) counts once.'
    if hardware.is_simulated(sharding.current_mesh().devices.flat[0]):
        yield "Nothing was compiled, since JAX's CUDA plugin is not installed; it needs no GPU:"
        yield f'pip install "jax[cuda13]=={jax.__version__}" adds peak, collectives, kernels and modeled time.'
    elif accelerator and accelerator.is_gpu:
        launch = f'{1e6 * gpu_kernels.LAUNCH_SECONDS:g} us'
        yield 'Of a GPU in a step: kernels: launches. moved: bytes read and written in memory. modeled: the sum'
        yield f'over kernels of {launch} and the time of bytes or of FLOPs, whichever is longer; without communication.'
    if accelerator:
        yield (
            f'bound: roofline bound of a step on {accelerator.name}, at {accelerator.flops / 1e12:.0f} TFLOP/s in '
            f'bfloat16 or {accelerator.bandwidth / 1e9:.0f} GB/s, whichever takes longer. Expect about twice that time.'
        )
    else:
        yield 'bound: unknown, since the peaks of these devices are not in vqvae2_jax/planning/hardware.py.'


def format_bytes(count: float) -> str:
    """Formats a number of bytes in MB or GB."""
    return f'{count / 1e9:.2f} GB' if count >= 1e8 else f'{count / 1e6:.2f} MB'


def _kernels(compiled, accelerator):
    # cells of kernels, moved and modeled
    if compiled.execution is None:
        return None, None, None
    total = gpu_kernels.total(compiled.execution.kernels, accelerator)
    return round(total.kernels), format_bytes(total.bytes), _milliseconds(total.seconds)


def _memory(program, compiled, accelerator):
    # cells of activations and peak
    if compiled.error:
        return None, 'does not fit'
    if compiled.peak is None:
        return None, None
    share = f' ({compiled.peak / accelerator.memory:.0%})' if accelerator else ''
    return format_bytes(compiled.peak - program.state), format_bytes(compiled.peak) + share


def _milliseconds(seconds):
    return f'{1e3 * seconds:.3g} ms' if seconds < 1 else f'{1e3 * seconds:.0f} ms'
