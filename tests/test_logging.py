"""The log of a training: its lines, those that a resume keeps, and the progress line."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vqvae2_jax.io import logging


class Clock:
    """Stands in for the `time` module."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(logging, 'time', clock)
    return clock


def open_log(directory, start_step=0, total_steps=4000, **kwargs):
    return logging.MetricsLogger(
        directory, name='vqvae', total_steps=total_steps, start_step=start_step, examples_per_step=64, **kwargs
    )


def test_a_line_holds_step_prefixed_metrics_and_time(tmp_path, clock):
    log = open_log(tmp_path)
    clock.now += 2.5
    log.write(3, 'train', {'loss': jnp.float32(0.5), 'perplexity_top': np.float64(51.25), 'restarts': np.int32(7)})
    # Read before close: every line is flushed.
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {'step': 3, 'train/loss': 0.5, 'train/perplexity_top': 51.25, 'train/restarts': 7, 'time': 2.5}
    ]
    assert logging.read_metrics(tmp_path) == [json.loads(lines[0])]
    assert isinstance(logging.read_metrics(tmp_path)[0]['train/restarts'], int)


def test_values_read_back_exactly_and_nan_is_recorded(tmp_path):
    value = np.float32(0.1) / np.float32(3)
    open_log(tmp_path).write(1, 'train', {'loss': value, 'mse': float('nan')})
    (line,) = logging.read_metrics(tmp_path)
    assert np.float32(line['train/loss']) == value and math.isnan(line['train/mse'])


@pytest.mark.parametrize('tail', ['', '{"step": 7, "train/lo', '{"step": 7}', '\x00\x00\x00', 'é'[:1] + '\udcff'])
def test_resume_drops_later_steps_and_torn_lines_and_continues_the_time(tmp_path, clock, tail):
    log = open_log(tmp_path)
    for step in (2, 4, 6):
        clock.now += 10
        log.write(step, 'train', {'loss': 1.0 / step})
    log.close()
    with (tmp_path / 'metrics.jsonl').open('ab') as file:
        file.write(tail.encode(errors='surrogateescape'))
    clock.now += 1000  # the job was dead: this does not count
    log = open_log(tmp_path, start_step=4)
    clock.now += 5
    log.write(6, 'train', {'loss': 0.25})
    lines = logging.read_metrics(tmp_path)
    assert log.seconds() == 25.0
    assert [(line['step'], line['train/loss'], line['time']) for line in lines] == [
        (2, 0.5, 10.0),
        (4, 0.25, 20.0),
        (6, 0.25, 25.0),
    ]


@pytest.mark.parametrize('tail', ['{"step": 7, "train/lo', '{"step": 4, "time": 20.0}'])
def test_resume_from_the_last_line_does_not_append_to_a_torn_one(tmp_path, tail):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 4, "time": 10.0}\n' + tail)
    open_log(tmp_path, start_step=4).write(6, 'train', {})
    assert [line['step'] for line in logging.read_metrics(tmp_path)] == ([4, 6] if 'lo' in tail else [4, 4, 6])


def test_a_new_run_starts_the_file_anew(tmp_path):
    open_log(tmp_path).write(0, 'validation', {'loss': 1.0})
    open_log(tmp_path).write(5, 'train', {'loss': 2.0})
    assert [line['step'] for line in logging.read_metrics(tmp_path)] == [5]


WHOLE = ['{"step": 1, "time": 1.0}', '{"step": 2, "time": 2.0}', '{"step": 3, "time": 3.0}']


