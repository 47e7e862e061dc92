"""Names of any character that a file system allows: read, listed, written, or refused before any work."""

import csv
import os
import pathlib
import tempfile

import numpy as np
import pytest
from etils import epath
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.defaults import image_spec
from vqvae2_jax import main
from vqvae2_jax.config.fields import ConfigError
from vqvae2_jax.config.loading import load_config
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.data.images import open_all, open_images, open_native_size
from vqvae2_jax.data.loader import eval_batches, read_skipped
from vqvae2_jax.io import files, names, record, remote
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import inpaint, likelihood
from vqvae2_jax.jobs.paths import check_paths
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run

_TOKENS = ['"', "'", '\n', '\r', '\t', '😀', '\u2028', '[a]', '[', ']', '*', '?', '-', '.', ' ', '~', '#', '%20', '\\']
_TOKENS += ['$HOME', '{x}', ',', ';', ':', '@3', 'gs:', '<b>', '&amp;', 'é', 'x' * 60]
_BYTES = st.one_of(st.sampled_from([os.fsencode(token) for token in _TOKENS]), st.binary(min_size=1, max_size=4))
_MAX = 246  # with a suffix 250


def _is_name(name: bytes) -> bool:
    return not set(name) & {0, ord('/')} and name not in (b'.', b'..')


# Names of files and folders, as Python holds them.
NAMES = st.lists(_BYTES, min_size=1, max_size=30).map(lambda parts: b''.join(parts)[:_MAX]).filter(_is_name)
NAMES = NAMES.map(os.fsdecode)
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
ODD = 'a "b" {c} %s #d @3,~e=f;g&h|i <j> $HOME 😀 \u2028(k)]x\nnew\tl:m !^`\''


def _spec(name, path, **fields):
    return image_spec(name, path, **{'image_size': (4, 4), 'channels': 3, **fields})


@PROPERTY
@given(NAMES, st.lists(NAMES, min_size=1, max_size=3, unique=True))
@example('a*', ['[a]', '?'])
@example('b\udce9', ['\udce9', '-rf', ' '])
def test_images_of_any_name_in_a_folder_of_any_name(folder, stems):
    with tempfile.TemporaryDirectory() as root:
        os.mkdir(f'{root}/{folder}')
        for number, stem in enumerate(stems):
            pixels = np.full((4, 4, 3), number, np.uint8)
            Image.fromarray(pixels).save(pathlib.Path(root, folder, f'{stem}.png'))
        visible = sorted(f'{stem}.png' for stem in stems if not stem.startswith('.'))
        for stem in stems:  # one file, hidden or not
            source = open_all(f'{root}/{folder}/{stem}.png', _spec('folder', root), 'inpaint.path')
            assert len(source) == 1 and source[0]['image'][0, 0, 0] == stems.index(stem)
        if not visible:
            return
        source = open_all(f'{root}/{folder}', _spec('folder', root), 'likelihood.path')
        assert [source.example_name(i) for i in range(len(source))] == [f'{root}/{folder}/{name}' for name in visible]
        assert [f'{stems[e["image"][0, 0, 0]]}.png' for e in source] == visible
        assert len(source.digest) == 64
        if not folder.startswith('.'):  # the folder as a class
            one = open_images(_spec('folder', root, num_classes=1, held_out=(0.0, 0.0)), 'train')
            assert one.class_names == (folder,) and len(one) == len(visible)


