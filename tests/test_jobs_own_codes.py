"""Jobs on codes of another tokenizer: from `write_codes` to priors, samples, likelihoods and the report."""

import csv
import dataclasses
import fcntl
import math
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath

import vqvae2_jax as vq2
from vqvae2_jax.config import base, build
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.data import own_codes, sample_store
from vqvae2_jax.io import files, plots, record
from vqvae2_jax.io.record import DamagedError, JobError, StaleInputError
from vqvae2_jax.jobs import cas, pipeline, workdir
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run

pytestmark = pytest.mark.slow

SIZES, SHAPES = (7, 300), ((5, 6), (3, 4))


def make_config(directory):
    config = base.get_config(codes=directory)
    config.name = 'own'
    for prior in config.prior.values():
        prior.update(hidden_channels=8, residual_channels=8, num_residual_blocks=1, num_heads=2, kernel_size=3)
        prior.training.update(steps=4, batch_size=16, log_every=2, eval_every=2, save_every=4)
    config.prior.fine.training.image_every = 4
    config.prior.coarse.order = 'wavefront'
    config.sample.update(count=24, batch_size=16, shard_size=16, labels=('dog', 'cat'))
    config.evaluate.batch_size = 16
    return config


def write_codes(directory, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(120) % 3
    maps = [rng.integers(0, size, (120, *shape)) for shape, size in zip(SHAPES, SIZES, strict=True)]
    names = {'class_names': ('cat', 'dog', 'cow'), 'levels': ('fine', 'coarse')}
    vq2.write_codes(directory, maps, labels, codebook_sizes=SIZES, **names)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The pipeline and the likelihood job, run once for all test processes; tests that change files take `run`."""
    directory = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        directory = directory.parent  # of all processes
    directory = epath.Path(directory) / 'own'
    with open(f'{directory}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not (directory / 'codes').exists():
            write_codes(directory / 'codes')
        run = Run(make_config(directory / 'codes'), directory / 'run')
        validate_config(run.config)
        if not run.path('likelihood').exists():
            run_job(run, 'pipeline')
            run_job(run, 'likelihood')
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run and of its codes."""
    shutil.copytree(finished.workdir.parent, tmp_path / 'own')
    return Run(make_config(tmp_path / 'own' / 'codes'), epath.Path(tmp_path) / 'own' / 'run')


@pytest.fixture(scope='module')
def generator(finished):
    return vq2.load(finished.workdir)


@pytest.fixture(scope='module')
def test_codes(finished):
    source = finished.codes('test')
    examples = [source[i] for i in range(len(source))]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def test_no_directory_of_stage_1_is_written(finished):
    found = {path.name for path in finished.workdir.iterdir()}
    assert found == {'prior_fine', 'prior_coarse', 'samples', 'evaluation', 'likelihood', 'report'}
    codes = record.read_done(finished.path('prior_fine'), '').inputs
    assert list(codes) == ['codes'] and codes == record.read_done(finished.path('prior_coarse'), '').inputs
    assert finished.path('prior_fine', 'pictures', 'validation-4.png').exists()


def test_the_sample_set_has_code_maps_and_their_picture(finished, generator):
    stored = {}
    for start, stop in ((0, 16), (16, 24)):
        part = dict(np.load(finished.path('samples', 'default', f'samples-{start:08d}-{stop:08d}.npz')))
        assert list(part) == ['codes_0', 'codes_1', 'label', 'index']
        stored = {k: np.concatenate([stored[k], v]) if stored else v for k, v in part.items()}
    assert stored['index'].tolist() == list(range(24)) and stored['label'].tolist() == [1, 0] * 12
    keys = vq2.sample_keys(jax.random.key(0), np.arange(24))
    images, codes = vq2.sample(generator, keys, stored['label'])
    assert images is None
    for level, size in enumerate(SIZES):
        assert stored[f'codes_{level}'].shape == (24, *SHAPES[level])
        np.testing.assert_array_equal(stored[f'codes_{level}'], codes[level])
        assert 0 <= codes[level].min() <= codes[level].max() < size
    grid = plots.draw_codes([stored['codes_0'], stored['codes_1']], SIZES)
    cats = np.flatnonzero(stored['label'] == 0)[:10]
    picture = np.asarray(plots.Image.open(finished.path('samples', 'default', 'samples.png')))
    expected = plots.image_grid(grid[cats], 10, scale=plots.visible_scale(grid))
    np.testing.assert_array_equal(picture[: len(expected)], expected)


def test_a_drawing_has_one_color_for_each_code():
    fine, coarse = np.arange(20).reshape(1, 4, 5), np.arange(6).reshape(1, 2, 3)
    picture = plots.draw_codes([fine, coarse], [20, 6])
    assert picture.shape == (1, 4, 6 + 5, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[0, :, 6:], plots.code_palette(20)[fine[0]])
    np.testing.assert_array_equal(picture[0, :, :6], plots.code_palette(6)[np.repeat(np.repeat(coarse[0], 2, 0), 2, 1)])
    assert len(np.unique(plots.code_palette(300), axis=0)) == 300


def test_reported_likelihood(finished, generator, test_codes):
    found = files.read_json(finished.path('report', 'report.json'))
    assert 'reconstruction' not in found and 'originals' not in found and 'ssim' not in found['protocol']
    assert found['protocol']['counts'] == {'train': 96, 'validation': 12, 'test': 12}
    codes, bits = (test_codes['codes_0'], test_codes['codes_1']), 0.0
    for level, name in enumerate(('fine', 'coarse')):
        prior, variables = generator.prior(name)
        logits = jax.jit(prior.apply)(variables, codes[level], test_codes['label'], codes[level + 1 :])
        log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
        nll = -np.take_along_axis(log_p, codes[level][..., None], axis=-1).mean()
        of_level = found['likelihood']['levels'][name]
        np.testing.assert_allclose(of_level['nll'], nll, rtol=1e-4)
        p = np.unique(codes[level], return_counts=True)[1] / codes[level].size
        np.testing.assert_allclose(of_level['unigram_entropy'], -np.sum(p * np.log(p)), rtol=1e-6)
        bits += nll / math.log(2) * math.prod(SHAPES[level])
    np.testing.assert_allclose(found['likelihood']['bits_per_image'], bits, rtol=1e-4)
    assert 'bits_per_subpixel' not in found['likelihood']
    entry = found['sets']['default']
    assert entry['count'] == 24 and entry['stale'] == [] and 'quality' not in entry and 'class_accuracy' not in entry
    assert set(found['seconds']) == {'prior_coarse', 'prior_fine'}
    page = finished.path('report', 'report.html').read_text()
    assert 'one color per code' in page and 'Reconstruction' not in page and 'subpixel' not in page


def test_the_likelihood_of_every_example(finished, generator, test_codes):
    with finished.path('likelihood', 'test', 'images.csv').open() as file:
        rows = {int(row['image']): row for row in csv.DictReader(file)}
    nats, bits = vq2.log_likelihood(generator, (test_codes['codes_0'], test_codes['codes_1']), test_codes['label'])
    assert sorted(rows) == sorted(test_codes['index'].tolist())
    for i, index in enumerate(test_codes['index'].tolist()):
        np.testing.assert_allclose(float(rows[index]['bits']), bits[i], rtol=1e-3)
        np.testing.assert_allclose(float(rows[index]['nats_fine']), -nats[i, 0], rtol=1e-3)
    output = record.read_done(finished.path('likelihood', 'test'), '')
    assert set(output.inputs) == {'codes', 'prior_fine', 'prior_coarse'}


def test_all_is_done_once(run, capsys):
    before = {name: run.path(name, 'record.json').read_bytes() for name in ('prior_fine', 'samples/default')}
    run_job(run, 'pipeline')
    printed = capsys.readouterr().out
    for line in ('prior_coarse: done', 'prior_fine: done', 'sample: done'):
        assert line in printed
    assert before == {name: run.path(name, 'record.json').read_bytes() for name in before}


@pytest.mark.parametrize('job', [job for job in pipeline.JOBS if job not in pipeline._WITHOUT_STAGE_1])
def test_jobs_that_need_a_decoder_say_so_in_one_line(run, job):
    images = {'vqvae', 'extract_codes', 'classifier', 'reject', 'cas', 'inpaint', 'reconstruct', 'serve', 'import'}
    assert images == set(pipeline.JOBS) - set(pipeline._WITHOUT_STAGE_1)
    with pytest.raises(JobError, match=f'--job={job} needs images and stage 1.*codes.path=.*: the jobs are') as error:
        run_job(run, job)
    assert '\n' not in str(error.value)


def test_the_plan_has_priors_and_the_sampler(finished, capsys):
    run_job(finished, 'plan')
    printed = capsys.readouterr().out
    rows = [line.split('|')[1].strip() for line in printed.splitlines() if line.startswith('| ')]
    assert rows == ['job', 'prior.fine', 'prior.coarse', 'sample']


def test_other_codes_are_refused(run):
    shutil.rmtree(run.config.codes.path)
    write_codes(run.config.codes.path, seed=1)
    for job in ('prior', 'evaluate'):
        with pytest.raises(
            StaleInputError, match=r'was made from another input codes:\n  recorded \w+\n  now      \w+'
        ):
            run_job(run, job)


def test_the_same_codes_in_arrays_are_another_input_that_is_read(run):
    directory = pathlib.Path(run.config.codes.path)
    spec = run.code_spec
    for split in ('train', 'validation', 'test'):
        source = own_codes.open_split(directory, split, spec)
        examples = [source[i] for i in range(len(source))]
        arrays = {name: np.stack([x[name] for x in examples]) for name in ('codes_0', 'codes_1', 'label')}
        shutil.rmtree(directory / split)
        np.savez(directory / f'{split}.npz', **arrays)
    with pytest.raises(StaleInputError, match='another input codes'):
        run_job(run, 'prior')
    fresh = Run(run.config, run.workdir.parent / 'fresh')
    fresh.config.prior.coarse.training.steps = 1
    run_job(fresh, 'prior', 'coarse')
    assert record.read_done(fresh.path('prior_coarse'), '').results['steps'] == 1


def test_damaged_codes_are_refused(run):
    path = next(pathlib.Path(run.config.codes.path, 'test').glob('*.array_record'))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r'is damaged: .*To make it again, call vqvae2_jax\.write_codes again'):
        run.codes('test')


