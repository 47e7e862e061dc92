"""Ctrl-C and SIGTERM as a question that long work asks between two steps, so that it can save and leave."""

import contextlib
import signal
from collections.abc import Callable, Iterator


class Interrupted(SystemExit):
    """The work was saved and stops here; the same command continues it. The process ends with 128 + the signal."""


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Within the context, SIGINT and SIGTERM only set a flag; yields a function that returns the signal or 0.

    A second signal of the same kind acts as usual, for the impatient.
    """
    received = 0
    previous = {}

    def remember(number, _):
        nonlocal received
        received = number
        signal.signal(number, previous[number])
        print(f'{signal.Signals(number).name}: saving before the exit ...', flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, remember)
    try:
        yield lambda: received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
