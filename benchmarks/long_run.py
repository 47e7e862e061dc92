"""Memory, descriptors and threads over a long training and a long sampling, for docs/reliability.md. Linux only.

python -m benchmarks.long_run --out=/tmp/long_run                               # 100 000 steps, 20 000 samples
python -m benchmarks.long_run --out=/tmp/long_run --steps=2000 --samples=500    # a trial of minutes

Stage 1 of configs/tiny.py trains, then the whole model samples. Of each process, memory, open descriptors and threads
are measured every second, and the sizes of its directories. At the end they must be within 2 % of those after the first
tenth. The same command continues after a stop; the process that did the most counts. The plot goes to --plot.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable

import matplotlib.figure
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
TOLERANCE = 0.02
MEASURES = {'memory': 'resident memory, MB', 'descriptors': 'open descriptors', 'threads': 'threads'}
_START, _END = (0.1, 0.2), (0.9, 1.0)  # of the work of a process; their medians are compared
_LINE_BYTES = 2500  # of metrics.jsonl and of event files, at most, for every line of the log
_LOGS, _SAVES, _PICTURES = 1000, 100, 10  # in the whole training


@dataclasses.dataclass(frozen=True)
class Phase:
    """A measured job.

    Attributes:
      job: the value of --job.
      total: steps or samples.
      flags: of the job.
      directory: below the workdir, that the job writes.
    """

    job: str
    total: int
    flags: tuple[str, ...]
    directory: str

    def progress(self, workdir: pathlib.Path) -> int:
        """Returns the number of steps or samples done, as the files show it."""
        if self.job == 'sample':
            stops = [int(path.stem.rpartition('-')[2]) for path in (workdir / self.directory).glob('samples-*.npz')]
            return max(stops, default=0)
        log = workdir / self.directory / 'metrics.jsonl'
        lines = log.read_bytes().splitlines() if log.exists() else []
        return max((json.loads(line)['step'] for line in lines[-3:] if line.endswith(b'}')), default=0)


def phases(steps: int, samples: int) -> list[Phase]:
    """Returns the measured jobs of a run."""
    every = {'log': _LOGS, 'eval': _SAVES, 'save': _SAVES, 'image': _PICTURES}
    training = {f'{name}_every': max(1, steps // times) for name, times in every.items()} | {'steps': steps}
    flags = [f'--config.vqvae.training.{name}={value}' for name, value in training.items()]
    sampling = {'count': samples} | dict.fromkeys(('batch_size', 'shard_size'), max(1, samples // 100))
    sample_flags = tuple(f'--config.sample.{name}={value}' for name, value in sampling.items())
    flags += ['--config.vqvae.training.batch_size=8']
    return [
        Phase('vqvae', steps, tuple(flags), 'vqvae'),
        Phase('sample', samples, (*flags, *sample_flags), 'samples/default'),
    ]


def measure(pid: int) -> dict[str, float]:
    """Returns memory (MB), open descriptors and threads of a process.

    Raises:
      OSError: the process has ended.
    """
    pages = int(pathlib.Path(f'/proc/{pid}/statm').read_text().split()[1])
    return {
        'memory': pages * os.sysconf('SC_PAGE_SIZE') / 2**20,
        'descriptors': len(os.listdir(f'/proc/{pid}/fd')),
        'threads': len(os.listdir(f'/proc/{pid}/task')),
    }


def directories(directory: pathlib.Path) -> dict[str, int]:
    """Returns the bytes of logs, and files and bytes of train states and weights, below a training's directory."""
    sizes = {'log_bytes': 0, 'saved_files': 0, 'saved_bytes': 0}
    for folder, _, names in os.walk(directory):
        saved = {'checkpoints', 'weights'} & set(pathlib.Path(folder).relative_to(directory).parts)
        for name in names:
            try:
                size = os.path.getsize(os.path.join(folder, name))
            except FileNotFoundError:  # a checkpoint that is just being replaced
                continue
            if saved:
                sizes['saved_files'], sizes['saved_bytes'] = sizes['saved_files'] + 1, sizes['saved_bytes'] + size
            elif 'metrics' in name or 'events' in name:
                sizes['log_bytes'] += size
    return sizes


def run_phase(phase: Phase, out: pathlib.Path, interval: float) -> None:
    """Runs or continues a job, and appends measurements to out/measurements.jsonl."""
    workdir = out / 'run'
    with (out / 'output.txt').open('a') as output, (out / 'measurements.jsonl').open('a') as file:
        process = subprocess.Popen(_command(workdir, phase.job, phase.flags), stdout=output, stderr=output, cwd=ROOT)
        while process.poll() is None:
            time.sleep(interval)
            try:
                row = {'phase': phase.job, 'pid': process.pid, 'time': time.time(), 'done': phase.progress(workdir)}
                row |= measure(process.pid) | directories(workdir / phase.directory)
            except OSError:  # it ends, or replaces a file
                continue
            if not row['descriptors']:  # it has ended
                continue
            file.write(json.dumps(row) + '\n')
            file.flush()
    if process.returncode:
        raise SystemExit(f'--job={phase.job} ended with {process.returncode}: see {out / "output.txt"}')


