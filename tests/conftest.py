"""For every test: eight virtual CPU devices, so that arrays are really sharded, no display, cheap compilation."""

import fcntl
import os
import shutil
import signal
import tempfile

# Before anything imports JAX: the backend reads these once. Subprocesses inherit them.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = 'true'  # the tests wait for the compiler, not for what it makes
os.environ['MPLBACKEND'] = 'Agg'
# Jobs that run twice compile once. Test processes inherit the directory from the one that starts them. CI gives one for
# `make test` and `make test-system`.
if 'PYTEST_XDIST_WORKER' not in os.environ and 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix='vqvae2_jax-tests-')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

import jax
import orbax.checkpoint as ocp
import pytest
from etils import epath

from vqvae2_jax import load_config, xla_flags
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run

# A shell that starts the tests in the background has them ignore Ctrl-C; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
xla_flags.set_cpu_flags()  # as the command line does, so that both give the same numbers
xla_flags.add_flag('xla_cpu_use_fusion_emitters', 'false')  # XLA compiles a third faster without these emitters
# By default each device writes a part of a replicated array: a program to compile for each shape and device.
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False), override=True
)


def pytest_collection_modifyitems(items):
    """Sorts the tests that need the finished pipeline last: while one process runs it, the others have work."""
    items.sort(key=lambda item: 'finished' in item.fixturenames)


@pytest.fixture
def config():
    """configs/tiny.py with fewer examples, fresh for every test."""
    return small_config()


def small_config():
    """configs/tiny.py with 400 training, 9000 validation (three shards of codes) and 600 test images."""
    config = load_config('tiny')
    config.data.held_out = (0.9, 0.06)
    config.codes.batch_size = 512
    for section in ('vqvae', 'prior.top', 'prior.bottom', 'classifier'):
        config[section].training.update(eval_examples=64)
    config.prior.bottom.training.image_every = 0
    config.evaluate.nearest = 5
    return config


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
    """The whole pipeline, run once for all test processes; tests that change files take `run`."""
    directory = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        directory = directory.parent  # of all processes
    run = Run(small_config(), epath.Path(directory) / 'pipeline')
    validate_config(run.config)
    with open(f'{run.workdir}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not run.path('report', 'report.html').exists():
            run_job(run, 'pipeline')
    return run


@pytest.fixture
def run(finished, config, tmp_path):
    """A copy of the finished run, with a config of its own."""
    shutil.copytree(finished.workdir, tmp_path / 'run')
    return Run(config, epath.Path(tmp_path) / 'run')
