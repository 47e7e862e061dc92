"""Images on gs://, s3:// and hf:// are those of the same files on a disk, and are requested one by one."""

import contextlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests import fake_gcs, fake_hub, fake_s3
from tests.defaults import image_spec
from tests.test_decode import encoded
from vqvae2_jax import main
from vqvae2_jax.data import folder, remote_folder
from vqvae2_jax.data.decode import UnreadableImage
from vqvae2_jax.data.images import SPLITS, open_all, open_images, open_native_size
from vqvae2_jax.data.loader import eval_batches, train_batches
from vqvae2_jax.io import record, remote, state_dict
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs.inpaint import read_mask

LIBRARIES = {'gs': 'gcsfs', 's3': 's3fs', 'hf': 'huggingface_hub'}


class Store:
    """A place for files on a stand-in: `url` is its address, `reads` the sizes of the contents that it has sent."""

    def __init__(self, url, server):
        self.url, self.server, self.files = url, server, {}

    @property
    def reads(self):
        return self.server.reads

    def put(self, files):
        """Adds or replaces files, {name: bytes}."""
        self.files |= files
        if isinstance(self.server, fake_hub.FakeHub):
            self.server.commit(dict(self.files))
        elif isinstance(self.server, fake_s3.FakeS3):
            self.server.objects |= files
        else:
            generation = next(self.server.numbers)
            self.server.objects |= {name: (data, generation) for name, data in files.items()}

    def delete(self, name):
        del self.server.objects[name]


@contextlib.contextmanager
def open_store(scheme, home):
    pytest.importorskip(LIBRARIES[scheme])
    if scheme == 'hf':
        with fake_hub.serve(home) as server:
            yield Store('hf://datasets/owner/images', server)
    else:
        with (fake_gcs if scheme == 'gs' else fake_s3).serve() as server:
            yield Store(f'{scheme}://bucket', server)


@pytest.fixture(params=['gs', 's3', 'hf'])
def store(request, tmp_path):
    """A new store for every test, without listings and printed lines of another one."""
    remote_folder.open_remote_folder.cache_clear()
    folder._print_once.cache_clear()
    with open_store(request.param, tmp_path / 'hub') as found:
        yield found


def png(number, size=(8, 8)):
    return encoded(Image.new('RGB', size, (number, 255 - number, 7)))


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def spec(name, path, **fields):
    return image_spec(name, path, **{'image_size': (8, 8), 'channels': 3, 'num_classes': 2, **fields})


def examples(source):
    return [{key: np.asarray(value).tolist() for key, value in source[i].items()} for i in range(len(source))]


# --- folders ----------------------------------------------------------------------------------------------------------

CLASSES = {f'{split}/{name}/{i}.png': png(16 * i + number + 8 * (split == 'train'))
           for split in ('train', 'val') for number, name in enumerate(('cat', 'dog')) for i in range(6)}  # fmt: skip
MESS = {
    'train/dog/deep/er/9.PNG': png(200),
    'train/dog/notes.txt': b'text',
    'train/cat/@eaDir/1.png': png(1),
    'train/cat/.hidden.png': png(1),
    'train/.hidden/1.png': png(1),
    'train/__MACOSX/1.png': png(1),
    'train/cat/empty.png/notes': b'text',
    'train/cat/full.png/1.png': png(201),
    'val/cat/README': b'text',
}


