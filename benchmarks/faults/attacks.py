"""The attacks: which there are, and how each is made on a copy of finished directories."""

import contextlib
import dataclasses
import errno
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator

from benchmarks.faults import damage
from benchmarks.faults.reference import JOBS, PAIR_JOBS, TIMEOUT, TRAININGS, Fault, Setup, start_pair
from benchmarks.faults.trial import GOOD, Result, Trial

SIGNALS = {'KILL': signal.SIGKILL, 'TERM': signal.SIGTERM, 'INT': signal.SIGINT, 'HUP': signal.SIGHUP}
_OF_TRAINING = re.compile(r'/checkpoints/|metrics\.jsonl$')  # read only where a training goes on
MAX_WRITES = 200  # failing calls of one job
_KILLS = 5  # of each signal and job
_READERS = {  # jobs whose outputs a job reads
    'extract_codes': ('vqvae',),
    'prior': ('vqvae', 'extract_codes'),
    'sample': ('vqvae', 'prior'),
    'reject': ('classifier', 'sample'),
    'cas': ('vqvae', 'extract_codes', 'sample'),
    'evaluate': ('vqvae', 'extract_codes', 'prior', 'classifier', 'sample', 'reject', 'cas'),
    'inpaint': ('vqvae', 'prior'),
    'likelihood': ('vqvae', 'prior'),
}


@dataclasses.dataclass(frozen=True)
class Attack:
    """One attack. All that is random about it follows from the seed and the name.

    Attributes:
      kind: a key of `KINDS`.
      job: the job that runs.
      what: the part of its name that tells it from others of its kind and job, such as the number of the failing call.
    """

    kind: str
    job: str
    what: str

    @property
    def name(self) -> str:
        return f'{self.kind}/{self.job}/{self.what}'


def plan(setup: Setup, seed: int) -> list[Attack]:
    """Returns all attacks, in an order such that the first n are of as many kinds and jobs as possible."""
    attacks = []
    for kind, (list_attacks, _) in KINDS.items():
        for job in JOBS:
            rng = random.Random(f'{seed}/{kind}/{job}')
            found = [Attack(kind, job, what) for what in list_attacks(setup, job, rng)]
            rng.shuffle(found)
            attacks += [(number, rng.random(), attack) for number, attack in enumerate(found)]
    # First the first of every kind and job, then the second.
    return [attack for *_, attack in sorted(attacks, key=lambda item: item[:2])]


