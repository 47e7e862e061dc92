"""--job=reject: the classifier scores every sample by the probability of its intended class; the best are kept."""

import jax
import numpy as np

from vqvae2_jax import config as configs
from vqvae2_jax import parallel
from vqvae2_jax.io import pictures, provenance
from vqvae2_jax.jobs import samples, workdir
from vqvae2_jax.jobs.sample import DIRECTORY as SAMPLES
from vqvae2_jax.jobs.sample import by_class, grid_scale
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.sampling.rejection import keep_best
from vqvae2_jax.stages.stage import to_float

DIRECTORY = 'rejection'


def reject(run: Run) -> None:
    """Writes rejection/scores.npz and rejection/accepted.npz."""
    drawn, meta = samples.read_set(run.path(SAMPLES)), samples.read_meta(run.path(SAMPLES))
    trained, directory = workdir.load_trained(run, 'classifier', 'classifier'), run.path(DIRECTORY)
    record = {
        'schema': 1,
        'keep': run.config.reject.keep,
        'count': meta['count'],
        'upstream': {'classifier': trained.digest, 'samples': provenance.digest_json(meta)},
        'version': provenance.package_version(),
    }
    if (directory / 'meta.json').exists() and provenance.read_json(directory / 'meta.json') == record:
        print(f'reject: done (see {directory})', flush=True)
        return
    probabilities = classify(run, trained, drawn['arr_0'])  # [N, S]
    scores = probabilities[np.arange(len(probabilities)), drawn['label']]
    kept = keep_best(scores, drawn['label'], run.config.reject.keep)
    scored = {'label': drawn['label'], 'index': drawn['index'], 'score': scores}
    samples.write_npz(directory / 'scores.npz', {**scored, 'predicted': probabilities.argmax(axis=-1)})
    accepted = {name: values[kept] for name, values in {**drawn, **scored}.items()}
    samples.write_npz(directory / 'accepted.npz', accepted)
    grid = by_class(accepted['arr_0'], accepted['label'], np.argsort(-accepted['score'], kind='stable'))
    pictures.save_png(directory / 'accepted.png', pictures.image_grid(grid, columns=10, scale=grid_scale(grid)))
    provenance.write_json(directory / 'meta.json', record)
    print(f'reject: kept {len(kept)} of {len(scores)} samples in {directory}', flush=True)


def classify(run: Run, trained, images: np.ndarray) -> np.ndarray:
    """Class probabilities float32 [N, S] of uint8 images [N, H, W, C]."""
    model = configs.make_classifier(run.config)
    params = jax.device_put(trained.params, parallel.replicated())
    predict = jax.jit(lambda image: jax.nn.softmax(model.apply({'params': params}, to_float(image))))
    return map_batches(lambda batch: predict(batch['image']), {'image': images}, run.config.sample.batch_size)


def map_batches(function, arrays: dict[str, np.ndarray], batch_size: int) -> np.ndarray:
    """function over batches of `arrays` [N, ...] on all devices; the last batch is padded and cut again."""
    results, count = [], len(next(iter(arrays.values())))
    for start in range(0, count, batch_size):
        index = np.minimum(np.arange(start, start + batch_size), count - 1)
        batch = parallel.put_batch({name: values[index] for name, values in arrays.items()})
        results.append(np.asarray(function(batch))[: count - start])
    return np.concatenate(results)
