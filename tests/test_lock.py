"""One process writes a directory: of two that start at once, find an abandoned lock, or are suspended and woken."""

import errno
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from tests import fake_gcs
from vqvae2_jax.io import files, lock, remote
from vqvae2_jax.io.record import JobError

# Obeys a line at a time: be HEARTBEAT LEASE [MACHINE], hold DIRECTORY, write FILE TEXT, fork, release.
# Its answers begin with '> '.
WORKER = """
import contextlib, os, socket, sys
from etils import epath
from vqvae2_jax.io import lock
kernel, host, lock.POLL = lock._kernel, socket.gethostname, 0.02
with contextlib.ExitStack() as stack:
    for line in iter(sys.stdin.readline, ''):
        command, *arguments = line.split()
        try:
            if command == 'be':
                lock.HEARTBEAT, lock.LEASE = map(float, arguments[:2])
                machine = ''.join(arguments[2:])
                lock._kernel = (lambda: (machine, 'pid:[1]')) if machine else kernel
                socket.gethostname = (lambda: machine) if machine else host
            elif command == 'hold':
                stack.enter_context(lock.hold(epath.Path(arguments[0]), 'sample'))
            elif command == 'write':
                lock.check(arguments[0])
                epath.Path(arguments[0]).write_text(arguments[1])
            elif command == 'fork':
                if os.fork():
                    continue  # the other one answers
                command = f'{os.getpid()} holds {len(lock._held)}'
                stack.close()
            elif command == 'release':
                stack.close()
            answer = command
        except lock.JobError as error:
            answer = f'refused: {error}'
        print(f'> {answer}', flush=True)
"""
FORGED = dict(host='far', boot='b', namespace='n', pid=7, process_start='1', job='vqvae', started=0, token='t')


class Worker:
    """A process that runs `WORKER`."""

    def __init__(self):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([sys.executable, '-c', WORKER], **pipes)
        self.pid, self.said, self.pending = self.process.pid, [], 0

    def send(self, command):
        self.process.stdin.write(f'{command}\n')
        self.process.stdin.flush()
        self.pending += 1

    def answer(self):
        """Returns the answer to the command sent; `said` gets the lines printed before it."""
        self.said = []
        for line in self.process.stdout:
            if line.startswith('> '):
                self.pending -= 1
                return line[2:-1]
            self.said.append(line[:-1])
        raise AssertionError(f'the process ended: {self.said}')

    def ask(self, command):
        self.send(command)
        return self.answer()

    def end(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope='module')
def bucket():
    """The stand-in for a bucket, or None without gcsfs. Workers find it in their environment."""
    if not importlib.util.find_spec('gcsfs'):
        yield None
        return
    with fake_gcs.serve() as server:
        yield server


@pytest.fixture(scope='module')
def idle(bucket):
    """Workers that wait for the next test, as they take long to start."""
    workers = []
    yield workers
    for worker in workers:
        worker.end()


@pytest.fixture
def start(idle):
    """Gives the test a `Worker`, perhaps one on another machine."""
    started = []

    def start_worker(machine='', heartbeat=60, lease=600):
        worker = idle.pop() if idle else Worker()
        started.append(worker)
        assert worker.ask(f'be {heartbeat} {lease} {machine}') == 'be'
        return worker

    yield start_worker
    for worker in started:
        if worker.process.poll() is None and not worker.pending and worker.ask('release') == 'release':
            idle.append(worker)
        else:
            worker.end()


@pytest.fixture
def server(bucket):
    if not bucket:
        pytest.skip('gcsfs is not installed')
    return bucket


@pytest.fixture(params=['local', 'bucket'])
def place(request, tmp_path):
    """A directory that no other test has."""
    if request.param == 'local':
        return epath.Path(tmp_path) / 'run'
    request.getfixturevalue('server').objects.clear()
    return epath.Path('gs://bucket/run')


@pytest.fixture
def short(monkeypatch):
    """A lease that runs out soon, in this process."""
    monkeypatch.setattr(lock, 'LEASE', 0.2)
    monkeypatch.setattr(lock, 'POLL', 0.02)


def forge(directory, **fields):
    """Writes the lock of another process; returns its content."""
    content = json.dumps(FORGED | {'heartbeat': '0000000000'} | fields)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / lock.FILE).write_text(content)
    return content


def test_of_two_that_start_at_once_one_writes(place, start):
    workers = [start(), start()]
    for number in range(10 if remote.is_remote(place) else 50):
        directory = place / str(number)
        for worker in workers:
            worker.send(f'hold {directory}')
        answers = [worker.answer() for worker in workers]
        assert answers.count('hold') == 1
        owner = workers[answers.index('hold')].pid
        refusal = answers[1 - answers.index('hold')]
        assert refusal.startswith(f'refused: {directory} is being written by process {owner} on ')
        assert re.search(r' \(job sample, started \d+s ago\): wait until it ends, stop it, or give another', refusal)
        assert [worker.ask('release') for worker in workers] == ['release'] * 2
        assert not files.list_names(directory)


