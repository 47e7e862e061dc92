"""Locks of output directories: one process at a time writes a directory, on one machine, a network file system or gs://.

    with lock.hold(directory, job='sample'):   # on process 0
        lock.check(path)                       # before every write below the directory
        ...

The lock is the file `.lock` in the directory. There, no listing of a parent directory shows it, a name of any length
fits, and who deletes the directory deletes its lock. It names its owner and holds a random token and a heartbeat, a
number that the owner raises every `HEARTBEAT` seconds. Contents never repeat, so that "the file still has the content
that was read" also means "nobody has written it since".

A process that finds a lock and can see that the owner has ended (same kernel, same PID namespace) removes it. If the
owner runs, it refuses. Otherwise it watches: if the heartbeat changes, it refuses; if it has not changed for `LEASE`
seconds of its own clock, it removes the lock. No clocks are compared. After a removal all start again from the
exclusive creation of the file, which only one of them wins.

An owner that has not renewed its lock for half of `LEASE` (it was suspended, or the network was down) must renew it
before it writes again, and stops if the lock is gone or another's. Nothing can stop a process that is suspended between
`check` and the write itself, for longer than the other half.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from etils import epath

from vqvae2_jax.io import files, lock_store, remote
from vqvae2_jax.io.logging import format_duration
from vqvae2_jax.io.record import JobError

FILE = '.lock'  # a name that begins so is a lock, or the leftover of a killed process
HEARTBEAT, LEASE, POLL = 30.0, 300.0, 1.0  # seconds

_UNKNOWN = 'an unknown process, as the lock is damaged'
_held: dict[str, '_Lock'] = {}
# A forked process holds nothing: it has no heartbeat thread, and the lock is its parent's.
os.register_at_fork(after_in_child=_held.clear)


@contextlib.contextmanager
def hold(directory: epath.PathLike, job: str) -> Iterator[None]:
    """Holds the lock of an output directory; only process 0 calls it. Makes the directory.

    A context within one of the same directory, in the same process, does nothing: the outer one holds the lock.
    A directory below a held one has a lock of its own.

    Args:
      directory: the directory that the context writes.
      job: the value of --job, for the messages of other processes.

    Raises:
      JobError: another process writes the directory (the message names it), or the lock cannot be written.
    """
    directory = remote.absolute(directory)
    key = os.fspath(directory)
    if key in _held:
        yield
        return
    lock = _Lock(directory, job)
    try:
        lock.acquire()
        _held[key] = lock
        if check not in files.guards:
            files.guards.append(check)
        yield
    finally:
        _held.pop(key, None)
        lock.release()


def check(path: epath.PathLike) -> None:
    """Checks that this process may still write a path. Call it before every write below a held directory.

    It reads nothing as long as the last heartbeat is younger than half of `LEASE`, or if no lock is held.

    Raises:
      JobError: this process has lost the lock of a directory that contains the path, or cannot renew it.
    """
    for lock in list(_held.values()):
        if path != lock.path and not lock.is_fresh() and lock.contains(path):  # not for the renewal itself
            lock.check()


@dataclasses.dataclass(frozen=True)
class _Owner:
    """The process that holds a lock, as the lock describes it.

    `boot` and `namespace` are those of `_kernel`; `process_start` tells a process from a later one with the same pid.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    process_start: str
    job: str
    started: int  # seconds since 1970, for messages only
    token: str
    heartbeat: str

    def __str__(self):
        age = format_duration(max(0, int(time.time()) - self.started))
        return f'process {self.pid} on {self.host} (job {self.job}, started {age} ago)'

    def is_alive(self) -> bool | None:
        """Returns whether the process runs; None if this process cannot see it."""
        if not self.boot or (self.boot, self.namespace) != _kernel():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it runs, as another user
            pass
        start = _process_start(self.pid)
        return None if start is None or not self.process_start else start == self.process_start


