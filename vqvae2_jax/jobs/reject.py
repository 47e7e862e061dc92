"""--job=reject: scores every sample by the classifier's log-probability of its class, and keeps the best."""

from collections.abc import Callable

import jax
import numpy as np

from vqvae2_jax.data import sample_store
from vqvae2_jax.distributed import processes
from vqvae2_jax.distributed.batches import map_batches
from vqvae2_jax.distributed.preemption import stop_signals
from vqvae2_jax.evaluation.features import FeatureExtractor
from vqvae2_jax.io import plots, record
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import feature_store, workdir
from vqvae2_jax.jobs.sample import grid_positions
from vqvae2_jax.jobs.workdir import REJECTION, SAMPLES, Run
from vqvae2_jax.sampling.rejection import log_probability, select_top_per_class

SCORES, ACCEPTED, PICTURE = 'scores.npz', 'accepted.npz', 'accepted.png'


def reject(run: Run) -> None:
    """Writes scores.npz, accepted.npz and accepted.png into rejection/<sample.name>, again if anything has changed.

    Raises:
      JobError: samples or the classifier are missing, or no sample reaches the threshold.
      Interrupted: a stop signal came; nothing was written.
    """
    options, directory = run.config.reject, run.sample_set_path(REJECTION)
    settings = {'keep_fraction': options.keep_fraction, 'threshold': options.threshold}
    settings['features_version'] = feature_store.FEATURES_VERSION  # scores come from the same outputs
    output = run.open_output(directory, 'reject', inputs(run), settings, replace=True)
    if output.state == record.DONE:
        print(f'reject: done (see {directory})', flush=True)
        return
    with run.lock(directory, output.job, output), stop_signals() as received_signal:
        scored = _score(run, feature_store.load_classifier(run), received_signal)
        kept = processes.run_on_main_process(lambda: _write(run, output, scored))
    print(f'reject: kept {kept} of {len(scored["score"])} samples in {directory}', flush=True)


def inputs(run: Run) -> dict[str, str]:
    """Returns the current digests of the inputs of rejection/<sample.name>.

    Raises:
      JobError: samples or the classifier are missing.
    """
    samples = sample_store.read_set(run.sample_set_path(SAMPLES))
    return {'samples': samples.digest, 'classifier': feature_store.classifier_digest(run)}


def _score(run: Run, classifier: FeatureExtractor, received_signal: Callable[[], int]) -> dict[str, np.ndarray]:
    """Returns the arrays of scores.npz, [N] each."""
    source, batch_size, parts = feature_store.open_samples(run), run.batch_size('evaluate'), []
    run.print_start(
        'reject', f'{len(source)} samples', parameters=workdir.num_parameters(classifier.params), batch='evaluate'
    )
    with jax.set_mesh(run.mesh):
        batches = feature_store.read_batches(run, source, 'reject', received_signal)
        for batch in map_batches(lambda batch: {'logits': classifier.extract(batch)['logits']}, batches, batch_size):
            logits, label = batch['logits'][batch['mask']], batch['label'][batch['mask']]
            log_p = log_probability(logits, label)
            part = {'label': label, 'score': np.exp(log_p).astype(np.float32), 'log_probability': log_p}
            parts.append(part | {'predicted': logits.argmax(axis=-1)})
    scored = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return scored | {'index': np.arange(len(source), dtype=np.int64)}


def _write(run, output, scored) -> int:
    """Writes all files; returns the number of samples kept."""
    source, directory, threshold = run.sample_set_path(SAMPLES), output.directory, run.config.reject.threshold
    kept = select_top_per_class(scored['log_probability'], scored['label'], run.config.reject.keep_fraction)
    kept = kept[scored['score'][kept] >= np.float32(threshold)]  # the stored score, so that 1.0 reaches 1.0
    if not len(kept):
        best = scored['score'].max()
        raise JobError(f'reject.threshold={threshold} keeps no sample: the best one scores {best:.4g}')
    accepted = sample_store.take(source, kept) | {name: scored[name][kept] for name in ('score', 'log_probability')}
    output.start()
    sample_store.write_npz(directory / SCORES, scored)
    sample_store.write_npz(directory / ACCEPTED, accepted)
    best_first = np.argsort(-accepted['log_probability'], kind='stable')
    grid = accepted['arr_0'][grid_positions(accepted['label'], best_first)]
    plots.save_png(directory / PICTURE, plots.image_grid(grid, columns=10, scale=plots.visible_scale(grid)))
    output.add_files(SCORES, ACCEPTED, PICTURE)
    output.finish({'count': len(scored['score']), 'accepted': len(kept)})
    return len(kept)