@PROPERTY
@given(NAMES, NAMES)
@example('[ab]', '*')
def test_arrays_of_any_name_in_a_folder_of_any_name(folder, stem):
    with tempfile.TemporaryDirectory() as root:
        os.makedirs(f'{root}/{folder}')
        pixels = np.arange(2 * 48, dtype=np.uint8).reshape(2, 4, 4, 3)
        path = f'{root}/{folder}/{stem}.npz'
        with open(path, 'wb') as file:
            np.savez(file, arr_0=pixels, label=[0, 1])
        np.savez(f'{root}/ab.npz', arr_0=255 - pixels)  # which a pattern might match
        fields = dict(num_classes=2, held_out=(0.0, 0.0))
        sources = [open_images(_spec('npz', path, **fields), 'train'), open_native_size(path, 'evaluate.real')]
        sources += [open_all(path, _spec('npz', path), 'likelihood.path')]
        if not stem.startswith('.'):
            sources += [open_images(_spec('npz', f'{root}/{folder}', **fields), 'train')]
        for source in sources:
            assert len(source) == 2 and source.dataset.example_name(1) == f'{path}[1]'
            assert {e['image'].tobytes() for e in source} == {image.tobytes() for image in pixels}


@PROPERTY
@given(st.lists(NAMES, min_size=1, max_size=4, unique=True))
@example(['a\rb', 'a\nb', 'a"b,c', '\udce9'])
def test_names_pass_through_lists_and_tables(stems):
    with tempfile.TemporaryDirectory() as root:
        rows = [(f'{root}/{stem}', 1.25, 2.5, 3.75) for stem in stems]
        pathlib.Path(root, 'images.csv').write_bytes(likelihood.format_csv(('bottom', 'top'), rows))
        with open(f'{root}/images.csv', encoding='utf-8', errors='surrogateescape', newline='') as file:
            found = [(row['image'], *map(float, list(row.values())[1:])) for row in csv.DictReader(file)]
        assert found == rows
        lines = b''.join(names.to_line(stem) + b'\n' for stem in stems)
        pathlib.Path(root, 'skipped.txt').write_bytes(lines)
        assert lines.count(b'\n') == len(stems) and read_skipped(f'{root}/skipped.txt') == sorted(stems)
        files.write_json(f'{root}/record.json', {'names': stems})
        assert files.read_json(f'{root}/record.json') == {'names': stems}
        for number, stem in enumerate(stems):
            name = inpaint.output_name(number, f'{root}/{stem}.png')
            assert name.startswith(f'{number:04d}-') and name.isprintable() and len(name.encode()) <= 250
            files.write_bytes(f'{root}/{name}.png', b'x')
            text = names.printable(stem)
            assert text.isprintable() and text.encode()


@PROPERTY
@given(NAMES)
@example('[a]')
@example('~')
@example('é' * 123)
def test_a_path_that_exists_names_itself(name):
    with tempfile.TemporaryDirectory() as root:
        root = os.path.realpath(root)
        for other in 'ab':
            pathlib.Path(root, other).touch()
        path = f'{root}/{name}'
        files.write_bytes(path, b'x')
        assert set(os.listdir(root)) == {'a', 'b', name}  # no other name is left
        assert remote.expand(path) == [path] and os.fspath(remote.absolute(path)) == path
        assert len(os.fsencode(names.shorten(name, 100))) <= 100 and len(os.fsencode(names.safe(name))) <= 200


def test_long_names_are_cut_and_stay_apart():
    long = ['é' * 120 + end for end in 'ab']
    assert names.shorten('é' * 100) == 'é' * 100
    short = {names.shorten(name) for name in long}
    assert len(short) == 2 and all(len(name.encode()) <= 200 for name in short)


def test_unreadable_images_of_odd_names_are_listed(tmp_path):
    for stem in ('\udce9', 'a\nb\\c'):
        (tmp_path / f'{stem}.png').write_bytes(b'no image')
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / 'good.png')
    source = open_all(str(tmp_path), _spec('folder', tmp_path, on_error='skip'), 'likelihood.path')
    log = str(tmp_path / 'skipped.txt')
    assert len(list(eval_batches(source, batch_size=3, skip_log=log))) == 1
    assert read_skipped(log) == sorted(f'{tmp_path}/{stem}.png' for stem in ('\udce9', 'a\nb\\c'))
    with pytest.raises(ValueError, match=r'cannot read the image .*a\\nb') as error:
        open_all(f'{tmp_path}/a\nb\\c.png', _spec('folder', tmp_path), 'inpaint.path')[0]
    assert '\n' not in str(error.value)


