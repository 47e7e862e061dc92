"""The codes that priors are trained on, as inputs of jobs: those that stage 1 extracted, or those of codes.path."""

from vqvae2_jax.data import own_codes
from vqvae2_jax.data.images import SPLITS
from vqvae2_jax.io import files, record
from vqvae2_jax.io.record import Record
from vqvae2_jax.jobs.workdir import Run, job_errors, trained_record


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
    """Returns a digest of the codes of all splits, and of the images they are of.

    Raises:
      JobError: codes are missing, or those of codes.path are not as their description says.
      StaleInputError: another stage 1 made them.
    """
    if run.has_stage_1:
        digests = {split: codes.digest for split, codes in codes_records(run).items()}
    else:
        digests = {split: source.digest for split, source in _own_splits(run).items()}
    return files.digest_json(digests)


def data_counts(run: Run) -> dict[str, int]:
    """Returns the number of images of every split, or without stage 1 of its codes.

    Raises:
      JobError: they are missing.
    """
    sources = {split: run.images(split) for split in SPLITS} if run.has_stage_1 else _own_splits(run)
    return {split: len(source) for split, source in sources.items()}


def _own_splits(run):
    # Not by `run.codes`, which compares checksums on all processes together: this is called on one.
    with job_errors():
        return {split: own_codes.open_split(run.config.codes.path, split, run.code_spec) for split in SPLITS}
