"""Experiment configs: Python files with a function `get_config()`. They are found by path and never imported by name.

A checkout keeps them in `configs/`, an installed wheel in `vqvae2_jax/configs/`.
"""

import importlib.util
import os
import pathlib

from ml_collections import ConfigDict

_PACKAGE = pathlib.Path(__file__).parent


def config_directory() -> pathlib.Path:
    """The directory of the configs that come with the package."""
    installed = _PACKAGE / 'configs'
    return installed if installed.is_dir() else _PACKAGE.parent / 'configs'


def config_path(name: str | os.PathLike) -> pathlib.Path:
    """The file of a config.

    Args:
      name: the name of a config that comes with the package, such as 'fashion', or the path of a .py file.

    Raises:
      FileNotFoundError: there is no such config; the message lists those of the package.
    """
    name, directory = os.fspath(name), config_directory()
    path = pathlib.Path(name).expanduser() if name.endswith('.py') else directory / f'{name}.py'
    if not path.is_file():
        names = ', '.join(sorted(file.stem for file in directory.glob('*.py')))
        missing = 'file' if name.endswith('.py') else 'config'
        raise FileNotFoundError(
            f'there is no {missing} {name!r}: give the path of a .py file, or one of the names {names}'
        )
    return path


def load_config(name: str | os.PathLike) -> ConfigDict:
    """Loads a config, for example as the base of another one.

    Args:
      name: as in `config_path`.

    Returns:
      The result of the file's `get_config()`: a new, unlocked ConfigDict.

    Raises:
      FileNotFoundError: as `config_path`.
    """
    path = config_path(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
