"""Records of ArrayRecord files on gs://, s3:// and hf:// are those of local files, and are requested one by one."""

import dataclasses
import importlib.util
import os
import pathlib
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from benchmarks.input import write_dataset
from tests.defaults import image_spec
from tests.test_decode import encoded
from tests.test_remote_data import LIBRARIES, open_store
from vqvae2_jax.data import codes, inspection, remote_records
from vqvae2_jax.data.images import SPLITS, open_images
from vqvae2_jax.data.loader import eval_batches, train_batches
from vqvae2_jax.data.remote_records import RemoteRecords, RemoteShard, open_records
from vqvae2_jax.io import record, remote
from vqvae2_jax.io.record import JobError


@pytest.fixture(scope='module', params=list(LIBRARIES))
def store(request, tmp_path_factory):
    with open_store(request.param, tmp_path_factory.mktemp('hub')) as found:
        yield found


@pytest.fixture
def s3():
    with open_store('s3', '') as found:
        yield found


class Memory:
    """Files of this process in place of those of a store, for tests that read much."""

    def __init__(self):
        self.files = {}

    def read(self, file, start, stop):
        assert len(self.files[file.path]) == file.size
        return self.files[file.path][start:stop]

    def shard(self, data, name=''):
        self.files[name] = data
        return RemoteShard(remote.RemoteFile(name, len(data), ''))


@pytest.fixture
def memory(monkeypatch):
    memory = Memory()
    monkeypatch.setattr(remote, 'read', memory.read)
    return memory


def write(path, records, options='group_size:1'):
    writer = ArrayRecordWriter(str(path), options)
    for each in records:
        writer.write(each)
    writer.close()
    return path.read_bytes()


