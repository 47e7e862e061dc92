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
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqvae2_jax.api import Generator, Specification
from vqvae2_jax.config import build
from vqvae2_jax.data import codes as code_store
from vqvae2_jax.data import images, loader, own_codes
from vqvae2_jax.data.codes import CodeSource, CodeSpec
from vqvae2_jax.data.images import ImageSource
from vqvae2_jax.data.own_codes import ArrayCodes
from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.io import files, lock, record, remote
from vqvae2_jax.io.record import JobError, Record
from vqvae2_jax.training.checkpoint import BestCheckpoint

SKIPPED = 'skipped.txt'
# The job in the record of weights that were trained in another run or program, and of their codes.
IMPORT = code_store.IMPORT_JOB
FROM = 'from'  # name of an input: the weights that --from gives
SAMPLES, REJECTION, RECONSTRUCTIONS = 'samples', 'rejection', 'reconstructions'


@contextlib.contextmanager
def job_errors() -> Iterator[None]:
    """Within the context, errors of data that cannot be opened end the job with their message."""
    try:
        yield
    except JobError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise JobError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Run:
    """A config, its directory and its devices.

    Attributes:
      config: the complete config.
      workdir: the directory; may be given as a string.
      devices: the devices to run on; None: all of all processes.
      continue_from: step of the checkpoint that a training goes back to, with changed settings; None: the newest.
      source: weights or codes that a job starts from (--from); None: those of the workdir.
      target: the file that a job writes outside of the workdir (--to); None: there is none.
    """

    config: ConfigDict
    workdir: epath.Path
    devices: Sequence | None = None
    continue_from: int | None = None
    source: str | None = None
    target: str | None = None
    _images: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)  # listing a folder takes long
    _vqvae: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)  # many parts of a report need it

    def __post_init__(self):
        object.__setattr__(self, 'workdir', remote.absolute(self.workdir))

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
    def has_stage_1(self) -> bool:
        """Whether the run has images and stage 1; otherwise its codes are those of codes.path."""
        return build.has_stage_1(self.config)

    @property
    def code_spec(self) -> CodeSpec:
        """Describes the codes that the priors are trained on."""
        return build.code_spec(self.config)

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels, finest first."""
        return self.code_spec.levels

    @property
    def prior_sections(self) -> tuple[str, ...]:
        """Sections of the config of the priors, such as 'prior.top', finest level first."""
        return tuple(f'prior.{name}' for name in self.levels)

    @property
    def generator_sections(self) -> tuple[str, ...]:
        """Sections of the networks that make samples: 'vqvae' if there is a stage 1, and those of the priors."""
        return ('vqvae', *self.prior_sections) if self.has_stage_1 else self.prior_sections

    def batch_size(self, section: str) -> int:
        """Returns <section>.batch_size, rounded up to a multiple of the devices."""
        return sharding.pad_batch_size(self.config[section].batch_size, self.mesh)

    def images(self, split: str) -> ImageSource:
        """Opens the images of 'train', 'validation' or 'test'.

        Raises:
          JobError: they are missing, or not as config.data says.
        """
        with job_errors():
            key = build.image_spec(self.config), split  # a notebook may change the config between two jobs
            if key not in self._images:
                self._images[key] = images.open_images(*key, self._images)
            return self._images[key]

    def folder(self, path: str, field: str) -> ImageSource:
        """Opens all images below a folder that is not part of the config's data, or one file, in the config's size.

        Raises:
          JobError: there are none; the message names the config's `field`.
        """
        with job_errors():
            return images.open_all(path, build.image_spec(self.config), field)

    def images_digest(self) -> str:
        """Returns a digest of the training and validation images."""
        return files.digest_json({split: self.images(split).digest for split in ('train', 'validation')})

    def codes(self, split: str) -> CodeSource | ArrayCodes:
        """Opens the codes of a split, those of codes.path or else the extracted ones. All processes together.

        Raises:
          JobError: they are missing or damaged, or not as their description says.
        """
        with job_errors():
            if self.has_stage_1:
                directory = self.path('codes', split)
                self.check_files(record.read_done(directory, 'extract_codes'))
                return CodeSource(directory, cache_bytes=self.config.data.cache_bytes)
            if (output := own_codes.stored_split(self.config.codes.path, split)) is not None:
                self.check_files(output)
            return own_codes.open_split(self.config.codes.path, split, self.code_spec)

    def data(self, split: str) -> ImageSource | CodeSource | ArrayCodes:
        """Opens the data that the run starts from: the images of a split, or without stage 1 its codes."""
        return self.images(split) if self.has_stage_1 else self.codes(split)

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


def num_parameters(params: Any) -> int:
    """Returns the number of parameters in a pytree of arrays or shapes, such as the collection `params` of a module."""
    return sum(x.size for x in jax.tree.leaves(params))


def generator_size(generator: Generator) -> int:
    """Returns the number of parameters of all networks of a generator."""
    return num_parameters((generator.variables.get('params'), generator.params))


def training_directory(section: str) -> str:
    """Returns the name of the directory of a training: 'prior_top' for the section 'prior.top' of the config."""
    return section.replace('.', '_')


def training_job(section: str) -> str:
    """Returns the job that trains the network of a section, for messages: 'prior --level=top' for 'prior.top'."""
    return section.replace('.', ' --level=')


def imported_record(run: Run, section: str = 'vqvae') -> Record | None:
    """Returns the record of the weights of a section if they were imported, completely or not; None otherwise."""
    output = record.read_if_sound(run.path(training_directory(section)))
    return output if output and output.job == IMPORT else None


def trained_record(run: Run, section: str, directory: str = '') -> Record:
    """Reads the record of a finished training, or of imported weights.

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
    current = (build.import_settings if trained.job == IMPORT else build.settings)(run.config, section)
    of_training = build.training_fields(section)
    recorded, current = (
        {k: v for k, v in settings.items() if not k.startswith(of_training)}
        for settings in (trained.settings, files.to_json(current, 'settings'))
    )
    hint = 'Go back to the recorded settings, or give another --workdir.'
    record.check_settings_match(path, recorded, current, hint)
    if section in run.prior_sections:
        origin = _origin(run)
        recorded = {name: trained.inputs.get(name) for name in origin}
        record.check_inputs(path, recorded, origin, f'delete {path} to train it again')
    return trained


