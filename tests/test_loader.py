"""Batches: deterministic, resumable, independent of workers and hosts; evaluation reads every example."""

import errno
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import grain
import numpy as np
import pytest

from tests.defaults import image_spec
from vqvae2_jax.data import loader, worker_processes
from vqvae2_jax.data.decode import UnreadableImage
from vqvae2_jax.data.images import open_images
from vqvae2_jax.data.loader import BatchIterator, eval_batches, train_batches
from vqvae2_jax.io.record import JobError

ROOT = pathlib.Path(__file__).parents[1]

WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]


class Numbers:
    """A source of codes, not of images."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {'codes_0': np.full((2, 3), index, np.int32), 'label': np.int32(index % 3), 'index': np.int64(index)}


class Damaged(Numbers):
    """Examples 2, 3 and the last one cannot be read and are skipped."""

    on_error = 'skip'

    def example_name(self, index):
        return f'example {index}'

    def __getitem__(self, index):
        if index in (2, 3, self.count - 1):
            raise UnreadableImage(self.example_name(index), 'damaged')
        return super().__getitem__(index)


EXAMPLE_BYTES = 6 * 4 + 4 + 8 + 1  # of Numbers, with its mask


def indices(batches):
    return [batch['index'].tolist() for batch in batches]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            assert a[name].dtype == b[name].dtype


@pytest.fixture(scope='module')
def fashion():
    return open_images(image_spec(num_classes=10), 'validation')


# --- training ---------------------------------------------------------------------------------------------------------


def test_epochs_are_complete_and_differ():
    seen = np.concatenate(indices(take(train_batches(Numbers(30), batch_size=6, seed=1), 15))).reshape(3, 30)
    np.testing.assert_array_equal(np.sort(seen), np.tile(np.arange(30), (3, 1)))
    assert len({tuple(epoch) for epoch in seen}) == 3
    assert all(tuple(epoch) != tuple(range(30)) for epoch in seen)


def test_batch_shapes_and_dtypes():
    batch = next(train_batches(Numbers(10), batch_size=4, seed=0))
    assert batch['codes_0'].shape == (4, 2, 3) and batch['codes_0'].dtype == np.int32
    assert batch['label'].dtype == np.int32 and batch['index'].dtype == np.int64
    np.testing.assert_array_equal(batch['codes_0'][:, 1, 2], batch['index'])


@pytest.mark.parametrize('count', [1, 3])
def test_batch_larger_than_the_data(count):
    seen = np.concatenate(indices(take(train_batches(Numbers(count), batch_size=8, seed=0), 3)))
    assert np.ptp(np.bincount(seen, minlength=count)) == 0


def test_seed_decides():
    one, same, other = (indices(take(train_batches(Numbers(50), batch_size=5, seed=s), 4)) for s in (3, 3, 4))
    assert one == same != other


def test_flip_and_crop(fashion):
    options = {'batch_size': 16, 'seed': 0}
    flipped = next(train_batches(fashion, flip=True, **options))
    plain = np.stack([fashion[i]['image'] for i in flipped['index']])
    mirrored = (flipped['image'] == plain[:, :, ::-1]).all((1, 2, 3))
    kept = (flipped['image'] == plain).all((1, 2, 3))
    assert (mirrored | kept).all() and 3 <= mirrored.sum() <= 13
    # Augmentation differs between epochs.
    once = train_batches(fashion, flip=True, crop=True, batch_size=len(fashion), seed=0)
    first, second = next(once), next(once)
    image_of = [dict(zip(batch['index'].tolist(), batch['image'], strict=True)) for batch in (first, second)]
    assert np.mean([np.array_equal(image_of[0][i], image_of[1][i]) for i in range(100)]) < 0.1
    assert first['image'].shape == (len(fashion), 28, 28, 1)


def test_crops_reach_every_side():
    source = open_images(image_spec(), 'train')
    zooms, offsets = [], []

    class Recorder:
        def __len__(self):
            return len(source)

        def read(self, index, zoom, offset):
            zooms.append(zoom)
            offsets.append(offset)
            return source.read(index, zoom, offset)

    take(train_batches(Recorder(), batch_size=100, seed=0, crop=True), 2)
    offsets = np.array(offsets)
    assert 1 <= min(zooms) < 1.01 and 1.13 < max(zooms) <= 8 / 7
    assert (offsets.min(0) < 0.1).all() and (offsets.max(0) > 0.9).all()
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.3  # Vertical and horizontal are independent.


def test_state_restores_the_exact_continuation(fashion):
    def make():
        return train_batches(fashion, batch_size=64, seed=5, flip=True, crop=True)

    iterator = make()
    take(iterator, 14)  # Nearly one epoch: the continuation crosses into the next.
    state = iterator.get_state()
    expected = take(iterator, 6)
    restored = make()
    next(restored)  # Already under way.
    restored.set_state(state)
    assert restored.get_state() == state == {'next_batch': 14}
    equal(take(restored, 6), expected)
    iterator.set_state(state)  # Backwards.
    equal(take(iterator, 2), expected[:2])
    iterator.close()
    restored.close()
    with pytest.raises(ValueError, match='closed'):
        next(iterator)


def test_peek_reads_the_next_batch_and_does_not_advance():
    iterator = train_batches(Numbers(20), batch_size=4, seed=0, workers=2)
    before = set(multiprocessing.active_children())
    peeked = iterator.peek()
    assert iterator.get_state() == {'next_batch': 0} and set(multiprocessing.active_children()) == before
    iterator.fall_back_to_threads()
    equal([peeked], take(iterator, 1))
    equal([iterator.peek()], take(iterator, 1))
    iterator.close()


@pytest.mark.slow
def test_worker_processes(fashion):
    before = set(multiprocessing.active_children())
    plain, worked = (train_batches(fashion, batch_size=64, seed=0, flip=True, crop=True, workers=w) for w in (0, 2))
    expected = take(plain, 18)  # More than one epoch.
    equal(take(worked, 5), expected[:5])  # Workers do not change the batches ...
    assert len(set(multiprocessing.active_children()) - before) == 2  # ... and are as many as asked for.
    worked.set_state({'next_batch': 14})  # Saved without workers, continued with them.
    equal(take(worked, 4), expected[14:])
    worked.close()
    deadline = time.monotonic() + 10
    while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(multiprocessing.active_children()) - before


WATCHED = """
import signal
from multiprocessing.context import SpawnProcess
from vqvae2_jax.data.loader import eval_batches

