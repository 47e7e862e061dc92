"""Outputs of the jobs: numbers against their definitions, files, and a second run that changes nothing."""

import math
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from vqvae2_jax.config import build
from vqvae2_jax.data import sample_store
from vqvae2_jax.io import record
from vqvae2_jax.io.files import digest_arrays, read_json
from vqvae2_jax.jobs import code_inputs, workdir
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.report_files import curve_labels
from vqvae2_jax.metrics.classification import accuracy
from vqvae2_jax.tasks.task import to_float


@pytest.fixture(scope='module')
def report(finished):
    return read_json(finished.path('report', 'report.json'))


@pytest.fixture(scope='module')
def images(finished):
    source = finished.images('test')
    examples = [source[i] for i in range(len(source))]
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


@pytest.fixture(scope='module')
def output(finished, images):
    """Stage 1 on all test images at once: no batches, no padding, no mask."""
    trained = workdir.load_trained(finished, 'vqvae')
    model = build.make_vqvae(finished.config)
    return jax.jit(model.apply)(trained.variables, to_float(images['image']))


def all_codes(run, split):
    source = run.codes(split)
    examples = [source[i] for i in range(len(source))]
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def entropy(codes):
    p = np.unique(codes, return_counts=True)[1] / codes.size
    return -np.sum(p * np.log(p))


def test_codes_are_those_of_the_images(finished, images, output):
    stored = all_codes(finished, 'test')
    assert len(stored['index']) == len(images['index']) == 600
    for name in ('index', 'label'):
        np.testing.assert_array_equal(stored[name], images[name])
    for level in range(2):
        # Batches of another size round differently; a tie may then fall the other way.
        assert np.mean(stored[f'codes_{level}'] == output.codes[level]) > 0.999
    assert [run_split.count for run_split in (finished.codes(s).meta for s in ('train', 'validation'))] == [400, 9000]


def test_reported_reconstruction(report, images, output):
    image = np.asarray(to_float(images['image']), np.float64)

    def psnr(reconstruction):
        return 10 * np.log10(4 / np.mean((np.clip(np.asarray(reconstruction, np.float64), -1, 1) - image) ** 2))

    found = report['reconstruction']
    np.testing.assert_allclose(found['psnr'], psnr(output.image), atol=1e-3)
    np.testing.assert_allclose(found['mse_unit'], 10 ** (-found['psnr'] / 10), rtol=1e-6)
    np.testing.assert_allclose(found['mse'], 4 * found['mse_unit'])
    top = found['levels']['top']
    np.testing.assert_allclose(top['without_finer_levels']['psnr'], psnr(output.previews[0]), atol=1e-3)
    assert 'without_finer_levels' not in found['levels']['bottom']
    np.testing.assert_allclose(found['compression_ratio'], 8 * 28 * 28 / (4 * (14 * 14 + 7 * 7)))
    for level, name in enumerate(('bottom', 'top')):
        codes = np.asarray(output.codes[level])
        assert found['levels'][name]['codes'] == list(codes.shape[1:])
        assert found['levels'][name]['codebook_usage'] == len(np.unique(codes)) / 16
        np.testing.assert_allclose(found['levels'][name]['perplexity'], math.exp(entropy(codes)), rtol=1e-2)


def ssim(a, b):
    """Wang et al. 2004, of gray images [N, H, W] in [0, 1]."""
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(x):
        views = np.lib.stride_tricks.sliding_window_view(x, (11, 11), axis=(1, 2))
        return np.einsum('nhwij,i,j->nhw', views, window, window, optimize=True)

    variances, covariance = [mean(x * x) - mean(x) ** 2 for x in (a, b)], mean(a * b) - mean(a) * mean(b)
    likeness = (2 * mean(a) * mean(b) + 0.01**2) * (2 * covariance + 0.03**2)
    return np.mean(likeness / ((mean(a) ** 2 + mean(b) ** 2 + 0.01**2) * (sum(variances) + 0.03**2)))


