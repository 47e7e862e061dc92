"""Graceful shutdown: SIGINT, SIGTERM and SIGHUP set a flag that long loops poll, so that they save before they exit."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from vqvae2_jax.distributed import processes
from vqvae2_jax.io import terminal

STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Interrupted(SystemExit):
    """The work was saved and stops here; the same command continues it. The exit status is 128 plus the signal."""


def exit_together(received_signal: Callable[[], int]) -> None:
    """Raises `Interrupted` on all processes if any of them received a signal; all processes call this together."""
    if received := processes.process_max(received_signal()):
        raise Interrupted(128 + received)


@contextlib.contextmanager
def stop_signals(
    message: str = 'saving before the exit; the same command continues',
) -> Iterator[Callable[[], int]]:
    """Within the context, SIGINT, SIGTERM and SIGHUP only set a flag; a SIGHUP that is ignored (nohup) stays ignored.

    The end of the context raises `Interrupted` on all processes if a signal came to any of them, even one that came too
    late for the loop to see. All processes enter and leave the context together. The same signal, sent again, acts as
    usual, for users who do not want to wait.

    Args:
      message: printed to standard error when the signal comes.

    Yields:
      A function that returns the signal received, or 0.
    """
    received = 0
    previous = {}

    def remember(number, _):
        nonlocal received
        received = number
        signal.signal(number, previous[number])
        with contextlib.suppress(OSError):  # the terminal may be gone
            # Not print: a signal may interrupt a print, which cannot be entered twice.
            os.write(2, f'{signal.Signals(number).name}: {message}\n'.encode())

    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, remember)
    try:
        with terminal.saves_on_interrupt():  # inside of the handlers, so that no signal is lost at either end
            yield lambda: received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    exit_together(lambda: received)
