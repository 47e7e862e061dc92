"""Rejection and its sweep, on stored samples and a classifier that reads its features and logits off the pixels."""

import numpy as np
import pytest
from etils import epath

from vqvae2_jax.data import samples
from vqvae2_jax.evaluation import features, generative, measure
from vqvae2_jax.evaluation.features import FeatureStats, Network
from vqvae2_jax.io.files import read_json, write_json
from vqvae2_jax.jobs import reject
from vqvae2_jax.jobs.workdir import JobError, Run
from vqvae2_jax.metrics.frechet import Moments, frechet_distance
from vqvae2_jax.metrics.manifold import precision_recall

FEATURES, CLASSES = 8, 10


class Judge:
    """A network whose features are the first pixels of an image, and whose logits are the next ones over 4."""

    def __init__(self):
        self.images_seen = 0
        protocol = {'weights': 'none'}
        self.network = Network('classifier', protocol, CLASSES, batch_size=64, embed=self._embed)

    def _embed(self, images):
        self.images_seen += len(images)
        pixels = images.reshape(len(images), -1).astype(np.float32)
        return {'features': pixels[:, :FEATURES], 'logits': pixels[:, FEATURES : FEATURES + CLASSES] / 4}


def random_images(count, seed):
    """uint8 [count, 28, 28, 1]; the pixels that `Judge` reads are independent."""
    images = np.zeros((count, 28 * 28), np.uint8)
    pixels = np.random.default_rng(seed).normal(120, 20, (count, FEATURES + CLASSES))
    images[:, : FEATURES + CLASSES] = pixels.clip(0, 255)
    return images.reshape(count, 28, 28, 1)


def store_samples(run, images, labels, batch_size=100):
    """Writes a finished set of samples."""
    directory, index = run.path('samples'), np.arange(len(images))
    settings = dict.fromkeys(('temperature', 'top_k', 'top_p', 'guidance', 'dtype'), '')
    write_json(directory / 'meta.json', {'count': len(images), 'batch_size': batch_size, 'seed': 0, **settings})
    for start, stop in samples.shard_ranges(len(images), batch_size):
        arrays = {'arr_0': images[start:stop], 'label': labels[start:stop], 'index': index[start:stop]}
        samples.write_npz(samples.shard_path(directory, start, stop), arrays)


def observe(network, images):
    observed = FeatureStats(network)
    observed.add(images)
    return observed


def as_seen(real):
    """As `measure.look` returns it, with the real images in place of their reconstructions."""
    return measure.Seen({}, {}, real, real, None)


@pytest.fixture
def classifier_network(monkeypatch):
    classifier_network = Judge()
    monkeypatch.setattr(features, 'load_judge', lambda run: classifier_network.network)
    return classifier_network


@pytest.fixture
def empty_run(config, tmp_path):
    config.data.held_out = (0.9, 0.004)
    return Run(config, epath.Path(tmp_path) / 'run')


@pytest.fixture
def small_limit(monkeypatch):
    """Features of 100 images are held instead of 50 000."""
    for module in (features, generative, measure):
        monkeypatch.setattr(module, 'KEPT', 100, raising=False)
    return 100


def test_random_scores_give_a_flat_sweep(empty_run, classifier_network, monkeypatch):
    """All numbers are biased by the number of images; with the same number at each share only noise is left."""
    monkeypatch.setattr(generative, 'kernel_distance', lambda *sets: (0.0, None))  # slow, and not in the sweep
    store_samples(empty_run, random_images(2000, seed=0), np.arange(2000) % CLASSES)
    empty_run.config.evaluate.sweep = (1.0, 0.5, 0.1)
    reject.reject(empty_run)
    real = observe(classifier_network.network, random_images(2000, seed=1))
    found = measure.drawn(empty_run, classifier_network.network, as_seen(real), classifier_network.network)
    points = found['sweep']
    distances = [point['frechet_distance'] for point in points]
    assert max(distances) < 1.5 * min(distances)
    for name in ('precision', 'recall'):
        assert np.ptp([point[name] for point in points]) < 0.15
    assert points[2]['confidence'] > points[0]['confidence']
    assert [point['kept_count'] for point in points] == [2000, 1000, 200]
    assert [point['count'] for point in points] == [200, 200, 200]
    assert 'n = 200 samples' in found['sweep_note']
    assert 'below 10000 images frechet_distance is biased upwards, and precision and recall' in found['sweep_note']


