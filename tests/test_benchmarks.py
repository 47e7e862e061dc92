"""The parts of benchmarks that make claims: readers of CIFAR-10, and the study of orders, on next to nothing."""

import argparse
import io
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from benchmarks import cifar10_npz, dropout, orders, results_table, timing


def test_the_binary_version_of_cifar10_is_read_in_order(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (6, 3073), np.uint8)
    records[:, 0] = np.arange(6)
    with tarfile.open(tmp_path / 'cifar.tar.gz', 'w:gz') as archive:
        for name, part in (('data_batch_2', records[3:]), ('data_batch_1', records[:3]), ('test_batch', records)):
            info = tarfile.TarInfo(f'cifar-10-batches-bin/{name}.bin')
            info.size = part.nbytes
            archive.addfile(info, io.BytesIO(part.tobytes()))
    images, labels = cifar10_npz.read_binary(tmp_path / 'cifar.tar.gz')
    np.testing.assert_array_equal(labels, np.arange(6))
    assert images.shape == (6, 32, 32, 3)
    row, column, channel = 5, 7, 2
    assert images[4, row, column, channel] == records[4, 1 + channel * 1024 + row * 32 + column]


def test_sprites_of_cifar10_are_read_in_order(tmp_path):
    tiles = np.random.default_rng(0).integers(0, 256, (4000, 32, 32, 3), np.uint8)
    labels = np.arange(4000).astype(np.uint8) % 10
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
        archive.writestr('train_labels.bin', labels.tobytes())
        for start in (2000, 0):
            sheet = (
                tiles[start : start + 2000].reshape(50, 40, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(1600, 1280, 3)
            )
            buffer = io.BytesIO()
            Image.fromarray(sheet).save(buffer, 'PNG')
            archive.writestr(f'train_{start:05d}.png', buffer.getvalue())
    images, read = cifar10_npz.read_sprites(tmp_path / 'a.zip')
    np.testing.assert_array_equal(images, tiles)
    np.testing.assert_array_equal(read, labels)


def echo(reply):
    """A process that prints for every line its number and the reply."""
    code = f'import sys\nfor i, _ in enumerate(sys.stdin): print(i, {reply}, flush=True)'
    return subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_tables_of_results_are_those_of_the_reports():
    reports = results_table.read_reports()
    assert reports
    text = results_table.DOCUMENT.read_text()
    assert results_table.updated(text, reports) == text
    (name, report), *_ = reports.items()
    report['sets']['default']['quality']['fid'] += 1
    assert results_table.updated(text, reports) != text


def test_two_checkouts_run_by_turns():
    processes = [echo(3.5), echo(7)]
    times = timing.run_by_turns(processes, 3)
    np.testing.assert_array_equal(times, [[[0, 3.5], [1, 3.5], [2, 3.5]], [[0, 7], [1, 7], [2, 7]]])
    assert [process.poll() for process in processes] == [0, 0]


def test_seeds_of_a_benchmark_are_checked_before_it_works():
    assert orders.seed_argument('3') == 3
    for text in ('-1', '4294967296', '1.5'):
        with pytest.raises(argparse.ArgumentTypeError):
            orders.seed_argument(text)


def test_cifar10_npz_makes_its_directory_before_it_works(tmp_path, monkeypatch):
    out = tmp_path / 'new' / 'data' / 'cifar10.npz'
    monkeypatch.setattr('sys.argv', ['cifar10_npz', str(tmp_path / 'missing.tar.gz'), str(out)])
    with pytest.raises(FileNotFoundError):
        cifar10_npz.main()
    assert out.parent.is_dir()


@pytest.mark.parametrize('nats, expected', [([2.0, 2.2], 0.0), ([1.0, 1.05], 0.0), ([2.2, 2.4], 100 * 0.1 / 2.05)])
def test_a_cost_counts_beyond_both_ranges(nats, expected):
    assert dropout.beyond(np.array(nats), np.array([2.0, 2.1])) == pytest.approx(expected)


@pytest.mark.system
def test_orders_are_compared_at_equal_updates_and_at_equal_time(run):
    found = orders.learning_curves(run, 'top', 0, ('raster', '2'), [0, 1])
    orders.add_times(found, run, 'top', 0)
    assert [found[order]['steps'] for order in ('raster', '2')] == [49, 19]
    for order, result in found.items():
        assert result['updates'] == [4, 8] and np.shape(result['nats']) == (2, 2)
        assert result['equal updates'] == [curve[-1] for curve in result['nats']]
        fastest = min(r['seconds an update'] for r in found.values())
        assert result['updates in equal time'] == round(8 * fastest / result['seconds an update'])
        low, high = np.min(result['nats']), np.max(result['nats'])
        assert all(low <= nats <= high for nats in result['equal time']), order
    lines = list(orders.table('top', 0, found))
    assert len(lines) == 2 and all(line.count('|') == len(orders.COLUMNS) + 1 for line in lines)
    assert set(orders.panel('top', 0, found).curves) == {'raster', 'skew 2'}
