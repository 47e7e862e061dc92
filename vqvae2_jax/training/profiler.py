"""A trace of some training steps, for TensorBoard's profile plugin or Perfetto (training.profile_steps)."""

import pathlib
import tempfile
from typing import Any

import jax

from vqvae2_jax.distributed import processes
from vqvae2_jax.io import remote


class Profiler:
    """Writes a `jax.profiler` trace of the main process into `profile/`.

    A training that starts between the first and the last step traces the rest of them. One that ends there writes what
    it has.
    """

    def __init__(self, directory, steps: tuple[int, int] | tuple[()]):
        """`steps`: the first and the last step to trace, counted from 1; (): none."""
        self._directory = remote.absolute(directory) / 'profile'
        self._first, self._last = steps if steps and processes.is_main_process() else (0, -1)
        self._local = None  # where the trace is written while it runs

    def before_step(self, step: int) -> None:
        """Starts the trace if it is to start at this step."""
        if self._local is None and self._first <= step <= self._last:
            is_remote = remote.is_remote(self._directory)
            self._local = tempfile.mkdtemp(prefix='vqvae2_jax-profile-') if is_remote else str(self._directory)
            jax.profiler.start_trace(self._local)

    def after_step(self, step: int, outputs: Any) -> None:
        """Ends the trace after the last step, when its `outputs` are ready."""
        if self._local is not None and step >= self._last:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Ends the trace if one is under way, and writes it."""
        if self._local is None:
            return
        jax.profiler.stop_trace()
        if remote.is_remote(self._directory):
            for file in pathlib.Path(self._local).rglob('*'):
                if file.is_file():
                    remote.upload(str(file), self._directory / file.relative_to(self._local))
        print(f'profile of steps {self._first} to {self._last}: {self._directory}', flush=True)
        self._local, self._last = None, -1
