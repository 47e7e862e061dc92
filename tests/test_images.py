"""Images: every kind of file comes out upright, right in colour and size; splits hold; errors name what to change."""

import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vqvae2_jax.data import decode
from vqvae2_jax.data.images import SPLITS, ImageSpec, open_images, random_split
from vqvae2_jax.data.loader import eval_batches, read_skipped, train_batches


def encoded(image, format='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data, channels=3):
    return np.asarray(decode.decode_image(data, channels, 'test.png')).astype(int)


def save(path, colour, size=(8, 8), mode='RGB', **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def folder_spec(path, **fields):
    return ImageSpec(**{'name': 'folder', 'path': str(path), 'image_size': (8, 8), 'channels': 3, **fields})


def labelled_folder(path, per_class=10):
    for label, name in enumerate(('cat', 'dog')):
        for i in range(per_class):
            save(path / name / f'{i:02d}.png', (label * 100, i, 0))
    return path


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('channels', [1, 3])
def test_grayscale(channels):
    out = decoded(encoded(Image.new('L', (4, 3), 77)), channels)
    assert out.shape == ((3, 4) if channels == 1 else (3, 4, 3))
    assert (out == 77).all()


def test_one_bit():
    assert (decoded(encoded(Image.new('1', (4, 4), 1))) == 255).all()


def test_sixteen_bit_is_scaled_not_clipped():
    samples = np.array([[0, 257, 32768, 65535]], np.uint16)
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(samples)), 1), [[0, 1, 128, 255]])


@pytest.mark.parametrize('transparent', [False, True])
def test_palette(transparent):
    image = Image.new('P', (2, 1))
    image.putpalette([200, 10, 20, 30, 40, 50])
    image.putpixel((1, 0), 1)
    out = decoded(encoded(image, **({'transparency': 0} if transparent else {})))
    np.testing.assert_array_equal(out[0], [[255] * 3 if transparent else [200, 10, 20], [30, 40, 50]])


def test_palette_with_partial_transparency():
    image = Image.new('P', (1, 1))
    image.putpalette([100, 0, 0])
    np.testing.assert_allclose(decoded(encoded(image, transparency=bytes([128])))[0, 0], [177, 127, 127], atol=1)