def random_records(count, low, high, seed=0):
    """Half of every record is random, half of it can be compressed."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(low, high, count).tolist()
    return [rng.bytes(size // 2) + bytes(size - size // 2) for size in sizes]


def shard(store, name, data):
    """Puts a file on the store, and opens it there."""
    store.put({name: data})
    return RemoteShard(remote.list_files(f'{store.url}/{name}')[0])


# --- the format -------------------------------------------------------------------------------------------------------

OPTIONS = ['', 'zstd:1', 'zstd:19', 'brotli:5', 'snappy', 'uncompressed', 'transpose', 'pad_to_block_boundary']


@pytest.mark.parametrize('group', [1, 4])
@pytest.mark.parametrize('option', OPTIONS)
def test_every_record_of_every_kind_of_file(memory, tmp_path, group, option):
    options = ','.join(filter(None, (f'group_size:{group}', option)))
    for count, low, high in ((1, 1, 2), (0, 1, 2), (50, 0, 40), (7, 20_000, 200_000), (900, 1, 900)):
        records = random_records(count, low, high)
        found = memory.shard(write(tmp_path / 'x', records, options))
        assert found.count() == count
        order = np.random.default_rng(1).permutation(count).tolist()
        assert [found.read(i) for i in order] == [records[i] for i in order]


def test_a_record_is_one_request_of_its_own_bytes(store, tmp_path):
    records = random_records(60, 10_000, 90_000)
    data = write(tmp_path / 'x', records)
    found = shard(store, 'own/x', data)
    assert found.read(7) == records[7]
    postscript, footer, chunk = store.reads[-3:]
    assert postscript <= 512 and footer < 2**16 + 5000
    for each in (found, pickle.loads(pickle.dumps(found))):
        store.reads.clear()
        with ThreadPoolExecutor(16) as pool:
            order = np.random.default_rng(2).permutation(60).tolist() * 2
            assert list(pool.map(each.read, order)) == [records[i] for i in order]
        footers = 0 if each is found else 2
        assert len(store.reads) == 120 + footers
        assert sum(sorted(store.reads)[footers:]) < 1.05 * sum(map(len, records))  # half of a record is zeros
    assert chunk < 2 * len(records[7])


def test_files_that_are_open_are_few(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_records, '_MAX_OPEN', 3)
    monkeypatch.setattr(remote_records, '_open', type(remote_records._open)())
    records = random_records(5, 10, 20)
    data = write(tmp_path / 'x', records)
    shards = [memory.shard(data, f'few/{i}') for i in range(8)]
    before = len(list(pathlib.Path('/proc/self/fd').iterdir()))
    with ThreadPoolExecutor(8) as pool:
        for position in range(5):
            assert set(pool.map(lambda each: each.read(position), shards)) == {records[position]}  # noqa: B023
    assert len(remote_records._open) == 3
    assert len(list(pathlib.Path('/proc/self/fd').iterdir())) <= before + 2 * 3 + 1


def test_records_that_were_read_take_no_memory(memory, tmp_path):
    records = random_records(30, 50_000, 90_000)
    found = memory.shard(write(tmp_path / 'x', records))
    for position in range(30):
        found.read(position)
    held = os.fstat(remote_records._open[found]._file).st_blocks * 512
    assert held < 10_000 < sum(map(len, records))


def test_records_of_several_files(s3, tmp_path):
    parts, expected = [], []
    for number, (count, start, stop) in enumerate([(5, 0, 5), (9, 2, 7), (3, 3, 3), (4, 0, 1)]):
        records = random_records(count, 10, 400, seed=number)
        parts.append((shard(s3, f'several/{number}', write(tmp_path / 'x', records)).file, start, stop))
        expected += records[start:stop]
    whole = [(file, 0, None) for file, _, _ in parts]
    for cache_bytes, kind in ((0, RemoteRecords), (10**9, ArrayRecordDataSource)):
        found = open_records(parts, cache_bytes)
        assert isinstance(found, kind) and len(found) == len(expected)
        assert [pickle.loads(pickle.dumps(found))[i] for i in range(len(found))] == expected
        assert len(open_records(whole, cache_bytes)) == 5 + 9 + 3 + 4
    with pytest.raises(IndexError):
        open_records(parts, 0)[len(expected)]


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :]


def test_damage_of_a_record_is_found_and_leaves_the_others(memory, tmp_path):
    records = random_records(20, 2000, 9000)
    data = write(tmp_path / 'x', records)
    whole = memory.shard(data)
    whole.count()
    for chunk in (0, 7, 19):
        start, stop = whole._footer.offsets[chunk : chunk + 2].tolist()
        for position in (start + 1, start + 30, (start + stop) // 2):
            damaged = memory.shard(flip(data, position))
            for number in (chunk, (chunk + 1) % 20):
                if number == chunk:
                    with pytest.raises(RuntimeError):
                        damaged.read(number)
                else:
                    assert damaged.read(number) == records[number]


def test_damage_of_a_footer_is_found_where_the_library_finds_it(memory, tmp_path):
    data = write(tmp_path / 'x', random_records(200, 20, 50))
    whole = memory.shard(data)
    whole.count()
    begin = int(whole._footer.offsets[-1])
    places = [*range(begin, begin + 1100, 25), *range(len(data) - 2**16, len(data) - 2**16 + 140, 3)]
    refused = 0
    for place in places:
        (tmp_path / 'x').write_bytes(flip(data, place))
        try:
            ArrayRecordReader(str(tmp_path / 'x')).read([5])
        except RuntimeError:
            refused += 1
            with pytest.raises(RuntimeError):
                memory.shard(flip(data, place)).count()
        else:
            memory.shard(flip(data, place)).read(5)
    assert refused > 50
    for other in (b'', b'text', bytes(2**17), data[: -(2**16)], data[2**16 :], np.random.default_rng(0).bytes(2**18)):
        with pytest.raises(RuntimeError, match='other'):
            memory.shard(other, 'other').count()


@pytest.mark.parametrize('name', ['gs', 's3'])
def test_a_file_that_was_replaced_or_deleted_stops_the_job(tmp_path, name):
    with open_store(name, '') as store:
        records = random_records(9, 100, 300)
        found = shard(store, 'x', write(tmp_path / 'x', records))
        assert found.read(3) == records[3]
        store.put({'x': write(tmp_path / 'y', random_records(9, 100, 300, seed=1))})
        for each in (found, pickle.loads(pickle.dumps(found))):
            with pytest.raises(JobError, match='/x was deleted or replaced after it was listed: leave it as it is'):
                each.read(4)
        store.delete('x')
        with pytest.raises(JobError, match='/x was deleted or replaced'):
            found.read(4)


# --- TFDS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A dataset 'tiny' with classes: 40 + 6 images, of which one is broken."""
    tfds = pytest.importorskip('tensorflow_datasets')
    root = tmp_path_factory.mktemp('tfds')
    features = {'image': tfds.features.Image(shape=(None, None, 3)), 'label': tfds.features.ClassLabel(num_classes=2)}

    def example(i):
        return encoded(Image.new('RGB', (9, 8), (6 * i, 0, 0))) if i != 3 else b'broken', i % 2

    splits = {'train': [example(i) for i in range(40)], 'test': [example(i) for i in range(6)]}
    write_dataset(root, 'tiny', features, splits)
    write_dataset(root, 'other', features, {'train': splits['test']})
    return root


