"""Checkpoints: the train states that a run resumes from, and the best weights, which later jobs read."""

import math
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from vqvae2_jax.distributed import processes
from vqvae2_jax.io import files, gcs


class CheckpointMismatch(ValueError):
    """A checkpoint does not fit the train state of this network."""


class Checkpoints:
    """The last two train states of a run, in `checkpoints/`, each with the state of its data iterator.

    They are saved asynchronously. A killed run leaves no partial checkpoint.
    """

    def __init__(self, directory):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(gcs.absolute(directory) / 'checkpoints', options=options)

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint that process 0 sees, or None. All processes together."""
        return processes.run_on_main_process(self._manager.latest_step)

    def save(self, step: int, state: Any, iterator: grain.DatasetIterator, pending: list[dict[str, float]]) -> None:
        """Saves a checkpoint, unless this step has one. All processes together.

        Args:
          step: number of updates done.
          state: the train state, of any sharding.
          iterator: batches of the training data; its state must be the same on every process.
          pending: metrics of the steps since the last log line.
        """
        if self.latest_step() == step:
            return
        items = {
            'state': ocp.args.StandardSave(state),
            'data': ocp.args.JsonSave(iterator.get_state()),
            'pending_metrics': ocp.args.JsonSave(list(pending)),  # a copy, since it is written later
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, like: Any, iterator: grain.DatasetIterator) -> tuple[Any, list[dict[str, float]]]:
        """Restores a checkpoint. All processes together.

        Args:
          step: a step that has a checkpoint.
          like: a train state of `jax.ShapeDtypeStruct` with shardings; the number of devices may have changed.
          iterator: batches of the training data; it is set to continue after this step.

        Returns:
          The train state, and the pending metrics.

        Raises:
          CheckpointMismatch: the checkpoint is of another network (perhaps of an older version), or damaged.
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
                f'{self._manager.directory}/{step} does not fit the train state of this network: {error}\n'
                f'If another version wrote it, delete {self._manager.directory.parent} to train from the start. '
                'If it is damaged, delete it to continue from the checkpoint before it.'
            ) from error
        iterator.set_state(restored['data'])
        return restored['state'], restored['pending_metrics']

    def wait(self) -> None:
        """Waits until the last save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until the last save is complete, and ends all threads."""
        self.wait()
        self._manager.close()


class BestCheckpoint:
    """The best weights of a training so far, in `weights/`: {'params': ..., 'model_state': ...}.

    `weights/best.json` names their directory. They stay until the next ones are complete.
    """

    def __init__(self, directory):
        self._directory = gcs.absolute(directory) / 'weights'
        path = self._directory / 'best.json'
        self._best = files.read_json(path) if path.exists() else None

    def best(self) -> dict[str, Any] | None:
        """Returns {'step', 'metrics', 'directory'} of the best weights, or None."""
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
        name = str(step)
        if before and before['directory'] == name:  # a resumed run repeats its best step
            name += '-again'
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self._directory / name, weights, force=True)  # over a partial one of a killed run
        self._best = {'step': step, 'metrics': metrics, 'directory': name}
        if processes.is_main_process():
            files.write_json(self._directory / 'best.json', self._best)
            for other in self._directory.iterdir():  # earlier weights, and partial ones of a killed run
                if other.is_dir() and other.name != name:
                    other.rmtree()
        return True

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
