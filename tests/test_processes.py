"""Two real processes train as one: the loader's slices, the global batch, the codebook's sums, one writer."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

from vqvae2_jax.io.checkpoint import Weights
from vqvae2_jax.io.logging import read_metrics

DEVICES = 4  # of all processes together
WORKER = """
import sys
import jax

directory, address, processes, rank = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if processes > 1:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(address, processes, rank)

from etils import epath
from tests.conftest import small_config
from vqvae2_jax import config as configs
from vqvae2_jax.jobs.stages import image_data, vqvae_stage
from vqvae2_jax.jobs.train import fit
from vqvae2_jax.jobs.workdir import Run

assert jax.device_count() == 4 and jax.process_count() == processes
run = Run(small_config(), epath.Path(directory))
data = image_data(run, 'vqvae')
fit(vqvae_stage(run), configs.training(run.config, 'vqvae'), data, directory, name='vqvae', seed=0)
"""


def train(directory, processes):
    """Trains the tiny stage 1 in `processes` processes that share four devices."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': str(DEVICES // processes)}
    started = [
        subprocess.Popen(
            [sys.executable, '-c', WORKER, str(directory), address, str(processes), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, '\n'.join(outputs)
    return Weights(epath.Path(directory)).load(), read_metrics(directory)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    (one, log_of_one), (two, log_of_two) = (train(tmp_path / str(n), n) for n in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, two)
    assert [line['step'] for line in log_of_one] == [line['step'] for line in log_of_two]
    for a, b in zip(log_of_one, log_of_two, strict=True):
        for name in a.keys() - {'step', 'time'}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
