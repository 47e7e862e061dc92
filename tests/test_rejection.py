"""Rejection and its sweep, on stored samples and a classifier that reads its features and logits off the pixels."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from vqvae2_jax.data import sample_store
from vqvae2_jax.data.images import ImageSource
from vqvae2_jax.data.shards import shard_ranges
from vqvae2_jax.evaluation import generative
from vqvae2_jax.evaluation.features import FeatureExtractor, FeatureStats
from vqvae2_jax.io import record
from vqvae2_jax.jobs import evaluate_samples, feature_store, reject
from vqvae2_jax.jobs.evaluation_parts import Evaluation
from vqvae2_jax.jobs.workdir import JobError, Run
from vqvae2_jax.metrics.frechet import Moments, frechet_distance
from vqvae2_jax.metrics.manifold import precision_recall
from vqvae2_jax.sampling.rejection import log_probability

FEATURES, CLASSES = 8, 10


def pixels_as_features(params, images):
    """Features are the first pixels of an image, logits the next ones over 4."""
    pixels = images.reshape(len(images), -1).astype(jnp.float32)
    return {'features': pixels[:, :FEATURES], 'logits': pixels[:, FEATURES : FEATURES + CLASSES] / 4}


CLASSIFIER = FeatureExtractor('classifier', {'weights': 'none'}, CLASSES, {}, pixels_as_features)


def extract(images):
    return {name: np.asarray(values) for name, values in pixels_as_features({}, images).items()}


def random_images(count, seed):
    """uint8 [count, 28, 28, 1]; the pixels that the classifier reads are independent."""
    images = np.zeros((count, 28 * 28), np.uint8)
    pixels = np.random.default_rng(seed).normal(120, 20, (count, FEATURES + CLASSES))
    images[:, : FEATURES + CLASSES] = pixels.clip(0, 255)
    return images.reshape(count, 28, 28, 1)


def store_samples(run, images, labels, shard_size=100):
    """Writes a finished set of samples."""
    directory, index = run.sample_set_path('samples'), np.arange(len(images))
    fields = ('temperature', 'top_k', 'top_p', 'guidance', 'dtype', 'seed')
    settings = dict.fromkeys(fields, '') | {'shard_size': shard_size}
    output = record.open_output(directory, 'sample', {}, settings)
    for start, stop in shard_ranges(len(images), shard_size):
        arrays = {'arr_0': images[start:stop], 'label': labels[start:stop], 'index': index[start:stop]}
        path = sample_store.shard_path(directory, start, stop)
        sample_store.write_npz(path, arrays)
        output.add_files(path.name)
    output.finish({'count': len(images)})


def stats(images):
    return FeatureStats(**extract(images))


class ArraySource:
    """Images in memory, in place of a split."""

    def __init__(self, images):
        self.images, self.digest, self.on_error = images, f'{images.sum()}', 'raise'
        self.class_names = tuple(str(i) for i in range(CLASSES))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {'image': self.images[index], 'label': np.int32(0), 'index': np.int64(index)}


def sample_metrics(run, real, monkeypatch):
    """The metrics of the stored samples against `real`, which are their own reconstructions too."""
    monkeypatch.setattr(Run, 'images', lambda run, split: ArraySource(real))

    def reference(run, extractor, split, received_signal):
        return feature_store.write_features(run, extractor, ArraySource(real), run.path('real'), {}, received_signal)

    monkeypatch.setattr(feature_store, 'image_features', reference)
    monkeypatch.setattr(feature_store, 'reconstruction_features', reference)
    monkeypatch.setattr(evaluate_samples, 'ALL_LEVELS', feature_store.IMAGES)
    evaluation = Evaluation(run, CLASSIFIER, CLASSIFIER, lambda: 0)
    return evaluate_samples.sample_metrics(evaluation, sample_store.read_set(run.sample_set_path('samples')))


@pytest.fixture(autouse=True)
def classifier(monkeypatch):
    monkeypatch.setattr(feature_store, 'load_classifier', lambda run: CLASSIFIER)
    monkeypatch.setattr(feature_store, 'classifier_digest', lambda run: 'none')


@pytest.fixture
def empty_run(config, tmp_path):
    config.data.held_out = (0.9, 0.004)
    config.reject.keep_fraction = 0.5
    return Run(config, epath.Path(tmp_path) / 'run')


@pytest.fixture
def small_limit(monkeypatch):
    """Features of 100 images are stored instead of 50 000."""
    for module in (feature_store, generative, evaluate_samples):
        monkeypatch.setattr(module, 'MAX_STORED_FEATURES', 100)
    return 100


@pytest.fixture
def images_read(monkeypatch):
    """Indices of the images read from sources."""
    read, indices = ImageSource.__getitem__, []

    def counted(source, index):
        indices.append(index)
        return read(source, index)

    monkeypatch.setattr(ImageSource, '__getitem__', counted)
    return indices


def test_random_scores_give_a_flat_sweep(empty_run, monkeypatch):
    """All metrics are biased by the number of images; with the same number at each point only noise is left."""
    monkeypatch.setattr(generative, 'kernel_distance', lambda *sets, track: (0.0, None))  # slow, and not in the sweep
    store_samples(empty_run, random_images(2000, seed=0), np.arange(2000) % CLASSES)
    empty_run.config.evaluate.sweep = (1.0, 0.5, 0.1)
    reject.reject(empty_run)
    found = sample_metrics(empty_run, random_images(2000, seed=1), monkeypatch)
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


def test_the_sweep_uses_the_best_samples_whatever_their_index(empty_run, small_limit, images_read, monkeypatch):
    """The best tenth are samples 900 to 999; features of the first 100 samples serve for the other metrics."""
    images, labels = random_images(1000, seed=0), np.zeros(1000, int)
    images[900:].reshape(100, -1)[:, FEATURES] = 255
    store_samples(empty_run, images, labels, shard_size=64)
    empty_run.config.evaluate.sweep = (1.0, 0.1)
    reject.reject(empty_run)
    assert sorted(images_read) == [0, *range(1000)]  # the loader reads the first one to know its size
    images_read.clear()
    real = random_images(150, seed=1)
    whole, best = sample_metrics(empty_run, real, monkeypatch)['sweep']
    for point, used in ((whole, images[:100]), (best, images[900:])):
        first, second = (extract(x)['features'] for x in (real[:100], used))
        assert point['count'] == 100
        distance = frechet_distance(Moments.of(first), Moments.of(second))
        np.testing.assert_allclose(point['frechet_distance'], distance, rtol=1e-6)
        assert (point['precision'], point['recall']) == pytest.approx(precision_recall(first, second))
    assert len(images_read) == 1 + 100 + 100  # not all 1000 samples


def test_the_distance_of_samples_is_that_of_the_first_ones(empty_run, small_limit, monkeypatch):
    images, real = random_images(250, seed=0), random_images(150, seed=1)
    store_samples(empty_run, images, np.arange(250) % CLASSES, shard_size=64)
    reject.reject(empty_run)
    found = sample_metrics(empty_run, real, monkeypatch)
    assert (found['quality']['count_real'], found['quality']['count']) == (150, 100)
    moments = [Moments.of(extract(x)['features']) for x in (real, images[:100])]
    np.testing.assert_allclose(found['quality']['frechet_distance'], frechet_distance(*moments), rtol=1e-6)


def test_fractions_that_keep_too_few_images_are_left_out_and_named():
    scores, labels = np.linspace(1, 0, 64), np.zeros(64, int)
    chosen = generative.choose_samples(scores, labels, (0.03, 0.25, 1.0), real_count=40)
    assert [(c.fraction, c.kept_count, len(c.indices)) for c in chosen] == [(1, 64, 16), (0.25, 16, 16), (0.03, 2, 0)]
    real, generated = (stats(random_images(64, seed)) for seed in (0, 1))
    points, note = generative.rejection_sweep('classifier', real, real, generated, np.arange(64), chosen, scores)
    assert [point['count'] for point in points] == [16, 16]
    assert '0.03 keeps 2 images; more than 3 kept and real ones are needed' in note
    chosen = generative.choose_samples(scores, labels, (1.0,), real_count=3)
    points, note = generative.rejection_sweep('classifier', real, real, generated, np.arange(64), chosen, scores)
    assert points == [] and '1 keeps 64 images; more than 3' in note


def test_a_warning_names_all_metrics_that_depend_on_the_number_of_images():
    for logits in (True, False):
        arrays = [extract(random_images(count, seed=0)) for count in (60, 50)]
        real, generated = (FeatureStats(found['features'], found['logits'] / 4 if logits else None) for found in arrays)
        warning = generative.generative_metrics('inception', real, generated)['warning']
        assert warning.startswith('60 real and 50 generated images: below 10000 images fid is biased upwards')
        assert 'precision and recall depend on the number of images' in warning
        assert ('inception_score downwards' in warning) == logits


def test_images_of_certain_class_are_ranked_by_log_probability(empty_run):
    """The probability of both is 1 in float32; the margins of their logits are 20 and 40."""
    images, labels = np.zeros((2, 28, 28, 1), np.uint8), np.array([3, 3])
    images.reshape(2, -1)[:, FEATURES + 3] = 80, 160
    store_samples(empty_run, images, labels)
    reject.reject(empty_run)
    assert sample_store.read_npz(empty_run.sample_set_path('rejection') / 'accepted.npz')['index'].tolist() == [1]
    scores = sample_store.read_npz(empty_run.sample_set_path('rejection') / 'scores.npz')
    assert scores['score'].tolist() == [1, 1]
    np.testing.assert_allclose(scores['log_probability'], [-9 * np.exp(-20), -9 * np.exp(-40)], rtol=1e-6)


@pytest.mark.parametrize(
    'keep_fraction, threshold, kept',
    [
        (1.0, 0.0, [0, 1, 2, 3]),
        (1.0, 0.5, [0, 1, 2]),
        (1.0, 1.0, [0, 1]),
        (0.5, 1.0, [0, 1]),  # half of all four, not of the two that pass
        (0.75, 1.0, [0, 1]),  # a third one does not replace the one that fails
    ],
)
def test_the_threshold_is_a_probability_as_it_is_stored(empty_run, keep_fraction, threshold, kept):
    """The logit of the intended class leads by 40, 20, 4 and -3; in float32 the first two probabilities are 1."""
    images, labels = np.zeros((4, 28, 28, 1), np.uint8), np.full(4, 3)
    flat = images.reshape(4, -1)
    flat[:, FEATURES + 3] = 160, 80, 0, 0
    flat[2, FEATURES + 3], flat[3, FEATURES + 5] = 16, 12
    store_samples(empty_run, images, labels)
    empty_run.config.reject.update(keep_fraction=keep_fraction, threshold=threshold)
    reject.reject(empty_run)
    assert sample_store.read_npz(empty_run.sample_set_path('rejection') / 'accepted.npz')['index'].tolist() == kept


def test_log_probability():
    logits = np.random.default_rng(0).normal(0, 3, (50, 7)).astype(np.float32)
    label = np.arange(50) % 7
    expected = logits[np.arange(50), label] - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
    np.testing.assert_allclose(log_probability(logits, label), expected, rtol=1e-12)
    margins = np.array([600.0, 20.0, 0.0, -20.0, -5000.0])
    found = log_probability(np.stack([margins, np.zeros(5)], axis=1), np.zeros(5, int))
    np.testing.assert_allclose(
        found, [-np.exp(-600.0), -np.log1p(np.exp(-20.0)), -np.log(2), -20 - np.exp(-20.0), -5000]
    )
    assert np.isnan(log_probability(np.array([[np.nan, 0.0]]), np.array([0]))).all()


def test_scores_are_written_again_when_settings_change_and_kept_when_not(empty_run, capsys):
    store_samples(empty_run, random_images(20, seed=0), np.arange(20) % CLASSES)
    reject.reject(empty_run)
    path = empty_run.sample_set_path('rejection') / 'accepted.npz'
    assert len(sample_store.read_npz(path)['index']) == 10
    before = path.stat().mtime
    reject.reject(empty_run)
    assert path.stat().mtime == before and 'reject: done' in capsys.readouterr().out
    empty_run.config.reject.keep_fraction = 1.0
    reject.reject(empty_run)
    assert len(sample_store.read_npz(path)['index']) == 20
    found = record.read_done(empty_run.sample_set_path('rejection'), 'reject')
    version = {'features_version': feature_store.FEATURES_VERSION}
    assert found.settings == {'keep_fraction': 1.0, 'threshold': 0.0, **version}
    assert found.results == {'count': 20, 'accepted': 20}


def test_a_threshold_that_nothing_reaches_leaves_the_scores_as_they_were(empty_run):
    store_samples(empty_run, random_images(20, seed=0), np.arange(20) % CLASSES)
    reject.reject(empty_run)
    empty_run.config.reject.threshold = 1.0
    with pytest.raises(JobError, match=r'reject.threshold=1.0 keeps no sample: the best one scores 0\.'):
        reject.reject(empty_run)
    assert record.read_done(empty_run.sample_set_path('rejection'), 'reject').settings['threshold'] == 0


@pytest.mark.parametrize('count', [1, 8])
def test_scores_do_not_depend_on_the_number_of_devices(empty_run, count):
    images = random_images(30, seed=0)
    store_samples(empty_run, images, np.arange(30) % CLASSES)
    reject.reject(Run(empty_run.config, empty_run.workdir, jax.devices()[:count]))
    scores = sample_store.read_npz(empty_run.sample_set_path('rejection') / 'scores.npz')
    expected = log_probability(extract(images)['logits'], np.arange(30) % CLASSES)
    np.testing.assert_allclose(scores['log_probability'], expected, rtol=1e-5)
    np.testing.assert_array_equal(scores['index'], np.arange(30))


def test_chosen_images_are_held_in_memory_once(empty_run, tmp_path):
    images = np.zeros((20_000, 56, 56, 1), np.uint8)  # 63 MB
    store_samples(empty_run, images, np.arange(len(images)) % CLASSES, shard_size=1000)
    tracemalloc.start()
    try:
        arrays = sample_store.take(empty_run.sample_set_path('samples'), np.arange(0, len(images)))
        sample_store.write_npz(epath.Path(tmp_path) / 'chosen.npz', arrays)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.6 * images.nbytes  # a shard and a buffer of NumPy on top
