"""The record of an output directory: inputs, settings, state, files and results of its job, in `record.json`.

All jobs that write a directory use it in the same way:

    output = record.open_output(directory, job='sample', inputs=digests, settings=settings)
    output.drop_damaged(output.find_damaged_together())  # the job writes these files again
    if output.state != record.DONE:
        output.start()
        ...                                     # write the files that are not in output.files
        output.add_files('samples.npz')
        output.finish(results)

A job refuses a directory whose inputs or settings have changed, and shows both sides. A job that reads the directory
calls `read_done`, and `Record.file` for each file. The record holds the checksum of every file and its own, so that no
damaged file is used.
"""

import dataclasses
import hashlib
from collections.abc import Collection
from typing import Any

import jax
from etils import epath

from vqvae2_jax.distributed import processes
from vqvae2_jax.io import checksums, files
from vqvae2_jax.version import __version__

FILE = 'record.json'
SCHEMA = 2
MISSING, STARTED, DONE, STALE = 'missing', 'started', 'done', 'stale'
_FIELDS = (
    *('schema', 'job', 'state', 'version', 'devices', 'inputs', 'settings'),
    *('results', 'seconds', 'digest', 'files', 'changes'),
)
_TYPES = {'inputs': dict, 'settings': dict, 'results': dict, 'files': dict, 'changes': list, 'digest': str}
# Files for people. Another version of a library may write them differently, which makes no other output stale.
_NO_DATA = ('.png', '.html')
_FUNCTIONS = ('write_codes',)  # that write records, as jobs do
_OLD_FILES = ('trained.json', 'settings.json', 'started.json', 'meta.json')  # of versions before 0.3


class JobError(ValueError):
    """A job cannot run as things stand; the message says what to do. It is printed without a traceback."""


class DamagedError(JobError):
    """A record or a file is not as it was written."""


class UnreadableError(JobError):
    """A record is there, but cannot be read."""


