"""Samples beside the training images that are nearest to them, so that copies are seen (evaluate.nearest)."""

from typing import Any

import numpy as np

from vqvae2_jax.evaluation.features import FeatureStats
from vqvae2_jax.io.record import Record
from vqvae2_jax.jobs import feature_store
from vqvae2_jax.jobs.evaluation_parts import Evaluation
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.metrics.neighbors import nearest

TRAIN = 'train'


def is_on(e: Evaluation) -> bool:
    """Returns whether samples are compared with the training images."""
    return e.network is not None and e.run.config.evaluate.nearest > 0


def extract(e: Evaluation) -> Record:
    """Extracts the features of all training images, unless that is done. All processes together.

    Raises:
      Interrupted: a stop signal came; the same call continues.
    """
    return feature_store.image_features(e.run, e.network, TRAIN, e.received_signal)


def compare(
    e: Evaluation, train: Record, samples: FeatureStats, real: FeatureStats, reconstructed: FeatureStats
) -> dict[str, Any]:
    """Compares samples with the training images; on the main process only.

    The distances of held-out images are those to compare with: much smaller ones of samples mean copies.

    Args:
      e: the evaluation.
      train: from `extract`.
      samples: features of the first samples.
      real: features of the images of the reference split.
      reconstructed: features of their reconstructions, which are decoded as samples are.

    Returns:
      'median_distance': the median distance to the nearest training image, of 'samples' and of the others, by name;
      'low_distance': the distance that 1 % of them are below;
      'count_train': the number of training images;
      'shown': [{'sample', 'train', 'distance'}], the samples with the smallest distances, smallest first, with the
      indices of a sample and of its nearest training image.
      {'missing': the reason} if features are not finite, so that the rest of a report is kept.
    """
    sets = {'samples': samples}
    if e.reference != TRAIN:
        sets |= {f'{e.reference} images': real, f'{e.reference} reconstructions': reconstructed}
    features = [stats.features for stats in sets.values()]
    try:  # all sets at once: the features of the training images are read once
        index, distance = nearest(np.concatenate(features), feature_store.iterate_features(train))
    except ValueError as error:
        return {'missing': str(error)}
    distances = dict(zip(sets, np.split(distance, np.cumsum([len(each) for each in features])[:-1]), strict=True))
    shown = np.argsort(distances['samples'], kind='stable')[: e.run.config.evaluate.nearest].tolist()
    return {
        'median_distance': {name: float(np.median(each)) for name, each in distances.items()},
        'low_distance': {name: float(np.quantile(each, 0.01)) for name, each in distances.items()},
        'count_train': train.results['count'],
        'shown': [{'sample': i, TRAIN: int(index[i]), 'distance': float(distance[i])} for i in shown],
    }


def read_training_images(run: Run, results: dict[str, Any]) -> np.ndarray:
    """Returns the training images of the results of `compare`, uint8 [M, H, W, C]."""
    source = run.images(TRAIN)
    return np.stack([source[row[TRAIN]]['image'] for row in results['shown']])
