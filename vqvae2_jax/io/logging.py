"""The log of a training: metrics.jsonl, progress lines, pictures and a copy for one tracker (io/trackers.py).

metrics.jsonl holds one JSON object a line, such as `{"step": 1200, "train/loss": 0.0123, "time": 97.6}`. `time` is the
seconds of training, summed over restarts. A line is written at once; on a bucket after evaluations, before checkpoints,
and when a minute has passed. NaN is written as `NaN`, which Python reads.
"""

import collections
import json
import time

import jax
import numpy as np
from etils import epath

from vqvae2_jax.io import files, plots, remote, trackers
from vqvae2_jax.io.trackers import TrackerSpec

_FIRST = ('loss', 'mse', 'nll')  # metrics that a progress line begins with
PREFIXES = ('train', 'validation')
_FILE = 'metrics.jsonl'
_UPLOAD_EVERY = 60  # seconds
# The rate is over this many recent intervals between train lines.
_WINDOW = 5
_RATES = ('steps_per_second', 'examples_per_second', 'utilization')
_MEMORY = ('device_memory_in_use', 'device_memory_peak')
# Fields of metrics.jsonl that differ from run to run. All others are reproducible.
RUNTIME_FIELDS = ('time', *(f'train/{name}' for name in _RATES + _MEMORY))


