"""Hostile and damaged .npz files: refused in one line, within bounded memory, and nothing in them is executed."""

import io
import os
import random
import resource
import threading
import time
import zipfile
import zlib
from concurrent import futures

import numpy as np
import pytest

from tests.defaults import image_spec
from vqvae2_jax.data import sample_store
from vqvae2_jax.data.images import open_all, open_images, open_native_size
from vqvae2_jax.evaluation import features
from vqvae2_jax.io import memory, npz, record, state_dict

ARRAYS = {
    'arr_0': np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8),
    'label': np.arange(6),
    'class_names': np.array(['cat', 'dög']),
    'fortran': np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    'scalar': np.float32(3),
    'empty': np.zeros((0, 3)),
    'bytes': np.array([b'x\xff']),
}


def header(shape, dtype='|u1', fortran=False, version=(1, 0)) -> bytes:
    """Returns the start of an .npy member that claims a dtype and a shape."""
    text = repr({'descr': dtype, 'fortran_order': fortran, 'shape': shape}).encode()
    text += b' ' * (-(len(text) + 11) % 64) + b'\n'
    return b'\x93NUMPY' + bytes(version) + len(text).to_bytes(2, 'little') + text


def write(path, method=zipfile.ZIP_STORED, **members: bytes) -> str:
    """Writes members of any content as an .npz file."""
    with zipfile.ZipFile(path, 'w', method) as archive:
        for name, content in members.items():
            archive.writestr(f'{name}.npy', content)
    return str(path)


def images(path, **fields):
    spec = image_spec('npz', path, **{'image_size': (4, 4), 'channels': 3, 'held_out': (0.0, 0.0), **fields})
    return open_images(spec, 'train')


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
class TestContent:
    def test_arrays_read_back(self, tmp_path, save):
        save(tmp_path / 'a.npz', **ARRAYS)
        found = npz.read(tmp_path / 'a.npz')
        assert list(found) == list(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == np.asarray(array).dtype
        assert list(npz.read(tmp_path / 'a.npz', ['label'])) == ['label']
        with pytest.raises(ValueError, match=r"a\.npz.*it has no array 'x'; it has arr_0 uint8 \[6, 4, 4, 3\], label"):
            npz.read(tmp_path / 'a.npz', ['x'])

    def test_any_damage_is_found_or_does_no_harm(self, tmp_path, save):
        save(tmp_path / 'a.npz', **ARRAYS)
        whole, path, rng = (tmp_path / 'a.npz').read_bytes(), tmp_path / 'b.npz', random.Random(0)
        refused = 0
        for _ in range(600):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 1, 2, 8))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)
            try:
                found = npz.read(path)
            except ValueError as error:
                assert 'b.npz' in str(error) and '\n' not in str(error)
                refused += 1
                continue
            for name in found.keys() & ARRAYS:  # a name may be damaged
                np.testing.assert_array_equal(found[name], ARRAYS[name])
        assert refused > 200


