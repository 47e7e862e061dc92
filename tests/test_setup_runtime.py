"""The notebook's first cell: its installations on Colab, Kaggle and locally, and when it asks for a restart."""

import ast
import os
import pathlib
import subprocess
import sys
import types

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from notebooks import setup_runtime

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    'plugins, gpu, tpu, extra',
    [
        ((), False, False, ''),
        ((), True, False, 'cuda12'),
        ((), False, True, 'tpu'),
        (('jax-cuda12-plugin',), True, False, 'cuda12'),
        (('jax-cuda13-plugin',), True, False, 'cuda13'),
        (('jax-cuda12-plugin',), False, False, 'cuda12'),
        (('libtpu',), False, False, 'tpu'),
        (('libtpu', 'jax-cuda12-plugin'), True, False, 'cuda12'),
    ],
)
def test_an_installed_plugin_or_else_the_hardware_chooses_the_extra(plugins, gpu, tpu, extra):
    assert setup_runtime.choose_extra(set(plugins), gpu, tpu) == extra


def test_only_known_extras_are_chosen():
    text = (ROOT / 'pyproject.toml').read_text()
    for extra in setup_runtime.PLUGINS.values():
        assert f'\n{extra} = ["jax[{extra}]"]' in text


def add_program(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'#!/bin/sh\n{script}\n')
    (folder / name).chmod(0o755)


def test_a_gpu_is_one_that_nvidia_smi_finds(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert not setup_runtime.has_gpu()
    add_program(tmp_path, 'nvidia-smi', 'exit 9')  # no driver
    assert not setup_runtime.has_gpu()
    add_program(tmp_path, 'nvidia-smi', 'exit 0')
    assert setup_runtime.has_gpu()


def test_a_tpu_shows_by_variables_or_device_files(tmp_path, monkeypatch):
    for name in setup_runtime.TPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setup_runtime, 'TPU_DEVICES', [f'{tmp_path}{device}' for device in setup_runtime.TPU_DEVICES])
    (tmp_path / 'dev' / 'vfio').mkdir(parents=True)
    (tmp_path / 'dev' / 'vfio' / 'vfio').touch()  # on machines without a TPU too
    assert not setup_runtime.has_tpu()
    (tmp_path / 'dev' / 'vfio' / '0').touch()
    assert setup_runtime.has_tpu()
    (tmp_path / 'dev' / 'vfio' / '0').unlink()
    (tmp_path / 'dev' / 'accel0').touch()
    assert setup_runtime.has_tpu()
    (tmp_path / 'dev' / 'accel0').unlink()
    monkeypatch.setenv('COLAB_TPU_ADDR', '10.0.0.2:8470')
    assert setup_runtime.has_tpu()


@pytest.fixture
def versions(monkeypatch):
    """A dict of versions that pip installed, and no package of them imported."""
    installed = {'jax': '0.12.0', 'jaxlib': '0.12.0', 'flax': '0.12.12', 'numpy': '2.5.5'}
    monkeypatch.setattr(setup_runtime, 'installed_version', installed.get)
    for name in installed:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return installed


def import_version(monkeypatch, name, version):
    module = types.ModuleType(name)
    module.__version__ = version
    monkeypatch.setitem(sys.modules, name, module)


def test_a_restart_is_asked_for_when_another_version_was_imported(monkeypatch, versions):
    assert setup_runtime.restart_message() == ''
    import_version(monkeypatch, 'numpy', '2.5.5')
    assert setup_runtime.restart_message() == ''
    import_version(monkeypatch, 'numpy', '2.1.3')
    import_version(monkeypatch, 'jax', '0.7.2')
    assert setup_runtime.restart_message() == (
        'Restart the runtime, then run this cell again: jax 0.7.2 is imported, 0.12.0 is installed; '
        'numpy 2.1.3 is imported, 2.5.5 is installed.'
    )


