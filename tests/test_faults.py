"""The fault-injection suite: a sample of its attacks ends well, and its parts notice what they are for."""

import errno
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import pytest

from benchmarks.faults import attacks, compare, damage, reference, suite, trial
from benchmarks.faults.process import Ended

needs_compiler = pytest.mark.skipif(not shutil.which('cc'), reason='needs a C compiler')
# Damages that only a checksum finds: the file can be read, and holds other values.
SILENT = (
    'input/extract_codes/flip:vqvae/weights/N/d/HASH',
    'input/sample/flip:prior_LEVEL/weights/N/d/HASH',
    'input/reject/swap:samples/default/samples-N-N.npz',
    'input/prior/swap:codes/train/shard-N-of-N.array_record',
    'damage/extract_codes/swap:codes/train/shard-N-of-N.array_record',
    'damage/sample/swap:samples/default/samples-N-N.npz',
    'damage/reject/swap:rejection/default/scores.npz',
    'damage/evaluate/swap:features/classifier/test/features-N-N.npz',
    'checkpoint/vqvae/flip:vqvae/checkpoints/N/state/d/HASH',
    'checkpoint/prior/delete:prior_LEVEL/checkpoints/N/state/d/HASH',
)


@pytest.mark.system
def test_attacks_end_well(tmp_path_factory):
    out, kinds = tmp_path_factory.mktemp('faults').resolve(), [k for k in attacks.KINDS if k != 'pair']
    rows = suite.run(out, only=SILENT, kinds=kinds) + suite.run(out, limit=10, kinds=kinds)
    bad = [f'{row["outcome"]}: {suite.describe(row)}' for row in rows if row['outcome'] not in trial.GOOD]
    assert not bad, '\n'.join([*suite.table(rows), *bad])
    assert len({row['name'] for row in rows}) == 20


# The shim.

WRITES = """
import ctypes, os, sys, threading
ctypes.CDLL(None).fault_start()
results = []
def attempt(name, function):
    try:
        function()
    except OSError as error:
        results.append(f'{name} {error.errno}')
def change():
    descriptor = os.open('file', os.O_CREAT | os.O_WRONLY)
    for name, function in {
        'write': lambda: os.write(descriptor, b'1'),
        'pwrite': lambda: os.pwrite(descriptor, b'1', 5),
        'writev': lambda: os.writev(descriptor, [b'1', b'2']),
        'fsync': lambda: os.fsync(descriptor),
        'fdatasync': lambda: os.fdatasync(descriptor),
        'rename': lambda: os.rename('file', 'other'),
        'mkdir': lambda: os.mkdir('folder'),
        'unlink': lambda: os.unlink('other' if os.path.exists('other') else 'file'),
    }.items():
        attempt(name, function)
    open('/dev/null', 'w').write('not counted')
thread = threading.Thread(target=attempt, args=('open', change))
thread.start()
thread.join()
print(*results, sep=',')
"""
CALLS = ('open', 'write', 'pwrite', 'writev', 'fsync', 'fdatasync', 'rename', 'mkdir', 'unlink')