def test_the_sweep_uses_the_best_samples_whatever_their_index(empty_run, classifier_network, small_limit):
    """The best tenth are samples 900 to 999; features of the first 100 samples are held for the other numbers."""
    images, labels = random_images(1000, seed=0), np.zeros(1000, int)
    images[900:].reshape(100, -1)[:, FEATURES] = 255
    store_samples(empty_run, images, labels, batch_size=64)
    empty_run.config.evaluate.sweep = (1.0, 0.1)
    reject.reject(empty_run)
    real = random_images(150, seed=1)
    real_seen = observe(classifier_network.network, real)
    classifier_network.images_seen = 0
    whole, best = measure.drawn(empty_run, classifier_network.network, as_seen(real_seen), classifier_network.network)[
        'sweep'
    ]
    for point, used in ((whole, images[:100]), (best, images[900:])):
        first, second = (classifier_network.network.embed(x)['features'] for x in (real[:100], used))
        assert point['count'] == 100
        distance = frechet_distance(Moments.of(first), Moments.of(second))
        np.testing.assert_allclose(point['frechet_distance'], distance, rtol=1e-6)
        assert (point['precision'], point['recall']) == pytest.approx(precision_recall(first, second))
    assert classifier_network.images_seen < 100 + 100 + len(empty_run.images('test')) + 64 + 400  # not all 1000 samples


def test_the_distance_of_samples_is_that_of_the_first_ones(empty_run, classifier_network, small_limit):
    images, real = random_images(250, seed=0), random_images(150, seed=1)
    store_samples(empty_run, images, np.arange(250) % CLASSES, batch_size=64)
    reject.reject(empty_run)
    found = measure.drawn(
        empty_run,
        classifier_network.network,
        as_seen(observe(classifier_network.network, real)),
        classifier_network.network,
    )
    assert found['count'] == 250
    assert (found['quality']['count_real'], found['quality']['count']) == (150, 100)
    seen = [Moments.of(classifier_network.network.embed(x)['features']) for x in (real, images[:100])]
    np.testing.assert_allclose(found['quality']['frechet_distance'], frechet_distance(*seen), rtol=1e-6)


def test_shares_that_keep_too_few_images_are_left_out_and_named(classifier_network):
    scores, labels = np.linspace(1, 0, 64), np.zeros(64, int)
    chosen = generative.choose_samples(scores, labels, (0.03, 0.25, 1.0), real_count=40)
    assert [(c.share, c.kept_count, len(c.positions)) for c in chosen] == [(1, 64, 16), (0.25, 16, 16), (0.03, 2, 0)]
    real, generated = (observe(classifier_network.network, random_images(64, seed)) for seed in (0, 1))
    points, note = generative.sweep(classifier_network.network, real, real, generated, np.arange(64), chosen, scores)
    assert [point['count'] for point in points] == [16, 16]
    assert '0.03 keeps 2 images; more than 3 kept and real ones are needed' in note
    chosen = generative.choose_samples(scores, labels, (1.0,), real_count=3)
    points, note = generative.sweep(classifier_network.network, real, real, generated, np.arange(64), chosen, scores)
    assert points == [] and '1 keeps 64 images; more than 3' in note


