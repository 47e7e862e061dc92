"""Trains, samples and evaluates VQ-VAE-2.

python -m vqvae2_jax.main --config=configs/fashion.py                      # everything that is missing, in order
python -m vqvae2_jax.main --config=configs/fashion.py --job=prior --level=top
vqvae2 --config=fashion --config.sample.count=50000 --job=sample           # from any directory
"""

import ast
import contextlib
import os
import re
import sys

from vqvae2_jax.io import terminal

if __name__ == '__main__':
    terminal.prepare()  # the other imports take seconds

from absl import app, flags, logging
from ml_collections import ConfigDict

from vqvae2_jax import xla_flags
from vqvae2_jax.config import build
from vqvae2_jax.config.fields import ConfigError, expand_home
from vqvae2_jax.config.loading import load_config
from vqvae2_jax.config.validation import check_names, validate_config
from vqvae2_jax.data.decode import UnreadableImage
from vqvae2_jax.distributed import processes
from vqvae2_jax.io import remote
from vqvae2_jax.io.files import WriteError
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import pretrained, remedies
from vqvae2_jax.jobs.pipeline import JOBS, run_job
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.planning.hardware import topology_devices
from vqvae2_jax.training.checkpoint import CheckpointMismatch
from vqvae2_jax.training.finite import NonFiniteLoss

_CONFIG = flags.DEFINE_string(
    'config', None, 'A config of the package such as fashion, or a .py file; --config.a.b=value sets a field.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run; runs/<config.name> if not given.')
_JOB = flags.DEFINE_enum('job', 'pipeline', JOBS, 'The job; pipeline: all jobs with missing results, in order.')
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'This process is one of many (processes.initialize_distributed).'
)
_TOPOLOGY = flags.DEFINE_string(
    'topology', None, 'With --job=plan: a TPU slice such as v5e:4x8 or GPUs such as h100:8; they need not be attached.'
)
_LEVEL = flags.DEFINE_string('level', None, 'With --job=prior: the level (top, bottom, ...); all if not given.')
_CONTINUE_FROM = flags.DEFINE_integer(
    'continue_from',
    None,
    'With --job=vqvae, prior or classifier: the step of a checkpoint to continue from, with changed fields '
    '--config.<network>.training; later checkpoints move to abandoned/.',
    lower_bound=0,
)
_FROM = flags.DEFINE_string(
    'from',
    None,
    'Trained networks: a model of the package such as fashion, a workdir, a .safetensors file or hf://OWNER/NAME. With '
    '--job=vqvae or prior training starts from them; other jobs that use them import them into the workdir. Without '
    '--config their config is used. With --job=import also: a PyTorch VQ-VAE (.pt), or an LMDB of its codes.',
)
_TO = flags.DEFINE_string(
    'to',
    None,
    'With --job=export: the file to write: NAME.safetensors, NAME.pt for PyTorch (stage 1), or NAME.npz, programs that '
    'run with JAX alone.',
)


def main(config: ConfigDict) -> None:
    """Runs the job that the parsed flags name; mistakes of the user end with one line.

    Args:
      config: the complete config, not yet validated.
    """
    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # Orbax logs many lines about every file
        # Its threads log errors with tracebacks, which the main thread raises again.
        logging.get_absl_logger().addFilter(lambda line: 'orbax' not in line.pathname)
    if not _TOPOLOGY.value:  # the compiler of another platform may not know the flag, and abort
        xla_flags.set_cpu_flags()
    try:
        with remedies.of_processes() if _DISTRIBUTED.value else contextlib.nullcontext():
            _run(config)
    except WriteError as error:
        terminal.end(f'error: {error}')
    except (ConfigError, JobError, UnreadableImage, CheckpointMismatch, NonFiniteLoss) as error:
        # The message says what to do; a traceback would only hide it.
        sys.exit(f'error: {error}')


def _run(config):
    if _DISTRIBUTED.value:
        processes.initialize_distributed()
        if not processes.is_main_process():
            sys.stdout = open(os.devnull, 'w', errors='replace')  # only process 0 prints; all processes print errors
    devices = _devices()
    validate_config(config)
    source, target = (flag.value and expand_home(flag.value, f'--{flag.name}') for flag in (_FROM, _TO))
    run = Run(config, _workdir(config), devices, _CONTINUE_FROM.value, source, target)
    if _DISTRIBUTED.value:
        print(processes.describe_mesh(run.mesh), flush=True)
    run_job(run, _JOB.value, _LEVEL.value)


