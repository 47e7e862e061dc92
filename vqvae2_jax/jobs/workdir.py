"""The directories of a run, and the outputs of earlier jobs that a job reads (docs/files.md).

Every output directory has a `record.json` (io/record.py) with the digests of its inputs. A job refuses inputs that are
not the recorded ones, and shows both digests.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqvae2_jax.config import build
from vqvae2_jax.data import images, loader
from vqvae2_jax.data.codes import CodeSource
from vqvae2_jax.data.images import SPLITS, ImageSource
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.io import files, gcs, lock, record
from vqvae2_jax.io.record import JobError, Record
from vqvae2_jax.models.prior import Prior
from vqvae2_jax.models.vqvae import VQVAE
from vqvae2_jax.training.checkpoint import BestCheckpoint

SKIPPED = 'skipped.txt'
# Fields of a network's section that decide how it is trained, but not the network.
_OF_TRAINING = ('training.', 'flip', 'crop', 'commitment_weight')
SAMPLES, REJECTION, RECONSTRUCTIONS = 'samples', 'rejection', 'reconstructions'


@dataclasses.dataclass(frozen=True)
class Run:
    """A config, its directory and its devices.

    Attributes:
      config: the complete config.
      workdir: the directory; may be given as a string.
      devices: the devices to run on; None: all of all processes.
      continue_from: step of the checkpoint that a training goes back to, with changed settings; None: the newest.
    """

    config: ConfigDict
    workdir: epath.Path
    devices: Sequence | None = None
    continue_from: int | None = None
    _images: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)  # listing a folder takes long
    _vqvae: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)  # many parts of a report need it

    def __post_init__(self):
        object.__setattr__(self, 'workdir', gcs.absolute(self.workdir))

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh of all SPMD programs; a job enters it with `jax.set_mesh(run.mesh)`.

        Raises:
          JobError: parallel.fsdp does not divide the number of devices.
        """
        try:
            return sharding.make_mesh(self.devices, self.config.parallel.fsdp)
        except ValueError as error:
            raise JobError(str(error)) from error

    def path(self, *parts: str) -> epath.Path:
        """Returns a file or directory below the workdir."""
        return self.workdir.joinpath(*parts)

    def sample_set_path(self, *parts: str) -> epath.Path:
        """Returns the directory of the sample set `sample.name` below `parts`, such as samples/default."""
        return self.path(*parts, self.config.sample.name)

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels, finest first."""
        return build.level_names(self.config.vqvae.downsample_factors)

    @property
    def prior_sections(self) -> tuple[str, ...]:
        """Sections of the config of the priors, such as 'prior.top', finest level first."""
        return tuple(f'prior.{name}' for name in self.levels)

    def batch_size(self, section: str) -> int:
        """Returns <section>.batch_size, rounded up to a multiple of the devices."""
        return sharding.pad_batch_size(self.config[section].batch_size, self.mesh)

    def images(self, split: str) -> ImageSource:
        """Opens the images of 'train', 'validation' or 'test'.

        Raises:
          JobError: they are missing, or not as config.data says.
        """
        try:
            key = build.image_spec(self.config), split  # a notebook may change the config between two jobs
            if key not in self._images:
                self._images[key] = images.open_images(*key, self._images)
            return self._images[key]
        except (ValueError, OSError, ImportError) as error:
            raise JobError(str(error)) from error

    def folder(self, path: str, field: str) -> ImageSource:
        """Opens all images below a folder that is not part of the config's data, or one file, in the config's size.

        Raises:
          JobError: there are none; the message names the config's `field`.
        """
        try:
            return images.open_all(path, build.image_spec(self.config), field)
        except (ValueError, OSError) as error:
            raise JobError(str(error)) from error

    def images_digest(self) -> str:
        """Returns a digest of the training and validation images."""
        return files.digest_json({split: self.images(split).digest for split in ('train', 'validation')})

    def codes(self, split: str) -> CodeSource:
        """Opens the extracted codes of a split.

        Raises:
          JobError: they are missing or damaged.
        """
        directory = self.path('codes', split)
        self.check_files(record.read_done(directory, 'extract_codes'))
        try:
            return CodeSource(directory)
        except (ValueError, OSError) as error:
            raise JobError(str(error)) from error

    def loader_kwargs(self) -> dict[str, Any]:
        """Returns the loader's arguments that say how to read images."""
        return {'workers': self.config.data.workers, 'skip_log': str(self.path(SKIPPED))}

    def skipped(self) -> list[str]:
        """Returns the names of unreadable files met so far under data.on_error='skip'."""
        return loader.read_skipped(str(self.path(SKIPPED)))

    def print_start(self, job: str, data: str, *, parameters: int | None = None, batch: str = '') -> None:
        """Prints the start line of a job: devices, mesh, parameters and data; and that the job compiles.

        Args:
          job: its name.
          data: the examples, as text.
          parameters: number of parameters of the networks in use; None: there are none.
          batch: section of the config whose batch size is in use, as configured and padded; '': none.
        """
        parts = [processes.describe_mesh(self.mesh)]
        parts += [f'{parameters:,} parameters'] if parameters is not None else []
        parts += [data] if data else []
        if batch:
            parts.append(f'{batch}.batch_size {self.config[batch].batch_size}, padded to {self.batch_size(batch)}')
        print(f'{job}: ' + '; '.join(parts), flush=True)
        print(f'{job}: compiling ...', flush=True)  # it may take minutes

    def open_output(
        self, directory: epath.Path, job: str, inputs: dict[str, str], settings: dict[str, Any], **options: Any
    ) -> Record:
        """Calls `record.open_output` on the main process; all processes get the same record.

        Damaged files are not in the record any more: the job that calls this writes them again.
        """
        devices = f'{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}'
        options['devices'] = devices
        output = processes.run_on_main_process(lambda: record.open_output(directory, job, inputs, settings, **options))
        output.drop_damaged(output.find_damaged_together())
        return output

    @contextlib.contextmanager
    def lock(self, directory: epath.Path, job: str, output: Record | None = None) -> Iterator[None]:
        """Holds the lock of a directory that a job writes (io/lock.py). All processes together; process 0 holds it.

        Args:
          directory: the directory.
          job: the job, for messages.
          output: the record of the directory as it was read before; None: it is read under the lock.

        Raises:
          JobError: another process writes the directory, or has written it since `output` was read.
        """
        with contextlib.ExitStack() as stack:

            def acquire():
                stack.enter_context(lock.hold(directory, job))
                if output is not None:
                    output.refuse_changed()

            processes.run_on_main_process(acquire)
            yield

    def check_files(self, output: Record) -> None:
        """Refuses damaged files of an output that a job reads. All processes together, each reads its share.

        Raises:
          DamagedError: the message names the file, and the job that makes it again.
        """
        output.refuse_damaged(output.find_damaged_together())