def test_a_warning_names_all_numbers_that_depend_on_the_number_of_images():
    def embed(images):
        pixels = images.reshape(len(images), -1).astype(np.float32)
        return {'features': pixels[:, :FEATURES], 'logits': pixels[:, FEATURES : FEATURES + CLASSES] / 16}

    for classes in (CLASSES, 0):
        network = Network('inception', {}, classes, batch_size=64, embed=embed)
        real, generated = (observe(network, random_images(count, seed=0)) for count in (60, 50))
        warning = generative.compare(network, real, generated)['warning']
        assert warning.startswith('60 real and 50 generated images: below 10000 images fid is biased upwards')
        assert 'precision and recall depend on the number of images' in warning
        assert ('inception_score downwards' in warning) == bool(classes)


def test_images_of_certain_class_are_ranked_by_log_probability(empty_run, classifier_network):
    """The probability of both is 1 in float32; the margins of their logits are 20 and 40."""
    images, labels = np.zeros((2, 28, 28, 1), np.uint8), np.array([3, 3])
    images.reshape(2, -1)[:, FEATURES + 3] = 80, 160
    store_samples(empty_run, images, labels)
    empty_run.config.reject.keep = 0.5
    reject.reject(empty_run)
    assert samples.read_npz(empty_run.path('rejection', 'accepted.npz'))['index'].tolist() == [1]
    scores = samples.read_npz(empty_run.path('rejection', 'scores.npz'))
    assert scores['score'].tolist() == [1, 1]
    np.testing.assert_allclose(scores['log_probability'], [-9 * np.exp(-20), -9 * np.exp(-40)], rtol=1e-6)


@pytest.mark.parametrize(
    'keep, threshold, kept',
    [
        (1.0, 0.0, [0, 1, 2, 3]),
        (1.0, 0.5, [0, 1, 2]),
        (1.0, 1.0, [0, 1]),
        (0.5, 1.0, [0, 1]),  # half of all four, not of the two that pass
        (0.75, 1.0, [0, 1]),  # a third one is not put in for the one that fails
    ],
)
def test_the_threshold_is_a_probability_as_it_is_stored(empty_run, classifier_network, keep, threshold, kept):
    """The logit of the intended class leads by 40, 20, 4 and -3; in float32 the first two probabilities are 1."""
    images, labels = np.zeros((4, 28, 28, 1), np.uint8), np.full(4, 3)
    flat = images.reshape(4, -1)
    flat[:, FEATURES + 3] = 160, 80, 0, 0
    flat[2, FEATURES + 3], flat[3, FEATURES + 5] = 16, 12
    store_samples(empty_run, images, labels)
    empty_run.config.reject.update(keep=keep, threshold=threshold)
    reject.reject(empty_run)
    assert samples.read_npz(empty_run.path('rejection', 'accepted.npz'))['index'].tolist() == kept


def test_log_probability():
    logits = np.random.default_rng(0).normal(0, 3, (50, 7)).astype(np.float32)
    label = np.arange(50) % 7
    expected = logits[np.arange(50), label] - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
    np.testing.assert_allclose(reject.log_probability(logits, label), expected, rtol=1e-12)
    margins = np.array([600.0, 20.0, 0.0, -20.0, -5000.0])
    found = reject.log_probability(np.stack([margins, np.zeros(5)], axis=1), np.zeros(5, int))
    np.testing.assert_allclose(
        found, [-np.exp(-600.0), -np.log1p(np.exp(-20.0)), -np.log(2), -20 - np.exp(-20.0), -5000]
    )
    assert np.isnan(reject.log_probability(np.array([[np.nan, 0.0]]), np.array([0]))).all()


def test_scores_of_an_earlier_layout_are_made_anew(empty_run, classifier_network):
    store_samples(empty_run, random_images(20, seed=0), np.arange(20) % CLASSES)
    reject.reject(empty_run)
    path = empty_run.path('rejection', 'meta.json')
    write_json(path, read_json(path) | {'schema': 1})
    with pytest.raises(
        JobError, match=r'rejection/meta.json has schema 1, this version reads schema 2; add --job=reject'
    ):
        reject.read_meta(empty_run)
    reject.reject(empty_run)
    assert reject.read_meta(empty_run)['schema'] == 2