def perform(setup: Setup, attack: Attack, seed: int) -> Result:
    """Makes an attack. Its directory stays, in out/failed, only if it ends worse than 'healed'."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix='attack-', dir=setup.out))
    try:
        result = KINDS[attack.kind][1](setup, attack, random.Random(f'{seed}/{attack.name}'), folder)
        if result.outcome not in GOOD:
            kept = setup.out / 'failed' / attack.name.replace('/', '-')
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(folder, kept, symlinks=True)
        return result
    finally:
        shutil.rmtree(folder)


# Calls that fail.


def _list_writes(setup, job, rng):
    calls = setup.calls[job] if setup.shim.exists() else 0
    return [str(n) for n in sorted(rng.sample(range(1, calls + 1), min(calls, MAX_WRITES)))]


def _fail_write(setup, attack, rng, folder):
    error, stays = rng.choice((errno.ENOSPC, errno.EIO)), rng.random() < 0.25
    trial = Trial(setup, attack.job, setup.before(attack.job), folder)
    fault = Fault(trial.workdir, folder / 'state', int(attack.what), error, stays)
    ended = trial.start(fault.environment).end(TIMEOUT)
    failed = fault.failed.replace(f'{trial.workdir}/', '')
    which = f'call {attack.what}{" and all later ones fail" if stays else " fails"} with {errno.errorcode[error]}'
    return trial.settle(f'{which}: {failed or "never made"}', [ended])


# Signals.


def _list_kills(setup, job, rng):
    return [f'{name}-{number}' for name in SIGNALS for number in range(_KILLS)]


def _kill(setup, attack, rng, folder):
    """Sends a signal at a random moment, or, every second time, just after a random call that changes a file."""
    name, _, number = attack.what.partition('-')
    trial = Trial(setup, attack.job, setup.before(attack.job), folder)
    if int(number) % 2 and setup.shim.exists():
        fault, calls = Fault(trial.workdir, folder / 'state'), rng.randint(1, setup.calls[attack.job])
        command = trial.start(fault.environment)
        while fault.calls < calls and command.running():
            time.sleep(0.001)
        text = f'at call {fault.calls}'
    else:
        delay = rng.uniform(0, setup.seconds[attack.job])
        command = trial.start()
        command.wait(delay)
        text = f'after {delay:.2f} s'
    text = text if command.running() else 'after the end'
    command.send(SIGNALS[name])
    return trial.settle(f'{name} {text}', [command.end(TIMEOUT)], sent=SIGNALS[name])


# Damaged files.


def _list_damages(setup, job, rng):
    """For every kind of file that the job writes: two damages before it runs again."""
    found = damage.files_by_kind(setup.after(job), job)
    return [f'{how}:{kind}' for kind in found for how in rng.sample(damage.DAMAGES, 2) if not _OF_TRAINING.search(kind)]


def _damage_own(setup, attack, rng, folder):
    return _damage(setup, attack, rng, folder, setup.after(attack.job), attack.job)


def _list_inputs(setup, job, rng):
    """For every kind of file that the job may read: one damage before it runs."""
    return [
        f'{rng.choice(damage.DAMAGES)}:{kind}'
        for writer in _READERS.get(job, ())
        for kind in damage.files_by_kind(setup.before(job), writer)
        if '/checkpoints/' not in kind
    ]


def _damage_input(setup, attack, rng, folder):
    before, kind = setup.before(attack.job), attack.what.partition(':')[2]
    writer = next(job for job in _READERS[attack.job] if kind in damage.files_by_kind(before, job))
    return _damage(setup, attack, rng, folder, before, writer)


def _list_checkpoints(setup, job, rng):
    """For every kind of file that a training which was stopped halfway reads: two damages."""
    if job not in TRAININGS:
        return []
    found = damage.files_by_kind(setup.halfway(job), job)
    return [f'{how}:{kind}' for kind in found for how in rng.sample(damage.DAMAGES, 2) if _OF_TRAINING.search(kind)]


def _damage_checkpoint(setup, attack, rng, folder):
    return _damage(setup, attack, rng, folder, setup.halfway(attack.job), attack.job)


def _damage(setup, attack, rng, folder, source, writer):
    how, _, kind = attack.what.partition(':')
    trial = Trial(setup, attack.job, source, folder)
    text = damage.damage(trial.workdir, damage.files_by_kind(trial.workdir, writer)[kind], how, rng)
    if kind.endswith('metrics.jsonl'):  # it grows, so that it has no checksum: damage to it may show in the curves
        trial.exempt = re.compile(r'(^|/)metrics\.jsonl$|^report/(curves\.png|report\.html)$')
    return trial.settle(text, [trial.start().end(TIMEOUT)], advice=True)


# Disks.


def can_mount(out: pathlib.Path) -> bool:
    """Returns whether file systems may be mounted below `out`."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=out))
    try:
        with _mounted(folder, 'size=64k'):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        folder.rmdir()


@contextlib.contextmanager
def _mounted(folder: pathlib.Path, options: str) -> Iterator[None]:
    """Mounts a file system in memory on a folder."""
    subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(['umount', '--lazy', folder], check=True, capture_output=True)


def _remount(folder, options):
    subprocess.run(['mount', '-o', f'remount,{options}', folder], check=True, capture_output=True)


def _list_full(setup, job, rng):
    return [str(number) for number in range(4)] if can_mount(setup.out) else []


