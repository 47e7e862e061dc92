"""Continues a training from sound files: sets damaged checkpoints aside, trains lost weights again.

A training repeats its steps exactly: lost weights come back if a checkpoint from before them is sound.
"""

import functools
import json
import os
from typing import Any

import fsspec
from etils import epath

from vqvae2_jax.distributed import processes
from vqvae2_jax.io import checksums, files, record, remote
from vqvae2_jax.io.record import DamagedError, JobError, Record, UnreadableError
from vqvae2_jax.training.checkpoint import (
    BEST,
    CHECKPOINTS,
    DAMAGED,
    ORBAX_METADATA,
    WEIGHTS,
    checkpoint_steps,
    read_best,
)

_ABANDONED = 'abandoned'


def restore_record(directory: epath.Path) -> None:
    """Writes a lost or damaged record of a training again, from its newest sound checkpoint. On the main process only.

    Raises:
      JobError: the record is damaged, and no checkpoint has a sound one.
    """
    try:
        output, is_damaged, problem = record.read(directory), False, f'{directory / record.FILE} is missing'
    except DamagedError as error:
        output, is_damaged, problem = None, True, str(error)
    if output is not None:
        return
    steps = checkpoint_steps(directory / CHECKPOINTS)
    for step in reversed(steps):
        saved, _ = _read(directory / CHECKPOINTS / str(step))
        if saved is not None:
            print(f'{problem}. Writing it again from checkpoint {step}', flush=True)
            output = Record(directory, saved.job, saved.inputs, saved.settings, record.STARTED)
            output.devices, output.changes = saved.devices, saved.changes
            output.write()
            return
    if steps or is_damaged:
        raise JobError(
            f'{problem}, and no checkpoint has a copy: restore it from a backup, or delete {directory} to train from '
            'the start'
        )


def recover(directory: epath.Path, name: str, *, has_record: bool = True) -> None:
    """Sets damaged checkpoints aside, so that the training continues from a sound one. All processes together.

    If the best weights are damaged, the training goes back to a checkpoint from before them.

    Args:
      directory: the directory of the training.
      name: its name in messages.
      has_record: whether the directory has a record; without one, and without checkpoints, weights are not kept, as
        they may be of other settings.

    Raises:
      JobError: no checkpoint is sound, or none from before the damaged weights.
    """
    checkpoints = directory / CHECKPOINTS
    steps = processes.run_on_main_process(lambda: _list_checkpoints(checkpoints))
    sound, damaged = None, {}
    for step in reversed(steps):
        if not (problem := _problem_of(checkpoints / str(step))):
            sound = step
            break
        damaged[step] = problem
    if damaged and sound is None:  # nothing is renamed: the same command says the same
        raise JobError(
            f'{name}: {"; ".join(damaged.values())}. No checkpoint is sound: restore the directory from a '
            f'backup, or delete {directory} to train from the start'
        )
    for step, problem in damaged.items():
        processes.run_on_main_process(functools.partial(set_aside, checkpoints, step))
        print(f'{name}: {problem}. It is set aside as {checkpoints / f"{step}{DAMAGED}"}', flush=True)
    if damaged:
        print(f'{name}: training continues from step {sound}: {_repeated(steps[-1] - sound)}', flush=True)
    if not has_record and not steps:
        processes.run_on_main_process(lambda: _write_best(directory, None))
    problem, best = processes.run_on_main_process(lambda: _check_best(directory, sound))
    if problem:
        _recover_weights(directory, name, problem, best)


def _repeated(steps):
    return {0: 'no step is repeated', 1: '1 step is repeated'}.get(steps, f'{steps} steps are repeated')


def _recover_weights(directory, name, problem, best) -> None:
    """Goes back to a sound checkpoint from before the damaged best weights, or to one whose best weights are sound."""
    checkpoints = directory / CHECKPOINTS
    steps = processes.run_on_main_process(lambda: checkpoint_steps(checkpoints))
    for step in reversed(steps):
        if damaged := _problem_of(checkpoints / str(step)):
            print(f'{name}: {damaged}', flush=True)
            continue
        earlier, sound = processes.run_on_main_process(functools.partial(_best_at, directory, step))
        best = best or earlier  # of the newest checkpoint, if best.json itself is damaged
        if sound or earlier is None or best['step'] > step:
            processes.run_on_main_process(functools.partial(go_back, directory, step, earlier if sound else None))
            print(f'{name}: {problem}. Continuing from step {step}; {_repeated(steps[-1] - step)}', flush=True)
            return
    if steps:
        raise JobError(
            f'{name}: {problem}, and no sound checkpoint is from before these weights: restore the directory '
            f'from a backup, or delete {directory} to train from the start'
        )
    print(f'{name}: {problem}. There is no checkpoint: trains from the start', flush=True)
    processes.run_on_main_process(lambda: _write_best(directory, None))


