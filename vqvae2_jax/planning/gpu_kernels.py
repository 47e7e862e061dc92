"""The kernels that a compiled program starts on a GPU, with their bytes and FLOPs, and a modeled time.

A kernel takes the longer of its memory traffic at the peak bandwidth and its FLOPs at the peaks of their precisions,
plus the time of a launch. The model is optimistic where a kernel does not reach the peaks, and knows nothing of the
interconnect: collectives count as memory traffic. It was not compared with a GPU yet. Fusions, arrays in memory and the
number of kernels of a step are facts about the program. Without a GPU the compiler tries out no variants of a product
or convolution (autotuning); an attached GPU may start other kernels.
"""

import collections
import math
from collections.abc import Iterable
from typing import NamedTuple

from vqvae2_jax.planning import hlo
from vqvae2_jax.planning.hardware import Accelerator
from vqvae2_jax.planning.hlo import Computation, Module, Operation
from vqvae2_jax.planning.products import call_target, product_flops

LAUNCH_SECONDS = 1.5e-6  # of one kernel in a captured graph; 3e-6 to 5e-6 where the host launches each
_NO_KERNEL = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'iota', 'partition-id'}
_NO_KERNEL |= {'replica-id', 'opt-barrier'}
_SLICES = {'slice', 'dynamic-slice', 'gather'}


class UnknownTripCount(ValueError):
    """The program does not say how often a loop runs."""


class Kernel(NamedTuple):
    """A kernel of a program.

    Attributes:
      times: how often a call of the program starts it.
      kind: the opcode, or the target of a call of a library.
      name: in the program, with the start of its shape.
      source: the JAX operation that it comes from.
      bytes: that it reads and writes in memory.
      flops: {precision: FLOPs} of its products and convolutions, of the precisions of `Accelerator.peak`.
      loops: names of the loops around it, the outermost first.
    """

    times: float
    kind: str
    name: str
    source: str
    bytes: float
    flops: dict[str, float]
    loops: tuple[str, ...]

    def compute_seconds(self, gpu: Accelerator) -> float:
        """Returns the time of its FLOPs at the peaks."""
        return sum(count / gpu.peak(precision) for precision, count in self.flops.items())

    def seconds(self, gpu: Accelerator) -> float:
        """Returns the modeled time of one launch."""
        return max(self.bytes / gpu.bandwidth, self.compute_seconds(gpu)) + LAUNCH_SECONDS


class Totals(NamedTuple):
    """Sums over kernels, each as often as it runs.

    Attributes:
      kernels: number of launches.
      bytes: memory traffic.
      flops: of products and convolutions, recomputation included.
      seconds: the modeled time.
      memory_seconds: of the memory traffic alone.
      compute_seconds: of the FLOPs alone.
    """

    kernels: float
    bytes: float
    flops: float
    seconds: float
    memory_seconds: float
    compute_seconds: float

    @property
    def launch_seconds(self) -> float:
        """The time of the launches alone."""
        return self.kernels * LAUNCH_SECONDS


class Loop(NamedTuple):
    """A loop of a program.

    Attributes:
      name: in the program.
      source: the JAX operation that it comes from.
      iterations: how often a call of the program runs its body.
      iteration: sums of one iteration, inner loops included.
      launches: of the loop in a call of the program, without those of inner loops.
    """

    name: str
    source: str
    iterations: float
    iteration: Totals
    launches: float


class Execution(NamedTuple):
    """The kernels that a call of a program runs on one GPU.

    Attributes:
      kernels: all kernels.
      loops: all loops.
    """

    kernels: list[Kernel]
    loops: list[Loop]


def execution(module: Module, gpu: Accelerator, trips: float | None = None) -> Execution:
    """Finds the kernels of a program: of a loop as often as it runs, of a conditional those of the longest branch.

    Args:
      module: the program, compiled for the GPU.
      gpu: its peaks.
      trips: the mean number of iterations of loops whose program does not state one, such as a loop with a traced
        bound.

    Raises:
      UnknownTripCount: there is such a loop and `trips` is None.
      products.UnknownCall: the program calls a library or a kernel of which FLOPs cannot be counted.
    """
    loops = {}  # name -> (operation, iterations)

    def walk(name, times, around):
        found = []
        for operation in module.computations[name].values():
            if operation.opcode in _NO_KERNEL or operation.opcode.endswith(('-done', '-update')):
                continue
            if operation.opcode == 'while':
                found += walk_loop(operation, times, around)
            elif operation.opcode == 'conditional':
                branches = [walk(branch, times, around) for branch in operation.called]
                found += max(branches, key=lambda kernels: total(kernels, gpu).seconds)
            elif operation.opcode in ('call', 'async-start'):
                for called in operation.called:
                    found += walk(called, times, around)
            else:
                found.append(_kernel(module, name, operation, times, around))
        return found

    def walk_loop(loop, times, around):
        known = hlo.known_trip_count(loop)
        if known is None and trips is None:
            raise UnknownTripCount(
                f'loop {loop.name} ({_source(loop)}) has no known number of iterations: give their mean as trips'
            )
        times *= trips if known is None else known
        loops[loop.name] = loop, times
        inside = *around, loop.name
        # The host tests the condition of a loop with a known count.
        condition = walk(loop.attribute(r'condition=%([\w.-]+)'), times, inside) if known is None else []
        return walk(loop.attribute(r'body=%([\w.-]+)'), times, inside) + condition

    kernels = walk(module.entry, 1, ())
    return Execution(kernels, [_loop(*loop, kernels, gpu) for loop in loops.values() if loop[1]])