@dataclasses.dataclass(frozen=True)
class Trained:
    """The best weights of a finished training, as NumPy arrays.

    Attributes:
      params: parameters of the network.
      model_state: mutable collections without gradients, {'codebook': ...} or {}.
      record: the record of the directory that has the weights.
    """

    params: Any
    model_state: Any
    record: Record

    @property
    def digest(self) -> str:
        return self.record.digest

    @property
    def variables(self) -> dict[str, Any]:
        """All collections, as `module.apply` takes them."""
        return {'params': self.params, **self.model_state}


@dataclasses.dataclass(frozen=True)
class Generator:
    """All networks that make samples; the weights are on the mesh, sharded.

    Attributes:
      model: the VQ-VAE's module.
      variables: all collections of the VQ-VAE.
      priors: one module per level, finest first.
      params: the parameters of each prior, in the order of `priors`.
    """

    model: VQVAE
    variables: Any
    priors: list[Prior]
    params: list[Any]

    @property
    def num_parameters(self) -> int:
        """Number of parameters of all networks."""
        return num_parameters((self.variables['params'], self.params))


def num_parameters(params: Any) -> int:
    """Returns the number of parameters in a pytree of arrays or shapes."""
    return sum(x.size for x in jax.tree.leaves(params))


def training_directory(section: str) -> str:
    """Returns the name of the directory of a training: 'prior_top' for the section 'prior.top' of the config."""
    return section.replace('.', '_')


def training_job(section: str) -> str:
    """Returns the job that trains the network of a section, for messages: 'prior --level=top' for 'prior.top'."""
    return section.replace('.', ' --level=')


