"""Where a run keeps its files, and what a job finds there from the jobs before it (docs/files.md).

Every trained stage, store of codes and set of samples records the digests of what it was made from; a job whose
upstream is not the recorded one refuses, showing both.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from ml_collections import ConfigDict

from vqvae2_jax.config import build as configs
from vqvae2_jax.data import images, loader
from vqvae2_jax.data.codes import CodeSource
from vqvae2_jax.data.images import ImageSource
from vqvae2_jax.distributed import sharding
from vqvae2_jax.io import files, gcs
from vqvae2_jax.models.prior import Prior
from vqvae2_jax.training.checkpoint import BestCheckpoint, read_record

SKIPPED = 'skipped.txt'


class JobError(ValueError):
    """A job cannot run as things stand; the message says what to do. No traceback is needed to understand it."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A config and its folder; `workdir` may be given as a string."""

    config: ConfigDict
    workdir: epath.Path
    _images: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)  # opened: listing takes long

    def __post_init__(self):
        object.__setattr__(self, 'workdir', gcs.absolute(self.workdir))

    def path(self, *parts: str) -> epath.Path:
        """A file or folder below the workdir."""
        return self.workdir.joinpath(*parts)

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels, finest first."""
        return configs.level_names(self.config.vqvae.factors)

    def images(self, split: str) -> ImageSource:
        """The images of 'train', 'validation' or 'test'.

        Raises:
          JobError: they are not there, or not as config.data says.
        """
        try:
            key = configs.image_spec(self.config), split  # the config may change under way
            if key not in self._images:
                self._images[key] = images.open_images(*key)
            return self._images[key]
        except (ValueError, OSError, ImportError) as error:
            raise JobError(str(error)) from error

    def folder(self, path: str, field: str) -> ImageSource:
        """All images below a folder that is no part of the config's data, or one file, in the config's size.

        Raises:
          JobError: they are not there; the message names the config's `field`.
        """
        try:
            return images.open_all(path, configs.image_spec(self.config), field)
        except (ValueError, OSError) as error:
            raise JobError(str(error)) from error

    def images_digest(self) -> str:
        """Identifies the images that stages are trained and chosen on."""
        return files.digest_json({split: self.images(split).digest for split in ('train', 'validation')})

    def codes(self, split: str) -> CodeSource:
        """The extracted codes of a split.

        Raises:
          JobError: they are not there, or damaged.
        """
        try:
            return CodeSource(self.path('codes', split))
        except (ValueError, OSError) as error:
            raise JobError(str(error)) from error

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

    @property
    def collections(self) -> dict[str, Any]:
        """As `module.apply` takes them."""
        return {'params': self.params, **self.variables}

    def on_devices(self) -> dict[str, Any]:
        """The collections, whole on every device."""
        return jax.device_put(self.collections, sharding.replicated_sharding())


def prior_directory(level_name: str) -> str:
    return f'prior_{level_name}'


def job_command(job: str) -> str:
    """How to start a job by hand, for messages; the user knows the rest of the command, overrides and all."""
    return f'add --job={job} to your command'


def trained_record(run: Run, directory: str, job: str) -> dict:
    """trained.json of a finished stage.

    Raises:
      JobError: it is not finished, and the message names the job to run; or its network or its data are not the
        config's.
    """
    record = read_record(run.path(directory))
    if record is None:
        raise JobError(f'{run.path(directory)} holds no finished training; to run it, {job_command(job)}')
    _check_settings(run, run.path(directory), record)
    return record


def load_trained(run: Run, directory: str, job: str) -> Trained:
    """The best weights of a finished stage.

    Raises:
      JobError: as `trained_record`; or they are those of another version's network.
    """
    record = trained_record(run, directory, job)
    weights = BestCheckpoint(run.path(directory)).load()
    trained = Trained(weights['params'], weights.get('variables') or {}, record)
    _check_network(run, run.path(directory), trained)
    return trained


def vqvae_record(run: Run) -> dict:
    """Stage 1's record; raises as `trained_record`."""
    return trained_record(run, 'vqvae', 'vqvae')


def load_vqvae(run: Run) -> Trained:
    """Stage 1's weights and codebooks."""
    return load_trained(run, 'vqvae', 'vqvae')


def prior_records(run: Run) -> list[dict]:
    """Stage 2's records, finest level first.

    Raises:
      JobError: as `trained_record`. UpstreamChanged: a prior has learnt the codes of another stage 1.
    """
    current, records = {'stage 1 (vqvae)': vqvae_record(run)['digest']}, []
    for name in run.levels:
        path = run.path(prior_directory(name))
        record = trained_record(run, prior_directory(name), f'prior --level={name}')
        recorded = {'stage 1 (vqvae)': record['upstream']['vqvae']}
        check_digests(f'the prior in {path}', recorded, current, f'Delete {path} to train it anew on new codes.')
        records.append(record)
    return records


