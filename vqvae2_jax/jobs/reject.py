"""--job=reject: the classifier scores every sample by the probability of its intended class; the best are kept."""

import jax
import numpy as np

from vqvae2_jax.io import pictures, provenance
from vqvae2_jax.jobs import features, samples, workdir
from vqvae2_jax.jobs.sample import DIRECTORY as SAMPLES
from vqvae2_jax.jobs.sample import grid_positions
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.sampling.rejection import keep_best

DIRECTORY = 'rejection'


def reject(run: Run) -> None:
    """Writes rejection/scores.npz, accepted.npz and accepted.png."""
    source, directory = run.path(SAMPLES), run.path(DIRECTORY)
    judge, meta = features.load_judge(run), samples.read_meta(source)
    keep, threshold = run.config.reject.keep, run.config.reject.get('threshold', 0.0)
    record = {
        'schema': 1,
        'keep': keep,
        'threshold': threshold,
        'count': meta['count'],
        'upstream': {'classifier': judge.protocol['weights'], 'samples': samples.digest(source)},
        'version': provenance.package_version(),
    }
    if (directory / 'meta.json').exists() and provenance.read_json(directory / 'meta.json') == record:
        print(f'reject: done (see {directory})', flush=True)
        return
    (directory / 'meta.json').unlink(missing_ok=True)  # until the files below belong together again
    scored = _score(judge, source)
    kept = keep_best(scored['score'], scored['label'], keep, threshold)
    if not len(kept):
        best = scored['score'].max()
        raise workdir.JobError(f'reject.threshold={threshold} keeps no sample: the best one scores {best:.4g}')
    accepted = samples.take(source, kept) | {'score': scored['score'][kept]}
    samples.write_npz(directory / 'scores.npz', scored)
    samples.write_npz(directory / 'accepted.npz', accepted)
    best_first = np.argsort(-accepted['score'], kind='stable')
    grid = accepted['arr_0'][grid_positions(accepted['label'], best_first)]
    picture = pictures.image_grid(grid, columns=10, scale=pictures.visible_scale(grid))
    pictures.save_png(directory / 'accepted.png', picture)
    provenance.write_json(directory / 'meta.json', record)
    print(f'reject: kept {len(kept)} of {len(scored["score"])} samples in {directory}', flush=True)


def read_meta(run: Run) -> dict:
    """meta.json of the scores.

    Raises:
      JobError: there are none.
    """
    path = run.path(DIRECTORY, 'meta.json')
    if not path.exists():
        raise workdir.JobError(f'{path.parent} holds no scores; {workdir.job_command("reject")}')
    return provenance.read_json(path)


def _score(judge, source):
    """label, index, score (probability of the label) and predicted class of every sample, [N] each."""
    parts = []
    for path in samples.shard_paths(source):
        drawn = samples.read_npz(path)
        probabilities = np.asarray(jax.nn.softmax(judge.embed(drawn['arr_0'])['logits']))  # [N, S]
        score = probabilities[np.arange(len(probabilities)), drawn['label']]
        predicted = probabilities.argmax(axis=-1)
        parts.append({'label': drawn['label'], 'index': drawn['index'], 'score': score, 'predicted': predicted})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
