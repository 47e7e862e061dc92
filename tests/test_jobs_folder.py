"""A folder of RGB images that are not square and have no labels, one of them broken; three levels."""

import shutil

import numpy as np
import pytest
from etils import epath
from PIL import Image

from vqvae2_jax.config import base
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.decode import UnreadableImage
from vqvae2_jax.io import record
from vqvae2_jax.io.files import read_json
from vqvae2_jax.io.record import JobError, StaleInputError
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run


@pytest.fixture
def folder(tmp_path):
    """Sixty pictures of 20x30 pixels and a broken one."""
    (tmp_path / 'images').mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        pixels = rng.integers(0, 255, (2, 3, 3), np.uint8).repeat(10, axis=0).repeat(10, axis=1)
        Image.fromarray(pixels).save(tmp_path / 'images' / f'{number:03d}.png')
    (tmp_path / 'images' / 'broken.jpg').write_bytes(b'\xff\xd8\xff and no more')
    return tmp_path / 'images'


@pytest.fixture
def folder_run(folder, tmp_path):
    config = base.get_config(('bottom', 'middle', 'top'))
    config.name = 'folder'
    data = dict(name='folder', path=str(folder), image_size=(16, 24), channels=3, on_error='skip')
    config.data.update(data, held_out=(0.3, 0.3))
    config.vqvae.update(downsample_factors=(2, 2, 2), hidden_channels=8, residual_channels=4, num_residual_blocks=1)
    config.vqvae.update(codebook_size=16, codebook_dim=8)
    for prior in config.prior.values():
        prior.update(hidden_channels=8, residual_channels=8, num_residual_blocks=1, num_heads=2)
    config.prior.top.num_attention_layers = 1
    for section in ('vqvae', 'prior.top', 'prior.middle', 'prior.bottom'):
        config[section].training.update(steps=2, batch_size=8, log_every=1, eval_every=2, save_every=2)
    config.vqvae.training.image_every = 2
    config.codes.update(batch_size=8, shard_size=16)
    config.sample.update(count=8, batch_size=8)
    config.evaluate.batch_size = 8
    validate_config(config)
    return Run(config, epath.Path(tmp_path) / 'run')


@pytest.mark.system
def test_a_folder_becomes_a_report(folder_run, capsys):
    run_job(folder_run, 'pipeline')
    report = read_json(folder_run.path('report', 'report.json'))
    assert report['skipped_files'] == 1 and [p.endswith('broken.jpg') for p in folder_run.skipped()] == [True]
    assert 'skipped          1 unreadable files' in capsys.readouterr().out
    assert list(report['likelihood']['levels']) == list(report['reconstruction']['levels'])
    shapes = {name: level['codes'] for name, level in report['reconstruction']['levels'].items()}
    assert shapes == {'bottom': [8, 12], 'middle': [4, 6], 'top': [2, 3]}
    found = [folder_run.codes(split).meta.count for split in ('train', 'validation', 'test')]
    assert sum(found) == 60 and sum(report['protocol']['counts'].values()) == 61  # the broken one has no codes
    found = sample_store.take(folder_run.path('samples', 'default'), np.arange(8))
    assert found['arr_0'].shape == (8, 16, 24, 3) and not found['label'].any()
    assert 'class_accuracy' not in report['sets']['default'] and not folder_run.path('classifier').exists()
    written = {p.name for p in folder_run.path('report').iterdir()}
    pictures = {'curves.png', 'reconstructions.png', 'code_maps.png', 'code_usage.png'}
    assert written == {'record.json', 'report.json', 'report.html', 'sets', *pictures}
    assert [p.name for p in folder_run.path('report', 'sets', 'default').iterdir()] == ['samples.png']
    with pytest.raises(JobError, match='data.num_classes is 0: a classifier needs at least 2'):
        run_job(folder_run, 'classifier')


def test_a_broken_file_is_an_error_with_its_path(folder_run):
    folder_run.config.data.on_error = 'raise'
    folder_run.config.vqvae.training.update(steps=40, eval_every=40, save_every=40)
    with pytest.raises(UnreadableImage, match=r'broken\.jpg.*on_error=skip'):
        run_job(folder_run, 'vqvae')


def test_a_folder_that_is_not_there_is_an_error_with_its_path(folder_run):
    folder_run.config.data.path = '/nowhere'
    with pytest.raises(JobError, match="data.path: there is no folder '/nowhere'"):
        run_job(folder_run, 'vqvae')


def test_a_file_more_is_refused_with_both_digests(folder_run, folder):
    """It changes the splits: the test split would hold images that were trained on."""
    run_job(folder_run, 'vqvae')
    recorded = record.read_done(folder_run.path('vqvae'), 'vqvae').inputs['images']
    shutil.copy(folder / '000.png', folder / 'new.png')
    again = Run(folder_run.config, folder_run.workdir)  # another process
    for job in ('vqvae', 'extract_codes'):
        with pytest.raises(
            StaleInputError, match=rf'(?s)images.*{recorded}.*{again.images_digest()}.*[Dd]elete .*vqvae'
        ):
            run_job(again, job)
    assert not folder_run.path('codes').exists()


def test_the_images_are_inspected_once_before_a_training(folder_run, folder, capsys):
    shutil.copy(folder / '000.png', folder / 'copy.png')
    run_job(folder_run, 'vqvae')
    lines = capsys.readouterr().out.splitlines()
    block = [line for line in lines if line.startswith('data: ')]
    assert block[:2] == ['data: 62 images: 24 train, 19 validation, 19 test', 'data: no classes']
    assert sum('decoded' in line for line in block) == 3 and 'some images are there twice' in '\n'.join(block)
    assert sum('cannot be read, such as' in line and 'broken.jpg' in line for line in block) == 1
    assert lines.index(block[-1]) < next(i for i, line in enumerate(lines) if line.startswith('vqvae: '))
    found = record.read_done(folder_run.path('data'), 'vqvae')
    assert found.inputs == {split: folder_run.images(split).digest for split in ('train', 'validation', 'test')}
    assert found.results['images'] == {'train': 24, 'validation': 19, 'test': 19}
    shutil.rmtree(folder_run.path('vqvae'))
    run_job(Run(folder_run.config, folder_run.workdir), 'vqvae')
    again = [line for line in capsys.readouterr().out.splitlines() if line.startswith('data: ')]
    assert again == [f'data: inspected before, see {folder_run.path("data", "record.json")}']
    run_job(Run(folder_run.config, folder_run.workdir), 'vqvae')  # done: nothing to say about images
    assert 'data: ' not in capsys.readouterr().out


def test_a_file_that_cannot_be_read_ends_a_training_before_it_begins(folder_run, folder, capsys):
    (folder / 'broken.jpg').unlink()
    (folder / 'link.png').symlink_to('/nowhere/1.png')
    folder_run.config.data.on_error = 'raise'
    with pytest.raises(UnreadableImage, match=r'link\.png: No such file .*--config\.data\.on_error=skip'):
        run_job(folder_run, 'vqvae')
    assert '1 of ' in capsys.readouterr().out and record.read(folder_run.path('vqvae')) is None
    folder_run.config.data.on_error = 'skip'  # as advised
    run_job(Run(folder_run.config, folder_run.workdir), 'vqvae')
    assert 'vqvae: trained' in capsys.readouterr().out
