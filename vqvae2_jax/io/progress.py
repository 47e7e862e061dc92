"""Log lines of long phases: progress, and the time left."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from vqvae2_jax.io.logging import format_duration, format_number

_EVERY = 10.0  # seconds between two lines


class Progress:
    """Prints the progress of a phase at most every 10 seconds, with its rate and the time left.

    A phase that takes less prints nothing. Only the main process prints, since standard output of the others is closed.
    """

    def __init__(self, name: str, total: int, unit: str = 'images'):
        """`total`: how many units the phase has to do."""
        self._name, self._total, self._unit = name, total, unit
        self._begin = self._last = time.monotonic()

    def update(self, done: int) -> None:
        """Prints a line if the last one is 10 seconds old. `done`: units done so far in this phase."""
        now = time.monotonic()
        if now - self._last < _EVERY or not done:
            return
        self._last, done = now, min(done, self._total)  # the last batch may be padded
        rate = done / (now - self._begin)
        left = format_duration((self._total - done) / rate)
        percent = 100 * done // max(self._total, 1)
        print(
            f'{self._name}  {done}/{self._total} {percent}%  {format_number(rate, 3)} {self._unit}/s  ETA {left}',
            flush=True,
        )


def track(values: Sequence, name: str, unit: str = 'images') -> Iterator[Any]:
    """Yields the values of a loop and prints its progress; the arguments are as those of `Progress`."""
    progress = Progress(name, len(values), unit)
    for done, value in enumerate(values, start=1):
        yield value
        progress.update(done)
