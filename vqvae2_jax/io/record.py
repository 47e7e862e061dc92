"""The record of an output directory: inputs, settings, state and results of the job that writes it, in `record.json`.

All jobs that write a directory use it in the same way:

    output = record.open_output(directory, job='sample', inputs=digests, settings=settings)
    if output.state != record.DONE:
        output.start()
        ...                              # write the files
        output.finish(results)

A job refuses a directory whose inputs or settings have changed, and shows both sides. A job that reads the directory
calls `read_done`.
"""

import dataclasses
import json
from typing import Any

from etils import epath

from vqvae2_jax.io import files
from vqvae2_jax.version import __version__

FILE = 'record.json'
SCHEMA = 1
MISSING, STARTED, DONE, STALE = 'missing', 'started', 'done', 'stale'
_FIELDS = ('schema', 'job', 'state', 'version', 'inputs', 'settings', 'results', 'seconds', 'digest')
_OLD_FILES = ('trained.json', 'settings.json', 'started.json', 'meta.json')  # of versions before 0.3


class JobError(ValueError):
    """A job cannot run as things stand; the message says what to do. It is printed without a traceback."""


class StaleInputError(JobError):
    """An input is no longer the one that an output was made from."""


class SettingsChangedError(JobError):
    """An output was made with other settings."""


@dataclasses.dataclass
class Record:
    """The record of one output directory.

    Attributes:
      directory: the directory.
      job: the value of --job that writes it.
      inputs: digests of the inputs, by name.
      settings: the settings that decide the outputs, flat, in JSON types.
      state: `MISSING` (nothing written), `STARTED` (may be continued), `DONE`, or `STALE` (to be written again).
      results: numbers and facts that the job reports; {} until it is done.
      seconds: time spent, over all restarts.
      digest: identifies the content of a finished output, as 64 hex digits; '' until it is done.
      version: version of the package that wrote it.
    """

    directory: epath.Path
    job: str
    inputs: dict[str, str]
    settings: dict[str, Any]
    state: str = MISSING
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    digest: str = ''
    version: str = __version__

    def start(self) -> None:
        """Records that writing has begun. The outputs count as unfinished until `finish`."""
        self.state, self.results, self.digest, self.version = STARTED, {}, '', __version__
        self.write()

    def save_seconds(self, seconds: float) -> None:
        """Records the time spent so far, for a restart."""
        self.seconds = round(seconds, 1)
        self.write()

    def finish(self, results: dict[str, Any], *, seconds: float | None = None, digest: str | None = None) -> None:
        """Records that all outputs are written. Call it last.

        Args:
          results: numbers and facts to report, in JSON types.
          seconds: time spent over all restarts; None leaves it as it is.
          digest: digest of the content; None: computed from inputs, settings and results, which determine it.
        """
        self.state, self.results = DONE, results
        self.seconds = self.seconds if seconds is None else round(seconds, 1)
        self.digest = digest or files.digest_json([self.job, self.inputs, self.settings, results])
        self.write()

    def write(self) -> None:
        """Writes record.json as it stands."""
        values = {name: getattr(self, name) for name in _FIELDS if name != 'schema'}
        files.write_json(self.directory / FILE, {'schema': SCHEMA, **values})


def read(directory: epath.PathLike) -> Record | None:
    """Reads the record of a directory; None if it has none.

    Raises:
      JobError: a version before 0.3 wrote the directory, or the record is damaged.
    """
    directory = epath.Path(directory)
    path = directory / FILE
    if not path.exists():
        if old := [name for name in _OLD_FILES if (directory / name).exists()]:
            raise JobError(
                f'{directory} was written by a version before 0.3 ({old[0]} instead of {FILE}). Give another '
                f'--workdir, or use the version that wrote it: CHANGELOG.md lists the names that have changed'
            )
        return None
    try:
        fields = json.loads(path.read_text())
        if not isinstance(fields, dict) or fields.keys() != set(_FIELDS) or fields['schema'] != SCHEMA:
            raise ValueError(f'its fields are not those of schema {SCHEMA}')
    except ValueError as error:
        raise JobError(
            f'{path} is damaged: {error}. Restore it from a copy, or delete {directory} to write it again'
        ) from error
    return Record(directory, **{name: fields[name] for name in _FIELDS if name != 'schema'})