start = SpawnProcess.start
def watched(process):
    stop_signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    print(stop_signals <= signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)
    start(process)
SpawnProcess.start = watched

class Source:
    __len__ = lambda _: 4
    __getitem__ = lambda _, index: {'index': index}

assert len(list(eval_batches(Source(), batch_size=2, workers=1))) == 2
"""


def test_workers_start_where_stop_signals_wait():
    """A worker must not die while it starts. In its own process, since the first start is special."""
    found = subprocess.run([sys.executable, '-c', WATCHED], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout == 'True\n', found.stderr


class Fatal(Numbers):
    """Ends every worker process that reads example 5, by a signal or an exit status."""

    def __init__(self, how):
        super().__init__(40)
        self.how, self.parent = how, os.getpid()

    def __getitem__(self, index):
        if index == 5 and os.getpid() != self.parent:
            os._exit(self.how) if self.how < 100 else os.kill(os.getpid(), self.how - 100)
        return super().__getitem__(index)


@pytest.mark.slow
@pytest.mark.parametrize(
    'how, message',
    [
        (100 + signal.SIGKILL, r'data.workers=2 processes was killed \(SIGKILL\), as the system does when the memory'),
        (100 + signal.SIGBUS, r'data.workers is 2, and these .* shared memory, /dev/shm of [0-9.]+ MiB: '),
        (100 + signal.SIGSEGV, 'data.workers=2 processes ended by SIGSEGV; its own message'),
        (3, 'data.workers=2 processes ended with exit status 3; its own message'),
    ],
)
def test_a_dead_worker_is_one_line_whose_advice_works(how, message):
    source = Fatal(how)
    batches = eval_batches(source, batch_size=4, workers=2)
    with pytest.raises(JobError, match=f'^[^\\n]*{message}[^\\n]*--config.data.workers=0[^\\n]*$'):
        list(batches)
    batches.close()
    assert len(indices(eval_batches(source, batch_size=4, workers=0))) == 10


@pytest.mark.parametrize(
    'error',
    [
        RuntimeError('their own'),
        OSError(errno.ENOSPC, 'No space left on device', '/data/skipped.txt'),
        OSError(errno.EIO, 'Input/output error'),
        ValueError('Worker process was terminated unexpectedly with exit code -9'),
    ],
)
def test_other_errors_of_workers_keep_their_traceback(error):
    assert worker_processes.failure(error, 2) == ''


@pytest.mark.parametrize('name', [None, '/psm_1234'])
def test_shared_memory_without_room_for_another_block_is_full(name):
    error = OSError(errno.ENOSPC, 'No space left on device', name)
    assert 'filled the shared memory' in worker_processes.failure(error, 1)
    assert 'to fewer than' not in worker_processes.failure(error, 1)  # than 1 is 0


def test_shared_memory_of_a_system_without_its_folder(monkeypatch):
    monkeypatch.setattr(worker_processes, '_SHARED_MEMORY', '/nowhere')
    text = worker_processes.failure(OSError(errno.ENOSPC, 'No space left on device'), 1)
    assert text.startswith('data.workers is 1, and these processes have filled the shared memory: set --config.data')
    assert 'nowhere' not in text and 'shm' not in text


@pytest.mark.parametrize('number, name', [(11, 'SIGSEGV'), (35, 'signal 35')])  # a real-time one has no name
def test_signals_of_workers_are_named(number, name):
    error = RuntimeError(f'Worker process was terminated unexpectedly with exit code -{number}')
    assert f'data.workers=2 processes ended by {name}; ' in worker_processes.failure(error, 2)


READ_WITH_WORKERS = """
import numpy as np
from vqvae2_jax.data.loader import eval_batches
from vqvae2_jax.io.record import JobError

