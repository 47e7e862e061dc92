"""--job=pipeline: all jobs in order. Each does only the missing work, so the same command continues after any stop."""

import time
from collections.abc import Callable

from vqvae2_jax.config import build as configs
from vqvae2_jax.distributed import processes
from vqvae2_jax.io.logging import format_duration
from vqvae2_jax.jobs.cas import classification_accuracy_score
from vqvae2_jax.jobs.evaluate import evaluate
from vqvae2_jax.jobs.extract_codes import extract_codes
from vqvae2_jax.jobs.inpaint import inpaint
from vqvae2_jax.jobs.likelihood import write_likelihood
from vqvae2_jax.jobs.plan import plan
from vqvae2_jax.jobs.reject import reject
from vqvae2_jax.jobs.sample import draw_samples
from vqvae2_jax.jobs.train import train_classifier, train_prior, train_vqvae
from vqvae2_jax.jobs.workdir import JobError, Run

JOBS = ('pipeline', 'vqvae', 'extract_codes', 'prior', 'classifier', 'sample', 'reject', 'cas', 'evaluate')
JOBS += ('inpaint', 'likelihood', 'plan')  # not part of the pipeline


def run_job(run: Run, job: str, level: str | None = None) -> None:
    """Runs one job by name; in a distributed run all processes call it together.

    Args:
      run: the run.
      job: one of `JOBS`.
      level: with the job `prior`, the level to train; None: all levels.

    Raises:
      JobError: an unknown level, or the job cannot run as things stand.
    """
    if level is not None and job != 'prior':
        raise JobError(f'--level belongs to --job=prior, not to --job={job}')
    if level is not None and level not in run.levels:
        raise JobError(f'--level={level}: the levels of this config are {", ".join(reversed(run.levels))}')
    if (real := run.config.evaluate.real) and job != 'evaluate':
        raise JobError(f'evaluate.real={real!r}: two sets of images are compared by --job=evaluate, not by {job}')
    for name, work in _steps(run, job, level):
        begin = time.monotonic()
        work()
        processes.process_any(False)  # all processes can read the files that the main process has written
        if job == 'pipeline':
            print(f'-- {name}: {format_duration(time.monotonic() - begin)}\n', flush=True)


def _steps(run: Run, job: str, level: str | None) -> list[tuple[str, Callable[[], None]]]:
    """Returns (name, function) of every step of a job, in order."""
    # The coarsest prior first, as it is sampled; their order does not matter.
    priors = [level] if level else list(reversed(run.levels))
    steps = {
        'vqvae': [('vqvae', lambda: train_vqvae(run))],
        'extract_codes': [('extract_codes', lambda: extract_codes(run))],
        'prior': [(f'prior {name}', lambda name=name: train_prior(run, name)) for name in priors],
        'classifier': [('classifier', lambda: train_classifier(run))],
        'sample': [('sample', lambda: draw_samples(run))],
        'reject': [('reject', lambda: reject(run))],
        'cas': [('cas', lambda: classification_accuracy_score(run))],
        'evaluate': [('evaluate', lambda: evaluate(run))],
    }
    others = {
        'inpaint': [('inpaint', lambda: inpaint(run))],
        'likelihood': [('likelihood', lambda: write_likelihood(run))],
        'plan': [('plan', lambda: plan(run))],
    }
    if job != 'pipeline':
        return (steps | others)[job]
    skipped = () if configs.has_classifier(run.config) else ('reject',)
    skipped += () if configs.trains_classifier(run.config) else ('classifier',)
    skipped += () if configs.has_cas(run.config) else ('cas',)
    return [step for name, parts in steps.items() if name not in skipped for step in parts]
