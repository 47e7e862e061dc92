"""Codes in an LMDB of pickles: rows of all versions of Python and NumPy are read, hostile and damaged ones refused."""

import collections
import contextlib
import os
import pickle
import struct
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqvae2_jax.data import lmdb_codes
from vqvae2_jax.data.lmdb_codes import CodeRows, read_row

lmdb = pytest.importorskip('lmdb')
TOP, BOTTOM = np.arange(6).reshape(2, 3), np.arange(24).reshape(4, 6)
PREFIX = pickle.PROTO + b'\x03'


@pytest.fixture
def code_row(monkeypatch):
    """The class that their dataset.py defines, where pickles look for it."""
    module = types.ModuleType('dataset')
    module.CodeRow = collections.namedtuple('CodeRow', ['top', 'bottom', 'filename'])
    module.CodeRow.__module__ = 'dataset'
    monkeypatch.setitem(sys.modules, 'dataset', module)
    return module.CodeRow


def write(path, values, length=None):
    """Writes a database of pickles as extract_code.py does."""
    path.mkdir(exist_ok=True)
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for index, value in enumerate(values):
            transaction.put(str(index).encode(), value)
        transaction.put(b'length', str(len(values) if length is None else length).encode())


@pytest.mark.parametrize('protocol', [3, 4, 5])
@pytest.mark.parametrize('dtype', ['<i8', '<i4', '>i2', 'u1'])
def test_rows_of_all_protocols_are_read(code_row, protocol, dtype):
    top, bottom = TOP.astype(dtype), np.asfortranarray(BOTTOM.astype(dtype))
    data = pickle.dumps(code_row(top, bottom, 'cat/ä.jpg'), protocol)
    row = read_row(data)
    assert row.filename == 'cat/ä.jpg'
    for found, expected in ((row.top, top), (row.bottom, bottom)):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_rows_of_numpy_before_2_are_read(code_row):
    data = pickle.dumps(code_row(TOP, BOTTOM, 'a/b'), 3)  # a name ends with its line there
    assert data.count(b'numpy._core.multiarray') == 1
    np.testing.assert_array_equal(read_row(data.replace(b'numpy._core', b'numpy.core')).bottom, BOTTOM)


def test_no_function_of_numpy_and_no_class_of_a_module_dataset_is_called(code_row, monkeypatch):
    data = pickle.dumps(code_row(TOP, BOTTOM, 'a/b'), 4)
    monkeypatch.delitem(sys.modules, 'dataset')
    monkeypatch.setattr(np._core.multiarray, '_reconstruct', None)
    assert read_row(data).top.shape == (2, 3)


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def global_name(module, name):
    return pickle.GLOBAL + f'{module}\n{name}\n'.encode()


@pytest.mark.parametrize(
    'function, arguments',
    [
        (os.system, ('touch {path}',)),
        (eval, ('open("{path}", "w")',)),
        (exec, ('open("{path}", "w")',)),
        (open, ('{path}', 'w')),
        (np.save, ('{path}', 1)),
        (getattr, (np, 'load')),
    ],
)
@pytest.mark.parametrize('protocol', [0, 2, 3, 4, 5])
def test_a_hostile_pickle_is_refused_and_does_nothing(code_row, tmp_path, function, arguments, protocol):
    path = tmp_path / 'made'
    arguments = [a.format(path=path) if isinstance(a, str) else a for a in arguments]
    call = Calls(function, *[a for a in arguments if a is not np])
    for value in (call, code_row(TOP, call, 'a/b'), code_row(TOP, BOTTOM, call)):
        with pytest.raises(ValueError, match='it names .*but only CodeRow and arrays|has the instruction'):
            read_row(pickle.dumps(value, protocol))
    assert not path.exists() and not os.path.exists(f'{path}.npy')
    if function in (os.system, open):  # the pickle does run where nothing is refused
        pickle.loads(pickle.dumps(call, protocol))
        assert path.exists()