class TestClaims:
    @pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    @pytest.mark.parametrize(
        'shape, dtype', [((3 * 10**15,), '|u1'), ((2**40, 64, 64, 3), '|u1'), ((-1, 4, 4), '|u1'), ((10**9,), '|V0')]
    )
    def test_more_than_the_entry_holds(self, tmp_path, shape, dtype, method):
        path = write(tmp_path / 'a.npz', method, arr_0=header(shape, dtype) + bytes(64))
        for read in (
            npz.read,
            lambda p: npz.read_members(p)['arr_0'],
            state_dict.read,
            images,
            lambda p: open_native_size(p, 'evaluate.real'),
        ):
            with pytest.raises(ValueError, match=r"a\.npz.*array 'arr_0' claims to be") as error:
                read(path)
            assert '\n' not in str(error.value)
        with pytest.raises(ValueError, match="array 'arr_0' claims"):
            sample_store.read_npz(tmp_path / 'a.npz')
        with pytest.raises(ValueError, match="array 'arr_0' claims"):
            features.load_inception(path)

    def test_less_than_the_entry_holds(self, tmp_path):
        with pytest.raises(ValueError, match=r'48 bytes, but its entry has 64'):
            npz.read(write(tmp_path / 'a.npz', arr_0=header((1, 4, 4, 3)) + bytes(64)))

    def test_more_than_the_limit(self, tmp_path):
        big = header((4096, 64, 64, 3)) + bytes(4096 * 64 * 64 * 3)  # 48 MiB, 50 kB in the file
        path = write(tmp_path / 'a.npz', zipfile.ZIP_DEFLATED, arr_0=big)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match=r'claim 50331648 bytes of memory, more than 50000000, the limit'):
            npz.read(path, max_bytes=50_000_000)
        message = (
            r'data\.path: .*is compressed.* 50331648 .*write it by np\.savez, or set --config\.data\.max_bytes=50331648'
        )
        with pytest.raises(ValueError, match=message):
            images(path, max_bytes=50_000_000)
        with pytest.raises(ValueError, match=r'evaluate\.real: .*50331648 bytes of memory'):
            open_native_size(path, 'evaluate.real', max_bytes=50_000_000)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB
        assert images(path, max_bytes=51_000_000)[0]['image'].max() == 0  # both pieces of advice
        with np.load(path) as arrays:
            np.savez(tmp_path / 'plain.npz', arr_0=arrays['arr_0'])
        assert len(images(tmp_path / 'plain.npz', max_bytes=1)) == 4096

    def test_the_default_limit_is_half_of_the_free_memory(self, tmp_path, monkeypatch):
        np.savez_compressed(tmp_path / 'a.npz', arr_0=np.zeros((100, 4, 4, 3), np.uint8))
        monkeypatch.setattr(npz.memory, 'free', lambda: 9598)
        for read in (npz.read, images, state_dict.read):
            with pytest.raises(ValueError, match='4800 bytes of memory, more than 4799, half of the free memory'):
                read(str(tmp_path / 'a.npz'))

    def test_the_limit_is_that_of_the_time_when_the_set_was_opened(self, tmp_path, monkeypatch):
        np.savez_compressed(tmp_path / 'a.npz', arr_0=np.zeros((100, 4, 4, 3), np.uint8))
        monkeypatch.setattr(npz.memory, 'free', lambda: 9600)
        source = images(tmp_path / 'a.npz')
        monkeypatch.setattr(npz.memory, 'free', lambda: 10)  # as after other splits were read
        assert source[0]['image'].shape == (4, 4, 3)
        with pytest.raises(ValueError, match=r'half of the free memory: .* set --config\.data\.max_bytes=4800 if'):
            images(tmp_path / 'a.npz')
        assert len(images(tmp_path / 'a.npz', max_bytes=4800)) == 100

    def test_threads_decompress_a_file_once(self, tmp_path, monkeypatch):
        np.savez_compressed(tmp_path / 'a.npz', arr_0=np.zeros((100, 4, 4, 3), np.uint8))
        source, reads, read = images(tmp_path / 'a.npz'), [], npz.read

        def slow(*args):
            reads.append(args)
            time.sleep(0.05)
            return read(*args)

        monkeypatch.setattr(npz, 'read', slow)
        with futures.ThreadPoolExecutor(8) as pool:
            assert len(list(pool.map(source.read, range(64)))) == 64
        assert len(reads) == 1

    def test_damage_after_opening_is_one_line(self, tmp_path):
        values = np.random.default_rng(0).integers(0, 255, (100, 4, 4, 3), np.uint8)
        np.savez_compressed(tmp_path / 'a.npz', arr_0=values)
        source = images(tmp_path / 'a.npz')
        data = bytearray((tmp_path / 'a.npz').read_bytes())
        data[3000] ^= 1
        (tmp_path / 'a.npz').write_bytes(data)
        with pytest.raises(record.JobError, match=r'a\.npz.* no \.npz file that can be read'):
            source[0]

    def test_several_files_count_together(self, tmp_path):
        for name in 'ab':
            np.savez_compressed(tmp_path / f'{name}.npz', arr_0=np.zeros((100, 4, 4, 3), np.uint8))
        assert len(images(tmp_path, max_bytes=9600)) == 200
        with pytest.raises(ValueError, match='claim 9600 bytes of memory, more than 9599'):
            images(tmp_path, max_bytes=9599)

    def test_a_list_that_claims_less_than_is_packed(self, tmp_path):
        """Reading stops at the size that the list claims."""
        content = header((1, 4, 4, 3)) + bytes(48)
        path = write(tmp_path / 'a.npz', zipfile.ZIP_DEFLATED, arr_0=content + bytes(10**7))
        data = bytearray((tmp_path / 'a.npz').read_bytes())
        end = data.rindex(b'PK\x01\x02')
        data[end + 16 : end + 20] = zlib.crc32(content).to_bytes(4, 'little')
        data[end + 24 : end + 28] = len(content).to_bytes(4, 'little')
        (tmp_path / 'a.npz').write_bytes(data)
        assert npz.read(path)['arr_0'].shape == (1, 4, 4, 3)


