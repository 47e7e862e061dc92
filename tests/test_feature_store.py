"""Features of images in files: statistics, versions, images that cannot be read, and parts that are kept or not."""

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tests.test_rejection import CLASSIFIER, ArraySource, random_images
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.decode import UnreadableImage
from vqvae2_jax.distributed import sharding
from vqvae2_jax.evaluation import generative
from vqvae2_jax.evaluation.features import FeatureExtractor
from vqvae2_jax.io import record
from vqvae2_jax.jobs import evaluate_samples, evaluation_parts, feature_store
from vqvae2_jax.jobs.evaluation_parts import Evaluation, evaluate_part
from vqvae2_jax.jobs.feature_store import load_logits, load_stats, write_features
from vqvae2_jax.jobs.workdir import JobError, Run


@pytest.fixture
def empty_run(config, tmp_path):
    return Run(config, epath.Path(tmp_path) / 'run')


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_store, 'SHARD_SIZE', 100)


class PartlyUnreadable(ArraySource):
    """A source whose images `broken` cannot be decoded."""

    def __init__(self, images, broken):
        super().__init__(images)
        self.on_error, self.broken = 'skip', set(broken)

    def __getitem__(self, index):
        if index in self.broken:
            raise UnreadableImage(str(index), 'broken')
        return super().__getitem__(index)

    def example_name(self, index):
        return str(index)


def extract_some(run, source, **options):
    return write_features(run, CLASSIFIER, source, run.path('some'), {'images': source.digest}, lambda: 0, **options)


def features_of(images):
    return np.asarray(CLASSIFIER.apply({}, jnp.asarray(images))['features'], np.float64)


def test_statistics_are_those_of_all_readable_images_and_features_of_the_first(empty_run):
    images, broken = random_images(250, seed=0), [*range(100, 200), 3]  # the second shard has none that can be read
    output = extract_some(empty_run, PartlyUnreadable(images, broken))
    readable = np.delete(images, broken, axis=0)
    expected = features_of(readable)
    assert output.state == record.DONE and output.results == {'count': 149}
    stats = load_stats(output, max_stored=120)
    assert len(stats) == 149
    np.testing.assert_allclose(stats.moments.mean, expected.mean(0), rtol=1e-9)
    np.testing.assert_allclose(stats.moments.covariance(), np.cov(expected.T), rtol=1e-9)
    np.testing.assert_array_equal(stats.features, expected[:120])
    assert stats.logits.shape == (120, CLASSIFIER.num_classes)
    logits, labels = load_logits(output)
    assert logits.shape == (149, CLASSIFIER.num_classes) and labels.shape == (149,)


