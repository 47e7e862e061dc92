"""--job=pipeline: all jobs in order. Each does only the missing work, so the same command continues after any stop."""

import time

from vqvae2_jax.config import build
from vqvae2_jax.config.validation import check_batch_sizes
from vqvae2_jax.distributed import processes
from vqvae2_jax.io import record
from vqvae2_jax.io.logging import format_duration
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import cas, class_labels, import_weights, pretrained, remedies, workdir
from vqvae2_jax.jobs.evaluate import evaluate
from vqvae2_jax.jobs.export import export
from vqvae2_jax.jobs.extract_codes import extract_codes
from vqvae2_jax.jobs.inpaint import inpaint
from vqvae2_jax.jobs.likelihood import write_likelihood
from vqvae2_jax.jobs.paths import check_paths
from vqvae2_jax.jobs.plan import plan
from vqvae2_jax.jobs.reconstruct import reconstruct
from vqvae2_jax.jobs.reject import reject
from vqvae2_jax.jobs.sample import draw_samples
from vqvae2_jax.jobs.serve import serve
from vqvae2_jax.jobs.train import train_classifier, train_prior, train_vqvae
from vqvae2_jax.jobs.workdir import SKIPPED, Run, training_directory

_PIPELINE = {  # in order
    'vqvae': train_vqvae,
    'extract_codes': extract_codes,
    'prior': train_prior,
    'classifier': train_classifier,
    'sample': draw_samples,
    'reject': reject,
    'cas': cas.classification_accuracy_score,
    'evaluate': evaluate,
}
_OTHERS = {
    'inpaint': inpaint,
    'likelihood': write_likelihood,
    'plan': plan,
    'reconstruct': reconstruct,
    'serve': serve,
    'import': import_weights.import_source,
    'export': export,
}
JOBS = ('pipeline', *_PIPELINE, *_OTHERS)
_WITHOUT_STAGE_1 = ('pipeline', 'prior', 'sample', 'evaluate', 'likelihood', 'plan', 'export')
# The jobs that take --from and --to.
_WITH_SOURCE, _WITH_TARGET = (*import_weights.JOBS, 'vqvae', 'prior'), ('export',)


def run_job(run: Run, job: str, level: str | None = None) -> None:
    """Runs one job by name; in a distributed run all processes call it together.

    Args:
      run: the run.
      job: one of `JOBS`.
      level: with the job `prior`, the level to train; None: all levels.

    Raises:
      ConfigError: the training batch of a network that the job trains cannot be shared by the devices.
      JobError: an unknown level, or the job cannot run as things stand.
    """
    pretrained.load.cache_clear()  # the weights may have been replaced since the last job
    if not run.has_stage_1 and job not in _WITHOUT_STAGE_1:
        raise JobError(
            f'--job={job} needs images and stage 1, which encodes and decodes them, but this config has the codes of '
            f'another tokenizer, codes.path={run.config.codes.path!r}: the jobs are {", ".join(_WITHOUT_STAGE_1)}'
        )
    if level is not None and job != 'prior':
        raise JobError(f'--level belongs to --job=prior, not to --job={job}')
    one_training = job in ('vqvae', 'classifier') or (job == 'prior' and level is not None)
    if run.continue_from is not None and not one_training:
        raise JobError(
            f'--continue_from={run.continue_from} belongs to one training: give --job=vqvae, --job=classifier or '
            f'--job=prior --level={run.levels[-1]}'
        )
    for flag, value, takers in (('--from', run.source, _WITH_SOURCE), ('--to', run.target, _WITH_TARGET)):
        if value is not None and job not in takers:
            raise JobError(f'{flag}={value} belongs to --job={" or ".join(takers)}, not to --job={job}')
    if level is not None and level not in run.levels:
        raise JobError(f'--level={level}: the levels of this config are {", ".join(reversed(run.levels))}')
    if (real := run.config.evaluate.real) and job != 'evaluate':
        raise JobError(f'evaluate.real={real!r}: two sets of images are compared by --job=evaluate, not by {job}')
    check_paths(run.config, run.workdir, job)
    jobs = _pipeline_jobs(run) if job == 'pipeline' else [job]
    if run.source is not None and job in import_weights.JOBS and job != 'import':
        import_weights.import_source(run, job)
    if job == 'pipeline':  # a name that no class has is refused before any training
        class_labels.resolve_sample_labels(run)
    levels = [level] if level else _levels_to_train(run, job)
    sections = processes.run_on_main_process(lambda: _sections_to_train(run, jobs, levels))
    check_batch_sizes(run.config, run.mesh.devices.shape, sections)
    for name in jobs:
        for arguments in [(level,) for level in levels] if name == 'prior' else [()]:
            begin = time.monotonic()
            with remedies.of_job(run, name):
                (_PIPELINE | _OTHERS)[name](run, *arguments)
            processes.process_any(False)  # all processes can read the files that the main process has written
            if build.skips_unreadable(run.config) and (skipped := run.skipped()):
                print(f'{len(skipped)} unreadable files were skipped so far: {run.path(SKIPPED)}', flush=True)
            if job == 'pipeline':
                seconds = time.monotonic() - begin
                print(f'-- {" ".join((name, *arguments))}: {format_duration(seconds)}\n', flush=True)


def _pipeline_jobs(run: Run) -> list[str]:
    """Returns the jobs of the pipeline that apply to a config, in order."""
    skipped = () if run.has_stage_1 else ('vqvae', 'extract_codes')
    skipped += () if build.has_classifier(run.config) else ('reject',)
    skipped += () if build.trains_classifier(run.config) else ('classifier',)
    skipped += () if build.has_cas(run.config) else ('cas',)
    if processes.run_on_main_process(lambda: workdir.imported_record(run)):
        skipped += ('vqvae',)
        print('vqvae: done (imported)', flush=True)
    return [name for name in _PIPELINE if name not in skipped]


def _levels_to_train(run: Run, job: str) -> list[str]:
    """Returns the levels whose priors a job trains, the coarsest first, as it is sampled; their order does not matter.

    The pipeline leaves imported priors as they are.
    """
    levels = list(reversed(run.levels))
    if job != 'pipeline':
        return levels

    def find_imported():
        return [name for name in levels if workdir.imported_record(run, f'prior.{name}')]

    for name in (imported := processes.run_on_main_process(find_imported)):
        print(f'prior {name}: done (imported)', flush=True)
    return [name for name in levels if name not in imported]


def _sections_to_train(run: Run, jobs: list[str], levels: list[str]) -> list[str]:
    """Returns the sections of the config whose training is not done and belongs to a job, or is compiled for a plan."""
    if jobs == ['plan']:
        return list(build.networks(run.config))
    sections = {'vqvae': ['vqvae'], 'prior': [f'prior.{level}' for level in levels], 'classifier': ['classifier']}
    outputs = [(section, training_directory(section)) for job in jobs for section in sections.get(job, [])]
    outputs += [('classifier', directory) for directory in cas.directories(run).values()] if 'cas' in jobs else []

    def is_done(section, directory):
        output = record.read_if_done(run.path(directory))
        return output is not None and output.results.get('steps', 0) >= run.config[section].training.steps

    return [section for section, directory in outputs if not is_done(section, directory)]
