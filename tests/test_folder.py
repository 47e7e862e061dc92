"""Messy folders: links, system folders, and files that cannot be opened."""

import errno
import os
import pathlib
import socket
import stat

import numpy as np
import pytest
from PIL import Image

from tests.defaults import image_spec
from vqvae2_jax.config import base
from vqvae2_jax.data import listing as listings
from vqvae2_jax.data.decode import UnreadableImage
from vqvae2_jax.data.folder import find_images
from vqvae2_jax.data.images import SPLITS, open_all, open_images, open_native_size
from vqvae2_jax.data.listing import LocalFolder, class_folders, list_images
from vqvae2_jax.data.loader import eval_batches, read_skipped
from vqvae2_jax.io import regular
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs.workdir import Run


def save(*paths):
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (number, 0, 0)).save(path)


def spec(path, **fields):
    return image_spec('folder', path, **{'image_size': (8, 8), 'channels': 3, 'splits': ('.', '.', '.'), **fields})


# --- links ------------------------------------------------------------------------------------------------------------


def test_every_real_folder_is_listed_once(tmp_path, capsys):
    root = tmp_path / 'data' / 'images'
    save(
        root / 'cats' / '1.png',
        root / 'dogs' / '1.png',
        tmp_path / 'data' / 'other' / '1.png',
        tmp_path / 'far' / '1.png',
    )
    (root / 'cats' / 'itself').symlink_to('.')
    (root / 'cats' / 'above').symlink_to('..')
    (root / 'cats' / 'dogs again').symlink_to(root / 'dogs')
    (root / 'dogs' / 'above all').symlink_to(tmp_path / 'data')  # it holds another folder of images
    (root / 'emus').symlink_to(tmp_path / 'far')
    (root / 'owls').symlink_to(tmp_path / 'far')
    listing = list_images(str(root))
    assert listing.images == ['cats/1.png', 'dogs/1.png', 'emus/1.png']
    again = ['cats/above', 'cats/dogs again', 'cats/itself', 'dogs/above all', 'owls']
    assert listing.repeated == again
    source = open_images(spec(root, num_classes=3), 'train')
    assert source.class_names == ('cats', 'dogs', 'emus') == class_folders(str(root)) and len(source) == 3
    out = capsys.readouterr().out
    assert out.count('\n') == 1 and "ignored 5 links to folders above or listed already: 'cats/above', " in out


def test_links_to_files_and_between_splits_are_followed(tmp_path):
    save(tmp_path / 'train' / 'cat' / '1.png', tmp_path / 'train' / 'dog' / '1.png')
    (tmp_path / 'train' / 'all').symlink_to('.')
    (tmp_path / 'val').symlink_to('train')
    (tmp_path / 'train' / 'cat' / '2.png').symlink_to('1.png')
    fields = spec(tmp_path, num_classes=2, splits=('train', 'val', 'val'))
    assert [len(open_images(fields, split)) for split in ('train', 'validation')] == [3, 3]
    assert open_images(fields, 'test').class_names == ('cat', 'dog')


def test_many_loops_end(tmp_path):
    for name in 'abcdefgh':
        save(tmp_path / name / '1.png')
        for other in 'abcdefgh':
            (tmp_path / name / f'to {other}').symlink_to(tmp_path / other)
    listing = list_images(str(tmp_path))
    assert len(listing.images) == 8 and len(listing.repeated) == 64


# --- folders that are left out ----------------------------------------------------------------------------------------


def test_system_folders_are_left_out_and_counted(tmp_path, capsys):
    ignored = ('cat/@eaDir/1.jpg', 'dog/@eaDir/1.jpg', '__MACOSX/cat', '$RECYCLE.BIN', 'System Volume Information')
    save(*(tmp_path / name / '1.png' for name in ('cat', 'dog', '.Trash-1000', 'lost+found', '#recycle', *ignored)))
    source = open_images(spec(tmp_path, num_classes=2), 'train')
    assert source.class_names == ('cat', 'dog') and source.dataset.files == ['cat/1.png', 'dog/1.png']
    assert 'ignored 7 system folders: 2 @eaDir, 1 #recycle, 1 $RECYCLE.BIN, 1 System Volume' in capsys.readouterr().out
    inside = open_all(str(tmp_path / 'lost+found'), spec(tmp_path), 'inpaint.path')  # when it is asked for
    assert len(inside) == 1


