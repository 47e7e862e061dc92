"""--job=reject: the classifier scores every sample by the log-probability of its intended class; the best are kept."""

import numpy as np

from vqvae2_jax.data import samples
from vqvae2_jax.evaluation import features
from vqvae2_jax.io import files, plots
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.sample import DIRECTORY as SAMPLES
from vqvae2_jax.jobs.sample import grid_positions
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.sampling.rejection import select_top_per_class

DIRECTORY = 'rejection'
_SCHEMA = 2  # of its files


def reject(run: Run) -> None:
    """Writes rejection/scores.npz, accepted.npz and accepted.png."""
    source, directory = run.path(SAMPLES), run.path(DIRECTORY)
    classifier_network, meta = features.load_classifier(run), samples.read_meta(source)
    keep, threshold = run.config.reject.keep, run.config.reject.get('threshold', 0.0)
    record = {
        'schema': _SCHEMA,
        'keep': keep,
        'threshold': threshold,
        'count': meta['count'],
        'upstream': {'classifier': classifier_network.protocol['weights'], 'samples': samples.digest(source)},
        'version': files.package_version(),
    }
    if (directory / 'meta.json').exists() and files.read_json(directory / 'meta.json') == record:
        print(f'reject: done (see {directory})', flush=True)
        return
    (directory / 'meta.json').unlink(missing_ok=True)  # until the files below belong together again
    scored = _score(classifier_network, source)
    kept = select_top_per_class(scored['log_probability'], scored['label'], keep)
    kept = kept[scored['score'][kept] >= np.float32(threshold)]  # the stored score, so that one of 1.0 passes 1.0
    if not len(kept):
        best = scored['score'].max()
        raise workdir.JobError(f'reject.threshold={threshold} keeps no sample: the best one scores {best:.4g}')
    accepted = samples.take(source, kept) | {name: scored[name][kept] for name in ('score', 'log_probability')}
    samples.write_npz(directory / 'scores.npz', scored)
    samples.write_npz(directory / 'accepted.npz', accepted)
    best_first = np.argsort(-accepted['log_probability'], kind='stable')
    grid = accepted['arr_0'][grid_positions(accepted['label'], best_first)]
    picture = plots.image_grid(grid, columns=10, scale=plots.visible_scale(grid))
    plots.save_png(directory / 'accepted.png', picture)
    files.write_json(directory / 'meta.json', record)
    print(f'reject: kept {len(kept)} of {len(scored["score"])} samples in {directory}', flush=True)


def read_meta(run: Run) -> dict:
    """meta.json of the scores.

    Raises:
      JobError: there are none, or an earlier version of this package wrote them.
    """
    path = run.path(DIRECTORY, 'meta.json')
    if not path.exists():
        raise workdir.JobError(f'{path.parent} holds no scores; {workdir.job_command("reject")}')
    meta = files.read_json(path)
    if meta['schema'] != _SCHEMA:
        raise workdir.JobError(
            f'{path} has schema {meta["schema"]}, this version reads schema {_SCHEMA}; {workdir.job_command("reject")}'
        )
    return meta


def log_probability(logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Log-probability of the label under a softmax over the logits.

    In float32 a softmax rounds to exactly 1 where the label's logit is more than about 17 above the others, and a log
    softmax to exactly 0. This computes -log(1 + sum of exp(logit - logit of the label) over the other classes) in
    float64, which tells such images apart up to a margin of about 700.

    Args:
      logits: float [N, S], S at least 2.
      label: int [N].

    Returns:
      float64 [N].
    """
    logits, rows = np.array(logits, np.float64), np.arange(len(logits))
    own = logits[rows, label]
    logits[rows, label] = -np.inf  # leaves the other classes
    top = logits.max(axis=-1)
    others = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
    with np.errstate(invalid='ignore'):  # NaN stays NaN; `select_top_per_class` refuses it
        return -np.logaddexp(0, others - own)


def _score(classifier_network, source):
    """What scores.npz holds of every sample, [N] each."""
    parts = []
    for path in samples.shard_paths(source):
        drawn = samples.read_npz(path)
        logits = classifier_network.embed(drawn['arr_0'])['logits']  # [N, S]
        log_p = log_probability(logits, drawn['label'])
        part = {'label': drawn['label'], 'index': drawn['index'], 'score': np.exp(log_p).astype(np.float32)}
        parts.append(part | {'log_probability': log_p, 'predicted': logits.argmax(axis=-1)})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
