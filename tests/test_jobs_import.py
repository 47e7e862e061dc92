"""--job=import and --job=export: jobs continue from weights and codes of other programs; nothing is overwritten."""

import collections
import pickle
import shutil
import sys
import types

import numpy as np
import pytest
from etils import epath
from PIL import Image

import vqvae2_jax as vq2
from vqvae2_jax import api
from vqvae2_jax.config import base
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.images import SPLITS
from vqvae2_jax.io import record
from vqvae2_jax.io.files import read_json
from vqvae2_jax.io.record import DamagedError, JobError, SettingsChangedError, StaleInputError
from vqvae2_jax.jobs import extract_codes
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.weights import rosinality, run_directory, sources

pytestmark = pytest.mark.slow
CLASSES = 'cat', 'dog'


def make_run(directory, **data):
    """A run on `directory`/images, for a state dict of tests/torch_vqvae.py at its default widths."""
    config = base.get_config()
    config.data.update(name='folder', path=str(directory / 'images'), image_size=(16, 24), channels=3, num_classes=2)
    config.data.update(held_out=(0.2, 0.2), **data)
    config.vqvae.update(downsample_factors=(4, 2), hidden_channels=16, residual_channels=6, num_residual_blocks=2)
    config.vqvae.update(codebook_size=24, codebook_dim=8)
    for prior in config.prior.values():
        prior.update(hidden_channels=8, residual_channels=8, num_residual_blocks=1, num_heads=2)
    config.classifier.update(widths=(8,), blocks=(1,))
    for section in ('prior.top', 'prior.bottom', 'classifier'):
        config[section].training.update(steps=2, batch_size=8, log_every=1, eval_every=2, save_every=2)
    config.codes.update(batch_size=8, shard_size=10)
    config.sample.update(count=8, batch_size=8)
    config.evaluate.batch_size = 8
    validate_config(config)
    return Run(config, epath.Path(directory) / 'run')


def with_source(run, source, workdir=None):
    return Run(run.config, workdir or run.workdir, source=str(source))