def test_alpha_is_composited_on_white():
    image = Image.new('RGBA', (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    np.testing.assert_array_equal(decoded(encoded(image))[0], [[255] * 3, [10, 20, 30]])
    np.testing.assert_allclose(decoded(encoded(Image.new('LA', (1, 1), (50, 128))), 1), 152, atol=1)


def test_transparent_colour():
    image = Image.new('RGB', (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    np.testing.assert_array_equal(decoded(encoded(image, transparency=(1, 2, 3)))[0], [[255] * 3, [9] * 3])


def test_cmyk_jpeg():
    data = encoded(Image.new('CMYK', (8, 8), (0, 255, 255, 0)), 'JPEG', quality=95)  # Magenta and yellow ink: red.
    np.testing.assert_allclose(decoded(data)[4, 4], [255, 0, 0], atol=12)


def test_exif_orientation_six():
    image = Image.new('RGB', (32, 16), 'black')  # Stored lying on its side; its left half becomes the top.
    image.paste('white', (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    out = decoded(encoded(image, 'JPEG', exif=exif))
    assert out.shape == (32, 16, 3)
    assert out[:12].mean() > 250 and out[20:].mean() < 5


@pytest.mark.parametrize('orientation', range(1, 9))
def test_every_exif_orientation_matches_pillow(orientation):
    from PIL import ImageOps

    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(decoded(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


@pytest.mark.parametrize('format', decode.FORMATS)
def test_truncated_bytes_are_refused(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, format)
    for broken in (data[: len(data) // 2], data[:20], b'', b'not an image'):
        with pytest.raises(decode.UnreadableImage, match=r'here/x\.png.*on_error=skip'):
            decode.decode_image(broken, 3, 'here/x.png')


def test_unreadable_image_survives_pickling():
    error = pickle.loads(pickle.dumps(decode.UnreadableImage('a.png', 'broken')))
    assert (error.where, error.reason) == ('a.png', 'broken') and 'a.png' in str(error)


# --- size -------------------------------------------------------------------------------------------------------------


def test_fit_leaves_an_image_of_the_right_size_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    np.testing.assert_array_equal(decode.fit(Image.fromarray(pixels), (6, 9)), pixels)


def test_fit_is_antialiased():
    fine = ((np.indices((256, 256)).sum(0) % 2) * 255).astype(np.uint8)
    out = decode.fit(Image.fromarray(fine), (32, 32))
    assert out.shape == (32, 32, 1)
    assert np.abs(out[2:-2, 2:-2].astype(int) - 127.5).max() <= 2


@pytest.mark.parametrize('stored', [(30, 90), (90, 30), (7, 11), (400, 300)])
def test_fit_keeps_the_aspect_and_the_centre(stored):
    height, width = stored
    y, x = np.indices(stored) + 0.5
    scale = max(20 / height, 40 / width)
    for axis, (ramp, side) in enumerate(((y, height), (x, width))):
        slope = scale * 4  # So that each pixel of the result is 4 brighter than the one before.
        stored = np.clip(np.round(127.5 + slope * (ramp - side / 2)), 0, 255).astype(np.uint8)
        profile = decode.fit(Image.fromarray(stored), (20, 40))[..., 0].mean(1 - axis)
        middle = slice(len(profile) // 4, -(len(profile) // 4))
        assert profile.mean() == pytest.approx(127.5, abs=1)
        np.testing.assert_allclose(np.diff(profile[middle]).mean(), 4, rtol=0.06)


def test_fit_crops_where_told():
    pixels = np.zeros((80, 80), np.uint8)
    pixels[:10, :10], pixels[-10:, -10:] = 200, 100
    image = Image.fromarray(pixels)
    at = {offset: decode.fit(image, (70, 70), 8 / 7, offset)[..., 0] for offset in [(0, 0), (0.5, 0.5), (1, 1), (0, 1)]}
    np.testing.assert_array_equal(at[0, 0], pixels[:70, :70])
    np.testing.assert_array_equal(at[0.5, 0.5], pixels[5:75, 5:75])
    np.testing.assert_array_equal(at[1, 1], pixels[10:, 10:])
    np.testing.assert_array_equal(at[0, 1], pixels[:70, 10:])


# --- the spec ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'fields, named',
    [
        ({'name': ''}, 'data.name'),
        ({'path': 'somewhere'}, 'data.path'),
        ({'name': 'folder'}, 'data.path'),
        ({'image_size': (0, 28)}, 'data.image_size'),
        ({'image_size': 28}, 'data.image_size'),
        ({'channels': 2}, 'data.channels'),
        ({'num_classes': -1}, 'data.num_classes'),
        ({'splits': ('train',)}, 'data.splits'),
        ({'splits': ('a', 'b', 'c')}, 'data.splits'),
        ({'held_out': (0.5, 0.5)}, 'data.held_out'),
        ({'held_out': 0.1}, 'data.held_out'),
        ({'split_seed': -1}, 'data.split_seed'),
        ({'flip': 'yes'}, 'data.flip'),
        ({'crop': 1}, 'data.crop'),
        ({'on_error': 'ignore'}, 'data.on_error'),
        ({'workers': -1}, 'data.workers'),
    ],
)
def test_spec_names_the_field_that_is_wrong(fields, named):
    with pytest.raises(ValueError, match=named):
        ImageSpec(**{'name': 'fashion', **fields})


def test_spec_takes_lists_and_refuses_unknown_fields():
    assert ImageSpec('fashion', image_size=[32, 16]).image_size == (32, 16)
    with pytest.raises(TypeError, match='imagesize'):
        ImageSpec('fashion', imagesize=(28, 28))


# --- fashion ----------------------------------------------------------------------------------------------------------


def test_fashion_splits_are_disjoint_complete_stratified_and_fixed():
    sources = {split: open_images(ImageSpec('fashion', num_classes=10), split) for split in SPLITS}
    for split, count in zip(SPLITS, (8000, 1000, 1000), strict=True):
        labels = [sources[split].pool.read(p, 1)[1] for p in sources[split].positions[:200]]
        assert np.bincount(sources[split].positions // 1000).tolist() == [count // 10] * 10
        assert len(set(labels)) == 10  # A prefix is a fair sample.
    np.testing.assert_array_equal(np.sort(np.concatenate([s.positions for s in sources.values()])), np.arange(10000))
    # Written down, so that no change of the code moves an image from test to train.
    assert sources['test'].positions[:4].tolist() == [6918, 2686, 8076, 5530]
    other = open_images(ImageSpec('fashion', split_seed=1), 'test')
    assert set(other.positions) != set(sources['test'].positions)


def test_fashion_example():
    source = open_images(ImageSpec('fashion', num_classes=10), 'train')
    example = source[5]
    assert example['image'].shape == (28, 28, 1) and example['image'].dtype == np.uint8
    assert example['label'].dtype == np.int32 and example['index'].dtype == np.int64 and example['index'] == 5
    assert example['label'] == source.positions[5] // 1000
    assert source.class_names[9] == 'Ankle boot'
    trousers, boots = ([source[i]['image'] for i in range(400) if source[i]['label'] == n] for n in (1, 9))
    # Trousers are tall and narrow, boots wide: the labels belong to the pictures.
    assert np.mean([t[:, :6] for t in trousers]) < 10 < np.mean([b[14:22, :6] for b in boots])
    with pytest.raises(IndexError):
        source[len(source)]
    assert len(pickle.dumps(source)) < 100_000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[5]['image'], example['image'])


def test_fashion_in_colour_at_another_size_without_labels():
    small = open_images(ImageSpec('fashion'), 'validation')
    source = open_images(ImageSpec('fashion', image_size=(32, 48), channels=3), 'validation')
    image = source[0]['image']
    assert image.shape == (32, 48, 3) and (image == image[..., :1]).all()
    assert image.mean() > 0 and source.class_names == () and {source[i]['label'] for i in range(50)} == {0}
    assert small[0]['image'].shape == (28, 28, 1)
    with pytest.raises(ValueError, match=r'--config\.data\.num_classes=10'):
        open_images(ImageSpec('fashion', num_classes=5), 'train')


def test_unknown_split_lists_what_there_is():
    with pytest.raises(ValueError, match="'val': there are train, validation, test"):
        open_images(ImageSpec('fashion'), 'val')


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folder_with_classes(tmp_path):
    save(tmp_path / 'zèbre' / 'deep' / 'er' / '1.JPG', 'red')
    save(tmp_path / 'zèbre' / '2.WebP', 'red', lossless=True)
    save(tmp_path / '猫' / 'three.JPEG', 'blue')
    save(tmp_path / '猫' / 'vier.PnG', 'blue')
    for ignored in ('.hidden.png', '.thumbnails/1.png', '猫/._three.jpeg'):
        save(tmp_path / ignored, 'green')
    (tmp_path / 'notes.txt').write_text('not an image')
    source = open_images(folder_spec(tmp_path, num_classes=2, held_out=(0, 0)), 'train')
    assert source.class_names == ('zèbre', '猫') and len(source) == 4
    for i in range(4):
        label, image = source[i]['label'], source[i]['image'].astype(int)
        assert ('zèbre' in source.where(i)) == (label == 0)
        np.testing.assert_allclose(image[4, 4], [(255, 0, 0), (0, 0, 255)][label], atol=4)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[3]['image'], source[3]['image'])


def test_flat_folder_is_unlabelled(tmp_path):
    for i in range(10):
        save(tmp_path / f'{i}.png', (i, i, i))
    for num_classes, names in ((0, ()), (1, (tmp_path.name,))):
        source = open_images(folder_spec(tmp_path, num_classes=num_classes), 'train')
        assert source.class_names == names and len(source) == 8 and source[0]['label'] == 0
    with pytest.raises(ValueError, match=r'(?s)data\.num_classes=3.*--config\.data\.num_classes=0'):
        open_images(folder_spec(tmp_path, num_classes=3), 'train')


def test_random_split_is_stable_disjoint_and_complete(tmp_path):
    spec = folder_spec(labelled_folder(tmp_path), num_classes=2, held_out=(0.2, 0.1))
    files = {
        split: [source.where(i) for i in range(len(source))]
        for split in SPLITS
        for source in [open_images(spec, split)]
    }
    assert [len(files[split]) for split in SPLITS] == [14, 4, 2]
    assert len(set(sum(files.values(), []))) == 20
    again = open_images(spec, 'test')
    assert [again.where(i) for i in range(2)] == files['test']


def test_random_split_shares():
    splits = random_split(5, (0.1, 0.1), seed=0)
    assert [len(splits[s]) for s in SPLITS] == [3, 1, 1]  # A share above 0 is never rounded to nothing.
    splits = random_split(100, (0.25, 0.0), seed=3)
    assert [len(splits[s]) for s in SPLITS] == [75, 25, 0]
    assert not np.array_equal(splits['train'], random_split(100, (0.25, 0.0), seed=4)['train'])


def test_empty_split_names_held_out(tmp_path):
    with pytest.raises(ValueError, match=r'data\.held_out=\(0\.1, 0\).* test '):
        open_images(folder_spec(labelled_folder(tmp_path), held_out=(0.1, 0)), 'test')


def test_split_subfolders(tmp_path):
    labelled_folder(tmp_path / 'train', 3)
    save(tmp_path / 'val' / 'dog' / '1.png', 'red')  # No cats: labels are still those of the training split.
    spec = folder_spec(tmp_path, num_classes=2, splits=('train', 'val', 'val'))
    assert len(open_images(spec, 'train')) == 6
    for split in ('validation', 'test'):
        source = open_images(spec, split)
        assert len(source) == 1 and source[0]['label'] == 1 and source.class_names == ('cat', 'dog')
    with pytest.raises(FileNotFoundError, match=r"data\.splits names 'dev'.*'train', 'val'"):
        open_images(folder_spec(tmp_path, splits=('train', 'dev', 'val')), 'validation')
    save(tmp_path / 'val' / 'emu' / '1.png', 'red')
    with pytest.raises(ValueError, match=r"training split lacks: 'emu'"):
        open_images(spec, 'validation')
    # Forgotten data.splits: the split folders would pass for classes.
    with pytest.raises(ValueError, match=r'look like splits.*data\.splits'):
        open_images(folder_spec(tmp_path, num_classes=3), 'train')


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'data\.path.*nowhere'):
        open_images(folder_spec(tmp_path / 'nowhere'), 'train')
    with pytest.raises(ValueError, match=r'data\.path: no images'):
        open_images(folder_spec(tmp_path), 'train')
    labelled_folder(tmp_path)
    with pytest.raises(ValueError, match=r"num_classes=7.*'cat', 'dog'.*--config\.data\.num_classes=2"):
        open_images(folder_spec(tmp_path, num_classes=7), 'train')
    (tmp_path / 'emu').mkdir()
    with pytest.raises(ValueError, match=r"without images: 'emu'"):
        open_images(folder_spec(tmp_path, num_classes=2), 'train')
    (tmp_path / 'emu').rmdir()
    save(tmp_path / 'stray.png', 'red')
    with pytest.raises(ValueError, match=r'outside of them.*stray\.png'):
        open_images(folder_spec(tmp_path, num_classes=2), 'train')
    assert len(open_images(folder_spec(tmp_path, held_out=(0, 0)), 'train')) == 21  # Unlabelled: folders do not matter.


# --- corrupt files ----------------------------------------------------------------------------------------------------


def damaged_folder(tmp_path):
    labelled_folder(tmp_path, 6)
    whole = (tmp_path / 'cat' / '01.png').read_bytes()
    (tmp_path / 'cat' / '01.png').write_bytes(whole[: len(whole) // 2])
    (tmp_path / 'dog' / '03.png').write_bytes(b'\0' * 100)
    return [str(tmp_path / 'cat' / '01.png'), str(tmp_path / 'dog' / '03.png')]


def test_corrupt_file_raises_with_its_path(tmp_path):
    bad = damaged_folder(tmp_path)
    source = open_images(folder_spec(tmp_path, num_classes=2, splits=('.', '.', '.')), 'train')
    for index, path in ((1, bad[0]), (9, bad[1])):
        with pytest.raises(ValueError, match=path.replace('.', r'\.')):
            source[index]
    with pytest.raises(ValueError, match='on_error=skip'):
        list(eval_batches(source, batch_size=4))


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_corrupt_files_are_skipped_and_reported(tmp_path, workers):
    bad = damaged_folder(tmp_path / 'images')
    log = str(tmp_path / 'skipped.txt')
    assert read_skipped(log) == []
    spec = folder_spec(tmp_path / 'images', num_classes=2, splits=('.', '.', '.'), on_error='skip')
    source = open_images(spec, 'train')
    batches = list(eval_batches(source, batch_size=4, skip_log=log, workers=workers))
    assert [batch['mask'].tolist() for batch in batches] == [
        [True, False, True, True],
        [True] * 4,
        [True, False, True, True],
    ]
    assert read_skipped(log) == bad
    seen = np.concatenate([batch['index'][batch['mask']] for batch in batches])
    assert seen.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 10, 11]
    iterator = train_batches(source, batch_size=4, seed=0, skip_log=log)
    rows = [next(iterator) for _ in range(9)]  # Three epochs.
    assert all(batch['image'].shape == (4, 8, 8, 3) for batch in rows)
    assert set(np.concatenate([batch['index'] for batch in rows])) == set(seen)
    assert read_skipped(log) == bad


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'broken')
    source = open_images(folder_spec(tmp_path, held_out=(0, 0), on_error='skip'), 'train')
    with pytest.raises(ValueError, match=r'none of the 1 examples.*a\.png'):
        next(train_batches(source, batch_size=2, seed=0))


# --- TensorFlow Datasets ----------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
    """A dataset 'tiny' as TFDS prepares it, in ArrayRecord: 10 + 4 images whose red is the position."""
    tfds = pytest.importorskip('tensorflow_datasets')
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    root = tmp_path_factory.mktemp('tfds')
    home = root / 'tiny' / '1.0.0'
    home.mkdir(parents=True)
    label = tfds.features.ClassLabel(names=['even', 'odd'])
    tfds.features.FeaturesDict({'image': tfds.features.Image(shape=(None, None, 3)), 'label': label}).save_config(home)
    splits = []
    for split, count in (('train', 10), ('test', 4)):
        writer = ArrayRecordWriter(str(home / f'tiny-{split}.array_record-00000-of-00001'), 'group_size:1')
        for i in range(count):
            example = tf_example_pb2.Example()
            image = encoded(Image.new('RGB', (16, 12), (10 * i, 0, 0))) if i != 3 else b'broken'
            example.features.feature['image'].bytes_list.value.append(image)
            example.features.feature['label'].int64_list.value.append(i % 2)
            writer.write(example.SerializeToString())
        writer.close()
        template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
        splits.append({'name': split, 'shardLengths': [str(count)], 'filepathTemplate': template})
    info = {'name': 'tiny', 'version': '1.0.0', 'fileFormat': 'array_record', 'splits': splits}
    (home / 'dataset_info.json').write_text(json.dumps(info))
    return root


def tfds_spec(path, **fields):
    defaults = {'name': 'tiny', 'path': str(path), 'image_size': (6, 8), 'channels': 3, 'num_classes': 2}
    return ImageSpec(**(defaults | fields))


def test_tfds(tfds_dir):
    source = open_images(tfds_spec(tfds_dir, splits=('train[:50%]', 'train[50%:]', 'test')), 'validation')
    assert len(source) == 5 and source.class_names == ('even', 'odd')
    for copy in (source, pickle.loads(pickle.dumps(source))):
        example = copy[4]
        np.testing.assert_array_equal(example['image'], np.broadcast_to(np.uint8([90, 0, 0]), (6, 8, 3)))
        assert example['label'] == 1 and example['index'] == 4
    gray = open_images(tfds_spec(tfds_dir, channels=1, num_classes=0, held_out=(0.2, 0.2)), 'train')
    assert len(gray) == 6 and gray[0]['image'].shape == (6, 8, 1) and gray[0]['label'] == 0
    with pytest.raises(ValueError, match='tiny/train.* record 3'):
        open_images(tfds_spec(tfds_dir, splits=('train',) * 3), 'train')[3]


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
from vqvae2_jax.data.images import ImageSpec, open_images
open_images(ImageSpec("fashion"), "train")[0]
try:
    open_images(ImageSpec("cifar10"), "train")
except ImportError as error:
    assert "pip install tensorflow-datasets" in str(error)
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, '-c', program], check=True, timeout=60)