def _workdir(config):
    path = expand_home(_WORKDIR.value or os.path.join('runs', config.name), '--workdir')
    if remote.is_remote(path) and build.skips_unreadable(config):
        raise JobError(
            f'data.on_error=skip keeps a growing list, which --workdir={path} on a bucket cannot hold: '
            'set --config.data.on_error=raise, or give a local directory'
        )
    try:
        remote.check(path, for_writing=True)
    except ValueError as error:
        raise JobError(f'--workdir={error}') from error
    return remote.absolute(path)


def _devices():
    if not _TOPOLOGY.value:
        return None  # all there are
    if _JOB.value != 'plan':
        raise JobError(f'--topology={_TOPOLOGY.value} belongs to --job=plan, not to --job={_JOB.value}')
    return topology_devices(_TOPOLOGY.value)


def _parse(arguments: list[str]) -> ConfigDict:
    """Parses the command line and returns the config; a mistake in either is printed in one line."""
    flags.FLAGS.set_gnu_getopt()  # other flags may follow the text of `--config.<field> <text>`
    try:
        arguments = flags.FLAGS(arguments, known_only=True)
        config = _load_config(arguments)
        rest = flags.FLAGS(override_fields(config, arguments))  # refuses unknown flags
        if len(rest) > 1:
            raise ConfigError(f'unexpected argument {rest[1]!r}; flags look like --config=fashion')
        return config
    except (ConfigError, FileNotFoundError, flags.Error, JobError) as error:
        sys.exit(f'error: {" ".join(str(error).split())}')


def _load_config(arguments):
    """Returns the config that --config names, or that of the networks of --from."""
    if _CONFIG.value is not None:
        return load_config(_CONFIG.value)
    flags.FLAGS([a for a in arguments if not re.match(r'--?(no)?config\.', a)])  # a misspelled --config is unknown
    source = _FROM.value and expand_home(_FROM.value, '--from')
    if source and pretrained.is_generator(source):
        return pretrained.load_config(source)
    raise ConfigError('--config is missing, for example --config=fashion')


def override_fields(config: ConfigDict, arguments: list[str]) -> list[str]:
    """Sets fields as `--config.<field>=<text>` says, for `validate_config` to check; returns the other arguments.

    A tuple that is given several times is the sum of all, as in ml_collections.config_flags.

    Raises:
      ConfigError: there is no such field, or its value is missing.
    """
    others, given, remaining = [], set(), iter(arguments)
    for argument in remaining:
        match = re.fullmatch(r'--?(no)?config\.([^=]*)(?:=(.*))?', argument, re.DOTALL)
        if not match:
            others.append(argument)
            continue
        no, path, text = match.groups()
        section, name, value = _find_field(config, path)
        if isinstance(value, ConfigDict):
            text, no = text or '', None  # validate_config says which fields it has
        if text is None and isinstance(value, bool):
            text, no = str(not no), None
        elif text is None:
            text = next(remaining, None)
        if no or text is None:
            raise ConfigError(f'{argument} has no value: give one, as in --config.{path}=<value>')
        parsed = _parse_value(text, value)
        with section.ignore_type():
            section[name] = (*value, *parsed) if isinstance(value, tuple) and path in given else parsed
        given.add(path)
    return others


def _find_field(config, path):
    """Returns (section, name, value) of the field at a dotted path; raises ConfigError if there is none."""
    value, walked = config, []
    for name in path.split('.'):
        section = value
        if not isinstance(section, ConfigDict):
            raise ConfigError(f'{".".join(walked)} is a value, without fields')
        check_names('.'.join(walked) or 'config', [name], section, complete=False)
        value = section[name]
        walked.append(name)
    return section, name, value


def _parse_value(text, default):
    """Returns the Python literal in a text, or the text itself if it is none or if the default is a string."""
    if isinstance(default, str):
        return text
    try:
        value = flags.BooleanParser().parse(text) if isinstance(default, bool) else ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # all that ast.literal_eval raises
        value = text
    return (value,) if isinstance(default, tuple) and not isinstance(value, tuple | list) else value


def run() -> None:
    """Runs the command line."""
    terminal.prepare()
    if sys.stdout is not None:  # names of files may hold bytes that are not UTF-8
        sys.stdout.reconfigure(errors='backslashreplace')
    # --help describes the main module, which is not this one if a console script imports it.
    sys.modules['__main__'].__doc__ = __doc__
    for flag in (_CONFIG, _WORKDIR, _JOB, _DISTRIBUTED, _TOPOLOGY, _LEVEL, _CONTINUE_FROM, _FROM, _TO):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
    app.run(main, flags_parser=_parse)


if __name__ == '__main__':
    run()
