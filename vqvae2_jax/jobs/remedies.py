"""Advice for jobs that end because the devices run out of memory, a training diverges, or another process ends."""

import contextlib
import os
import re
from collections.abc import Iterator

import jax
from etils import epath

from vqvae2_jax.config import build
from vqvae2_jax.io import record
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs.workdir import Run, training_directory, training_job
from vqvae2_jax.planning import hardware
from vqvae2_jax.training.finite import NonFiniteLoss

# What a job computes at once. None of it is part of the settings of an output, except inpaint.count.
_BATCHES = {
    'extract_codes': 'codes.batch_size',
    'sample': 'sample.batch_size',
    'reject': 'evaluate.batch_size',
    'cas': 'codes.batch_size',
    'evaluate': 'evaluate.batch_size',
    'likelihood': 'evaluate.batch_size',
    'inpaint': 'inpaint.count',
    'reconstruct': 'codes.batch_size',
}


# A status of XLA, from collective operations or the coordination service, in all their versions.
_LOST_PROCESS = re.compile(
    '[A-Z_]+: .*(Gloo|Connection (reset|closed|refused)|[Hh]eartbeat|[Cc]oordination|Barrier)|UNAVAILABLE', re.DOTALL
)


@contextlib.contextmanager
def of_processes() -> Iterator[None]:
    """Within the context, which is that of a whole run of several processes, the loss of one ends with one line.

    Raises:
      JobError: another process has ended.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # reading an array raises the second
        if not _LOST_PROCESS.match(str(error)):
            raise
        raise JobError(
            f'another process of this run has ended, see its output ({_first_line(error)}). The same command, started '
            'again on all hosts, continues'
        ) from error


@contextlib.contextmanager
def of_job(run: Run, job: str) -> Iterator[None]:
    """Within the context, running out of memory ends with one line.

    Raises:
      JobError: the devices ran out of memory; it names the batch size of the job.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if job not in _BATCHES or not _is_out_of_memory(error):
            raise
        field = _BATCHES[job]
        now, least = run.config[field.partition('.')[0]][field.partition('.')[2]], run.mesh.size
        remedy = (
            f'Lower --config.{field}, which is {now}, for example to {max(now // 2, least)}; what is written is kept'
            if now > least
            else f'{field} is {now}, which {least} devices cannot share further: use devices with more memory'
        )
        raise JobError(f'{job}: {_first_line(error)}. {remedy}') from error


@contextlib.contextmanager
def of_training(run: Run, section: str, directory: epath.Path) -> Iterator[None]:
    """Within the context, running out of memory and metrics that are not finite end with what to do next.

    Args:
      run: the run.
      section: section of the config of the network that is trained.
      directory: the directory of the training.

    Raises:
      JobError: the devices ran out of memory.
      NonFiniteLoss: with the advice.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise JobError(f'{directory}: {_first_line(error)}. {_less_memory(run, section, directory)}') from error
    except NonFiniteLoss as error:
        raise NonFiniteLoss(f'{directory}: {error}. {_stabler(run, section, directory, error.saved_steps)}') from error


def _is_out_of_memory(error):
    return str(error).startswith('RESOURCE_EXHAUSTED')


def _first_line(error):
    return str(error).splitlines()[0].removesuffix('.')


def _less_memory(run, section, directory):
    training, path = build.train_config(run.config, section), f'--config.{section}'
    remedies = []
    accelerator = hardware.hardware_of(run.mesh.devices.flat[0])
    if accelerator and accelerator.is_gpu and hardware.GPU_SHARE_VARIABLE not in os.environ:
        remedies.append(f'set the environment variable {hardware.GPU_SHARE_VARIABLE}={hardware.GPU_SHARE}')
    if section != 'vqvae':  # each microbatch has a row for every device
        parts = 2 * training.grad_accum_steps
        if training.batch_size % (run.mesh.shape['data'] * parts) == 0:
            remedies.append(f'set {path}.training.grad_accum_steps={parts}')
    if run.config[section].get('remat', 'blocks') != 'blocks':
        remedies.append(f'set {path}.remat=blocks')
    if training.batch_size > run.mesh.size:
        remedies.append(
            f'delete {directory} to train with a lower {path}.training.batch_size than {training.batch_size}'
        )
    if not remedies:
        return 'Use devices with more memory, or a smaller network'
    return f'To need less memory, {", or ".join(remedies)}'


def _stabler(run, section, directory, saved_steps):
    training, path = build.train_config(run.config, section), f'--config.{section}.training'
    changes = f'{path}.learning_rate={training.learning_rate / 2:.3g}'
    if not training.clip_norm:
        changes += f' or {path}.clip_norm=1.0'
    again = 'No such state was saved, and the same command would diverge again'
    if not saved_steps or directory.name != training_directory(section):
        return f'{again}: delete {directory} to train with {changes}'
    command = record.job_command(training_job(section))
    *earlier, latest = saved_steps
    # The last checkpoint may be finite and diverge all the same.
    others = ''.join(f', or if that diverges too, with --continue_from={step}' for step in reversed(earlier))
    return (
        f'{again}: {command} --continue_from={latest} {changes}{others}, or delete {directory} to train with them from '
        'the start'
    )
