"""The best weights of a stage: one whole set at any time, readable on other devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae2_jax.distributed import sharding
from vqvae2_jax.io import files
from vqvae2_jax.training.checkpoint import BestCheckpoint


class Killed(Exception):
    """No chance to go on."""


def fail():
    raise Killed


def test_weights_saved_again_replace_the_old_ones_only_when_whole(tmp_path, monkeypatch):
    weights = BestCheckpoint(tmp_path)
    weights.save(3, {'mse': 2.0}, {'w': jnp.zeros(2)})
    write_json = files.write_json
    monkeypatch.setattr(files, 'write_json', lambda *_: fail())  # when the new ones are there, but not named yet
    with pytest.raises(Killed):
        weights.save(3, {'mse': 1.0}, {'w': jnp.ones(2)}, weights.best())
    assert weights.best()['summary'] == {'mse': 2.0}
    np.testing.assert_array_equal(weights.load()['w'], [0, 0])
    monkeypatch.setattr(files, 'write_json', write_json)
    weights.save(3, {'mse': 1.0}, {'w': jnp.ones(2)}, weights.best())
    np.testing.assert_array_equal(weights.load()['w'], [1, 1])
    assert len(list((tmp_path / 'weights').iterdir())) == 2


def test_weights_load_on_other_devices_than_they_were_saved_on(tmp_path):
    saved = {'params': {'w': jnp.arange(4.0), 'b': jnp.ones(3, jnp.bfloat16)}, 'variables': {}}
    BestCheckpoint(tmp_path).save(1, {}, jax.device_put(saved, sharding.replicated_sharding()))
    loaded = BestCheckpoint(tmp_path).load()
    assert loaded.keys() == saved.keys() and all(type(x) is np.ndarray for x in jax.tree.leaves(loaded))
    program = f"""
import jax
from vqvae2_jax.io.checkpoint import Weights
from vqvae2_jax.io.provenance import digest_arrays
assert jax.device_count() == 1
print(digest_arrays(Weights({str(tmp_path)!r}).load()))
"""
    command = [sys.executable, '-W', 'error:.*[Ss]harding', '-c', program]
    environment = os.environ | {'JAX_NUM_CPU_DEVICES': '1'}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == files.digest_arrays(loaded), result.stderr
