"""The log of one job: `metrics.jsonl`, a progress line, pictures and, where tensorboardX is installed, TensorBoard.

`metrics.jsonl` holds one JSON object a line, appended at once (on a bucket: after evaluations, before checkpoints, and
when a minute has passed):
`{"step": 1200, "train/loss": 0.0123, "time": 97.6}`, with `time` the seconds that the job has run, summed over
restarts. A NaN is written as `NaN`, which Python reads back: whether to stop on one is the job's decision.
"""

import collections
import json
import time

import numpy as np
from etils import epath

from vqvae2_jax.io import files, gcs, plots

PREFIXES = ('train', 'validation')
_FILE = 'metrics.jsonl'
_UPLOAD_EVERY = 60  # seconds
# The rate on the progress line is over this many recent intervals between train lines.
_WINDOW = 5


class RunLog:
    """metrics.jsonl, a progress line and, when tensorboardX is installed, TensorBoard events for one job.

    Args:
      directory: the job's own folder; made when missing.
      name: what the progress line starts with, for example "vqvae".
      total_steps: the step at which the job ends.
      start_step: the step it resumes from. Lines of later steps, left by a killed run, are dropped; at 0 the file
        starts anew.
      examples_per_step: images in one (global) batch, for the rate on the progress line.
      enabled: False on every process but the first: nothing is read or written.
    """

    def __init__(
        self,
        directory,
        *,
        name: str,
        total_steps: int,
        start_step: int = 0,
        examples_per_step: int,
        enabled: bool = True,
    ):
        self._enabled = enabled
        self._begin, self._time_before = time.monotonic(), 0.0
        if not enabled:
            return
        self._directory = epath.Path(directory)
        self._name, self._total, self._examples = name, total_steps, examples_per_step
        self._directory.mkdir(parents=True, exist_ok=True)
        kept = _keep_lines(self._directory / _FILE, start_step)
        if kept:
            self._time_before = kept[-1]['time']
        self._recent = collections.deque(maxlen=_WINDOW + 1)  # (step, clock) of train lines
        self._first = None  # (step, clock) of the first train line: all compilation of the train step lies before it
        self._file = (_Uploaded if gcs.is_remote(self._directory) else _Appended)(self._directory / _FILE)
        self._events = _event_writer(self._directory, start_step)

    def write(self, step: int, prefix: str, metrics: dict) -> None:
        """Appends one line to metrics.jsonl, prints the progress line, and adds the scalars to TensorBoard.

        Args:
          step: updates done so far.
          prefix: "train" or "validation"; it goes before every name in the files.
          metrics: name -> scalar (Python, NumPy or JAX).

        Raises:
          ValueError: an unknown prefix, or a metric that is not one number.
        """
        if not self._enabled:
            return
        if prefix not in PREFIXES:
            raise ValueError(f'RunLog.write: prefix is {prefix!r}; it must be one of {", ".join(PREFIXES)}')
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        now, seconds = time.monotonic(), self.seconds()
        line = {'step': int(step)} | {f'{prefix}/{name}': value for name, value in values.items()}
        self._file.write(json.dumps(line | {'time': round(seconds, 3)}) + '\n')
        if prefix == 'validation':
            self._file.flush()
        for name, value in values.items():
            if self._events:
                self._events.add_scalar(f'{prefix}/{name}', value, step)
        pace = self._pace(int(step), prefix, now, seconds)
        numbers = '  '.join(f'{name} {format_number(value)}' for name, value in values.items())
        percent = 100 * int(step) // max(self._total, 1)
        print(f'{self._name}  {step}/{self._total} {percent}%  {pace}  {numbers}', flush=True)

    def image(self, step: int, name: str, image) -> None:
        """Writes `pictures/<name>-<step>.png`, and to TensorBoard; `image` is uint8 [H, W, C] with C 1 or 3."""
        if not self._enabled:
            return
        plots.save_png(self._directory / 'pictures' / f'{name}-{step}.png', image)
        if self._events:
            self._events.add_image(name, plots.to_rgb(image), step, dataformats='HWC')

    def seconds(self) -> float:
        """Seconds that the job has run, summed over restarts up to the line that each resumed from.

        On processes that write no log, where the past is not known: since this start.
        """
        return self._time_before + time.monotonic() - self._begin

    def flush(self) -> None:
        """All lines so far are in the file when this returns."""
        if self._enabled:
            self._file.flush()

    def close(self) -> None:
        """Closes the files, with all lines in them."""
        if not self._enabled:
            return
        self._file.flush()
        if self._events:
            self._events.close()

    def _pace(self, step: int, prefix: str, now: float, seconds: float) -> str:
        """The middle of the progress line: rate and time left, or why there is none."""
        if prefix == 'validation':
            # Evaluation ends now: the next interval of pure training starts here.
            if self._recent:
                self._recent.clear()
                self._recent.append((step, now))
            return 'validation'
        parts = []
        if self._recent and step > self._recent[0][0]:
            since_step, since = self._recent[0]
            rate = (step - since_step) / max(now - since, 1e-9)
            parts = [f'{format_number(rate, 3)} step/s', f'{format_number(rate * self._examples, 3)} img/s']
        self._recent.append((step, now))
        if self._first is None:
            self._first = (step, now)
        steps_since_first = step - self._first[0]
        if step >= self._total:
            parts.append(f'took {format_duration(seconds)}')
        elif steps_since_first > 0:
            # The mean over the whole job, so that the time left includes evaluations and checkpoints to come.
            left = (self._total - step) * (now - self._first[1]) / steps_since_first
            parts.append(f'ETA {format_duration(left)}')
        else:
            # Everything so far contains compilation; a rate from it would mislead.
            parts.append(f'elapsed {format_duration(seconds)}')
        return '  '.join(parts)