class MissingError(JobError):
    """An output that a job reads is not there, or not finished."""


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
      files: {path below the directory: [bytes, checksum]} of every complete file, see io/checksums.py.
      seconds: time spent, over all restarts.
      digest: identifies the content of a finished output, as 64 hex digits; '' until it is done.
      devices: number and kind of the devices that wrote it, such as '8 x TPU v5 lite'.
      version: version of the package that wrote it.
      changes: [step, field, old value, new value] of every setting that was changed during a training.
      devices_now: number and kind of the devices of this process; not stored.
      content_read: digest of the record.json that was read, '' if there was none; not stored.
    """

    directory: epath.Path
    job: str
    inputs: dict[str, str]
    settings: dict[str, Any]
    state: str = MISSING
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: dict[str, list] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    digest: str = ''
    devices: str = ''
    version: str = __version__
    changes: list[list] = dataclasses.field(default_factory=list)
    devices_now: str = dataclasses.field(default='', compare=False)
    content_read: str = dataclasses.field(default='', repr=False, compare=False)
    _dropped_digest: str = dataclasses.field(default='', repr=False, compare=False)
    _dropped_devices: str = dataclasses.field(default='', repr=False, compare=False)

    def start(self) -> None:
        """Records that writing has begun. The output counts as unfinished until `finish`; complete files are kept."""
        self.state, self.results, self.digest, self.version = STARTED, {}, '', __version__
        self.devices = self.devices_now
        files.remove_partial(self.directory)
        self.write()

    def add_files(self, *names: str, seconds: float | None = None) -> None:
        """Records that files are complete.

        Args:
          *names: their paths below the directory.
          seconds: time spent so far, over all restarts; None leaves it as it is.
        """
        self.files |= checksums.file_entries(self.directory, names)
        self.seconds = self.seconds if seconds is None else round(seconds, 1)
        self.write()

    def finish(self, results: dict[str, Any], *, seconds: float | None = None, digest: str | None = None) -> None:
        """Records that all outputs are written. Call it last.

        Args:
          results: numbers and facts to report, in JSON types.
          seconds: time spent over all restarts; None leaves it as it is.
          digest: digest of the content; None: computed from inputs, settings, results and the checksums of the files.
        """
        self.state, self.results = DONE, results
        self.seconds = self.seconds if seconds is None else round(seconds, 1)
        data = {name: entry for name, entry in self.files.items() if not name.endswith(_NO_DATA)}
        self.digest = digest or files.digest_json([self.job, self.inputs, self.settings, results, data])
        self.write()
        if self._dropped_digest and self.digest != self._dropped_digest:
            print(
                f'{self.directory}: the damaged files were made on {self._dropped_devices}, and again on '
                f'{self.devices}, with another content. All outputs that were made from them are stale',
                flush=True,
            )

    def refuse_changed(self) -> None:
        """Refuses to write if another process has written the record since it was read; call it under the lock.

        Raises:
          JobError: the record has changed.
        """
        if _content_digest(self.directory) != self.content_read:
            raise JobError(f'another process has just written {self.directory}: the same command continues')

    def write(self) -> None:
        """Writes record.json as it stands."""
        values = {name: getattr(self, name) for name in _FIELDS if name != 'schema'}
        checksums.write_sealed(self.directory / FILE, {'schema': SCHEMA, **values})

    def describe_changes(self) -> str:
        """Returns `changes` as text, such as 'vqvae.training.learning_rate 0.0004 -> 0.0002 at step 40'."""
        return ', '.join(f'{field} {old} -> {new} at step {step}' for step, field, old, new in self.changes)

    def file(self, name: str) -> epath.Path:
        """Returns the path of a recorded file of a finished output, after a comparison with its checksum.

        Raises:
          DamagedError: the file is damaged or missing; the message names the job to run.
        """
        self.refuse_damaged(self.find_damaged([name]))
        return self.directory / name

    def find_damaged(self, names: Collection[str] | None = None) -> dict[str, str]:
        """Compares recorded files with their checksums.

        Args:
          names: names in `files`, or of a file that should be there; None: all of `files`.

        Returns:
          {name: reason} of the files that are not as recorded.
        """
        names = self.files if names is None else names
        problems = {name: 'the record lacks it' for name in names if name not in self.files}
        recorded = {name: self.files[name] for name in names if name in self.files}
        return problems | checksums.find_damaged(self.directory, recorded)

    def find_damaged_together(self) -> dict[str, str]:
        """Compares all recorded files with their checksums; all processes together, each reads its share of them.

        Returns:
          {name: reason} of the files that are not as recorded, on every process.
        """
        share = sorted(self.files)[jax.process_index() :: jax.process_count()]
        parts = processes.gather(self.find_damaged(share))
        return {name: reason for part in parts for name, reason in sorted(part.items())}

    def refuse_damaged(self, damaged: dict[str, str]) -> None:
        """Refuses files that a job reads.

        Raises:
          DamagedError: there are damaged files; the message names the job to run.
        """
        if damaged:
            raise DamagedError(
                f'{self.directory / next(iter(damaged))} is damaged: {_describe(damaged)}. '
                f'To make it again, {job_command(self.job)}'
            )

    def drop_damaged(self, damaged: dict[str, str]) -> None:
        """Removes damaged files from the record, and says so: the job will write them again."""
        if not damaged:
            return
        for name in damaged:
            self.files.pop(name, None)
        self._dropped_digest, self._dropped_devices = self.digest, self.devices
        self.state = STARTED if self.state == DONE else self.state
        print(f'{self.directory / next(iter(damaged))} is damaged: {_describe(damaged)}. Making it again', flush=True)


def _describe(damaged: dict[str, str]) -> str:
    first, more = next(iter(damaged.values())), len(damaged) - 1
    return first + (f' ({more} more file{"s are" if more > 1 else " is"} damaged)' if more else '')


def read(directory: epath.PathLike) -> Record | None:
    """Reads the record of a directory; None if it has none.

    Raises:
      DamagedError: the record is damaged.
      JobError: another version wrote the directory, or the record cannot be read.
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
        fields = checksums.read_sealed(path)
    except ValueError as error:
        raise DamagedError(f'{path} is damaged: {error}') from error
    except OSError as error:
        raise UnreadableError(
            f'{path} cannot be read: {error.strerror or error}. Change its permissions, or remove it'
        ) from error
    if fields.pop('schema', None) != SCHEMA or fields.keys() != set(_FIELDS) - {'schema'}:
        raise JobError(
            f'{path} has other fields than version {__version__} writes: give another --workdir, or use the version '
            'that wrote it'
        )
    if wrong := [name for name, kind in _TYPES.items() if not isinstance(fields[name], kind)]:
        raise DamagedError(f'{path} is damaged: {wrong[0]} is {fields[wrong[0]]!r}')
    return Record(directory, **fields)


