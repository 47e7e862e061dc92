"""Runs commands of vqvae2_jax in processes forked from one that has imported everything, which saves seconds each."""

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import pathlib
import signal
import sys
from collections.abc import Mapping, Sequence

# Imported before the fork; nothing of them starts JAX's backend.
PRELOAD = ['vqvae2_jax.main', 'vqvae2_jax.jobs.pipeline', 'matplotlib.pyplot', 'scipy.linalg', 'tensorboardX', __name__]
ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '1',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',  # the suite waits for the compiler, not for what it makes
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    'MPLBACKEND': 'Agg',
}


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Attributes:
      status: its exit status; negative: the signal that ended it; None: it hung and was killed.
      output: all that it printed to standard output.
      errors: all that it printed to standard error.
    """

    status: int | None
    output: str
    errors: str


class Command:
    """A running command."""

    def __init__(self, arguments: Sequence[str], log: pathlib.Path, environment: Mapping[str, str] | None = None):
        """Starts it.

        Args:
          arguments: of `vqvae2`.
          log: its output goes to <log>.out and <log>.err.
          environment: further variables, of the shim or of a process of several.
        """
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(PRELOAD)
        self._process = context.Process(target=_run, args=(list(arguments), str(log), dict(environment or {})))
        self._process.start()

    def send(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def running(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float) -> bool:
        """Waits for its end, at most so long; returns whether it has ended."""
        self._process.join(seconds)
        return not self._process.is_alive()

    def end(self, timeout: float) -> Ended:
        """Waits for its end; after `timeout` seconds it is killed."""
        ended = self.wait(timeout)
        if not ended:
            self.send(signal.SIGABRT)  # prints where all threads are
            self._process.join(10)
            self._process.kill()
            self._process.join()
        output, errors = (pathlib.Path(f'{self._log}.{kind}').read_text(errors='replace') for kind in ('out', 'err'))
        return Ended(self._process.exitcode if ended else None, output, errors)


def _run(arguments, log, environment):
    """Becomes the command; runs in the forked process."""
    for number, kind in ((1, 'out'), (2, 'err')):
        fd = os.open(f'{log}.{kind}', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, number)
        os.close(fd)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.update(environment)
    if 'FAULT_DIR' in environment:
        ctypes.CDLL(None).fault_start()
    import jax

    from vqvae2_jax import main

    if 'JAX_NUM_PROCESSES' in environment:  # JAX has read its environment before the fork
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    sys.argv = ['vqvae2', *arguments]
    main.run()
