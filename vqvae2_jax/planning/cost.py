"""FLOPs and bytes of a program's matrix products and convolutions, counted in its jaxpr.

A loop's body counts once per iteration, unlike in XLA's own count. Elementwise work is not counted. Of a conditional
the most expensive branch counts. Of the forms of `jax.lax.platform_dependent` the cheapest counts, because more work in
another form, such as padding that suits a platform, computes nothing more.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.interpreters.partial_eval import dce_jaxpr


class Cost(NamedTuple):
    """The work of one call.

    Attributes:
      flops: floating-point operations; a multiply-add counts as two.
      bytes: of operands and results of products and convolutions: the memory traffic if all else is fused.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: 'Cost') -> 'Cost':
        """Returns the work of both calls."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> 'Cost':
        """Returns the work of `factor` such calls."""
        return Cost(self.flops * factor, self.bytes * factor)


def count(function: Callable, *arguments: Any) -> Cost:
    """Counts the work of a call, without code whose results are unused, which XLA removes too.

    Args:
      function: any function that JAX can trace.
      *arguments: its arguments, as arrays or as `jax.ShapeDtypeStruct`.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return _jaxpr_cost(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _jaxpr_cost(jaxpr) -> Cost:
    return sum((_equation_cost(equation) for equation in jaxpr.eqns), Cost())


def _equation_cost(equation) -> Cost:
    name, parameters = equation.primitive.name, equation.params
    if name == 'dot_general':
        (contracted, _), _ = parameters['dimension_numbers']
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return _product_cost(equation, depth)
    if name == 'conv_general_dilated':
        kernel, layout = equation.invars[1].aval.shape, parameters['dimension_numbers'].rhs_spec
        depth = math.prod(kernel) / kernel[layout[0]]  # per output: window times input features of its group
        return _product_cost(equation, depth / math.prod(parameters['lhs_dilation']))
    inner = [
        getattr(value, 'jaxpr', value)
        for parameter in parameters.values()
        for value in (parameter if isinstance(parameter, tuple | list) else [parameter])
        if hasattr(getattr(value, 'jaxpr', value), 'eqns')
    ]
    if name == 'cond':
        extreme = min if parameters.get('branches_platforms') else max
        return extreme((_jaxpr_cost(branch) for branch in inner), default=Cost())
    total = sum((_jaxpr_cost(jaxpr) for jaxpr in inner), Cost())
    return total.times(parameters['length']) if name == 'scan' else total


def _product_cost(equation, depth) -> Cost:
    arrays = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    moved = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    return Cost(2 * depth * math.prod(equation.outvars[0].aval.shape), moved)