def test_priors_of_different_codes_make_no_samples(run):
    output = record.read(run.path('prior_fine'))
    output.inputs['codes'] = '0' * 64
    output.write()
    with pytest.raises(StaleInputError, match='prior_fine was made from another input codes'):
        workdir.generator_digests(run)
    with pytest.raises(StaleInputError, match='another input codes'):
        vq2.load(run.workdir)


def test_sampling_needs_the_description_alone(run):
    for split in ('train', 'validation', 'test'):
        shutil.rmtree(pathlib.Path(run.config.codes.path, split))
    run.config.sample.update(name='more', count=2)
    run_job(run, 'sample')
    assert run.path('samples', 'more', 'samples.png').exists()


def test_a_missing_prior_is_named(run):
    shutil.rmtree(run.path('prior_coarse'))
    with pytest.raises(JobError, match='prior_coarse has nothing: run your command with --job=prior --level=coarse'):
        run_job(run, 'sample')
    with pytest.raises(JobError, match='--job=prior --level=coarse'):
        vq2.load(run.workdir)


def test_names_of_classes_come_from_the_description(run):
    run.config.sample.update(name='other', labels=('bird',))
    with pytest.raises(JobError, match="there is no class 'bird'; the classes are 0 'cat', 1 'dog', 2 'cow'"):
        run_job(run, 'sample')


