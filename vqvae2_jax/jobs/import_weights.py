"""--job=import --from=...: weights that were trained elsewhere, or codes, into the workdir.

Later jobs continue from them as from those of this package. Sources: PyTorch checkpoints (`weights.rosinality`), an
LMDB of codes (`data.lmdb_codes`), and all that `vqvae2_jax.load` takes (`jobs.pretrained`).
"""

import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from vqvae2_jax.config import build, portable
from vqvae2_jax.generator import Specification
from vqvae2_jax.io import files, names, record, regular, remote
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import pretrained, workdir
from vqvae2_jax.jobs.import_codes import import_codes
from vqvae2_jax.jobs.workdir import FROM, IMPORT, Run
from vqvae2_jax.training.checkpoint import CHECKPOINTS, WEIGHTS, BestCheckpoint, finish_weights
from vqvae2_jax.weights import rosinality

_NEED_STAGE_1 = ('extract_codes', 'reconstruct')
_NEED_PRIORS = ('sample', 'inpaint', 'likelihood')
# The jobs that import the networks they need.
JOBS = ('import', 'evaluate', 'serve', 'export', *_NEED_STAGE_1, *_NEED_PRIORS)


def import_source(run: Run, job: str = 'import') -> None:
    """Writes the networks of `run.source` that a job needs into the workdir; those imported before stay.

    Args:
      run: the run.
      job: one of `JOBS`; 'import' takes all that there is, also checkpoints and codes of rosinality.

    Raises:
      JobError: the source is missing, damaged, lacks a network or does not fit the config; the workdir has trained a
        network of its own; or the job runs in several processes.
      StaleInputError, SettingsChangedError: another source was imported, or with other settings.
    """
    if run.source is None:
        raise JobError(
            '--job=import needs --from=: a model of the package, a workdir, a .safetensors file, hf://OWNER/NAME, a '
            'PyTorch checkpoint (.pt), or the directory of an LMDB of codes'
        )
    if jax.process_count() > 1:
        raise JobError(
            'weights are imported by one process: run --job=import with this --from and without --distributed, then '
            'the same command as now without --from'
        )
    if pretrained.is_generator(run.source):
        _import_networks(run, job)
    elif job == 'import':
        _import_checkpoint(run, run.source)
    else:
        raise JobError(f'--from={names.printable(run.source)}: import it first, by --job=import')


def _import_networks(run, job) -> None:
    generator = pretrained.load(run.source)
    if not (run.has_stage_1 and generator.specification.has_stage_1):
        raise JobError(
            f'--from={names.printable(run.source)}: the codes are those of another tokenizer. Its priors can be '
            'trained further by --job=prior, and used in their own workdir or in Python, by vqvae2_jax.load'
        )
    with_priors = job not in _NEED_STAGE_1 and (generator.params or job in _NEED_PRIORS)
    for section in ('vqvae', *(run.prior_sections if with_priors else ())):
        weights = pretrained.weights(run, section)
        inputs = {FROM: files.digest_arrays(weights)}
        if section != 'vqvae':
            inputs['vqvae'] = workdir.trained_record(run, 'vqvae').digest
        class_names = generator.specification.class_names if section == 'vqvae' else ()
        _write_weights(run, section, inputs, lambda weights=weights: weights, class_names)


def _import_checkpoint(run: Run, source: str) -> None:
    """Writes vqvae/ from a checkpoint of rosinality's VQ-VAE, or codes/ from an LMDB of its codes."""
    with pretrained.source_errors():
        if remote.is_remote(source):
            source = remote.local_copy(source)
        if not os.path.exists(source):
            raise FileNotFoundError(f'there is no file or directory {names.printable(source)}')
        if os.path.isdir(source):
            import_codes(run, source)
        elif source.endswith(rosinality.READABLE_SUFFIXES):
            _import_vqvae(run, source)
        else:
            suffixes = ', '.join(('.safetensors', *rosinality.READABLE_SUFFIXES))
            raise ValueError(f'{names.printable(source)} is neither a {suffixes} file nor the directory of an LMDB')


def _import_vqvae(run: Run, source: str) -> None:
    skip = run.config.vqvae.relu_skip
    with regular.open_file(source) as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()

    def read():
        variables = rosinality.from_state_dict(rosinality.read(source), Specification.of(run.config))
        if not (skip or source.endswith('.npz') or zipfile.is_zipfile(source)):
            print(
                f'{names.printable(source)} has the format of PyTorch before 1.6 (2020-07). rosinality trained with a '
                'ReLU in place until 2021-01-23: such weights need --config.vqvae.relu_skip=True, in another --workdir',
                flush=True,
            )
        return variables

    if _write_weights(run, 'vqvae', {'checkpoint': digest}, read):
        print(f'vqvae: vqvae.relu_skip={skip}', flush=True)


def _write_weights(
    run: Run,
    section: str,
    inputs: dict[str, str],
    read: Callable[[], Mapping[str, Any]],
    class_names: Sequence[str] = (),
) -> bool:
    """Writes the directory of a training from weights of another place; returns False if that is done already.

    Args:
      run: the run; `run.source` is the place.
      section: section of the config: 'vqvae' or 'prior.<level>'.
      inputs: digests for the record, by name.
      read: () -> all collections of the network, {'params': ..., ...}; called only if they are to be written.
      class_names: names of the classes by label; () if they are unknown.

    Raises:
      JobError: the directory has a training of its own.
      StaleInputError, SettingsChangedError: other weights were imported, or with other settings.
    """
    path, name = run.path(workdir.training_directory(section)), os.path.basename(run.source.rstrip('/'))
    before = record.read_if_sound(path)
    if (before and before.job != IMPORT) or (path / CHECKPOINTS).exists():
        raise JobError(
            f'{path} holds a training of --job={workdir.training_job(section)}: give another --workdir for imported '
            'weights'
        )
    output = run.open_output(path, IMPORT, inputs, build.import_settings(run.config, section))
    if output.state == record.DONE:
        print(f'{path.name}: done (imported from {output.results["source"]})', flush=True)
        return False
    variables: dict[str, Any] = dict(read())
    with run.lock(path, IMPORT, output):
        files.remove(path / WEIGHTS)  # of an import that did not end
        output.files = {}
        output.start()
        params = variables.pop('params')
        BestCheckpoint(path).save(0, {}, {'params': params, 'model_state': variables})
        results = {'parameters': workdir.num_parameters(params), 'source': name, 'class_names': list(class_names)}
        results['config'] = portable.to_json(run.config)
        finish_weights(output, results)
    print(f'{path.name}: imported from {names.printable(run.source)}, to {path}', flush=True)
    return True
