"""TensorFlow Datasets prepared as array_record, read without TensorFlow."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.input import write_dataset
from tests.defaults import image_spec
from tests.test_decode import encoded
from vqvae2_jax.data import inspection, tfds_records
from vqvae2_jax.data.decode import UnreadableImage
from vqvae2_jax.data.images import open_images
from vqvae2_jax.data.loader import eval_batches


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
    """A dataset 'tiny' as TFDS prepares it, in ArrayRecord: 10 + 4 images whose red is the position."""
    tfds = pytest.importorskip('tensorflow_datasets')
    root = tmp_path_factory.mktemp('tfds')
    label = tfds.features.ClassLabel(names=['even', 'odd'])
    features = {'image': tfds.features.Image(shape=(None, None, 3)), 'label': label}

    def example(i):
        return encoded(Image.new('RGB', (16, 12), (10 * i, 0, 0))) if i != 3 else b'broken', i % 2

    write_dataset(
        root, 'tiny', features, {'train': [example(i) for i in range(10)], 'test': [example(i) for i in range(4)]}
    )
    return root


def tfds_spec(path, **fields):
    defaults = {'name': 'tiny', 'path': str(path), 'image_size': (6, 8), 'channels': 3, 'num_classes': 2}
    return image_spec(**(defaults | fields))


def test_tfds(tfds_dir):
    source = open_images(tfds_spec(tfds_dir, splits=('train[:50%]', 'train[50%:]', 'test')), 'validation')
    assert len(source) == 5 and source.class_names == ('even', 'odd')
    assert sorted(source.indices) == list(range(5)) and source.indices.tolist() != list(range(5))
    last = source.indices.tolist().index(4)
    for copy in (source, pickle.loads(pickle.dumps(source))):
        example = copy[last]
        np.testing.assert_array_equal(example['image'], np.broadcast_to(np.uint8([90, 0, 0]), (6, 8, 3)))
        assert example['label'] == 1 and example['index'] == last
    gray = open_images(tfds_spec(tfds_dir, channels=1, num_classes=0, held_out=(0.2, 0.2)), 'train')
    assert len(gray) == 6 and gray[0]['image'].shape == (6, 8, 1) and gray[0]['label'] == 0
    with pytest.raises(ValueError, match='tiny/train.* record 3'):
        list(open_images(tfds_spec(tfds_dir, splits=('train',) * 3), 'train'))


def test_the_digest_of_a_tfds_split_is_of_its_dataset_split_and_positions(tfds_dir, tmp_path):
    def digest(split='train', **fields):
        return open_images(tfds_spec(**{'path': tfds_dir, **fields}), split).digest

    halves = {'splits': ('train[:50%]', 'train[50%:]', 'test')}
    cases = [({},), ({}, 'test'), ({'split_seed': 1},), ({'num_classes': 0},), (halves,), (halves, 'validation')]
    found = [digest(*split, **fields) for fields, *split in cases]
    assert len(set(found)) == len(found)
    shutil.copytree(tfds_dir, tmp_path / 'moved')
    assert found[0] == digest(name='tiny:1.0.0', image_size=(4, 4), path=str(tmp_path / 'moved'))


def test_tfds_errors(tfds_dir, tmp_path):
    with pytest.raises(ValueError, match=r"data\.splits.*'dev'.*'test', 'train'"):
        open_images(tfds_spec(tfds_dir, splits=('train', 'dev', 'test')), 'validation')
    with pytest.raises(ValueError, match=r'num_classes=10.*--config\.data\.num_classes=2'):
        open_images(tfds_spec(tfds_dir, num_classes=10), 'train')
    with pytest.raises(FileNotFoundError, match=r"data\.name='tinny' is neither 'fashion' nor 'folder'"):
        open_images(tfds_spec(tfds_dir, name='tinny'), 'train')
    with pytest.raises(FileNotFoundError, match=r"'mnist' is not prepared.*file_format='array_record'") as error:
        open_images(tfds_spec(tmp_path, name='mnist'), 'train')
    without_newline(error)


def without_newline(error):
    assert '\n' not in str(error.value)


def test_damaged_records_are_unreadable_images(tmp_path):
    """Not when the dataset is opened, but when they are read."""
    tfds = pytest.importorskip('tensorflow_datasets')
    features = {'image': tfds.features.Image(shape=(None, None, 3)), 'label': tfds.features.ClassLabel(num_classes=2)}
    png = encoded(Image.new('RGB', (8, 8)))
    write_dataset(tmp_path, 'tiny', features, {'train': [(png, i % 2) for i in range(6)], 'test': [(png, 0)]})
    fields = {'splits': ('train', 'test', 'test'), 'on_error': 'skip'}
    source = open_images(tfds_spec(tmp_path, **fields), 'train')
    dataset = source.dataset
    records = [dataset._records[i] for i in range(6)]
    records[1] = b'\xff\xffgarbage'
    records[2] = example(png, [])
    records[3] = example(png, [2])
    records[4] = example(png, [0, 1])
    dataset._records = records
    assert dataset.labels.tolist() == [0, 0, 0, 0, 0, 1]
    reasons = (
        'the record is damaged',
        r'labels \[\], not one of 0 to 1',
        r'labels \[2\], not one',
        r'labels \[0, 1\], not one',
    )
    for index, reason in enumerate(reasons, start=1):
        with pytest.raises(UnreadableImage, match=f'tiny/train record {index}: .*{reason}') as error:
            dataset.read(index, 3)
        without_newline(error)
    assert sum(batch['mask'].sum() for batch in eval_batches(source, batch_size=3)) == 2
    facts = inspection.inspect({'train': source})
    assert facts['decoded']['train']['unreadable']['images'] == 4 and facts['copies']['within']['train']['images'] == 4


@pytest.mark.parametrize('length, unreadable', [(None, 1), (3000, 6)])
def test_damage_of_the_file_is_that_of_its_records(tmp_path, length, unreadable):
    tfds = pytest.importorskip('tensorflow_datasets')
    features = {'image': tfds.features.Image(shape=(None, None, 3))}
    png = encoded(Image.new('RGB', (8, 8)))
    write_dataset(tmp_path, 'tiny', features, {'train': [(png, 0)] * 6, 'test': [(png, 0)]})
    file = next((tmp_path / 'tiny' / '1.0.0').glob('*train*array_record*'))
    data = bytearray(file.read_bytes())
    data[data.index(b'IDAT')] ^= 1
    file.write_bytes(data[:length])
    source = open_images(tfds_spec(tmp_path, num_classes=0, splits=('train', 'test', 'test')), 'train')
    failed = 0
    for index in range(6):
        try:
            source[index]
        except UnreadableImage as error:
            assert 'the record is damaged: ' in str(error) and '\n' not in str(error)
            failed += 1
    assert failed == unreadable


def example(image, labels):
    from tensorflow_datasets.proto import tf_example_pb2

    record = tf_example_pb2.Example()
    record.features.feature['image'].bytes_list.value.append(image)
    record.features.feature['label'].int64_list.value.extend(labels)
    return record.SerializeToString()


def test_of_many_records_few_are_read_before_a_training(tfds_dir, monkeypatch):
    monkeypatch.setattr(tfds_records, '_MAX_LABELED', 3)
    monkeypatch.setattr(inspection, 'MAX_COMPARED', 3)
    sources = {'train': open_images(tfds_spec(tfds_dir, num_classes=2, on_error='skip'), 'train')}
    monkeypatch.setattr(tfds_records.TfdsDataset, 'content', lambda *_: pytest.fail('read'))
    text = inspection.describe(inspection.inspect(sources))
    assert 'data: 2 classes, whose images are not counted, since they are in more than 50,000 records' in text
    assert 'only 0 of 8 images that may be copies (data.check_all=True: all): that takes long' in text
    monkeypatch.undo()
    assert inspection.inspect(sources, check_all=True)['copies']['whole']
    length = np.mean([len(sources['train'].dataset.content(i)) for i in sources['train'].indices])
    monkeypatch.setattr(inspection, 'MAX_READ', int(5.5 * length))
    assert inspection.inspect(sources)['copies']['compared'] == 5


def other_features(tfds_dir, tmp_path, change, features=None):
    """A copy of the prepared dataset's metadata, changed."""
    home = tmp_path / 'tiny' / '1.0.0'
    home.mkdir(parents=True)
    for file in (tfds_dir / 'tiny' / '1.0.0').iterdir():
        (home / file.name).write_bytes(file.read_bytes())
    info = home / 'dataset_info.json'
    info.write_text(json.dumps(json.loads(info.read_text()) | change))
    if features:
        features.save_config(home)
    return tfds_spec(tmp_path)


