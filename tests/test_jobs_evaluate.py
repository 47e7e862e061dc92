"""The report's comparisons, the Classification Accuracy Score, and the comparison of any two sets of images."""

import dataclasses
import os
import pathlib
import re
import shutil
import signal
import types

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests import torch_weights
from vqvae2_jax.config import build
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.loader import eval_batches
from vqvae2_jax.distributed.preemption import Interrupted
from vqvae2_jax.evaluation.features import FeatureStats
from vqvae2_jax.io import checksums, record
from vqvae2_jax.io.files import read_json
from vqvae2_jax.io.record import StaleInputError
from vqvae2_jax.jobs import cas, evaluate_samples, feature_store, reference_sets, workdir
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import JobError, Run
from vqvae2_jax.metrics.frechet import Moments, frechet_distance
from vqvae2_jax.metrics.manifold import precision_recall
from vqvae2_jax.tasks.task import to_float

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def report(finished):
    return read_json(finished.path('report', 'report.json'))


@pytest.fixture(scope='module')
def sample_set(report):
    return report['sets']['default']


@pytest.fixture(scope='module')
def outputs(finished):
    """Features and logits of the classifier for test images, samples and reconstructions, image by image."""
    model = build.make_classifier(finished.config)
    params = workdir.load_trained(finished, 'classifier').params

    @jax.jit
    def extract(images):
        return model.apply({'params': params}, to_float(images), with_features=True)

    vqvae, variables = build.make_vqvae(finished.config), workdir.load_trained(finished, 'vqvae').variables
    source = finished.images('test')
    real = np.stack([source[i]['image'] for i in range(len(source))])
    samples = sample_store.read_set(finished.sample_set_path('samples'))
    sampled = [sample_store.read_npz(path) for path in sample_store.shard_paths(samples)]
    again = jax.jit(lambda x: vqvae.apply(variables, to_float(x)).image)(real)
    again = np.round((np.clip(again, -1, 1) + 1) * 127.5).astype(np.uint8)
    sets = {'real': real, 'samples': np.concatenate([d['arr_0'] for d in sampled]), 'reconstructions': again}
    return {name: [np.asarray(x, np.float64) for x in extract(images)] for name, images in sets.items()}


@pytest.mark.parametrize('name', ['samples', 'reconstructions'])
def test_quality_is_that_of_all_features_at_once(report, sample_set, outputs, name):
    found = (sample_set if name == 'samples' else report['reconstruction'])['quality']
    real, generated = outputs['real'][1], outputs[name][1]
    assert (found['count_real'], found['count']) == (len(real), len(generated))
    distance = frechet_distance(Moments.of(real), Moments.of(generated))
    np.testing.assert_allclose(found['frechet_distance'], distance, rtol=2e-2)  # pixels may round the other way
    count = min(len(real), len(generated))
    expected = precision_recall(real[:count], generated[:count])
    np.testing.assert_allclose((found['precision'], found['recall']), expected, atol=0.05)
    assert '10000' in found['warning'] and 'fid' not in found


def test_samples_are_compared_with_reconstructions_too(sample_set, outputs):
    again, sampled = outputs['reconstructions'][1], outputs['samples'][1]
    distance = frechet_distance(Moments.of(again), Moments.of(sampled))
    found = sample_set['quality_against_reconstructions']
    np.testing.assert_allclose(found['frechet_distance'], distance, rtol=2e-2)
    first = sample_set['sweep'][0]
    distance = frechet_distance(Moments.of(again[:10]), Moments.of(sampled[:10]))
    np.testing.assert_allclose(first['frechet_distance_against_reconstructions'], distance, rtol=2e-2)


def test_originals_are_compared_with_another_split(report, run):
    assert 'compared with themselves: set evaluate.references' in report['originals']['quality']['missing']
    run.config.evaluate.update(references=('train',), cas=False, sweep=(1.0,))
    run_job(run, 'evaluate')
    found = read_json(run.path('report', 'report.json'))['originals']['quality']
    assert (found['count_real'], found['count']) == (len(run.images('train')), len(run.images('test')))
    model = build.make_classifier(run.config)
    params = workdir.load_trained(run, 'classifier').params

    def moments(split):
        source = run.images(split)
        images = np.stack([source[i]['image'] for i in range(len(source))])
        return Moments.of(model.apply({'params': params}, to_float(images), with_features=True)[1])

    distance = frechet_distance(moments('train'), moments('test'))
    np.testing.assert_allclose(found['frechet_distance'], distance, rtol=1e-3)
    assert '<td>original images</td>' in run.path('report', 'report.html').read_text()