def load_priors(run: Run) -> list[Trained]:
    """Stage 2's weights, finest level first; raises as `prior_records`."""
    prior_records(run)
    return [load_trained(run, prior_directory(name), f'prior --level={name}') for name in run.levels]


def generator_digests(run: Run) -> dict[str, str]:
    """What samples are made from, `vqvae` and every `prior_<level>`; raises as `prior_records`."""
    digests = {'vqvae': vqvae_record(run)['digest']}
    records = zip(run.levels, prior_records(run), strict=True)
    return digests | {prior_directory(name): record['digest'] for name, record in records}


def load_generator(run: Run, dtype: str | None = None):
    """What draws and judges images: stage 1's module and collections, all priors' modules and weights, on the devices.

    Args:
      dtype: of the priors' weights, caches and arithmetic (logits stay float32); None or '': each prior's own.
    """
    weights = optax.tree.cast([prior.params for prior in load_priors(run)], dtype or None)
    weights = jax.device_put(weights, sharding.replicated_sharding())
    return configs.make_vqvae(run.config), load_vqvae(run).on_devices(), make_priors(run, dtype), weights


def make_priors(run: Run, dtype: str | None = None) -> list[Prior]:
    """Stage 2's modules, finest level first, as they are drawn from in `dtype` (None or '': each in its own)."""
    modules = [configs.make_prior(run.config, level) for level in range(len(run.levels))]
    return [module.clone(dtype=jnp.dtype(dtype)) for module in modules] if dtype else modules


def check_images(run: Run, directory: str, record: dict) -> None:
    """Refuses a stage trained on other images than those there now: among its own might be today's test images.

    Raises:
      UpstreamChanged: with both digests. JobError: the images are not there.
    """
    path = run.path(directory)
    hint = f'Bring back those images, or delete {path} to train it anew.'
    recorded, current = {'images': record['upstream'].get('images')}, {'images': run.images_digest()}
    check_digests(f'the training in {path}', recorded, current, hint)


def _check_settings(run: Run, path: epath.Path, record: dict) -> None:
    """Refuses weights that the config's network or data do not fit; how they were trained may differ."""
    section = record['stage']
    of_training = ('seed', 'data.flip', 'data.crop', f'{section}.training.')
    current = configs.settings(run.config, section)
    fields = [k for k in current if not k.startswith(of_training)]
    hint = 'Go back to those settings, or give another --workdir.'
    recorded = {k: record['settings'].get(k) for k in fields}
    check_same(f'the training in {path}', recorded, {k: current[k] for k in fields}, hint)


def _check_network(run: Run, path: epath.Path, trained: Trained) -> None:
    """Refuses weights that the same settings no longer make."""
    model, inputs = configs.networks(run.config)[trained.record['stage']]
    there, now = _shapes(trained.collections), _shapes(jax.eval_shape(model.init, *inputs))
    if different := sorted(name for name in there.keys() | now.keys() if there.get(name) != now.get(name)):
        name = different[0]
        raise JobError(
            f'{path} was trained by version {trained.record["version"]}, whose network differs from the one now '
            f'({files.package_version()}) in {len(different)} arrays, such as {name}: '
            f'{there.get(name)} there, {now.get(name)} now. Delete {path} to train it anew, or go back to that version.'
        )


def _shapes(tree):
    return {jax.tree_util.keystr(k, simple=True, separator='/'): x.shape for k, x in jax.tree.leaves_with_path(tree)}


def check_same(what: str, recorded: dict, current: dict, hint: str) -> None:
    """Refuses when two flat records of settings differ, naming every field with both values.

    Raises:
      JobError: they differ.
    """
    fields = sorted(k for k in recorded.keys() | current.keys() if recorded.get(k) != current.get(k))
    if fields:
        lines = '\n'.join(f'  {k}: {recorded.get(k)!r} there, {current.get(k)!r} now' for k in fields)
        raise JobError(f'{what} was made with other settings:\n{lines}\n{hint}')


def check_digests(what: str, recorded: dict[str, str], current: dict[str, str], hint: str) -> None:
    """Refuses when an upstream of `what` is no longer the recorded one; both map names to digests.

    Raises:
      provenance.UpstreamChanged: with both digests.
    """
    for name in sorted(recorded.keys() | current.keys()):
        files.check_upstream(
            f'the {name} that {what} was made from', str(recorded.get(name)), str(current.get(name)), hint
        )
