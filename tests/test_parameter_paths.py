"""Paths and shapes of parameters and codebooks stay those of version 0.2.

They seed the weights and name the arrays of a checkpoint.
"""

import hashlib
import json
import pathlib

import jax
import pytest

from vqvae2_jax import load_config
from vqvae2_jax.config import build

_RECORDED = json.loads((pathlib.Path(__file__).parent / 'data' / 'parameter_paths.json').read_text())
_ORDERS = {
    'raster, scanned': dict(order='raster', num_attention_layers=2, scan_layers=True),
    'wavefront': dict(order='wavefront', num_attention_layers=1, label_dropout=0.1),
    'wavefront, scanned': dict(order='wavefront', num_attention_layers=1, label_dropout=0.1, scan_layers=True),
}

# Configs whose priors were in raster order in version 0.2.
_RASTER_BEFORE = {'cifar10', 'cifar10_small', 'fashion', 'folder256'}


def load(name):
    config = load_config('tiny' if name in _ORDERS else name)
    if name in _ORDERS:
        for prior in config.prior.values():
            prior.update(num_residual_blocks=4, num_output_blocks=2, num_cond_blocks=2, **_ORDERS[name])
    elif name in _RASTER_BEFORE:
        for prior in config.prior.values():
            prior.order = 'raster'
    return config


@pytest.mark.parametrize('name', list(_RECORDED))
def test_parameters_have_the_paths_of_version_0_2(name):
    for section, (model, inputs) in build.networks(load(name)).items():
        leaves = jax.tree.leaves_with_path(jax.eval_shape(model.init, *inputs))
        found = {jax.tree_util.keystr(k, simple=True, separator='/'): list(x.shape) for k, x in leaves}
        recorded = _RECORDED[name][section]
        if isinstance(recorded, str):  # the digest of a large network's paths
            found = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
        assert found == recorded, section
