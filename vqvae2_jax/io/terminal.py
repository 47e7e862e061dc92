"""The command line and its terminal: the output may be closed, and Ctrl-C ends a job at any moment with one line."""

import contextlib
import errno
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

_CLOSED = (errno.EPIPE, errno.EIO)  # of a pipe whose reader has ended, of a terminal that was closed
_FULL = (errno.ENOSPC, errno.EDQUOT)  # of a log file
_REPEAT = 1  # second; wrappers such as uv forward the Ctrl-C that the terminal has sent to the whole group
_saving = 0  # number of `saves_on_interrupt` contexts
_interrupted_outside = False  # of these contexts


def prepare() -> None:
    """Makes this process survive a closed output, and end at Ctrl-C.

    Writes to an output that is closed are dropped from then on, those of native code too; so is a line that a full disk
    does not take. Ctrl-C ends the process at once with one line and status 130, even in the middle of a compilation, as
    there is nothing to save outside of `saves_on_interrupt`. A SIGINT that is ignored, as in a background job of a
    shell, stays ignored.

    Call it in the main thread of a command line, before long imports. A second call does nothing.
    """
    if isinstance(getattr(sys.stdout, 'buffer', None), _Writer):
        return
    for number in range(3):  # a file that is opened later must not become standard output
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = _reopen(sys.stdout), _reopen(sys.stderr)
    threading.excepthook, sys.unraisablehook = _ignore_event_writer, _ignore_closed_loop
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        _watch_interrupts()


@contextlib.contextmanager
def saves_on_interrupt() -> Iterator[None]:
    """Within the context, the caller handles the first SIGINT; one that comes a second later ends the process."""
    global _saving
    _saving += 1
    try:
        yield
    finally:
        _saving -= 1


class _Writer(io.BufferedWriter):
    """A buffered file over a `_Descriptor`."""


class _Descriptor(io.FileIO):
    """A file descriptor that leads to /dev/null once nobody reads it any more, and drops data of a full disk."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in _FULL:
                return len(data)
            if error.errno not in _CLOSED:
                raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())  # for native code and later worker processes too
        os.close(null)
        return len(data)


def _reopen(stream):
    """Returns a text file that writes where `stream` does, or `stream` itself if it has no descriptor."""
    try:
        stream.flush()
        descriptor = _Descriptor(stream.fileno(), 'w', closefd=False)
    except (AttributeError, io.UnsupportedOperation):  # None, or a file in memory
        return stream
    except OSError as error:
        if error.errno not in _CLOSED:
            raise
        descriptor = _Descriptor(stream.fileno(), 'w', closefd=False)
    return io.TextIOWrapper(
        _Writer(descriptor),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _watch_interrupts():
    """Starts a thread that acts on SIGINT: Python's handlers wait until the main thread leaves the compiler."""
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _note_interrupt)
    threading.Thread(target=_watch, args=(receiver,), daemon=True).start()


def _note_interrupt(*_):
    # Before the other thread knows of the signal, this one may enter `saves_on_interrupt`.
    global _interrupted_outside
    _interrupted_outside = not _saving


def _watch(receiver: int):
    first = None
    while True:
        if signal.SIGINT not in os.read(receiver, 64):
            continue
        now = time.monotonic()
        if not _saving or _interrupted_outside:
            _exit('interrupted; the same command continues')
        if first is not None and now - first > _REPEAT:
            _exit('interrupted again: stopped at once; the same command continues from what was saved before')
        first = first or now


def end(message: str) -> NoReturn:
    """Ends the process with a message and status 1, without waiting for threads of libraries.

    After a failed write they would print errors of their own: of Orbax, of TensorStore, of TensorBoard's writer.
    """
    if not isinstance(getattr(sys.stdout, 'buffer', None), _Writer):  # not a command line
        sys.exit(message)
    sys.stdout.flush()
    _exit(message, 1)


def _ignore_event_writer(args):
    """Prints the exception of a thread, unless it is TensorBoard's writer: its caller raises the same."""
    if not type(args.thread).__module__.startswith('tensorboardX'):
        threading.__excepthook__(args)


def _ignore_closed_loop(args):
    """Prints an exception, unless it is that of a late answer of TensorStore, whose caller has ended with an error."""
    if args.exc_type is not RuntimeError or str(args.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(args)


def _exit(message: str, status: int = 128 + signal.SIGINT):
    with contextlib.suppress(OSError):
        os.write(2, f'{message}\n'.encode('utf-8', 'backslashreplace'))
    for worker in multiprocessing.active_children():  # they ignore Ctrl-C
        worker.kill()
    os._exit(status)
