"""Trackers get every line of the log once, whatever ends a training; the packages run offline."""

import glob
import json
import os
import sqlite3
import subprocess
import sys
import types

import numpy as np
import pytest
from etils import epath

from vqvae2_jax.io import logging, trackers
from vqvae2_jax.io.record import JobError
from vqvae2_jax.io.trackers import TrackerSpec

IMAGE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def spec(name):
    return TrackerSpec(name, 'fashion', {'vqvae.training.steps': 8, 'data.image_size': [28, 28]})


def open_log(directory, name, start_step=0):
    return logging.MetricsLogger(
        epath.Path(directory),
        name='vqvae',
        total_steps=8,
        start_step=start_step,
        examples_per_step=1,
        tracker=spec(name) if name else None,
    )


def log_steps(log, *steps):
    """Logs steps as a training that evaluates and shows images every four steps."""
    for step in steps:
        log.write(step, 'train', {'loss': 1 / step})
        if step % 4 == 0:
            log.write(step, 'validation', {'mse': 2 / step})
            log.image(step, 'validation', IMAGE)


EVERYTHING = sorted(
    [(step, 'train/loss', 1 / step) for step in (2, 4, 6, 8)]
    + [(step, 'validation/mse', 2 / step) for step in (4, 8)]
    + [(4, 'image', IMAGE.shape), (8, 'image', IMAGE.shape)]
)


class FakeWandB:
    """Stands in for wandb: runs by id, which a later process continues."""

    def __init__(self, offline=False):
        self.runs, self.offline, self.Image = {}, offline, lambda image: image.shape

    def init(self, *, id, resume, **options):
        self.options = options
        logged = [] if self.offline else self.runs.get(id, [])
        self.runs[id] = logged

        def log(values):
            step = values.pop('step')
            for name, value in values.items():
                if name.startswith(('train', 'validation/')) and 'second' not in name:
                    logged.append((step, name, value))
                elif name == 'validation':
                    logged.append((step, 'image', value))

        return types.SimpleNamespace(
            log=log, define_metric=lambda *args, **kwargs: None, offline=self.offline, finish=lambda: None
        )


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    monkeypatch.setattr(trackers, 'find_spec', lambda name: name == 'wandb' or None)
    return fake


def only_run(wandb):
    (logged,) = wandb.runs.values()
    return sorted(logged)


@pytest.mark.parametrize('restarts', [(), (4,), (4, 4), (2, 4), (6,), (4, 2, 4)])
def test_a_resumed_run_has_every_step_once(tmp_path, wandb, restarts):
    log_steps(open_log(tmp_path, 'wandb'), 2, 4, 6)
    for start in restarts:  # killed again at once
        log = open_log(tmp_path, 'wandb', start)
    if restarts:
        log_steps(log, *range(restarts[-1] + 2, 9, 2))
    else:
        log_steps(open_log(tmp_path, 'wandb', 6), 8)
    assert only_run(wandb) == EVERYTHING
    assert wandb.options['group'] == 'fashion' and wandb.options['name'] == 'fashion/vqvae'
    assert wandb.options['config']['vqvae.training.steps'] == 8


@pytest.mark.parametrize('first', ['', 'tensorboard'])
def test_a_tracker_that_comes_later_gets_the_earlier_steps(tmp_path, wandb, monkeypatch, first):
    if first:
        monkeypatch.setattr(trackers, 'find_spec', lambda name: name)
        pytest.importorskip('tensorboardX')
    log_steps(open_log(tmp_path, first), 2, 4, 6)
    log_steps(open_log(tmp_path, 'wandb', 4), 6, 8)
    assert only_run(wandb) == EVERYTHING


def test_offline_every_start_has_the_whole_log(tmp_path, wandb):
    wandb.offline = True
    log_steps(open_log(tmp_path, 'wandb'), 2, 4, 6)
    log_steps(open_log(tmp_path, 'wandb', 4), 6, 8)
    assert only_run(wandb) == EVERYTHING


def test_a_new_training_and_one_with_changed_settings_are_new_runs(tmp_path, wandb):
    log_steps(open_log(tmp_path, 'wandb'), 2, 4, 6, 8)
    log_steps(open_log(tmp_path, 'wandb'), 2, 4, 6, 8)
    assert [sorted(logged) for logged in wandb.runs.values()] == [EVERYTHING] * 2
    trackers.forget(tmp_path)  # as --continue_from does
    log = open_log(tmp_path, 'wandb', 4)
    log.write(6, 'train', {'loss': 0.0})
    *_, logged = wandb.runs.values()
    assert sorted(logged) == [entry for entry in EVERYTHING if entry[0] <= 4] + [(6, 'train/loss', 0.0)]


@pytest.mark.parametrize('content', ['', '[]', '{"tracker": "wandb"}', '{"tracker": "trackio", "id": "a", "held": {}}'])
def test_a_damaged_or_foreign_file_starts_a_new_run(tmp_path, wandb, content):
    log_steps(open_log(tmp_path, 'wandb'), 2, 4)
    (tmp_path / 'tracker.json').write_text(content)
    log_steps(open_log(tmp_path, 'wandb', 4), 6, 8)
    *_, logged = wandb.runs.values()
    assert len(wandb.runs) == 2 and sorted(logged) == EVERYTHING


def test_lines_reach_the_tracker_only_when_they_are_in_the_file(tmp_path, wandb):
    """On a bucket lines wait; a restart would send those again that the file does not have."""
    log = open_log(tmp_path, 'wandb')
    log._lines._remote = True
    log.write(2, 'train', {'loss': 1.0})
    assert only_run(wandb) == [] and not (tmp_path / 'metrics.jsonl').read_text()
    log.write(4, 'train', {'loss': 1.0})
    log.flush()
    assert [entry[0] for entry in only_run(wandb)] == [2, 4]
    assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 2


