"""Commands of the cases, and how they end."""

import dataclasses
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
_TIMEOUT = 600  # seconds
_SHORT = ['--config.evaluate.cas=False', '--config.sample.count=4', '--config.sample.batch_size=4']
for _section in ('vqvae', 'prior.top', 'prior.bottom', 'classifier'):
    _SHORT += [f'--config.{_section}.training.{field}' for field in ('steps=2', 'warmup_steps=1', 'image_every=0')]
_SHORT += ['--config.vqvae.training.save_every=2', '--config.vqvae.training.eval_every=2']


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
      status: its exit status; None: it was killed after `timeout` seconds.
      output: all that it printed.
    """

    status: int | None
    output: str

    @property
    def well(self) -> bool:
        return self.status == 0 and not self.traceback

    @property
    def traceback(self) -> bool:
        return 'Traceback (most recent call last)' in self.output

    @property
    def error(self) -> str:
        """The message that starts with 'error: ', to the end of the output; '' unless there is exactly one."""
        before, _, message = self.output.partition('error: ')
        starts_line = not before or before.endswith('\n')
        return message if starts_line and '\nerror: ' not in message else ''

    def says(self, *words: str) -> bool:
        """Returns whether all words are in the output, in any case."""
        return all(word.lower() in self.output.lower() for word in words)

    def refused(self, *words: str) -> bool:
        """Returns whether it ended with one message, without a traceback, that has all words, in any case."""
        return bool(
            self.status
            and self.error
            and not self.traceback
            and all(word.lower() in self.error.lower() for word in words)
        )


class Commands:
    """Runs commands of the package on a CPU and prints how each ends."""

    def __init__(self, out: pathlib.Path, inception: str):
        """`out` has the inputs in out/in, and gets the workdirs; `inception` is the value of evaluate.inception."""
        self.out, self.inputs, self.inception = out, out / 'in', inception

    def environment(self) -> dict[str, str]:
        return os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}

    def show(self, title: str, command: list[str], timeout: int = _TIMEOUT, **options) -> Ended:
        """Runs a command and prints its last lines; `options` are those of `subprocess.run`."""
        options = {'cwd': ROOT, 'env': self.environment()} | options
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}
        try:
            done = subprocess.run(command, timeout=timeout, errors='replace', **pipes, **options)
            ended = Ended(done.returncode, done.stdout)
        except subprocess.TimeoutExpired as error:
            ended = Ended(None, (error.stdout or b'').decode(errors='replace'))
        last = [line for line in ended.output.splitlines() if line.strip()][-2:]
        status = 'timeout' if ended.status is None else f'exit {ended.status}'
        print(f'   {title}: {status}: {" | ".join(last)[:300]}', flush=True)
        return ended

    def command(self, workdir: str, *flags: object) -> list[str]:
        """Returns the command of a short pipeline, or of a job of it."""
        main = [sys.executable, '-m', 'vqvae2_jax.main', '--config=tiny', f'--workdir={self.out / workdir}']
        return [*main, *_SHORT, *map(str, flags)]

    def run(self, title: str, workdir: str, *flags: object) -> Ended:
        """Runs a short pipeline, or a job of it."""
        return self.show(title, self.command(workdir, *flags))

    def folder(self, title: str, workdir: str, name: str, classes: int, *flags: object) -> Ended:
        """Runs a short pipeline on a folder of the inputs."""
        data = {'name': 'folder', 'path': self.inputs / name, 'channels': 3, 'num_classes': classes}
        data['held_out'] = (0.2, 0.2)
        return self.run(title, workdir, *(f'--config.data.{k}={v}' for k, v in data.items()), *flags)

    def compare(self, title: str, workdir: str, real: object, generated: object, *flags: str) -> Ended:
        """Compares two sets of images."""
        fields = {'inception': self.inception, 'batch_size': 8, 'real': real, 'generated': generated}
        command = [sys.executable, '-m', 'vqvae2_jax.main', '--config=fashion', '--job=evaluate']
        command += [f'--workdir={self.out / workdir}', *(f'--config.evaluate.{k}={v}' for k, v in fields.items())]
        return self.show(title, [*command, *flags])

    def python(self, title: str, code: str, *arguments: object) -> Ended:
        """Runs a piece of Python."""
        return self.show(title, [sys.executable, '-c', code, *map(str, arguments)], timeout=60)
