"""Orbax, behind one file: the checkpoints a run resumes from, and the trained weights that later stages read."""

from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from vqvae2_jax.io import provenance

_RECORD = 'trained.json'


class Checkpoints:
    """`checkpoints/`: the last states of a run, each with its data iterator; saved asynchronously, whole or absent."""

    def __init__(self, directory):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(epath.Path(directory).resolve() / 'checkpoints', options=options)

    def latest_step(self) -> int | None:
        """Of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, iterator: grain.DatasetIterator) -> None:
        """Saves a state and where its data stands, unless that step is saved already."""
        if self._manager.latest_step() == step:
            return
        data = grain.checkpoint.CheckpointSave(iterator)
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=data), force=True)

    def restore(self, step: int, like: Any, iterator: grain.DatasetIterator) -> Any:
        """The state of `step`, laid out as `like` (arrays or shapes with shardings); sets `iterator` to match."""
        data = grain.checkpoint.CheckpointRestore(iterator)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(_abstract, like)), data=data)
        return self._manager.restore(step, args=args)['state']

    def close(self) -> None:
        """Waits for the last save."""
        self._manager.wait_until_finished()
        self._manager.close()


class Weights:
    """`weights/`: the best weights of a stage so far, {'params': ..., 'variables': ...}, and their held-out numbers."""

    def __init__(self, directory):
        self._directory = epath.Path(directory).resolve() / 'weights'

    def best(self) -> dict | None:
        """{'step', 'summary'} of the weights kept, or None."""
        path = self._directory / 'best.json'
        return provenance.read_json(path) if path.exists() else None

    def save(self, step: int, summary: dict[str, float], weights: Any) -> None:
        """Keeps `weights` in place of the ones before, which stay until the new ones are whole."""
        before = self.best()
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self._directory / str(step), weights, force=True)
        provenance.write_json(self._directory / 'best.json', {'step': step, 'summary': summary})
        if before and before['step'] != step:
            (self._directory / str(before['step'])).rmtree(missing_ok=True)

    def load(self, like: Any = None) -> Any:
        """The kept weights, laid out as `like` (None: as NumPy arrays)."""
        step = self.best()['step']
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(
                self._directory / str(step), None if like is None else jax.tree.map(_abstract, like)
            )


def write_record(directory, record: dict) -> None:
    """Marks a stage as trained: `trained.json` (docs/files.md)."""
    provenance.write_json(epath.Path(directory) / _RECORD, record)


def read_record(directory) -> dict | None:
    """The record of a trained stage, or None when it is not."""
    path = epath.Path(directory) / _RECORD
    return provenance.read_json(path) if path.exists() else None


def _abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None))
