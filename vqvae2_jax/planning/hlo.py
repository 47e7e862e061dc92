"""Bytes that the collectives of a compiled program move, read from XLA's text of it."""

import itertools
import math
import re

_COLLECTIVE = re.compile(
    r'= (\S.*?) (all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-permute)(-start)?\('
)
_CALLED = re.compile(r'(?:calls|to_apply|branch_computations|(?:true|false)_computation)=\{?(%[^},]+(?:, %[^},]+)*)')
_LOOP = re.compile(r' while\(.*condition=%([\w.-]+), body=%([\w.-]+)')
_ITEM_SIZES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's64': 8, 'u64': 8}  # bytes; others 4


def collective_bytes(text: str) -> int | None:
    """Returns the bytes that collectives bring to one device in a call; a loop's body counts once per iteration.

    Args:
      text: the compiled program, from `compiled.as_text()`.

    Returns:
      Bytes; None if the text does not say how often a loop with collectives runs.
    """
    computations, entry, lines = {}, '', []
    for line in text.splitlines():
        if head := re.match(r'(ENTRY )?%([\w.-]+) \(.*\{$', line):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith(' '):
            lines.append(line)
    received = {}  # TPU programs split an asynchronous collective into pieces of one channel

    def walk(name, times):
        for line in computations.get(name, ()):
            if collective := _COLLECTIVE.search(line):
                channel = re.search(r'channel_id=\d+', line)
                key = channel[0] if channel else line
                received[key] = max(received.get(key, 0), times * _result_bytes(*collective.groups()))
            if loop := _LOOP.search(line):
                walk(loop[2], times * _trip_count(line, computations, loop[1]))
            for called in _CALLED.findall(line):
                for each in called.split(', '):
                    walk(each.removeprefix('%'), times)

    walk(entry, 1)
    total = sum(received.values())
    return None if math.isinf(total) else total


def _trip_count(loop, computations, condition):
    """Returns the number of a loop's iterations, from its line or the constant in its condition; else infinity."""
    known = re.findall(r'known_trip_count":\{"n":"(\d+)"', loop)
    if not known:
        lines = computations.get(condition, [])
        called = [name.removeprefix('%') for line in lines for name in _CALLED.findall(line)]
        text = '\n'.join(itertools.chain(lines, *(computations.get(name, []) for name in called)))
        known = re.findall(r' constant\((\d+)\)', text)
    return max(map(int, known), default=math.inf)


def _result_bytes(shapes, operation, start):
    sizes = re.findall(r'(\w+)\[([\d,]*)\]', shapes)
    if start and operation != 'all-reduce':  # operands, then results, then context values
        sizes = [size for size in sizes if size != ('u32', '')]
        sizes = sizes[len(sizes) // 2 :]
    return sum(_ITEM_SIZES.get(dtype, 4) * math.prod(int(n) for n in size.split(',') if n) for dtype, size in sizes)
