"""The store of codes: it returns what was written, and never takes an unfinished shard or store for a finished one."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from vqvae2_jax.data import codes
from vqvae2_jax.data.codes import CodesMeta, CodeSource, shard_path, write_shard
from vqvae2_jax.data.loader import eval_batches, train_batches
from vqvae2_jax.io import record
from vqvae2_jax.io.record import JobError

SHAPES = ((4, 6), (2, 3))


def make_meta(**fields):
    defaults = {
        'shapes': SHAPES,
        'codebook_sizes': (16, 16),
        'num_classes': 2,
        'class_names': ('chat', '犬'),
        'count': 7,
        'split': 'train',
        'shards': 2,
    }
    return CodesMeta(**(defaults | fields))


def write_meta(directory, **fields):
    results = dataclasses.asdict(make_meta(**fields))
    output = record.open_output(directory, codes.JOB, {}, {})
    output.add_files(*(path.name for path in directory.glob('*.array_record')))
    output.finish(results)


def make_batch(size, codebook_sizes, seed=0, first=0):
    rng = np.random.default_rng(seed)
    batch = {'label': rng.integers(0, 2, size, np.int32), 'index': np.arange(first, first + size)}
    for n, (shape, entries) in enumerate(zip(SHAPES, codebook_sizes, strict=True)):
        batch[f'codes_{n}'] = rng.integers(0, entries, (size, *shape), np.int32)
        batch[f'codes_{n}'][0, 0, 0], batch[f'codes_{n}'][-1, -1, -1] = 0, entries - 1
    return batch


def write_store(directory, codebook_sizes=(16, 16)):
    """Seven examples in two shards of 4 and 3."""
    batches = [make_batch(4, codebook_sizes), make_batch(3, codebook_sizes, seed=1, first=4)]
    for shard, batch in enumerate(batches):
        write_shard(shard_path(directory, shard, 2), [batch], codebook_sizes)
    write_meta(directory, codebook_sizes=codebook_sizes)
    return batches


@pytest.mark.parametrize(
    'sizes, width', [((256, 256), 1), ((257, 65536), 2), ((65537, 70000), 4), ((70000, 256), None)]
)
def test_round_trip(tmp_path, sizes, width):
    batches = write_store(tmp_path, sizes)
    source = CodeSource(tmp_path)
    assert len(source) == 7 and source.class_names == ('chat', '犬')
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for i, example in enumerate(copy):
            batch, row = batches[i // 4], i % 4
            assert list(example) == ['codes_0', 'codes_1', 'label', 'index']
            for name, value in example.items():
                np.testing.assert_array_equal(value, batch[name][row])
                assert value.dtype == (np.int64 if name == 'index' else np.int32)
    record = ArrayRecordReader(str(shard_path(tmp_path, 0, 2))).read([0])[0]
    widths = (width, width) if width else (4, 1)
    assert len(record) == 8 + 4 + sum(w * np.prod(s) for w, s in zip(widths, SHAPES, strict=True))


def test_record_is_as_documented(tmp_path):
    batch = make_batch(4, (300, 16))
    batch['index'][2], batch['label'][2] = 2**40 + 1, 258
    write_shard(tmp_path / 'x', [batch], (300, 16))
    record = ArrayRecordReader(str(tmp_path / 'x')).read([2])[0]
    expected = (2**40 + 1).to_bytes(8, 'little') + (258).to_bytes(4, 'little')
    expected += batch['codes_0'][2].astype('<u2').tobytes() + batch['codes_1'][2].astype('u1').tobytes()
    assert record == expected


def test_masked_rows_are_left_out(tmp_path):
    batch = make_batch(4, (16, 16)) | {'mask': np.array([True, False, True, False])}
    assert write_shard(tmp_path / 'x', [batch, batch], (16, 16)) == 4


@pytest.mark.parametrize('bad', [-1, 16])
def test_code_outside_its_codebook(tmp_path, bad):
    batch = make_batch(4, (16, 16))
    batch['codes_1'][1, 1, 1] = bad
    with pytest.raises(ValueError, match=rf'codes_1.*{bad}.*16 entries'):
        write_shard(tmp_path / 'x', [batch], (16, 16))


def test_interrupted_shard_is_not_taken_for_whole(tmp_path):
    def batches():
        yield make_batch(4, (16, 16))
        assert not shard_path(tmp_path, 0, 2).exists()  # Not while it is being written.
        raise KeyboardInterrupt

    write_shard(shard_path(tmp_path, 1, 2), [make_batch(3, (16, 16))], (16, 16))
    with pytest.raises(KeyboardInterrupt):
        write_shard(shard_path(tmp_path, 0, 2), batches(), (16, 16))
    assert [path.name for path in tmp_path.iterdir()] == ['shard-00001-of-00002.array_record']


def test_rewriting_replaces_a_shard(tmp_path):
    path = shard_path(tmp_path, 0, 1)
    assert path.name == 'shard-00000-of-00001.array_record'
    assert write_shard(path, [make_batch(4, (16, 16))], (16, 16)) == 4
    assert write_shard(path, [make_batch(2, (16, 16))], (16, 16)) == 2
    assert ArrayRecordReader(str(path)).num_records() == 2


def test_empty_shard(tmp_path):
    write_store(tmp_path)
    assert write_shard(shard_path(tmp_path, 1, 2), [], (16, 16)) == 0
    write_meta(tmp_path, count=4)
    assert len(list(CodeSource(tmp_path))) == 4


def test_missing_shard(tmp_path):
    write_store(tmp_path)
    (tmp_path / 'shard-00001-of-00002.array_record').unlink()
    with pytest.raises(ValueError, match=r'shard-00001-of-00002.*--job=extract_codes'):
        CodeSource(tmp_path)


def test_count_differs(tmp_path):
    write_store(tmp_path)
    write_meta(tmp_path, count=8)
    with pytest.raises(ValueError, match=r'record\.json says 8 .*hold 7.*--job=extract_codes'):
        CodeSource(tmp_path)


def test_damaged_shard(tmp_path):
    write_store(tmp_path)
    path = tmp_path / 'shard-00000-of-00002.array_record'
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r'shard-00000-of-00002.* is damaged'):
        CodeSource(tmp_path)


def test_damaged_record(tmp_path):
    size = (2**20,)  # Wide codes, so that most of the file is codes.
    shape = ((64, 64),)
    rng = np.random.default_rng(0)
    batch = {'label': np.zeros(8, np.int32), 'index': np.arange(8), 'codes_0': rng.integers(0, 2**20, (8, 64, 64))}
    path = shard_path(tmp_path, 0, 1)
    write_shard(path, [batch], size)
    write_meta(tmp_path, shapes=shape, codebook_sizes=size, count=8, shards=1)
    source = CodeSource(tmp_path)
    data = bytearray((tmp_path / 'shard-00000-of-00001.array_record').read_bytes())
    data[30000] ^= 1
    (tmp_path / 'shard-00000-of-00001.array_record').write_bytes(data)
    with pytest.raises(ValueError, match=r'record \d+ of .* is damaged.*--job=extract_codes'):
        list(source)


def test_records_of_another_size(tmp_path):
    write_store(tmp_path)
    write_meta(tmp_path, codebook_sizes=(16, 257))
    with pytest.raises(ValueError, match=r'record 0 .*has 42 bytes.*record.json implies 48'):
        CodeSource(tmp_path)[0]


def test_meta_round_trip(tmp_path):
    meta = make_meta()
    write_store(tmp_path)
    assert CodeSource(tmp_path).meta == meta
    assert CodesMeta.from_results(json.loads((tmp_path / 'record.json').read_text())['results']) == meta


def test_meta_errors(tmp_path):
    with pytest.raises(JobError, match=r'has nothing: run your command with --job=extract_codes'):
        CodeSource(tmp_path)
    write_store(tmp_path)
    whole = record.read_done(tmp_path, codes.JOB)
    for change, message in (
        ({'colour': 'red'}, "'colour'.*write it again"),
        ({'shapes': [[4, 6]]}, 'must agree'),
        ({'shards': 0}, 'shards=0'),
    ):
        dataclasses.replace(whole).finish(whole.results | change)
        with pytest.raises(ValueError, match=rf'(?s)record\.json: .*{message}'):
            CodeSource(tmp_path)
    dataclasses.replace(whole).start()
    with pytest.raises(JobError, match='is not finished: run your command with --job=extract_codes'):
        CodeSource(tmp_path)
    (tmp_path / 'record.json').write_text('{')
    with pytest.raises(JobError, match=r'record\.json is damaged'):
        CodeSource(tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_meta().count = 3


def test_loader_reads_codes(tmp_path):
    write_store(tmp_path)
    source = CodeSource(tmp_path)
    evaluated = list(eval_batches(source, batch_size=4))
    assert np.concatenate([batch['index'][batch['mask']] for batch in evaluated]).tolist() == list(range(7))
    batch = next(train_batches(source, batch_size=7, seed=0))
    assert sorted(batch['index']) == list(range(7)) and batch['codes_1'].shape == (7, 2, 3)
    for row, index in enumerate(batch['index']):
        np.testing.assert_array_equal(batch['codes_0'][row], source[index]['codes_0'])
    assert write_shard(shard_path(tmp_path / 'again', 0, 1), evaluated, (16, 16)) == 7