def test_reported_structural_similarity(report, images, output):
    def seen(x):
        return (np.clip(np.asarray(x, np.float64), -1, 1)[..., 0] + 1) / 2

    original, found = seen(to_float(images['image'])), report['reconstruction']
    np.testing.assert_allclose(found['ssim'], ssim(original, seen(output.image)), rtol=1e-3)
    found = found['levels']['top']['without_finer_levels']['ssim']
    np.testing.assert_allclose(found, ssim(original, seen(output.previews[0])), rtol=1e-3)
    assert ssim(original, original) == 1


def test_reported_likelihood(finished, report):
    train, test = all_codes(finished, 'train'), all_codes(finished, 'test')
    bits = 0.0
    for level, (name, section) in enumerate(zip(finished.levels, finished.prior_sections, strict=True)):
        trained = workdir.load_trained(finished, section)
        prior, found = build.make_prior(finished.config, level), report['likelihood']['levels'][name]

        def nll(codes, level=level, prior=prior, trained=trained):
            coarser = tuple(codes[f'codes_{i}'] for i in range(level + 1, 2))
            here = codes[f'codes_{level}']
            logits = jax.jit(prior.apply)({'params': trained.params}, here, codes['label'], coarser)
            log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
            return -np.take_along_axis(log_p, here[..., None], axis=-1).mean()

        np.testing.assert_allclose(found['nll'], nll(test), rtol=1e-4)
        np.testing.assert_allclose(found['nll_train'], nll(train), rtol=1e-4)
        here, there = test[f'codes_{level}'], train[f'codes_{level}']
        np.testing.assert_allclose(found['unigram_entropy'], entropy(here), rtol=1e-6)
        counts = (there[..., None] == np.arange(16)).sum(axis=0) + 1.0  # [h, w, K], add-one smoothing
        log_p = np.log(counts / counts.sum(axis=-1, keepdims=True))
        by_hand = -np.mean([np.take_along_axis(log_p, codes[..., None], axis=-1).mean() for codes in here])
        np.testing.assert_allclose(found['positional_cross_entropy'], by_hand, rtol=1e-6)
        assert found['code_counts'] == [(here == code).sum() for code in range(16)]
        assert found['parameters'] == sum(x.size for x in jax.tree.leaves(trained.params))
        bits += found['nll'] / math.log(2) * here[0].size
    np.testing.assert_allclose(report['likelihood']['bits_per_image'], bits)
    np.testing.assert_allclose(report['likelihood']['bits_per_subpixel'], bits / 28**2)


def test_reported_samples_and_rejection(finished, report):
    stored = sample_store.take(finished.path('samples', 'default'), np.arange(24))
    scores = sample_store.read_npz(finished.path('rejection', 'default', 'scores.npz'))
    accepted = sample_store.read_npz(finished.path('rejection', 'default', 'accepted.npz'))
    np.testing.assert_array_equal(stored['index'], np.arange(24))
    np.testing.assert_array_equal(stored['label'], np.arange(24) % 10)
    np.testing.assert_array_equal(scores['index'], stored['index'])
    trained = workdir.load_trained(finished, 'classifier')
    model = build.make_classifier(finished.config)
    probabilities = jax.nn.softmax(model.apply({'params': trained.params}, to_float(stored['arr_0'])))
    np.testing.assert_allclose(scores['score'], np.asarray(probabilities)[np.arange(24), stored['label']], rtol=1e-4)
    for label in range(10):  # the better half of every class, rounded up
        of_class = np.flatnonzero(scores['label'] == label)
        best = of_class[np.argsort(-scores['score'][of_class])][: math.ceil(len(of_class) / 2)]
        assert set(accepted['index'][accepted['label'] == label]) == set(best)
    for name in ('arr_0', 'label', 'codes_0', 'codes_1'):
        np.testing.assert_array_equal(accepted[name], stored[name][accepted['index']])
    found = report['sets']['default']
    assert found['count'] == 24 and found['keep_fraction'] == 0.5 and found['accepted'] == len(accepted['index'])
    assert found['class_accuracy'] == accuracy(scores['predicted'], scores['label'])
    kept = scores['predicted'][accepted['index']]
    assert found['class_accuracy_after_rejection'] == accuracy(kept, accepted['label'])