@pytest.mark.parametrize('cache_bytes', [0, 10**6])
def test_a_folder_is_read_where_it_is(store, tmp_path, capsys, cache_bytes):
    files = CLASSES | MESS
    write(tmp_path / 'data', files)
    store.put(
        {f'data/{name}': data for name, data in files.items()} | {'data2/x.png': png(3), 'data/val2/y.png': png(4)}
    )
    splits = {'splits': ('train', 'val', 'val'), 'on_error': 'skip'}
    for fields in (splits, splits | {'num_classes': 0}):
        for split in ('train', 'validation'):
            here = open_images(spec('folder', tmp_path / 'data', **fields), split)
            notes = capsys.readouterr().out.replace(str(tmp_path / 'data'), '')
            there = open_images(spec('folder', f'{store.url}/data', cache_bytes=cache_bytes, **fields), split)
            assert capsys.readouterr().out.replace(f'{store.url}/data', '') == notes
            assert there.digest == here.digest and there.class_names == here.class_names
            assert there.dataset.files == here.dataset.files
            assert there.example_name(0) == here.example_name(0).replace(str(tmp_path), store.url)
            lengths = [[s.dataset.content_length(i) for i in range(len(s))] for s in (here, there)]
            if split == 'train':  # 'empty.png' is a folder
                lengths = [[n for n in found if n] for found in lengths]
            assert lengths[0] == lengths[1]
            batches = [list(eval_batches(source, batch_size=5)) for source in (here, there)]
            for ours, theirs in zip(*batches, strict=True):
                for name in ours:
                    np.testing.assert_array_equal(ours[name], theirs[name])
    images = sum(len(data) for name, data in files.items() if name in CLASSES)
    assert sum(store.reads) < 2 * images if cache_bytes else sum(store.reads) > 2 * images


def test_only_the_images_that_are_read_are_requested_and_some_are_kept(store, tmp_path):
    files = {f'cat/{i}.png': png(i) for i in range(10)}
    store.put(files)
    limit = sum(len(files[f'cat/{i}.png']) for i in range(4))
    fields = {'num_classes': 1, 'held_out': (0.0, 0.0), 'cache_bytes': limit}
    source = open_images(spec('folder', store.url, **fields), 'train')
    assert source.is_remote and not store.reads
    by_file = {source.dataset.files[index]: i for i, index in enumerate(source.indices)}
    source[by_file['cat/1.png']], source[by_file['cat/7.png']]
    assert sorted(store.reads) == sorted(len(files[f'cat/{i}.png']) for i in (1, 7))
    store.reads.clear()
    copy = pickle.loads(pickle.dumps(source))  # as a worker process has it
    for each in (source, copy):
        assert each[by_file['cat/1.png']]['image'][0, 0, 0] == 1
    assert not store.reads
    assert [int(copy[by_file[f'cat/{i}.png']]['image'][0, 0, 0]) for i in range(10)] == list(range(10))
    assert len(store.reads) == 9
    store.reads.clear()
    examples(copy)
    assert len(store.reads) == 6  # the first four are kept


def test_the_loader_reads_remote_images_in_the_same_order(store, tmp_path):
    files = {f'{name}/{i}.png': png(2 * i + n) for n, name in enumerate(('cat', 'dog')) for i in range(12)}
    write(tmp_path / 'data', files)
    store.put(files)
    options = dict(batch_size=8, seed=3, flip=True, crop=True, rows=[1, 2, 5])
    batches = [
        train_batches(open_images(spec('folder', path, cache_bytes=500), 'train'), **options)
        for path in (tmp_path / 'data', store.url)
    ]
    for _ in range(6):  # two epochs
        here, there = (next(each) for each in batches)
        for name in here:
            np.testing.assert_array_equal(here[name], there[name])
    for each in batches:
        each.close()


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['gs', 's3', 'hf'])
def test_worker_processes_read_remote_images(scheme, tmp_path):
    with open_store(scheme, tmp_path / 'hub') as found:
        found.put({f'{name}/{i}.png': png(2 * i + n) for n, name in enumerate(('cat', 'dog')) for i in range(6)})
        source = open_images(spec('folder', found.url, cache_bytes=10**6), 'train')
        here, there = (train_batches(source, batch_size=4, seed=0, workers=workers) for workers in (0, 1))
        for _ in range(3):
            np.testing.assert_array_equal(next(here)['image'], next(there)['image'])
        here.close()
        there.close()


