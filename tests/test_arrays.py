"""Images in .npz files: their content, splits and fingerprints, and clear refusals."""

import pickle

import numpy as np
import pytest

from tests.defaults import image_spec
from vqvae2_jax.data.images import SPLITS, open_all, open_images


def spec(path, **fields):
    return image_spec('npz', path, **{'image_size': (8, 8), 'channels': 3, **fields})


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 3), np.uint8)
    np.savez(tmp_path / 'images.npz', arr_0=images, label=np.arange(40) % 2, class_names=['cat', 'dog'])
    return tmp_path / 'images.npz'


def test_images_and_labels_are_those_of_the_file(file):
    arrays = np.load(file)
    seen = []
    for split in SPLITS:
        source = pickle.loads(pickle.dumps(open_images(spec(file, num_classes=2), split)))
        assert source.class_names == ('cat', 'dog')
        labels = [example['label'] for example in source]
        assert labels.count(0) == labels.count(1)  # a stratified cut
        for example, position in zip(source, source.indices, strict=True):
            np.testing.assert_array_equal(example['image'], arrays['arr_0'][position])
            assert example['label'] == arrays['label'][position]
        seen += list(source.indices)
    assert sorted(seen) == list(range(40))


@pytest.mark.parametrize('shape', [(40, 8, 8), (40, 8, 8, 1)])
def test_grey_images_in_either_shape_and_without_labels(tmp_path, shape):
    images = np.arange(40 * 64, dtype=np.uint64).astype(np.uint8).reshape(shape)
    np.savez(tmp_path / 'grey.npz', arr_0=images)
    source = open_images(spec(tmp_path / 'grey.npz', channels=1), 'train')
    assert source.class_names == () and source[0]['label'] == 0
    np.testing.assert_array_equal(source[0]['image'][..., 0], images.reshape(40, 8, 8)[source.indices[0]])


def test_files_of_a_folder_as_splits_and_all_images_of_one(file, tmp_path):
    np.savez(tmp_path / 'other.npz', arr_0=np.zeros((3, 8, 8, 3), np.uint8), label=[1, 1, 0])
    named = spec(tmp_path, splits=('images.npz', 'other.npz', 'other.npz'), num_classes=2)
    assert [len(open_images(named, split)) for split in SPLITS] == [40, 3, 3]
    everything = open_all(str(file), spec(file), 'likelihood.path')
    np.testing.assert_array_equal([e['image'] for e in everything], np.load(file)['arr_0'])


def test_files_of_a_folder_are_one_pool_and_a_compressed_file_is_as_good(file, tmp_path):
    arrays, parts = dict(np.load(file)), tmp_path / 'parts'
    parts.mkdir()
    np.savez_compressed(parts / 'part1.npz', **{k: v[:25] for k, v in arrays.items() if k != 'class_names'})
    np.savez(parts / 'part2.npz', **{k: v[25:] for k, v in arrays.items() if k != 'class_names'})
    together = open_images(spec(parts, num_classes=2), 'train')
    assert len(together.dataset) == 40
    for example, position in zip(together, together.indices, strict=True):
        np.testing.assert_array_equal(example['image'], arrays['arr_0'][position])
        assert example['label'] == arrays['label'][position]
    assert together.dataset.example_name(24).endswith('part1.npz[24]') and together.dataset.example_name(25).endswith(
        'part2.npz[0]'
    )
    np.savez(parts / 'part3.npz', arr_0=np.zeros((2, 4, 4, 3), np.uint8), label=[0, 1])
    with pytest.raises(ValueError, match='differ in the shape of their images'):
        open_images(spec(parts, num_classes=2), 'train')


def test_a_file_that_was_replaced_is_read_anew(file):
    before = open_images(spec(file), 'train')[0]['image']
    arrays = dict(np.load(file))
    np.savez(file, **{**arrays, 'arr_0': 255 - arrays['arr_0']})
    np.testing.assert_array_equal(open_images(spec(file), 'train')[0]['image'], 255 - before)


def test_the_digest_is_of_pixels_and_labels_wherever_the_file_lies(file, tmp_path):
    arrays = dict(np.load(file))

    def digest(**changes):
        np.savez(tmp_path / 'copy.npz', **{**arrays, **changes})
        return open_images(spec(tmp_path / 'copy.npz', num_classes=2), 'train').digest

    assert digest() == open_images(spec(file, num_classes=2), 'train').digest
    other = arrays['arr_0'].copy()
    other[0, 0, 0, 0] ^= 1
    assert len({digest(), digest(arr_0=other), digest(label=1 - arrays['label'])}) == 3


@pytest.mark.parametrize(
    'arrays, fields, message',
    [
        ({'images': np.zeros((4, 8, 8, 3), np.uint8)}, {}, r'data\.path: .*no \.npz file with images in arr_0'),
        ({'arr_0': np.zeros((4, 8, 8, 3))}, {}, r'arr_0 of .* is float64 \[4, 8, 8, 3\]; images are uint8'),
        ({'arr_0': np.zeros((4, 8, 8, 2), np.uint8)}, {}, r'is uint8 \[4, 8, 8, 2\]'),
        ({'arr_0': np.zeros((4, 8, 8), np.uint8)}, {'num_classes': 2}, r'has no `label`.*num_classes=0'),
        ({'arr_0': np.zeros((4, 8, 8), np.uint8), 'label': [0, 1]}, {'num_classes': 2}, r'int64 \[2\], not int \[4\]'),
        ({'arr_0': np.zeros((4, 8, 8), np.uint8), 'label': [0, 1, 2, 0]}, {'num_classes': 2}, r'labels from 0 to 2'),
        (
            {'arr_0': np.zeros((2, 8, 8), np.uint8), 'label': [0, 1], 'class_names': ['a', 'b', 'c']},
            {'num_classes': 2},
            r'names 3 classes: set --config\.data\.num_classes=3',
        ),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, arrays, fields, message):
    np.savez(tmp_path / 'file.npz', **arrays)
    with pytest.raises(ValueError, match=message):
        open_images(spec(tmp_path / 'file.npz', **fields), 'train')


def test_what_is_no_npz_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'data\.path: there is no file .*missing'):
        open_images(spec(tmp_path / 'missing.npz'), 'train')
    (tmp_path / 'broken.npz').write_bytes(b'not a zip file')
    with pytest.raises(ValueError, match=r'data\.path: .*broken\.npz'):
        open_images(spec(tmp_path / 'broken.npz'), 'train')
