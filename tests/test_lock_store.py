"""The storage of locks: every change is conditional on what was read, on file systems of all kinds and on a bucket."""

import errno
import fcntl
import os

import pytest
from etils import epath

from tests import fake_gcs
from vqvae2_jax.io import files, lock, lock_store
from vqvae2_jax.io.record import JobError


@pytest.fixture(scope='module')
def server():
    pytest.importorskip('gcsfs')
    with fake_gcs.serve() as server:
        yield server


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, 'link', link)
    store = lock_store.LocalStore(str(tmp_path / '.lock'))
    with lock.hold(tmp_path, 'sample'):
        held = store.read()
        store.create(b'another')
        assert (
            store.read() == held and lock._read_owner(held).job == 'sample' and files.list_names(tmp_path) == {'.lock'}
        )
    assert not files.list_names(tmp_path)


@pytest.mark.parametrize('flock', [True, False])
@pytest.mark.parametrize('woken', [True, False])
def test_a_lock_that_changes_before_its_removal_is_put_back(tmp_path, monkeypatch, flock, woken):
    """Either its owner renews it at the last moment, or (without flock) another process replaces it."""
    path = tmp_path / '.lock'
    store, other = (lock_store.LocalStore(str(path)) for _ in range(2))
    store.create(b'token 1')
    rename = os.rename

    def change_first(*args):
        monkeypatch.setattr(os, 'rename', rename)
        if woken:
            assert other.renew(b'token', b'token 2')
        elif other.remove(b'token 1'):
            other.create(b'winner ')
        rename(*args)

    def no_flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if not flock:
        monkeypatch.setattr(fcntl, 'flock', no_flock)
    monkeypatch.setattr(os, 'rename', change_first)
    changed = woken or not flock
    assert store.remove(b'token 1') is not changed  # with flock the other process cannot remove it
    assert store.read() == ((b'token 2' if woken else b'winner ') if changed else None)
    assert files.list_names(tmp_path) == ({'.lock'} if changed else set())


def test_a_heartbeat_does_not_overwrite_the_next_owner(tmp_path, monkeypatch):
    store, other = (lock_store.LocalStore(str(tmp_path / '.lock')) for _ in range(2))
    store.create(b'token 1')
    pwrite = os.pwrite

    def after_a_takeover(*args):
        assert other.remove(b'token 1')
        other.create(b'winner ')
        return pwrite(*args)

    monkeypatch.setattr(os, 'pwrite', after_a_takeover)
    assert not store.renew(b'token', b'token 2') and store.read() == b'winner '


def test_conditional_writes(server):
    path = 'gs://bucket/conditional'
    assert lock_store.read_generation(path) is None and not lock_store.remove_if_generation(path, '1')
    assert lock_store.write_if_generation(path, b'1', '0') and not lock_store.write_if_generation(path, b'2', '0')
    data, generation = lock_store.read_generation(path)
    assert data == b'1' and not lock_store.write_if_generation(path, b'2', str(int(generation) - 1))
    assert lock_store.write_if_generation(path, b'2', generation) and not lock_store.remove_if_generation(
        path, generation
    )
    data, generation = lock_store.read_generation(path)
    assert (
        data == b'2' and lock_store.remove_if_generation(path, generation) and lock_store.read_generation(path) is None
    )


def test_requests_whose_answer_is_lost(server, monkeypatch):
    """gcsfs sends them again, and they find their own work."""
    directory = epath.Path('gs://bucket/lost')
    server.lost_answers = 1
    with lock.hold(directory, 'sample'):
        assert not server.lost_answers
        later = lock._clock() + lock.LEASE / 2
        monkeypatch.setattr(lock, '_clock', lambda: later)
        server.lost_answers = 1
        lock.check(directory / 'x')
        assert not server.lost_answers
        server.lost_answers = 1
    assert not server.lost_answers and not (directory / '.lock').exists()


def test_a_bucket_that_refuses(server, monkeypatch, caplog):
    error = {'error': {'code': 401, 'message': 'Anonymous caller'}}
    monkeypatch.setattr(fake_gcs._Handler, '_post', lambda *_: (401, error))
    with pytest.raises(JobError, match='^gs://bucket/no cannot be locked: .*/.lock: Anonymous caller, 401'):
        with lock.hold(epath.Path('gs://bucket/no'), 'sample'):
            pass
    assert not caplog.records  # gcsfs logs what it raises, with a traceback