def test_a_prepared_dataset_is_not_read_from_a_folder_that_is_not_utf8(config):
    config.data.update(name='mnist', path='/b\udce9')
    with pytest.raises(ConfigError, match=r"data\.path is '/b\\udce9'; it must be in UTF-8"):
        validate_config(config)


class TestHome:
    def test_it_is_expanded_in_every_path(self, config, tmp_path, monkeypatch):
        monkeypatch.setenv('HOME', str(tmp_path))
        fields = [('evaluate', 'real'), ('evaluate', 'generated'), ('evaluate', 'inception'), ('inpaint', 'path')]
        fields += [('data', 'path'), ('inpaint', 'mask'), ('likelihood', 'path'), ('reject', 'classifier')]
        config.data.name = 'npz'
        for section, name in fields:
            config[section][name] = '~/x'
        validate_config(config)
        assert {config[section][name] for section, name in fields} == {f'{tmp_path}/x'}

    def test_workdir_and_config(self, config, tmp_path, monkeypatch):
        monkeypatch.setenv('HOME', str(tmp_path))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(main, '_WORKDIR', type('Flag', (), {'value': '~/runs/x'}))
        assert main._workdir(config) == epath.Path(tmp_path) / 'runs' / 'x'
        assert Run(config, '~/runs/x').workdir == epath.Path(tmp_path) / 'runs' / 'x'
        (tmp_path / 'a:b').mkdir()
        (tmp_path / 'a:b' / 'c.py').write_text(
            'from vqvae2_jax.config import base\n'
            'def get_config(name="plain"):\n    config = base.get_config()\n    config.name = name\n    return config\n'
        )
        assert load_config('~/a:b/c.py').name == 'plain' and load_config('~/a:b/c.py:given').name == 'given'
        assert os.listdir(tmp_path) == ['a:b']

    def test_no_such_home(self, config, monkeypatch):
        config.inpaint.path = '~nobody-at-all/x'
        with pytest.raises(ConfigError, match=r'inpaint\.path is .*no such home folder: write \./~nobody-at-all/x'):
            validate_config(config)
        monkeypatch.setattr(main, '_WORKDIR', type('Flag', (), {'value': '~nobody-at-all/x'}))
        with pytest.raises(ConfigError, match='--workdir is .*~nobody'):
            main._workdir(config)


