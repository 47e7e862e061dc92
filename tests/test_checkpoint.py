"""The best weights of a training: one complete set at any time, readable on other devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.io import checksums, files
from vqvae2_jax.training.checkpoint import BestCheckpoint, Checkpoints


class Killed(Exception):
    """No chance to go on."""


def fail():
    raise Killed


def test_weights_saved_again_replace_the_old_ones_only_when_complete(tmp_path, monkeypatch):
    best = BestCheckpoint(tmp_path)
    assert best.save_if_best(3, {'mse': 2.0}, 'mse', {'w': jnp.zeros(2)})
    write_json = files.write_json
    monkeypatch.setattr(files, 'write_json', lambda *_: fail())  # the new ones are there, but best.json is the old one
    with pytest.raises(Killed):
        best.save_if_best(3, {'mse': 1.0}, 'mse', {'w': jnp.ones(2)})
    best = BestCheckpoint(tmp_path)
    assert best.best()['metrics'] == {'mse': 2.0}
    np.testing.assert_array_equal(best.load()['w'], [0, 0])
    monkeypatch.setattr(files, 'write_json', write_json)
    assert best.save_if_best(3, {'mse': 1.0}, 'mse', {'w': jnp.ones(2)})
    np.testing.assert_array_equal(best.load()['w'], [1, 1])
    assert len(list((tmp_path / 'weights').iterdir())) == 2


def test_worse_weights_and_those_of_a_nan_are_not_written(tmp_path):
    best = BestCheckpoint(tmp_path)
    assert not best.save_if_best(1, {'mse': float('nan')}, 'mse', {'w': jnp.zeros(2)}) and best.best() is None
    assert not (tmp_path / 'weights').exists()
    saved = [
        best.save_if_best(step, {'mse': m}, 'mse', {'w': jnp.full(2, step)}) for step, m in enumerate([3, 2, 4, 2])
    ]
    assert saved == [True, True, False, True]  # equal counts as better
    assert not best.save_if_best(9, {'mse': float('nan')}, 'mse', {'w': jnp.zeros(2)})
    np.testing.assert_array_equal(BestCheckpoint(tmp_path).load()['w'], [3, 3])
    best = BestCheckpoint(tmp_path).best()
    names = best.pop('files')
    assert best == {'step': 3, 'metrics': {'mse': 2}, 'directory': '3'}
    assert names == checksums.file_entries(tmp_path / 'weights' / '3')


def test_all_processes_continue_from_the_checkpoint_that_the_main_process_sees(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() is None
    monkeypatch.setattr(processes, 'run_on_main_process', lambda function: [2, 4])
    assert checkpoints.latest_step() == 4
    checkpoints.close()


def test_weights_load_on_other_devices_than_they_were_saved_on(tmp_path):
    saved = {'params': {'w': jnp.arange(4.0), 'b': jnp.ones(3, jnp.bfloat16)}, 'model_state': {}}
    with jax.set_mesh(sharding.make_mesh()):
        weights = jax.device_put(saved, sharding.replicated_sharding())
    BestCheckpoint(tmp_path).save_if_best(1, {'mse': 1.0}, 'mse', weights)
    loaded = BestCheckpoint(tmp_path).load()
    assert loaded.keys() == saved.keys() and all(type(x) is np.ndarray for x in jax.tree.leaves(loaded))
    program = f"""
import jax
from vqvae2_jax.io.files import digest_arrays
from vqvae2_jax.training.checkpoint import BestCheckpoint
assert jax.device_count() == 1
print(digest_arrays(BestCheckpoint({str(tmp_path)!r}).load()))
"""
    command = [sys.executable, '-W', 'error:.*[Ss]harding', '-c', program]
    environment = os.environ | {'JAX_NUM_CPU_DEVICES': '1'}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == files.digest_arrays(loaded), result.stderr