class MetricsLogger:
    """Writes the log of a training.

    Train lines also have, where known: `steps_per_second`, `examples_per_second`, `utilization` (FLOP/s of the model as
    a share of the devices' peak), `device_memory_in_use` and `device_memory_peak` (bytes, of the fullest device of the
    main process). The first line has no rates, since compilation lies before it.
    """

    def __init__(
        self,
        directory,
        *,
        name: str,
        total_steps: int,
        start_step: int = 0,
        examples_per_step: int,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        tracker: TrackerSpec | None = None,
        enabled: bool = True,
    ):
        """Opens the log.

        Args:
          directory: directory of the training; made if missing.
          name: first word of the progress lines, for example 'vqvae'.
          total_steps: the last step.
          start_step: the step that the training resumes from. Lines of later steps, left by a killed run, are dropped;
            0 starts a new file.
          examples_per_step: the global batch size.
          flops_per_step: FLOPs of the model in one step, on all devices; None: unknown.
          peak_flops: peak FLOP/s of all devices together; None: unknown.
          tracker: the tracker that gets a copy; None: there is none.
          enabled: False on all processes but the main one; then nothing is read or written.

        Raises:
          JobError: as `trackers.open_tracker`.
        """
        self._enabled = enabled
        self._begin, self._time_before = time.monotonic(), 0.0
        if not enabled:
            return
        self._directory = epath.Path(directory)
        self._name, self._total, self._examples = name, total_steps, examples_per_step
        self._utilization = flops_per_step / peak_flops if flops_per_step and peak_flops else None  # at one step/s
        with files.writing(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / _FILE
        before, is_whole = _parse(path) if start_step and path.exists() else ([], False)
        logged = {prefix: max((x['step'] for x in before if _prefix(x) == prefix), default=-1) for prefix in PREFIXES}
        self._tracker = trackers.open_tracker(tracker, self._directory, name, start_step, logged)
        kept = _keep_lines(path, before, is_whole, start_step)
        self._time_before = kept[-1]['time'] if kept else 0.0
        self._recent = collections.deque(maxlen=_WINDOW + 1)  # (step, clock) of train lines
        self._first = None  # (step, clock) of the first train line: all compilation of the train step lies before it
        self._lines = _Lines(path)
        self._unsent = []  # lines that are not in the file yet
        self._send(kept)
        self._send_images(start_step)

    def write(self, step: int, prefix: str, metrics: dict) -> dict[str, int | float]:
        """Appends one line to metrics.jsonl, prints a progress line, and sends the line to the tracker.

        Args:
          step: number of updates done.
          prefix: 'train' or 'validation'; it goes before every name in the files.
          metrics: name -> scalar (Python, NumPy or JAX).

        Returns:
          The line; {} on processes that write no log.

        Raises:
          ValueError: an unknown prefix, or a metric that is not one number.
        """
        if not self._enabled:
            return {}
        if prefix not in PREFIXES:
            raise ValueError(f'MetricsLogger.write: prefix is {prefix!r}; it must be one of {", ".join(PREFIXES)}')
        # JAX sorts the names; the first ones tell most.
        names = sorted(metrics, key=lambda name: name not in _FIRST)
        values = {name: _scalar(name, metrics[name]) for name in names}
        step, now, seconds = int(step), time.monotonic(), self.seconds()
        runtime = self._runtime(step, prefix, now)
        scalars = {f'{prefix}/{name}': value for name, value in (values | runtime).items()}
        line = {'step': step, **scalars, 'time': round(seconds, 3)}
        self._lines.write(json.dumps(line) + '\n')
        if prefix == 'validation':
            self._lines.flush()
        self._send([line])
        middle = 'validation' if prefix == 'validation' else '  '.join(self._pace(step, now, seconds, runtime))
        numbers = '  '.join(f'{name} {format_number(value)}' for name, value in values.items())
        percent = 100 * step // max(self._total, 1)
        print(f'{self._name}  {step}/{self._total} {percent}%  {middle}  {numbers}', flush=True)
        return line

    def lines(self) -> list[dict[str, int | float]]:
        """Returns the lines in the file, those from before a restart included; [] on processes that write no log."""
        path = self._directory / _FILE if self._enabled else None
        return _parse(path)[0] if path and path.exists() else []

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes `pictures/<name>-<step>.png`, and to the tracker; `image` is uint8 [H, W, C] with C 1 or 3."""
        if not self._enabled:
            return
        path = self._directory / 'pictures' / f'{name}-{step}.png'
        is_held = path.exists() and self._is_held(step, 'image')
        plots.save_png(path, image)
        if self._tracker and not is_held:
            self._tracker.image(step, name, plots.to_rgb(image))

    def seconds(self) -> float:
        """Returns the seconds of training, summed over restarts, each up to the line that the next one resumed from.

        Processes that write no log do not know the past: there it is since this start.
        """
        return self._time_before + time.monotonic() - self._begin

    def flush(self) -> None:
        """Brings all lines into the file and to the tracker."""
        if self._enabled:
            self._lines.flush()
            self._send([])
            if self._tracker:
                self._tracker.flush()

    def close(self) -> None:
        """Brings all lines into the file and to the tracker, and closes it."""
        self.flush()
        if self._enabled and self._tracker:
            self._tracker.close()

    def _send(self, lines: list[dict]) -> None:
        """Sends lines that the tracker lacks once they are in the file, so that the file tells what it has."""
        if not self._tracker:
            return
        self._unsent += [line for line in lines if not self._is_held(line['step'], _prefix(line))]
        if self._lines.pending:
            return
        for line in self._unsent:
            self._tracker.scalars(line['step'], {k: v for k, v in line.items() if k not in ('step', 'time')})
        self._unsent.clear()

    def _is_held(self, step: int, kind: str) -> bool:
        return self._tracker is not None and step <= self._tracker.held.get(kind, -1)

    def _send_images(self, start_step: int) -> None:
        """Sends the pictures of earlier steps that the tracker lacks."""
        if not self._tracker or not start_step:
            return
        found = []
        for path in (self._directory / 'pictures').glob('*.png'):
            name, _, step = path.stem.rpartition('-')
            if step.isdigit() and int(step) <= start_step and not self._is_held(int(step), 'image'):
                found.append((int(step), name, path))
        for step, name, path in sorted(found):
            self._tracker.image(step, name, plots.read_image(path))

    def _runtime(self, step, prefix, now) -> dict[str, float]:
        """Rates and memory at a train line; updates the window of the rates."""
        if prefix == 'validation':
            # Evaluation ends now: the next interval of pure training starts here.
            if self._recent:
                self._recent.clear()
                self._recent.append((step, now))
            return {}
        runtime = {}
        if self._recent and step > self._recent[0][0]:
            since_step, since = self._recent[0]
            rate = (step - since_step) / max(now - since, 1e-9)
            runtime = {'steps_per_second': rate, 'examples_per_second': rate * self._examples}
            if self._utilization is not None:
                runtime['utilization'] = rate * self._utilization
        self._recent.append((step, now))
        return runtime | device_memory()

    def _pace(self, step, now, seconds, runtime) -> list[str]:
        """The middle of a progress line: rates, memory and time left."""
        parts = []
        if 'steps_per_second' in runtime:
            parts.append(f'{format_number(runtime["steps_per_second"], 3)} steps/s')
            parts.append(f'{format_number(runtime["examples_per_second"], 3)} examples/s')
        if 'utilization' in runtime:
            parts.append(f'{100 * runtime["utilization"]:.0f}% of peak FLOP/s')
        if _MEMORY[0] in runtime:
            parts.append('memory {:.1f} GB, peak {:.1f} GB'.format(*(runtime[name] / 1e9 for name in _MEMORY)))
        if self._first is None:
            self._first = (step, now)
        steps_since_first = step - self._first[0]
        if step >= self._total:
            parts.append(f'took {format_duration(seconds)}')
        elif steps_since_first > 0:
            # The mean over the whole training, so that the time left includes evaluations and checkpoints to come.
            left = (self._total - step) * (now - self._first[1]) / steps_since_first
            parts.append(f'ETA {format_duration(left)}')
        else:
            # Everything so far contains compilation; a rate from it would mislead.
            parts.append(f'elapsed {format_duration(seconds)}')
        return parts


class _Lines:
    """A file that grows by lines: at once, or on a bucket, where nothing can be appended, at most once a minute."""

    def __init__(self, path):
        self._path, self._remote = path, remote.is_remote(path)
        self.pending, self._flushed = '', time.monotonic()  # text that is not in the file yet
        if not self._remote:
            with files.writing(path):
                path.touch()

    def write(self, line: str) -> None:
        self.pending += line
        if not self._remote or time.monotonic() - self._flushed > _UPLOAD_EVERY:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        with files.writing(self._path, len(self.pending)):
            if self._remote:
                self._path.write_text((self._path.read_text() if self._path.exists() else '') + self.pending)
            else:
                with self._path.open('a') as file:
                    file.write(self.pending)
        self.pending, self._flushed = '', time.monotonic()


def device_memory() -> dict[str, int]:
    """Returns the bytes in use now and at the peak on the fullest device of this process.

    Returns:
      {'device_memory_in_use', 'device_memory_peak'}; {} if the backend does not report them, as on CPU.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    keys = ('bytes_in_use', 'peak_bytes_in_use')
    if not all(key in device for device in stats for key in keys):
        return {}
    return {name: max(device[key] for device in stats) for name, key in zip(_MEMORY, keys, strict=True)}


def read_metrics(directory: epath.PathLike) -> list[dict]:
    """Reads the lines of `directory`/metrics.jsonl in order; damaged ones are left out with a printed message.

    Raises:
      FileNotFoundError: there are no metrics.
    """
    path = epath.Path(directory) / _FILE
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist; the job that writes it has not run in this folder')
    return _parse(path)[0]


def format_duration(seconds: float) -> str:
    """Formats seconds as 45s, 3m48s, 2h05m or 1d03h."""
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
    """Formats a number with `digits` significant digits below 1000: 3, 0.0123, 51.2, 12346, 1.5e-07."""
    if isinstance(value, int) or 1e3 <= abs(value) < 1e7:
        return f'{value:.0f}'
    return f'{value:.{digits}g}'


def _scalar(name: str, value) -> int | float:
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f'MetricsLogger.write: metric {name!r} has shape {array.shape}; reduce it to one number first')
    is_integer = np.issubdtype(array.dtype, np.integer)
    return int(array.reshape(())) if is_integer else float(array.reshape(()))