@pytest.mark.parametrize('reaped', [True, False])
def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, start, reaped):
    first, second = start(), start()
    assert first.ask(f'hold {tmp_path}') == 'hold'
    (tmp_path / '.lock.0123456789abcdef.7.part').write_text('left by a kill')
    first.process.kill()
    if reaped:
        first.process.wait()
    else:  # a zombie, as in containers whose first process waits for nobody
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    assert second.ask(f'hold {tmp_path}') == 'hold' and not second.said
    assert files.list_names(tmp_path) == {'.lock'}


def test_an_owner_elsewhere_that_is_alive_keeps_its_lock(place, start):
    first, second = start('far', heartbeat=0.05), start()
    assert first.ask(f'hold {place}') == 'hold'
    refusal = second.ask(f'hold {place}')
    owner = f'process {first.pid} on far (job sample, started '
    assert refusal.startswith(f'refused: {place} is being written by {owner}') and 'give another --workdir' in refusal
    assert len(second.said) == 1 and f'{place} is locked by {owner}' in second.said[0]
    assert second.said[0].startswith('sample: ') and 'waiting up to 10m00s' in second.said[0]
    assert first.ask(f'write {place}/x 1') == 'write'


def test_an_owner_elsewhere_that_ends_hands_on_its_lock(place, start):
    first, second = start('far'), start()
    assert first.ask(f'hold {place}') == 'hold'
    second.send(f'hold {place}')
    assert 'is locked by' in second.process.stdout.readline()
    assert first.ask('release') == 'release' and second.answer() == 'hold'


@pytest.mark.parametrize('finished', [True, False])
def test_a_process_that_wakes_after_its_lease_writes_nothing(place, start, finished):
    first, second = start('far', lease=0.5), start(lease=0.5)
    assert [first.ask(f'hold {place}'), first.ask(f'write {place}/x 1')] == ['hold', 'write']
    first.process.send_signal(signal.SIGSTOP)
    assert [second.ask(f'hold {place}'), second.ask(f'write {place}/x 2')] == ['hold', 'write']
    if finished:
        assert second.ask('release') == 'release'
    first.send(f'write {place}/x 3')  # the first that it does
    first.process.send_signal(signal.SIGCONT)
    refusal = first.answer()
    who = 'deleted' if finished else f'taken over by process {second.pid} on '
    assert refusal.startswith(f'refused: {place}/.lock, the lock of this process, was {who}')
    assert first.ask('release') == 'release' and (place / 'x').read_text() == '2'
    assert files.list_names(place) == ({'x'} if finished else {'.lock', 'x'})
    assert finished or second.ask(f'write {place}/x 4') == 'write'


def test_the_heartbeat_itself_finds_that_the_lock_is_lost(tmp_path, start):
    first = start(heartbeat=0.02)
    assert first.ask(f'hold {tmp_path}') == 'hold'
    content = forge(tmp_path)
    deadline = time.monotonic() + 60
    while 'refused' not in (answer := first.ask(f'write {tmp_path}/x 1')):  # the last heartbeat is fresh for 300 s
        assert time.monotonic() < deadline
    assert 'taken over by process 7 on far (job vqvae' in answer
    assert first.ask('release') == 'release' and (tmp_path / '.lock').read_text() == content


def test_of_two_that_watch_an_abandoned_lock_one_takes_it_over(place, start):
    workers = [start(lease=0.2), start(lease=0.2)]
    for number in range(3 if remote.is_remote(place) else 10):
        forge(place / str(number))
        for worker in workers:
            worker.send(f'hold {place}/{number}')
        answers = [worker.answer() for worker in workers]
        assert sorted(answer.partition(':')[0] for answer in answers) == ['hold', 'refused']
        winner = workers[answers.index('hold')]
        assert [line.partition('(')[0] for line in winner.said] == [
            f'sample: {place}/{number} is locked by process 7 on far ',
            f'sample: took over {place}/{number} from process 7 on far ',
        ]
        for worker in workers:
            worker.ask('release')
        assert not files.list_names(place / str(number))


def test_an_interrupt_releases_the_lock(tmp_path, start):
    first = start()
    assert first.ask(f'hold {tmp_path}') == 'hold' and files.list_names(tmp_path) == {'.lock'}
    first.process.send_signal(signal.SIGINT)
    assert first.process.wait() and not files.list_names(tmp_path)


def test_a_forked_process_neither_holds_nor_releases(tmp_path, start):
    first, second = start(), start()
    assert first.ask(f'hold {tmp_path}') == 'hold'
    child, holds = first.ask('fork').split(' ', 1)
    try:
        assert holds == 'holds 0'
        assert 'refused' in second.ask(f'hold {tmp_path}') and files.list_names(tmp_path) == {'.lock'}
        first.process.kill()
        first.process.wait()
        assert second.ask(f'hold {tmp_path}') == 'hold'
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_a_later_process_with_the_same_pid_is_not_the_owner(tmp_path):
    here = dict(zip(('boot', 'namespace'), lock._kernel(), strict=True), pid=os.getpid())
    forge(tmp_path, process_start=lock._process_start(os.getpid()), **here)
    with pytest.raises(JobError, match=f'{tmp_path} is being written by process {os.getpid()} on far'):
        with lock.hold(tmp_path, 'sample'):
            pass
    assert files.list_names(tmp_path) == {'.lock'}
    forge(tmp_path, process_start='1', **here)
    with lock.hold(tmp_path, 'sample'):
        assert f'"pid": {os.getpid()}' in (tmp_path / '.lock').read_text()
    assert not files.list_names(tmp_path)