def upload(store, root, folder=''):
    files = {str(file.relative_to(root)): file.read_bytes() for file in root.rglob('*') if file.is_file()}
    store.put({f'{folder}/{name}' if folder else name: data for name, data in files.items()})


def tiny(path, **fields):
    size = {'image_size': (8, 8), 'channels': 3, 'num_classes': 2}
    return image_spec('tiny', str(path), **size | {'on_error': 'skip', 'cache_bytes': 0} | fields)


@pytest.mark.parametrize('cache_bytes', [0, 10**9])
def test_a_prepared_dataset_is_read_where_it_is(store, prepared, cache_bytes):
    upload(store, prepared, 'tfds')
    url = f'{store.url}/tfds'
    slices = {'splits': ('train[:60%]', 'train[60%:]', 'test')}
    for fields in ({'held_out': (0.2, 0.1)}, {'num_classes': 0}, slices):
        for split in SPLITS:
            here = open_images(tiny(prepared, **fields), split)
            there = open_images(tiny(url, cache_bytes=cache_bytes, **fields), split)
            assert there.is_remote == (cache_bytes == 0) and not here.is_remote
            assert there.digest == here.digest and there.class_names == here.class_names
            np.testing.assert_array_equal(there.indices, here.indices)
            for ours, theirs in zip(*(eval_batches(s, batch_size=7) for s in (here, there)), strict=True):
                for name in ours:
                    np.testing.assert_array_equal(ours[name], theirs[name])
    train = [open_images(tiny(path, cache_bytes=cache_bytes), 'train') for path in (prepared, url)]
    streams = [train_batches(source, batch_size=8, seed=1, rows=[0, 3, 4]) for source in train]
    for _ in range(12):
        ours, theirs = map(next, streams)
        np.testing.assert_array_equal(ours['image'], theirs['image'])
    for stream in streams:
        stream.close()
    assert inspection.inspect({'train': train[0]}) == inspection.inspect({'train': train[1]})


def test_only_the_records_of_the_rows_are_requested(s3, prepared):
    upload(s3, prepared, 'rows')
    source = open_images(tiny(f'{s3.url}/rows', num_classes=0, splits=('train', 'test', 'test')), 'train')
    lengths = [len(source.dataset._records[int(i)]) for i in source.indices]
    s3.reads.clear()
    batches = eval_batches(source, batch_size=8, rows=[2, 3])
    assert len(list(batches)) == 5
    wanted = [lengths[i] for i in range(40) if i % 8 in (2, 3)]
    # The first example tells the sizes, and a broken one is replaced by the next. A chunk has 80 bytes of headers.
    assert len(wanted) <= len(s3.reads) <= len(wanted) + 2 and sum(s3.reads) < sum(lengths) / 4 + 80 * len(s3.reads)


def test_errors_of_remote_datasets(s3, prepared, tmp_path):
    upload(s3, prepared, 'errors')
    url = f'{s3.url}/errors'
    with pytest.raises(ValueError, match=r"data\.splits.*'dev'.*'test', 'train'"):
        open_images(tiny(url, splits=('dev', 'test', 'test')), 'train')
    with pytest.raises(FileNotFoundError, match=f"data.name='nothing' is neither .* data.path='{url}'"):
        open_images(dataclasses.replace(tiny(url), name='nothing'), 'train')
    with pytest.raises(FileNotFoundError, match=f"data.name='mnist' is not prepared under data.path='{url}'"):
        open_images(dataclasses.replace(tiny(url), name='mnist'), 'train')
    shutil.copytree(prepared, tmp_path / 'lacking')
    next((tmp_path / 'lacking').rglob('tiny-train*')).unlink()
    upload(s3, tmp_path / 'lacking', 'lacking')
    with pytest.raises(FileNotFoundError, match='s3://bucket/lacking lacks the file .tiny-train.array_record'):
        open_images(tiny(f'{s3.url}/lacking'), 'train')
    with pytest.raises(FileNotFoundError, match='data.path: s3://none/x cannot be reached'):
        open_images(tiny('s3://none/x'), 'train')