def fail_call(tmp_path, at, error=errno.EIO, stays=False):
    """Returns the failures of WRITES, with the state of the shim."""
    if not (tmp_path / 'shim.so').exists():
        assert reference.build_shim(tmp_path)
    folder = tmp_path / f'{at}-{error}'
    folder.mkdir()
    fault = reference.Fault(folder, tmp_path / 'state', at, error, stays)
    environment = os.environ | fault.environment | {'LD_PRELOAD': str(tmp_path / 'shim.so')}
    done = subprocess.run([sys.executable, '-c', WRITES], cwd=folder, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout.strip().split(','), fault


@needs_compiler
def test_the_shim_counts_calls_and_fails_the_one_that_it_is_told(tmp_path):
    failed, fault = fail_call(tmp_path, 0)
    assert failed == [''] and fault.calls == len(CALLS) and fault.failed == ''
    for at, call in enumerate(CALLS, start=1):
        failed, fault = fail_call(tmp_path, at)
        assert failed == [f'{call} {errno.EIO}']
        assert fault.failed.startswith(f'{call} {tmp_path}')


@needs_compiler
def test_a_full_disk_stays_full_but_files_can_be_deleted(tmp_path):
    failed, _ = fail_call(tmp_path, 3, errno.ENOSPC, stays=True)
    assert failed == [f'{call} {errno.ENOSPC}' for call in ('pwrite', 'writev', 'rename', 'mkdir')]
    failed, _ = fail_call(tmp_path, 3, errno.EIO, stays=True)
    assert failed == [f'{call} {errno.EIO}' for call in CALLS[2:]]


# Comparison.


def all_contents(run):
    return compare.contents(pathlib.Path(run.workdir), [name for names in compare.OUTPUTS.values() for name in names])


@pytest.mark.slow
def test_times_do_not_differ_and_values_do(run):
    before = all_contents(run)
    assert 'vqvae/weights' in before and not any('unreadable' in value for value in before.values())
    path = pathlib.Path(run.path('vqvae', 'record.json'))
    path.write_text(json.dumps(json.loads(path.read_text()) | {'seconds': 1e6, 'files': {'name': 'digest'}}))
    log = pathlib.Path(run.path('vqvae', 'metrics.jsonl'))
    log.write_text(''.join(json.dumps(json.loads(line) | {'time': 0.0}) + '\n' for line in log.open()))
    report = pathlib.Path(run.path('report', 'report.json'))
    report.write_text(report.read_text().replace('"seconds": {', '"seconds": {"other": 1.0, '))
    html = pathlib.Path(run.path('report', 'report.html'))
    assert '<td>' in html.read_text()
    pathlib.Path(run.path('vqvae', 'checkpoints', 'new')).write_text('not compared')
    assert compare.differences(all_contents(run), before) == []

    report.write_text(report.read_text().replace('"psnr": ', '"psnr": 9'))
    best = run.path('vqvae', 'weights', json.loads(run.path('vqvae', 'weights', 'best.json').read_text())['directory'])
    shutil.rmtree(best)
    pathlib.Path(run.path('codes', 'train', 'record.json')).unlink()
    pathlib.Path(run.path('samples', 'default', '.samples.npz.1.part')).write_text('')
    assert compare.differences(all_contents(run), before) == [
        'codes/train/record.json is missing',
        'report/report.json differs',
        'vqvae/weights differs',
        'samples/default/.samples.npz.1.part is left over',
    ]


# Damage.


@pytest.mark.parametrize('how', damage.DAMAGES)
def test_every_damage_changes_a_file(tmp_path, how):
    rng = random.Random(how)
    names = ['samples-00-16.npz', 'samples-16-24.npz']
    for _ in range(20):
        for number, name in enumerate(names):
            (tmp_path / name).write_bytes(bytes([number + 1]) * 200)
        before = [(tmp_path / name).read_bytes() for name in names]
        text = damage.damage(tmp_path, names, how, rng)
        after = [(tmp_path / name).read_bytes() if (tmp_path / name).exists() else None for name in names]
        changed = [name for name, a, b in zip(names, before, after, strict=True) if a != b]
        assert changed and all(name in text for name in changed), text
    (tmp_path / names[0]).write_bytes(b'')
    assert damage.damage(tmp_path, names[:1], 'flip', rng) == f'{names[0]} deleted'


def test_kinds_of_files():
    one = 'prior_top/checkpoints/4/state/d/0a1b2c3d4e5f60718293a4b5c6d7e8f9'
    assert damage.kind_of(one) == 'prior_LEVEL/checkpoints/N/state/d/HASH'
    assert damage.kind_of(one) == damage.kind_of(one.replace('top', 'bottom').replace('4', '8', 1))


# Judging.


class Attacked(trial.Trial):
    """A trial whose commands end as given."""

    def __init__(self, tmp_path, later=(), found=()):
        self.workdir, self.job, self._jobs, self._further = tmp_path, 'sample', {'sample'}, []
        self.later, self.found, self.remade = list(later), list(found), []

    def start(self, environment=None, job='', flags=()):
        self.remade += [(job, *flags)] if job else []
        return self

    def end(self, timeout):
        return Ended(0, '', '') if self.remade and not self.later else self.later.pop(0)

    def _differences(self):
        return self.found


WELL = Ended(0, 'sample: 24 samples', '')


@pytest.mark.parametrize(
    'ended, later, found, outcome',
    [
        (WELL, [], [], 'identical'),
        (WELL, [], ['samples/a differs'], 'wrong'),
        (Ended(1, '', 'error: {0}/a is full: make room\n'), [WELL], [], 'refused'),
        (Ended(1, '', 'error: {0}/a is full: make room\n'), [WELL], ['samples/a differs'], 'wrong'),
        (Ended(1, '', 'error: {0}/a is full: make room\n'), [Ended(1, '', 'error: {0}')], [], 'wrong'),
        (Ended(1, '', 'error: {0}/a\nerror: {0}/b\n'), [WELL], [], 'vague'),
        (Ended(1, '', 'error: the disk is full: make room\n'), [WELL], [], 'vague'),
        (Ended(1, '', 'error: {0}/a is full\n'), [WELL], [], 'vague'),
        (Ended(1, '', 'WARNING:absl:a library says more\nerror: {0}/a is full: make room\n'), [WELL], [], 'vague'),
        (Ended(1, '', 'no message'), [WELL], [], 'vague'),
        (Ended(1, '', 'Traceback (most recent call last):\nOSError: x'), [], [], 'traceback'),
        (Ended(-6, '', 'aborted'), [], [], 'traceback'),
        (Ended(None, '', ''), [], [], 'hang'),
    ],
)
def test_failures_are_judged(tmp_path, ended, later, found, outcome):
    ended, *later = [Ended(e.status, e.output, e.errors.format(tmp_path)) for e in (ended, *later)]
    assert Attacked(tmp_path, later, found).settle('a call fails', [ended]).outcome == outcome


@pytest.mark.parametrize('status, outcome', [(-15, 'identical'), (143, 'identical'), (-9, 'traceback'), (1, 'vague')])
def test_a_signal_may_end_a_job_only_as_it_says(tmp_path, status, outcome):
    assert Attacked(tmp_path, [WELL]).settle('TERM', [Ended(status, '', '')], sent=15).outcome == outcome


def test_advice_is_followed(tmp_path):
    shard = tmp_path / 'codes' / 'train' / 'shard'
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b'')
    refusals = [
        Ended(1, '', f'error: {shard} is damaged: delete {shard}, and extract it again\n'),
        Ended(1, '', f'error: {tmp_path}/prior_top has nothing: run your command with --job=prior --level=top\n'),
    ]
    attacked = Attacked(tmp_path, [Ended(0, '', ''), refusals[1], Ended(0, '', ''), WELL])
    assert attacked.settle('cut', refusals[:1], advice=True).outcome == 'refused'
    assert attacked.remade == [('extract_codes',), ('prior', '--level=top')] and not shard.exists()

    vague = Attacked(tmp_path, [])
    assert vague.settle('cut', [Ended(1, '', f'error: {tmp_path}/a is damaged\n')], advice=True).outcome == 'vague'
    looping = Attacked(tmp_path, [e for _ in range(9) for e in (Ended(0, '', ''), refusals[1])])
    assert looping.settle('cut', refusals[1:], advice=True).outcome == 'wrong'


def test_what_was_made_again_is_healed(tmp_path):
    healed = Ended(0, 'sample: file 2 of 2 is damaged, drawn again\n', '')
    result = Attacked(tmp_path).settle('cut', [healed], advice=True)
    assert (result.outcome, result.detail) == ('healed', healed.output.strip())


def test_the_table_counts_by_job_and_by_kind():
    ends = {'kill/sample/KILL-0': 'identical', 'write/sample/3': 'wrong', 'write/vqvae/9': 'hang'}
    rows = [{'name': name, 'outcome': outcome} for name, outcome in ends.items()]
    lines = suite.table(rows)
    assert [line.split('|')[1].strip() for line in lines[2:]] == ['vqvae', 'sample', 'write', 'kill', 'all']
    assert [int(cell) for cell in lines[-1].split('|')[2:-1]] == [3, 1, 0, 0, 0, 0, 1, 1]