@pytest.mark.parametrize(
    'content',
    [b'', b'\0' * 300, b'\xff', b'[' * 5000, b'[]', b'{}', b'7'],
    ids=['empty', 'zeros', 'no text', 'deep', 'list', 'no fields', 'number'],
)
def test_a_damaged_lock_is_watched(tmp_path, capsys, short, content):
    (tmp_path / '.lock').write_bytes(content)
    with lock.hold(tmp_path, 'sample'):
        assert lock._read_owner((tmp_path / '.lock').read_bytes()).job == 'sample'
    waiting, took = capsys.readouterr().out.splitlines()
    who = 'an unknown process, as the lock is damaged'
    assert waiting.startswith(f'sample: {tmp_path} is locked by {who}; waiting')
    assert took == f'sample: took over {tmp_path} from {who}'


@pytest.mark.parametrize(
    'field, value',
    [
        ('pid', 0),
        ('pid', -1),
        ('pid', 10**40),
        ('pid', '7'),
        ('host', None),
        ('job', 'a\nb'),
        ('started', 10**400),
        ('token', ''),
    ],
)
def test_a_lock_with_an_impossible_field_is_damaged(field, value):
    fields = FORGED | {'heartbeat': '0'}
    assert lock._read_owner(json.dumps(fields).encode()) is not None
    assert lock._read_owner(json.dumps(fields | {field: value}).encode()) is None


def test_what_is_no_file_is_refused(tmp_path):
    for make in (lambda p: p.symlink_to('nowhere'), lambda p: p.mkdir(), lambda p: p.parent.joinpath('x').touch()):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        make(directory / '.lock')
        target = directory / 'x' if (directory / 'x').exists() else directory
        with pytest.raises(JobError, match=f'^{target} cannot be locked: {target}/.lock cannot be written: ') as found:
            with lock.hold(target, 'sample'):
                pass
        assert '\n' not in str(found.value)


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, 'link', fail)
    with pytest.raises(JobError, match=f'^{tmp_path} cannot be locked: .*: {os.strerror(code)}. .*the same command'):
        with lock.hold(tmp_path, 'sample'):
            pass
    assert not files.list_names(tmp_path)


def test_nested_contexts(place):
    with lock.hold(place, 'cas'):
        with lock.hold(place, 'cas'), lock.hold(place / 'samples', 'cas'):
            held = (place / '.lock').read_text(), (place / 'samples' / '.lock').read_text()
            assert held[0] != held[1]
        lock.check(place / 'x')
        assert (place / '.lock').read_text() == held[0]
        assert not (place / 'samples' / '.lock').exists()
    assert not (place / '.lock').exists() and not lock._held


def test_a_check_reads_nothing_unless_the_heartbeat_is_old(place, monkeypatch):
    with lock.hold(place, 'sample'):
        before = (place / '.lock').read_text()
        lock.check(place / 'x')
        assert (place / '.lock').read_text() == before
        later = lock._clock() + lock.LEASE / 2
        monkeypatch.setattr(lock, '_clock', lambda: later)
        lock.check(place.parent / 'elsewhere')
        assert (place / '.lock').read_text() == before
        lock.check(place / 'x')
        after = (place / '.lock').read_text()
        assert after != before and json.loads(after) | {'heartbeat': ''} == json.loads(before) | {'heartbeat': ''}
        (place / '.lock').unlink()
        lock.check(place / 'x')
        monkeypatch.setattr(lock, '_clock', lambda: later + lock.LEASE / 2)
        for _ in range(2):
            with pytest.raises(JobError, match=f'{place}/.lock, the lock of this process, was deleted'):
                lock.check(place)
        lock.check(place.parent / 'elsewhere')
        (place / '.lock').write_text(after)  # another process may have written in between
        with pytest.raises(JobError, match='the lock of this process'):
            lock.check(place / 'x')
        forge(place)
        with pytest.raises(JobError, match='was taken over by process 7 on far'):
            lock.check(place / 'x' / 'y')
    assert json.loads((place / '.lock').read_text())['host'] == 'far'


def test_a_lock_that_cannot_be_renewed(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with lock.hold(tmp_path, 'sample'):
        later = lock._clock() + lock.LEASE / 2
        monkeypatch.setattr(lock, '_clock', lambda: later)
        with monkeypatch.context() as patched:
            patched.setattr(os, 'pwrite', fail)
            with pytest.raises(JobError, match=f'^{tmp_path} is not written any more, .*: Input/output error. '):
                lock.check(tmp_path)
        lock.check(tmp_path)  # the disk has recovered
    assert not files.list_names(tmp_path)
