"""Orbax, behind one file: the checkpoints a run resumes from, and the trained weights that later stages read."""

from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vqvae2_jax.distributed import processes
from vqvae2_jax.io import files, gcs

_RECORD = 'trained.json'


class CheckpointMismatch(ValueError):
    """A checkpoint cannot become the state that is asked for."""


class Checkpoints:
    """`checkpoints/`: the last states of a run, each with its data iterator; saved asynchronously, whole or absent."""

    def __init__(self, directory):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(gcs.absolute(directory) / 'checkpoints', options=options)

    def latest_step(self) -> int | None:
        """Of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, iterator: grain.DatasetIterator, unlogged: list[dict[str, float]]) -> None:
        """Saves a state, where its data stands and the metrics not yet logged, unless that step is saved already."""
        if self._manager.latest_step() == step:
            return
        items = {
            'state': ocp.args.StandardSave(state),
            'data': ocp.args.JsonSave(iterator.get_state()),  # the same on every process, of which there may be others
            'unlogged': ocp.args.JsonSave(list(unlogged)),  # a copy, since it is written later
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, like: Any, iterator: grain.DatasetIterator) -> tuple[Any, list[dict[str, float]]]:
        """The state, laid out as `like` (arrays or shapes with shardings), and unlogged metrics; sets `iterator`.

        Raises:
          CheckpointMismatch: it is the state of another network, as an older version's may be, or damaged.
        """
        items = {
            'state': ocp.args.StandardRestore(jax.tree.map(_abstract, like)),
            'data': ocp.args.JsonRestore(),
            'unlogged': ocp.args.JsonRestore(),
        }
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except ValueError as error:  # Orbax has no class for it
            raise CheckpointMismatch(
                f'{self._manager.directory}/{step} cannot become the state of this network: {error}\n'
                f'If another version wrote it, delete {self._manager.directory.parent} to train it anew. '
                'If it is damaged, delete it to go on from the one before.'
            ) from error
        iterator.set_state(restored['data'])
        return restored['state'], restored['unlogged']

    def wait(self) -> None:
        """Until the last save is whole."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()
        self._manager.close()


class BestCheckpoint:
    """`weights/`: the best weights of a stage so far, {'params': ..., 'variables': ...}, and their held-out numbers."""

    def __init__(self, directory):
        self._directory = gcs.absolute(directory) / 'weights'

    def best(self) -> dict | None:
        """{'step', 'summary', 'directory'} of the weights kept, or None."""
        path = self._directory / 'best.json'
        return files.read_json(path) if path.exists() else None

    def save(self, step: int, summary: dict[str, float], weights: Any, before: dict | None = None) -> dict:
        """Keeps `weights` in place of those of the record `before`, which stay until the new ones are whole.

        All processes together. Returns the new record.
        """
        name = str(step)
        if before and before['directory'] == name:  # a resumed run meets its best step again
            name += '-again'
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self._directory / name, weights, force=True)  # over what a kill may have left behind
        record = {'step': step, 'summary': summary, 'directory': name}
        if processes.is_main_process():
            files.write_json(self._directory / 'best.json', record)
            for other in self._directory.iterdir():  # the ones before, and what a kill left behind
                if other.is_dir() and other.name != name:
                    other.rmtree()
        return record

    def load(self) -> Any:
        """The kept weights as NumPy arrays, on whatever devices they were saved; each process on its own."""
        path, options = self._directory / self.best()['directory'], {}
        if jax.process_count() > 1:  # else Orbax waits for the others
            own = jax.process_index()
            alone = {'primary_host': own, 'active_processes': {own}, 'barrier_sync_key_prefix': f'process{own}'}
            options = {'multiprocessing_options': ocp.options.MultiprocessingOptions(**alone)}
        with ocp.StandardCheckpointer(**options) as checkpointer:
            saved = checkpointer.metadata(path).item_metadata
            like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), getattr(saved, 'tree', saved))
            return checkpointer.restore(path, like)


def write_record(directory, record: dict) -> None:
    """Marks a stage as trained: `trained.json` (docs/files.md)."""
    files.write_json(epath.Path(directory) / _RECORD, record)


def remove_record(directory) -> None:
    """Marks a stage as not (or no longer) trained: its weights are about to change."""
    (epath.Path(directory) / _RECORD).unlink(missing_ok=True)


def read_record(directory) -> dict | None:
    """The record of a trained stage, or None when it is not."""
    path = epath.Path(directory) / _RECORD
    return files.read_json(path) if path.exists() else None


def _abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None))
