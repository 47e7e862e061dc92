"""Ctrl-C and SIGTERM as a question that long work asks between two steps, so that it can save and leave."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from vqvae2_jax.distributed import processes


class Interrupted(SystemExit):
    """The work was saved and stops here; the same command continues it. The process ends with 128 + the signal."""


def leave_together(stopped: Callable[[], int]) -> None:
    """Raises `Interrupted` on all processes where a signal came to any of them; all call this together."""
    if received := processes.process_max(stopped()):
        raise Interrupted(128 + received)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Within the context, SIGINT and SIGTERM only set a flag; yields a function that returns the signal or 0.

    Whoever asks leaves the context when it is safe to; its end raises `Interrupted`, so that no signal is swallowed,
    not even one that came too late to be asked for. A second signal of the same kind acts as usual, for the impatient.
    """
    received = 0
    previous = {}

    def remember(number, _):
        nonlocal received
        received = number
        signal.signal(number, previous[number])
        # Not print: a signal may come in the middle of one, which refuses to be entered twice.
        os.write(2, f'{signal.Signals(number).name}: saving before the exit ...\n'.encode())

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, remember)
    try:
        yield lambda: received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        raise Interrupted(128 + received)
