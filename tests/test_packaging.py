"""The package as users install it: sdist and wheel, in fresh environments, from other directories."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.system
MINE = """
from vqvae2_jax import load_config


def get_config():
    config = load_config('tiny')
    config.name = 'mine'
    config.vqvae.hidden_channels = 12
    return config
"""
SHORT = ('--job=vqvae', '--config.vqvae.training.steps=2', '--config.vqvae.training.warmup_steps=0')


def run(*command, **options):
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert found.returncode == 0, f'{found.stdout}\n{found.stderr}'
    return found.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """A directory with the sdist and the wheel that is built from it."""
    source, out = tmp_path_factory.mktemp('source') / 'project', tmp_path_factory.mktemp('dist')
    ignored = shutil.ignore_patterns('.git', '.venv', 'runs', 'build', '*.egg-info', '__pycache__', '.*cache')
    shutil.copytree(ROOT, source, ignore=ignored)  # building leaves files in the source tree
    run(sys.executable, '-m', 'build', '--outdir', out, source)
    return out


@pytest.fixture(scope='module')
def installed(built, tmp_path_factory):
    """The bin directory of a fresh environment with the wheel."""
    environment = tmp_path_factory.mktemp('environment') / 'venv'
    run(sys.executable, '-m', 'venv', environment)
    (wheel,) = built.glob('*.whl')
    run(environment / 'bin' / 'python', '-m', 'pip', 'install', '--quiet', wheel)
    return environment / 'bin'


def test_the_wheel_has_code_configs_data_and_types_and_nothing_else(built):
    (wheel,), (sdist,) = built.glob('*.whl'), built.glob('*.tar.gz')
    names = zipfile.ZipFile(wheel).namelist()
    packaged = {name for name in names if not name.partition('/')[0].endswith('.dist-info')}
    code = {p.relative_to(ROOT).as_posix() for p in (ROOT / 'vqvae2_jax').rglob('*.py')}
    configs = {f'vqvae2_jax/configs/{p.name}' for p in (ROOT / 'configs').glob('*.py')}
    assets = {p.relative_to(ROOT).as_posix() for p in (ROOT / 'vqvae2_jax').glob('*/assets/*')}
    assert packaged == code | configs | assets | {'vqvae2_jax/py.typed'}
    inside = {name.partition('/')[2] for name in tarfile.open(sdist).getnames()}
    needed = {'pyproject.toml', 'requirements.txt', 'README.md', 'LICENSE', 'configs/fashion.py'}
    assert (code | assets | needed | {'vqvae2_jax/py.typed'}) <= inside


def test_a_tiny_training_runs_from_another_directory(installed, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'XLA_FLAGS')}
    environment |= {'PATH': f'{installed}:{os.environ["PATH"]}', 'JAX_NUM_CPU_DEVICES': '1'}
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'mine.py').write_text(MINE)
    here = dict(cwd=tmp_path / 'elsewhere', env=environment)
    # Worker processes import the console script again.
    output = run('vqvae2', '--config=tiny', '--workdir=run', '--config.data.workers=1', *SHORT, **here)
    assert (
        'vqvae' in output and json.loads((tmp_path / 'elsewhere/run/vqvae/record.json').read_text())['state'] == 'done'
    )
    run('vqvae2', f'--config={tmp_path}/mine.py', *SHORT, **here)
    record = json.loads((tmp_path / 'elsewhere/runs/mine/vqvae/record.json').read_text())
    assert record['settings']['vqvae.hidden_channels'] == 12 and record['results']['steps'] == 2
    show = 'import vqvae2_jax; print(vqvae2_jax.__file__, vqvae2_jax.load_config("imagenet256").name)'
    file, name = run(installed / 'python', '-c', show, **here).split()
    assert name == 'imagenet256' and not pathlib.Path(file).is_relative_to(ROOT)


def test_an_editable_install_finds_the_configs_of_the_checkout(tmp_path):
    show = 'import vqvae2_jax; print(vqvae2_jax.load_config("fashion").name, vqvae2_jax.__file__)'
    name, file = run(sys.executable, '-c', show, cwd=tmp_path).split()
    assert name == 'fashion' and (pathlib.Path(file).parents[1] / 'configs').is_dir()


@pytest.mark.parametrize('version', ['3.11', '3.12', '3.13', '3.14'])
def test_the_requirements_resolve_to_wheels(version):
    command = [sys.executable, '-m', 'uv', 'pip', 'compile', '--quiet', '--no-header', '--no-annotate']
    wheels = ['--only-binary', ':all:', '--no-binary', 'promise']  # of TFDS, which has no wheels and is pure Python
    text = run(*command, '--python-version', version, *wheels, ROOT / 'requirements.txt')
    versions = dict(line.split('==') for line in text.splitlines())
    jax = tuple(map(int, versions['jax'].split('.')[:2]))
    assert jax >= ((0, 11) if version > '3.11' else (0, 10)), 'JAX 0.11 and later need Python 3.12'
