"""--job=export --to=FILE: the networks of the workdir in one file, for other programs."""

import jax

from vqvae2_jax.config import build
from vqvae2_jax.generator import Specification
from vqvae2_jax.io import names
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.weights import exported, rosinality, run_directory, sources

_SUFFIXES = (*sources.SAVED_SUFFIXES, exported.SUFFIX)


def export(run: Run) -> None:
    """Writes the file that --to names.

    NAME.safetensors is for `vqvae2_jax.load`, NAME.pt for rosinality's PyTorch code; the programs in NAME.npz run with
    JAX alone, and sample with the temperatures of the config.

    Raises:
      JobError: networks are missing; the name has another suffix; the networks do not fit the format; PyTorch is needed
        and not installed; or the job runs in several processes.
      SettingsChangedError: the networks are not those of the config.
      WriteError: the file cannot be written.
    """
    target = run.target
    if target is None or not target.endswith(_SUFFIXES):
        given = f', not {names.printable(target)}' if target else ''
        raise JobError(f'--job=export needs --to= with a name that ends with {", ".join(_SUFFIXES)}{given}')
    if jax.process_count() > 1:
        raise JobError('--job=export runs in one process: leave out --distributed')
    generator = run_directory.load(run.workdir)
    for section in run.generator_sections if generator.params else ('vqvae',):
        workdir.trained_record(run, section)  # refuses another config
    # The temperatures may have been chosen after the training.
    specification = Specification.of(run.config, generator.specification.class_names)
    generator = generator.replace(specification=specification)
    try:
        if target.endswith(exported.SUFFIX):
            exported.export(generator, target, **build.sampling_arguments(run.config))
        else:
            sources.save(generator, target)
    except (ValueError, ImportError) as error:
        raise JobError(f'--to: {error}') from error
    all_networks = generator.params and not target.endswith(rosinality.SUFFIXES)
    print(f'export: {"all networks" if all_networks else "stage 1"} in {target}', flush=True)