def read_done(directory: epath.PathLike, job: str) -> Record:
    """Reads the record of a finished output.

    Args:
      directory: the output.
      job: the value of --job that writes it, for the message.

    Raises:
      JobError: it is not finished; the message names the job to run. Also as `read`.
    """
    record = read(directory)
    if record is None or record.state != DONE:
        how = 'has nothing' if record is None else 'is not finished'
        raise JobError(f'{directory} {how}: {job_command(job)}')
    return record


def open_output(
    directory: epath.PathLike,
    job: str,
    inputs: dict[str, str],
    settings: dict[str, Any],
    *,
    replace: bool = False,
    hint: str = '',
) -> Record:
    """Compares a directory with the job that is about to write it.

    Args:
      directory: the output; it may be missing.
      job: the value of --job, for the record; it is not compared.
      inputs: current digests of the inputs, by name.
      settings: current settings by name, of values that JSON can hold.
      replace: outputs of other inputs or settings are written again, instead of refused.
      hint: advice about changed settings, as a sentence; '': the usual advice.

    Returns:
      The record to write, with the state, results, seconds and digest that the directory has. With `replace`, if
      something differs, a record in the state `STALE` without results, seconds and digest. Nothing is written yet.

    Raises:
      StaleInputError: an input has changed; the message shows both digests.
      SettingsChangedError: settings have changed; the message shows both sides.
      JobError: as `read`.
      ValueError: a setting is not finite.
    """
    directory = epath.Path(directory)
    current = Record(directory, job, dict(inputs), files.to_json(settings, 'settings'))
    before = read(directory)
    if before is None:
        return current
    try:
        check_inputs(directory, before.inputs, current.inputs, f'delete {directory} to write it again')
        check_settings_match(directory, before.settings, current.settings, hint)
    except (StaleInputError, SettingsChangedError):
        if not replace:
            raise
        return dataclasses.replace(current, state=STALE)
    kept = {name: getattr(before, name) for name in ('state', 'results', 'seconds', 'digest', 'version')}
    return dataclasses.replace(current, **kept)


def check_inputs(output: epath.PathLike, recorded: dict[str, str], current: dict[str, str], hint: str) -> None:
    """Compares recorded digests of inputs with the current ones.

    Raises:
      StaleInputError: with both digests.
    """
    for name in sorted(recorded.keys() | current.keys()):
        if recorded.get(name) != current.get(name):
            raise StaleInputError(
                f'{output} was made from another input {name}:\n'
                f'  recorded {recorded.get(name)}\n  now      {current.get(name)}\n'
                f'Bring back the recorded {name}, or {hint}'
            )


def check_settings_match(
    output: epath.PathLike, recorded: dict[str, Any], current: dict[str, Any], hint: str = ''
) -> None:
    """Compares two flat dicts of settings.

    Raises:
      SettingsChangedError: naming every field that differs, with both values.
    """
    fields = sorted(k for k in recorded.keys() | current.keys() if recorded.get(k) != current.get(k))
    if fields:
        lines = '\n'.join(f'  {k}: recorded {recorded.get(k)!r}, now {current.get(k)!r}' for k in fields)
        hint = (
            hint or f'Go back to the recorded settings, give another --workdir, or delete {output} to write it again.'
        )
        raise SettingsChangedError(f'{output} was made with other settings:\n{lines}\n{hint}')


def job_command(job: str) -> str:
    """Returns how to run a job, for messages. Users know the rest of their command."""
    return f'run your command with --job={job}'
