"""Where a run keeps its files, and what a job finds there from the jobs before it (docs/files.md).

Every trained stage, store of codes and set of samples records the digests of what it was made from; a job whose
upstream is not the recorded one refuses, showing both.
"""

import dataclasses
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vqvae2_jax import config as configs
from vqvae2_jax.data import images, loader
from vqvae2_jax.io import provenance
from vqvae2_jax.io.checkpoint import Weights, read_record

SKIPPED = 'skipped.txt'


class JobError(ValueError):
    """A job cannot run as things stand; the message says what to do. No traceback is needed to understand it."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A config and its folder."""

    config: ConfigDict
    workdir: epath.Path

    def path(self, *parts: str) -> epath.Path:
        """A file or folder below the workdir."""
        return self.workdir.joinpath(*parts)

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels, finest first."""
        return configs.level_names(self.config.vqvae.factors)

    def images(self, split: str) -> images.ImageSource:
        """The images of 'train', 'validation' or 'test'."""
        return images.open_images(configs.image_spec(self.config), split)

    def reading(self) -> dict[str, Any]:
        """How to read images: the loader's arguments beside source and batch size."""
        return {'workers': self.config.data.workers, 'skip_log': str(self.path(SKIPPED))}

    def skipped(self) -> list[str]:
        """Unreadable files met so far under data.on_error='skip'."""
        return loader.read_skipped(str(self.path(SKIPPED)))


@dataclasses.dataclass(frozen=True)
class Trained:
    """The weights of a finished stage."""

    params: Any
    variables: Any
    record: dict

    @property
    def digest(self) -> str:
        return self.record['digest']


def prior_directory(level_name: str) -> str:
    return f'prior_{level_name}'


def job_command(run: Run, job: str) -> str:
    """How to start a job by hand, for messages."""
    return f'python -m vqvae2_jax.main --config=configs/{run.config.name}.py --workdir={run.workdir} --job={job}'


def load_trained(run: Run, directory: str, job: str) -> Trained:
    """The best weights of a finished stage.

    Raises:
      JobError: it is not finished; the message names the job to run.
    """
    record = read_record(run.path(directory))
    if record is None:
        raise JobError(f'{run.path(directory)} holds no finished training; run it first:\n  {job_command(run, job)}')
    weights = Weights(run.path(directory)).load()
    return Trained(weights['params'], weights.get('variables') or {}, record)


def load_vqvae(run: Run) -> Trained:
    """Stage 1's weights and codebooks."""
    return load_trained(run, 'vqvae', 'vqvae')


def load_priors(run: Run) -> list[Trained]:
    """Stage 2's weights, finest level first."""
    return [load_trained(run, prior_directory(name), f'prior --level={name}') for name in run.levels]


def check_same(what: str, recorded: dict, current: dict, remedy: str) -> None:
    """Refuses when two flat records of settings differ, naming every field with both values.

    Raises:
      JobError: they differ.
    """
    fields = sorted(k for k in recorded.keys() | current.keys() if recorded.get(k) != current.get(k))
    if fields:
        lines = '\n'.join(f'  {k}: {recorded.get(k)!r} there, {current.get(k)!r} now' for k in fields)
        raise JobError(f'{what} was made with other settings:\n{lines}\n{remedy}')


def check_digests(what: str, recorded: dict[str, str], current: dict[str, str], remedy: str) -> None:
    """Refuses when an upstream of `what` is no longer the recorded one; both map names to digests.

    Raises:
      provenance.UpstreamChanged: with both digests.
    """
    for name in sorted(recorded.keys() | current.keys()):
        provenance.check_upstream(
            f'the {name} that {what} was made from', str(recorded.get(name)), str(current.get(name)), remedy
        )