@pytest.mark.parametrize('name', trackers.TRACKERS)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers, 'find_spec', lambda name: None)
    with pytest.raises(JobError, match=rf'^tracker={name!r} is not installed: pip install {name}X?$'):
        trackers.check(spec(name), tmp_path)


def test_extras_have_the_names_of_the_trackers():
    import tomllib

    project = tomllib.loads((epath.Path(__file__).parents[1] / 'pyproject.toml').read_text())['project']
    for name in trackers.TRACKERS:
        (requirement,) = project['optional-dependencies'][name]
        assert requirement.startswith(trackers._PACKAGES[name])


def test_a_bucket_is_refused_for_tensorboard():
    pytest.importorskip('tensorboardX')
    with pytest.raises(JobError, match=r"tracker='tensorboard' writes to local workdirs only, not to gs://b/run"):
        trackers.check(spec('tensorboard'), 'gs://b/run')


def test_what_a_tracker_refuses_is_one_line(tmp_path, wandb):
    def init(**options):
        raise RuntimeError('nobody is logged in')

    wandb.init = init
    with pytest.raises(JobError, match="^tracker='wandb': nobody is logged in$"):
        open_log(tmp_path, 'wandb')


def tensorboard_events(directory):
    """Returns the events of each file: (first step that is hidden) or (name, value or shape, step)."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    files = []
    for path in epath.Path(directory).iterdir():
        data, found = path.read_bytes(), []
        while data:  # TFRecord: length, its checksum, event, its checksum
            length = int.from_bytes(data[:8], 'little')
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            if event.session_log.status == SessionLog.START:
                found.append(event.step)
            for value in event.summary.value:
                picture = (value.image.height, value.image.width, value.image.colorspace)
                content = picture if value.HasField('image') else pytest.approx(value.simple_value)
                if 'per_second' not in value.tag:
                    found.append((value.tag, content, event.step))
        files.append(found)
    return files


def test_tensorboard_events(tmp_path):
    pytest.importorskip('tensorboardX')
    first = open_log(tmp_path, 'tensorboard')
    log_steps(first, 4, 6)
    first.flush()  # as before a checkpoint
    four = [('train/loss', 0.25, 4), ('validation/mse', 0.5, 4), ('validation', (4, 5, 3), 4)]
    assert tensorboard_events(tmp_path / 'tensorboard') == [[0, *four, ('train/loss', 1 / 6, 6)]]
    second = open_log(tmp_path, 'tensorboard', 4)  # within the same second: another file
    log_steps(second, 6)
    second.flush()
    files = tensorboard_events(tmp_path / 'tensorboard')
    assert sorted(files) == [[0, *four, ('train/loss', 1 / 6, 6)], [5, ('train/loss', 1 / 6, 6)]]


def test_without_a_tracker_there_are_only_files(tmp_path):
    log = open_log(tmp_path, '')
    log_steps(log, 4)
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['metrics.jsonl', 'pictures']


RESTART = """
import sys
from tests.test_trackers import log_steps, open_log
directory, name = sys.argv[1:]
log = open_log(directory, name)
log_steps(log, 2, 4, 6)
log.close()
log = open_log(directory, name, 4)
log_steps(log, 6, 8)
log.close()
"""


def restart(tmp_path, name, **environment):
    """Logs with the real package in a process of its own, which reads its settings when it is imported."""
    environment = {**os.environ, **environment, 'HF_HUB_OFFLINE': '1'}
    command = [sys.executable, '-c', RESTART, str(tmp_path / 'vqvae'), name]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr


def leveldb_records(data):
    """Yields the records of a file of W&B: seven bytes, and then LevelDB's log format in blocks of 32 KiB."""
    position, record = 7, b''
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no room for a header: the block is padded
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], 'little'), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b''


@pytest.mark.slow
def test_wandb_offline(tmp_path):
    pytest.importorskip('wandb')
    from wandb.proto import wandb_internal_pb2

    restart(tmp_path, 'wandb', WANDB_MODE='offline')
    runs = sorted(glob.glob(f'{tmp_path}/vqvae/wandb/offline-run-*/*.wandb'))
    assert len(runs) == 2
    rows, config = [], {}
    for data in leveldb_records(epath.Path(runs[-1]).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField('run'):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert (record.run.project, record.run.display_name) == ('vqvae2_jax', 'fashion/vqvae')
        if record.HasField('history'):
            items = record.history.item
            rows.append({item.key or '.'.join(item.nested_key): json.loads(item.value_json) for item in items})
    found = [(row['step'], name, value) for row in rows for name, value in row.items() if name in NAMES]
    found += [(row['step'], 'image', (4, 5, 3)) for row in rows if row.get('validation._type') == 'image-file']
    assert sorted(found) == EVERYTHING and config['vqvae.training.steps'] == 8


NAMES = ('train/loss', 'validation/mse')


@pytest.mark.slow
def test_trackio_local(tmp_path):
    pytest.importorskip('trackio')
    restart(tmp_path, 'trackio', TRACKIO_DIR=str(tmp_path / 'trackio'))
    (path,) = glob.glob(f'{tmp_path}/trackio/*.db')
    rows = sqlite3.connect(path).execute('select run_name, step, metrics from metrics').fetchall()
    found = [(step, name, value) for _, step, text in rows for name, value in json.loads(text).items() if name in NAMES]
    found += [(step, 'image', (4, 5, 3)) for _, step, text in rows if 'validation' in json.loads(text)]
    assert sorted(found) == EVERYTHING
    assert len({run for run, _, _ in rows}) == 1 and rows[0][0].startswith('fashion/vqvae ')