class Source:
    __len__ = lambda _: 64
    __getitem__ = lambda _, index: {'image': np.zeros((64, 64, 3), np.uint8)}

if __name__ == '__main__':
    try:
        list(eval_batches(Source(), batch_size=32, workers=2))
    except JobError as error:
        print(error)
    print(len(list(eval_batches(Source(), batch_size=32, workers=0))))
"""


@pytest.mark.system
@pytest.mark.parametrize('options', ['size=256k', 'size=1m,nr_inodes=30', 'size=1m,nr_inodes=4'])
def test_a_full_shared_memory_is_told_with_its_size(tmp_path, options):
    mount = ['unshare', '-m', 'sh', '-c', f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"', 'sh']
    if subprocess.run([*mount, 'true'], capture_output=True).returncode:
        pytest.skip('may not mount')
    (tmp_path / 'program.py').write_text(READ_WITH_WORKERS)
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    command = [*mount, sys.executable, tmp_path / 'program.py']
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    message, count = found.stdout.splitlines()
    size = '0.25' if '256k' in options else '1'
    assert message.startswith(
        f'data.workers is 2, and these processes have filled the shared memory, /dev/shm of {size} '
    )
    assert count == '2' and found.stderr == '', found.stderr


@pytest.mark.parametrize('count', [24, 25])
def test_hosts_share_the_global_batch(fashion, count):
    whole = take(train_batches(Numbers(count), batch_size=6, seed=2), 8)
    shares = ([0, 3], [1, 2], [4, 5])  # devices of a host are not always neighbours in the mesh
    parts = [take(train_batches(Numbers(count), batch_size=6, seed=2, rows=rows), 8) for rows in shares]
    for k, batch in enumerate(whole):
        for rows, part in zip(shares, parts, strict=True):
            equal([part[k]], [{name: values[rows] for name, values in batch.items()}])
    epoch = np.concatenate([part[k]['index'] for k in range(4) for part in parts])
    assert len(set(epoch)) == 24  # Disjoint between hosts, and together all (of 24).
    host = [
        next(train_batches(fashion, batch_size=8, seed=0, flip=True, crop=True, rows=rows))
        for rows in (range(4), range(4, 8))
    ]
    one = next(train_batches(fashion, batch_size=8, seed=0, flip=True, crop=True))
    np.testing.assert_array_equal(np.concatenate([part['image'] for part in host]), one['image'])


def test_training_errors():
    with pytest.raises(ValueError, match='no examples'):
        train_batches(Numbers(0), batch_size=4, seed=0)
    with pytest.raises(ValueError, match='batch_size=0'):
        train_batches(Numbers(10), batch_size=0, seed=0)
    for rows in ([], [5, 6], [1, 0], [-1, 0]):
        with pytest.raises(ValueError, match=re.escape(f'rows={rows} must be some of 0 to 5')):
            train_batches(Numbers(10), batch_size=6, seed=0, rows=rows)
    for option in ('flip', 'crop'):
        with pytest.raises(ValueError, match=f'{option}=True.*Numbers'):
            train_batches(Numbers(10), batch_size=6, seed=0, **{option: True})


def test_batches_are_read_ahead():
    read = []

    class Noted(Numbers):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    iterator = train_batches(Noted(1000), batch_size=4, seed=0)
    next(iterator)
    deadline = time.monotonic() + 20
    while len(read) < 12 and time.monotonic() < deadline:  # While whoever asked for the first batch works on it.
        time.sleep(0.01)
    iterator.close()
    assert 12 <= len(read) < 1000


def test_a_whole_batch_is_read_ahead_in_chunks(monkeypatch):
    monkeypatch.setattr(loader, '_CHUNK_BYTES', EXAMPLE_BYTES)
    read = []

    class Noted(Numbers):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    batches = eval_batches(Noted(1000), batch_size=32)
    next(batches)
    deadline = time.monotonic() + 20
    while not set(range(64)) <= set(read) and time.monotonic() < deadline:
        time.sleep(0.01)
    batches.close()
    assert set(range(64)) <= set(read)


def test_a_failed_batch_is_read_again_from_its_start(monkeypatch):
    monkeypatch.setattr(loader, '_CHUNK_BYTES', EXAMPLE_BYTES)
    failures = [6]

    class Failing(Numbers):
        def __getitem__(self, index):
            if index in failures:
                raise OSError('gone')
            return super().__getitem__(index)

    batches = eval_batches(Failing(12), batch_size=4)
    assert indices([next(batches)]) == [[0, 1, 2, 3]]
    with pytest.raises(OSError, match='gone'):
        next(batches)
    failures.clear()
    assert indices(batches) == [[4, 5, 6, 7], [8, 9, 10, 11]]


# --- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'examples, workers', [(0, 0), (1, 0), (2, 0), (4, 0), (6, 0), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_batches_do_not_depend_on_the_size_of_chunks(monkeypatch, examples, workers):
    source, rows = Damaged(22), [0, 1, 2, 4, 5, 7]
    options = {'batch_size': 8, 'rows': rows}
    expected_eval = list(eval_batches(source, **options))
    assert [batch['mask'].tolist() for batch in expected_eval] == [
        [True, True, False, True, True, True],
        [True] * 6,
        [True, True, True, True, False, False],  # 16, 17, 18, 20; then 21 is damaged and 23 does not exist
    ]
    assert indices(expected_eval)[2] == [16, 17, 18, 20, 0, 0]
    expected_train = take(train_batches(source, seed=1, **options), 7)

    monkeypatch.setattr(loader, '_CHUNK_BYTES', examples * EXAMPLE_BYTES)
    equal(list(eval_batches(source, workers=workers, **options)), expected_eval)
    batches = train_batches(source, seed=1, workers=workers, **options)
    equal(take(batches, 4), expected_train[:4])
    assert batches.get_state() == {'next_batch': 4}
    equal([batches.peek()], expected_train[4:5])
    batches.set_state({'next_batch': 3})
    equal(take(batches, 4), expected_train[3:])
    batches.close()


def test_chunks_are_bounded(monkeypatch):
    """A chunk is the unit that worker processes hold in shared memory; small batches are one chunk."""
    chunks = eval_batches(Numbers(100), batch_size=40)._chunks
    assert len(chunks) == 3 and [len(chunks[i]['index']) for i in range(3)] == [40] * 3
    monkeypatch.setattr(loader, '_CHUNK_BYTES', 16 * EXAMPLE_BYTES)
    chunks = eval_batches(Numbers(100), batch_size=40)._chunks
    assert len(chunks) == 9 and [len(chunks[i]['index']) for i in range(3)] == [14, 13, 13]
    assert all(sum(x.nbytes for x in chunks[i].values()) <= 16 * EXAMPLE_BYTES for i in range(9))


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('workers', WORKERS)
def test_evaluation_sees_all_once_in_order(workers):
    batches = list(eval_batches(Numbers(10), batch_size=4, workers=workers))
    assert indices(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert [batch['mask'].tolist() for batch in batches] == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert batches[0]['mask'].dtype == bool


def test_evaluation_of_a_range():
    assert indices(eval_batches(Numbers(10), batch_size=2, start=3, stop=7)) == [[3, 4], [5, 6]]
    assert indices(eval_batches(Numbers(10), batch_size=2, start=9)) == [[9, 9]]
    assert list(eval_batches(Numbers(10), batch_size=2, start=4, stop=4)) == []
    for start, stop in ((-1, 5), (0, 11), (6, 5)):
        with pytest.raises(ValueError, match=f'start={start}, stop={stop}.*10 examples'):
            eval_batches(Numbers(10), batch_size=2, start=start, stop=stop)
    with pytest.raises(ValueError, match='no examples'):
        eval_batches(Numbers(0), batch_size=2)


def test_evaluation_on_hosts_has_equally_many_batches():
    shares = ([0, 4], [1, 2], [3, 5], [6, 7])
    hosts = [list(eval_batches(Numbers(9), batch_size=8, rows=rows)) for rows in shares]
    assert [len(batches) for batches in hosts] == [2] * 4
    joined = [np.concatenate([batches[k]['mask'] for batches in hosts]) for k in range(2)]
    assert [mask.sum() for mask in joined] == [8, 1]
    assert [batches[0]['index'].tolist() for batches in hosts] == [list(rows) for rows in shares]
    assert hosts[0][1]['index'][0] == 8 and hosts[0][1]['mask'].tolist() == [True, False]


def test_iterator_is_grains():
    assert isinstance(eval_batches(Numbers(3), batch_size=2), grain.DatasetIterator)
    assert isinstance(train_batches(Numbers(3), batch_size=2, seed=0), BatchIterator)