class TestForeign:
    def test_a_pipe_does_not_block(self, tmp_path):
        for name, read in (('a.npz', images), ('a.npz', npz.read), ('a.pth', npz.check_archive)):
            path = tmp_path / name
            if not path.exists():
                os.mkfifo(path)
            with pytest.raises(ValueError, match=rf'{name}.*it is a named pipe, not a file'):
                read(str(path))

    def test_pickles_are_not_read(self, tmp_path):
        np.savez(tmp_path / 'a.npz', arr_0=np.array([threading.Thread, None]), allow_pickle=True)
        sound = {'arr_0': np.zeros((2, 4, 4, 3), np.uint8), 'label': [0, 1]}
        np.savez(tmp_path / 'b.npz', **sound, class_names=np.array(['a', None], object))
        for name in 'ab':
            for read in (npz.read, state_dict.read, lambda path: images(path, num_classes=2)):
                with pytest.raises(ValueError, match=rf'{name}\.npz.*holds pickled objects, which are not read'):
                    read(str(tmp_path / f'{name}.npz'))

    def test_an_array_that_is_not_needed_may_be_anything(self, tmp_path):
        sound = {'arr_0': np.full((2, 4, 4, 3), 7, np.uint8), 'label': [0, 1]}
        np.savez(tmp_path / 'a.npz', **sound, meta={'a': 1}, arr_1=np.array([None]))
        assert images(tmp_path / 'a.npz', num_classes=2)[0]['image'].max() == 7
        np.savez(tmp_path / 'b.npz', arr_0=sound['arr_0'], label=np.array([None, 1]))
        assert images(tmp_path / 'b.npz')[0]['image'].max() == 7
        with pytest.raises(ValueError, match=r"data\.path: .*b\.npz.*array 'label' holds pickled objects"):
            images(tmp_path / 'b.npz', num_classes=2)
        np.savez(tmp_path / 'c.npz', meta={'a': 1})
        with pytest.raises(
            ValueError, match=r'c\.npz.* with images in arr_0, it has meta: write images of another name'
        ):
            images(tmp_path / 'c.npz')

    @pytest.mark.parametrize('version, size', [((1, 0), 2), ((2, 0), 4)])
    def test_a_long_header_is_not_read(self, tmp_path, version, size):
        head = b'\x93NUMPY' + bytes(version)
        length = 65_000 if size == 2 else 40_000_000
        content = head + length.to_bytes(size, 'little') + b' ' * length
        path = write(tmp_path / 'a.npz', zipfile.ZIP_DEFLATED, arr_0=content)
        with pytest.raises(ValueError, match=rf"'arr_0' has a header of {length} bytes, more than 10000"):
            npz.read(path)

    @pytest.mark.parametrize(
        'array, message',
        [
            (np.zeros((0, 4, 4, 3), np.uint8), r'uint8 \[0, 4, 4, 3\]; .*: it holds no pixels'),
            (np.zeros((4, 0, 8), np.uint8), r'uint8 \[4, 0, 8\]; .*: it holds no pixels'),
            (
                np.zeros((8, 8, 3), np.uint8),
                r'uint8 \[8, 8, 3\]; .*a single image, which arr_0=image\[None\] makes a set',
            ),
            (np.zeros((8, 8), np.uint8), r'uint8 \[8, 8\]; .*a single image, which arr_0=image\[None\]'),
            (np.zeros((2, 3, 8, 8), np.uint8), r'.*channels come last, as in arr_0=images\.transpose\(0, 2, 3, 1\)'),
            (np.zeros((2, 8, 8, 4), np.uint8), r'.*leave out alpha, as in arr_0=images\[\.\.\., :3\]'),
            (np.zeros((2, 8, 8, 3)), r'float64 \[2, 8, 8, 3\]; .*scale other numbers to 0 to 255'),
            (np.zeros(5, np.uint8), r'uint8 \[5\]; images are uint8'),
            (np.array(['text']), r'<U4 \[1\]; images are uint8'),
        ],
    )
    def test_what_is_no_set_of_images_is_named(self, tmp_path, array, message):
        np.savez(tmp_path / 'a.npz', arr_0=array)
        for field, read in (
            ('data.path', images),
            ('evaluate.real', lambda path: open_native_size(path, 'evaluate.real')),
            ('inpaint.path', lambda path: open_all(path, image_spec(), 'inpaint.path')),
        ):
            with pytest.raises(ValueError, match=rf'^{field}: arr_0 of .*a\.npz.* is {message}') as error:
                read(str(tmp_path / 'a.npz'))
            assert '\n' not in str(error.value)

    def test_advice_is_right(self, tmp_path):
        chw, rgba = np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 8, 8, 4), np.uint8)
        one = np.zeros((8, 8, 3), np.uint8)
        for array in (chw.transpose(0, 2, 3, 1), rgba[..., :3], one[None], one[None, ..., 0]):
            np.savez(tmp_path / 'a.npz', arr_0=array)
            assert len(images(tmp_path / 'a.npz')) == len(array)

    def test_arrays_of_other_names_are_listed(self, tmp_path):
        np.savez(tmp_path / 'a.npz', mu=np.zeros(2048), sigma=np.zeros((2, 2)))
        with pytest.raises(
            ValueError, match=r'it has mu float64 \[2048\], sigma float64 \[2, 2\]: write images of anoth'
        ):
            open_native_size(str(tmp_path / 'a.npz'), 'evaluate.real')

    def test_a_single_array_is_told_how_to_become_a_set(self, tmp_path):
        np.save(tmp_path / 'a.npy', np.zeros((2, 8, 8, 3), np.uint8))
        (tmp_path / 'b.npz').write_bytes((tmp_path / 'a.npy').read_bytes())
        for name in ('a.npy', 'b.npz'):
            with pytest.raises(ValueError, match=rf"evaluate\.real: .*{name}.*an \.npy file.*np\.savez\('NEW\.npz'"):
                open_native_size(str(tmp_path / name), 'evaluate.real')
        np.savez(tmp_path / 'NEW.npz', arr_0=np.load(tmp_path / 'a.npy'))
        assert len(open_native_size(str(tmp_path / 'NEW.npz'), 'evaluate.real')) == 2

    def test_labels_of_adm(self, tmp_path):
        np.savez(tmp_path / 'a.npz', np.zeros((6, 4, 4, 3), np.uint8), np.arange(6) % 2)
        assert images(tmp_path / 'a.npz', num_classes=2).dataset.stratify_by.tolist() == [0, 1] * 3
        assert images(tmp_path / 'a.npz').dataset.stratify_by is None
        np.savez(tmp_path / 'b.npz', np.zeros((6, 4, 4, 3), np.uint8), np.zeros((6, 10)))
        with pytest.raises(ValueError, match=r'b\.npz.* has no `label`: set --config.data.num_classes=0'):
            images(tmp_path / 'b.npz', num_classes=2)

    def test_other_ways_to_pack_are_refused(self, tmp_path):
        content = header((1, 4, 4, 3)) + bytes(48)
        for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
            with pytest.raises(ValueError, match='compressed in a way that np.savez does not use'):
                npz.read(write(tmp_path / 'a.npz', method, arr_0=content))
        with pytest.raises(ValueError, match=r'has the format \(3, 0\)'):
            npz.read(write(tmp_path / 'a.npz', arr_0=header((1,), version=(3, 0)) + b'x'))

    def test_torch_files(self, tmp_path):
        torch = pytest.importorskip('torch')
        path = str(tmp_path / 'a.pth')
        for value, message in (
            (torch.zeros(3), 'holds a Tensor'),
            ([1], 'holds a list'),
            ({'state_dict': 3}, 'holds a int'),
        ):
            torch.save(value, path)
            with pytest.raises(ValueError, match=rf'{message}, not a state dict'):
                state_dict.read(path)
        torch.save({'a': torch.nn.Parameter(torch.ones(2)), 'b': torch.ones(2, dtype=torch.bfloat16), 3: 'x'}, path)
        assert {name: array.tolist() for name, array in state_dict.read(path).items()} == {'a': [1, 1], 'b': [1, 1]}
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr('archive/data.pkl', bytes(10**6))
        with pytest.raises(ValueError, match=r'a\.pth.* claim 1000000 bytes of memory, more than 999999'):
            npz.check_archive(path, max_bytes=999_999)

    def test_tensors_that_are_no_plain_arrays(self, tmp_path):
        torch = pytest.importorskip('torch')
        path = str(tmp_path / 'a.pth')
        for tensor, reason in (
            (torch.ones(1, dtype=torch.bfloat16).expand(10**6, 10**6), 'it claims more bytes than the file holds'),
            (torch.ones(4).to_sparse(), ''),
            (torch.ones(4, device='meta'), ''),
        ):
            torch.save({'fc.weight': tensor}, path)
            with pytest.raises(ValueError, match=rf"a\.pth': 'fc\.weight' is no plain array: {reason}") as error:
                state_dict.read(path)
            assert '\n' not in str(error.value)

    @pytest.mark.parametrize('is_zip', [True, False])
    def test_damaged_torch_files(self, tmp_path, is_zip):
        torch = pytest.importorskip('torch')
        path, rng = tmp_path / 'a.pth', random.Random(0)
        state = {'a': torch.ones(4), 'b': torch.zeros(3, 3)}
        torch.save(state, path, _use_new_zipfile_serialization=is_zip)
        whole, refused = path.read_bytes(), 0
        assert npz.check_archive(path) >= 52
        with pytest.raises(ValueError, match=r'a\.pth.* bytes of memory, more than 51'):
            npz.check_archive(path, max_bytes=51)
        for _ in range(300):
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            try:
                state_dict.read(str(path))
            except ValueError as error:
                assert 'a.pth' in str(error) and '\n' not in str(error)
                refused += 1
        assert refused > 50


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, '_CGROUP', tmp_path / 'self')
    monkeypatch.setattr(memory, '_MOUNT', tmp_path)
    machine = memory.psutil.virtual_memory().available
    for line, folder, limit, used, cached in (
        ('0::/pod/job', 'pod', 'memory.max', 'memory.current', 'inactive_file'),
        ('4:memory:/of/the/host', 'memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file'),
    ):
        (tmp_path / 'self').write_text(f'9:pids:/\n{line}\n')
        (tmp_path / folder).mkdir()
        (tmp_path / folder / used).write_text('700\n')
        (tmp_path / folder / 'memory.stat').write_text(f'anon 5\n{cached} 50\n')
        (tmp_path / folder / limit).write_text('max\n')
        assert memory.free() > machine // 2
        (tmp_path / folder / limit).write_text('1000\n')
        assert memory.free() == 350
        (tmp_path / folder / limit).write_text('600\n')
        assert memory.free() == 0


def test_weights_of_another_form_are_refused(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, **{'fc.weight': np.float32(1), 'Conv2d_1a_3x3.conv.weight': np.zeros((32, 3), np.float32)})
    (tmp_path / 'a.npz').write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r'Conv2d_1a_3x3\.conv\.weight of the weights is float32 \[32, 3\], not float'):
        features.load_inception(str(tmp_path / 'a.npz'))
    with pytest.raises(ValueError, match='the weights|of the weights'):
        features.load_classifier(str(tmp_path / 'a.npz'), 10)