class TestWorkdir:
    @pytest.mark.parametrize(
        'name, reason',
        [
            ('a[b]c', r"'\[b\]' has a special meaning"),
            ('run*', r"'\*' has a special meaning"),
            ('run?', r"'\?' has a special meaning"),
            ('a\\b', r"'\\' has a special meaning"),
            ('gs:/x', "'gs:' has a special meaning"),
            ('b\udce9', 'the byte 0xe9 in it is not UTF-8'),
            ('x' * 256, 'File name too long'),
            ('/'.join(['x' * 99] * 36), r'it has 3\d\d\d bytes, more than 3500'),
            ('file', 'it is no directory'),
            ('file/below', 'Not a directory'),
            ('loop/below', 'Too many levels of symbolic links'),
        ],
    )
    def test_names_that_cannot_work_are_refused(self, config, tmp_path, name, reason):
        (tmp_path / 'file').touch()
        (tmp_path / 'loop').symlink_to('loop')
        with pytest.raises(JobError, match=rf'^--workdir=.*: {reason}.*: give another --workdir$') as error:
            run_job(Run(config, tmp_path / name), 'vqvae')
        assert '\n' not in str(error.value)
        assert sorted(os.listdir(tmp_path)) == ['file', 'loop']

    @pytest.mark.parametrize('name', [ODD, 'a[', 'a]b[', '-x', ' ', '~', 'é' * 127, 'gs:x'])
    def test_other_names_are_not(self, config, tmp_path, name):
        check_paths(config, epath.Path(tmp_path) / name, 'vqvae')

    def test_data_that_hold_the_workdir_are_refused(self, config, tmp_path):
        (tmp_path / 'data' / 'train').mkdir(parents=True)
        (tmp_path / 'link').symlink_to(tmp_path / 'data')
        workdir = epath.Path(tmp_path) / 'data' / 'runs' / 'x'
        for path in (tmp_path / 'data', tmp_path / 'link'):
            config.data.update(name='folder', path=str(path))
            with pytest.raises(JobError, match=rf'data\.path={path} holds the workdir .*give a --workdir outside'):
                check_paths(config, workdir, 'vqvae')
            check_paths(config, workdir, 'plan')
        config.data.splits = ('train', 'train', 'train')  # a run beside the splits is not below them
        check_paths(config, workdir, 'vqvae')
        with pytest.raises(JobError, match=r'data\.path/train=.*train holds the workdir'):
            check_paths(config, epath.Path(tmp_path) / 'data' / 'train' / 'run', 'vqvae')
        for section, field in (('likelihood', 'path'), ('inpaint', 'path'), ('evaluate', 'real')):
            other = config.copy_and_resolve_references()
            other.data.update(name='fashion', path='', splits=())
            other[section][field] = str(tmp_path)
            with pytest.raises(JobError, match=rf'{section}\.{field}={tmp_path} holds the workdir'):
                check_paths(other, workdir, 'evaluate')

    def test_inpaint_does_not_read_what_it_writes(self, config, tmp_path):
        config.inpaint.path = str(tmp_path / 'run' / 'inpaint')
        with pytest.raises(JobError, match=r'inpaint\.path=.* lies in .*inpaint, where this job writes'):
            check_paths(config, epath.Path(tmp_path) / 'run', 'inpaint')


class TestPatterns:
    @pytest.fixture
    def parts(self, tmp_path):
        for number in range(2):
            np.savez(tmp_path / f'p{number}.npz', arr_0=np.full((3, 4, 4, 3), number, np.uint8))
        return tmp_path

    def test_only_in_the_fields_that_say_so(self, parts):
        assert len(open_native_size(f'{parts}/p*.npz', 'evaluate.generated')) == 6
        message = r'there is no file .*p\*\.npz.*: give a folder to join its \.npz files'
        with pytest.raises(FileNotFoundError, match=rf'data\.path: {message}'):
            open_images(_spec('npz', f'{parts}/p*.npz'), 'train')
        with pytest.raises(FileNotFoundError, match=rf'likelihood\.path: {message}'):
            open_all(f'{parts}/p*.npz', _spec('npz', 'x'), 'likelihood.path')
        assert len(open_images(_spec('npz', parts, held_out=(0.0, 0.0)), 'train')) == 6  # as advised

    def test_a_file_of_that_name_is_taken(self, parts):
        np.savez(parts / 'p*.npz', arr_0=np.full((1, 4, 4, 3), 9, np.uint8))
        for source in (
            open_native_size(f'{parts}/p*.npz', 'evaluate.generated'),
            open_images(_spec('npz', f'{parts}/p*.npz', held_out=(0.0, 0.0)), 'train'),
        ):
            assert len(source) == 1 and source[0]['image'][0, 0, 0] == 9