def _fill(setup, attack, rng, folder):
    small, large = (_size(directory) for directory in (setup.before(attack.job), setup.after(attack.job)))
    size = int(small + rng.random() * (large - small)) // 4096 * 4096
    disk = folder / 'disk'
    disk.mkdir()
    with _mounted(disk, 'size=1g'):
        trial = Trial(setup, attack.job, setup.before(attack.job), disk)
        _remount(disk, f'size={size}')
        trial.folder = folder  # what commands print goes elsewhere
        ended = trial.start().end(TIMEOUT)
        _remount(disk, 'size=1g')
        return trial.settle(f'a disk with room for {size - small} of {large - small} bytes', [ended])


def _size(directory):
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in directory.rglob('*') if path.is_file()) + 4096


def _list_read_only(setup, job, rng):
    return ['unfinished', 'finished'] if can_mount(setup.out) else []


def _read_only(setup, attack, rng, folder):
    source = setup.before(attack.job) if attack.what == 'unfinished' else setup.after(attack.job)
    disk = folder / 'disk'
    disk.mkdir()
    with _mounted(disk, 'size=1g'):
        trial = Trial(setup, attack.job, source, disk)
        trial.folder = folder
        _remount(disk, 'ro')
        ended = trial.start().end(TIMEOUT)
        _remount(disk, 'rw')
        return trial.settle(f'{attack.what} outputs on a read-only disk', [ended])


# Several processes.


def _list_twice(setup, job, rng):
    return [str(number) for number in range(4)]


def _run_twice(setup, attack, rng, folder):
    delay = rng.choice((0, rng.uniform(0, setup.seconds[attack.job])))
    trial = Trial(setup, attack.job, setup.before(attack.job), folder)
    first = trial.start()
    first.wait(delay)
    second = trial.start()
    return trial.settle(f'two runs, the second {delay:.2f} s later', [second.end(TIMEOUT), first.end(TIMEOUT)])


def _list_pairs(setup, job, rng):
    return ['0', '1'] * (job in PAIR_JOBS and bool(setup.pair_contents))


def _kill_one_of_two(setup, attack, rng, folder):
    delay = rng.uniform(0, setup.seconds[f'pair {attack.job}'])
    pair = dataclasses.replace(setup, contents=setup.pair_contents)
    trial = Trial(pair, attack.job, setup.pair_before(attack.job), folder)
    commands = start_pair(setup, trial.workdir, attack.job, folder / 'attacked')
    commands[0].wait(delay)
    killed = int(attack.what)
    commands[killed].send(signal.SIGKILL)
    survivor = commands[1 - killed].end(TIMEOUT)
    commands[killed].end(TIMEOUT)
    text = f'process {killed} of two killed after {delay:.2f} s'
    if survivor.status is None or 'Traceback (most recent call last)' in survivor.errors:
        return trial.settle(text, [survivor])
    again = [command.end(TIMEOUT) for command in start_pair(setup, trial.workdir, attack.job, folder / 'again')]
    return trial.settle(text, again)


KINDS = {
    'write': (_list_writes, _fail_write),
    'kill': (_list_kills, _kill),
    'damage': (_list_damages, _damage_own),
    'input': (_list_inputs, _damage_input),
    'checkpoint': (_list_checkpoints, _damage_checkpoint),
    'full': (_list_full, _fill),
    'read-only': (_list_read_only, _read_only),
    'twice': (_list_twice, _run_twice),
    'pair': (_list_pairs, _kill_one_of_two),
}


def unmount_all(out: pathlib.Path) -> None:
    """Unmounts what a killed suite has left mounted below `out`."""
    for line in pathlib.Path('/proc/mounts').read_text().splitlines():
        target = line.split()[1]
        if target.startswith(f'{os.path.realpath(out)}/'):
            subprocess.run(['umount', '--lazy', target], check=False)