def test_a_generator_without_stage_1(finished, generator, tmp_path):
    specification = generator.specification
    assert generator.variables == {} and len(generator.params) == 2 and not specification.has_stage_1
    assert specification.levels == ('fine', 'coarse') and specification.map_shapes == SHAPES
    assert specification.codebook_sizes == SIZES and specification.class_names == ('cat', 'dog', 'cow')
    trained = {**finished.config.prior.fine.to_dict(), 'training': None}
    assert {**specification.to_config().prior.fine.to_dict(), 'training': None} == trained
    vq2.save(generator, tmp_path / 'own.safetensors')
    again = vq2.load(tmp_path / 'own.safetensors')
    assert again.specification == specification
    jax.tree.map(np.testing.assert_array_equal, again.params, generator.params)
    shapes = jax.tree.map(lambda x: x.shape, generator.params)
    assert jax.tree.map(lambda x: x.shape, specification.shapes().params) == shapes
    codes = tuple(np.zeros((1, *shape), np.int32) for shape in SHAPES)
    keys = vq2.sample_keys(jax.random.key(0), np.arange(1))
    coarse = vq2.sample_level(generator, 'coarse', keys, np.zeros(1, int))
    np.testing.assert_array_equal(coarse, vq2.sample(generator, keys, np.zeros(1, int)).codes[1])
    image, mask = np.zeros((1, 8, 8, 3), np.uint8), np.ones((8, 8), bool)
    for call in (
        lambda: vq2.encode(generator, image),
        lambda: vq2.decode(generator, codes),
        lambda: vq2.preview(generator, codes, level='coarse'),
        lambda: vq2.reconstruct(generator, image),
        lambda: vq2.inpaint(generator, keys, image, mask, np.zeros(1, int)),
        generator.vqvae,
        lambda: specification.image_size,
    ):
        with pytest.raises(ValueError, match='this generator has no stage 1: its priors model the codes of another'):
            call()