def _command(workdir, job, flags):
    return [sys.executable, '-m', 'vqvae2_jax.main', '--config=tiny', f'--workdir={workdir}', f'--job={job}', *flags]


def judge(rows: list[dict], phase: Phase) -> dict[str, tuple[float, float]]:
    """Returns every measure after the first tenth and at the end of the work of the process that did the most.

    Raises:
      ValueError: there are too few measurements.
    """
    by_process = {}
    for row in rows:
        if row['phase'] == phase.job:
            by_process.setdefault(row['pid'], []).append(row)
    work = max(by_process.values(), key=lambda part: part[-1]['done'] - part[0]['done'], default=[])
    if not work or work[-1]['done'] == work[0]['done']:
        raise ValueError(f'{phase.job}: no progress was measured')
    first, last = work[0]['done'], work[-1]['done']
    share = np.array([(row['done'] - first) / (last - first) for row in work])
    windows = [[row for row, x in zip(work, share, strict=True) if low <= x <= high] for low, high in (_START, _END)]
    if not all(windows):
        raise ValueError(f'{phase.job}: {len(work)} measurements are too few; run longer')
    names = (*MEASURES, 'saved_files', 'saved_bytes', 'log_bytes')
    return {name: tuple(float(np.median([row[name] for row in window])) for window in windows) for name in names}


def failures(found: dict[str, tuple[float, float]], phase: Phase) -> list[str]:
    """Returns what grew by more than the tolerance, as text; [] if nothing did."""
    names = [*MEASURES, *(['saved_files', 'saved_bytes'] if phase.job == 'vqvae' else [])]
    texts = [
        f'{phase.job}: {name} {before:.1f} after the first tenth, {after:.1f} at the end'
        for name in names
        for before, after in [found[name]]
        if after > before * (1 + TOLERANCE)
    ]
    limit = _LINE_BYTES * (_LOGS + _SAVES)
    if found['log_bytes'][1] > limit:
        texts.append(f'{phase.job}: logs of {found["log_bytes"][1]:.0f} bytes, more than {limit}')
    return texts


def table(results: Iterable[tuple[Phase, dict[str, tuple[float, float]]]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    lines = ['| | after the first tenth | at the end | change |', '|---|---|---|---|']
    for phase, found in results:
        unit = 'steps' if phase.job == 'vqvae' else 'samples'
        for name, text in MEASURES.items():
            before, after = found[name]
            change = f'{100 * (after / before - 1):+.1f} %'
            lines.append(f'| {phase.total:,} {unit}: {text} | {before:.0f} | {after:.0f} | {change} |')
    return lines


def plot(rows: list[dict], jobs: Iterable[str], path: pathlib.Path) -> None:
    """Draws all measures over the work of every job."""
    jobs = list(jobs)
    figure = matplotlib.figure.Figure(figsize=(4.5 * len(jobs), 5.5), layout='constrained')
    axes = figure.subplots(len(MEASURES), len(jobs), sharex='col', squeeze=False)
    for column, job in enumerate(jobs):
        part = [row for row in rows if row['phase'] == job]
        for axis, (name, text) in zip(axes[:, column], MEASURES.items(), strict=True):
            axis.plot([row['done'] for row in part], [row[name] for row in part], '.', markersize=2)
            axis.set(ylabel=text, ylim=(0, None))
        axes[-1, column].set_xlabel('steps' if job == 'vqvae' else 'samples')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=pathlib.Path, required=True, help='directory of the run and the measurements')
    parser.add_argument('--steps', type=int, default=100_000, help='of stage 1')
    parser.add_argument('--samples', type=int, default=20_000)
    parser.add_argument('--interval', type=float, default=1.0, help='seconds between measurements')
    parser.add_argument('--plot', type=pathlib.Path, help='the PNG file; OUT/long_run.png if not given')
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    training, sampling = phases(arguments.steps, arguments.samples)
    run_phase(training, out, arguments.interval)
    for job in ('extract_codes', 'prior'):
        with (out / 'output.txt').open('a') as output:
            command = _command(out / 'run', job, training.flags)
            subprocess.run(command, check=True, stdout=output, stderr=output, cwd=ROOT)
    run_phase(sampling, out, arguments.interval)
    rows = [json.loads(line) for line in (out / 'measurements.jsonl').read_text().splitlines()]
    try:
        results = [(phase, judge(rows, phase)) for phase in (training, sampling)]
    except ValueError as error:
        raise SystemExit(f'error: {error}') from error
    plot(rows, [phase.job for phase, _ in results], arguments.plot or out / 'long_run.png')
    print('\n'.join(table(results)))
    if bad := [text for phase, found in results for text in failures(found, phase)]:
        raise SystemExit('error: ' + '; '.join(bad))


if __name__ == '__main__':
    main()