@pytest.mark.parametrize(
    'number, line, message',
    [
        (2, b'{"step": 2, "ti', '{path}: line 2 of 3 is damaged; it is left out'),
        (2, b'{"step": 2, "t\xe9me": 2.0}', '{path}: line 2 of 3 is damaged; it is left out'),
        (2, b'{"stup": 2, "time": 2.0}', '{path}: line 2 of 3 is damaged; it is left out'),
        (2, b'{"step": 2, "time": 2.0, "train/loss": "x"}', '{path}: line 2 of 3 is damaged; it is left out'),
        (1, b'[]', '{path}: line 1 of 3 is damaged; it is left out'),
        (1, b'\0' * 24, '{path}: line 1 of 3 is damaged; it is left out'),
        (3, b'{"step": 3, "ti', '{path}: the last line is not complete, as after a kill; it is left out'),
    ],
)
def test_a_damaged_line_is_left_out_with_a_message(tmp_path, capsys, number, line, message):
    path = tmp_path / 'metrics.jsonl'
    lines = [text.encode() for text in WHOLE]
    lines[number - 1] = line
    path.write_bytes(b'\n'.join(lines) + b'\n')
    kept = [step for step in (1, 2, 3) if step != number]
    assert [row['step'] for row in logging.read_metrics(tmp_path)] == kept
    assert capsys.readouterr().out == message.format(path=path) + '\n'
    log = open_log(tmp_path, start_step=3)
    assert capsys.readouterr().out == message.format(path=path) + '\n'
    assert [row['step'] for row in log.lines()] == kept and log.seconds() >= kept[-1]
    assert capsys.readouterr().out == ''  # the line is gone


def test_metrics_that_are_missing_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='has not run in this folder'):
        logging.read_metrics(tmp_path)


def test_write_returns_the_line_and_the_loss_comes_first(tmp_path, capsys):
    log = open_log(tmp_path)
    line = log.write(4, 'train', {'accuracy': 0.5, 'gradient_norm': 1.0, 'loss': 2.0, 'nll': 3.0})
    assert [line] == logging.read_metrics(tmp_path) == log.lines()
    assert capsys.readouterr().out.endswith('  loss 2  nll 3  accuracy 0.5  gradient_norm 1\n')
    assert open_log(tmp_path, enabled=False).write(5, 'train', {}) == {}


def test_progress_line(tmp_path, clock, capsys):
    log = open_log(tmp_path)
    clock.now += 60  # compilation
    log.write(100, 'train', {'loss': 1.5})
    clock.now += 10
    log.write(200, 'train', {'loss': 0.0123456, 'perplexity_top': 51.2})
    assert capsys.readouterr().out.splitlines() == [
        'vqvae  100/4000 2%  elapsed 1m00s  loss 1.5',
        # 100 steps in 10 s, not 200 in 70: the first line does not count; 3800 steps are left.
        'vqvae  200/4000 5%  10 steps/s  640 examples/s  ETA 6m20s  loss 0.01235  perplexity_top 51.2',
    ]