def test_an_exported_generator_without_stage_1(generator, tmp_path):
    vq2.export(generator, tmp_path / 'own.npz', platforms=('cpu',))
    file = np.load(tmp_path / 'own.npz')
    assert 'encode' not in file and 'decode' not in file
    sample = jax.export.deserialize(bytearray(file['sample']))
    weights = {name: file[name] for name in file.files if name.startswith('weights/')}
    index = np.arange(3, dtype=np.int32)
    images, codes = sample.call(weights, np.uint32(5), index, index)
    assert images is None
    expected = vq2.sample(generator, vq2.sample_keys(jax.random.key(5), index), index)
    for ours, theirs in zip(codes, expected.codes, strict=True):
        np.testing.assert_array_equal(ours, theirs)


class TestAugmentation:
    """codes.flip and codes.crops: of training images only, after the images themselves."""

    @pytest.fixture(scope='class')
    def runs(self, tmp_path_factory):
        """Extractions by one stage 1, without and with mirrored images."""
        directory = epath.Path(tmp_path_factory.mktemp('flip'))
        rng = np.random.default_rng(0)
        images, labels = rng.integers(0, 256, (60, 8, 8, 1), np.uint8), np.arange(60) % 2
        np.savez(directory / 'images.npz', arr_0=images, label=labels, class_names=['a', 'b'])
        config = vq2.load_config('tiny')
        config.data.update(name='npz', path=str(directory / 'images.npz'), image_size=(8, 8), num_classes=2)
        config.data.held_out = (0.2, 0.2)
        config.vqvae.training.update(steps=2, eval_every=2, save_every=2, image_every=0)
        config.codes.update(batch_size=16, shard_size=50)
        config.prior.top.training.steps = config.prior.bottom.training.steps = 2
        validate_config(config)
        plain = Run(config, directory / 'plain')
        run_job(plain, 'vqvae')
        mirrored = Run(config.copy_and_resolve_references(), directory / 'mirrored')
        mirrored.config.codes.flip = True
        shutil.copytree(plain.workdir, mirrored.workdir)
        for run in (plain, mirrored):
            run_job(run, 'extract_codes')
        return plain, mirrored

    def codes(self, run, split):
        source = run.codes(split)
        return [source[i] for i in range(len(source))]

    @pytest.mark.parametrize('split', ['validation', 'test'])
    def test_held_out_codes_are_unchanged(self, runs, split):
        plain, mirrored = (record.read_done(run.path('codes', split), '') for run in runs)
        assert plain.files == mirrored.files and plain.digest == mirrored.digest and plain.results['count'] == 12

    def test_the_training_split_has_both(self, runs):
        plain, mirrored = (self.codes(run, 'train') for run in runs)
        assert len(plain) == 36 and len(mirrored) == 72
        assert [int(example['index']) for example in mirrored] == list(range(72))
        for before, now in zip(plain, mirrored[:36], strict=True):
            assert all(np.array_equal(before[name], now[name]) for name in before)
        source = runs[0].images('train')
        images = np.stack([source[i]['image'][:, ::-1] for i in range(36)])
        expected = vq2.encode(vq2.load(runs[1].workdir), images)
        for i, example in enumerate(mirrored[36:]):
            assert example['label'] == mirrored[i]['label']
            assert all(np.array_equal(example[f'codes_{level}'], expected[level][i]) for level in range(2))
        assert any(not np.array_equal(a['codes_0'], b['codes_0']) for a, b in zip(plain, mirrored[36:], strict=True))

    def test_the_setting_is_recorded_and_a_change_refused(self, runs):
        plain, mirrored = (record.read_done(run.path('codes', 'train'), '') for run in runs)
        assert 'flip' not in plain.settings and mirrored.settings['flip'] is True
        changed = Run(runs[0].config.copy_and_resolve_references(), runs[0].workdir)
        changed.config.codes.flip = True
        with pytest.raises(record.SettingsChangedError, match='flip: recorded None, now True'):
            run_job(changed, 'extract_codes')

    def test_mirrored_images_are_not_reconstructed_for_cas(self, runs):
        for run in runs:
            cas.reconstruct(run)
        plain, mirrored = (sample_store.read_set(run.path('reconstructions')) for run in runs)
        assert plain.results == mirrored.results == {'count': 36}
        index = np.arange(36)
        found = [sample_store.take(output.directory, index) for output in (plain, mirrored)]
        assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])

    def test_crops_follow_the_images_and_are_mirrored_like_them(self, runs):
        run = Run(runs[0].config.copy_and_resolve_references(), runs[0].workdir.parent / 'cropped')
        run.config.codes.update(crops=2, flip=True)
        shutil.copytree(runs[0].path('vqvae'), run.path('vqvae'))
        run_job(run, 'extract_codes')
        assert record.read_done(run.path('codes', 'train'), '').settings['crops'] == 2
        plain, found = self.codes(runs[0], 'train'), self.codes(run, 'train')
        assert len(found) == 6 * len(plain) and len(self.codes(run, 'test')) == 12
        for before, now in zip(plain, found[:36], strict=True):
            assert all(np.array_equal(before[name], now[name]) for name in before)
        source = dataclasses.replace(runs[0].images('train'), crops=2, with_mirrored=True)
        images = np.stack([source[i]['image'] for i in range(len(source))])
        whole, first, second = images[:108].reshape(3, 36, *images.shape[1:])
        np.testing.assert_array_equal(images[108:], images[:108, :, ::-1])
        differ = [(a != b).any(axis=(1, 2, 3)).mean() for a, b in ((whole, first), (whole, second), (first, second))]
        assert min(differ) > 0.9
        expected = vq2.encode(vq2.load(run.workdir), images)
        for i, example in enumerate(found):
            assert example['label'] == plain[i % 36]['label']
            assert all(np.array_equal(example[f'codes_{level}'], expected[level][i]) for level in range(2))

    @pytest.mark.system
    def test_priors_train_on_both(self, runs, capsys):
        run_job(runs[1], 'prior', 'top')
        assert '72 training and 12 validation examples' in capsys.readouterr().out
        assert build.code_spec(runs[1].config) == build.code_spec(runs[0].config)


def test_priors_are_trained_further_and_exported(run, tmp_path):
    path = str(tmp_path / 'priors.safetensors')
    run_job(Run(run.config, run.workdir, target=path), 'export')
    fresh = Run(run.config, run.workdir.parent / 'fresh', source=path)
    fresh.config.prior.coarse.training.steps = 1
    run_job(fresh, 'prior', 'coarse')
    assert record.read_done(fresh.path('prior_coarse'), '').inputs.keys() == {'codes', 'from'}
    with pytest.raises(JobError, match='codes are those of another tokenizer. Its priors can be trained further'):
        run_job(fresh, 'sample')