@pytest.mark.parametrize('store', ['gs', 's3'], indirect=True)
def test_images_that_were_replaced_or_deleted_are_unreadable(store):
    store.put({f'cat/{i}.png': png(i) for i in range(6)})
    fields = {'num_classes': 1, 'held_out': (0.0, 0.0), 'on_error': 'skip', 'cache_bytes': 0}
    source = open_images(spec('folder', store.url, **fields), 'train')
    store.put({'cat/1.png': png(100)})
    store.delete('cat/2.png')
    for number in (1, 2):
        index = source.dataset.files.index(f'cat/{number}.png')
        with pytest.raises(UnreadableImage, match=rf'bucket/cat/{number}\.png: it was deleted or replaced after'):
            source.dataset.read(index, 3)
    assert sum(batch['mask'].sum() for batch in eval_batches(source, batch_size=3)) == 4


def test_an_image_of_a_later_commit_is_not_taken_for_the_listed_one(tmp_path):
    with open_store('hf', tmp_path / 'hub') as store:
        store.put({f'cat/{i}.png': png(i) for i in range(3)})
        fields = {'num_classes': 1, 'held_out': (0.0, 0.0), 'cache_bytes': 0}
        source = open_images(spec('folder', store.url, **fields), 'train')
        store.put({f'cat/{i}.png': png(100 + i) for i in range(3)})
        assert {int(source[i]['image'][0, 0, 0]) for i in range(3)} == {0, 1, 2}
        first = list(store.server.commits)[0]
        again = open_images(spec('folder', f'{store.url}@{first}', **fields), 'train')
        assert {int(again[i]['image'][0, 0, 0]) for i in range(3)} == {0, 1, 2}


def test_a_store_that_fails_stops_the_job(store, monkeypatch):
    """It is not an unreadable image, which data.on_error=skip leaves out."""
    store.put({f'cat/{i}.png': png(i) for i in range(3)})
    fields = {'num_classes': 1, 'held_out': (0.0, 0.0), 'on_error': 'skip', 'cache_bytes': 0}
    source = open_images(spec('folder', store.url, **fields), 'train')

    def fail(*_):
        raise ConnectionError('no route')

    monkeypatch.setattr(remote, '_READERS', dict.fromkeys(LIBRARIES, fail))
    with pytest.raises(JobError, match=r'cat/\d\.png cannot be read: no route\. .*the same command continues'):
        list(eval_batches(source, batch_size=3))
    monkeypatch.setattr(remote, '_READERS', dict.fromkeys(LIBRARIES, lambda *_: b'few'))
    with pytest.raises(JobError, match=r'the store answered 3 bytes instead of \d+'):
        source[0]


def test_errors_of_remote_folders(store):
    store.put({'data/cat/1.png': png(1), 'data/dog/x.txt': b'', 'data/owl/1.gif': png(2), 'file.png': png(1)})
    with pytest.raises(FileNotFoundError, match=f'data.path: there is nothing at {store.url}.*/none'):
        open_images(spec('folder', f'{store.url}/none'), 'train')
    with pytest.raises(FileNotFoundError, match=r"data.path: '.*/file\.png' is a file, not a folder"):
        open_images(spec('folder', f'{store.url}/file.png'), 'train')
    with pytest.raises(ValueError, match=r"class folders of '.*/data' without images: 'dog' \(only 1 \.txt\)"):
        open_images(spec('folder', f'{store.url}/data'), 'train')
    with pytest.raises(FileNotFoundError, match=r"data.splits names 'train', but '.*/data' has 'cat', 'dog', 'owl'"):
        open_images(spec('folder', f'{store.url}/data', splits=('train', 'val', 'val')), 'train')
    with pytest.raises(FileNotFoundError, match='data.path: .*nowhere.* (no such bucket|cannot be reached)'):
        open_images(spec('folder', store.url.replace('bucket', 'nowhere').replace('owner', 'nowhere')), 'train')


