"""Experiment trackers that get a copy of the log: TensorBoard, Weights & Biases, trackio.

The logger (io/logging.py) writes metrics.jsonl, and hands every line that is in this file to one tracker. After a
restart it sends only what the tracker lacks, so no step is there twice.
"""

import dataclasses
import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from etils import epath

from vqvae2_jax.io import files, remote
from vqvae2_jax.io.record import JobError

TENSORBOARD, TRACKIO, WANDB = 'tensorboard', 'trackio', 'wandb'
TRACKERS = TENSORBOARD, TRACKIO, WANDB  # they are also the names of the extras in pyproject.toml
_PACKAGES = {TENSORBOARD: 'tensorboardX', TRACKIO: 'trackio', WANDB: 'wandb'}
_PROJECT = 'vqvae2_jax'
_FILE = 'tracker.json'


class Tracker(Protocol):
    """One run of a tracker.

    Attributes:
      held: the last step that the tracker holds, for lines of each prefix ('train', 'validation') and for 'image'; a
        missing entry: none. After a restart it may be later than the step that the training resumes from.
    """

    held: Mapping[str, float]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the metrics of a step, by name."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds an image, uint8 [H, W, 3]."""

    def flush(self) -> None:
        """Brings everything that was added to the disk or to the service, as far as the tracker can."""

    def close(self) -> None:
        """Sends the rest and ends the run; the next start of the training continues it."""


@dataclasses.dataclass(frozen=True)
class TrackerSpec:
    """Which tracker a training writes to.

    Attributes:
      name: one of `TRACKERS`.
      group: name of the experiment, which groups its trainings.
      settings: settings of the training, which the tracker shows.
    """

    name: str
    group: str
    settings: Mapping[str, Any]


def check(spec: TrackerSpec | None, directory: epath.PathLike) -> None:
    """Refuses a tracker that cannot be used.

    Raises:
      JobError: its package is missing, or it cannot write to a bucket.
    """
    if spec is None:
        return
    name = spec.name
    if find_spec(_PACKAGES[name]) is None:
        raise JobError(f'tracker={name!r} is not installed: pip install {_PACKAGES[name]}')
    if name == TENSORBOARD and remote.is_remote(epath.Path(directory)):
        raise JobError(
            f'tracker={name!r} writes to local workdirs only, not to {directory}: set --config.tracker to '
            f"{WANDB!r}, {TRACKIO!r} or ''"
        )


def open_tracker(
    spec: TrackerSpec | None, directory: epath.Path, name: str, start_step: int, logged: Mapping[str, int]
) -> Tracker | None:
    """Opens the run of a training, or continues it.

    Args:
      spec: the tracker; None: none.
      directory: directory of the training; its tracker.json has the id of the run and the last steps sent to it.
      name: name of the training.
      start_step: the step that the training resumes from; 0: a new run.
      logged: the last step of each prefix in metrics.jsonl, before lines of later steps are dropped from it.

    Returns:
      The tracker; None without one.

    Raises:
      JobError: as `check`; or the tracker refuses, for example because nobody is logged in.
    """
    check(spec, directory)
    if spec is None:
        return None
    if spec.name == TENSORBOARD:
        return _TensorBoard(directory / 'tensorboard', start_step)
    run_id, held = _continue_run(directory / _FILE, spec.name, start_step, logged)
    kind = {TRACKIO: _Trackio, WANDB: _WandB}[spec.name]
    try:
        return kind(spec, directory, f'{spec.group}/{name}', run_id, held)
    except Exception as error:  # of any kind: accounts, networks, settings
        raise JobError(f'tracker={spec.name!r}: {str(error).strip() or type(error).__name__}') from error


def forget(directory: epath.Path) -> None:
    """Makes the next start of a training a new run of its tracker, which gets the whole log again."""
    files.remove(directory / _FILE)