@pytest.mark.parametrize('place', ['', 'dog'])
def test_a_folder_that_cannot_be_listed_obeys_on_error(tmp_path, monkeypatch, capsys, place):
    save(tmp_path / 'cat' / '1.png', tmp_path / 'dog' / '1.png')
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip('/') == str(tmp_path / place):
            raise PermissionError(errno.EACCES, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(ValueError, match=f"1 folder cannot be listed: '{place or '.'}' .Permission denied") as error:
        find_images(LocalFolder(str(tmp_path)), 'data.path')
    assert ('on_error=skip' in str(error.value)) == bool(place)
    if place:
        assert find_images(LocalFolder(str(tmp_path)), 'data.path', on_error='skip').images == ['cat/1.png']
        assert "1 folder cannot be listed: 'dog' (Permission denied)" in capsys.readouterr().out


def test_a_class_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    """Also with on_error=skip: there would be fewer classes."""
    save(*(tmp_path / split / name / '1.png' for split in ('train', 'val') for name in ('cat', 'dog')))
    scandir, locked = os.scandir, {tmp_path / 'train' / 'dog'}

    def refuse(path):
        if pathlib.Path(path) in locked:
            raise PermissionError(errno.EACCES, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    fields = {'splits': ('train', 'val', 'val'), 'on_error': 'skip'}
    for number in (1, 2):
        message = r"train' cannot be listed: 'dog' \(Permission denied\)\. Repair .* set --config\.data\.num_classes=0"
        with pytest.raises(ValueError, match=message):
            open_images(spec(tmp_path, num_classes=number, **fields), 'train')
    assert len(open_images(spec(tmp_path, num_classes=0, **fields), 'train')) == 1  # as advised
    locked.clear()
    assert len(open_images(spec(tmp_path, num_classes=2, **fields), 'train')) == 2
    locked.add(tmp_path / 'val' / 'dog')  # the classes are those of the training split
    assert open_images(spec(tmp_path, num_classes=2, **fields), 'validation').class_names == ('cat', 'dog')


def test_folders_with_one_inode_number_are_two(tmp_path, monkeypatch):
    save(tmp_path / 'cat' / '1.png', tmp_path / 'dog' / '1.png')
    (tmp_path / 'dog' / 'link').symlink_to(tmp_path / 'cat')
    os_stat = os.stat

    def same(path, **options):
        status = os_stat(path, **options)
        return os.stat_result([status[0], 7, *status[2:10]]) if stat.S_ISDIR(status.st_mode) else status

    monkeypatch.setattr(os, 'stat', same)
    listing = list_images(str(tmp_path))
    assert listing.images == ['cat/1.png', 'dog/1.png'] and listing.repeated == ['dog/link']


def test_a_folder_is_listed_once_for_its_splits(tmp_path, monkeypatch):
    save(*(tmp_path / name / f'{i}.png' for name in ('cat', 'dog') for i in range(5)))
    listed = []
    monkeypatch.setattr(listings, 'list_images', lambda root: listed.append(root) or list_images(root))
    config = base.get_config()
    fields = {'name': 'folder', 'path': str(tmp_path), 'image_size': (8, 8), 'num_classes': 2}
    config.data.update(fields)
    run = Run(config, tmp_path / 'run')
    datasets = {id(run.images(split).dataset) for split in SPLITS}
    assert len(datasets) == 1 and listed == [str(tmp_path)]
    config.data.num_classes = 0
    assert run.images('train').class_names == () and len(listed) == 2


# --- files that cannot be opened --------------------------------------------------------------------------------------


@pytest.fixture
def messy(tmp_path, monkeypatch):
    """A folder with two images, and files of every other kind with an image's name; returns it and their names."""
    root = tmp_path / 'images'
    save(root / 'good.png', root / 'zebra.png')
    (root / 'dangling.png').symlink_to('/nowhere/1.png')
    (root / 'loop.png').symlink_to('loop.png')
    (root / 'device.png').symlink_to('/dev/null')
    os.mkfifo(root / 'pipe.png')
    (root / 'folder.png').mkdir()
    (root / 'empty.png').write_bytes(b'')
    monkeypatch.chdir(root)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind('socket.png')
    return root, sorted({path.name for path in root.iterdir()} - {'good.png', 'zebra.png'})


def test_every_file_that_cannot_be_read_is_an_unreadable_image(messy):
    root, bad = messy
    source = open_all(str(root), spec(root), 'likelihood.path')
    reasons = {}
    for index, name in enumerate(source.dataset.files):
        try:
            source[index]
        except UnreadableImage as error:
            reasons[name] = error.reason
            assert str(root / name) in str(error) and '--config.data.on_error=skip' in str(error)
    assert sorted(reasons) == bad and len(source) == 9
    assert (
        reasons['pipe.png'] == 'it is a named pipe, not a file'
        and reasons['folder.png'] == 'it is a folder, not a file'
    )
    assert (
        reasons['socket.png'] == 'it is a socket, not a file' and reasons['device.png'] == 'it is a device, not a file'
    )
    assert reasons['dangling.png'] == 'No such file or directory' and 'symbolic links' in reasons['loop.png']


def test_they_are_skipped_where_so_configured(messy, tmp_path):
    root, bad = messy
    source = open_images(spec(root, on_error='skip'), 'train')
    batches = list(eval_batches(source, batch_size=4, skip_log=str(tmp_path / 'skipped.txt')))
    assert sum(batch['mask'].sum() for batch in batches) == 2
    assert [os.path.basename(path) for path in read_skipped(str(tmp_path / 'skipped.txt'))] == bad
    with pytest.raises(UnreadableImage, match='cannot read the image'):
        list(eval_batches(open_images(spec(root), 'train'), batch_size=4))


def test_a_pipe_given_as_the_only_image_is_unreadable(messy):
    source = open_all(str(messy[0] / 'pipe.png'), spec(messy[0]), 'inpaint.path')
    with pytest.raises(UnreadableImage, match='named pipe'):
        source[0]


@pytest.mark.parametrize('code', [errno.EIO, errno.EACCES])
def test_errors_of_the_disk_are_those_of_the_image(tmp_path, monkeypatch, code):
    save(tmp_path / 'a.png')
    source = open_all(str(tmp_path), spec(tmp_path), 'likelihood.path')

    def fail(*_, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(regular, 'open', fail, raising=False)
    with pytest.raises(UnreadableImage, match=os.strerror(code)):
        source[0]


def test_too_many_open_files_are_not_the_fault_of_an_image(tmp_path, monkeypatch):
    save(tmp_path / 'a.png')
    source = open_all(str(tmp_path), spec(tmp_path), 'likelihood.path')

    def fail(*_, **options):
        raise OSError(errno.EMFILE, 'Too many open files')

    monkeypatch.setattr(regular, 'open', fail, raising=False)
    with pytest.raises(OSError, match='Too many open files') as error:
        source[0]
    assert not isinstance(error.value, ValueError)


def test_a_file_that_has_vanished_is_unreadable(tmp_path):
    save(tmp_path / 'a.png', tmp_path / 'b.png')
    source = open_all(str(tmp_path), spec(tmp_path), 'likelihood.path')
    (tmp_path / 'a.png').unlink()
    with pytest.raises(UnreadableImage, match=r'a\.png: No such file'):
        source[0]
    assert np.asarray(source[1]['image']).shape == (8, 8, 3)


def test_a_class_folder_with_the_name_of_an_image_is_a_folder(tmp_path):
    save(tmp_path / 'a.png' / '1.png', tmp_path / 'b.png' / 'deep.jpg' / '1.png')
    source = open_images(spec(tmp_path, num_classes=2), 'train')
    assert source.class_names == ('a.png', 'b.png') and len(source) == 2
    assert list_images(str(pathlib.Path(tmp_path / 'b.png'))).images == ['deep.jpg/1.png']


def test_messages_of_odd_names_have_one_line(tmp_path):
    assert '\n' not in str(UnreadableImage('a\nb.png', 'broken'))
    str(UnreadableImage(os.fsdecode(b'caf\xe9.png'), 'broken')).encode()
    save(tmp_path / 'a.png')
    Image.new('RGB', (9, 9)).save(tmp_path / 'b\nc.png')
    Image.new('RGB', (9, 9)).save(tmp_path / 'd\ne.png')
    source = open_native_size(str(tmp_path), 'evaluate.real')
    with pytest.raises(ValueError, match='all images of a set must have one size') as error:
        list(source)
    assert '\n' not in str(error.value)
    for name in ('a.png', 'b\nc.png', 'd\ne.png'):
        (tmp_path / name).write_bytes(b'broken')
    (tmp_path / 'a.png').rename(tmp_path / 'z\nz.png')
    with pytest.raises(JobError, match='none of the 3 examples can be read') as error:
        next(eval_batches(open_all(str(tmp_path), spec(tmp_path, on_error='skip'), 'likelihood.path'), batch_size=1))
    assert '\n' not in str(error.value)
