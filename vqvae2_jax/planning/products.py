"""FLOPs of the products and convolutions in a compiled GPU program, also inside fusions and calls of libraries.

A multiply-add counts as two FLOPs. They are keyed by the precision that decides their peak: 'bfloat16' (also float16),
'tf32' (float32 at the default precision, on tensor cores) or 'float32' (`Precision.HIGHEST`).
"""

import json
import math
import re
from collections.abc import Callable

from vqvae2_jax.planning.hlo import Module, Operation, array_shapes

_NO_PRODUCTS = {'__gpu$TopK', '__cub$DeviceRadixSort', 'cu_threefry2x32_ffi'}
_PALLAS = {'__gpu$xla.gpu.triton', 'mosaic_gpu_v2'}


class UnknownCall(ValueError):
    """A program calls a library or a kernel of which FLOPs cannot be counted."""


def product_flops(module: Module, computation: str, operation: Operation) -> dict[str, float]:
    """Returns {precision: FLOPs} of an operation; empty if it computes no product.

    Args:
      module: the program.
      computation: name of the computation of the operation.
      operation: the operation.

    Raises:
      UnknownCall: it calls a library or a Pallas kernel that is not in this file.
    """
    if operation.opcode == 'fusion':
        found = {}
        for name in operation.called:
            for inner in module.computations[name].values():
                for precision, flops in product_flops(module, name, inner).items():
                    found[precision] = found.get(precision, 0) + flops
        return found
    if operation.opcode not in ('dot', 'convolution', 'custom-call'):
        return {}
    operands = [_shape(module.computations[computation][name]) for name in operation.operands]
    target = call_target(operation)
    if target in _PALLAS:
        name = _pallas_name(operation)
        if name not in PALLAS_FLOPS:
            raise _unknown(operation, f'the Pallas kernel {name}')
        return PALLAS_FLOPS[name](operands)
    flops = _flops(operation, [dimensions for _, dimensions in operands])
    return {_precision(operation, operands[0][0]): flops} if flops else {}


def call_target(operation: Operation) -> str:
    """Returns the function that a custom call runs, such as '__cudnn$convForward'; '' for other operations."""
    return operation.attribute(r'custom_call_target="([^"]+)"')


def _flops(operation, operands):
    if operation.opcode == 'dot':
        return _dot_flops(operation, operands)
    if operation.opcode == 'convolution':
        return _convolution_flops(operation, operands)
    target = call_target(operation)
    for prefix, count in _LIBRARIES.items():
        if target.startswith(prefix):
            return count(operation, operands)
    if target in _NO_PRODUCTS:
        return 0
    raise _unknown(operation, target)


def _unknown(operation, target):
    return UnknownCall(f'{operation.name} calls {target}, of which vqvae2_jax/planning/products.py knows no FLOPs')


def _shape(operation):
    # dtype and dimensions of the first array of the result
    return array_shapes(operation.shape)[0]


def _precision(operation, dtype):
    if dtype in ('bf16', 'f16'):
        return 'bfloat16'
    highest = re.search(r'operand_precision\W+[\w",]*highest', operation.attributes, re.IGNORECASE)
    return 'float32' if highest or dtype != 'f32' else 'tf32'


def _dot_flops(operation, operands):
    contracted = operation.attribute(r'lhs_contracting_dims=\{([\d,]*)\}')
    return _contraction_flops(operation, operands[0], contracted.split(','))


def _library_product_flops(operation, operands):
    contracted = operation.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    return _contraction_flops(operation, operands[0], contracted.replace('"', '').split(','))


def _contraction_flops(operation, left, contracted):
    depth = math.prod(left[int(axis)] for axis in contracted if axis)
    return 2.0 * depth * math.prod(_shape(operation)[1])


def _convolution_flops(operation, operands):
    # Every value of the output side meets the kernel's window and the input features of its group. For the gradients
    # cuDNN keeps the labels of the forward pass.
    target, output = call_target(operation), _shape(operation)[1]
    if 'BackwardFilter' in target:
        kernel, output = output, operands[1]
    else:
        kernel = operands[1]
    if 'BackwardInput' in target:
        output = operands[0]
    features = kernel[operation.attribute(r'dim_labels=\w+?_(\w+)->').index('o')]
    return 2.0 * math.prod(output) * math.prod(kernel) / features


def _attention_flops(operation, operands):
    # Forward two products, backward five, since the scores are computed again; masked positions included.
    scores = json.loads(operation.attribute(r'"intermediate_tensor_shape":.*?"dimensions":\s*(\[[^\]]*\])'))
    products = 5 if call_target(operation).endswith('Backward') else 2
    return 2.0 * products * math.prod(map(int, scores)) * operands[0][-1]


def _pallas_name(operation):
    # Triton's calls state the name; in the path of all it stands before the primitive.
    return operation.attribute(r'\bname = "([^"]+)"') or operation.attribute(r'(\w+)\)*/pallas_call"')


_LIBRARIES: dict[str, Callable] = {
    '__cudnn$conv': _convolution_flops,
    '__cudnn$fmha': _attention_flops,
    '__cublas$': _library_product_flops,
}


Operands = list[tuple[str, tuple[int, ...]]]  # dtype and dimensions of each


def nearest_flops(operands: Operands) -> dict[str, float]:
    """Returns {precision: FLOPs} of `kernels.nearest`: vectors [N, D], three bfloat16 parts of the codebook [3, K, D].

    It multiplies each part with bfloat16 vectors. Of float32 vectors it multiplies six pairs of parts.
    """
    (dtype, vectors), (_, codebook) = operands[:2]
    pairs = 3 if dtype == 'bf16' else 6
    return {'bfloat16': 2.0 * pairs * vectors[0] * math.prod(codebook[1:])}


# By the `name` of `pallas_call`: {precision: FLOPs}, given the operands. Their bytes are those of all operands and
# results, each once.
PALLAS_FLOPS: dict[str, Callable[[Operands], dict[str, float]]] = {'nearest': nearest_flops}
