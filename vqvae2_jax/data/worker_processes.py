"""Worker processes of the loader: signals, and why one has ended."""

import contextlib
import errno
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker

_SHARED_MEMORY = '/dev/shm'
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
# Grain has no class for it.
_DEAD = re.compile(r'Worker process was terminated unexpectedly with exit code (-?\d+)')


@contextlib.contextmanager
def block_stop_signals() -> Iterator[None]:
    """Blocks stop signals for threads and processes that start inside: a worker must not die while it starts."""
    # Workers would start the tracker, and its start unblocks signals. It removes silently what killed workers leave.
    sys.warnoptions.append('ignore:resource_tracker')
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.pop()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare(worker: int, workers: int) -> None:
    """Runs in every worker process: a terminal sends its signals to all, but the parent has to save and to close first.

    SIGTERM is not ignored, since Python uses it at its exit to end daemonic processes, and then waits for them.
    """
    for number in _STOP_SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def failure(error: Exception, workers: int) -> str:
    """Explains why a worker process has ended.

    Args:
      error: from an iterator of grain.
      workers: number of worker processes.

    Returns:
      The cause and the remedy, in one line; '' if the error is not that of a dead worker or of shared memory.
    """
    dead = _DEAD.match(str(error)) if isinstance(error, RuntimeError) else None
    number = -int(dead[1]) if dead else 0
    advice = 'set --config.data.workers=0 to read in threads' + f', or to fewer than {workers}' * (workers > 1)
    if number == signal.SIGBUS or _is_full(error):
        where, larger = '', ''
        if os.path.isdir(_SHARED_MEMORY):  # not on macOS
            size = shutil.disk_usage(_SHARED_MEMORY).total / 2**20
            where = f', {_SHARED_MEMORY} of {round(size, 2):.10g} MiB'
            larger = ', or make it larger (docker run --shm-size=8g)'
        return (
            f'data.workers is {workers}, and these processes have filled the shared memory{where}: {advice}{larger}. '
            'The same command continues'
        )
    if number == signal.SIGKILL:
        return (
            f'one of the data.workers={workers} processes was killed (SIGKILL), as the system does when the memory is '
            f'full: {advice}. The same command continues'
        )
    if not dead:
        return ''
    known = {each.value: each.name for each in signal.Signals}  # real-time signals have no names
    how = f'by {known.get(number, f"signal {number}")}' if number > 0 else f'with exit status {-number}'
    return (
        f'one of the data.workers={workers} processes ended {how}; its own message, if it left one, is above. '
        'Set --config.data.workers=0 to read in threads. The same command continues'
    )


def _is_full(error):
    """Returns whether shared memory could not be allocated: the error names no file, or a block of it."""
    if not isinstance(error, OSError) or error.errno != errno.ENOSPC:
        return False
    return error.filename is None or os.fsdecode(error.filename).startswith('/psm_')
