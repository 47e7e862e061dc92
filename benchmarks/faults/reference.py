"""The undisturbed run: the workdir before every job, the time and the calls of the job, and its files."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
from PIL import Image

import vqvae2_jax
from benchmarks.faults.compare import OUTPUTS, contents
from benchmarks.faults.process import Command, Ended
from vqvae2_jax.data.fashion import CLASS_NAMES, FashionDataset

JOBS = tuple(OUTPUTS)
PAIR_JOBS = ('vqvae', 'extract_codes', 'prior')  # run by two processes too
# Jobs that train: section of the config and directory of the training that is stopped halfway.
TRAININGS = {
    'vqvae': ('vqvae', 'vqvae'),
    'prior': ('prior.top', 'prior_top'),
    'classifier': ('classifier', 'classifier'),
    'cas': ('classifier', 'cas/reconstructions'),
}
TIMEOUT = 180  # seconds; an undisturbed job takes 2 to 10
_IMAGES = 480
_STATE = 16, 16 + 4096  # where the failed call is in `struct state` of shim.c


@dataclasses.dataclass
class Setup:
    """The directory of the suite, with all that attacks start from.

    Attributes:
      out: the directory.
      seconds: time of every undisturbed job.
      calls: number of calls that the shim counts in every job; {} without a shim.
      contents: digest of every file that the finished pipeline leaves (`compare.contents`).
      pair_contents: the same of the jobs that two processes run together; {} if there are none.
      code: digest of the package that made all this.
    """

    out: pathlib.Path
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    calls: dict[str, int] = dataclasses.field(default_factory=dict)
    contents: dict[str, str] = dataclasses.field(default_factory=dict)
    pair_contents: dict[str, str] = dataclasses.field(default_factory=dict)
    code: str = ''

    def before(self, job: str) -> pathlib.Path:
        """Returns the finished directories before a job."""
        return self.out / 'states' / f'before-{job}'

    def after(self, job: str) -> pathlib.Path:
        """Returns the finished directories after a job."""
        return (*map(self.before, JOBS), self.out / 'states' / 'finished')[JOBS.index(job) + 1]

    def halfway(self, job: str) -> pathlib.Path:
        """Returns the directories of a job whose training has two checkpoints and is not finished."""
        return self.out / 'states' / f'halfway-{job}'

    def pair_before(self, job: str) -> pathlib.Path:
        """Returns the finished directories before a job of two processes."""
        return self.out / 'states' / f'pair-before-{job}'

    @property
    def shim(self) -> pathlib.Path:
        """The library that makes calls fail; there is none without a C compiler."""
        return self.out / 'shim.so'

    def command(self, workdir: pathlib.Path, job: str, *flags: str) -> list[str]:
        """Returns the arguments of a job: configs/tiny.py on a few images."""
        data = {'name': 'npz', 'path': self.out / 'images.npz', 'held_out': (0.2, 0.2)}
        fields = {f'data.{name}': value for name, value in data.items()}
        fields |= {'codes.batch_size': 32, 'codes.shard_size': 100, 'evaluate.cas': True}
        fields |= {'inpaint.path': self.out / 'image.png', 'inpaint.label': 3}
        arguments = ['--config=tiny', f'--workdir={workdir}', f'--job={job}']
        return [*arguments, *(f'--config.{name}={value}' for name, value in fields.items()), *flags]


def prepare(out: pathlib.Path, pairs: bool) -> Setup:
    """Makes the undisturbed runs in `out`, or reads what an earlier call made.

    Args:
      out: the directory.
      pairs: whether two processes together make one too.
    """
    setup, path = Setup(out), out / 'setup.json'
    if path.exists():
        setup = Setup(out, **json.loads(path.read_text()))
        if setup.code != _code():
            raise SystemExit(f'error: the runs in {out} were made by other code: give another --out, or delete it')
    else:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out / 'states', ignore_errors=True)
        write_images(out)
        setup.code = _code()
        _run_all(setup)
        _save(setup, path)
    if pairs and not setup.pair_contents:
        _run_pairs(setup)
        _save(setup, path)
    return setup


def _code():
    root, sha = pathlib.Path(vqvae2_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob('*.py')):
        sha.update(f'{path.relative_to(root)}\n'.encode() + path.read_bytes())
    return sha.hexdigest()


def _save(setup, path):
    path.write_text(json.dumps({k: v for k, v in dataclasses.asdict(setup).items() if k != 'out'}))


def build_shim(out: pathlib.Path) -> bool:
    """Compiles shim.c to out/shim.so; returns whether there is a compiler."""
    compiler = shutil.which('cc')
    if compiler:
        out.mkdir(parents=True, exist_ok=True)
        source = pathlib.Path(__file__).with_name('shim.c')
        subprocess.run([compiler, '-shared', '-fPIC', '-O2', '-o', out / 'shim.so', source, '-ldl'], check=True)
    return bool(compiler)


def write_images(out: pathlib.Path) -> None:
    """Writes images.npz, and image.png for inpainting."""
    dataset = FashionDataset(len(CLASS_NAMES))
    examples = [dataset.read(i, 1) for i in range(0, len(dataset), len(dataset) // _IMAGES)][:_IMAGES]
    pixels = np.stack([np.asarray(image) for image, _ in examples])[..., None]
    label = np.array([label for _, label in examples])
    np.savez(out / 'images.npz', arr_0=pixels, label=label, class_names=np.array(CLASS_NAMES))
    Image.fromarray(pixels[0, ..., 0]).save(out / 'image.png')


class Fault:
    """The environment that makes the shim count, and fail, the calls of a command."""

    def __init__(self, directory: pathlib.Path, state: pathlib.Path, at: int = 0, error: int = 0, stays: bool = False):
        """Arguments as the variables of shim.c; the state is a file to make."""
        state.write_bytes(bytes(_STATE[1]))
        self._state = state
        self.environment = {'FAULT_DIR': os.path.realpath(directory), 'FAULT_STATE': str(state)}
        self.environment |= {'FAULT_AT': str(at), 'FAULT_ERRNO': str(error), 'FAULT_STAYS': str(int(stays))}

    @property
    def calls(self) -> int:
        return int.from_bytes(self._state.read_bytes()[:8], 'little')

    @property
    def failed(self) -> str:
        """The first call that failed, such as 'write /path'; '': none did."""
        return self._state.read_bytes()[slice(*_STATE)].rstrip(b'\0').decode(errors='replace')


def _run_all(setup):
    """Runs every job twice, so that the second time, which counts, compiles nothing; stops the trainings halfway."""
    log = setup.out / 'log'
    for time_is_right in (False, True):
        workdir = setup.out / 'states' / 'finished'
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.mkdir(parents=True)
        for job in JOBS:
            shutil.rmtree(setup.before(job), ignore_errors=True)
            shutil.copytree(workdir, setup.before(job))
            fault = Fault(workdir, setup.out / 'state')
            begin = time.monotonic()
            ended = Command(setup.command(workdir, job), log / job, fault.environment).end(TIMEOUT)
            setup.seconds[job] = round(time.monotonic() - begin, 2)
            setup.calls[job] = fault.calls
            _check(ended, job)
            if time_is_right:
                print(f'{job}: {setup.seconds[job]:.1f} s, {setup.calls[job]} calls', flush=True)
    setup.contents = contents(workdir, sum(OUTPUTS.values(), ()))
    for job in TRAININGS:
        _stop_halfway(setup, job)


def _stop_halfway(setup, job):
    section, directory = TRAININGS[job]
    saves = [f'--config.{section}.training.save_every=1']  # saving often changes no result
    for _ in range(10):
        shutil.rmtree(setup.halfway(job), ignore_errors=True)
        shutil.copytree(setup.before(job), setup.halfway(job))
        checkpoints = setup.halfway(job) / directory / 'checkpoints'
        command = Command(setup.command(setup.halfway(job), job, *saves), setup.out / 'log' / f'halfway-{job}')
        while command.running() and not (checkpoints / '2').exists():
            time.sleep(0.002)
        command.send(signal.SIGTERM)
        command.end(TIMEOUT)
        record = setup.halfway(job) / directory / 'record.json'
        saved = [path for path in checkpoints.glob('*') if path.name.isdigit()]
        if len(saved) == 2 and json.loads(record.read_text())['state'] == 'started':
            return
    raise RuntimeError(f'{job}: not stopped halfway in 10 attempts; see {setup.out}/log/halfway-{job}.err')


def start_pair(setup: Setup, workdir: pathlib.Path, job: str, log: pathlib.Path) -> list[Command]:
    """Starts a job in two processes that work as one."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    environment = {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': '2'}
    arguments = setup.command(workdir, job, '--distributed')
    return [
        Command(arguments, log.with_name(f'{log.name}-{rank}'), environment | {'JAX_PROCESS_ID': str(rank)})
        for rank in range(2)
    ]


def _run_pairs(setup):
    workdir = setup.out / 'states' / 'pair-finished'
    for _ in range(2):
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.mkdir(parents=True)
        for job in PAIR_JOBS:
            shutil.rmtree(setup.pair_before(job), ignore_errors=True)
            shutil.copytree(workdir, setup.pair_before(job))
            begin = time.monotonic()
            for command in start_pair(setup, workdir, job, setup.out / 'log' / f'pair-{job}'):
                _check(command.end(TIMEOUT), f'{job} of two processes')
            setup.seconds[f'pair {job}'] = round(time.monotonic() - begin, 2)
    setup.pair_contents = contents(workdir, [name for job in PAIR_JOBS for name in OUTPUTS[job]])


def _check(ended: Ended, name: str) -> None:
    if ended.status != 0:
        raise RuntimeError(f'the undisturbed {name} ended with {ended.status}:\n{ended.output}\n{ended.errors}')
