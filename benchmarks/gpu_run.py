"""The first run on a GPU: results against a CPU, measured against modeled times, and flags of XLA, in one JSON file.

  benchmarks/run_gpu.sh [OUT]              # one GPU, at most 10 minutes; OUT is runs/gpu-run.json if not given
  benchmarks/run_gpu.sh --rehearse [OUT]   # the same on a CPU with small sizes: no modeled times, no flags

The parts run one after another, each in a process of its own with a time limit. OUT is written after every check. The
exit status is 0 if all checks ran and passed. The line of a check has both sides and the limit.

  device      the GPU, and the versions of JAX and CUDA
  reference   trains the tiny pipeline (configs/tiny.py) on the CPU, and saves the numbers to compare with
  pipeline    the same weights and data on the GPU: codes, NLL, losses of training steps, samplers
  kernels     the lookup and cuDNN's attention against plain JAX, at the sizes of the ImageNet model
  programs    measured against modeled time of the programs of the ImageNet model but the classifier, at the batch of
              one GPU; samplers with 5 blocks, which compile in time
  flags       sampling with and without CUDA graphs (command buffers) of loops
"""

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback

from vqvae2_jax import xla_flags
from vqvae2_jax.io import files

TOTAL = 590  # seconds
REHEARSAL = 3  # times as long may a rehearsal take, since CPUs are slow
DEVICE = 'device'
PARTS = {  # seconds at most, and the function that returns the checks
    DEVICE: (60, 'gpu_times.device_checks'),
    'reference': (200, 'gpu_checks.reference_checks'),
    'pipeline': (90, 'gpu_checks.pipeline_checks'),
    'kernels': (60, 'gpu_checks.kernel_checks'),
    'programs': (330, 'gpu_times.program_checks'),
    'flags': (150, 'gpu_times.flag_checks'),
}
DONE = 'done'


def run_checks(checks, emit):
    """Runs checks one after another, and emits the names of all and every result, as dicts.

    Args:
      checks: pairs (name, function); the function returns a dict with `passed` and `text`.
      emit: a function of a dict.
    """
    emit({'planned': [name for name, _ in checks]})
    for name, check in checks:
        begin = time.monotonic()
        try:
            found = check()
        except Exception as error:  # noqa: BLE001 whatever a check raises, the others are still worth their time
            traceback.print_exc()
            found = {'passed': False, 'text': f'{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}'}
        emit({'name': name, **found, 'check_seconds': time.monotonic() - begin})


def run_part(command, limit, environment, report):
    """Runs the process of a part.

    Args:
      command: it prints the dicts of `run_checks`, as lines of JSON.
      limit: seconds after which the process is killed.
      environment: its environment variables.
      report: a function of a finished check, a dict.

    Returns:
      The entry of the part: 'state' ('done', or how it ended), 'seconds', 'not_run' (names of checks) and 'checks'.
    """
    begin, planned, checks, stopped = time.monotonic(), [], {}, threading.Event()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def stop():
        stopped.set()
        process.kill()

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        for line in process.stdout:
            if not line.endswith('\n'):
                break  # the process was killed while it wrote
            found = json.loads(line, parse_constant=str)  # a JSON file has no NaN
            planned += found.pop('planned', [])
            if found:
                checks[found['name']] = found
                report(found)
        process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    state = f'ended with exit status {process.returncode}' if process.returncode else DONE
    return {
        'state': f'cut off after {limit:.0f} s' if stopped.is_set() else state,
        'seconds': time.monotonic() - begin,
        'not_run': [name for name in planned if name not in checks],
        'checks': checks,
    }


def failures(parts):
    """Yields a line for every part that was stopped and for every check that did not pass."""
    for part, found in parts.items():
        if found['state'] != DONE:
            yield f'{part}: {found["state"]}; not checked: {", ".join(found["not_run"]) or "all of it"}'
        for name, check in found['checks'].items():
            if not check['passed']:
                yield f'{part}, {name}: {check["text"]}'


def environment_of(part, rehearse):
    """Returns the environment variables of the process of a part: one device, which JAX may fill."""
    gpu = os.environ.get('CUDA_VISIBLE_DEVICES', '0').partition(',')[0]
    found = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.9', **os.environ, 'CUDA_VISIBLE_DEVICES': gpu}
    on_cpu = rehearse or part == 'reference'
    return found | {'JAX_NUM_CPU_DEVICES': '1'} | ({'JAX_PLATFORMS': 'cpu'} if on_cpu else {})


def run_all(out, rehearse):
    """Runs all parts, and writes the file after every check; returns whether all checks ran and passed."""
    begin, parts, scale = time.monotonic(), {}, REHEARSAL if rehearse else 1
    found = {'date': str(datetime.date.today()), 'rehearsal': rehearse, 'passed': False, 'parts': parts}

    def write():  # after every check, so that an interruption loses nothing
        found['seconds'] = time.monotonic() - begin
        files.write_json(out, found)

    with tempfile.TemporaryDirectory() as directory:
        for part, (limit, _) in PARTS.items():
            limit = min(scale * limit, scale * TOTAL - (time.monotonic() - begin))
            if limit <= 0:
                parts[part] = {'state': f'not started, {scale * TOTAL} s are over', 'not_run': [], 'checks': {}}
                continue
            command = [sys.executable, '-m', 'benchmarks.gpu_run', '--part', part, '--directory', directory]
            command += ['--rehearse'] if rehearse else []
            parts[part] = {'state': 'running', 'not_run': [], 'checks': {}}

            def report(check, part=part):
                if part == DEVICE and not check['passed']:
                    sys.exit(f'error: {check["text"]}')
                print(
                    f'[{"passed" if check["passed"] else "FAILED"}] {part}, {check["name"]}: {check["text"]}',
                    flush=True,
                )
                parts[part]['checks'][check['name']] = check
                write()

            parts[part] = run_part(command, limit, environment_of(part, rehearse), report)
            write()
    found['passed'] = not (lines := list(failures(parts)))
    write()
    for line in lines:
        print(f'failed: {line}')
    print(f'{"all checks passed" if found["passed"] else f"{len(lines)} failures"}; {found["seconds"]:.0f} s; {out}')
    return found['passed']


def _serve(options):
    """Runs the checks of a part in this process; results go to stdout, and lines of jobs to stderr."""
    results = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    xla_flags.set_cpu_flags()  # before JAX starts
    module, _, function = PARTS[options.part][1].partition('.')
    checks = getattr(importlib.import_module(f'benchmarks.{module}'), function)(options.directory, options.rehearse)
    run_checks(checks, lambda found: print(json.dumps(found), file=results, flush=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', nargs='?', default='runs/gpu-run.json')
    parser.add_argument('--rehearse', action='store_true', help='on a CPU, with small sizes')
    parser.add_argument('--part', choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument('--directory', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        _serve(options)
    else:
        sys.exit(not run_all(options.out, options.rehearse))


if __name__ == '__main__':
    main()
