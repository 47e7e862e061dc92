"""The SPMD programs of training, extraction and sampling, built from shapes alone and compiled ahead of time.

Call everything inside `jax.set_mesh`. The devices need not be attached: no array is created and nothing runs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vqvae2_jax import api
from vqvae2_jax.distributed import sharding
from vqvae2_jax.planning import cost, gpu_kernels, hardware, hlo, products
from vqvae2_jax.tasks.task import Task
from vqvae2_jax.training import loop, optim

Shapes = dict[str, jax.ShapeDtypeStruct]


class Program(NamedTuple):
    """A jitted function with the shapes of its inputs.

    Attributes:
      name: section of the config for a training, name of the job for the rest.
      function: jitted.
      inputs: its arguments as `jax.ShapeDtypeStruct` with shardings.
      parameters: number of parameters.
      weights: bytes per device of parameters, their moving average and codebooks.
      optimizer: bytes per device of the optimizer's state.
      cost: of one step on one device.
      batch_size: the global one.
      steps: number of steps; None: unknown without the data.
    """

    name: str
    function: Callable
    inputs: tuple
    parameters: int
    weights: int
    optimizer: int
    cost: cost.Cost
    batch_size: int
    steps: int | None

    @property
    def state(self) -> int:
        """Bytes per device that stay from step to step."""
        return self.weights + self.optimizer


class Compiled(NamedTuple):
    """Statistics of a compiled program per device and step; None where the compiler has none.

    Attributes:
      peak: bytes of memory.
      flops: XLA's count, in which a loop's body counts once.
      collective_bytes: bytes that collectives bring to a device.
      error: the compiler's message if the program does not fit.
      execution: the kernels, of a program for GPUs.
      uncounted: why the kernels of such a program are not known; '' if they are.
    """

    peak: int | None = None
    flops: float | None = None
    collective_bytes: int | None = None
    error: str = ''
    execution: gpu_kernels.Execution | None = None
    uncounted: str = ''


def image_shapes(batch_size: int, image_size: tuple[int, int], channels: int) -> Shapes:
    """Returns the shapes of a batch of images, {'image': uint8 [B, H, W, C], 'label': int32 [B]}."""
    return {
        'image': jax.ShapeDtypeStruct((batch_size, *image_size, channels), jnp.uint8),
        'label': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }


def code_shapes(batch_size: int, map_shapes: Sequence[tuple[int, int]]) -> Shapes:
    """Returns the shapes of a batch of codes, {'codes_l': int32 [B, h_l, w_l], 'label': int32 [B]}."""
    codes = {f'codes_{level}': (batch_size, *shape) for level, shape in enumerate(map_shapes)}
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in {**codes, 'label': (batch_size,)}.items()}


def train_program(name: str, task: Task, reference: Task, config: optim.TrainConfig, batch: Shapes) -> Program:
    """Builds one training step.

    Args:
      name: the section of the config, such as 'prior.top'.
      task: the task.
      reference: the task in plain JAX, whose work is counted: a kernel may do more, or hide it.
      config: the training settings.
      batch: shapes of a global batch, from `image_shapes` or `code_shapes`.
    """
    optimizer, key = optim.make_optimizer(config), jax.eval_shape(jax.random.key, 0)
    batch = _sharded(batch, config.batch_size)
    flags = jax.ShapeDtypeStruct((sharding.current_mesh().size,), jnp.bool_, sharding=sharding.batch_sharding())
    state = jax.eval_shape(loop.make_init(task, optimizer), key, batch)
    layout = loop.state_sharding(state)
    inputs = sharding.abstract_state(state, layout)
    forward = cost.count(reference.loss, state.params, state.model_state, _local(batch), key)
    return Program(
        name,
        loop.make_step(task, optimizer, config, layout),
        (inputs, batch | {loop.SHOULD_STOP: flags}),
        parameters=_size(state.params),
        weights=_bytes_per_device((inputs.params, inputs.ema_params, inputs.model_state)),
        optimizer=_bytes_per_device(inputs.opt_state),
        cost=forward.times(3),  # the backward pass does about twice the work of the forward pass
        batch_size=config.batch_size,
        steps=config.steps,
    )


def encode_program(generator: api.Generator, batch: Shapes) -> Program:
    """Builds the extraction of the codes of one batch.

    Args:
      generator: stage 1, with shapes as leaves.
      batch: shapes of a global batch, from `image_shapes`.
    """
    weights, size = _fsdp(generator), batch['image'].shape[0]
    images = _sharded({'image': batch['image']}, size)
    work = cost.count(api.encode, generator, _local(images)['image'])
    inputs, params = (weights, images['image']), generator.variables['params']
    return _inference_program('extract_codes', api.encode, inputs, params, weights, work, size, None)


def sample_program(
    generator: api.Generator, settings: dict[str, dict[str, Any]], *, batch_size: int, count: int
) -> Program:
    """Builds the sampling of one batch.

    Args:
      generator: the networks, with shapes as leaves.
      settings: arguments of `api.sample`, {name: {level: value}}.
      batch_size: the global one.
      count: number of samples.
    """

    def sample(generator, keys, labels, settings):
        return api.sample(generator, keys, labels, **settings)

    weights, rows = _fsdp(generator), jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    keys = jax.eval_shape(lambda index: api.sample_keys(jax.random.key(0), index), rows)
    batch = _sharded({'keys': keys, 'labels': rows}, batch_size)
    work = cost.count(sample, generator, *_local(batch).values(), settings)
    if (shards := sharding.num_batch_shards(batch_size)) > 1:
        # How the sampler groups positions depends on the size of the whole batch.
        whole = cost.count(sample, generator, *batch.values(), settings)
        work = work._replace(flops=whole.flops / shards)
    inputs, steps = (weights, batch['keys'], batch['labels'], settings), -(-count // batch_size)
    return _inference_program('sample', sample, inputs, generator.params, weights, work, batch_size, steps)


def _inference_program(name, function, inputs, params, weights, work, batch_size, steps):
    # Weights are all-gathered in the program; between calls they are sharded. Devices hold also those that the program
    # does not use, the decoder or the encoder.
    function = jax.jit(function, keep_unused=True)
    return Program(name, function, inputs, _size(params), _bytes_per_device(weights), 0, work, batch_size, steps)


def compile_program(program: Program, trips: float | None = None) -> Compiled:
    """Compiles a program for the devices of the mesh, which may take minutes; simulated devices give no statistics.

    Args:
      program: the program.
      trips: the mean number of iterations of loops whose program states none, see `gpu_kernels.execution`.
    """
    if hardware.is_simulated(sharding.current_mesh().devices.flat[0]):
        return Compiled()
    try:
        return statistics(compile_executable(program), trips)
    except jax.errors.JaxRuntimeError as error:  # raised by compilers for accelerators if a program cannot fit
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return Compiled(error=str(error).splitlines()[0])


def statistics(executable: jax.stages.Compiled, trips: float | None = None) -> Compiled:
    """Returns the statistics of an executable for the devices of the mesh; arguments as in `compile_program`."""
    memory, module = executable.memory_analysis(), hlo.parse(executable.as_text())
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak += memory.temp_size_in_bytes
    flops = (executable.cost_analysis() or {}).get('flops')
    execution, uncounted = _execution(module, hardware.hardware_of(sharding.current_mesh().devices.flat[0]), trips)
    return Compiled(peak, flops, hlo.collective_bytes(module), execution=execution, uncounted=uncounted)


def compile_executable(program: Program) -> jax.stages.Compiled:
    """Compiles a program for the devices of the mesh; attached ones can run the result."""
    lowered = program.function.lower(*program.inputs)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # XLA's generator of GPU kernels fails on some tiny products, for which an attached GPU would take a library.
        if 'find output tile sizes' not in str(error):
            raise
        return lowered.compile(compiler_options={'xla_gpu_enable_triton_gemm': False})


def _execution(module, accelerator, trips):
    if not accelerator or not accelerator.is_gpu:
        return None, ''
    try:
        return gpu_kernels.execution(module, accelerator, trips), ''
    except (gpu_kernels.UnknownTripCount, products.UnknownCall) as error:
        return None, str(error)


def _sharded(batch, size):
    shard = sharding.batch_sharding(size)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shard) for name, x in batch.items()}


def _local(batch):
    # the part of a batch on one device
    return {name: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype) for name, x in batch.items()}


def _fsdp(shapes):
    return sharding.abstract_state(shapes, jax.tree.map(sharding.fsdp_sharding, shapes))


def _size(params):
    return sum(x.size for x in jax.tree.leaves(params))


def _bytes_per_device(tree):
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
