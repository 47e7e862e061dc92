"""What a program computes: FLOPs and bytes of its matrix products and convolutions, counted in its jaxpr.

A loop counts as often as it runs, which XLA's own count does not do. Elementwise work is left out.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax


class Cost(NamedTuple):
    """Of one call."""

    flops: float = 0.0
    bytes: float = 0.0  # operands and results of products and convolutions: the traffic if all else is fused

    def __add__(self, other: 'Cost') -> 'Cost':
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> 'Cost':
        return Cost(self.flops * factor, self.bytes * factor)


def count(function: Callable, *arguments) -> Cost:
    """The cost of a call with these arguments, or with arrays of their shapes."""
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr) -> Cost:
    return sum((_of_equation(equation) for equation in jaxpr.eqns), Cost())


def _of_equation(equation) -> Cost:
    name, parameters = equation.primitive.name, equation.params
    if name == 'dot_general':
        (contracted, _), _ = parameters['dimension_numbers']
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return _product(equation, depth)
    if name == 'conv_general_dilated':
        kernel, layout = equation.invars[1].aval.shape, parameters['dimension_numbers'].rhs_spec
        depth = math.prod(kernel) / kernel[layout[0]]  # one output's: window times input features of its group
        return _product(equation, depth / math.prod(parameters['lhs_dilation']))
    inner = [
        getattr(found, 'jaxpr', found)
        for value in parameters.values()
        for found in (value if isinstance(value, tuple | list) else [value])
        if hasattr(getattr(found, 'jaxpr', found), 'eqns')
    ]
    if name == 'cond':
        return max((_of_jaxpr(branch) for branch in inner), default=Cost())
    return sum((_of_jaxpr(jaxpr) for jaxpr in inner), Cost()).times(
        parameters.get('length', 1) if name == 'scan' else 1
    )


def _product(equation, depth) -> Cost:
    arrays = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    moved = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    return Cost(2 * depth * math.prod(equation.outvars[0].aval.shape), moved)
