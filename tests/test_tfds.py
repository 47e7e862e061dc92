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
from vqvae2_jax.data.images import open_images


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
    with pytest.raises(FileNotFoundError, match=r"(?s)'mnist' is not prepared.*file_format='array_record'"):
        open_images(tfds_spec(tmp_path, name='mnist'), 'train')


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
    with pytest.raises(FileNotFoundError, match=r"(?s)tfrecord.*file_format='array_record'"):
        open_images(spec, 'train')


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