class _Appended:
    """A local file that grows by lines."""

    def __init__(self, path):
        self._path = path
        path.touch()

    def write(self, line: str) -> None:
        with self._path.open('a') as file:
            file.write(line)

    def flush(self) -> None:
        pass


class _Uploaded:
    """A file on a bucket, where nothing can be appended: written anew, at most once a minute."""

    def __init__(self, path):
        self._path, self._written = path, time.monotonic()
        self._text = path.read_text() if path.exists() else ''
        self._behind = False

    def write(self, line: str) -> None:
        self._text, self._behind = self._text + line, True
        if time.monotonic() - self._written > _UPLOAD_EVERY:
            self.flush()

    def flush(self) -> None:
        if self._behind:
            self._path.write_text(self._text)
            self._written, self._behind = time.monotonic(), False


def read_metrics(directory) -> list[dict]:
    """The lines of `directory`/metrics.jsonl in order; a last line torn by a kill is left out.

    Raises:
      FileNotFoundError: the job has written no metrics.
      ValueError: a line other than the last is broken; the message names it.
    """
    path = epath.Path(directory) / _FILE
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist; the job that writes it has not run in this folder')
    return _parse(path)[0]


def format_duration(seconds: float) -> str:
    """Seconds as people write them: 45s, 3m48s, 2h05m, 1d03h."""
    seconds = round(seconds)
    if seconds < 60:
        return f'{seconds}s'
    if seconds < 3600:
        return f'{seconds // 60}m{seconds % 60:02d}s'
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f'{minutes // 60}h{minutes % 60:02d}m'
    hours = round(seconds / 3600)
    return f'{hours // 24}d{hours % 24:02d}h'


def format_number(value: float, digits: int = 4) -> str:
    """A number in few characters, to `digits` significant ones below 1000: 3, 0.0123, 51.2, 12346, 1.5e-07."""
    if isinstance(value, int) or 1e3 <= abs(value) < 1e7:
        return f'{value:.0f}'
    return f'{value:.{digits}g}'


def _scalar(name: str, value) -> int | float:
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f'RunLog.write: metric {name!r} has shape {array.shape}; reduce it to one number first')
    is_integer = np.issubdtype(array.dtype, np.integer)
    return int(array.reshape(())) if is_integer else float(array.reshape(()))


def _parse(path) -> tuple[list[dict], bool]:
    """The whole lines of a file, and whether a torn last line was left out."""
    # As bytes, since a torn line may end in the middle of a character.
    raw = path.read_bytes()
    lines = raw.split(b'\n')
    if lines[-1] == b'':
        lines.pop()
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                return parsed, True
            raise ValueError(
                f'{path}, line {number} of {len(lines)} is not JSON ({error}); it is not the last line, '
                'so no kill explains it: repair or remove the line'
            ) from error
    return parsed, bool(raw) and not raw.endswith(b'\n')


def _keep_lines(path, start_step: int) -> list[dict]:
    """Cuts the file back to what a run that resumes from `start_step` continues; returns the lines kept."""
    if not path.exists():
        return []
    if start_step == 0:
        path.unlink()
        return []
    lines, torn = _parse(path)
    kept = [line for line in lines if line['step'] <= start_step]
    if torn or len(kept) < len(lines):
        text = ''.join(json.dumps(line) + '\n' for line in kept)
        files.write_bytes(path, text.encode())
    return kept


def _event_writer(directory, start_step: int):
    """A TensorBoard writer that hides the events of steps that will be written again.

    None without tensorboardX, and on a bucket, for which it wants a library of its own.
    """
    if gcs.is_remote(directory):
        return None
    try:
        import tensorboardX
    except ImportError:
        return None
    return tensorboardX.SummaryWriter(str(directory / 'tensorboard'), purge_step=start_step + 1 if start_step else 0)