def total(kernels: Iterable[Kernel], gpu: Accelerator) -> Totals:
    """Sums over kernels."""
    sums = [0.0] * len(Totals._fields)
    for kernel in kernels:
        flops = sum(kernel.flops.values())
        seconds = kernel.seconds(gpu), kernel.bytes / gpu.bandwidth, kernel.compute_seconds(gpu)
        for index, value in enumerate((1, kernel.bytes, flops, *seconds)):
            sums[index] += kernel.times * value
    return Totals(*sums)


def busiest_loop(loops: Iterable[Loop]) -> Loop | None:
    """Returns the loop that launches most kernels, those of inner loops not counted; None: there are no loops."""
    return max(loops, key=lambda loop: loop.launches, default=None)


def by_kind(kernels: Iterable[Kernel], gpu: Accelerator) -> dict[str, Totals]:
    """Returns the sums per kind of kernel, the longest first."""
    groups = collections.defaultdict(list)
    for kernel in kernels:
        groups[kernel.kind].append(kernel)
    sums = {kind: total(group, gpu) for kind, group in groups.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1].seconds))


def _kernel(module, computation, operation, times, around):
    return Kernel(
        times,
        call_target(operation) or operation.opcode,
        f'{operation.name} {operation.shape[:60]}',
        _source(operation),
        moved_bytes(module, computation, operation),
        product_flops(module, computation, operation),
        around,
    )


def _source(operation):
    return operation.attribute(r'op_name="([^"]*)"')


def _loop(operation, iterations, kernels, gpu):
    inside = [kernel for kernel in kernels if operation.name in kernel.loops]
    launches = sum(kernel.times for kernel in inside if kernel.loops[-1] == operation.name)
    iteration = total((kernel._replace(times=kernel.times / iterations) for kernel in inside), gpu)
    return Loop(operation.name, _source(operation), iterations, iteration, launches)


def moved_bytes(module: Module, computation: str, operation: Operation) -> float:
    """Returns the bytes that a kernel reads and writes; of an array that it slices or updates in place, the slice.

    An array counts once, however often a kernel reads it.

    Args:
      module: the program.
      computation: name of the computation of the kernel.
      operation: the kernel.
    """
    if operation.opcode == 'fusion':
        return _fusion_bytes(module.computations[operation.called[0]])
    operations = module.computations[computation]
    sizes = [operations[name].result_bytes for name in operation.operands if name in operations]
    if operation.opcode == 'dynamic-update-slice':
        return 2 * sizes[1]
    if operation.opcode in _SLICES:
        return operation.result_bytes + min(operation.result_bytes, sizes[0]) + sum(sizes[1:])
    return _written_bytes(operation) + sum(sizes)


def _written_bytes(operation):
    # libraries return their workspace as the last result
    if call_target(operation).startswith(('__cudnn$', '__cublas$')) and operation.shape.startswith('('):
        return operation._replace(shape=operation.shape.rpartition(' ')[0]).result_bytes
    return operation.result_bytes


def _fusion_bytes(body: Computation) -> float:
    root = next(operation for operation in body.values() if operation.is_root)
    updates = set()  # names of the updates in place
    written = 0.0
    for name in root.operands if root.opcode == 'tuple' else [root.name]:
        chain = _updates_in_place(body, name)
        updates |= set(chain)
        written += sum(body[body[update].operands[1]].result_bytes for update in chain) or body[name].result_bytes
    users = collections.defaultdict(list)
    for operation in body.values():
        for index, operand in enumerate(operation.operands):
            users[operand].append((operation, index))
    parameters = [operation for operation in body.values() if operation.opcode == 'parameter']
    return written + sum(_read_bytes(parameter, users, updates) for parameter in parameters)


def _updates_in_place(body, name):
    # the updates that turn a parameter into the result `name`, the last first; [] if it is not such a result
    chain, operation = [], body[name]
    while operation.opcode in ('bitcast', 'dynamic-update-slice'):
        chain += [operation.name] if operation.opcode == 'dynamic-update-slice' else []
        operation = body[operation.operands[0]]
    return chain if operation.opcode == 'parameter' else []


def _read_bytes(parameter, users, updates):
    def read(name):
        for operation, index in users[name]:
            if operation.opcode == 'bitcast':
                yield from read(operation.name)
            elif index == 0 and operation.opcode in _SLICES:
                yield operation.result_bytes
            elif index or operation.name not in updates:
                yield math.inf  # all of it

    return min(sum(read(parameter.name)), parameter.result_bytes)
