"""The text of a compiled program (XLA's HLO), parsed; and the bytes that its collectives move."""

import functools
import itertools
import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r'(ENTRY )?%([\w.-]+) \(.*\{$')
_OPERATION = re.compile(r'\s+(ROOT )?%([\w.-]+) = ')
_CALLED = re.compile(r'(?:calls|to_apply|branch_computations|(?:true|false)_computation)=\{?(%[^},]+(?:, %[^},]+)*)')
_ITEM_SIZES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 'token': 0}  # bytes; others 4
_ITEM_SIZES |= dict.fromkeys(('s64', 'u64', 'f64', 'c64'), 8) | dict.fromkeys(('f8e4m3fn', 'f8e5m2'), 1)
_COLLECTIVES = {'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute'}


class Operation(NamedTuple):
    """A line of a computation, `%name = shape opcode(arguments), attributes`.

    Attributes:
      name: without '%'.
      shape: of the result, as text: 'f32[8,4]{1,0}', or several in parentheses.
      opcode: such as 'fusion'.
      arguments: the text in parentheses.
      attributes: the text after them.
      is_root: whether it is the result of its computation.
    """

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operations whose results it reads."""
        return re.findall(r'%([\w.-]+)', self.arguments)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs, those of a loop excepted."""
        names = ', '.join(_CALLED.findall(self.attributes)).split(', ')
        return [name.removeprefix('%') for name in names if name]

    @property
    def result_bytes(self) -> int:
        """Bytes of the result; of the start of an asynchronous operation those of the result to come."""
        arrays = array_shapes(self.shape)
        if self.opcode.endswith('-start') and self.opcode != 'all-reduce-start':
            # Operands, then results, then context values.
            arrays = [array for array in arrays if array != ('u32', ())]
            arrays = arrays[len(arrays) // 2 :]
        return sum(_ITEM_SIZES.get(dtype, 4) * math.prod(dimensions) for dtype, dimensions in arrays)

    def attribute(self, pattern: str) -> str:
        """Returns the first group of the first match of a pattern in the attributes; '' if there is none."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ''


Computation = dict[str, Operation]


class Module(NamedTuple):
    """A program.

    Attributes:
      computations: {name of the computation: {name of the operation: operation}}, in the order of the text.
      entry: name of the computation that runs first.
    """

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Parses the text of a compiled program, from `compiled.as_text()`."""
    computations, entry, operations = {}, '', {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            operations = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif start := _OPERATION.match(line):
            operations[start[2]] = _operation(start[2], line[start.end() :], bool(start[1]))
    return Module(computations, entry)


@functools.lru_cache(maxsize=2**16)
def array_shapes(shape: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns (dtype, dimensions) of every array in the text of a shape."""
    found = re.findall(r'(\w+)\[([\d,]*)\]', shape)
    return tuple((dtype, tuple(int(n) for n in dimensions.split(',') if n)) for dtype, dimensions in found)


def known_trip_count(loop: Operation) -> int | None:
    """Returns how often XLA says that the body of a `while` runs; None: it does not say."""
    known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
    return int(known) if known else None


def collective_bytes(module: Module) -> int | None:
    """Returns the bytes that collectives bring to one device in a call; a loop's body counts once per iteration.

    Returns:
      Bytes; None if the text does not say how often a loop with collectives runs.
    """
    received = {}  # TPU programs split an asynchronous collective into pieces of one channel

    def walk(name, times):
        for operation in module.computations.get(name, {}).values():
            if operation.opcode.removesuffix('-start') in _COLLECTIVES:
                key = operation.attribute(r'channel_id=(\d+)') or operation.name
                received[key] = max(received.get(key, 0), times * operation.result_bytes)
            if operation.opcode == 'while':
                body = operation.attribute(r'body=%([\w.-]+)')
                walk(body, times * (known_trip_count(operation) or _largest_bound(module, operation)))
            for called in operation.called:
                walk(called, times)

    walk(module.entry, 1)
    total = sum(received.values())
    return None if math.isinf(total) else total


def _operation(name, text, is_root):
    end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
    opening = text.index('(', end)
    closing = _closing(text, opening)
    opcode = text[end:opening].strip()
    return Operation(name, text[:end], opcode, text[opening + 1 : closing], text[closing + 1 :], is_root)


def _closing(text, opening):
    # the index of the parenthesis that closes the one at `opening`
    depth = 0
    for match in re.compile(r'[()]').finditer(text, opening):
        depth += 1 if match[0] == '(' else -1
        if not depth:
            return match.start()
    return len(text)


def _largest_bound(module, loop):
    # TPU programs do not state the number of iterations: the largest constant that the condition compares with
    condition = module.computations.get(loop.attribute(r'condition=%([\w.-]+)'), {})
    called = [module.computations.get(name, {}) for operation in condition.values() for name in operation.called]
    operations = itertools.chain(*(part.values() for part in (condition, *called)))
    constants = [o.arguments for o in operations if o.opcode == 'constant' and o.arguments.isdecimal()]
    return max(map(int, constants), default=math.inf)
