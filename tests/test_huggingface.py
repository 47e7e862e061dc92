"""Datasets of Hugging Face, on a disk, on a store and on a stand-in for the hub."""

import dataclasses
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

from tests import fake_hub
from tests.defaults import image_spec
from tests.test_decode import encoded
from tests.test_remote_data import open_store
from vqvae2_jax.data import fashion, inspection
from vqvae2_jax.data.decode import UnreadableImage
from vqvae2_jax.data.images import SPLITS, open_images
from vqvae2_jax.data.loader import eval_batches, train_batches

datasets = pytest.importorskip('datasets')
NAMES = ['coat', 'bag']


def real_image(number):
    """A Fashion-MNIST image of class 4 or 8, as a PNG file; `number` decides which."""
    return encoded(fashion.FashionDataset(0).read(1000 * (4 if number % 2 == 0 else 8) + number, 1)[0])


def make(images, labels=None, image='image', label='label', **columns):
    features = {image: datasets.Image()} | {name: datasets.Value('int64') for name in columns}
    rows = {image: [each and {'bytes': each, 'path': None} for each in images]} | columns
    if labels is not None:
        features[label], rows[label] = datasets.ClassLabel(names=NAMES), labels
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A folder of splits: 40 training and 10 test images, in several Arrow files."""
    images = [real_image(i) for i in range(50)]
    labels = [i % 2 for i in range(50)]
    path = tmp_path_factory.mktemp('saved') / 'clothes'
    splits = {'train': make(images[:40], labels[:40], other=range(40)), 'test': make(images[40:], labels[40:])}
    datasets.DatasetDict({'train': splits['train'].remove_columns('other'), 'test': splits['test']}).save_to_disk(
        path, num_shards={'train': 3, 'test': 1}
    )
    return path


def spec(path, **fields):
    defaults = {'image_size': (28, 28), 'channels': 1, 'num_classes': 2}
    return image_spec('huggingface', str(path), **defaults | fields)


def pixels(number):
    return np.asarray(fashion.FashionDataset(0).read(1000 * (4 if number % 2 == 0 else 8) + number, 1)[0])


# --- on a disk --------------------------------------------------------------------------------------------------------


def test_a_saved_dataset(saved):
    source = open_images(spec(saved, splits=('train', 'test', 'test')), 'train')
    assert len(source) == 40 and source.class_names == ('coat', 'bag') and not source.is_remote
    assert source.indices.tolist() != list(range(40))
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for position in (0, 17, 39):
            number, example = int(source.indices[position]), copy[position]
            np.testing.assert_array_equal(example['image'][..., 0], pixels(number))
            assert example['label'] == number % 2 and example['index'] == position
    assert len(pickle.dumps(source)) < 10_000  # file names, not images
    color = open_images(spec(saved, channels=3, num_classes=0, image_size=(14, 14)), 'train')
    assert color[0]['image'].shape == (14, 14, 3) and color[0]['label'] == 0 and color.class_names == ()
    facts = inspection.inspect({'train': source})
    assert facts['classes'][1]['images'] == {'train': 20} and facts['copies']['whole']


def test_splits_of_a_saved_dataset(saved):
    slices = ('train[:75%]', 'train[75%:]', 'test[2:4]+train[:1]')
    found = [open_images(spec(saved, splits=slices), split) for split in SPLITS]
    assert [len(source) for source in found] == [30, 10, 3]
    assert sorted(int(source[i]['image'].sum()) for source in found[2:] for i in range(3)) == sorted(
        int(pixels(number).sum()) for number in (42, 43, 0)
    )
    held_out = [open_images(spec(saved, held_out=(0.2, 0.1)), split) for split in SPLITS]  # of 'train'
    assert [len(source) for source in held_out] == [28, 8, 4]
    assert [np.bincount(source.labels).tolist() for source in held_out] == [[14, 14], [4, 4], [2, 2]]
    for wrong in ('dev', 'train[:x%]', 'train[5'):
        with pytest.raises(ValueError, match=r"data\.splits: cannot read '.*' of '.*clothes', which has {'train': 40"):
            open_images(spec(saved, splits=(wrong, 'test', 'test')), 'train')


def test_a_single_dataset_is_one_set(tmp_path):
    make([real_image(i) for i in range(10)], [i % 2 for i in range(10)]).save_to_disk(tmp_path / 'single')
    assert len(open_images(spec(tmp_path / 'single', held_out=(0.2, 0.2)), 'train')) == 6
    assert len(open_images(spec(tmp_path / 'single', splits=('train[:6]', 'train[6:]', 'train[6:]')), 'test')) == 4
    datasets.DatasetDict({'all': make([real_image(0)])}).save_to_disk(tmp_path / 'dict')
    assert len(open_images(spec(tmp_path / 'dict', num_classes=0, held_out=(0.0, 0.0)), 'train')) == 1


def test_the_digest_is_of_the_records(saved, tmp_path):
    images, labels = [real_image(i) for i in range(12)], [i % 2 for i in range(12)]

    def digest(images, labels, **fields):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        make(images, labels).save_to_disk(path)
        return open_images(spec(path, held_out=(0.0, 0.0), **fields), 'train').digest

    first = digest(images, labels)
    assert first == digest(images, labels) == digest(images, labels, image_size=(4, 4))
    flipped = images[5][:-20] + bytes([images[5][-20] ^ 1]) + images[5][-19:]
    others = [(images[::-1], labels), (images[:-1], labels[:-1]), (images, [0, *labels[:-1]])]
    others.append(([*images[:5], flipped, *images[6:]], labels))
    found = {digest(*other) for other in others} | {digest(images, labels, num_classes=0), first}
    assert len(found) == 6


def test_rows_without_a_readable_image(tmp_path):
    images = [real_image(i) for i in range(6)]
    images[1], images[2] = b'broken', None
    rows = make(images, [0, 1, 0, -1, None, 1])
    rows.save_to_disk(tmp_path / 'rows')
    fields = {'splits': ('train',) * 3, 'on_error': 'skip'}
    source = open_images(spec(tmp_path / 'rows', **fields), 'train')
    reasons = {1: 'not an image in a known format', 2: 'the row has no image', 3: 'label -1, not one of 0 to 1'}
    reasons[4] = 'label None, not one'
    for index, reason in reasons.items():
        with pytest.raises(UnreadableImage, match=rf'rows/train row {index}: .*{reason}'):
            source.dataset.read(index, 1)
    assert source.dataset.labels.tolist() == [0, 1, 0, 0, 0, 1]
    assert sum(batch['mask'].sum() for batch in eval_batches(source, batch_size=4)) == 2
    assert source.dataset.content_length(2) == 0 and source.digest
    raising = open_images(dataclasses.replace(spec(tmp_path / 'rows'), splits=('train',) * 3), 'train')
    with pytest.raises(UnreadableImage):
        list(eval_batches(raising, batch_size=4))


def test_columns_are_found_by_type(tmp_path):
    images = [real_image(i) for i in range(4)]
    make(images, [0, 1, 0, 1], image='img', label='kind').save_to_disk(tmp_path / 'named')
    assert open_images(spec(tmp_path / 'named'), 'train')[0]['label'] in (0, 1)
    two = make(images, [0, 1, 0, 1], image='a', label='kind')
    two = two.add_column('b', [{'bytes': each, 'path': None} for each in images]).cast_column('b', datasets.Image())
    two.save_to_disk(tmp_path / 'two')
    with pytest.raises(ValueError, match=r"data.path: '.*two' has several columns of type Image, 'a', 'b': rename the"):
        open_images(spec(tmp_path / 'two'), 'train')
    make(images, number=[0, 1, 0, 1]).save_to_disk(tmp_path / 'numbers')
    with pytest.raises(
        ValueError, match=r"num_classes=2, but .* has no column of type ClassLabel, but 'image', 'number"
    ):
        open_images(spec(tmp_path / 'numbers'), 'train')
    assert len(open_images(spec(tmp_path / 'numbers', num_classes=0, held_out=(0.0, 0.0)), 'train')) == 4
    with pytest.raises(ValueError, match=r'num_classes=10, but .* has 2 classes: set --config\.data\.num_classes=2'):
        open_images(spec(tmp_path / 'named', num_classes=10), 'train')
    datasets.Dataset.from_dict({'x': [1]}).save_to_disk(tmp_path / 'none')
    with pytest.raises(ValueError, match="has no column of type Image, but 'x': make one by cast_column"):
        open_images(spec(tmp_path / 'none'), 'train')


def test_images_that_are_files_of_their_own(tmp_path):
    """As in datasets that were made from a folder in this process."""
    for number in range(4):
        (tmp_path / f'{number}.png').write_bytes(real_image(number))
    rows = datasets.Dataset.from_dict({'image': [str(tmp_path / f'{number}.png') for number in range(4)]})
    rows.cast_column('image', datasets.Image()).save_to_disk(tmp_path / 'files')
    source = open_images(spec(tmp_path / 'files', num_classes=0, splits=('train',) * 3), 'train')
    lengths = [source.dataset.content_length(i) for i in range(4)]
    assert lengths == [len(real_image(i)) for i in range(4)]
    np.testing.assert_array_equal(source[0]['image'][..., 0], pixels(int(source.indices[0])))


@pytest.mark.slow
def test_worker_processes_read_a_saved_dataset(saved):
    source = open_images(spec(saved), 'train')
    here, there = (train_batches(source, batch_size=8, seed=0, workers=workers) for workers in (0, 2))
    for _ in range(4):
        np.testing.assert_array_equal(next(here)['image'], next(there)['image'])
    here.close()
    there.close()


def test_paths_that_are_no_dataset(tmp_path):
    (tmp_path / 'folder').mkdir()
    with pytest.raises(FileNotFoundError, match=r'was not written by `save_to_disk`.*--config\.data\.name=folder'):
        open_images(spec(tmp_path / 'folder'), 'train')
    for path in (tmp_path / 'none', './none', 'a/b/c', 'a b'):
        with pytest.raises(
            FileNotFoundError, match=r'there is no folder .*, and no dataset of the hub has such a name'
        ):
            open_images(spec(path), 'train')
    with pytest.raises(ValueError, match="data.path is ''; it must be the path of the images, as data.name is 'hugg"):
        open_images(spec(''), 'train')


# --- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('scheme', ['gs', 's3'])
def test_a_saved_dataset_on_a_store(saved, tmp_path, scheme):
    with open_store(scheme, tmp_path) as store:
        files = {
            f'{scheme}/{file.relative_to(saved)}': file.read_bytes() for file in saved.rglob('*') if file.is_file()
        }
        store.put(files)
        here, there = (open_images(spec(path), 'train') for path in (saved, f'{store.url}/{scheme}'))
        assert here.digest == there.digest and here[0]['image'].tobytes() == there[0]['image'].tobytes()


@pytest.mark.slow
def test_a_dataset_of_the_hub(saved, tmp_path):
    """By name, revision and config, in a process that finds the hub in its environment."""

    def parquet(rows):
        file = io.BytesIO()
        rows.to_parquet(file)
        return file.getvalue()

    splits = datasets.load_from_disk(str(saved))
    card = '---\nconfigs:\n' + ''.join(
        f'- config_name: {name}\n  data_files:\n' + ''.join(
            f'  - split: {split}\n    path: {name}/{split}.parquet\n' for split in splits
        ) for name in ('whole', 'part')
    ) + '---\n'  # fmt: skip
    first = {f'whole/{split}.parquet': parquet(rows) for split, rows in splits.items()}
    first |= {f'part/{split}.parquet': parquet(rows.select(range(6))) for split, rows in splits.items()}
    program = """