def read_done(directory: epath.PathLike, job: str) -> Record:
    """Reads the record of a finished output.

    Args:
      directory: the output.
      job: the value of --job that writes it, for the message.

    Raises:
      MissingError: it is not there, or not finished; the message names the job to run.
      JobError: it is damaged; also as `read`.
    """
    try:
        record = read(directory)
    except DamagedError as error:
        raise DamagedError(f'{error}. To make it again, {job_command(job)}') from error
    if record is None or record.state != DONE:
        how = 'has nothing' if record is None else 'is not finished'
        raise MissingError(f'{directory} {how}: {job_command(record.job if record else job)}')
    return record


def read_if_sound(directory: epath.PathLike) -> Record | None:
    """Reads the record of a directory; None if it is missing or damaged.

    Raises:
      JobError: another version wrote the directory.
    """
    try:
        return read(directory)
    except DamagedError:
        return None


def read_if_done(directory: epath.PathLike) -> Record | None:
    """Reads the record of an output; None if it is missing, not finished or damaged; raises as `read_if_sound`."""
    record = read_if_sound(directory)
    return record if record and record.state == DONE else None


def open_output(
    directory: epath.PathLike,
    job: str,
    inputs: dict[str, str],
    settings: dict[str, Any],
    *,
    replace: bool = False,
    hint: str = '',
    devices: str = '',
) -> Record:
    """Compares a directory with the job that is about to write it.

    Args:
      directory: the output; it may be missing.
      job: the value of --job, for the record; it is not compared.
      inputs: current digests of the inputs, by name.
      settings: current settings by name, of values that JSON can hold.
      replace: outputs of other inputs or settings are written again, instead of refused.
      hint: advice about changed settings, as a sentence; '': the usual advice.
      devices: number and kind of the devices of this process.

    Returns:
      The record to write, with the state, results, files, seconds and digest that the directory has. If its record is
      damaged, or with `replace` if something differs, a record in the state `STALE` without these. Nothing is written
      yet.

    Raises:
      StaleInputError: an input has changed; the message shows both digests.
      SettingsChangedError: settings have changed; the message shows both sides.
      JobError: as `read`.
      ValueError: a setting is not finite.
    """
    directory = epath.Path(directory)
    not_stored = {'devices_now': devices, 'content_read': _content_digest(directory)}
    current = Record(directory, job, dict(inputs), files.to_json(settings, 'settings'), **not_stored)
    try:
        before = read(directory)
    except DamagedError as error:
        print(f'{error}. Everything in {directory} is made again', flush=True)
        return dataclasses.replace(current, state=STALE)
    if before is None:
        return current
    try:
        check_inputs(directory, before.inputs, current.inputs, f'delete {directory} to write it again')
        check_settings_match(directory, before.settings, current.settings, hint)
    except (StaleInputError, SettingsChangedError):
        if not replace:
            raise
        return dataclasses.replace(current, state=STALE)
    names = 'state', 'results', 'files', 'seconds', 'digest', 'devices', 'version', 'changes'
    kept = {name: getattr(before, name) for name in names}
    return dataclasses.replace(current, **kept)


def _content_digest(directory: epath.Path) -> str:
    try:
        return hashlib.sha256((directory / FILE).read_bytes()).hexdigest()
    except OSError:  # `read` says so
        return ''


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
    """Returns how to run a job or function, for messages. Users know the rest of their command."""
    return f'call vqvae2_jax.{job} again' if job in _FUNCTIONS else f'run your command with --job={job}'