class _Lock:
    """The lock of one directory, as its owner has it."""

    def __init__(self, directory, job):
        self.directory, self.path, self.job = directory, directory / FILE, job
        path = os.fspath(self.path)
        self._store = lock_store.BucketStore(path) if remote.is_remote(path) else lock_store.LocalStore(path)
        self._token = secrets.token_hex(16).encode()
        own, started = os.getpid(), int(time.time())
        start = _process_start(own) or ''
        self._owner = _Owner(socket.gethostname(), *_kernel(), own, start, job, started, self._token.decode(), '')
        self._beats, self._last, self._lost = 0, -math.inf, False
        self._mutex, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat_until_stopped, name=f'lock of {directory}', daemon=True)

    def acquire(self) -> None:
        """Takes the lock, at once or after the watch, and starts the heartbeat; raises JobError."""
        with self._job_errors('cannot be locked'):
            self._take()
            files.remove_partial(self.directory)
        self.check()
        self._thread.start()

    def _take(self):
        watched, since, told = None, 0.0, ''
        while True:
            found = self._store.read()
            if found is None:
                self._store.create(self._content())
                continue
            if self._token in found:
                if told:
                    print(f'{self.job}: took over {self.directory} from {told}', flush=True)
                return
            owner = _read_owner(found)
            alive = owner and owner.is_alive()
            beats = owner and watched and found != watched and owner.token.encode() in watched
            if alive or beats:
                raise JobError(
                    f'{self.directory} is being written by {owner}: '
                    'wait until it ends, stop it, or give another --workdir'
                )
            if found != watched:
                watched, since = found, time.monotonic()
            expired = time.monotonic() - since >= LEASE
            if (expired or alive is False) and self._store.remove(found):
                continue
            if not told:
                wait = f'waiting up to {format_duration(LEASE)} for its heartbeat ...'
                print(f'{self.job}: {self.directory} is locked by {owner or _UNKNOWN}; {wait}', flush=True)
                told = str(owner or _UNKNOWN)
            time.sleep(POLL)

    def is_fresh(self) -> bool:
        return not self._lost and _clock() - self._last < LEASE / 2

    def contains(self, path: epath.PathLike) -> bool:
        directory, path = os.fspath(self.directory), os.fspath(remote.absolute(path))
        return path == directory or path.startswith(f'{directory}/')

    def check(self) -> None:
        """Renews the lock now; raises JobError if it is lost."""
        with self._job_errors('is not written any more, as its lock cannot be renewed'):
            if self._beat():
                return
            found = self._store.read()
        taken = f'taken over by {_read_owner(found) or _UNKNOWN}' if found else 'deleted'
        raise JobError(
            f'{self.path}, the lock of this process, was {taken}; this process writes nothing more there. '
            'When no other process writes there, the same command continues'
        )

    def release(self):
        """Stops the heartbeat and removes the lock, if it is still this process's."""
        if os.getpid() != self._owner.pid:  # a forked process that leaves the context
            return
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):  # then the next process sees that this one has ended, or watches
            found = self._store.read()
            if found is not None and self._token in found:
                self._store.remove(found)

    @contextlib.contextmanager
    def _job_errors(self, fault):
        try:
            with files.writing(self.path):
                yield
        except OSError as error:
            raise JobError(f'{self.directory} {fault}: {" ".join(str(error).split())}') from error

    def _content(self):
        # Of one length whatever the heartbeat, so that it can be written in place.
        return json.dumps(dataclasses.asdict(self._owner) | {'heartbeat': f'{self._beats:010d}'}).encode()

    def _beat(self):
        """Renews the lock; returns whether it is still this process's. Once lost, it stays lost."""
        with self._mutex:
            begin, self._beats = _clock(), self._beats + 1
            self._lost = self._lost or not self._store.renew(self._token, self._content())
            self._last = begin
            return not self._lost

    def _beat_until_stopped(self):
        while not self._stop.wait(HEARTBEAT) and not self._lost:
            with contextlib.suppress(OSError):  # if it persists, `check` raises it
                self._beat()


def _read_owner(content: bytes) -> _Owner | None:
    """Returns the owner that a lock names, or None if it is damaged."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return None
    types = {field.name: field.type for field in dataclasses.fields(_Owner)}
    if not isinstance(fields, dict) or fields.keys() != types.keys():
        return None
    texts = all(isinstance(v, types[k]) and (types[k] is int or v.isprintable()) for k, v in fields.items())
    owner = _Owner(**fields)
    return owner if texts and owner.token and 0 < owner.pid < 2**31 and 0 <= owner.started < 2**40 else None


def _kernel() -> tuple[str, str]:
    """Returns the id of this boot and the PID namespace: processes with the same two see each other. Else ''."""
    try:
        return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip(), os.readlink('/proc/self/ns/pid')
    except OSError:  # not Linux: locks are watched
        return '', ''


def _process_start(pid: int) -> str | None:
    """Returns when a process started, in ticks since boot; '' if it has ended; None if it is hidden or gone."""
    try:
        stat = pathlib.Path(f'/proc/{pid}/stat').read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b')')[2].split()
    return '' if fields[0] in (b'Z', b'X') else fields[19].decode()  # a zombie waits for its parent only


def _clock() -> float:
    """Returns seconds of a clock that goes on while the machine sleeps: an owner's lease runs out meanwhile."""
    return time.clock_gettime(getattr(time, 'CLOCK_BOOTTIME', time.CLOCK_MONOTONIC))
