"""Installs the project in a Colab or Kaggle notebook. It imports no package that the installation may replace."""

import glob
import importlib
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
# Packages that JAX loads as plugins, and the extras of pyproject.toml that install them.
PLUGINS = {'jax-cuda13-plugin': 'cuda13', 'jax-cuda12-plugin': 'cuda12', 'libtpu': 'tpu'}
TPU_VARIABLES = ('COLAB_TPU_ADDR', 'ISTPUVM', 'TPU_ACCELERATOR_TYPE', 'TPU_NAME')
TPU_DEVICES = ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*')


def install() -> None:
    """Installs the checkout with the requirements and the extra for this machine, by one pip command.

    Raises:
      subprocess.CalledProcessError: pip failed; its message is printed above.
      SystemExit: the runtime must be restarted, because a replaced package was already imported.
    """
    extra = choose_extra(installed_plugins(), has_gpu(), has_tpu())
    target = f'{ROOT}[{extra}]' if extra else str(ROOT)
    print(f'pip install -e {target}', flush=True)
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--editable', target], check=True)
    importlib.invalidate_caches()
    if message := restart_message():
        raise SystemExit(message)


def choose_extra(plugins: set[str], gpu: bool, tpu: bool) -> str:
    """Returns the extra of pyproject.toml that fits a machine, or '' for a CPU.

    Args:
      plugins: the names of `PLUGINS` that are installed. They take precedence: JAX fails with a plugin of another
        version and with two plugins for one device, so an installed one is upgraded in place.
      gpu: whether there is an NVIDIA GPU. cuda12 also works with drivers older than 580.
      tpu: whether there is a TPU.
    """
    for package, extra in PLUGINS.items():
        if package in plugins:
            return extra
    if gpu:
        return 'cuda12'
    return 'tpu' if tpu else ''


def installed_plugins() -> set[str]:
    """Returns the names of `PLUGINS` that are installed."""
    return {package for package in PLUGINS if installed_version(package)}


def has_gpu() -> bool:
    """Returns whether the machine has an NVIDIA GPU with a driver."""
    # nvidia-smi may exist without a driver; then it fails.
    return shutil.which('nvidia-smi') is not None and not subprocess.run(['nvidia-smi'], capture_output=True).returncode


def has_tpu() -> bool:
    """Returns whether the machine has a TPU."""
    return any(name in os.environ for name in TPU_VARIABLES) or any(glob.glob(device) for device in TPU_DEVICES)


def restart_message(packages: tuple[str, ...] = ('jax', 'jaxlib', 'flax', 'numpy')) -> str:
    """Returns a message about packages that were imported in another version than the installed one, or ''."""
    imported = {name: sys.modules[name].__version__ for name in packages if name in sys.modules}
    stale = [
        f'{name} {version} is imported, {installed_version(name)} is installed'
        for name, version in imported.items()
        if version != installed_version(name)
    ]
    return f'Restart the runtime, then run this cell again: {"; ".join(stale)}.' if stale else ''


def installed_version(package: str) -> str | None:
    """Returns the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