@pytest.fixture
def run(tmp_path):
    """A run on 20 images of each of two classes, 10 of each in a folder of their own."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / 'images' / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 255, (4, 6, 3), np.uint8).repeat(4, axis=0).repeat(4, axis=1)
            Image.fromarray(pixels).save(tmp_path / 'images' / name / f'{number:02d}.png')
    return make_run(tmp_path)


@pytest.fixture
def weights(tmp_path):
    """A checkpoint as an .npz file, which needs no PyTorch."""
    return save_weights(tmp_path / 'vqvae.npz')


def save_weights(path, seed=0):
    specification = api.Specification.of(make_run(path.parent).config)
    rng = np.random.default_rng(seed)
    variables = specification.shapes(with_priors=False).variables
    generator = api.Generator(_random(variables, rng), (), specification)
    np.savez(path, **rosinality.to_state_dict(generator))
    return path


def _random(tree, rng):
    if isinstance(tree, dict):
        return {name: _random(value, rng) for name, value in tree.items()}
    fan_in = max(1, np.prod(tree.shape[:-1], dtype=int))
    return (rng.normal(size=tree.shape) / fan_in**0.5).astype(np.float32)


@pytest.mark.system
def test_all_jobs_continue_from_imported_weights(run, weights, capsys):
    run.config.data.num_classes = 0  # without the classifier, which does not read them
    run_job(with_source(run, weights), 'import')
    output = record.read_done(run.path('vqvae'), 'import')
    assert output.job == 'import' and output.inputs.keys() == {'checkpoint'} and len(output.inputs['checkpoint']) == 64
    assert output.results['source'] == 'vqvae.npz' and 'data.name' not in output.settings
    assert not [name for name in output.settings if 'training' in name]
    before = dict(output.files)
    run_job(run, 'pipeline')
    assert record.read_done(run.path('vqvae'), 'import').files == before
    assert capsys.readouterr().out.count('vqvae: done (imported)') == 1
    report = read_json(run.path('report', 'report.json'))
    assert report['protocol']['changes'] == ['vqvae: trained elsewhere, imported from vqvae.npz']
    generator = sources.load(run.workdir)
    assert len(generator.params) == 2
    samples = sample_store.take(run.path('samples', 'default'), np.arange(8))
    decoded = api.decode(generator, (samples['codes_0'], samples['codes_1']))
    assert np.mean(np.asarray(decoded) != samples['arr_0']) < 0.01  # rounding


def test_imported_weights_are_those_of_the_file(run, weights, capsys):
    run_job(with_source(run, weights), 'import')
    found = rosinality.to_state_dict(run_directory.load(run.workdir))
    for name, array in np.load(weights).items():
        np.testing.assert_array_equal(found[name], array)
    run_job(with_source(run, weights), 'import')
    assert 'vqvae: done (imported from vqvae.npz)' in capsys.readouterr().out


def test_imported_weights_are_never_overwritten(run, weights, tmp_path):
    run_job(with_source(run, weights), 'import')
    digest = record.read(run.path('vqvae')).digest
    with pytest.raises(JobError, match='holds imported weights, which --job=vqvae would replace: give another'):
        run_job(run, 'vqvae')
    with pytest.raises(JobError, match='holds imported weights'):
        run_job(Run(run.config, run.workdir, continue_from=0), 'vqvae')
    with pytest.raises(StaleInputError, match=r'(?s)another input checkpoint:.*recorded.*now'):
        run_job(with_source(run, save_weights(tmp_path / 'other.npz', seed=1)), 'import')
    run.config.vqvae.relu_skip = True
    for job in ('import', 'extract_codes'):
        with pytest.raises(SettingsChangedError, match='vqvae.relu_skip: recorded None, now True'):
            run_job(with_source(run, weights) if job == 'import' else run, job)
    assert record.read(run.path('vqvae')).digest == digest


def test_a_network_with_another_skip_connection_is_refused_both_ways(run, weights):
    run.config.vqvae.relu_skip = True
    run_job(with_source(run, weights), 'import')
    run.config.vqvae.relu_skip = False
    with pytest.raises(SettingsChangedError, match='vqvae.relu_skip: recorded True, now None'):
        run_job(run, 'extract_codes')


def test_a_training_is_not_replaced_by_an_import(run, weights):
    def refuse():
        with pytest.raises(JobError, match='holds a training of --job=vqvae: give another --workdir'):
            run_job(with_source(run, weights), 'import')

    record.open_output(run.path('vqvae'), 'vqvae', {'images': 'f' * 64}, {}).start()
    refuse()
    run.path('vqvae', 'checkpoints', '4').mkdir(parents=True)
    run.path('vqvae', 'record.json').unlink()  # a training without its record
    refuse()


def test_an_interrupted_or_damaged_import_is_made_again(run, weights):
    run_job(with_source(run, weights), 'import')
    output = record.read(run.path('vqvae'))
    digest = output.digest
    name = max(output.files, key=lambda name: output.files[name][0])
    run.path('vqvae', name).write_bytes(b'damaged')
    with pytest.raises(DamagedError, match='run your command with --job=import'):
        run_job(run, 'extract_codes')
    run_job(with_source(run, weights), 'import')
    assert record.read(run.path('vqvae')).digest == digest
    output.start()
    with pytest.raises(JobError, match='vqvae is not finished: run your command with --job=import'):
        run_job(run, 'extract_codes')
    run_job(with_source(run, weights), 'import')
    assert record.read(run.path('vqvae')).digest == digest


@pytest.mark.parametrize(
    'job, source, target, message',
    [
        ('import', None, None, '--job=import needs --from=: a model of the package'),
        ('import', 'missing.pt', None, 'there is no file or directory .*missing.pt'),
        ('import', 'images', None, 'images holds no data.mdb'),
        ('import', 'missing', None, "--from: there is no model '.*missing': give"),
        ('import', 'images/cat/00.png', None, '00.png is neither a .safetensors, .pt, .pth, .npz file nor'),
        ('sample', 'vqvae.npz', None, '--from=.*vqvae.npz: import it first, by --job=import'),
        ('pipeline', 'vqvae.npz', None, '--from=.* belongs to --job=import or .*, not to --job=pipeline'),
        ('import', 'vqvae.npz', 'x.pt', '--to=.*x.pt belongs to --job=export, not to --job=import'),
        ('export', None, None, '--job=export needs --to= with a name that ends with .safetensors, .pt, .pth, .npz$'),
        ('export', None, 'x.onnx', 'ends with .safetensors, .pt, .pth, .npz, not .*x.onnx'),
        ('export', None, 'x.safetensors', 'vqvae has nothing: run your command with --job=vqvae'),
    ],
)
def test_mistakes_name_the_flag(run, weights, tmp_path, job, source, target, message):
    source, target = (str(tmp_path / name) if name else None for name in (source, target))
    with pytest.raises(JobError, match=message):
        run_job(Run(run.config, run.workdir, source=source, target=target), job)


def test_another_network_is_refused_with_both_trees(run, weights):
    run.config.vqvae.hidden_channels = 8
    with pytest.raises(JobError, match=r'(?s)--from: \d+ arrays differ.*enc_b.blocks.0.weight +\[8, 3, 4, 4\] +\[4, 3'):
        run_job(with_source(run, weights), 'import')
    assert not run.path('vqvae').exists()


def test_an_export_is_read_by_pytorch_and_by_load(run, weights, tmp_path, capsys):
    torch = pytest.importorskip('torch')
    run_job(with_source(run, weights), 'import')
    for name in ('ours.pt', 'ours.safetensors', 'ours.npz'):
        run_job(Run(run.config, run.workdir, target=str(tmp_path / name)), 'export')
    state = torch.load(tmp_path / 'ours.pt', weights_only=True)
    for name, array in np.load(weights).items():
        np.testing.assert_array_equal(state[name].numpy(), array)
    loaded = sources.load(tmp_path / 'ours.safetensors')
    assert not loaded.params
    np.testing.assert_array_equal(rosinality.to_state_dict(loaded)['upsample_t.weight'], state['upsample_t.weight'])
    vq2.save(loaded, tmp_path / 'again.pt')
    again = torch.load(tmp_path / 'again.pt', weights_only=True)
    assert all(torch.equal(array, again[name]) for name, array in state.items())
    assert {'encode', 'decode'} <= set(np.load(tmp_path / 'ours.npz').files)
    assert 'export: stage 1 in' in capsys.readouterr().out
    run.config.vqvae.relu_skip = True
    with pytest.raises(SettingsChangedError, match='vqvae.relu_skip'):
        run_job(Run(run.config, run.workdir, target=str(tmp_path / 'other.safetensors')), 'export')
    assert not (tmp_path / 'other.safetensors').exists()


def test_an_old_format_brings_the_advice_about_the_skip_connection(run, tmp_path, capsys):
    torch = pytest.importorskip('torch')
    from tests import torch_vqvae

    for is_zip in (True, False):
        path = tmp_path / f'{is_zip}.pt'
        torch.save(torch_vqvae.random_state(), path, _use_new_zipfile_serialization=is_zip)
        run_job(with_source(run, path, epath.Path(tmp_path) / path.stem), 'import')
        assert ('need --config.vqvae.relu_skip=True' in capsys.readouterr().out) is not is_zip


class TestCodes:
    @pytest.fixture
    def write_database(self, run, weights, tmp_path, monkeypatch):
        """Writes the codes of all images as extract_code.py does, in the order of the folder."""
        lmdb = pytest.importorskip('lmdb')
        module = types.ModuleType('dataset')
        module.CodeRow = collections.namedtuple('CodeRow', ['top', 'bottom', 'filename'])
        module.CodeRow.__module__ = 'dataset'
        monkeypatch.setitem(sys.modules, 'dataset', module)
        run_job(with_source(run, weights), 'import')
        images = run.folder(run.config.data.path, 'data.path')
        pixels = np.stack([images[index]['image'] for index in range(len(images))])
        bottom, top = map(np.asarray, api.encode(run_directory.load(run.workdir), pixels))

        def write(change=lambda values: values):
            path = tmp_path / 'codes.lmdb'
            with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
                for index in range(len(images)):
                    filename = '/'.join(images.example_name(index).split('/')[-2:])
                    values = {'top': top[index].astype(int), 'bottom': bottom[index].astype(int), 'filename': filename}
                    row = module.CodeRow(**change(values))
                    transaction.put(str(index).encode(), pickle.dumps(row))
                transaction.put(b'length', str(len(images)).encode())
            return path

        return write

    def test_they_are_those_of_the_extraction(self, run, write_database, tmp_path, capsys):
        source = write_database()
        extracted = Run(run.config, epath.Path(tmp_path) / 'extracted')
        shutil.copytree(run.path('vqvae'), extracted.path('vqvae'))
        run_job(extracted, 'extract_codes')
        run_job(with_source(run, source), 'import')
        for split in SPLITS:
            ours, theirs = extracted.codes(split), run.codes(split)
            assert ours.meta == theirs.meta and ours.meta.class_names == CLASSES and len(ours) > 3
            for a, b in zip(ours, theirs, strict=True):
                for name in a:
                    np.testing.assert_array_equal(a[name], b[name])
            inputs = [record.read(r.path('codes', split)).inputs for r in (extracted, run)]
            assert inputs[1] == inputs[0] | {'lmdb': inputs[1]['lmdb']}

    def test_priors_and_samples_continue_from_them_without_images(self, run, write_database, tmp_path, capsys):
        source = write_database()
        run_job(with_source(run, source), 'import')
        images = run.config.data.path
        run.config.data.path = '/nowhere'
        for job in ('extract_codes', 'prior', 'sample'):
            run_job(run, job)
        assert 'codes: done (imported: train 24, validation 8, test 8)' in capsys.readouterr().out
        run.config.data.path = images  # the report accepts the folder with these files, and no other
        for split in SPLITS:
            assert extract_codes.inputs(run, split) == record.read(run.path('codes', split)).inputs
        (tmp_path / 'images' / 'cat' / '00.png').unlink()
        other = Run(run.config, run.workdir)
        assert extract_codes.inputs(other, 'train') != record.read(run.path('codes', 'train')).inputs

    def test_an_interrupted_import_continues_and_is_not_mixed_with_an_extraction(self, run, write_database):
        source = write_database()
        run_job(with_source(run, source), 'import')
        digest = record.read(run.path('codes', 'test')).digest
        run.path('codes', 'test').rmtree()
        with pytest.raises(JobError, match='the import of codes to .* is not finished: the same command with --job=im'):
            run_job(run, 'extract_codes')
        kept = run.path('codes', 'train', 'shard-00000-of-00003.array_record').stat().mtime
        run_job(with_source(run, source), 'import')
        assert record.read(run.path('codes', 'test')).digest == digest
        assert run.path('codes', 'train', 'shard-00000-of-00003.array_record').stat().mtime == kept

    @pytest.mark.parametrize(
        'change, message',
        [
            (lambda row: row | {'top': row['top'] + 24}, r'codes_1 run from .* but its codebook has 24 entries'),
            (
                lambda row: row | {'top': row['top'][:1]},
                r'row \d+ \(.*png\) has maps of \(4, 6\) and \(1, 3\), but .* \(2',
            ),
            (
                lambda row: row | {'filename': 'x/' + row['filename'][4:]},
                'lie in 1 directories: .x.. Set --config.data.nu',
            ),
        ],
    )
    def test_codes_that_do_not_fit_are_refused(self, run, write_database, change, message):
        source = write_database(change)
        with pytest.raises(JobError, match=message):
            run_job(with_source(run, source), 'import')

    def test_they_need_their_stage_1_and_one_set(self, run, write_database, tmp_path):
        source = write_database()
        with pytest.raises(JobError, match='codes need the stage 1 that made them: import it first'):
            run_job(with_source(run, source, epath.Path(tmp_path) / 'empty'), 'import')
        run.config.data.splits = ('train', 'validation', 'test')
        with pytest.raises(JobError, match='data.splits is .* but a database of codes has one set'):
            run_job(with_source(run, source), 'import')

    def test_a_hostile_row_is_refused(self, run, write_database, tmp_path):
        class Call:
            def __reduce__(self):
                return eval, (f'open({str(tmp_path / "made")!r}, "w")',)

        source = write_database(lambda row: row | {'filename': Call()})
        with pytest.raises(JobError, match=r'row 0 of .*codes.lmdb cannot be read: it names builtins.eval'):
            run_job(with_source(run, source), 'import')
        assert not (tmp_path / 'made').exists() and not run.path('codes').exists()