def test_the_rate_leaves_evaluation_out_and_the_eta_counts_it(tmp_path, clock, capsys):
    log = open_log(tmp_path, total_steps=300)
    log.write(0, 'validation', {'loss': 2.0})
    for step in (100, 200):
        clock.now += 10
        log.write(step, 'train', {'loss': 1.0})
        clock.now += 30
        log.write(step, 'validation', {'loss': 1.0})
    clock.now += 5
    log.write(250, 'train', {'loss': 1.0})
    clock.now += 5
    log.write(300, 'train', {'loss': 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'vqvae  0/300 0%  validation  loss 2'
    assert lines[4] == 'vqvae  200/300 66%  validation  loss 1'
    # 150 steps after the first line took 75 s, evaluations included: 25 s for 50 more.
    assert lines[5] == 'vqvae  250/300 83%  10 steps/s  640 examples/s  ETA 25s  loss 1'
    assert lines[6] == 'vqvae  300/300 100%  10 steps/s  640 examples/s  took 1m30s  loss 1'


def test_the_rate_follows_a_change_of_pace(tmp_path, clock, capsys):
    log = open_log(tmp_path)
    for step in range(0, 2000, 100):
        clock.now += 10 if step < 1000 else 20
        log.write(step, 'train', {})
    assert '  5 steps/s  320 examples/s' in capsys.readouterr().out.splitlines()[-1]


def test_rates_go_to_the_file_from_the_second_line_on(tmp_path, clock):
    log = open_log(tmp_path, flops_per_step=3e12, peak_flops=1e14)
    for step in (100, 200):
        clock.now += 10
        log.write(step, 'train', {'loss': 1.0})
    log.write(200, 'validation', {'loss': 1.0})
    first, second, validation = logging.read_metrics(tmp_path)
    assert first.keys() == {'step', 'train/loss', 'time'} and validation.keys() == {'step', 'validation/loss', 'time'}
    assert second == {
        'step': 200,
        'train/loss': 1.0,
        'train/steps_per_second': 10.0,
        'train/examples_per_second': 640.0,
        'train/utilization': 0.3,
        'time': 20.0,
    }
    assert second.keys() - set(logging.RUNTIME_FIELDS) == {'step', 'train/loss'}


@pytest.mark.parametrize('known', [{'flops_per_step': 3e12}, {'peak_flops': 1e14}, {}])
def test_without_the_peak_there_is_no_utilization(tmp_path, clock, capsys, known):
    log = open_log(tmp_path, **known)
    for step in (100, 200):
        clock.now += 10
        log.write(step, 'train', {})
    assert 'train/utilization' not in logging.read_metrics(tmp_path)[-1] and 'peak' not in capsys.readouterr().out


class Device:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_device_memory_is_that_of_the_fullest_device(tmp_path, clock, monkeypatch, capsys):
    stats = [{'bytes_in_use': 3 * 10**9, 'peak_bytes_in_use': 5 * 10**9}, {'bytes_in_use': 2, 'peak_bytes_in_use': 9e9}]
    monkeypatch.setattr(logging.jax, 'local_devices', lambda: [Device(s) for s in stats])
    log = open_log(tmp_path, flops_per_step=3e12, peak_flops=1e14)
    for step in (100, 200):
        clock.now += 10
        log.write(step, 'train', {'loss': 1.0})
    line = logging.read_metrics(tmp_path)[-1]
    assert (line['train/device_memory_in_use'], line['train/device_memory_peak']) == (3e9, 9e9)
    assert line.keys() - set(logging.RUNTIME_FIELDS) == {'step', 'train/loss'}
    assert capsys.readouterr().out.splitlines()[-1] == (
        'vqvae  200/4000 5%  10 steps/s  640 examples/s  30% of peak FLOP/s  memory 3.0 GB, peak 9.0 GB  '
        'ETA 6m20s  loss 1'
    )
    monkeypatch.setattr(logging.jax, 'local_devices', lambda: [Device(None)])
    assert logging.device_memory() == {}  # as on CPU


def test_disabled_log_writes_nothing(tmp_path, clock, capsys):
    log = open_log(tmp_path / 'job', enabled=False)
    log.write(1, 'train', {'loss': 1.0})
    log.image(1, 'samples', np.zeros((2, 2, 3), np.uint8))
    log.close()
    clock.now += 3
    assert log.seconds() == 3.0
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ''


def test_bad_input_is_named(tmp_path):
    log = open_log(tmp_path)
    with pytest.raises(ValueError, match="prefix is 'test'; it must be one of train, validation"):
        log.write(1, 'test', {'loss': 1.0})
    with pytest.raises(ValueError, match=r"'usage' has shape \(2,\)"):
        log.write(1, 'train', {'usage': np.ones(2)})
    assert logging.read_metrics(tmp_path) == []


def test_images_become_png_files_by_step(tmp_path):
    image = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3, 1)
    open_log(tmp_path).image(20, 'reconstructions', image)
    png = np.asarray(Image.open(tmp_path / 'pictures' / 'reconstructions-20.png'))
    np.testing.assert_array_equal(png, np.repeat(image, 3, axis=-1))


@pytest.mark.parametrize(
    'seconds, text',
    [
        (0, '0s'),
        (59.7, '1m00s'),
        (228, '3m48s'),
        (3599.9, '1h00m'),
        (7500, '2h05m'),
        (86399, '1d00h'),
        (97200, '1d03h'),
    ],
)
def test_format_duration(seconds, text):
    assert logging.format_duration(seconds) == text


@pytest.mark.parametrize(
    'value, text',
    [
        (3, '3'),
        (0.0123, '0.0123'),
        (3.51349, '3.513'),
        (12345.6, '12346'),
        (1.5e-7, '1.5e-07'),
        (float('nan'), 'nan'),
        (float('inf'), 'inf'),
        (12345678, '12345678'),
    ],
)
def test_format_number(value, text):
    assert logging.format_number(value) == text