@pytest.mark.parametrize(
    'module, name',
    [
        ('dataset', 'os'),
        ('dataset', 'CodeRow.__new__'),
        ('numpy', 'load'),
        ('numpy', 'ndarray.tofile'),
        ('numpy.core.multiarray', 'fromfile'),
        ('vqvae2_jax.data.lmdb_codes', 'os'),
        ('builtins', 'object'),
        ('copyreg', '_reconstructor'),
    ],
)
def test_only_the_names_of_a_row_are_admitted(module, name):
    with pytest.raises(ValueError, match=f'names {module}.{name}'):
        read_row(PREFIX + global_name(module, name) + pickle.STOP)


def test_classes_of_the_reader_cannot_be_changed():
    """A state that is applied to a class would set its attributes; no row needs the dictionary for it."""
    state = {'values': 1, '_make': 2}
    for module, name in (('dataset', 'CodeRow'), ('numpy', 'ndarray'), ('numpy', 'dtype')):
        for value in ((None, state), state):
            pickled = pickle.dumps(value, 3)[2:-1]
            with pytest.raises(ValueError, match='has the instruction EMPTY_DICT'):
                read_row(PREFIX + global_name(module, name) + pickled + pickle.BUILD + pickle.STOP)
        with pytest.raises(ValueError):
            read_row(PREFIX + global_name(module, name) + pickle.NONE + pickle.BUILD + pickle.STOP)
    assert callable(lmdb_codes.CodeRow._make)


@pytest.mark.parametrize(
    'data, message',
    [
        (b'\x80\x04\x8e' + struct.pack('<Q', 2**40) + b'x', 'has the instruction BINBYTES8|remain'),
        (b'\x80\x05\x96' + struct.pack('<Q', 2**40) + b'x', 'remain'),
        (b'\x80\x03B' + struct.pack('<I', 2**32 - 1) + b'x', 'remain'),
        (b'\x80\x03Nr' + struct.pack('<I', 2**32 - 1) + b'.', 'as number 4294967295 in 9 bytes'),
        (b'\x80\x03\x8b' + struct.pack('<i', 2**31 - 1) + b'.', 'not enough data'),
        (b'\x80\x04\x95' + struct.pack('<Q', 2**60) + b'N.', 'truncated|frame'),
        (b'\x80\x03}' + b'N' + b'\x85' * 100_000 + b'Ns.', 'has the instruction EMPTY_DICT'),
        (b'\x80\x03' + b'N' + b'\x85' * 1_000_000 + b'.', 'holds no CodeRow'),
        (b'', 'before seeing STOP'),
        (b'N.', 'holds no CodeRow'),
        (b'not a pickle', 'has the instruction BINUNICODE|opcode'),
    ],
)
def test_claims_of_huge_sizes_are_refused_without_memory(data, message):
    with pytest.raises(ValueError, match=message):
        read_row(data)


def test_a_name_of_a_type_that_is_no_text_is_not_printed(code_row):
    # Tuples that share their items: 60 instructions describe a text of 2 ** 60 characters.
    shared = pickle.NONE + b''.join(b'q\x00h\x00\x86' for _ in range(60))
    dtype = global_name('numpy', 'dtype') + shared + b'K\x00K\x01\x87' + pickle.REDUCE
    data = (
        PREFIX + global_name('numpy.core.numeric', '_frombuffer') + b'(C\x08' + b'x' * 8 + dtype + b'K\x01K\x01\x86'
        b'X\x01\x00\x00\x00C' + pickle.TUPLE + pickle.REDUCE + pickle.STOP
    )
    with pytest.raises(ValueError, match='an array of an unknown type'):
        read_row(data)


