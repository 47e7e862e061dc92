"""The jobs outside the pipeline: parts of images sampled again, and how likely images are."""

import csv
import pathlib
import re

import jax
import numpy as np
import pytest
from PIL import Image

from vqvae2_jax.config import build
from vqvae2_jax.data import sample_store
from vqvae2_jax.io import record
from vqvae2_jax.io.files import read_json
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.inpaint import read_mask
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.tasks.task import to_float


@pytest.fixture
def folder(run, tmp_path):
    """Two images of the test split as files of a folder, and the images."""
    source = run.images('test')
    (tmp_path / 'own').mkdir()
    images = [source[i]['image'] for i in range(2)]
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / 'own' / f'{"ab"[i]}.png')
    return str(tmp_path / 'own'), images


def encode(run, image):
    trained = workdir.load_trained(run, 'vqvae')
    model = build.make_vqvae(run.config)
    return jax.jit(lambda x: model.apply(trained.variables, to_float(x), method='encode'))(image[None])


def read_variants(run, name):
    return sample_store.read_npz(run.path('inpaint', f'{name}.npz'))


def test_a_folder_is_reconstructed(run, folder, capsys):
    path, images = folder
    (pathlib.Path(path) / 'c.png').write_bytes(b'no image')
    run.config.data.on_error, run.config.reconstruct.path = 'skip', path
    run_job(run, 'reconstruct')
    errors = []
    for name, image in zip(('0000-a', '0001-b'), images, strict=True):
        found = sample_store.read_npz(run.path('reconstruct', f'{name}.npz'))
        for level, codes in enumerate(encode(run, image)):
            np.testing.assert_array_equal(found[f'codes_{level}'], codes[0])
        picture = np.asarray(Image.open(run.path('reconstruct', f'{name}.png')).convert('L'))
        np.testing.assert_array_equal(picture, found['arr_0'][..., 0])
        errors.append(10 * np.log10(255**2 / np.mean((picture - image[..., 0].astype(float)) ** 2)))
    with open(run.path('reconstruct', 'images.csv')) as file:
        rows = list(csv.DictReader(file))
    assert [pathlib.Path(row['image']).name for row in rows] == ['a.png', 'b.png']
    np.testing.assert_allclose([float(row['psnr']) for row in rows], errors, atol=0.006)
    output = record.read_done(run.path('reconstruct'), 'reconstruct')
    assert output.results['images'] == 2 and len(output.files) == 6
    assert output.results['psnr'] == pytest.approx(np.mean(errors))
    assert 'reconstruct: 2 images' in capsys.readouterr().out
    run_job(run, 'reconstruct')
    assert 'reconstruct: done (2 images' in capsys.readouterr().out


def test_reconstruction_refuses_what_it_cannot_read(run, tmp_path):
    with pytest.raises(JobError, match='reconstruct.path is empty: give --config.reconstruct.path=IMAGE'):
        run_job(run, 'reconstruct')
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad' / 'a.png').write_bytes(b'no image')
    run.config.data.on_error, run.config.reconstruct.path = 'skip', str(tmp_path / 'bad')
    with pytest.raises(JobError, match='none of the 1 examples can be read; the last one: .*a.png'):
        run_job(run, 'reconstruct')
    run.config.reconstruct.path = str(run.path('reconstruct'))
    with pytest.raises(JobError, match='reconstruct.path=.* lies in .*reconstruct, where this job writes'):
        run_job(run, 'reconstruct')


def test_the_lower_half_is_sampled_again_and_the_rest_stays(run, folder):
    path, images = folder
    run.config.inpaint.update(path=path, mask='0.5,0,1,1', label=3, count=8)
    run_job(run, 'inpaint')
    for name, image in zip(('0000-a', '0001-b'), images, strict=True):
        found = read_variants(run, name)
        kept = encode(run, image)
        assert found['arr_0'].shape == (8, *image.shape) and found['mask'][14:].all() and not found['mask'][:14].any()
        for level, codes in enumerate(kept):
            new, half = found[f'codes_{level}'], codes.shape[1] // 2  # the middle row of an odd map is sampled too
            np.testing.assert_array_equal(new[:, :half], np.broadcast_to(codes[:, :half], new[:, :half].shape))
            assert len(np.unique(new[:, half].reshape(8, -1), axis=0)) > 1
        picture = np.asarray(Image.open(run.path('inpaint', f'{name}.png')))
        assert picture.shape[1] > 10 * 28  # original, original under the mask, eight variants


def test_an_unreadable_image_is_skipped_and_named(run, folder, capsys):
    path, _ = folder
    (pathlib.Path(path) / 'a.png').write_bytes(b'not an image')
    run.config.data.on_error = 'skip'
    run.config.inpaint.update(path=path, label=3, count=8)
    run_job(run, 'inpaint')
    assert re.search(r'inpaint: skipped .*a\.png: .+', capsys.readouterr().out)
    assert not run.path('inpaint', '0000-a.npz').exists() and read_variants(run, '0001-b')['arr_0'].shape[0] == 8


def test_one_level_alone_is_sampled_again(run, folder):
    path, images = folder
    run.config.inpaint.update(path=f'{path}/a.png', levels=('bottom',), label=1, count=8)
    run_job(run, 'inpaint')
    assert [p.name for p in sorted(run.path('inpaint').iterdir())] == ['0000-a.npz', '0000-a.png', 'record.json']
    found, kept = read_variants(run, '0000-a'), encode(run, images[0])
    np.testing.assert_array_equal(found['codes_1'], np.broadcast_to(kept[1], found['codes_1'].shape))
    assert (found['codes_0'] != np.asarray(kept[0])).any()


