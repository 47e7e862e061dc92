"""Checkpoints: the train states that a run resumes from, and the best weights, which later jobs read.

A checkpoint has a record of its own (io/record.py) with the checksums of its files; `weights/best.json` has those of
the best weights. `recovery.recover` sets damaged ones aside before a training continues.
"""

import dataclasses
import math
import re
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vqvae2_jax.distributed import processes
from vqvae2_jax.io import checksums, files, record, remote
from vqvae2_jax.io.record import DamagedError, Record

CHECKPOINTS, WEIGHTS, BEST = 'checkpoints', 'weights', 'best.json'
ORBAX_METADATA = '_CHECKPOINT_METADATA'  # times; Orbax writes it again after everything else, and restores without it
DAMAGED = '.damaged'  # <step>.damaged is a checkpoint that was set aside; on a bucket a marker beside it


class CheckpointMismatch(ValueError):
    """A checkpoint does not fit the train state of this network."""


class Checkpoints:
    """The last two train states of a run, in `checkpoints/`, each with the state of its data iterator.

    They are saved asynchronously. A killed run leaves no partial checkpoint.
    """

    def __init__(self, directory: epath.PathLike, output: Record | None = None):
        """Opens the checkpoints of a training.

        Args:
          directory: the directory of the training.
          output: its record, of which each checkpoint gets a copy; None: a record without inputs and settings.
        """
        self._directory = remote.absolute(directory) / CHECKPOINTS
        self._output = output or Record(self._directory.parent, '', {}, {})
        self._step, self._size, self._best = 0, 0, None  # of the save in progress
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            create=True,
            # Created asynchronously, a directory that cannot be made leaves the other threads waiting for minutes.
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._write_record, create_directories_asynchronously=False
            ),
        )
        with files.writing(self._directory):
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints that process 0 sees, ascending. All processes together."""
        return processes.run_on_main_process(lambda: sorted(self._unmarked_steps()))

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint that process 0 sees, or None. All processes together."""
        return max(self.steps(), default=None)

    def _unmarked_steps(self):
        steps = self._manager.all_steps()
        if not remote.is_remote(self._directory):  # a damaged one has another name there
            return steps
        return [step for step in steps if not (self._directory / f'{step}{DAMAGED}').exists()]

    def save(
        self,
        step: int,
        state: Any,
        iterator: grain.DatasetIterator,
        pending: list[dict[str, float]],
        best: dict[str, Any] | None = None,
    ) -> None:
        """Saves a checkpoint, unless this step has one. All processes together.

        Args:
          step: number of updates done.
          state: the train state, of any sharding.
          iterator: batches of the training data; its state must be the same on every process.
          pending: metrics of the steps since the last log line.
          best: `BestCheckpoint.pin()` after this step.
        """
        if self.latest_step() == step:
            return
        self.wait()
        if remote.is_remote(self._directory):  # a damaged one may be there, with a marker
            if step in self._manager.all_steps():
                self._manager.delete(step)
            processes.run_on_main_process(lambda: files.remove(self._directory / f'{step}{DAMAGED}'))
        items = {
            'state': ocp.args.StandardSave(state),
            'data': ocp.args.JsonSave(iterator.get_state()),
            'pending_metrics': ocp.args.JsonSave(list(pending)),  # a copy, since it is written later
        }
        self._step, self._best = step, best
        self._size = sum(x.nbytes for x in jax.tree.leaves(state))
        with files.writing(self._directory / str(step), self._size):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def _write_record(self) -> None:
        """Writes the record of a checkpoint. Orbax calls this when all its files are complete, before it is renamed."""
        if not processes.is_main_process():
            return
        # Orbax gives it its name later, or on a bucket writes there at once.
        name = re.compile(rf'{self._step}(\.orbax-checkpoint-tmp.*)?')
        directory = next(path for path in self._directory.iterdir() if name.fullmatch(path.name))
        output = dataclasses.replace(self._output, directory=directory, results={'best': self._best}, digest='')
        output.files = checksums.file_entries(directory)
        output.files.pop(ORBAX_METADATA, None)
        output.write()

    def restore(self, step: int, like: Any, iterator: grain.DatasetIterator) -> tuple[Any, list[dict[str, float]]]:
        """Restores a checkpoint. All processes together.

        Args:
          step: a step that has a checkpoint.
          like: a train state of `jax.ShapeDtypeStruct` with shardings; the number of devices may have changed.
          iterator: batches of the training data; it is set to continue after this step.

        Returns:
          The train state, and the pending metrics.

        Raises:
          CheckpointMismatch: the checkpoint is of another network, perhaps of an older version.
        """
        items = {
            'state': ocp.args.StandardRestore(like),
            'data': ocp.args.JsonRestore(),
            'pending_metrics': ocp.args.JsonRestore(),
        }
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except ValueError as error:  # Orbax has no class for it
            raise CheckpointMismatch(
                f'{self._directory}/{step} does not fit the train state of this network: {error}\n'
                f'If another version wrote it, delete {self._directory.parent} to train from the start.'
            ) from error
        iterator.set_state(restored['data'])
        return restored['state'], restored['pending_metrics']

    def wait(self) -> None:
        """Waits until the last save is complete."""
        with files.writing(self._directory / str(self._step), self._size):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until the last save is complete, and ends all threads."""
        self.wait()
        with files.writing(self._directory):
            self._manager.close()


class BestCheckpoint:
    """The best weights of a training so far, in `weights/`: {'params': ..., 'model_state': ...}.

    `weights/best.json` names their directory, with the checksums of its files. They stay until the next ones are
    complete.
    """

    def __init__(self, directory: epath.PathLike):
        self._directory = remote.absolute(directory) / WEIGHTS
        self._best, self._pinned = read_best(directory), None

    def best(self) -> dict[str, Any] | None:
        """Returns {'step', 'metrics', 'directory', 'files'} of the best weights, or None."""
        return self._best

    def pin(self) -> dict[str, Any] | None:
        """Returns `best()` for a checkpoint, and keeps these weights until the next call. All processes together."""
        self._pinned = self._best
        if self._best:
            kept = self._kept_names()
            processes.run_on_main_process(lambda: self._remove_others({*kept, self._best['directory']}))
        return self._best

    def save_if_best(self, step: int, metrics: dict[str, float], metric: str, weights: Any) -> bool:
        """Saves weights if no earlier ones have a smaller value of a metric. All processes together.

        NaN is never best. Equal counts as better, so that a run that resumes before its best step saves it again.

        Args:
          step: number of updates done.
          metrics: metrics of these weights on the validation split.
          metric: name of one of them.
          weights: arrays of any sharding.

        Returns:
          Whether they were saved.
        """
        value, before = metrics[metric], self._best
        if math.isnan(value) or (before and value > before['metrics'][metric]):
            return False
        self.save(step, metrics, weights)
        return True

    def save(self, step: int, metrics: dict[str, float], weights: Any) -> None:
        """Saves weights in place of earlier ones; arguments as those of `save_if_best`. All processes together."""
        name, before = str(step), self._best
        while name in (kept := self._kept_names()) or (before and before['directory'] == name):
            name += '-again'  # a resumed run repeats its best step
        size = sum(x.nbytes for x in jax.tree.leaves(weights))
        with files.writing(self._directory / name, size), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self._directory / name, weights, force=True)  # over a partial one of a killed run
        best = {'step': step, 'metrics': metrics, 'directory': name}
        self._best = processes.run_on_main_process(lambda: self._write_best(best, kept))

    def _kept_names(self) -> set[str]:
        """Returns the directories of the weights that the checkpoints need, the same on all processes."""

        def read():
            checkpoints = self._directory.parent / CHECKPOINTS
            saved = [record.read_if_sound(checkpoints / str(step)) for step in checkpoint_steps(checkpoints)]
            best = [output.results['best'] for output in saved if output] + [self._pinned]
            return {each['directory'] for each in best if each}

        return processes.run_on_main_process(read)

    def _write_best(self, best, kept):
        best = best | {'files': checksums.file_entries(self._directory / best['directory'])}
        checksums.write_sealed(self._directory / BEST, best)
        self._remove_others({*kept, best['directory']})
        return best

    def _remove_others(self, kept):
        for other in self._directory.iterdir():  # earlier weights, and partial ones of a killed run
            if other.is_dir() and other.name not in kept:
                files.remove(other)

    def load(self) -> Any:
        """Loads the best weights as NumPy arrays, whatever devices saved them. A process may call it alone."""
        path, options = self._directory / self._best['directory'], {}
        if jax.process_count() > 1:  # else Orbax waits for the other processes
            own = jax.process_index()
            alone = {'primary_host': own, 'active_processes': {own}, 'barrier_sync_key_prefix': f'process{own}'}
            options = {'multiprocessing_options': ocp.options.MultiprocessingOptions(**alone)}
        with ocp.StandardCheckpointer(**options) as checkpointer:
            saved = checkpointer.metadata(path).item_metadata
            like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), getattr(saved, 'tree', saved))
            return checkpointer.restore(path, like)


def checkpoint_steps(directory: epath.Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a directory, ascending, without those that were set aside."""
    names = files.list_names(directory)
    steps = sorted(int(name) for name in names if name.isdecimal() and f'{name}{DAMAGED}' not in names)
    return [step for step in steps if ocp.utils.is_checkpoint_finalized(directory / str(step))]


def read_best(directory: epath.PathLike) -> dict[str, Any] | None:
    """Reads weights/best.json of a training; None if there is none.

    Raises:
      DamagedError: it is damaged.
    """
    path = remote.absolute(directory) / WEIGHTS / BEST
    try:
        best = checksums.read_sealed(path)
        if best.keys() != {'step', 'metrics', 'directory', 'files'}:
            raise ValueError(f'its fields are {sorted(best)}')
        return best
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise DamagedError(f'{path} is damaged: {error}') from error


def finish_weights(output: Record, results: dict, *, seconds: float | None = None) -> None:
    """Records the best weights of a directory with their checksums and digest, and that all outputs are written."""
    best = BestCheckpoint(output.directory)
    names = [f'{best.best()["directory"]}/{name}' for name in best.best()['files']]
    output.add_files(*(f'{WEIGHTS}/{name}' for name in (BEST, *names)))
    output.finish(results, seconds=seconds, digest=files.digest_arrays(best.load()))