def test_tfds_prepared_as_tfrecord(tfds_dir, tmp_path):
    spec = other_features(tfds_dir, tmp_path, {'fileFormat': 'tfrecord'})
    for file in (tmp_path / 'tiny' / '1.0.0').glob('*array_record*'):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"tfrecord.*file_format='array_record'") as error:
        open_images(spec, 'train')
    without_newline(error)


def test_tfds_without_the_needed_features(tfds_dir, tmp_path):
    import tensorflow_datasets as tfds

    text = tfds.features.FeaturesDict({'image': tfds.features.Image(), 'caption': tfds.features.Text()})
    spec = other_features(tfds_dir, tmp_path / 'a', {}, text)
    with pytest.raises(ValueError, match=r"(?s)data\.num_classes=2.*'label'.*caption"):
        open_images(spec, 'train')
    text = tfds.features.FeaturesDict({'picture': tfds.features.Image()})
    with pytest.raises(ValueError, match=r"(?s)'image'.*picture"):
        open_images(other_features(tfds_dir, tmp_path / 'b', {}, text), 'train')


def test_works_without_tensorflow_datasets():
    program = """
import sys
sys.modules["tensorflow_datasets"] = None  # Makes its import fail.
from tests.defaults import image_spec
from vqvae2_jax.data.images import open_images
open_images(image_spec(), "train")[0]
try:
    open_images(image_spec("cifar10"), "train")
except ImportError as error:
    assert "pip install tensorflow-datasets" in str(error)
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, '-c', program], check=True, timeout=60)