def test_outputs_of_a_job_are_no_images_and_its_arrays_are(store, tmp_path):
    arrays = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    output = record.open_output(tmp_path / 'samples' / 'x', 'sample', {}, {})
    (tmp_path / 'samples' / 'x').mkdir(parents=True, exist_ok=True)
    np.savez(tmp_path / 'samples' / 'x' / 'samples-0-4.npz', arr_0=arrays)
    output.finish({'count': 4})
    files = {p.name: p.read_bytes() for p in (tmp_path / 'samples' / 'x').iterdir() if p.name != '.lock'}
    store.put({f'run/x/{name}': data for name, data in files.items()} | {'run/x/a.png': png(1), 'run/y/b.png': png(2)})
    with pytest.raises(ValueError, match=r"run/x' was written by --job=sample of this package"):
        open_images(spec('folder', f'{store.url}/run', num_classes=0), 'train')
    found = open_native_size(f'{store.url}/run/x', 'evaluate.real')
    assert {found[i]['image'].tobytes() for i in range(4)} == {image.tobytes() for image in arrays}
    one = open_all(f'{store.url}/run/y/b.png', spec('folder', 'x'), 'inpaint.path')
    assert len(one) == 1 and one[0]['image'][0, 0, 0] == 2 and one.example_name(0).endswith('/run/y/b.png')
    mask = encoded(Image.fromarray(np.repeat(np.uint8([0, 255]), 32).reshape(8, 8)))
    store.put({'mask.png': mask, 'weights_1.npz': files['samples-0-4.npz']})
    assert read_mask(f'{store.url}/mask.png', (8, 8)).sum() == 32
    np.testing.assert_array_equal(state_dict.read(f'{store.url}/weights*.npz', pattern=True)['arr_0'], arrays)
    with pytest.raises(FileNotFoundError, match='there is nothing at'):
        state_dict.read(f'{store.url}/none.npz')


# --- addresses --------------------------------------------------------------------------------------------------------


def test_a_workdir_is_local_or_on_gs(store, config, monkeypatch):
    monkeypatch.setattr(main, '_WORKDIR', type('Flag', (), {'value': f'{store.url}/run'}))
    if store.url.startswith('gs'):
        assert main._workdir(config) == remote.absolute(f'{store.url}/run')
        return
    with pytest.raises(
        JobError, match=f'--workdir={store.url}/run: a workdir, and all that is written, is local or on gs://'
    ):
        main._workdir(config)
    with pytest.raises(ValueError, match='a workdir, and all that is written, is local or on gs://'):
        remote.absolute(f'{store.url}/run')


def test_a_missing_library_is_named():
    program = """
import sys
sys.modules |= dict.fromkeys(('gcsfs', 's3fs', 'huggingface_hub', 'datasets'))  # makes their import fail
from tests.defaults import image_spec
from vqvae2_jax.data.images import open_images
from vqvae2_jax.io import remote
for scheme, package in (('gs', 'gcsfs'), ('s3', 's3fs'), ('hf', 'huggingface_hub')):
    try:
        remote.check(f'{scheme}://bucket/x')
    except ValueError as error:
        assert str(error).endswith(f': pip install {package}') and '\\n' not in str(error), error
    else:
        raise AssertionError(scheme)
try:
    open_images(image_spec('huggingface', '.'), 'train')
except ImportError as error:
    assert str(error).endswith(': pip install datasets') and '\\n' not in str(error), error
else:
    raise AssertionError('no error')
"""
    subprocess.run([sys.executable, '-c', program], check=True, timeout=120)


def test_splits_of_a_remote_set_are_those_of_a_local_one(store, tmp_path):
    files = {f'{name}/{i}.png': png(20 * n + i) for n, name in enumerate(('cat', 'dog')) for i in range(8)}
    write(tmp_path / 'data', files)
    np.savez(tmp_path / 'a.npz', arr_0=np.arange(192 * 9, dtype=np.uint8).reshape(9, 8, 8, 3), label=np.arange(9) % 2)
    store.put({f'data/{name}': data for name, data in files.items()} | {'a.npz': (tmp_path / 'a.npz').read_bytes()})
    for name, path in (('folder', 'data'), ('npz', 'a.npz')):
        fields = {'held_out': (0.3, 0.2)}
        for split in SPLITS:
            ours, theirs = (
                open_images(spec(name, where, **fields), split) for where in (tmp_path / path, f'{store.url}/{path}')
            )
            assert ours.digest == theirs.digest and examples(ours) == examples(theirs)