def check_checkpoint(directory: epath.Path, step: int) -> dict[str, Any] | None:
    """Checks that a training can continue from a checkpoint. On the main process only.

    Args:
      directory: the directory of the training.
      step: step of the checkpoint.

    Returns:
      The best weights at this step, as `BestCheckpoint.best`; None if there was no evaluation before it.

    Raises:
      JobError: there is no such checkpoint, or it is damaged, or the best weights at this step are.
    """
    steps = checkpoint_steps(directory / CHECKPOINTS)
    if step not in steps:
        there = f'at the steps {", ".join(map(str, steps))}' if steps else 'at no step'
        raise JobError(f'--continue_from={step}: {directory} has checkpoints {there}')
    output, problem = _read(directory / CHECKPOINTS / str(step))
    if output is not None:
        best = output.results['best']
        problem = _describe(output.directory, output.find_damaged()) or _weights_problem(directory, best)
    if problem:
        raise JobError(f'--continue_from={step}: {problem}; choose another step of {steps}')
    return best


def _best_at(directory, step) -> tuple[dict[str, Any] | None, bool]:
    """Returns the best weights at a checkpoint, as `BestCheckpoint.best`, and whether they are there and sound."""
    best = record.read(directory / CHECKPOINTS / str(step)).results['best']
    return best, best is not None and not _weights_problem(directory, best)


def go_back(directory: epath.Path, step: int, best: dict[str, Any] | None) -> None:
    """Makes a checkpoint the newest one: moves later ones to abandoned/. On the main process only.

    Args:
      directory: the directory of the training.
      step: step of the checkpoint.
      best: the best weights at this step, as `BestCheckpoint.best`; None: there are none.
    """
    for later in checkpoint_steps(directory / CHECKPOINTS):
        if later > step:
            _move(directory / CHECKPOINTS / str(later), _free_path(directory / _ABANDONED / str(later)))
    _write_best(directory, best)


def set_aside(checkpoints: epath.Path, step: int) -> None:
    """Marks a checkpoint as damaged: renames it to <step>.damaged; on a bucket <step>.damaged is a marker beside it."""
    path = checkpoints / f'{step}{DAMAGED}'
    if remote.is_remote(checkpoints):
        files.write_bytes(path, b'damaged')
    else:
        _move(checkpoints / str(step), _free_path(path))


def _list_checkpoints(checkpoints: epath.Path) -> list[int]:
    """Returns the steps of the checkpoints; removes damaged metadata of Orbax, which it reads but does not need."""
    steps = checkpoint_steps(checkpoints)
    for step in steps:
        path = checkpoints / str(step) / ORBAX_METADATA
        try:
            sound = not path.exists() or isinstance(json.loads(path.read_text()), dict)
        except (ValueError, OSError):
            sound = False
        if not sound:
            files.remove(path)
    return steps


def _read(checkpoint: epath.Path) -> tuple[Record | None, str]:
    """Returns the record of a checkpoint, and '' or the reason why there is none that can be used."""
    try:
        output = record.read(checkpoint)
    except (DamagedError, UnreadableError) as error:
        return None, str(error)
    return output, '' if output else f'{checkpoint / record.FILE} is missing'


def _problem_of(checkpoint: epath.Path) -> str:
    """Returns the damage of a checkpoint, '' if it is sound; all processes together."""
    output, problem = processes.run_on_main_process(functools.partial(_read, checkpoint))
    return problem if output is None else _describe(checkpoint, output.find_damaged_together())


def _weights_problem(directory: epath.Path, best: dict[str, Any] | None) -> str:
    """Returns the damage of the files of the best weights, '' if they are sound or there are none."""
    if best is None:
        return ''
    path = directory / WEIGHTS / best['directory']
    return _describe(path, checksums.find_damaged(path, best['files']))


def _describe(directory: epath.Path, damaged: dict[str, str]) -> str:
    """Returns the first damage of files as text; '' if there is none."""
    return next((f'{directory / name} is damaged: {reason}' for name, reason in damaged.items()), '')


def _check_best(directory: epath.Path, step: int | None) -> tuple[str, dict[str, Any] | None]:
    """Returns the damage of the best weights, '' if they are sound or none are needed; and the content of best.json.

    Args:
      directory: the directory of the training.
      step: step of the checkpoint that the training continues from; None: there is none.
    """
    expected = None if step is None else record.read(directory / CHECKPOINTS / str(step)).results['best']
    try:
        best = read_best(directory)
    except DamagedError as error:
        return str(error), expected
    if best is None:
        return (f'{directory / WEIGHTS / BEST} is missing' if expected else ''), None
    if step is not None and best['step'] <= step and best != expected:
        return f'{directory / WEIGHTS / BEST} is not that of checkpoint {step}', expected
    return _weights_problem(directory, best), best


def _write_best(directory, best):
    path = directory / WEIGHTS / BEST
    if best is None:
        files.remove(path)
    else:
        checksums.write_sealed(path, best)


def _free_path(path: epath.Path) -> epath.Path:
    """Returns a path that does not exist: the path itself, or with '-2', '-3', ... behind its name."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.parent / f'{path.name}-{number}'
    return free


def _move(source: epath.Path, target: epath.Path) -> None:
    """Moves a directory, on a disk or within a bucket."""
    with files.writing(target):
        if remote.is_remote(source):
            system, path = fsspec.core.url_to_fs(os.fspath(source))
            system.mv(path, fsspec.core.url_to_fs(os.fspath(target))[1], recursive=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
