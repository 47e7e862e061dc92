"""The package keeps its floors, and each rule of `floors` fails on a source that breaks it."""

import pytest

from tests.floors import MAX_DEPTH, PACKAGE, ROOT, package_sources, violations


def test_the_package_keeps_its_floors():
    sources = package_sources()
    assert f'{PACKAGE}.__init__' in sources and f'{PACKAGE}.metrics.codes' in sources, 'the package was not found'
    if (ROOT / 'main.py').exists():
        assert 'import' in sources[f'{PACKAGE}.main'], 'main.py was not read'
    assert violations(sources) == []


def long_function(lines):
    return 'def f():\n' + '    x = 1\n' * (lines - 1)


@pytest.mark.parametrize(
    'module, source, message',
    [
        ('models.prior', 'from vqvae2_jax.io import logging', 'imports vqvae2_jax.io.logging, which models must not'),
        ('models.prior', 'from vqvae2_jax import parallel', 'imports vqvae2_jax.parallel, which models must not'),
        ('models.prior', 'from ..stages import vqvae', 'imports vqvae2_jax.stages.vqvae, which models must not'),
        (
            'models.prior',
            'def f():\n    import vqvae2_jax.metrics.codes',
            'imports vqvae2_jax.metrics.codes, which models',
        ),
        ('stages.prior', 'import vqvae2_jax.jobs.train as t', 'imports vqvae2_jax.jobs.train, which stages must not'),
        (
            'sampling.a',
            'from vqvae2_jax.state import TrainState',
            'imports vqvae2_jax.state.TrainState, which sampling',
        ),
        ('metrics.fid', 'from vqvae2_jax.data import codes', 'imports vqvae2_jax.data.codes, which metrics must not'),
        ('metrics.fid', 'import optax', 'imports optax: metrics take NumPy in'),
        ('metrics.fid', 'from flax import linen', 'imports flax.linen: metrics'),
        ('main', 'from vqvae2_jax.models import prior', 'imports vqvae2_jax.models.prior, which main must not'),
        ('io.logging', 'from vqvae2_jax.jobs import train', 'imports vqvae2_jax.jobs.train, which io must not'),
        ('jobs.train', 'from absl import flags', 'imports absl.flags: flags belong to main'),
        ('jobs.train', 'from ml_collections import config_flags', 'flags belong to main'),
        ('jobs.train', 'from jax._src import core', 'uses the private name jax._src.core'),
        ('jobs.train', 'from numpy import _core', 'uses the private name numpy._core'),
        ('jobs.train', 'import jax as j\nj._src.core.x()', 'uses the private name j._src'),
        ('models.a', "y = jax.lax.psum(x, 'data')", 'names a device operation: psum'),
        ('models.a', 'nn.BatchNorm(axis_name=None)', 'names a device operation: axis_name'),
        ('stages.a', 'def f(axis_name): pass', 'names a device operation: axis_name'),
        ('sampling.a', 'from jax.lax import with_sharding_constraint as w', 'operation: with_sharding_constraint'),
        ('utils', '', "unknown floor 'utils'"),
        ('jobs.a', 'x = 1\n' * 401, 'has 401 lines, more than 400'),
        ('jobs.a', long_function(61), 'function f has 61 lines, more than 60'),
    ],
)
def test_each_rule_fails_on_a_bad_source(module, source, message):
    found = violations({f'{PACKAGE}.{module}': source})
    assert len(found) == 1 and f'{PACKAGE}.{module}: ' in found[0] and message in found[0]


@pytest.mark.parametrize(
    'module, source',
    [
        ('jobs.train', 'from vqvae2_jax.stages import vqvae\nfrom vqvae2_jax import io, parallel\nimport jax'),
        (
            'stages.vqvae',
            '"""No psum or axis_name here."""\nfrom vqvae2_jax.models import vqvae\nx.mean(axis=0)  # psum',
        ),
        ('main', 'from absl import flags\nfrom vqvae2_jax.jobs import train'),
        ('jobs.train', 'from __future__ import annotations\nimport jax\njax.__version__\nself._x\n'),
        ('metrics.codes', 'import numpy as np\nfrom vqvae2_jax.metrics import reconstruction'),
        ('jobs.a', 'x = 1\n' * 300 + long_function(60)),
    ],
)
def test_good_sources_pass(module, source):
    assert violations({f'{PACKAGE}.{module}': source}) == []


def test_cycles_are_found_through_packages_and_functions():
    found = violations(
        {
            'vqvae2_jax.jobs.__init__': 'from . import train',
            'vqvae2_jax.training.loop': 'def f():\n    from .sample import run',
            'vqvae2_jax.jobs.sample': 'import vqvae2_jax.jobs',
        }
    )
    assert found == [
        'import cycle: vqvae2_jax.jobs -> vqvae2_jax.jobs.train -> vqvae2_jax.jobs.sample -> vqvae2_jax.jobs'
    ]


@pytest.mark.parametrize('length, broken', [(MAX_DEPTH, False), (MAX_DEPTH + 1, True)])
def test_depth_counts_the_imports_to_the_farthest_module(length, broken):
    # main -> jobs.j1 -> ... -> jobs.jN, and a detour to j1 that does not make it lie deeper.
    sources = {f'vqvae2_jax.jobs.j{i}': f'from vqvae2_jax.jobs import j{i + 1}' for i in range(1, length)}
    sources[f'vqvae2_jax.jobs.j{length}'] = ''
    sources['vqvae2_jax.jobs.detour'] = 'from vqvae2_jax.jobs import j1'
    sources['vqvae2_jax.main'] = 'from vqvae2_jax.jobs import detour, j1'
    assert any('deep, more than' in violation for violation in violations(sources)) is broken