def _continue_run(path, tracker, start_step, logged) -> tuple[str, dict[str, float]]:
    """Returns the id of the run, and `Tracker.held`; {} for a new run."""
    try:
        known = json.loads(path.read_text()) if start_step and path.exists() else {}
        run_id, held = known['id'], known['held']
        if known['tracker'] != tracker:
            raise ValueError
        held = {prefix: max(int(held.get(prefix, -1)), step) for prefix, step in logged.items()}
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # there is no file, or it is of another tracker or damaged
        run_id, held = uuid.uuid4().hex[:16], {}
    # The lines of later steps are dropped next. Sent once, they must be known after another restart too.
    files.write_json(path, {'tracker': tracker, 'id': run_id, 'held': held})
    return run_id, held and {**held, 'image': math.inf}  # pictures stay


class _TensorBoard:
    # Events are written at once, by the class below SummaryWriter, whose thread has not yet written all of
    # them when flush returns, and hides errors such as a full disk.
    def __init__(self, directory: epath.Path, start_step: int):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._directory = directory
        self._summary, self._event = summary, event_pb2.Event
        self.held = dict.fromkeys(('train', 'validation', 'image'), start_step) if directory.exists() else {}
        with files.writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            # Its name has seconds only, so a start within the same second needs more.
            suffix = f'.{uuid.uuid4().hex[:8]}'
            self._writer = event_file_writer.EventsWriter(os.fspath(directory / 'events'), suffix)
        # TensorBoard then hides the events of steps that will be repeated.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(start_step + 1 if start_step else 0, session_log=start)

    def _write(self, step, **content):
        with files.writing(self._directory):
            self._writer.write_event(self._event(step=step, wall_time=time.time(), **content))

    def scalars(self, step, values):
        for name, value in values.items():
            self._write(step, summary=self._summary.scalar(name, value))

    def image(self, step, name, image):
        self._write(step, summary=self._summary.image(name, image, dataformats='HWC'))

    def flush(self):
        with files.writing(self._directory):
            self._writer.flush()

    def close(self):
        with files.writing(self._directory):
            self._writer.close()


class _WandB:
    def __init__(self, spec: TrackerSpec, directory: epath.Path, name: str, run_id: str, held: Mapping[str, float]):
        import wandb

        self._image_type = wandb.Image
        self._run = wandb.init(
            project=os.environ.get('WANDB_PROJECT') or _PROJECT,
            id=run_id,
            name=name,
            group=spec.group,
            config=dict(spec.settings),
            dir=None if remote.is_remote(directory) else os.fspath(directory),
            resume='allow',
        )
        # Steps are a metric of their own: the counter of W&B drops a second line of a step that it has passed.
        self._run.define_metric('step')
        self._run.define_metric('*', step_metric='step')
        # Offline every start writes a directory of its own, so each gets the whole log.
        self.held = {} if self._run.offline else held

    def scalars(self, step, values):
        self._run.log({'step': step, **values})

    def image(self, step, name, image):
        self._run.log({'step': step, name: self._image_type(image)})

    def flush(self):
        pass  # W&B writes a log of its own, which it sends after a crash

    def close(self):
        self._run.finish()


class _Trackio:
    def __init__(self, spec: TrackerSpec, directory: epath.Path, name: str, run_id: str, held: Mapping[str, float]):
        import trackio

        self._image_type = trackio.Image
        self._run = trackio.init(
            project=os.environ.get('TRACKIO_PROJECT') or _PROJECT,
            name=f'{name} {run_id}',  # trackio finds a run by its name
            group=spec.group,
            config=dict(spec.settings),
            resume='allow',
            embed=False,
        )
        self.held = held

    def scalars(self, step, values):
        self._run.log(dict(values), step=step)

    def image(self, step, name, image):
        self._run.log({name: self._image_type(image)}, step=step)

    def flush(self):
        pass  # trackio has none; a thread sends every half second

    def close(self):
        self._run.finish()