def test_one_pip_command_installs_jax_with_its_plugin(monkeypatch, versions):
    commands = []
    monkeypatch.setattr(subprocess, 'run', lambda command, **options: commands.append((command, options)))
    versions['jax-cuda12-plugin'] = '0.7.2'
    monkeypatch.setattr(setup_runtime, 'has_gpu', lambda: True)
    setup_runtime.install()
    arguments = ['install', '--quiet', '--editable', f'{ROOT}[cuda12]']
    assert commands == [([sys.executable, '-m', 'pip', *arguments], {'check': True})]
    import_version(monkeypatch, 'jaxlib', '0.7.2')
    with pytest.raises(SystemExit, match='Restart the runtime.* jaxlib 0.7.2 is imported, 0.12.0 is installed'):
        setup_runtime.install()


def test_a_failed_installation_is_an_error(monkeypatch, versions):
    monkeypatch.setattr(sys, 'executable', 'false')  # in place of pip
    with pytest.raises(subprocess.CalledProcessError):
        setup_runtime.install()


def test_the_script_imports_nothing_that_pip_may_replace():
    tree = ast.parse(pathlib.Path(setup_runtime.__file__).read_text())
    names = {a.name.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert names and names <= sys.stdlib_module_names
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))


class FirstCell:
    """Runs the first code cell with a `git` that makes an empty checkout, and records what it does in `calls`."""

    def __init__(self, folder, monkeypatch):
        notebook = nbformat.read(ROOT / 'notebooks' / 'quickstart.ipynb', as_version=4)
        source = next(cell.source for cell in notebook.cells if cell.cell_type == 'code')
        self.code = TransformerManager().transform_cell(source)
        self.calls = []
        add_program(folder / 'bin', 'git', 'echo "$@" >> "$GIT_LOG"; mkdir -p vqvae2_jax/configs')
        monkeypatch.setenv('PATH', str(folder / 'bin'), prepend=os.pathsep)
        monkeypatch.setenv('GIT_LOG', str(folder / 'git.log'))
        monkeypatch.delenv('KAGGLE_KERNEL_RUN_TYPE', raising=False)
        monkeypatch.delitem(sys.modules, 'google.colab', raising=False)
        monkeypatch.setattr(sys, 'path', list(sys.path))
        monkeypatch.setattr(setup_runtime, 'install', lambda: self.calls.append('install'))

    def run(self):
        self.calls.clear()
        ipython = types.SimpleNamespace(system=lambda command: subprocess.run(command, shell=True))
        exec(self.code, {'get_ipython': lambda: ipython})
        return self.calls


@pytest.fixture
def cell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return FirstCell(tmp_path, monkeypatch)


@pytest.mark.parametrize('service', ['Colab', 'Kaggle'])
def test_it_clones_and_installs_on_a_hosted_runtime(service, cell, tmp_path, monkeypatch):
    if service == 'Colab':
        monkeypatch.setitem(sys.modules, 'google.colab', types.ModuleType('google.colab'))
    else:
        monkeypatch.setenv('KAGGLE_KERNEL_RUN_TYPE', 'Interactive')
    for start in (tmp_path, tmp_path / 'vqvae2_jax', tmp_path):  # the cell run again, and after a restart
        os.chdir(start)
        assert cell.run() == ['install']
        assert pathlib.Path.cwd() == tmp_path / 'vqvae2_jax' and sys.path[0] == os.getcwd()
    log = (tmp_path / 'git.log').read_text()
    assert log == 'clone --quiet --depth 1 https://github.com/vqvae2-jax/vqvae2_jax\n'


@pytest.mark.parametrize('start', ['.', 'notebooks'])
def test_it_only_goes_to_the_root_of_a_local_checkout(start, cell, tmp_path):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'notebooks').mkdir()
    os.chdir(start)
    assert cell.run() == []
    assert pathlib.Path.cwd() == tmp_path and sys.path[0] == os.getcwd()
    assert not (tmp_path / 'git.log').exists()