def trained_record(run: Run, section: str, directory: str = '') -> Record:
    """Reads the record of a finished training.

    Args:
      run: the run.
      section: section of the config that the network was trained from: 'vqvae', 'prior.<level>' or 'classifier'.
      directory: directory of the training below the workdir; '': `training_directory(section)`.

    Raises:
      JobError: it is not finished.
      SettingsChangedError: its network or its data are not the config's. How it was trained may differ.
      StaleInputError: a prior was trained on codes of another stage 1.
    """
    path = run.path(directory or training_directory(section))
    trained = record.read_done(path, 'cas' if directory.startswith('cas/') else training_job(section))
    of_training = ('seed', 'data.flip', 'data.crop', *(f'{section}.{field}' for field in _OF_TRAINING))
    current = {k: v for k, v in build.settings(run.config, section).items() if not k.startswith(of_training)}
    hint = 'Go back to the recorded settings, or give another --workdir.'
    recorded = {k: trained.settings.get(k) for k in current}
    record.check_settings_match(path, recorded, files.to_json(current, 'settings'), hint)
    if section in run.prior_sections:
        vqvae = {'vqvae': trained_record(run, 'vqvae').digest}
        record.check_inputs(path, {'vqvae': trained.inputs['vqvae']}, vqvae, f'delete {path} to train it again')
    return trained


def load_trained(run: Run, section: str, directory: str = '') -> Trained:
    """Loads the best weights of a finished training; arguments as in `trained_record`. Stage 1 is loaded once.

    Raises:
      JobError: as `trained_record`; or the weights are those of another version's network.
    """
    output = trained_record(run, section, directory)
    if output.digest in run._vqvae:
        return run._vqvae[output.digest]
    run.check_files(output)
    if output.changes:
        print(f'{output.directory} was trained with changed settings: {output.describe_changes()}', flush=True)
    weights = BestCheckpoint(output.directory).load()
    trained = Trained(weights['params'], weights.get('model_state') or {}, output)
    _check_network(run, trained, section)
    if section == 'vqvae':
        run._vqvae[output.digest] = trained
    return trained


def generator_digests(run: Run) -> dict[str, str]:
    """Returns the digests of `vqvae` and of every `prior_<level>`, which make samples; raises as `trained_record`."""
    sections = ('vqvae', *run.prior_sections)
    return {training_directory(section): trained_record(run, section).digest for section in sections}


def load_generator(run: Run, dtype: str = '') -> Generator:
    """Loads all networks that make samples onto the mesh; call it inside `jax.set_mesh(run.mesh)`.

    Args:
      run: the run.
      dtype: dtype of the priors' weights, caches and arithmetic (logits stay float32); '': each prior's own.

    Raises:
      JobError: as `load_trained`.
    """
    params = optax.tree.cast([load_trained(run, section).params for section in run.prior_sections], dtype or None)
    model, variables = build.make_vqvae(run.config), load_trained(run, 'vqvae').variables
    return Generator(model, sharding.put_sharded(variables), make_priors(run, dtype), sharding.put_sharded(params))


def make_priors(run: Run, dtype: str = '') -> list[Prior]:
    """Makes stage 2's modules, finest level first, which compute in `dtype`; '': each in its own."""
    modules = [build.make_prior(run.config, level) for level in range(len(run.levels))]
    return [module.clone(dtype=jnp.dtype(dtype)) for module in modules] if dtype else modules


def sampling_params(run: Run) -> tuple:
    """Returns the SamplingParams of every level, finest first."""
    return tuple(build.make_sampling_params(run.config, name) for name in run.levels)


def codes_records(run: Run) -> dict[str, Record]:
    """Reads the records of the codes of all splits.

    Raises:
      JobError: codes are missing.
      StaleInputError: another stage 1 made them.
    """
    vqvae, records = {'vqvae': trained_record(run, 'vqvae').digest}, {}
    for split in SPLITS:
        path = run.path('codes', split)
        records[split] = record.read_done(path, 'extract_codes')
        recorded = {'vqvae': records[split].inputs.get('vqvae')}
        record.check_inputs(path, recorded, vqvae, f'delete {path.parent} to extract them again')
    return records


def codes_digest(run: Run) -> str:
    """Returns a digest of the codes of all splits and the images they are of; raises as `codes_records`."""
    return files.digest_json({split: codes.digest for split, codes in codes_records(run).items()})


def _check_network(run, trained, section):
    """Refuses weights that the same settings do not make any more."""
    path = trained.record.directory
    model, inputs = build.networks(run.config)[section]
    saved, current = _shapes(trained.variables), _shapes(jax.eval_shape(model.init, *inputs))
    if different := sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name)):
        name = different[0]
        raise JobError(
            f'{path} was trained by version {trained.record.version}, whose network differs from that of version '
            f'{record.__version__} in {len(different)} arrays, such as {name}: saved {saved.get(name)}, '
            f'now {current.get(name)}. Delete {path} to train it again, or use that version.'
        )


def _shapes(tree):
    return {jax.tree_util.keystr(k, simple=True, separator='/'): x.shape for k, x in jax.tree.leaves_with_path(tree)}
