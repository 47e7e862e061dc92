"""The parts of a report whose inputs exist, and the jobs that the others wait for. On the main process only."""

from collections.abc import Callable

from vqvae2_jax.config import build
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.images import SPLITS
from vqvae2_jax.io import record
from vqvae2_jax.io.record import MissingError
from vqvae2_jax.jobs import cas, workdir
from vqvae2_jax.jobs.workdir import RECONSTRUCTIONS, REJECTION, SAMPLES, Run


def find_missing(run: Run) -> dict[str, str]:
    """Returns the parts of the report whose inputs are missing, with the reason, which names the job to run.

    The parts are 'likelihood', 'samples', 'classifier', 'rejection' and 'cas', as far as the config has them.
    Reconstructions are never missing, because they need stage 1 alone.

    Raises:
      JobError: stage 1 is missing, or priors of the codes of another tokenizer; or an output is damaged.
    """
    missing = {}
    if run.has_stage_1:
        _read_trained(run, 'vqvae')
    else:
        _read_trained(run, *run.prior_sections)
    parts = _parts(run)
    for part, read in parts.items():
        try:
            read(run)
        except MissingError as error:
            missing[part] = str(error)
    # A finished part whose inputs are missing is missing too. The reason names the first job to run.
    reasons = [missing[name] for name in ('classifier', 'samples') if name in missing]
    for part in ('rejection', 'cas'):
        if reasons and part in parts:
            missing[part] = reasons[0]
    return missing


def _parts(run) -> dict[str, Callable[[Run], None]]:
    parts = {'likelihood': _read_likelihood, 'samples': _read_samples}
    if build.has_classifier(run.config):
        parts['classifier'] = _read_classifier
        parts['rejection'] = lambda run: record.read_done(run.sample_set_path(REJECTION), 'reject')
    if build.has_cas(run.config):
        parts['cas'] = _read_cas
    return parts


def _read_trained(run, *sections):
    for section in sections:
        record.read_done(run.path(workdir.training_directory(section)), workdir.training_job(section))


def _read_likelihood(run):
    for split in SPLITS if run.has_stage_1 else ():
        record.read_done(run.path('codes', split), 'extract_codes')
    _read_trained(run, *run.prior_sections)


def _read_samples(run):
    sample_store.read_set(run.sample_set_path(SAMPLES))
    _read_trained(run, *run.prior_sections)


def _read_classifier(run):
    if build.trains_classifier(run.config):
        _read_trained(run, 'classifier')


def _read_cas(run):
    sample_store.read_set(run.path(RECONSTRUCTIONS))
    for directory in cas.directories(run).values():
        record.read_done(run.path(directory), 'cas')
