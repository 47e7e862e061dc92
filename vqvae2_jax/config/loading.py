"""Experiment configs: Python files with a function `get_config()`. They are loaded by path and never imported by name.

A checkout keeps them in `configs/`, an installed wheel in `vqvae2_jax/configs/`.
"""

import importlib.util
import os
import pathlib
import re
import traceback

import ml_collections
from ml_collections import ConfigDict

from vqvae2_jax.config.fields import ConfigError

_PACKAGE = pathlib.Path(__file__).parents[1]
_ML_COLLECTIONS = str(pathlib.Path(ml_collections.__file__).parent)


def config_directory() -> pathlib.Path:
    """Returns the directory of the configs that come with the package."""
    installed = _PACKAGE / 'configs'
    return installed if installed.is_dir() else _PACKAGE.parent / 'configs'


def load_config(name: str | os.PathLike) -> ConfigDict:
    """Loads a config, for example as the start of another one.

    Args:
      name: the name of a config that comes with the package, such as 'fashion', or the path of a .py file. After a
        colon there may be an argument for the file's `get_config`.

    Returns:
      The result of the file's `get_config()`: a new ConfigDict, locked if it starts from `base.get_config`.

    Raises:
      FileNotFoundError: there is no such config; the message lists those of the package.
      ConfigError: the file sets an unknown field, or a value of another type (the message has its line), or
        `get_config` returns no ConfigDict.
    """
    directory, text = config_directory(), os.fspath(name)
    is_path = re.fullmatch(r'(.*?\.py)(?::(.*))?', text, re.DOTALL)  # a folder may have a colon in its name
    name, *argument = [part for part in is_path.groups() if part is not None] if is_path else text.split(':', 1)
    path = pathlib.Path(name).expanduser() if is_path else directory / f'{name}.py'
    if not path.is_file():
        names = ', '.join(sorted(file.stem for file in directory.glob('*.py')))
        raise FileNotFoundError(
            f'there is no {"file" if is_path else "config"} {name!r}: give the path of a .py file, or one of the names '
            f'{names}'
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*argument)
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not frames[-1].filename.startswith(_ML_COLLECTIONS):
            raise  # a mistake in the file, for which the traceback is the best message
        last = [frame for frame in frames if not frame.filename.startswith(_ML_COLLECTIONS)][-1]
        raise ConfigError(f'{last.filename}, line {last.lineno}: {_one_line(error)}') from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f'get_config() of {name} returns no ml_collections.ConfigDict')
    return config


def _one_line(error):
    """Returns the message of ml_collections without its list of all other fields."""
    while error.args and isinstance(error.args[0], BaseException):  # it wraps one error in another
        error = error.args[0]
    message = str(error.args[0])
    if ' ' not in message:  # the name alone
        return f'there is no field {message}'
    first, _, rest = message.partition(' Other fields present:')
    hint = rest.rpartition('Did you mean')[2].strip() if 'Did you mean' in rest else ''
    return ' '.join((f'{first} Did you mean {hint}' if hint else first).split())
