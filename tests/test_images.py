"""Images: every kind of file comes out upright, right in colour and size; splits hold; errors name what to change."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.defaults import image_spec
from vqvae2_jax.config import base
from vqvae2_jax.config.fields import ConfigError
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.data.images import SPLITS, ImageSpec, open_all, open_images, random_split
from vqvae2_jax.data.loader import eval_batches, read_skipped, train_batches


def save(path, colour, size=(8, 8), mode='RGB', **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def folder_spec(path, **fields):
    return image_spec('folder', path, **{'image_size': (8, 8), 'channels': 3, **fields})


def labelled_folder(path, per_class=10):
    for label, name in enumerate(('cat', 'dog')):
        for i in range(per_class):
            save(path / name / f'{i:02d}.png', (label * 100, i, 0))
    return path


@pytest.mark.parametrize(
    'fields, named',
    [
        ({'name': ''}, 'data.name'),
        ({'path': 'somewhere'}, 'data.path'),
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
        ({'max_pixels': 0}, 'data.max_pixels'),
        ({'check_all': 'yes'}, 'data.check_all'),
        ({'workers': -1}, 'data.workers'),
    ],
)
def test_a_config_of_impossible_images_names_the_field(fields, named):
    config = base.get_config()
    with config.data.ignore_type():
        config.data.update(fields)
    with pytest.raises(ConfigError, match=named):
        validate_config(config)


@pytest.mark.parametrize(
    'fields, named',
    [
        ({'path': 'somewhere'}, 'data.path'),
        ({'splits': ('a', 'b', 'c')}, 'data.splits'),
        ({'held_out': (0.5, 0.5)}, 'data.held_out'),
    ],
)
def test_spec_names_the_field_that_contradicts_another(fields, named):
    with pytest.raises(ValueError, match=named):
        image_spec(**fields)


def test_spec_refuses_unknown_and_missing_fields():
    with pytest.raises(TypeError, match='imagesize'):
        image_spec(imagesize=(28, 28))
    with pytest.raises(TypeError, match='image_size'):
        ImageSpec('fashion')


# --- fashion ----------------------------------------------------------------------------------------------------------


def test_fashion_splits_are_disjoint_complete_stratified_and_fixed():
    sources = {split: open_images(image_spec(num_classes=10), split) for split in SPLITS}
    for split, count in zip(SPLITS, (8000, 1000, 1000), strict=True):
        labels = [sources[split].dataset.read(p, 1)[1] for p in sources[split].indices[:200]]
        assert np.bincount(sources[split].indices // 1000).tolist() == [count // 10] * 10
        assert len(set(labels)) == 10  # A prefix is a fair sample.
    np.testing.assert_array_equal(np.sort(np.concatenate([s.indices for s in sources.values()])), np.arange(10000))
    # Written down, so that no change of the code moves an image from test to train.
    assert sources['test'].indices[:4].tolist() == [6918, 2686, 8076, 5530]
    other = open_images(image_spec(split_seed=1), 'test')
    assert set(other.indices) != set(sources['test'].indices)


def test_fashion_example():
    source = open_images(image_spec(num_classes=10), 'train')
    example = source[5]
    assert example['image'].shape == (28, 28, 1) and example['image'].dtype == np.uint8
    assert example['label'].dtype == np.int32 and example['index'].dtype == np.int64 and example['index'] == 5
    assert example['label'] == source.indices[5] // 1000
    assert source.class_names[9] == 'Ankle boot'
    trousers, boots = ([source[i]['image'] for i in range(400) if source[i]['label'] == n] for n in (1, 9))
    # Trousers are tall and narrow, boots wide: the labels belong to the pictures.
    assert np.mean([t[:, :6] for t in trousers]) < 10 < np.mean([b[14:22, :6] for b in boots])
    with pytest.raises(IndexError):
        source[len(source)]
    assert len(pickle.dumps(source)) < 100_000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[5]['image'], example['image'])


def test_fashion_in_colour_at_another_size_without_labels():
    small = open_images(image_spec(), 'validation')
    source = open_images(image_spec(image_size=(32, 48), channels=3), 'validation')
    image = source[0]['image']
    assert image.shape == (32, 48, 3) and (image == image[..., :1]).all()
    assert image.mean() > 0 and source.class_names == () and {source[i]['label'] for i in range(50)} == {0}
    assert small[0]['image'].shape == (28, 28, 1)
    with pytest.raises(ValueError, match=r'--config\.data\.num_classes=10'):
        open_images(image_spec(num_classes=5), 'train')


def test_unknown_split_lists_what_there_is():
    with pytest.raises(ValueError, match="'val': there are train, validation, test"):
        open_images(image_spec(), 'val')


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
        assert ('zèbre' in source.example_name(i)) == (label == 0)
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
        split: [source.example_name(i) for i in range(len(source))]
        for split in SPLITS
        for source in [open_images(spec, split)]
    }
    assert [len(files[split]) for split in SPLITS] == [14, 4, 2]
    assert len(set(sum(files.values(), []))) == 20
    again = open_images(spec, 'test')
    assert [again.example_name(i) for i in range(2)] == files['test']


def test_random_split_shares():
    splits = random_split(5, (0.1, 0.1), seed=0)
    assert [len(splits[s]) for s in SPLITS] == [3, 1, 1]  # A share above 0 is never rounded to nothing.
    splits = random_split(100, (0.25, 0.0), seed=3)
    assert [len(splits[s]) for s in SPLITS] == [75, 25, 0]
    assert not np.array_equal(splits['train'], random_split(100, (0.25, 0.0), seed=4)['train'])


def test_every_class_keeps_a_training_image(tmp_path):
    for name, count in (('many', 40), ('one', 1), ('two', 2)):
        for i in range(count):
            save(tmp_path / name / f'{i}.png', (i, 0, 0))
    for seed in range(8):
        spec = folder_spec(tmp_path, num_classes=3, held_out=(0.4, 0.4), split_seed=seed)
        sources = {split: open_images(spec, split) for split in SPLITS}
        assert np.bincount(sources['train'].labels, minlength=3).min() >= 1
        everything = np.concatenate([sources[split].indices for split in SPLITS])
        assert sorted(everything) == list(range(43))  # each in one split
    labels = np.array([0] * 8 + [1, 2, 2])
    splits = random_split(11, (0.2, 0.2), 0, stratify_by=labels, labels=labels)  # each share rounds up to an image
    assert set(labels[splits['train']]) == {0, 1, 2} and set(labels[splits['test']]) == {0, 2}
    without = random_split(11, (0.2, 0.2), 0, stratify_by=labels)
    np.testing.assert_array_equal(splits['train'][: len(without['train'])], without['train'])  # others stay


@pytest.mark.parametrize('seed', [0, 1])
def test_a_split_that_needs_no_change_is_not_changed(seed):
    labels = np.arange(100) % 4
    plain, labeled = (random_split(100, (0.1, 0.1), seed, labels=given) for given in (None, labels))
    for split in SPLITS:
        np.testing.assert_array_equal(plain[split], labeled[split])


def test_two_classes_with_one_name_are_refused(tmp_path):
    fields = {'name': 'npz', 'path': tmp_path / 'a.npz', 'num_classes': 3}
    pixels, label = np.zeros((30, 28, 28), np.uint8), np.arange(30) % 3
    np.savez(tmp_path / 'a.npz', arr_0=pixels, label=label, class_names=['crane', 'maillot', 'crane'])
    message = r"data\.path: the classes 0, 2 have one name, 'crane': .*--config\.data\.num_classes=0"
    with pytest.raises(ValueError, match=message):
        open_images(image_spec(**fields), 'train')
    assert open_images(image_spec(**fields | {'num_classes': 0}), 'train').class_names == ()  # as advised
    np.savez(tmp_path / 'a.npz', arr_0=pixels, label=label, class_names=['crane', 'maillot', 'crane (bird)'])
    assert open_images(image_spec(**fields), 'train').class_names[2] == 'crane (bird)'


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


def test_named_splits_are_in_a_fixed_random_order(tmp_path):
    labelled_folder(tmp_path, 50)

    def order(**fields):
        source = open_images(folder_spec(tmp_path, num_classes=2, splits=('.', '.', '.'), **fields), 'validation')
        assert sorted(source.indices) == list(range(100))
        assert all(source[i]['label'] == source.indices[i] // 50 for i in range(0, 100, 9))
        return source.indices

    assert 5 <= np.sum(order()[:20] < 50) <= 15  # A prefix is a fair sample of the classes.
    np.testing.assert_array_equal(order(), order())
    assert not np.array_equal(order(), order(split_seed=1))
    # Written down, so that the first examples stay the same ones.
    assert order()[:4].tolist() == [26, 86, 2, 55]


# --- digests ----------------------------------------------------------------------------------------------------------


def test_the_digest_of_a_folder_is_of_its_names_and_labels_wherever_it_lies(tmp_path):
    labelled_folder(tmp_path / 'a')
    spec = folder_spec(tmp_path / 'a', num_classes=2, splits=('.', '.', '.'))

    def digest(split='train', **fields):
        return open_images(ImageSpec(**{**vars(spec), **fields}), split).digest

    first = digest()
    assert len(first) == 64 and first == digest(image_size=(4, 4)) == digest('test')
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    assert digest(path=str(tmp_path / 'b')) == first
    different = [digest(num_classes=0), digest(split_seed=1), digest(splits=()), digest('test', splits=())]
    shutil.copytree(tmp_path / 'a', tmp_path / 'c' / 'train')
    shutil.copytree(tmp_path / 'a', tmp_path / 'c' / 'val')
    named = {'path': str(tmp_path / 'c'), 'splits': ('train', 'val', 'val')}
    different += [digest('train', **named), digest('test', **named)]
    (tmp_path / 'b' / 'cat' / '00.png').rename(tmp_path / 'b' / 'cat' / 'other.png')
    different.append(digest(path=str(tmp_path / 'b')))
    assert len({first, *different}) == 1 + len(different)


def test_the_digest_of_fashion_is_of_its_positions_and_labels():
    sources = [open_images(image_spec(**fields), split) for split in SPLITS for fields in ({}, {'split_seed': 1})]
    sources.append(open_images(image_spec(num_classes=10), 'train'))
    assert len({source.digest for source in sources}) == len(sources)
    assert open_images(image_spec(channels=3), 'train').digest == sources[0].digest
    assert pickle.loads(pickle.dumps(sources[0])).digest == sources[0].digest


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


# --- files that are not read ------------------------------------------------------------------------------------------


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'')


def test_files_with_other_suffixes_are_counted_in_one_line(tmp_path, capsys):
    labelled_folder(tmp_path)
    touch(*(tmp_path / 'cat' / name for name in ('1.heic', '2.HEIC', 'a.txt', 'LICENSE', '.DS_Store')))
    touch(*(tmp_path / name for name in ('deep/3.heic', 'deep/b.txt', 'no.', '.cache/4.heic')))
    spec = folder_spec(tmp_path)
    for split in SPLITS:  # cut from one folder
        open_images(spec, split)
    line = f"'{tmp_path}': ignored 7 files: 3 .heic, 2 .txt, 2 without suffix\n"
    assert capsys.readouterr().out == line
    (tmp_path / 'cat' / 'LICENSE').unlink()  # another count is another line
    open_images(spec, 'train')
    assert 'ignored 6 files: 3 .heic, 2 .txt, 1 without suffix' in capsys.readouterr().out


def test_the_line_of_ignored_files_for_one_and_for_many_suffixes(tmp_path, capsys):
    labelled_folder(tmp_path / 'one')
    touch(tmp_path / 'one' / 'cat' / 'Thumbs.db')
    open_images(folder_spec(tmp_path / 'one', num_classes=2), 'train')
    assert capsys.readouterr().out == f"'{tmp_path / 'one'}': ignored 1 file: 1 .db\n"
    save(tmp_path / 'many' / '1.png', 'red')
    touch(*(tmp_path / 'many' / f'x.{letter}' for letter in 'jihgfedcba'))
    touch(tmp_path / 'many' / 'y.j', tmp_path / 'many' / 'odd.two\nlines', tmp_path / 'many' / 'Mr. Smith')
    open_all(str(tmp_path / 'many'), folder_spec(tmp_path), 'inpaint.path')
    counts = '2 .j, 2 without suffix, 1 .a, 1 .b, 1 .c, 1 .d, 1 .e, 1 .f, ...'
    assert capsys.readouterr().out == f"'{tmp_path / 'many'}': ignored 13 files: {counts}\n"
    save(tmp_path / 'none' / '1.png', 'red')
    open_images(folder_spec(tmp_path / 'none', held_out=(0, 0)), 'train')
    assert capsys.readouterr().out == ''


def test_a_class_whose_files_are_all_ignored_is_named_with_their_suffixes(tmp_path):
    labelled_folder(tmp_path / 'train')
    touch(*(tmp_path / 'train' / 'emu' / f'{i}.heic' for i in range(10)), tmp_path / 'train' / 'emu' / 'a.txt')
    for fields in ({'num_classes': 2}, {'num_classes': 3}):
        with pytest.raises(ValueError, match=r"'emu' \(only 10 \.heic, 1 \.txt\).*\.avif, \.bmp, .* are read") as error:
            open_images(folder_spec(tmp_path / 'train', **fields), 'train')
        assert 'emove' not in str(error.value) and 'elete' not in str(error.value)
    (tmp_path / 'train' / 'emu').rename(tmp_path / 'emu')
    save(tmp_path / 'val' / 'dog' / '1.png', 'red')
    (tmp_path / 'val' / 'emu').mkdir()
    touch(tmp_path / 'val' / 'cat' / 'scan.dng')
    spec = folder_spec(tmp_path, num_classes=2, splits=('train', 'val', 'val'))
    with pytest.raises(ValueError, match=r"val' without images: 'cat' \(only 1 \.dng\)"):
        open_images(spec, 'validation')
    for stray in (tmp_path / 'val' / 'dog').iterdir():
        stray.rename(tmp_path / 'val' / stray.name)  # images beside the class folders, none in them
    with pytest.raises(ValueError, match=r"without images: 'cat' \(only 1 \.dng\)"):
        open_images(folder_spec(tmp_path / 'val', num_classes=2), 'train')


def test_a_folder_without_any_image_names_the_suffixes_found(tmp_path):
    touch(*(tmp_path / 'cat' / f'{i}.CR2' for i in range(3)), tmp_path / 'dog' / '1.heic', tmp_path / '.hidden')
    for num_classes in (0, 2):
        with pytest.raises(ValueError, match=r'data\.path: no images in .*, only 3 \.cr2, 1 \.heic \(looked for \.'):
            open_images(folder_spec(tmp_path, num_classes=num_classes), 'train')


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
    for position, path in ((1, bad[0]), (9, bad[1])):
        with pytest.raises(ValueError, match=path.replace('.', r'\.')):
            source[source.indices.tolist().index(position)]
    with pytest.raises(ValueError, match='on_error=skip'):
        list(eval_batches(source, batch_size=4))


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_corrupt_files_are_skipped_and_reported(tmp_path, workers):
    bad = damaged_folder(tmp_path / 'images')
    log = str(tmp_path / 'skipped.txt')
    assert read_skipped(log) == []
    spec = folder_spec(tmp_path / 'images', num_classes=2, splits=('.', '.', '.'), on_error='skip')
    source = open_images(spec, 'train')
    readable = ~np.isin(source.indices, (1, 9))
    batches = list(eval_batches(source, batch_size=4, skip_log=log, workers=workers))
    np.testing.assert_array_equal(np.concatenate([batch['mask'] for batch in batches]), readable)
    assert read_skipped(log) == bad
    seen = np.concatenate([batch['index'][batch['mask']] for batch in batches])
    np.testing.assert_array_equal(seen, np.flatnonzero(readable))
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


@pytest.mark.parametrize('name', ['folder', 'npz', 'huggingface'])
def test_images_need_a_path_when_they_are_opened(name):
    with pytest.raises(
        ValueError, match=f"data.path is ''; it must be the path of the images, as data.name is '{name}'"
    ):
        open_images(image_spec(name), 'train')