def _parse(path) -> tuple[list[dict], bool]:
    """Returns the lines of a file, and whether it ends in a whole line and none was left out.

    The file grows, so it has no checksum. A killed run may leave a partial last line; any other damage is rare.
    """
    # As bytes, since a partial line may end in the middle of a character.
    raw = path.read_bytes()
    lines = raw.split(b'\n')
    if lines[-1] == b'':
        lines.pop()
    parsed = []
    for number, text in enumerate(lines, start=1):
        line = _parse_line(text)
        if line is not None:
            parsed.append(line)
        elif number == len(lines):
            print(f'{path}: the last line is not complete, as after a kill; it is left out', flush=True)
        else:
            print(f'{path}: line {number} of {len(lines)} is damaged; it is left out', flush=True)
    return parsed, len(parsed) == len(lines) and (not raw or raw.endswith(b'\n'))


def _parse_line(text: bytes) -> dict | None:
    """Returns a line with a step, a time and no values but numbers; None for anything else."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get('step'), int) or 'time' not in line:
        return None
    return line if all(type(value) in (int, float) for value in line.values()) else None


def _prefix(line: dict) -> str:
    return next((prefix for prefix in PREFIXES if any(name.startswith(f'{prefix}/') for name in line)), '')


def _keep_lines(path, lines: list[dict], is_whole: bool, start_step: int) -> list[dict]:
    """Drops the lines after `start_step`, where a run resumes, and damaged ones from the file.

    Args:
      path: the file; it may be missing.
      lines: its lines, from `_parse`.
      is_whole: as from `_parse`.
      start_step: 0 starts a new file.

    Returns:
      The lines that stay.
    """
    kept = [line for line in lines if line['step'] <= start_step]
    if start_step == 0:
        path.unlink(missing_ok=True)
    elif path.exists() and (not is_whole or len(kept) < len(lines)):
        text = ''.join(json.dumps(line) + '\n' for line in kept)
        files.write_bytes(path, text.encode())
    return kept