def test_a_damaged_record_of_a_dataset_is_an_unreadable_image(s3, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / 'damaged')
    file = next((tmp_path / 'damaged').rglob('tiny-train*'))
    data = file.read_bytes()
    file.write_bytes(flip(data, data.index(b'IDAT')))
    upload(s3, tmp_path / 'damaged', 'damaged')
    for cache_bytes in (0, 10**9):
        source = open_images(
            tiny(f'{s3.url}/damaged', cache_bytes=cache_bytes, splits=('train', 'test', 'test')), 'train'
        )
        masks = np.concatenate([batch['mask'] for batch in eval_batches(source, batch_size=8)])
        assert (~masks).sum() == 2 and {int(source.indices[i]) for i in np.flatnonzero(~masks)} == {0, 3}


# --- codes ------------------------------------------------------------------------------------------------------------


def write_store(directory, seed, count=30):
    rng = np.random.default_rng(seed)
    batch = {'codes_0': rng.integers(0, 9, (count, 4, 4)), 'label': np.zeros(count, int), 'index': np.arange(count)}
    output = record.open_output(directory, codes.JOB, {'vqvae': str(seed)}, {}, replace=True)
    for number in range(2):
        part = {name: values[number * count // 2 :][: count // 2] for name, values in batch.items()}
        path = codes.shard_path(directory, number, 2)
        codes.write_shard(path, [part], (9,))
        output.add_files(path.name)
    meta = dict(num_classes=0, class_names=(), split='train', shards=2, count=count)
    output.finish(dataclasses.asdict(codes.CodesMeta(shapes=((4, 4),), codebook_sizes=(9,), **meta)))
    return batch


@pytest.mark.skipif(not importlib.util.find_spec('gcsfs'), reason='gcsfs is not installed')
def test_codes_are_read_where_they_are(tmp_path):
    with open_store('gs', '') as store:
        directory = f'{store.url}/codes'
        batch = write_store(directory, 0)
        store.reads.clear()
        assert codes.count_records(codes.shard_path(directory, 1, 2)) == 15 and len(store.reads) == 2
        for cache_bytes in (0, 10**9):
            source = codes.CodeSource(directory, cache_bytes=cache_bytes)
            assert len(source) == 30 and source.is_remote == (cache_bytes == 0)
            for i in (0, 14, 15, 29, 3):
                np.testing.assert_array_equal(source[i]['codes_0'], batch['codes_0'][i])
        source = codes.CodeSource(directory)
        store.reads.clear()
        stream = train_batches(source, batch_size=10, seed=0, rows=[1, 5])
        next(stream)
        stream.close()
        assert len(store.reads) and max(store.reads) < 200
        write_store(directory, 1)  # other codes in the same place
        with pytest.raises(JobError, match='shard-0000[01]-of-00002.array_record was deleted or replaced'):
            source[7]
        name = 'codes/shard-00001-of-00002.array_record'
        data, generation = store.server.objects[name]
        store.server.objects[name] = flip(data, 100), generation + 10**6
        source = codes.CodeSource(directory)
        with pytest.raises(
            ValueError, match='record 15 of gs://bucket/codes is damaged: .*Delete .*--job=extract_codes'
        ):
            source[15]
        store.server.objects[name] = flip(data, len(data) - 2**16 + 70), generation + 10**6 + 1
        for cache_bytes in (0, 10**9):
            with pytest.raises(
                ValueError,
                match='codes of gs://bucket/codes are damaged: .*Delete that directory, .*--job=extract_codes',
            ):
                codes.CodeSource(directory, cache_bytes=cache_bytes)
        del store.server.objects[name]
        with pytest.raises(ValueError, match=r'shard-00001-of-00002\.array_record is missing'):
            codes.CodeSource(directory)
