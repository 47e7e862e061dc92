"""The package keeps its layers, and each rule of `layers` fails on a source that breaks it."""

import pytest

from tests.layers import MAX_DEPTH, PACKAGE, ROOT, package_sources, violations


def test_the_package_keeps_its_layers():
    sources = package_sources()
    assert f'{PACKAGE}.__init__' in sources and f'{PACKAGE}.metrics.codebook' in sources, 'the package was not found'
    if (ROOT / 'main.py').exists():
        assert 'import' in sources[f'{PACKAGE}.main'], 'main.py was not read'
    assert violations(sources) == []


def long_function(lines):
    return 'def f():\n' + '    x = 1\n' * (lines - 1)


@pytest.mark.parametrize(
    'module, source, message',
    [
        ('models.prior', 'from vqvae2_jax.io import logging', 'imports vqvae2_jax.io.logging, which models must not'),
        ('models.prior', 'from vqvae2_jax import api', 'imports vqvae2_jax.api, which models must not'),
        ('models.prior', 'from ..tasks import vqvae', 'imports vqvae2_jax.tasks.vqvae, which models must not'),
        (
            'models.prior',
            'def f():\n    import vqvae2_jax.metrics.codebook',
            'imports vqvae2_jax.metrics.codebook, which models',
        ),
        ('tasks.prior', 'import vqvae2_jax.jobs.train as t', 'imports vqvae2_jax.jobs.train, which tasks must not'),
        (
            'sampling.a',
            'from vqvae2_jax.training.state import TrainState',
            'imports vqvae2_jax.training.state.TrainState, which sampling',
        ),
        ('metrics.fid', 'from vqvae2_jax.data import codes', 'imports vqvae2_jax.data.codes, which metrics must not'),
        ('sampling.a', 'from vqvae2_jax.tasks import task', 'imports vqvae2_jax.tasks.task, which sampling must not'),
        ('training.a', 'from vqvae2_jax.jobs import train', 'imports vqvae2_jax.jobs.train, which training must not'),
        ('evaluation.a', 'from vqvae2_jax.jobs import cas', 'imports vqvae2_jax.jobs.cas, which evaluation must not'),
        ('planning.a', 'from vqvae2_jax.jobs.train import f', 'imports vqvae2_jax.jobs.train.f, which planning must'),
        ('api', 'def f():\n    from .jobs import train', 'imports vqvae2_jax.jobs.train, which api must not'),
        (
            'jobs.sample',
            'from vqvae2_jax.sampling import params',
            'imports vqvae2_jax.sampling.params, which jobs.sample',
        ),
        ('jobs.workdir', 'from vqvae2_jax.models import vqvae', 'imports vqvae2_jax.models.vqvae, which jobs.workdir'),
        ('api', 'from vqvae2_jax.training import loop', 'imports vqvae2_jax.training.loop, which api must'),
        ('config.build', 'from vqvae2_jax.planning import a', 'imports vqvae2_jax.planning.a, which config must not'),
        ('distributed.a', 'from vqvae2_jax.models import a', 'imports vqvae2_jax.models.a, which distributed must not'),
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
        ('tasks.a', 'def f(axis_name): pass', 'names a device operation: axis_name'),
        ('sampling.a', 'from jax.lax import with_sharding_constraint as w', 'operation: with_sharding_constraint'),
        ('kernels.a', "y = jax.lax.psum(x, 'data')", 'names a device operation: psum'),
        ('kernels.a', 'from vqvae2_jax.training import loop', 'imports vqvae2_jax.training.loop, which kernels must'),
        ('kernels.a', 'from vqvae2_jax.config import build', 'imports vqvae2_jax.config.build, which kernels must not'),
        ('models.a', 'from vqvae2_jax.kernels import select', 'imports vqvae2_jax.kernels.select, which models must'),
        ('training.a', 'from vqvae2_jax.kernels import select', 'imports vqvae2_jax.kernels.select, which training'),
        ('models.a', "fast = device.kind == 'gpu'", 'names a platform, which kernels.select does: gpu'),
        ('jobs.train', 'fast = device.platform', 'names a platform, which kernels.select does: platform'),
        ('kernels.nearest', "if name in ('cuda', x): pass", 'names a platform, which kernels.select does: cuda'),
        ('kernels.select', 'jax.default_backend()', 'calls default_backend'),
        ('planning.a', 'from jax import default_backend', 'calls default_backend'),
        ('utils', '', "unknown layer 'utils'"),
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
        ('jobs.train', 'from vqvae2_jax.tasks import vqvae\nfrom vqvae2_jax import io, distributed\nimport jax'),
        ('planning.programs', 'from vqvae2_jax import api\nfrom vqvae2_jax.training import loop'),
        ('evaluation.a', 'from vqvae2_jax.metrics import frechet\nfrom vqvae2_jax.distributed import sharding'),
        ('config.build', 'from vqvae2_jax.models import prior\nfrom vqvae2_jax.training import optim'),
        (
            'tasks.vqvae',
            '"""No psum or axis_name here."""\nfrom vqvae2_jax.models import vqvae\nx.mean(axis=0)  # psum',
        ),
        ('models.a', '"""On cpu or gpu."""\njax.lax.platform_dependent(x, cpu=f, default=g)'),
        ('kernels.select', 'from vqvae2_jax.distributed import per_shard\nfast = device.platform == "gpu"'),
        ('main', 'from absl import flags\nfrom vqvae2_jax.jobs import train'),
        ('jobs.train', 'from __future__ import annotations\nimport jax\njax.__version__\nself._x\n'),
        ('metrics.codebook', 'import numpy as np\nfrom vqvae2_jax.metrics import reconstruction'),
        ('jobs.a', 'x = 1\n' * 300 + long_function(60)),
    ],
)
def test_good_sources_pass(module, source):
    assert violations({f'{PACKAGE}.{module}': source}) == []


def test_cycles_are_found_through_packages_and_functions():
    found = violations(
        {
            'vqvae2_jax.jobs.__init__': 'from . import train',
            'vqvae2_jax.jobs.train': 'def f():\n    from .sample import run',
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


@pytest.mark.parametrize(
    'modules, expected',
    [
        (('jobs.sample', 'data.samples'), 'vqvae2_jax.jobs.sample and vqvae2_jax.data.samples'),
        (('io.files', 'config.files'), 'vqvae2_jax.io.files and vqvae2_jax.config.files'),
        (('planning.plan', 'jobs.plan', 'io.a'), 'vqvae2_jax.planning.plan and vqvae2_jax.jobs.plan'),
        (('models.vqvae', 'tasks.vqvae'), None),
        (('io.__init__', 'data.__init__', 'io.a', 'data.b'), None),
    ],
)
def test_no_two_modules_have_one_name(modules, expected):
    found = violations({f'{PACKAGE}.{module}': '' for module in modules})
    assert found == ([f'one name, which SHARED_NAMES lacks: {expected}'] if expected else [])