def test_arrays_hold_integers_and_the_bytes_that_they_claim(code_row):
    def refuse(message, **changes):
        row = {'top': TOP, 'bottom': BOTTOM, 'filename': 'a/b'} | changes
        with pytest.raises(ValueError, match=message):
            read_row(pickle.dumps(code_row(**row), 3))

    refuse('not of integers', top=TOP.astype(float))
    refuse('not of integers|has the instruction', top=TOP.astype(object))
    refuse('not of integers', top=np.zeros((2, 2), 'V8'))
    refuse(r'no map \[h, w\]', top=np.zeros(6, int))
    refuse(r'no map \[h, w\]', bottom=5)
    refuse('no CodeRow with a filename', filename=7)
    data = pickle.dumps(code_row(TOP, BOTTOM, 'a/b'), 3)
    claim = data.replace(b'K\x02K\x03\x86', b'K\x02J\xff\xff\xff\x7f\x86')  # 2 x 3 becomes 2 x 2147483647
    assert claim != data
    with pytest.raises(ValueError, match='cannot reshape'):
        read_row(claim)


def test_every_truncation_is_refused(code_row):
    for protocol in (3, 4, 5):
        data = pickle.dumps(code_row(TOP, BOTTOM, 'a/b'), protocol)
        for stop in range(len(data)):
            with pytest.raises(ValueError):
                read_row(data[:stop])


# A row without the module `dataset`, which pickle would import.
ROW = PREFIX + global_name('dataset', 'CodeRow') + pickle.dumps((TOP, BOTTOM, 'a/b'), 3)[2:-1] + pickle.NEWOBJ + b'.'


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_damaged_rows_are_read_or_refused(data):
    row = bytearray(ROW)
    assert read_row(ROW).filename == 'a/b'
    for _ in range(data.draw(st.integers(1, 4))):
        row[data.draw(st.integers(0, len(row) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        read_row(bytes(row))


def test_a_database_is_read_by_number(code_row, tmp_path):
    rows = [code_row(TOP + i, BOTTOM, f'cat/{i}.png') for i in range(12)]
    write(tmp_path, [pickle.dumps(row) for row in rows])
    with CodeRows(str(tmp_path)) as found:
        assert len(found) == 12
        for index in (0, 11, 10, 2):
            np.testing.assert_array_equal(found[index].top, TOP + index)
            assert found[index].filename == f'cat/{index}.png'
        with pytest.raises(ValueError, match=r'row 12 of .* cannot be read: it is missing'):
            found[12]
    assert len(lmdb_codes.digest(str(tmp_path))) == 64


def test_other_databases_and_damaged_ones_are_refused(code_row, tmp_path):
    row = pickle.dumps(code_row(TOP, BOTTOM, 'a/b'))
    with pytest.raises(FileNotFoundError, match='holds no data.mdb'):
        CodeRows(str(tmp_path))
    for name, length, message in (
        ('more', 3, "'length' is 3, but there are 30 rows"),
        ('huge', 10**30, "'length' is b'1000"),
        ('text', '-1', "'length' is b'-1', not a number"),
    ):
        write(tmp_path / name, [row] * 30, length)
        with pytest.raises(ValueError, match=message):
            CodeRows(str(tmp_path / name))
    file = tmp_path / 'more' / 'data.mdb'
    for size in (0, 100, 4096, 8192, file.stat().st_size - 4096):
        (tmp_path / f'cut{size}').mkdir()
        (tmp_path / f'cut{size}' / 'data.mdb').write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match='cut off|no LMDB that can be read'):
            CodeRows(str(tmp_path / f'cut{size}'))


def test_a_row_that_is_too_large_is_not_copied(code_row, tmp_path, monkeypatch):
    write(tmp_path, [pickle.dumps(code_row(TOP, BOTTOM, 'a/b'))])
    monkeypatch.setattr(lmdb_codes, '_MAX_BYTES', 100)
    with CodeRows(str(tmp_path)) as rows, pytest.raises(ValueError, match=r'it has \d+ bytes, more than 100'):
        rows[0]
