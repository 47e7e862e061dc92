"""Importing the package changes nothing outside of it; the command line sets the CPU flag, only where XLA takes it."""

import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys
from importlib.machinery import PathFinder

import jax
import pytest

import vqvae2_jax
from vqvae2_jax import load_config, xla_flags
from vqvae2_jax.config import loading

ROOT = pathlib.Path(__file__).parents[1]
ADDED = '--xla_cpu_experimental_ynn_fusion_type=-individual_convolution'
# Third-party modules come first, as they may change the environment themselves.
IMPORT_ALL = """
import ast, importlib, logging, os, pathlib, pkgutil, signal, sys
from unittest import mock

root = pathlib.Path('vqvae2_jax')
trees = [ast.parse(path.read_text()) for path in root.rglob('*.py')]
names = {node.module for tree in trees for node in tree.body if isinstance(node, ast.ImportFrom)}
names |= {alias.name for tree in trees for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
absent = set()  # optional packages
for name in sorted(n for n in names if not n.startswith('vqvae2_jax')):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        absent.add(error.name)
assert absent <= {'gradio'}, absent

import fsspec, jax, matplotlib, numpy, PIL.Image, absl.flags

def state():
    signals = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    loggers = {name: logging.getLogger(name).level for name in list(logging.root.manager.loggerDict)}
    return {
        'environment': dict(os.environ), 'jax': dict(jax.config.values), 'fsspec': repr(fsspec.config.conf),
        'numpy': numpy.geterr(), 'matplotlib': dict(matplotlib.rcParams), 'pillow': PIL.Image.MAX_IMAGE_PIXELS,
        'signals': signals, 'loggers': loggers, 'flags': sorted(absl.flags.FLAGS), 'path': list(sys.path),
    }

before = state()
import vqvae2_jax
modules = [m.name for m in pkgutil.walk_packages(vqvae2_jax.__path__, 'vqvae2_jax.')]
assert len(modules) > 60, modules
for name in modules:
    if name == 'vqvae2_jax.main':  # the command line defines its flags
        continue
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name in absent, error
after = state()
after['loggers'] = {name: level for name, level in after['loggers'].items() if name in before['loggers']}
print({key: (before[key], after[key]) for key in before if before[key] != after[key]})
"""


def test_importing_every_module_changes_no_environment_variable_and_no_other_library():
    environment = {k: os.environ[k] for k in ('PATH', 'HOME', 'JAX_PLATFORMS')}  # nothing that this process has set
    command = [sys.executable, '-c', IMPORT_ALL]
    assert subprocess.check_output(command, cwd=ROOT, env=environment, text=True).strip() == '{}'


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '')
    return monkeypatch


@pytest.mark.parametrize('own', ['', '--xla_cpu_max_isa=AVX2', '--xla_cpu_experimental_ynn_fusion_type='])
def test_the_flag_is_added_unless_the_user_has_set_it(on_cpu, own):
    on_cpu.setenv('XLA_FLAGS', own)
    assert xla_flags.set_cpu_flags() is ('ynn' not in own)
    assert os.environ['XLA_FLAGS'].split() == own.split() + ([] if 'ynn' in own else [ADDED])


def test_the_flag_is_for_cpus_and_for_a_jaxlib_that_knows_it(on_cpu):
    with on_cpu.context() as patch:  # JAX finds the platform itself: only then do plugins count
        patch.setattr(type(jax.config), 'jax_platforms', None, raising=False)
        patch.setattr(xla_flags, '_has_plugin', lambda: True)
        assert not xla_flags.set_cpu_flags()
    for platforms in ('tpu', 'cuda', 'cuda,cpu'):
        with on_cpu.context() as patch:
            patch.setattr(type(jax.config), 'jax_platforms', platforms, raising=False)
            assert not xla_flags.set_cpu_flags()
    with on_cpu.context() as patch:
        patch.setattr(xla_flags, 'CPU_FLAG', 'xla_cpu_a_flag_that_no_jaxlib_knows')
        assert not xla_flags.set_cpu_flags()
    assert os.environ['XLA_FLAGS'] == ''
    assert xla_flags.set_cpu_flags()


def test_a_removed_flag_is_not_added(on_cpu, tmp_path):
    on_cpu.setattr(importlib.util, 'find_spec', lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    (tmp_path / 'jaxlib').mkdir()
    (tmp_path / 'jaxlib' / '__init__.py').touch()
    for content, known in ((b'\0\x12xla_cpu_removed_flagR\0', False), (b'.\0xla_cpu_removed_flag\0.', True)):
        (tmp_path / 'jaxlib' / 'libjax_common.so').write_bytes(content)
        assert xla_flags.add_flag('xla_cpu_removed_flag', 'true') is known
    assert os.environ['XLA_FLAGS'] == '--xla_cpu_removed_flag=true'


@pytest.mark.parametrize('package', ['libtpu', 'jax_plugins'])
def test_plugins_are_found_as_jax_finds_them(tmp_path, monkeypatch, package):
    # Only this directory is searched, so that plugins which are installed here do not count.
    monkeypatch.setattr(importlib.metadata, 'entry_points', lambda group: ())
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    assert not xla_flags._has_plugin()
    (tmp_path / package / 'xla_cuda12').mkdir(parents=True)
    (tmp_path / package / 'xla_cuda12' / '__init__.py').touch()
    importlib.invalidate_caches()
    assert xla_flags._has_plugin()


def test_configs_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / 'mine.py'
    mine.write_text(
        'from vqvae2_jax import load_config\n\n\ndef get_config():\n    config = load_config("tiny")\n'
        '    config.name = "mine"\n    return config\n'
    )
    assert load_config('fashion').name == 'fashion'
    assert load_config('mine.py').name == load_config(mine).name == 'mine'
    with pytest.raises(
        FileNotFoundError, match="there is no config 'fashon': give the path of a .py file, or .* fashion,"
    ):
        load_config('fashon')
    with pytest.raises(FileNotFoundError, match="there is no file 'other.py'"):
        load_config('other.py')
    load_config('tiny').vqvae.hidden_channels = 3  # of a copy
    assert load_config('tiny').vqvae.hidden_channels == 8


def test_an_installed_package_has_its_configs_inside(tmp_path, monkeypatch):
    assert loading.config_directory() == ROOT / 'configs'
    (tmp_path / 'configs').mkdir()
    monkeypatch.setattr(loading, '_PACKAGE', tmp_path)
    assert loading.config_directory() == tmp_path / 'configs'


def test_the_package_is_typed():
    assert (pathlib.Path(vqvae2_jax.__file__).parent / 'py.typed').exists()
