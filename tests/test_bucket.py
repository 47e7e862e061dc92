"""A workdir or data on a bucket work like local ones."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

import vqvae2_jax
from benchmarks.input import packed
from tests import fake_gcs
from tests.defaults import image_spec
from tests.fake_gcs import serve
from tests.test_sampling_program import make_generator
from tests.test_train import toy_task, train_toy
from vqvae2_jax import main
from vqvae2_jax.config import base, build
from vqvae2_jax.config.fields import ConfigError
from vqvae2_jax.data import codes, own_codes, sample_store
from vqvae2_jax.data.images import open_images
from vqvae2_jax.io import files, logging, record, remote
from vqvae2_jax.jobs.inpaint import read_mask
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import JobError, Run
from vqvae2_jax.training import recovery
from vqvae2_jax.training.checkpoint import BestCheckpoint, Checkpoints

pytestmark = pytest.mark.skipif(not importlib.util.find_spec('gcsfs'), reason='gcsfs is not installed')


@pytest.fixture(scope='module')
def bucket():
    """A bucket of its own for this file: clients read where it is once a process."""
    with serve() as server:
        yield server


@pytest.mark.system
def test_a_whole_run_on_a_bucket_equals_a_local_one(bucket, finished, config, capsys):
    run = Run(config, epath.Path('gs://bucket/runs/tiny'))
    config.classifier.training.save_every = 2  # of four checkpoints two are removed
    run_job(run, 'pipeline')
    checkpoints = epath.Path('gs://bucket/runs/tiny/classifier/checkpoints')
    assert sorted(path.name for path in checkpoints.iterdir() if path.name.isdecimal()) == ['6', '8']
    ours, theirs = (sample_store.take(r.path('samples', 'default'), np.arange(20)) for r in (run, finished))
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
    for name in ('vqvae', 'prior_top', 'prior_bottom', 'classifier'):
        lines = [logging.read_metrics(r.path(name)) for r in (run, finished)]
        reproducible = [
            [{k: v for k, v in line.items() if k not in logging.RUNTIME_FIELDS} for line in log] for log in lines
        ]
        assert reproducible[0] == reproducible[1]
    report = files.read_json(run.path('report', 'report.json'))
    assert report['likelihood'] == files.read_json(finished.path('report', 'report.json'))['likelihood']
    left = [
        name for name in bucket.objects if not name.startswith('runs/tiny/') or 'part' in name or 'unfinished' in name
    ]
    assert not left
    capsys.readouterr()
    before = {name: generation for name, (_, generation) in bucket.objects.items() if 'weights' in name}
    del bucket.objects['runs/tiny/vqvae/record.json']  # checkpoints have copies
    for job in ('vqvae', 'extract_codes', 'prior', 'classifier', 'sample', 'reject', 'cas'):
        run_job(run, job)  # stage 1 goes on from its last checkpoint; everything is found done
    assert 'vqvae: continuing from step 8' in capsys.readouterr().out
    assert before == {name: generation for name, (_, generation) in bucket.objects.items() if 'weights' in name}


def test_codes_on_a_bucket(bucket, tmp_path):
    rng, path = np.random.default_rng(0), codes.shard_path('gs://bucket/codes', 0, 1)
    batch = {'codes_0': rng.integers(0, 9, (5, 2, 2)), 'label': np.arange(5), 'index': np.arange(5)}
    with pytest.raises(ValueError, match='codebook has 9'):
        codes.write_shard(path, [batch, batch | {'codes_0': batch['codes_0'] + 9}], (9,))
    assert not any(name.startswith('codes/') for name in bucket.objects)  # complete or absent
    assert codes.write_shard(path, [batch], (9,)) == 5 and path.exists()
    meta = dict(num_classes=5, class_names=(), split='train', shards=1)
    meta = codes.CodesMeta(shapes=((2, 2),), codebook_sizes=(9,), count=5, **meta)
    for vqvae in 'ab':  # the second store in the same place, of other codes, is not taken for the first
        output = record.open_output('gs://bucket/codes', codes.JOB, {'vqvae': vqvae}, {}, replace=True)
        output.add_files(path.name)
        output.finish(dataclasses.asdict(meta))
        np.testing.assert_array_equal(codes.CodeSource('gs://bucket/codes')[3]['codes_0'], batch['codes_0'][3])
        batch['codes_0'] = (batch['codes_0'] + 1) % 9
        codes.write_shard(path, [batch], (9,))


def test_a_log_on_a_bucket(bucket, monkeypatch):
    def log(start):
        return logging.MetricsLogger('gs://bucket/log', name='x', total_steps=9, examples_per_step=1, start_step=start)

    first = log(0)
    first.write(1, 'train', {'loss': 1.0})
    assert 'log/metrics.jsonl' not in bucket.objects
    first.flush()
    first.write(2, 'train', {'loss': 2.0})
    assert [line['step'] for line in logging.read_metrics('gs://bucket/log')] == [1]
    monkeypatch.setattr(logging, '_UPLOAD_EVERY', -1)
    first.write(3, 'train', {'loss': 3.0})
    assert [line['step'] for line in logging.read_metrics('gs://bucket/log')] == [1, 2, 3]
    second = log(2)
    second.write(3, 'train', {'loss': 4.0})
    second.close()
    assert [line['train/loss'] for line in logging.read_metrics('gs://bucket/log')] == [1, 2, 4]


def test_damaged_files_take_one_listing_and_no_download(bucket, monkeypatch):
    directory, ranges = epath.Path('gs://bucket/set'), [(start, start + 2) for start in range(0, 20, 2)]
    output = record.Record(directory, 'sample', {}, {})
    assert sample_store.missing_shards(output, ranges) == ranges and files.list_names(directory) == set()
    for r in ranges[::2]:
        sample_store.write_npz(sample_store.shard_path(directory, *r), {'x': np.arange(2)})
        output.add_files(sample_store.shard_path(directory, *r).name)
    assert sample_store.missing_shards(output, ranges) == ranges[1::2]
    assert all(entry[1].startswith('md5:') for entry in output.files.values())
    names = sorted(output.files)
    data, generation = bucket.objects[f'set/{names[1]}']
    bucket.objects[f'set/{names[1]}'] = data[:-1] + bytes([data[-1] ^ 1]), generation
    bucket.objects[f'set/{names[2]}'] = data[:-1], generation
    del bucket.objects[f'set/{names[3]}']
    answered, get = [], fake_gcs._Handler._get
    monkeypatch.setattr(fake_gcs._Handler, '_get', lambda handler: answered.append(handler.path) or get(handler))
    damaged = output.find_damaged()
    assert list(damaged) == names[1:4] and len(answered) == 1
    reasons = 'its content has changed', f'it has {len(data) - 1} bytes instead of {len(data)}', 'it is missing'
    assert tuple(damaged.values()) == reasons


def test_files_copied_between_a_disk_and_a_bucket_keep_their_checksums(bucket, tmp_path):
    there, here = epath.Path('gs://bucket/set'), epath.Path(tmp_path)
    for directory in (there, here):
        files.write_bytes(directory / 'a.npz', b'one')
    entries = {directory: record.Record(directory, '', {}, {}) for directory in (there, here)}
    for output in entries.values():
        output.add_files('a.npz')
    assert entries[there].files != entries[here].files
    for directory, other in ((there, here), (here, there)):
        output = record.Record(directory, '', {}, {}, files=entries[other].files)
        assert output.find_damaged() == {}
        (directory / 'a.npz').write_bytes(b'two')
        assert output.find_damaged() == {'a.npz': 'its content has changed'}


def test_images_on_a_bucket(bucket):
    pixels = np.arange(4 * 6 * 6 * 3, dtype=np.uint8).reshape(4, 6, 6, 3)
    for i, name in enumerate(['cat/one', 'cat/two', 'dog/deep/three', 'dog/four']):
        with epath.Path(f'gs://bucket/images/{name}.png').open('wb') as file:
            Image.fromarray(pixels[i]).save(file, 'PNG')
    sample_store.write_npz(epath.Path('gs://bucket/arrays/a.npz'), {'arr_0': pixels, 'label': np.array([0, 0, 1, 1])})
    sizes = dict(image_size=(6, 6), num_classes=2, held_out=(0.5, 0.0), channels=3)
    for name, path in (('folder', 'images'), ('npz', 'arrays/a.npz'), ('npz', 'arrays')):
        source = open_images(image_spec(name, f'gs://bucket/{path}', **sizes), 'train')
        found = {source[i]['image'].tobytes(): int(source[i]['label']) for i in range(len(source))}
        assert found and found.items() <= {p.tobytes(): i // 2 for i, p in enumerate(pixels)}.items()
    folder = open_images(image_spec('folder', 'gs://bucket/images', **sizes), 'train')
    assert folder.example_name(0).startswith('gs://bucket/images/')  # not the copy
    with pytest.raises(FileNotFoundError, match='data.path: there is nothing at gs://bucket/none'):
        open_images(image_spec('folder', 'gs://bucket/none', **sizes), 'train')


def test_codes_of_another_tokenizer_on_a_bucket(bucket, tmp_path):
    maps, labels = np.arange(20 * 6).reshape(20, 2, 3) % 7, np.arange(20) % 2
    vqvae2_jax.write_codes('gs://bucket/own/store', [maps], labels, codebook_sizes=[7], num_classes=2)
    arrays, description = {'codes_0': maps, 'label': labels}, epath.Path('gs://bucket/own/store/codes.json').read_text()
    epath.Path('gs://bucket/own/arrays/codes.json').write_text(description)
    sample_store.write_npz(epath.Path('gs://bucket/own/arrays/train.npz'), arrays)
    for name, values in arrays.items():
        np.save(tmp_path / 'a.npy', values)
        epath.Path(f'gs://bucket/own/arrays/test/{name}.npy').write_bytes((tmp_path / 'a.npy').read_bytes())
    for directory, split, count in (
        ('store', 'train', 16),
        ('store', 'test', 2),
        ('arrays', 'train', 20),
        ('arrays', 'test', 20),
    ):
        config = base.get_config(codes=f'gs://bucket/own/{directory}')
        source = own_codes.open_split(config.codes.path, split, build.code_spec(config))
        assert len(source) == count
        for i in range(count):
            example = source[i]
            np.testing.assert_array_equal(example['codes_0'], maps[example['index']])
            assert example['label'] == labels[example['index']]
    with pytest.raises(ConfigError, match='codes.path: gs://bucket/own/none/codes.json does not exist'):
        base.get_config(codes='gs://bucket/own/none')


def test_no_character_of_a_name_on_a_bucket_is_special(bucket):
    names = ('odd/a[b]c*?/x#1.npz', 'odd/a[b]c*?/::y.npz', 'odd/abc!/z.npz')
    for number, name in enumerate(names):
        sample_store.write_npz(epath.Path(f'gs://bucket/{name}'), {'arr_0': np.full((1, 6, 6, 3), number, np.uint8)})
    fields = dict(image_size=(6, 6), channels=3, held_out=(0.0, 0.0))
    for path, found in ((names[0], {0}), ('odd/a[b]c*?', {0, 1})):
        source = open_images(image_spec('npz', f'gs://bucket/{path}', **fields), 'train')
        assert {int(example['image'][0, 0, 0]) for example in source} == found
    with pytest.raises(FileNotFoundError, match='there is nothing at'):
        remote.local_copy('gs://bucket/odd/a*')
    copies = remote.expand(remote.local_copy('gs://bucket/odd/abc!/*.npz', pattern=True))
    assert [copy.rpartition('/')[2] for copy in copies] == ['z.npz']


def test_weights_that_were_replaced_on_a_bucket_are_read_again(bucket):
    path, generator = 'gs://bucket/weights/model.safetensors', make_generator()
    for factor in (1, 2):
        params = jax.tree.map(lambda x, factor=factor: factor * x, generator.params)
        vqvae2_jax.save(generator.replace(params=params), path)
        expected = np.asarray(jax.tree.leaves(params)[0])
        np.testing.assert_array_equal(jax.tree.leaves(vqvae2_jax.load(path).params)[0], expected)


def test_names_on_a_bucket_do_not_lead_out_of_the_copy(bucket):
    bucket.objects['evil/../../outside.npz'] = b'', 1
    with pytest.raises(FileNotFoundError, match=r'data\.path: gs://bucket/evil/\.\./\.\./outside\.npz has .*rename it'):
        open_images(image_spec('npz', 'gs://bucket/evil'), 'train')


def test_a_mask_on_a_bucket(bucket):
    corner = np.zeros((4, 4), np.uint8)
    corner[:2, :2] = 255
    with epath.Path('gs://bucket/mask.png').open('wb') as file:
        Image.fromarray(corner).save(file, 'PNG')
    np.testing.assert_array_equal(read_mask('gs://bucket/mask.png', (4, 4)), corner > 0)


def test_a_prepared_dataset_on_a_bucket(bucket, tmp_path):
    pytest.importorskip('tensorflow_datasets')
    for i in range(4):
        Image.new('RGB', (6, 6), (i, 0, 0)).save(tmp_path / f'{i}.png')
    packed(str(tmp_path), tmp_path / 'tfds')
    for file in (tmp_path / 'tfds').rglob('*.*'):
        if file.is_file():
            remote.upload(str(file), epath.Path('gs://bucket/tfds') / file.relative_to(tmp_path / 'tfds'))
    spec = image_spec('packed', 'gs://bucket/tfds', image_size=(6, 6), channels=3, num_classes=0, held_out=(0.25, 0.0))
    sources = [open_images(spec, split) for split in ('train', 'validation')]
    assert sorted(int(s[i]['image'][0, 0, 0]) for s in sources for i in range(len(s))) == [0, 1, 2, 3]


def test_what_a_bucket_cannot_do(bucket, config, monkeypatch):
    monkeypatch.setattr(main, '_WORKDIR', type('Flag', (), {'value': 'gs://bucket/run'}))
    assert main._workdir(config) == epath.Path('gs://bucket/run')
    config.data.on_error = 'skip'
    with pytest.raises(JobError, match='data.on_error=skip .*gs://bucket/run'):
        main._workdir(config)
    for path in ('nowhere://x', 'gcs://bucket/run', 'file:///run'):  # which epath takes for local names
        with pytest.raises(ValueError, match=f'{path}: there are local folders and'):
            remote.check(path)
    with pytest.raises(ValueError, match='gs://another/run: there is no such bucket'):
        remote.check('gs://another/run')


def test_a_damaged_checkpoint_on_a_bucket_is_marked_and_saved_again(bucket, capsys):
    directory, task = epath.Path('gs://bucket/toy'), toy_task(distance=lambda w: abs(w - 7))
    train_toy(directory, task)
    before = BestCheckpoint(directory).load()['params']['w']
    names = [name for name in bucket.objects if name.startswith('toy/checkpoints/8/state/')]
    largest = max(names, key=lambda name: len(bucket.objects[name][0]))
    data, generation = bucket.objects[largest]
    bucket.objects[largest] = data[:-1] + bytes([data[-1] ^ 1]), generation
    recovery.recover(directory, 'toy')
    assert 'training continues from step 6: 2 steps are repeated' in capsys.readouterr().out
    assert 'toy/checkpoints/8.damaged' in bucket.objects and largest in bucket.objects
    train_toy(directory, task)
    assert 'toy: continuing from step 6' in capsys.readouterr().out
    assert 'toy/checkpoints/8.damaged' not in bucket.objects and Checkpoints(directory).latest_step() == 8
    np.testing.assert_array_equal(BestCheckpoint(directory).load()['params']['w'], before)
    recovery.recover(directory, 'toy')
    assert not capsys.readouterr().out