def test_statistics_of_all_rows_come_from_one_pass(empty_run, monkeypatch):
    read, paths = sample_store.read_npz, []
    monkeypatch.setattr(sample_store, 'read_npz', lambda path, names=None: paths.append(path) or read(path, names))
    images = random_images(250, seed=0)
    make_images = lambda: lambda batch: {'plain': batch['image'], 'dark': batch['image'] // 2}  # noqa: E731
    output = extract_some(empty_run, ArraySource(images), rows=('plain', 'dark'), make_images=make_images)
    assert len(paths) == 3  # every shard once
    for row, pixels in (('plain', images), ('dark', images // 2)):
        np.testing.assert_allclose(load_stats(output, row).moments.mean, features_of(pixels).mean(0), rtol=1e-9)


def test_features_without_a_readable_image_are_not_done(empty_run):
    images = random_images(20, seed=0)
    output = extract_some(empty_run, ArraySource(images))
    path = output.directory / 'features-00000000-00000020.npz'
    arrays = sample_store.read_npz(path)
    sample_store.write_npz(path, arrays | {'mask': np.zeros(20, bool)})
    output.start()
    output.add_files(path.name)
    with pytest.raises(JobError, match='(?s)some: none of the 20 images could be read.*delete .*some'):
        extract_some(empty_run, ArraySource(images))
    assert record.read(output.directory).state == record.STARTED


def test_features_that_are_not_finite_give_no_metrics(empty_run):
    extractor = FeatureExtractor(
        'classifier', {'weights': 'nan'}, 0, {}, lambda params, images: {'features': images[:, :8, 0, 0] / 0.0}
    )
    source = ArraySource(random_images(20, seed=0) * 0)
    output = write_features(empty_run, extractor, source, empty_run.path('nan'), {}, lambda: 0)
    stats = load_stats(output)
    with pytest.raises(ValueError, match='20 of 20 images have features that are not finite'):
        generative.generative_metrics('classifier', stats, stats)


def test_parameters_are_put_on_the_devices_once(empty_run, monkeypatch):
    put, calls = sharding.put_replicated, []
    monkeypatch.setattr(sharding, 'put_replicated', lambda tree: calls.append(1) or put(tree))
    extractor = FeatureExtractor(
        'classifier', {'weights': 'w'}, 0, {'scale': np.float32(2)},
        lambda params, images: {'features': images[:, :8, 0, 0] * params['scale']},
    )  # fmt: skip
    for number in range(2):
        source = ArraySource(random_images(20, seed=number))
        write_features(empty_run, extractor, source, empty_run.path(str(number)), {}, lambda: 0)
    assert len(calls) == 1


def test_features_of_another_version_are_extracted_again(empty_run, monkeypatch):
    source, written = ArraySource(random_images(20, seed=0)), []
    write = sample_store.write_npz
    monkeypatch.setattr(sample_store, 'write_npz', lambda path, arrays: written.append(path) or write(path, arrays))
    first = extract_some(empty_run, source)
    assert len(written) == 2  # the shard and the statistics
    extract_some(empty_run, source)
    assert len(written) == 2
    monkeypatch.setattr(feature_store, 'FEATURES_VERSION', feature_store.FEATURES_VERSION + 1)
    assert extract_some(empty_run, source).digest != first.digest
    assert len(written) == 4


@pytest.mark.parametrize(
    'module, constant', [(evaluation_parts, 'METRICS_VERSION'), (feature_store, 'FEATURES_VERSION')]
)
def test_parts_of_another_version_are_computed_again(empty_run, monkeypatch, module, constant):
    evaluation, calls = Evaluation(empty_run, None, None, lambda: 0), []

    def compute():
        calls.append(1)
        return {'calls': len(calls)}

    parts = [evaluate_part(evaluation, 'part', {'images': 'a'}, compute) for _ in range(2)]
    assert parts == [{'calls': 1}] * 2
    monkeypatch.setattr(module, constant, getattr(module, constant) + 1)
    parts = [evaluate_part(evaluation, 'part', {'images': 'a'}, compute) for _ in range(2)]
    assert parts == [{'calls': 2}] * 2


def test_a_damaged_file_is_made_again_and_changes_no_result(empty_run, monkeypatch, capsys):
    source = ArraySource(random_images(20, seed=0))
    monkeypatch.setattr(Run, 'images', lambda run, split: source)
    monkeypatch.setattr(feature_store, 'reconstruction_features', feature_store.image_features)
    monkeypatch.setattr(evaluate_samples, 'ALL_LEVELS', feature_store.IMAGES)
    evaluation = Evaluation(empty_run, CLASSIFIER, None, lambda: 0)
    output = feature_store.image_features(empty_run, CLASSIFIER, 'test', lambda: 0)
    monkeypatch.setattr(feature_store, 'sample_features', lambda *args: output)
    samples = record.Record(empty_run.sample_set_path('samples'), 'sample', {}, {}, results={'count': 20})
    before = evaluate_samples.sample_metrics(evaluation, samples)
    assert before['quality']['count'] == 20
    path = output.directory / 'features-00000000-00000020.npz'
    for damage in (lambda: path.write_bytes(b'torn'), path.unlink, (output.directory / 'statistics.npz').unlink):
        capsys.readouterr()
        damage()
        assert evaluate_samples.sample_metrics(evaluation, samples) == before
        assert 'Making it again' in capsys.readouterr().out
    assert record.read(output.directory).digest == output.digest