def test_sweep_goes_from_all_to_few(sample_set, finished, outputs):
    points = sample_set['sweep']
    assert points[0]['keep_fraction'] == 1 and points[0]['kept_count'] == 24
    assert points[-1]['kept_count'] == 10  # one of each class
    assert {point['count'] for point in points} == {10}
    real, sampled = outputs['real'][1][:10], outputs['samples'][1][:10]
    distance = frechet_distance(Moments.of(real), Moments.of(sampled))
    np.testing.assert_allclose(points[0]['frechet_distance'], distance, rtol=1e-3)
    assert (points[0]['precision'], points[0]['recall']) == pytest.approx(precision_recall(real, sampled), abs=0.11)
    scores = sample_store.read_npz(finished.sample_set_path('rejection') / 'scores.npz')
    assert points[0]['confidence'] == pytest.approx(scores['score'][:10].mean())
    confidences = [point['confidence'] for point in points]
    assert confidences[-1] > confidences[0]
    page = finished.path('report', 'report.html').read_text()
    assert 'n = 10 samples' in page and '<th>samples kept</th><th>n</th>' in page


def test_classification_accuracy_score(report, sample_set, finished):
    rows = report['cas'] | {'samples': sample_set['cas']}
    assert {name: row['count'] for name, row in rows.items()} == {
        'real': len(finished.images('train')),
        'reconstructions': len(finished.images('train')),
        'samples': 24,
    }
    model, source = build.make_classifier(finished.config), finished.images('test')
    batch = next(eval_batches(source, batch_size=len(source) // 8 * 8))
    for directory, row in (('classifier', 'real'), ('cas/samples/default', 'samples')):
        params = workdir.load_trained(finished, 'classifier', directory).params
        logits = np.asarray(model.apply({'params': params}, to_float(batch['image'])))
        right = logits.argmax(-1) == batch['label']
        assert rows[row]['top1'] == pytest.approx(right.mean(), abs=0.01)
        best_five = np.argsort(-logits, axis=-1)[:, :5]
        assert rows[row]['top5'] == pytest.approx((best_five == batch['label'][:, None]).any(-1).mean(), abs=0.01)


def test_reconstructions_are_the_training_images_decoded(finished):
    stored = sample_store.take(finished.path('reconstructions'), np.array([0, 7]))
    vqvae, variables = build.make_vqvae(finished.config), workdir.load_trained(finished, 'vqvae').variables
    source = finished.images('train')
    for i, image, label in zip((0, 7), stored['arr_0'], stored['label'], strict=True):
        example = source[i]
        assert label == example['label']
        again = vqvae.apply(variables, to_float(example['image'][None])).image[0]
        np.testing.assert_allclose(to_float(image), np.clip(again, -1, 1), atol=0.02)


def test_features_that_are_not_finite_leave_out_the_nearest_images_alone(run, monkeypatch):
    def broken(output):
        for names, features in iterate(output):
            yield names, np.full_like(features, np.nan)

    iterate = feature_store.iterate_features
    monkeypatch.setattr(feature_store, 'iterate_features', broken)
    run.config.evaluate.update(cas=False, sweep=(1.0,), nearest=4)
    run_job(run, 'evaluate')
    found = read_json(run.path('report', 'report.json'))['sets']['default']
    assert 'features that are not finite' in found['nearest']['missing'] and 'precision' in found['quality']
    assert 'not finite' in run.path('report', 'report.html').read_text()
    assert not run.path('report', 'sets', 'default', 'nearest.png').exists()


def test_samples_are_shown_beside_their_nearest_training_images(run):
    run.config.evaluate.update(nearest=12, cas=False, sweep=(1.0,))
    validate_config(run.config)
    run_job(run, 'evaluate')
    found = read_json(run.path('report', 'report.json'))['sets']['default']['nearest']
    samples, train, test = (
        feature_store.load_stats(feature_store.read_features(run.path('features', 'classifier', *path))).features
        for path in (('samples', 'default'), ('train',), ('test',))
    )

    def apart(queries):
        return np.sqrt(np.square(queries[:, None].astype(float) - train).sum(-1))

    assert found['count_train'] == len(train) == 400
    assert set(found['median_distance']) == {'samples', 'test images', 'test reconstructions'}
    np.testing.assert_allclose(found['median_distance']['samples'], np.median(apart(samples).min(1)), rtol=1e-3)
    np.testing.assert_allclose(found['median_distance']['test images'], np.median(apart(test).min(1)), rtol=1e-3)
    distances = apart(samples).min(1)
    np.testing.assert_allclose(found['low_distance']['samples'], np.quantile(distances, 0.01), rtol=1e-3)
    np.testing.assert_allclose([pair['distance'] for pair in found['shown']], np.sort(distances)[:12], rtol=1e-3)
    for pair in found['shown']:
        row = apart(samples[[pair['sample']]])[0]
        np.testing.assert_allclose((row[pair['train']], pair['distance']), row.min(), rtol=1e-3)
    pictures = evaluate_samples.read_pictures(run, 'default')
    source = run.images('train')
    np.testing.assert_array_equal(
        pictures['nearest_train'], [source[pair['train']]['image'] for pair in found['shown']]
    )
    taken = sample_store.take(run.sample_set_path('samples'), [pair['sample'] for pair in found['shown']])
    np.testing.assert_array_equal(pictures['nearest_samples'], taken['arr_0'])
    assert run.path('report', 'sets', 'default', 'nearest.png').exists()
    page = run.path('report', 'report.html').read_text()
    assert page.count('<p>nearest training images</p>') == 2 and 'the nearest of 400 training images' in page
    run.config.evaluate.nearest = 0
    run_job(run, 'evaluate')
    assert not run.path('report', 'sets', 'default', 'nearest.png').exists()
    assert 'nearest' not in read_json(run.path('report', 'report.json'))['sets']['default']


def test_classifiers_of_other_samples_are_refused(run):
    path = run.path('cas', 'samples', 'default', 'record.json')
    checksums.write_sealed(path, checksums.read_sealed(path) | {'inputs': {'samples': 'f' * 64}})
    with pytest.raises(StaleInputError, match=r'(?s)cas/samples/default was made from another.*--job=cas'):
        run_job(run, 'evaluate')


def test_the_page_holds_everything_it_shows(finished, report):
    text = finished.path('report', 'report.html').read_text()
    sources = re.findall(r'src="([^"]{0,40})', text)
    assert all(source.startswith('data:image/png;base64,') for source in sources)
    # Three rows of reconstructions, two of code maps, the samples and the accepted ones, five samples and their
    # neighbors, two histograms, four curves, two plots of the sweep.
    scores = sample_store.read_npz(finished.sample_set_path('rejection') / 'accepted.npz')
    assert len(sources) == 3 * 10 + 2 * 10 + 24 + len(scores['label']) + 2 * 5 + 2 + 4 + 2
    assert set(re.findall(r'href="(.)', text)) == {'#'} and 'http' not in re.sub(r'base64,[^"]*', '', text)
    assert f'{report["reconstruction"]["psnr"]:.2f}' in text
    assert f'{report["likelihood"]["levels"]["top"]["nll"]:.3f}' in text
    assert report['protocol']['quality']['weights'] in text


@pytest.fixture(scope='module')
def inception(tmp_path_factory):
    """Weights that were never trained: the numbers mean nothing, and are numbers."""
    path = tmp_path_factory.mktemp('inception') / 'weights.npz'
    np.savez(path, **torch_weights.inception_state(classes=7))
    return str(path)


def compare(run, inception, real, generated):
    run.config.evaluate.update(inception=inception, real=str(real), generated=str(generated), batch_size=8)
    validate_config(run.config)
    run_job(run, 'evaluate')
    return read_json(run.path('comparison', 'report.json'))['quality']


def folder_of(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f'{i:03d}.png')
    return path


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)


@pytest.fixture
def empty_run(config, tmp_path):
    """The config alone: two sets can be compared before anything is trained."""
    config.data.held_out = (0.9, 0.004)  # Inception looks at 40 images, not at 600
    return Run(config, epath.Path(tmp_path) / 'empty')


@pytest.mark.system
def test_a_set_is_like_itself_in_any_form(empty_run, inception, images, tmp_path):
    np.savez(tmp_path / 'images.npz', arr_0=images)
    found = compare(empty_run, inception, folder_of(tmp_path / 'folder', images), tmp_path / 'images.npz')
    assert found['fid'] == pytest.approx(0, abs=1e-4)
    assert (found['precision'], found['recall']) == (1, 1)
    assert found['inception_score'] >= 1 and found['count'] == found['count_real'] == 12
    for part in range(3):
        np.savez(tmp_path / f'part{part}.npz', arr_0=images[4 * part : 4 * part + 4])
    parts = compare(empty_run, inception, tmp_path / 'part*.npz', tmp_path / 'images.npz')
    assert parts['fid'] == pytest.approx(0, abs=1e-4) and parts['count_real'] == 12
    other = compare(empty_run, inception, 'test', tmp_path / 'images.npz')
    assert other['fid'] > 1 and other['count_real'] == len(empty_run.images('test'))
    assert empty_run.path('comparison', 'report.html').exists()
    with pytest.raises(JobError, match='compared by --job=evaluate, not by pipeline'):
        run_job(empty_run, 'pipeline')
    assert not empty_run.path('vqvae').exists()


@pytest.mark.system
def test_sets_without_a_number(empty_run, inception, images, tmp_path):
    good = folder_of(tmp_path / 'good', images)
    bad = {
        'one': (images[:1], 'needs at least 2|1 image has no covariance'),
        'same': (np.full((5, 16, 16, 3), 7, np.uint8), 'all 5 images of a set have the same features'),
        'mixed': ([*images[:4], images[4][:8]], r'mixed/004.png has 8x16 pixels, but the first image has 16x16'),
    }
    for name, (broken, message) in bad.items():
        with pytest.raises(JobError, match=message):
            compare(empty_run, inception, good, folder_of(tmp_path / name, broken))
    corrupt = folder_of(tmp_path / 'corrupt', images)
    (corrupt / '003.png').write_bytes(b'no image')
    with pytest.raises(JobError, match=r'cannot read the image .*003\.png'):
        compare(empty_run, inception, good, corrupt)
    np.savez(tmp_path / 'four.npz', arr_0=np.zeros((4, 8, 8, 4), np.uint8))
    with pytest.raises(JobError, match=r'evaluate.generated: arr_0 of .* is uint8 \[4, 8, 8, 4\]'):
        compare(empty_run, inception, good, tmp_path / 'four.npz')
    with pytest.raises(JobError, match='evaluate.generated: there is no file or folder .*nowhere'):
        compare(empty_run, inception, good, tmp_path / 'nowhere')
    state = torch_weights.inception_state()
    state['Mixed_7c.branch_pool.bn.bias'][3] = np.nan
    np.savez(tmp_path / 'broken.npz', **state)
    with pytest.raises(JobError, match='12 of 12 images have features that are not finite'):
        compare(empty_run, str(tmp_path / 'broken.npz'), good, good)
    with pytest.raises(JobError, match=r'evaluate.inception: there is no file .*missing\.npz'):
        compare(empty_run, str(tmp_path / 'missing.npz'), good, good)


@pytest.mark.system
def test_unreadable_images_of_a_set_are_skipped_as_the_error_advises(empty_run, inception, images, tmp_path, capsys):
    good, corrupt = folder_of(tmp_path / 'good', images), folder_of(tmp_path / 'corrupt', images)
    (corrupt / '000.png').write_bytes(b'no image')  # the one whose size the others must have
    with pytest.raises(JobError, match=r'(?s)cannot read the image .*000\.png.*--config\.data\.on_error=skip'):
        compare(empty_run, inception, good, corrupt)
    empty_run.config.data.on_error = 'skip'
    found = compare(empty_run, inception, good, corrupt)
    assert (found['count_real'], found['count']) == (12, 11)
    assert 'skipped 1 unreadable images, listed in' in capsys.readouterr().out
    assert empty_run.skipped() == [str(corrupt / '000.png')]


def test_a_number_that_cannot_be_had_does_not_cost_the_report(run):
    run.config.sample.count = 2
    run.config.evaluate.cas = False
    for directory in ('samples', 'rejection', 'report'):
        run.path(directory).rmtree()
    for job in ('sample', 'reject', 'evaluate'):
        run_job(run, job)
    found = read_json(run.path('report', 'report.json'))
    assert found['sets']['default']['quality'] == {'missing': 'sets of 2 and 2 images: more than 3 of each are needed'}
    assert found['sets']['default']['sweep'] == [] and 'fid' not in found['reconstruction']['quality']
    assert 'No comparison: sets of 2 and 2 images' in run.path('report', 'report.html').read_text()


def test_an_imported_classifier_scores_samples(run, tmp_path):
    np.savez(tmp_path / 'resnet.npz', **torch_weights.resnet50_state(classes=10))
    run.config.reject.classifier = str(tmp_path / 'resnet.npz')
    before = sample_store.read_npz(run.sample_set_path('rejection') / 'scores.npz')
    with pytest.raises(StaleInputError, match='(?s)rejection/default was made from another.*--job=reject'):
        run_job(run, 'evaluate')
    run_job(run, 'reject')
    assert not np.allclose(
        sample_store.read_npz(run.sample_set_path('rejection') / 'scores.npz')['score'], before['score']
    )
    np.savez(tmp_path / 'resnet.npz', **torch_weights.resnet50_state(classes=9))
    with pytest.raises(JobError, match=r'has 9 classes, but data\.num_classes=10'):
        run_job(run, 'reject')


def test_a_threshold_keeps_those_above_and_says_when_there_are_none(run):
    scores = sample_store.read_npz(run.sample_set_path('rejection') / 'scores.npz')
    run.config.reject.update(keep_fraction=1.0, threshold=float(np.median(scores['score'])))
    run_job(run, 'reject')
    accepted = sample_store.read_npz(run.sample_set_path('rejection') / 'accepted.npz')
    np.testing.assert_array_equal(accepted['index'], scores['index'][scores['score'] >= run.config.reject.threshold])
    run.config.reject.threshold = 0.999
    with pytest.raises(JobError, match=r'reject.threshold=0.999 keeps no sample: the best one scores 0\.'):
        run_job(run, 'reject')


def times(run, *parts):
    paths = [p for p in pathlib.Path(run.path(*parts)).rglob('*') if p.is_file()]
    return {str(path): os.stat(path).st_mtime_ns for path in paths}


def contents(run, *parts):
    return {str(p): p.read_bytes() for p in pathlib.Path(run.path(*parts)).rglob('*') if p.is_file()}


def test_the_pictures_of_a_set_are_its_first_and_its_best_samples(finished):
    shown = sample_store.read_npz(finished.path('evaluation', 'sets', 'default', 'pictures.npz'))
    stored = sample_store.take(finished.sample_set_path('samples'), np.arange(24))
    order = np.argsort(stored['label'], kind='stable')  # 24 samples of ten classes: all of them, class by class
    np.testing.assert_array_equal(shown['samples'], stored['arr_0'][order])
    np.testing.assert_array_equal(shown['samples_label'], stored['label'][order])
    accepted = sample_store.read_npz(finished.sample_set_path('rejection') / 'accepted.npz')
    order = np.lexsort((-accepted['log_probability'], accepted['label']))
    np.testing.assert_array_equal(shown['accepted'], accepted['arr_0'][order])


@pytest.mark.system
def test_pictures_of_another_set_that_are_damaged_are_left_out(run, capsys):
    run.config.evaluate.cas = False
    add_set(run, 'other', seed=1)
    before = contents(run, 'report', 'sets')
    run.path('evaluation', 'sets', 'default', 'pictures.npz').write_bytes(b'')
    run_job(run, 'evaluate')
    assert 'sets/default/pictures.npz is damaged' in (text := capsys.readouterr().out)
    assert 'run your command with --job=evaluate and --config.sample.name=default' in text
    pictures = tuple(f'default/{name}.png' for name in ('samples', 'accepted', 'nearest'))
    left = [path for path in before if path.endswith(pictures)]
    after = contents(run, 'report', 'sets')
    assert after == {path: data for path, data in before.items() if path not in left} and len(left) == 3
    run.config.sample.update(name='default', count=24, seed=0)
    run_job(run, 'evaluate')
    assert contents(run, 'report', 'sets') == before


def test_numbers_by_class(report, sample_set, finished):
    labels = np.array([finished.images('test')[i]['label'] for i in range(600)])
    names = finished.images('test').class_names
    assert report['classifier']['count_by_class'] == {name: int((labels == i).sum()) for i, name in enumerate(names)}
    shares = np.array(list(report['classifier']['accuracy_by_class'].values()))
    counts = np.array(list(report['classifier']['count_by_class'].values()))
    assert (shares * counts).sum() / 600 == pytest.approx(report['classifier']['accuracy_on_real_images'])
    assert sum(sample_set['count_by_class'].values()) == 24 and set(sample_set['count_by_class'].values()) == {2, 3}
    assert sum(sample_set['accepted_by_class'].values()) == sample_set['accepted'] and len(names) == 10


def test_a_second_report_is_bit_identical(run):
    run_job(run, 'evaluate')
    before = contents(run, 'report')
    run_job(run, 'evaluate')
    assert contents(run, 'report') == before


def add_set(run, name, **changes):
    """Makes and evaluates another sample set of few samples."""
    run.config.sample.update(name=name, count=16, **changes)
    for job in ('sample', 'reject', 'evaluate'):
        run_job(run, job)


def test_another_set_costs_only_its_own_images_and_stands_beside_the_first(run, report):
    run.config.evaluate.cas = False
    run_job(run, 'evaluate')  # without CAS
    before = times(run, 'features') | times(run, 'evaluation')
    pictures = contents(run, 'report', 'sets')
    add_set(run, 'other', seed=1)
    after = times(run, 'features') | times(run, 'evaluation')
    assert {path: after[path] for path in before} == before
    all_pictures = contents(run, 'report', 'sets')
    assert {path: all_pictures[path] for path in pictures} == pictures and len(all_pictures) == 2 * len(pictures) == 8
    new = {pathlib.Path(path).relative_to(run.workdir).parent for path in after.keys() - before.keys()}
    assert {str(path) for path in new} == {'features/classifier/samples/other', 'evaluation/sets/other'}
    found = read_json(run.path('report', 'report.json'))
    assert found['schema'] == 7 and list(found['sets']) == ['default', 'other']
    assert found['sets']['default'] == {k: v for k, v in report['sets']['default'].items() if k != 'cas'} | {
        'seconds': {'sample': report['sets']['default']['seconds']['sample']}
    }
    assert (found['sets']['other']['count'], found['sets']['other']['seed']) == (16, 1)
    assert found['reconstruction'] == report['reconstruction'] and found['likelihood'] == report['likelihood']
    page = run.path('report', 'report.html').read_text()
    assert '<h3>default</h3>' in page and '<h3>other</h3>' in page and page.count('<section>') == 2


@pytest.mark.system
def test_a_set_whose_inputs_have_changed_is_marked_and_not_deleted(run):
    run.config.evaluate.cas = False
    add_set(run, 'other', seed=1)
    before = read_json(run.path('report', 'report.json'))['sets']['other']
    assert before['stale'] == []
    run.config.sample.update(name='other', count=20)
    run_job(run, 'sample')
    run_job(run, 'reject')
    run.config.sample.update(name='default', count=24, seed=0)
    run_job(run, 'evaluate')
    found = read_json(run.path('report', 'report.json'))['sets']
    assert found['default']['stale'] == []
    assert found['other'] == before | {'stale': ['rejection', 'samples']}
    page = run.path('report', 'report.html').read_text()
    assert 'Stale: rejection, samples changed since this set was evaluated' in page
    assert page.count('<td>stale</td>') == 1
    run.path('samples', 'other').rmtree()
    run_job(run, 'evaluate')
    assert read_json(run.path('report', 'report.json'))['sets']['other'] == found['other']
    run.config.evaluate.sweep = (1.0,)
    run_job(run, 'evaluate')
    found = read_json(run.path('report', 'report.json'))['sets']
    assert found['other']['stale'] == ['rejection', 'samples', 'evaluate.sweep']
    assert found['default']['stale'] == [] and len(found['default']['sweep']) == 1


def test_a_set_with_cas_is_not_stale_where_the_config_asks_for_none(run):
    run.config.evaluate.cas = False
    add_set(run, 'other', seed=1)
    sets = read_json(run.path('report', 'report.json'))['sets']
    assert sets['default']['stale'] == [] and 'cas' in sets['default'] and 'cas' not in sets['other']


@pytest.mark.system
def test_an_interrupted_evaluation_continues(run, report, monkeypatch):
    monkeypatch.setattr(feature_store, 'SHARD_SIZE', 256)
    for directory in ('features', 'evaluation', 'report'):
        run.path(directory).rmtree()
    directory, add, batches = run.path('features', 'classifier', 'test'), feature_store.ShardWriter.add, []

    def interrupt(writer, start, arrays):
        batches.append(start)
        if len(batches) == 20:  # of 16 images: within the second shard of 256
            os.kill(os.getpid(), signal.SIGTERM)
        return add(writer, start, arrays)

    monkeypatch.setattr(feature_store.ShardWriter, 'add', interrupt)
    with pytest.raises(Interrupted):
        run_job(run, 'evaluate')
    assert [path.name for path in directory.glob('*.npz')] == ['features-00000000-00000256.npz']
    assert record.read(directory).state == record.STARTED
    first = times(run, 'features')[str(directory / 'features-00000000-00000256.npz')]
    run_job(run, 'evaluate')
    assert times(run, 'features')[str(directory / 'features-00000000-00000256.npz')] == first
    found = read_json(run.path('report', 'report.json'))
    for name in ('reconstruction', 'likelihood', 'classifier', 'cas', 'sets'):
        assert found[name] == report[name], name


def test_features_of_other_weights_are_extracted_again(run):
    network = feature_store.load_classifier(run)
    first = feature_store.image_features(run, network, 'test', lambda: 0)
    protocol, params = network.protocol | {'weights': 'f' * 64}, jax.tree.map(np.zeros_like, network.params)
    other = dataclasses.replace(network, protocol=protocol, params=params)
    again = feature_store.image_features(run, other, 'test', lambda: 0)
    assert again.digest != first.digest
    stats = feature_store.load_stats(again)
    assert np.ptp(stats.features) == 0 and len(stats) == 600


@pytest.mark.parametrize('count', [1, 2])
def test_features_do_not_depend_on_the_number_of_devices(finished, tmp_path, count):
    expected = feature_store.load_stats(record.read(finished.path('features', 'classifier', 'test')))
    run = Run(finished.config, epath.Path(tmp_path), jax.devices()[:count])
    network = feature_store.load_classifier(finished)
    found = feature_store.load_stats(feature_store.image_features(run, network, 'test', lambda: 0))
    np.testing.assert_allclose(found.features, expected.features, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-5, atol=1e-6)


def test_cas_without_classes_is_refused(run):
    run.config.data.num_classes = 0
    with pytest.raises(JobError, match='CAS needs classes'):
        cas.classification_accuracy_score(run)


def test_the_report_has_the_parts_whose_inputs_exist(finished, run, capsys):
    run.config.evaluate.sweep = (1.0,)
    before = read_json(run.path('report', 'report.json'))
    for name in ('rejection', 'cas', 'evaluation/sets'):
        run.path(name).rmtree()
    run_job(run, 'evaluate')
    report = read_json(run.path('report', 'report.json'))
    assert report['missing'].keys() == {'rejection', 'cas'} and 'cas' not in report
    assert report['missing']['rejection'].endswith('run your command with --job=reject')
    assert report['likelihood'] == before['likelihood'] and report['classifier'] == before['classifier']
    (entry,) = report['sets'].values()
    assert entry['quality'] == before['sets']['default']['quality'] and 'class_accuracy' not in entry
    for name in ('rejection', 'cas'):  # finished, but not what they were made from
        shutil.copytree(finished.path(name), run.path(name))
    for name in ('samples', 'evaluation/sets', 'prior_top'):
        run.path(name).rmtree()
    run_job(run, 'evaluate')
    report = read_json(run.path('report', 'report.json'))
    assert report['missing'].keys() == {'likelihood', 'samples', 'rejection', 'cas'}
    assert report['missing']['likelihood'].endswith('run your command with --job=prior --level=top')
    assert report['missing']['rejection'].endswith('run your command with --job=sample')
    assert 'likelihood' not in report and report['sets'] == {} and report['classifier'] == before['classifier']
    for name in ('codes', 'prior_bottom', 'classifier', 'evaluation', 'features'):
        run.path(name).rmtree()
    capsys.readouterr()
    run_job(run, 'evaluate')  # stage 1 alone
    report = read_json(run.path('report', 'report.json'))
    assert report['reconstruction']['psnr'] == pytest.approx(before['reconstruction']['psnr'])
    assert report['missing'].keys() == {'likelihood', 'samples', 'classifier', 'rejection', 'cas'}
    out = capsys.readouterr().out
    assert 'evaluate: without samples: ' in out and '--job=sample' in out and 'PSNR' in out
    page = run.path('report', 'report.html').read_text()
    assert 'Without likelihood: ' in page and 'Likelihood</h2>' not in page and 'data:image/png' in page
    run.path('vqvae').rmtree()
    with pytest.raises(JobError, match='vqvae has nothing: run your command with --job=vqvae'):
        run_job(run, 'evaluate')


def test_a_damaged_input_is_not_a_missing_one(run):
    path = run.path('prior_top', 'record.json')
    path.write_text(path.read_text().replace('done', 'dono'))
    with pytest.raises(record.DamagedError, match='prior_top'):
        run_job(run, 'evaluate')


@pytest.mark.system
def test_every_reference_gives_a_distance_with_both_counts(run, tmp_path):
    source = run.images('test')
    images = np.stack([source[i]['image'] for i in range(100)])
    np.savez(tmp_path / 'batch.npz', arr_0=images, arr_1=np.zeros(100, int))  # as ADM's batches
    (tmp_path / 'folder').mkdir()
    for number, image in enumerate(images[:30]):
        Image.fromarray(image[..., 0]).save(tmp_path / 'folder' / f'{number:03d}.png')
    names = 'test', 'train', str(tmp_path / 'batch.npz'), str(tmp_path / 'folder')
    run.config.evaluate.update(references=names, cas=False, sweep=(1.0,))
    validate_config(run.config)
    run_job(run, 'evaluate')
    report = read_json(run.path('report', 'report.json'))
    entry, model = report['sets']['default'], build.make_classifier(run.config)
    params = workdir.load_trained(run, 'classifier').params
    samples = sample_store.take(run.path('samples', 'default'), np.arange(24))['arr_0']

    def moments(images):
        return Moments.of(model.apply({'params': params}, to_float(images), with_features=True)[1])

    assert entry['quality']['count_real'] == 600 and report['protocol']['reference'] == 'test'
    for found, generated, count in ((entry, samples, 24), (report['reconstruction']['quality'], None, 600)):
        assert list(found['references']) == list(names[1:])
        for name, real in zip(names[1:], (None, images, images[:30]), strict=True):
            metrics = found['references'][name]
            assert metrics['count'] == count and metrics['count_real'] == (400 if real is None else len(real))
            if generated is not None and real is not None:
                distance = frechet_distance(moments(real), moments(generated))
                np.testing.assert_allclose(metrics['frechet_distance'], distance, rtol=1e-3)
    page = run.path('report', 'report.html').read_text()
    assert f'<td>{names[2]}</td>' in page
    np.savez(tmp_path / 'statistics.npz', mu=np.zeros(8), sigma=np.eye(8))
    for name, message in (
        ('statistics.npz', 'statistics.npz has statistics of the Inception network: set evaluate.inception'),
        ('missing', 'evaluate.references: there is no file or folder .*missing'),
    ):
        run.config.evaluate.references = (str(tmp_path / name),)
        with pytest.raises(JobError, match=message):
            run_job(run, 'evaluate')


def test_published_statistics_are_a_reference(run, tmp_path):
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(50, 8)), rng.normal(1, size=(30, 8)).astype(np.float32)
    expected = frechet_distance(Moments.of(real), Moments.of(generated))
    path = str(tmp_path / 'statistics.npz')
    np.savez(path, mu=real.mean(axis=0), sigma=np.cov(real.T))
    run.config.evaluate.references = (path,)
    network = types.SimpleNamespace(name='inception')
    opened = reference_sets.open_references(run, network)
    stats = FeatureStats(generated, None, Moments.of(generated))
    found = reference_sets.compare(run, network, opened, stats, 'samples')[path]
    assert found['fid'] == pytest.approx(expected) and found['count'] == 30 and found['count_real'] is None
    assert 'few' not in found['warning'] and '30 generated images' in found['warning']
    data = bytearray(pathlib.Path(path).read_bytes())
    data[200] ^= 255
    pathlib.Path(path).write_bytes(data)
    with pytest.raises(JobError, match='evaluate.references: .*statistics.npz.* is no .npz file that can be read'):
        reference_sets.open_references(run, network)
    np.savez(path, mu=real.mean(axis=0), sigma=np.cov(real.T)[:3])
    with pytest.raises(JobError, match=r'evaluate.references: a mean \[D\] and a covariance \[D, D\] are needed'):
        reference_sets.open_references(run, network)