def _origin(run: Run) -> dict[str, str]:
    """Returns the input that all priors of a run must have in common.

    It is stage 1, or without it the codes that the coarsest prior was trained on: sampling does not need the codes.
    """
    if run.has_stage_1:
        return {'vqvae': trained_record(run, 'vqvae').digest}
    coarsest = record.read_if_done(run.path(training_directory(run.prior_sections[-1])))
    return {'codes': coarsest.inputs.get('codes')} if coarsest else {}


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
    return {training_directory(section): trained_record(run, section).digest for section in run.generator_sections}


def load_generator(run: Run, dtype: str = '', *, with_priors: bool = True) -> Generator:
    """Loads the networks onto the mesh, sharded; call it inside `jax.set_mesh(run.mesh)`.

    Args:
      run: the run.
      dtype: dtype of the priors' weights, caches and arithmetic (logits stay float32); '': each prior's own.
      with_priors: False: stage 1 alone.

    Raises:
      JobError: as `load_trained`.
    """
    sections = run.prior_sections if with_priors else ()
    params = tuple(load_trained(run, section).params for section in sections)
    variables = load_trained(run, 'vqvae').variables if run.has_stage_1 else {}
    generator = Generator(variables, params, Specification.of(run.config))
    return sharding.put_sharded(generator.with_dtype(dtype) if dtype else generator)


def _check_network(run, trained, section):
    """Refuses weights that the same settings do not make any more."""
    path = trained.record.directory
    model, inputs = build.networks(run.config)[section]
    if different := build.different_arrays(trained.variables, jax.eval_shape(model.init, *inputs)):
        name, (saved, current) = next(iter(different.items()))
        raise JobError(
            f'{path} was trained by version {trained.record.version}, whose network differs from that of version '
            f'{record.__version__} in {len(different)} arrays, such as {name}: saved {saved}, now {current}. '
            f'Delete {path} to train it again, or use that version.'
        )
