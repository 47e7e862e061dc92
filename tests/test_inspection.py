"""The facts about images that are found before a training."""

import gc
import json
import re
import shutil
import signal
import threading

import numpy as np
import pytest
from PIL import Image

from tests.defaults import image_spec
from vqvae2_jax.data import inspection
from vqvae2_jax.data.decode import UnreadableImage
from vqvae2_jax.data.folder import FilesDataset
from vqvae2_jax.data.images import SPLITS, open_images


def save(path, seed, size=(8, 8), top=256):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, top, (*size, 3), np.uint8)).save(path)


@pytest.fixture
def images(tmp_path):
    """Named splits of two classes: 6 training, 2 validation and 2 test images."""
    for seed in range(10):
        split = ('train', 'train', 'train', 'val', 'test')[seed // 2]
        save(tmp_path / split / ('cat', 'dog')[seed % 2] / f'{seed}.png', seed)
    return tmp_path


def sources(path, **fields):
    named = {'splits': ('train', 'val', 'test'), 'on_error': 'skip'}
    fields = {'image_size': (8, 8), 'channels': 3, 'num_classes': 2, **named, **fields}
    return {split: open_images(image_spec('folder', path, **fields), split) for split in SPLITS}


def inspect(path, check_all=False, **fields):
    facts = inspection.inspect(sources(path, **fields), check_all)
    return json.loads(json.dumps(facts)), inspection.describe(facts)


def test_the_block_of_sound_data(images):
    facts, text = inspect(images)
    assert facts['images'] == {'train': 6, 'validation': 2, 'test': 2}
    assert facts['classes'][1] == {'label': 1, 'name': 'dog', 'images': {'train': 3, 'validation': 1, 'test': 1}}
    assert facts['decoded']['train']['smallest'] == facts['decoded']['train']['largest'] == [8, 8]
    lines = text.splitlines()
    assert lines[:5] == [
        'data: 10 images: 6 train, 2 validation, 2 test',
        'data: 2 classes',
        'data:  label      train validation       test  name',
        'data:      0          3          1          1  cat',
        'data:      1          3          1          1  dog',
    ]
    assert lines[5].startswith('data: train: decoded 6 of 6; size 8x8; mean brightness 12')
    assert lines[-1] == 'data: compared by content: no image is there twice' and 'warning' not in text


def test_sizes_and_unreadable_images(images):
    save(images / 'train' / 'cat' / 'large.png', 20, (30, 40))
    save(images / 'train' / 'cat' / 'flat.png', 21, (4, 90))
    (images / 'val' / 'dog' / 'broken.jpg').write_bytes(b'\xff\xd8\xff and no more')
    facts, text = inspect(images)
    assert 'train: decoded 8 of 8; sizes 8x8 to 30x40 (height x width); ' in text
    assert '; 1 smaller than data.image_size 8x8, to be enlarged' in text
    path = str(images / 'val' / 'dog' / 'broken.jpg')
    assert f'warning: validation: 1 of 3 cannot be read, such as {path}: ' in text


def test_an_unreadable_image_is_raised_before_images_are_compared(images, monkeypatch):
    monkeypatch.setattr(inspection, '_copies', lambda *_: pytest.fail('compared'))
    path = images / 'val' / 'dog' / 'broken.jpg'
    path.write_bytes(b'\xff\xd8\xff and no more')
    with pytest.raises(UnreadableImage) as error:
        inspect(images, on_error='raise')
    assert error.value.example_name == str(path)


def test_copies_within_and_across_splits(images):
    cat = images / 'train' / 'cat'
    shutil.copy(cat / '0.png', cat / 'copy.png')
    shutil.copy(cat / '0.png', images / 'test' / 'dog' / 'leaked.png')
    shutil.copy(cat / '2.png', images / 'test' / 'cat' / 'leaked.png')
    (cat / 'empty.png').write_bytes(b'')
    (cat / 'empty too.png').write_bytes(b'')
    facts, text = inspect(images)
    assert facts['copies']['within']['train']['images'] == 1
    found = {(pair['split'], pair['also_in']): pair['images'] for pair in facts['copies']['across']}
    assert found == {('validation', 'train'): 0, ('test', 'train'): 2, ('test', 'validation'): 0}
    assert 'data: compared by content: some images are there twice' in text
    assert 'data: train: 1 of 9 images repeat another image of train, such as ' in text
    assert (
        'data: warning: test: 2 of 4 images (1 with another label) are also in train, such as ' in text
        and 'leaked.png' in text
    )


def pictures(folder, *, copies, alike):
    """Adds files of one length each, all black but for the last pixel: 2 copies of some, and some without a copy."""
    for i in range(alike):
        (folder / f'alike {i}.ppm').write_bytes(b'P6 8 8 255\n' + bytes(191) + bytes([i]))
    for i in range(copies):
        for copy in 'ab':
            (folder / f'copy {i}{copy}.ppm').write_bytes(b'P6 8 8 255\n' + bytes(192 + i + 1))


def test_only_images_of_one_length_are_read(images, monkeypatch):
    for name in ('train', 'val', 'test'):
        for path in (images / name).glob('*/*.png'):
            path.write_bytes(path.read_bytes() + bytes(100 * int(path.stem)))
    pictures(images / 'train' / 'cat', copies=1, alike=3)
    found, read = sources(images), []
    content = FilesDataset.content
    monkeypatch.setattr(inspection, '_decode', lambda *_: inspection._Decoded((8, 8)))
    monkeypatch.setattr(FilesDataset, 'content', lambda self, i: read.append(self.files[i]) or content(self, i))
    copies = inspection.inspect(found)['copies']
    assert sorted(read) == ['cat/' + name for name in ('alike 0.ppm', 'alike 1.ppm', 'alike 2.ppm')] + [
        'cat/copy 0a.ppm',
        'cat/copy 0b.ppm',
    ]
    assert copies['whole'] and copies['candidates'] == copies['compared'] == 5
    assert copies['within']['train']['images'] == 1


@pytest.mark.parametrize('limit', ['MAX_FILES', 'MAX_READ'])
def test_of_many_images_some_are_compared_and_none_is_a_false_alarm(images, monkeypatch, limit):
    shutil.rmtree(images)
    for split in ('train', 'val', 'test'):
        for name in ('cat', 'dog'):
            save(images / split / name / '1.png', 0)
    pictures(images / 'train' / 'cat', copies=2, alike=9)
    pictures(images / 'val' / 'cat', copies=0, alike=1)  # a copy
    facts, text = inspect(images)
    complete = facts['copies']
    assert complete['whole'] and complete['candidates'] == 20 and complete['within']['train']['images'] == 3
    monkeypatch.setattr(inspection, 'MAX_COMPARED', 9)
    monkeypatch.setattr(inspection, limit, {'MAX_FILES': 6, 'MAX_READ': 1400}[limit])
    facts, text = inspect(images)
    copies = facts['copies']
    assert not copies['whole'] and copies['candidates'] == 20 and copies['compared'] == 6
    assert copies['within']['train']['images'] == 2  # rare lengths come first
    assert 'only 6 of 20 images that may be copies (data.check_all=True: all): some of them are there twice' in text
    facts, text = inspect(images, check_all=True)
    assert facts['copies'] == complete and 'data: compared by content: some images' in text


def test_copies_across_splits_come_first(tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(0, 255, (40, 8, 8), np.uint8)
    np.savez(tmp_path / 'train.npz', arr_0=values)
    np.savez(tmp_path / 'test.npz', arr_0=np.concatenate([values[:3], 255 - values[:4], 255 - values[:1]]))
    fields = {'image_size': (8, 8), 'channels': 1, 'splits': ('train.npz', 'train.npz', 'test.npz')}
    found = {split: open_images(image_spec('npz', tmp_path, **fields), split) for split in ('train', 'test')}
    monkeypatch.setattr(inspection, 'MAX_COMPARED', 9)
    monkeypatch.setattr(inspection, 'MAX_FILES', 1)  # these are no files
    assert inspection.inspect(found)['copies']['across'][0]['images'] == 3
    monkeypatch.setattr(inspection, 'MAX_READ', 64 * 8)
    facts = inspection.inspect(found)
    assert facts['copies']['within']['test']['images'] == 1
    assert facts['copies']['compared'] == 8 and facts['copies']['candidates'] == 48
    assert 'only 8 of 48 images that may be copies (data.check_all=True: all): some of them' in inspection.describe(
        facts
    )


def test_at_most_some_images_are_decoded(images, monkeypatch):
    monkeypatch.setattr(inspection, 'MAX_DECODED', 4)
    facts, text = inspect(images)
    assert facts['decoded']['train']['images'] == 4 and 'train: decoded 4 of 6' in text
    assert inspect(images, check_all=True)[0]['decoded']['train']['images'] == 6


def test_a_dark_set_is_said(tmp_path):
    for seed in range(10):
        values = np.random.default_rng(seed).integers(0, 4096, (8, 8), np.uint16)  # 12 bits in 16
        Image.fromarray(values).save(tmp_path / f'{seed}.png')
    _, text = inspect(tmp_path, splits=(), num_classes=0, channels=1)
    assert 'warning: train is dark: in 8 of 8 images, 99.9 % of pixels are at most 64 of 255. Values of 10' in text
    (tmp_path / 'broken.png').write_bytes(b'')
    _, text = inspect(tmp_path, splits=(), num_classes=0, channels=1)
    pairs = re.findall(r'is dark: in (\d+) of (\d+) images', text)
    assert len(pairs) >= 2 and all(dark == readable for dark, readable in pairs) and '1 of' in text
    (tmp_path / 'broken.png').unlink()
    for path in tmp_path.iterdir():
        Image.fromarray(np.asarray(Image.open(path)) * 16).save(path)  # as advised
    assert 'dark' not in inspect(tmp_path, splits=(), num_classes=0, channels=1)[1]


def test_classes_without_training_images_are_said(tmp_path):
    label = np.array([0, 0, 0, 0, 0, 2, 2, 2, 2, 2])
    images = np.random.default_rng(0).integers(0, 255, (10, 8, 8), np.uint8)
    np.savez(tmp_path / 'a.npz', arr_0=images, label=label, class_names=['cat', 'dog', 'emu'])
    fields = {'image_size': (8, 8), 'channels': 1, 'num_classes': 3}
    found = {split: open_images(image_spec('npz', tmp_path / 'a.npz', **fields), split) for split in SPLITS}
    facts = inspection.inspect(found)
    assert "warning: 1 of 3 classes have no readable training images: 1 'dog'" in inspection.describe(facts)
    assert facts['copies']['within']['train'] == {'images': 0, 'example': [], 'relabeled': 0}


def test_a_class_of_unreadable_images_has_no_training_images(images):
    for path in (images / 'train' / 'dog').iterdir():
        path.write_bytes(b'broken')
    assert "1 of 2 classes have no readable training images: 1 'dog'" in inspect(images)[1]


def test_many_classes_are_cut(tmp_path):
    names = [f'class {i}' for i in range(30)]
    images = np.random.default_rng(0).integers(0, 255, (90, 8, 8), np.uint8)
    np.savez(tmp_path / 'a.npz', arr_0=images, label=np.arange(90) % 30, class_names=names)
    fields = {'image_size': (8, 8), 'channels': 1, 'num_classes': 30}
    found = {split: open_images(image_spec('npz', tmp_path / 'a.npz', **fields), split) for split in SPLITS}
    text = inspection.describe(inspection.inspect(found))
    assert 'class 19' in text and 'class 20' not in text and '... 10 more classes' in text


def test_an_interrupt_ends_the_inspection_at_once(images, monkeypatch):
    """Images that wait for a thread are not read."""
    begun, entered = [], threading.Event()
    found, decode = sources(images), inspection._decode
    monkeypatch.setattr(inspection, '_THREADS', 1)
    monkeypatch.setattr(inspection, '_count', lambda source, check_all: 6000)

    def slow(source, index):
        begun.append(index)
        entered.set()
        return decode(source, index % len(source))

    monkeypatch.setattr(inspection, '_decode', slow)

    def interrupt():
        entered.wait()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    gc.disable()  # hypothesis measures garbage collections, and swallows an interrupt within its function
    try:
        with pytest.raises(KeyboardInterrupt):
            inspection.inspect(found)
    finally:
        gc.enable()
    thread.join()
    assert len(begun) < 6000
