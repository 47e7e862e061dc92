"""Measures times for the benchmarks, compares two checkouts, and describes the machine."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent


def seconds(function, *arguments):
    """Measures the seconds of a call of the compiled function: the best of five, or of fewer if they take over 5 s."""
    compiled = jax.jit(function).lower(*arguments).compile()
    times = []
    while not times or (len(times) < 5 and sum(times) < 5):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - begin)
    return min(times)


def measure_bandwidth():
    """Measures the bytes per second of reading memory: the sum of 512 MiB."""
    x = jnp.ones((2**27,), jnp.float32)
    return x.nbytes / seconds(jnp.sum, x)


def measure_products(dtype=jnp.float32):
    """Measures the FLOP/s of a large matrix product."""
    x = jnp.ones((4096, 4096), dtype)
    return 2 * len(x) ** 3 / seconds(jnp.matmul, x, x)


def serve(run):
    """Calls a function once to compile it, then once for every line of stdin; prints the seconds and CPU seconds."""
    run()
    print('ready', flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter(), time.process_time()
        run()
        print(time.perf_counter() - begin[0], time.process_time() - begin[1], flush=True)


def against(script, other, options, runs=5):
    """Runs a script with the packages of another checkout and of this one, by turns.

    Args:
      script: the path of the script; with these options it calls `serve`.
      other: the root of the other checkout.
      options: arguments of the script.
      runs: number of runs of each.

    Returns:
      The four cells of a table: median seconds of the other checkout and of this one, and the ratios of seconds and of
      CPU seconds.
    """
    with tempfile.TemporaryDirectory() as directory:
        roots = enumerate((pathlib.Path(other).resolve(), ROOT))
        times = run_by_turns([_start(script, root, f'{directory}/{i}', options) for i, root in roots], runs)
    (before, cpu_before), (after, cpu_after) = np.median(times, axis=1)
    return f'{before:.2f}', f'{after:.2f}', f'{after / before:.3f}', f'{cpu_after / cpu_before:.3f}'


AGAINST = '| s, other | s, this | ratio | ratio of CPU seconds |'  # the header of these cells


def _start(script, root, directory, options):
    # This script and this file, with the package of the checkout at `root`; returns when it has compiled.
    os.mkdir(directory)
    os.symlink(root / 'vqvae2_jax', f'{directory}/vqvae2_jax', target_is_directory=True)
    environment = {**os.environ, 'PYTHONPATH': f'{directory}{os.pathsep}{ROOT}'}
    command, pipe = [sys.executable, str(pathlib.Path(script).resolve()), *options], subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    if process.stdout.readline() != 'ready\n':
        raise RuntimeError(f'{command} has failed; its messages are above')
    return process


def run_by_turns(processes, runs):
    """Returns the numbers that every process prints for each of `runs` lines, [processes, runs, numbers]."""
    results = []
    for _ in range(runs):
        results.append([])
        for process in processes:
            print(file=process.stdin, flush=True)
            results[-1].append([float(number) for number in process.stdout.readline().split()])
    for process in processes:
        process.communicate()  # the end of its input ends the process
    return np.swapaxes(results, 0, 1)


def machine():
    """Returns the machine that times were measured on, as text."""
    name = jax.devices()[0].device_kind
    if name != 'cpu':
        return f'{jax.device_count()} x {name}'
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            name = next(iter(re.findall(r'^model name\s*: (.*)', file.read(), re.MULTILINE)), name)
    return f'{len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()} cores of {name}'
