"""--job=likelihood: nats of every level and bits of every image, of a split or of a folder; a score for outliers."""

import csv
import functools
import io
import math
import os

import jax
import numpy as np

from vqvae2_jax.config import build as configs
from vqvae2_jax.data.loader import eval_batches
from vqvae2_jax.distributed import sharding
from vqvae2_jax.io import files
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.workdir import SKIPPED, JobError, Run
from vqvae2_jax.sampling.log_likelihood import log_likelihood
from vqvae2_jax.tasks.task import to_float

DIRECTORY = 'likelihood'


def write_likelihood(run: Run) -> None:
    """Writes likelihood/<split>.csv or of-<folder>.csv, a line per image, the least likely first."""
    options = configs.options(run.config, 'likelihood')
    source = run.folder(options.path, 'likelihood.path') if options.path else run.images(options.split)
    known = not options.path and bool(run.config.data.num_classes)  # a folder's images may be of any class
    measure = make_likelihood(run, known)
    rows = []
    for batch in eval_batches(source, batch_size=run.config.sample.batch_size, **run.reading()):
        inputs = sharding.make_global_batch({name: batch[name] for name in ('image', 'label')})
        nats = -np.asarray(measure(inputs['image'], inputs['label']), np.float64)  # [L, B]
        for i in np.flatnonzero(batch['mask']):
            bits = nats[:, i].sum() / math.log(2)
            rows.append((source.where(batch['index'][i]), *nats[:, i], bits))
    if not rows:
        raise JobError(
            f'likelihood: none of the {len(source)} images could be read; they are listed in {run.path(SKIPPED)}'
        )
    rows.sort(key=lambda row: -row[-1])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(('image', *(f'nats_{name}' for name in run.levels), 'bits'))
    writer.writerows((name, *(f'{x:.3f}' for x in numbers)) for name, *numbers in rows)
    own = f'of-{os.path.basename(os.path.abspath(options.path))}'  # no split is called so
    path = run.path(DIRECTORY, f'{own if options.path else options.split}.csv')
    files.write_bytes(path, text.getvalue().encode())
    bits = np.array([row[-1] for row in rows])
    print(f'likelihood: {len(rows)} images, {bits.mean():.1f} bits each ({bits.min():.1f} to {bits.max():.1f})')
    print(f'the least likely: {rows[0][0]}\nall of them: {path}', flush=True)


def make_likelihood(run: Run, labelled: bool):
    """A jitted (image uint8 [B, H, W, C], label int [B]) -> log-likelihood in nats [L, B], finest level first.

    Not `labelled`: the class is unknown, and the labels are not looked at.
    """
    model, encoder, modules, weights = workdir.load_generator(run)

    @jax.jit
    def measure(encoder, weights, image, label):
        codes = model.apply(encoder, to_float(image), method='encode')
        return log_likelihood(modules, weights, codes, label if labelled else None)

    return functools.partial(measure, encoder, weights)
