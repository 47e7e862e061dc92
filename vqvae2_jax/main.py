"""The command line: flags, the config, the job. The only file that knows flags.

python -m vqvae2_jax.main --config=configs/fashion.py                      # everything that is missing, in order
python -m vqvae2_jax.main --config=configs/fashion.py --job=prior --level=top
vqvae2 --config=fashion --config.sample.count=50000 --job=sample           # the same, from any directory
"""

import ast
import os
import re
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from vqvae2_jax import xla_flags
from vqvae2_jax.config import base
from vqvae2_jax.config import build as configs
from vqvae2_jax.config.fields import ConfigError
from vqvae2_jax.config.loading import load_config
from vqvae2_jax.config.validation import check_batch_sizes, check_names, validate_config
from vqvae2_jax.data.decode import UnreadableImage
from vqvae2_jax.distributed import processes
from vqvae2_jax.io import gcs
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs.pipeline import JOBS, run_job
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.planning.hardware import topology_devices
from vqvae2_jax.training.checkpoint import CheckpointMismatch
from vqvae2_jax.training.loop import NonFiniteLoss

_CONFIG_HELP = 'A config of the package such as fashion, or a .py file; --config.a.b=value sets a field.'
# For --help. When the command line names a config, the flag is replaced by one with all fields of that config.
flags.DEFINE_string('config', None, _CONFIG_HELP, allow_override=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run; runs/<config.name> if not given.')
_JOB = flags.DEFINE_enum('job', 'pipeline', JOBS, 'The job; pipeline: all jobs with missing results, in order.')
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'This process is one of many (processes.initialize_distributed).'
)
_TOPOLOGY = flags.DEFINE_string(
    'topology', None, 'With --job=plan: a TPU slice such as v5e:4x8 or GPUs such as h100:8; they need not be attached.'
)
_LEVEL = flags.DEFINE_string('level', None, 'With --job=prior: the level (top, bottom, ...); all if not given.')


def main(_: list[str]) -> None:
    """Runs the job that the parsed flags name; mistakes of the user end with one line."""
    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # Orbax logs many lines about every file
    if not _TOPOLOGY.value:  # the compiler of another platform may not know the flag, and abort
        xla_flags.set_cpu_flags()
    if _DISTRIBUTED.value:
        processes.initialize_distributed()
        if not processes.is_main_process():
            sys.stdout = open(os.devnull, 'w')  # only process 0 prints; all processes print errors
    config = flags.FLAGS.config
    try:
        devices = _devices()
        validate_config(config)
        run = Run(config, _workdir(config), devices)
        check_batch_sizes(config, run.mesh.devices.shape)
        if _DISTRIBUTED.value:
            print(processes.describe_mesh(run.mesh), flush=True)
        run_job(run, _JOB.value, _LEVEL.value)
    except (ConfigError, JobError, UnreadableImage, CheckpointMismatch, NonFiniteLoss) as error:
        # The message says what to do; a traceback would only hide it.
        sys.exit(f'error: {error}')


def _workdir(config):
    path = _WORKDIR.value or os.path.join('runs', config.name)
    if gcs.is_remote(path) and configs.image_spec(config).on_error == 'skip':
        raise JobError(
            f'data.on_error=skip keeps a growing list, which --workdir={path} on a bucket cannot hold: '
            'set --config.data.on_error=raise, or give a local directory'
        )
    try:
        gcs.check(path)
    except ValueError as error:
        raise JobError(f'--workdir={error}') from error
    return gcs.absolute(path)


def _devices():
    if not _TOPOLOGY.value:
        return None  # all there are
    if _JOB.value != 'plan':
        raise JobError(f'--topology={_TOPOLOGY.value} belongs to --job=plan, not to --job={_JOB.value}')
    return topology_devices(_TOPOLOGY.value)


def _parse(arguments: list[str]) -> list[str]:
    """Parses the command line; a mistake in it, or in the config, is printed in one line."""
    try:
        arguments = flags.FLAGS.read_flags_from_files(arguments, force_gnu=False)
        name, others = _take_config(arguments)
        if name is not None:
            config = load_config(name)
            if not isinstance(config, ConfigDict):
                raise ConfigError(f'get_config() of {name} returns no ml_collections.ConfigDict')
            _check_overrides(config, others)
            config_flags.DEFINE_config_dict('config', config, _CONFIG_HELP, sys_argv=others, allow_override=True)
        rest = _parse_flags(others, None if name is None else config)
    except (ConfigError, FileNotFoundError, flags.Error) as error:
        sys.exit(f'error: {" ".join(str(error).split())}')
    if name is None:
        sys.exit('error: --config is missing, for example --config=fashion')
    if len(rest) > 1:
        sys.exit(f'error: unexpected argument {rest[1]!r}; flags look like --config=fashion')
    return rest


def _take_config(arguments):
    """Returns the value of --config (None without it) and the other arguments."""
    name, others, pending = None, [], False
    for argument in arguments:
        if pending:
            name, pending = argument, False
        elif argument in ('-config', '--config'):
            pending = True
        elif match := re.fullmatch(r'--?config=(.*)', argument, re.DOTALL):
            name = match[1]
        else:
            others.append(argument)
    return name, others


def _overrides(arguments):
    """Yields (field, text or None) for every --config.<field>[=text]."""
    for argument in arguments:
        if match := re.fullmatch(r'--?(?:no)?config\.([^=]*)(?:=(.*))?', argument, re.DOTALL):
            yield match[1], match[2]


def _check_overrides(config, arguments):
    """Raises ConfigError for the first --config.a.b that is not a field."""
    for path, _ in _overrides(arguments):
        section, place = config, []
        for name in path.split('.'):
            if not isinstance(section, ConfigDict):
                raise ConfigError(f'{".".join(place)} is a value, without fields')
            check_names('.'.join(place) or 'config', [name], section, complete=False)
            section = section[name]
            place.append(name)


def _parse_flags(arguments, config):
    """Parses all flags; names the allowed values of the first config field with a value that is not allowed."""
    try:
        return flags.FLAGS(arguments)
    except flags.IllegalFlagValueError:
        levels = config.get('prior') if config is not None else None
        for path, text in _overrides(arguments):
            field = base.find(path, levels) if text is not None and isinstance(levels, ConfigDict) else None
            if isinstance(field, dict):
                first = next(iter(field))
                raise ConfigError(
                    f'{path} is {text!r}; it must be a section with the fields {", ".join(field)}: set one, as in '
                    f'--config.{path}.{first}='
                ) from None
            if field is not None:
                field.check(path, _literal(text))
        raise


def _literal(text):
    try:
        return ast.literal_eval({'true': 'True', 'false': 'False'}.get(text, text))
    except (SyntaxError, ValueError):
        return text


def run() -> None:
    """Runs the command line; the console script `vqvae2` starts here."""
    app.run(main, flags_parser=_parse)


if __name__ == '__main__':
    run()