def test_variants_depend_on_their_number_and_not_on_devices_or_count(run, folder, capsys):
    path, _ = folder
    run.config.inpaint.update(path=path, mask='0.5,0,1,1', label=3, count=8)
    run_job(run, 'inpaint')
    expected = read_variants(run, '0001-b')
    run_job(run, 'inpaint')
    assert 'inpaint: done (2 images' in capsys.readouterr().out
    run.config.inpaint.count = 3
    run_job(Run(run.config, run.workdir, jax.devices()[:2]), 'inpaint')  # another count replaces the files
    found = read_variants(run, '0001-b')
    for name in ('arr_0', 'codes_0', 'codes_1'):
        np.testing.assert_array_equal(found[name], expected[name][:3])
    found = record.read_done(run.path('inpaint'), 'inpaint')
    assert found.settings['count'] == 3 and found.settings['mask'] == '0.5,0,1,1' and found.results == {'images': 2}
    assert set(found.inputs) == {'images', 'mask', 'vqvae', 'prior_top', 'prior_bottom'}


@pytest.mark.parametrize(
    'options, message',
    [
        ({}, 'inpaint.path is empty'),
        ({'path': '/nowhere'}, "inpaint.path: there is no file or folder '/nowhere'"),
        (
            {'path': 'own', 'levels': ('middle',), 'label': 1},
            r"inpaint.levels holds \['middle'\]; the levels are top, bottom",
        ),
        ({'path': 'own'}, "inpaint.label is -1: give the class to sample, 0 to 9, or its name: 0 'T-shirt/top', 1 "),
        ({'path': 'own', 'label': 'Cot'}, "inpaint.label: there is no class 'Cot'; the classes are 0 'T-shirt/top', "),
        ({'path': 'own', 'label': 1, 'mask': '0.5,0,1'}, "inpaint.mask is '0.5,0,1': give"),
        ({'path': 'own', 'label': 1, 'mask': '0.5,0,0.2,1'}, 'top < bottom'),
        ({'path': 'own', 'label': 1, 'mask': '0.5,0.5,0.501,0.501'}, 'inpaint.mask .* covers no pixel'),
        ({'path': 'own', 'label': 1, 'mask': __file__}, 'inpaint.mask: cannot read the image'),
    ],
)
def test_options_that_do_not_fit_are_refused(run, folder, options, message):
    if options.get('path') == 'own':
        options = options | {'path': folder[0]}
    with run.config.inpaint.ignore_type():
        run.config.inpaint.update(options)
    with pytest.raises(JobError, match=message):
        run_job(run, 'inpaint')
    assert not run.path('inpaint').exists()


def test_masks_from_shares_and_from_images(tmp_path):
    assert read_mask('', (4, 6)).all()
    box = read_mask('0.25,0.5,0.75,1', (4, 6))
    assert box[1:3, 3:].all() and box.sum() == 6
    corner = np.kron([[0, 1], [0, 0]], np.ones((2, 2))).astype(np.uint8)
    Image.fromarray(255 * corner).save(tmp_path / 'mask.png')
    np.testing.assert_array_equal(read_mask(str(tmp_path / 'mask.png'), (4, 4)), corner)
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 255  # the part of a wide image that its crop to a square keeps
    Image.fromarray(wide).save(tmp_path / 'wide.png')
    assert read_mask(str(tmp_path / 'wide.png'), (4, 4)).all()


def rows(run, name):
    with run.path('likelihood', name, 'images.csv').open() as file:
        return list(csv.DictReader(file))


def test_likelihood_of_a_split_agrees_with_the_report(run, capsys):
    run_job(run, 'likelihood')
    of_split = record.read_done(run.path('likelihood', 'test'), 'likelihood')
    assert of_split.results['images'] == 600 and of_split.inputs['images'] == run.images('test').digest
    run_job(run, 'likelihood')
    assert 'likelihood: done' in capsys.readouterr().out
    found, report = rows(run, 'test'), read_json(run.path('report', 'report.json'))['likelihood']
    assert len(found) == len({row['image'] for row in found}) == 600
    bits = [float(row['bits']) for row in found]
    assert bits == sorted(bits, reverse=True)
    np.testing.assert_allclose(np.mean(bits), report['bits_per_image'], rtol=1e-4)
    for name, level in report['levels'].items():
        nats = np.mean([float(row[f'nats_{name}']) for row in found])
        size = run.codes('test')[0][f'codes_{run.levels.index(name)}'].size
        np.testing.assert_allclose(nats / size, level['nll'], rtol=1e-4)


def test_likelihood_of_files_is_the_mean_over_the_classes(run, folder):
    path, images = folder
    run.config.likelihood.path = path
    run_job(run, 'likelihood')
    found = {row['image']: row for row in rows(run, 'of-own')}
    assert set(found) == {f'{path}/a.png', f'{path}/b.png'}
    priors = [workdir.load_trained(run, section) for section in run.prior_sections]
    for name, image in zip('ab', images, strict=True):
        codes, joint = encode(run, image), np.zeros(10)
        for level, prior in enumerate(priors):
            model = build.make_prior(run.config, level)
            for label in range(10):
                logits = model.apply({'params': prior.params}, codes[level], np.array([label]), codes[level + 1 :])
                log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
                joint[label] += np.take_along_axis(log_probs, np.asarray(codes[level])[..., None], -1).sum()
        expected = -(np.logaddexp.reduce(joint) - np.log(10)) / np.log(2)
        row = found[f'{path}/{name}.png']
        np.testing.assert_allclose(float(row['bits']), expected, rtol=1e-4)
        total = sum(float(row[f'nats_{level}']) for level in run.levels)
        np.testing.assert_allclose(total / np.log(2), expected, rtol=1e-4)
