"""The command line: flags, the config, the job. The only file that knows flags.

python -m vqvae2_jax.main --config=configs/fashion.py                      # everything that is missing, in order
python -m vqvae2_jax.main --config=configs/fashion.py --job=prior --level=top
vqvae2 --config=fashion --config.sample.count=50000 --job=sample           # the same, from any directory
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from vqvae2_jax import xla_flags
from vqvae2_jax.config import build as configs
from vqvae2_jax.config import validation
from vqvae2_jax.config.files import config_path
from vqvae2_jax.data.decode import UnreadableImage
from vqvae2_jax.distributed import processes
from vqvae2_jax.io import gcs
from vqvae2_jax.io.files import StaleInputError
from vqvae2_jax.jobs.pipeline import JOBS, run_job
from vqvae2_jax.jobs.workdir import JobError, Run
from vqvae2_jax.planning.hardware import topology_devices
from vqvae2_jax.training.checkpoint import CheckpointMismatch
from vqvae2_jax.training.loop import NonFiniteLoss

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'A config of the package such as fashion, or a .py file; --config.a.b=value sets a field.'
)
_parse_config = flags.FLAGS['config'].parser.parse
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; runs/<config.name> when not given.')
_JOB = flags.DEFINE_enum('job', 'pipeline', JOBS, 'What to do; pipeline: all jobs whose results are missing, in order.')
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'This process is one of many (parallel.start_processes).')
_TOPOLOGY = flags.DEFINE_string(
    'topology', None, 'With --job=plan: a TPU slice such as v5e:4x8 or GPUs such as h100:8, which need not be there.'
)
_LEVEL = flags.DEFINE_string('level', None, 'With --job=prior: which level (top, bottom, ...); all when not given.')


def _read_config(name):
    # After a colon there may be an argument of get_config. With every field in place, flags can set those that the
    # config leaves at their defaults.
    name, *argument = name.split(':', 1)
    try:
        config = _parse_config(':'.join([str(config_path(name)), *argument]))
    except FileNotFoundError as error:
        raise ValueError(error) from error  # absl reports a ValueError of a parser in one line
    return configs.complete(config) if isinstance(config, ConfigDict) else config


flags.FLAGS['config'].parser.parse = _read_config


def main(_) -> None:
    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells at length of every file
    if not _TOPOLOGY.value:  # the compiler of another platform may not know the flag, and abort
        xla_flags.set_cpu_flags()
    if _DISTRIBUTED.value:
        processes.initialize_distributed()
        if not processes.is_main_process():
            sys.stdout = open(os.devnull, 'w')  # one process tells what happens; errors are told by all
    config = _CONFIG.value
    try:
        workdir = _workdir(config)
        with parallel.use(configs.make_mesh(config, _devices())):
            validation.check(config)
            if _DISTRIBUTED.value:
                print(processes.describe_mesh(), flush=True)
            run_job(Run(config, workdir), _JOB.value, _LEVEL.value)
    except (
        configs.ConfigError,
        JobError,
        StaleInputError,
        UnreadableImage,
        CheckpointMismatch,
        NonFiniteLoss,
    ) as error:
        # These say what to do; a traceback would only hide it.
        sys.exit(f'error: {error}')


def _workdir(config):
    path = _WORKDIR.value or os.path.join('runs', config.name)
    if gcs.is_remote(path) and configs.image_spec(config).on_error == 'skip':
        raise JobError(
            f'data.on_error=skip keeps a growing list, which --workdir={path} on a bucket cannot hold: '
            'set --config.data.on_error=raise, or take a local folder'
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


def _explain_field(arguments: list[str]) -> None:
    """Exits with a message about the first --config.a.b that is no field, or is a whole section; else does nothing."""
    paths = [a.partition('=')[2] for a in arguments if a.startswith('--config=')]
    try:
        config = flags.FLAGS['config'].parser.parse(paths[-1]) if paths else None
    except ValueError:  # the config itself cannot be read
        return
    if not isinstance(config, ConfigDict):
        return
    for argument in arguments:
        if not argument.startswith('--config.'):
            continue
        section, place = config, []
        for name in argument.removeprefix('--config.').partition('=')[0].split('.'):
            if not isinstance(section, ConfigDict):
                sys.exit(f'error: {".".join(place)} is a value, without fields')
            try:
                configs.check_names('.'.join(place) or 'config', [name], list(section), ())
            except configs.ConfigError as error:
                sys.exit(f'error: {error}')
            section = section[name]
            place.append(name)
        if isinstance(section, ConfigDict):
            field, first = '.'.join(place), next(iter(section))
            sys.exit(f'error: {field} has the fields {", ".join(section)}: set one, as in --config.{field}.{first}=')


def _parse(arguments: list[str]) -> list[str]:
    """absl's parser, with a mistyped config field or a missing file reported in one line."""
    try:
        rest = flags.FLAGS(arguments)
        if _CONFIG.value is None:
            sys.exit('error: --config is missing, for example --config=fashion')
        _CONFIG.value.to_dict()  # a config file that could not be read fails here, not at the flag
    except (AttributeError, KeyError, OSError, flags.Error) as error:
        _explain_field(arguments)
        while error.args and isinstance(error.args[0], BaseException):  # ml_collections wraps one in another
            error = error.args[0]
        message = error.args[0] if isinstance(error, KeyError) else error  # str(KeyError) is quoted and escaped
        sys.exit(f'error: {" ".join(str(message).split())}')
    if len(rest) > 1:
        sys.exit(f'error: unexpected argument {rest[1]!r}; flags look like --config=fashion')
    return rest


def run() -> None:
    """Runs the command line; the console script `vqvae2` starts here."""
    app.run(main, flags_parser=_parse)


if __name__ == '__main__':
    run()
