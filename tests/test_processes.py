"""Processes work as one: the same weights, codes and samples; all stop together, and none waits for a dead one."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from tests.fake_gcs import serve
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.codes import CodeSource
from vqvae2_jax.io import record
from vqvae2_jax.io.logging import RUNTIME_FIELDS, read_metrics
from vqvae2_jax.training.checkpoint import BestCheckpoint

pytestmark = pytest.mark.system
DEVICES = 4  # of all processes together
# vqvae2_jax.main, but dead processes are noticed after 20 seconds, not after JAX's 100.
MAIN = """
import functools, os, runpy, jax, numpy as np
from jax.experimental import mesh_utils
jax.distributed.initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=20)
if 'INTERLEAVED' in os.environ:  # as in TPU slices, neighbors in the mesh belong to two processes
    mesh_utils.create_device_mesh = lambda shape, devices, **_: np.array(devices).reshape(2, -1).T.reshape(shape)
runpy.run_module('vqvae2_jax.main', run_name='__main__', alter_sys=True)
"""
SHORT = (  # the last batch of each evaluation is not full
    '--config.data.held_out=(0.9,0.06)',
    '--config.codes.shard_size=3000',
    '--config.evaluate.cas=False',
    *(f'--config.{name}.training.eval_examples=60' for name in ('vqvae', 'prior.top', 'prior.bottom', 'classifier')),
)
LONG = ('--job=vqvae', '--config.vqvae.training.steps=100000', '--config.vqvae.training.save_every=4')


def start(workdir, count, *flags, devices=None, bucket=None):
    """main.py in `count` processes on configs/tiny.py; with a bucket, `workdir` holds only what they print."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    command = [sys.executable, '-c', MAIN, '--config=configs/tiny.py', f'--workdir={bucket or workdir}', *flags]
    environment = os.environ | {'JAX_NUM_CPU_DEVICES': str(devices or DEVICES // count)}
    if count > 1:
        command.append('--distributed')
        environment |= {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(count)}
        environment |= {'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo'}
    workdir.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(count):
        with (workdir / f'output-{rank}.txt').open('w') as output:
            ranked = environment | {'JAX_PROCESS_ID': str(rank)}
            started.append(subprocess.Popen(command, env=ranked, stdout=output, stderr=subprocess.STDOUT))
    return started


def end(processes, timeout=1200):
    """Their exit codes; none outlives the test."""
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def output(workdir, rank=0):
    return (workdir / f'output-{rank}.txt').read_text()


def wait_for_checkpoint(workdir, processes, after=0):
    """Until one beyond step `after` is whole."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        found = [int(path.name) for path in (workdir / 'vqvae' / 'checkpoints').glob('*') if path.name.isdigit()]
        if max(found, default=0) > after:
            return max(found)
        time.sleep(0.2)
    raise AssertionError(output(workdir) + output(workdir, 1))


def codes(workdir, split):
    source = CodeSource(workdir / 'codes' / split)
    examples = [source[i] for i in range(len(source))]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def assert_equal(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_two_processes_do_every_job_as_one(tmp_path):
    one, two = tmp_path / 'one', tmp_path / 'two'
    assert end(start(two, 2, *SHORT)) == [0, 0], output(two) + output(two, 1)
    assert 'vqvae' not in output(two, 1)  # only the main process prints
    for name in ('vqvae', 'prior_top', 'prior_bottom'):
        assert list((two / name / 'pictures').glob('*.png')), name  # made by one process during training
    assert end(start(one, 1, *SHORT, '--job=vqvae')) == [0], output(one)

    # Sums over the batch are rounded in another order. (Adam makes steps of gradients that are but rounding: with other
    # seeds or images more differs.)
    first, second = BestCheckpoint(epath.Path(one / 'vqvae')).load(), BestCheckpoint(epath.Path(two / 'vqvae')).load()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), first, second)
    logs = [read_metrics(workdir / 'vqvae') for workdir in (one, two)]
    assert [line['step'] for line in logs[0]] == [line['step'] for line in logs[1]]
    for a, b in zip(*logs, strict=True):
        for name in a.keys() - {'step', *RUNTIME_FIELDS}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name

    # The same weights give bit-identical codes and samples, even after a stop and with another number of processes.
    again = tmp_path / 'again'
    shutil.copytree(two, again, ignore=shutil.ignore_patterns('codes', 'samples', 'rejection', 'features', 'report'))
    processes = start(again, 2, *SHORT, '--job=extract_codes')
    while not list(again.glob('codes/*/shard-*')) and processes[0].poll() is None:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    assert end(processes, 100) == [128 + signal.SIGTERM] * 2, output(again) + output(again, 1)
    assert record.read(again / 'codes' / 'test') is None
    for job in ('extract_codes', 'sample'):
        assert end(start(again, 1, *SHORT, f'--job={job}')) == [0], output(again)
    assert len(list((two / 'codes' / 'validation').glob('shard-*'))) == 3
    for split in ('train', 'validation', 'test'):
        assert_equal(codes(again, split), codes(two, split))
    index = np.arange(24)
    assert_equal(*[sample_store.take(epath.Path(workdir / 'samples' / 'default'), index) for workdir in (again, two)])
    assert (two / 'report' / 'report.html').exists()
    assert_other_jobs_are_equal(again, two)
    failing = start(two, 2, *SHORT, '--job=evaluate', '--config.evaluate.inception=nowhere.npz')
    assert end(failing, 100) == [1, 1] and 'nowhere.npz' in output(two)


def assert_other_jobs_are_equal(one, two):
    image = two / 'samples' / 'default' / 'samples.png'
    flags = (f'--config.inpaint.path={image}', '--config.inpaint.label=3', '--config.inpaint.count=3')
    for job in ('inpaint', 'likelihood'):
        for workdir, count in ((one, 1), (two, 2)):
            assert end(start(workdir, count, *SHORT, *flags, f'--job={job}')) == [0] * count, output(workdir)
    assert_equal(
        *[sample_store.read_npz(epath.Path(workdir / 'inpaint' / '0000-samples.npz')) for workdir in (one, two)]
    )
    bits = []
    for workdir in (one, two):
        with (workdir / 'likelihood' / 'test' / 'images.csv').open() as file:
            bits.append({row['image']: float(row['bits']) for row in csv.DictReader(file)})
    assert len(bits[0]) == 600 and bits[0] == pytest.approx(bits[1], rel=1e-5)


@pytest.mark.parametrize('interleaved', [False, True])
def test_a_batch_is_the_same_wherever_the_rows_of_a_process_are(tmp_path, interleaved, monkeypatch):
    flags = ('--job=vqvae',)
    if interleaved:  # one step, because further steps amplify differences of rounding
        monkeypatch.setenv('INTERLEAVED', '1')
        flags += ('--config.vqvae.training.steps=1', '--config.vqvae.training.warmup_steps=0')
    else:  # six rows cannot be sharded over four devices: the processes share all of them
        flags += ('--config.parallel.fsdp=4', '--config.vqvae.training.batch_size=6')
    one, two = tmp_path / 'one', tmp_path / 'two'
    for workdir, count in ((one, 1), (two, 2)):
        assert end(start(workdir, count, *flags)) == [0] * count, output(workdir)
    mesh = 'data=4 fsdp=1' if interleaved else 'data=1 fsdp=4'
    assert f'vqvae: 4 x cpu in 2 processes, mesh {mesh}; ' in output(two)
    first, second = (BestCheckpoint(epath.Path(workdir / 'vqvae')).load() for workdir in (one, two))
    if interleaved:
        first, second = first['model_state'], second['model_state']
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), first, second)
    logs = [read_metrics(workdir / 'vqvae') for workdir in (one, two)]
    assert logs[0][0]['train/loss'] == pytest.approx(logs[1][0]['train/loss'], rel=1e-4)


def test_two_processes_on_a_bucket(tmp_path):
    pytest.importorskip('gcsfs')
    with serve() as server:
        for job in ('vqvae', 'extract_codes'):
            ended = end(start(tmp_path, 2, *SHORT, f'--job={job}', bucket='gs://bucket/two'))
            assert ended == [0, 0], output(tmp_path) + output(tmp_path, 1)
        two = dict(server.objects)
        server.objects.update(
            {name.replace('two/', 'one/', 1): kept for name, kept in two.items() if '/codes/' not in name}
        )
        assert end(start(tmp_path, 1, *SHORT, '--job=extract_codes', bucket='gs://bucket/one')) == [0], output(tmp_path)
        one = {
            name.replace('one/', 'two/', 1): kept for name, kept in server.objects.items() if name.startswith('one/')
        }
    shards = [name for name in two if '/codes/' in name and 'shard-' in name]
    assert len(shards) > 3 and all(one[name][0] == two[name][0] for name in shards)
    assert (
        one.keys() == two.keys()
        and any(name.endswith('codes/test/record.json') for name in one)
        and not list(tmp_path.glob('*/'))
    )


def test_a_signal_to_one_process_stops_all_at_one_step_and_others_continue(tmp_path):
    processes = start(tmp_path, 2, *LONG)
    wait_for_checkpoint(tmp_path, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert end(processes, 100) == [128 + signal.SIGTERM] * 2, output(tmp_path) + output(tmp_path, 1)
    saved = int(output(tmp_path).split('saved at step ')[1].split(';')[0])

    # One process on other devices goes on from there, and two from where it was killed.
    for count, devices in ((1, 2), (2, 1)):
        processes = start(tmp_path, count, *LONG, devices=devices)
        later = wait_for_checkpoint(tmp_path, processes, after=saved)
        processes[0].kill()
        end(processes, 200)
        resumed = int(output(tmp_path).split('continuing from step ')[1].split()[0])
        assert resumed == saved or count == 2 and resumed >= saved
        saved = later


def test_processes_end_when_one_of_them_dies_and_the_restart_continues(tmp_path):
    processes = start(tmp_path, 2, *LONG)
    saved = wait_for_checkpoint(tmp_path, processes)
    processes[1].kill()
    first, _ = end(processes, 200)  # the others notice that its heartbeat is missing
    assert first != 0
    processes = start(tmp_path, 2, *LONG)
    wait_for_checkpoint(tmp_path, processes, after=saved)
    assert int(output(tmp_path).split('continuing from step ')[1].split()[0]) >= saved
    for process in processes:
        process.kill()
    end(processes)