def test_samples_are_the_decoded_codes(finished):
    stored = sample_store.take(finished.path('samples', 'default'), np.arange(16))
    trained, model = workdir.load_trained(finished, 'vqvae'), build.make_vqvae(finished.config)
    image = np.asarray(model.apply(trained.variables, (stored['codes_0'], stored['codes_1']), method='decode'))
    expected = (np.clip(image, -1, 1) + 1) * 127.5
    assert np.abs(expected - stored['arr_0']).max() < 0.51
    assert len(np.unique(stored['codes_0'].reshape(16, -1), axis=0)) == 16


def test_records_hold_the_digests_of_their_inputs(finished):
    jobs = {'vqvae': 'vqvae', 'prior_top': 'prior', 'prior_bottom': 'prior'}
    found = {directory: record.read_done(finished.path(directory), job) for directory, job in jobs.items()}
    for directory, of in found.items():
        section = directory.replace('_', '.')
        trained = workdir.load_trained(finished, section, directory)
        assert of.digest == digest_arrays({'params': trained.params, 'model_state': trained.model_state})
        assert of.results['steps'] == 8 and of.results['best_step'] in (4, 8) and of.seconds > 0
    for split in ('train', 'validation', 'test'):
        inputs = record.read_done(finished.path('codes', split), 'extract_codes').inputs
        assert inputs == {'vqvae': found['vqvae'].digest, 'images': finished.images(split).digest}
    assert found['prior_top'].inputs == found['prior_bottom'].inputs
    assert found['prior_top'].inputs == {'vqvae': found['vqvae'].digest, 'codes': code_inputs.codes_digest(finished)}
    inputs = sample_store.read_set(finished.path('samples', 'default')).inputs
    assert inputs == {directory: of.digest for directory, of in found.items()}


def test_every_output_directory_has_a_finished_record(finished):
    names = ['vqvae', 'prior_top', 'prior_bottom', 'classifier', 'samples/default', 'rejection/default', 'report']
    names += [f'codes/{split}' for split in ('train', 'validation', 'test')]
    if build.has_cas(finished.config):
        names += ['reconstructions', 'cas/reconstructions', 'cas/samples/default']
    for name in names:
        found = record.read(finished.path(name))
        assert found is not None and found.state == record.DONE and found.digest, name


def test_pictures_show_something(finished):
    pictures = [finished.path('report', f'{name}.png') for name in ('reconstructions', 'curves')]
    pictures += [finished.path('report', f'{name}.png') for name in ('code_maps', 'code_usage')]
    pictures += [finished.path('report', 'sets', 'default', f'{name}.png') for name in ('samples', 'accepted')]
    pictures += list(finished.path('vqvae', 'pictures').glob('*.png'))
    pictures += list(finished.path('prior_top', 'pictures').glob('*.png'))
    assert len(pictures) >= 8
    for path in pictures:
        pixels = np.asarray(Image.open(path))
        assert min(pixels.shape[:2]) >= 50 and pixels.std() > 5, path


def test_a_second_run_says_done_and_rewrites_nothing(run, capsys):
    def times():
        files = [p for p in pathlib.Path(run.workdir).rglob('*') if p.is_file()]
        return {p: p.stat().st_mtime_ns for p in files}

    before = times()
    for job in ('vqvae', 'extract_codes', 'prior', 'classifier', 'sample', 'reject'):
        run_job(run, job)
        assert 'done (' in capsys.readouterr().out, job
    assert times() == before


def test_curves_are_labeled_with_everything_in_which_they_differ(config):
    assert curve_labels(config, 'vqvae') == ('train, last weights', 'held out, averaged weights')
    assert curve_labels(config, 'classifier')[0] == 'train, last weights, dropout, augmented'
    config.prior.top.update(dropout=0.0, attention_dropout=0.0)
    config.prior.top.training.params_ema_decay = 0.0
    assert curve_labels(config, 'prior.top') == ('train', 'held out')
    config.prior.top.attention_dropout = 0.1
    config.data.flip = True
    assert curve_labels(config, 'prior.top') == ('train, dropout', 'held out')
    assert curve_labels(config, 'vqvae')[0] == 'train, last weights, augmented'