class TestOutputsAsData:
    @pytest.fixture
    def workdir(self, tmp_path):
        """A folder of samples and one of a training, as jobs leave them."""
        for name, job in (('samples/default', 'sample'), ('vqvae', 'vqvae'), ('rejection/default', 'reject')):
            directory = epath.Path(tmp_path) / 'run' / name
            record.open_output(directory, job, {}, {}).finish({})
            Image.new('RGB', (40, 40)).save(directory / 'picture.png')
        images = np.zeros((3, 4, 4, 3), np.uint8)
        np.savez(tmp_path / 'run/samples/default/samples-0-3.npz', arr_0=images, label=[0, 1, 1])
        np.savez(tmp_path / 'run/rejection/default/scores.npz', score=np.zeros(3))
        np.savez(tmp_path / 'run/rejection/default/accepted.npz', arr_0=images[:2], label=[0, 1])
        return tmp_path / 'run'

    @pytest.mark.parametrize('name, count', [('samples', 3), ('rejection', 2)])
    def test_the_arrays_of_a_set_are_taken(self, workdir, capsys, name, count):
        path = f'{workdir}/{name}/default'
        assert len(open_native_size(path, 'evaluate.generated')) == count
        assert f"evaluate.generated: a job wrote '{path}'; the images are those of its .npz" in capsys.readouterr().out
        assert len(open_all(path, _spec('folder', 'x'), 'inpaint.path')) == count
        assert len(open_images(_spec('npz', path, num_classes=2, held_out=(0.0, 0.0)), 'train')) == count

    def test_pictures_are_refused(self, workdir, tmp_path):
        (tmp_path / 'data').mkdir()
        Image.new('RGB', (4, 4)).save(tmp_path / 'data' / 'own.png')
        (tmp_path / 'data' / 'link').symlink_to(workdir / 'samples')
        for path in (workdir / 'samples' / 'default', workdir, tmp_path / 'data'):
            with pytest.raises(ValueError, match='data.path: .*was written by --job=.*, and its pictures are no data'):
                open_images(_spec('folder', path), 'train')
        with pytest.raises(ValueError, match='or for its .npz files this folder itself with --config.data.name=npz'):
            open_images(_spec('folder', workdir / 'samples'), 'train')
        with pytest.raises(ValueError, match='written by --job=vqvae of this package, .* give a folder without it.$'):
            open_native_size(str(workdir / 'vqvae'), 'evaluate.real')

    def test_another_record_is_none_of_ours(self, tmp_path):
        for content in ('{"name": "mine"}', '[]', 'text', '[' * 100_000):
            (tmp_path / 'record.json').write_text(content)
            Image.new('RGB', (4, 4)).save(tmp_path / 'own.png')
            assert len(open_native_size(str(tmp_path), 'evaluate.real')) == 1


@pytest.mark.system
def test_odd_names_in_every_job(finished, config, tmp_path):
    """A workdir, a folder of data, its classes and its images of odd names."""
    rng = np.random.default_rng(0)
    data = tmp_path / f'[d]*\udce9 {ODD}'
    # Sizes are those of the finished pipeline, whose compiled programs serve here too.
    for name in ('\udce9t\udce9', '<script>alert("x")', 'a\nb[c]*?\\', *'0123456'):
        (data / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 255, (28, 28), np.uint8)
            Image.fromarray(pixels).save(data / name / f'{number}"\n\udce9{"é" * 110}.png')
    config.data.update(name='folder', path=str(data), num_classes=10, held_out=(0.25, 0.25))
    config.inpaint.update(path=str(data), mask='0.5,0,1,1', label=0, count=2)
    config.likelihood.path = str(data)
    validate_config(config)
    run = Run(config, tmp_path / ODD)
    for job in ('vqvae', 'extract_codes', 'prior', 'likelihood', 'inpaint'):
        run_job(run, job)
    assert run.codes('train').class_names == tuple(sorted(path.name for path in data.iterdir()))
    written = sorted(path.name for path in run.path('inpaint').iterdir() if path.name.endswith('.npz'))
    assert len(written) == 40 and written[0].startswith('0000-')
    (table,) = run.path('likelihood').iterdir()
    with open(table / 'images.csv', encoding='utf-8', errors='surrogateescape', newline='') as file:
        assert len({row['image'] for row in csv.DictReader(file) if os.path.isfile(row['image'])}) == 40
    assert set(os.listdir(tmp_path)) == {data.name, ODD}