import sys
from tests.test_huggingface import spec
from vqvae2_jax.data.images import open_images
for path in sys.argv[1:]:
    try:
        source = open_images(spec(path, held_out=(0.0, 0.0)), 'train')
        print(len(source), source.digest, source[0]['label'])
    except OSError as error:
        print(type(error).__name__, error)
"""
    with fake_hub.serve(tmp_path / 'hub') as hub:
        commit = hub.commit(first | {'README.md': card.encode()})
        hub.commit(
            first | {'README.md': card.encode(), 'part/train.parquet': parquet(splits['train'].select(range(9)))}
        )
        name = 'owner/images'
        paths = [
            f'{name}:whole',
            f'hf://datasets/{name}:part',
            f'{name}@{commit}:part',
            name,
            'owner/none',
            f'{name}:x',
        ]
        done = subprocess.run([sys.executable, '-c', program, *paths], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    whole, part, earlier, without, none, unknown = done.stdout.splitlines()
    source = open_images(spec(saved, held_out=(0.0, 0.0)), 'train')
    assert whole == f'40 {source.digest} {source[0]["label"]}'
    assert part.startswith('9 ') and earlier.startswith('6 ')
    assert without.startswith('FileNotFoundError data.path: there is no folder') and "'whole', 'part'" in without
    assert 'no dataset of the hub can be read by that name' in none and 'owner/none' in none
    assert "'x' not found" in unknown
