"""Stopped jobs continue, growing sets grow, and what is there is not done again."""

import os
import signal

import jax
import numpy as np
import pytest

from vqvae2_jax.data import codes as store
from vqvae2_jax.data import samples
from vqvae2_jax.distributed import sharding
from vqvae2_jax.distributed.preemption import Interrupted
from vqvae2_jax.io.files import StaleInputError
from vqvae2_jax.io.logging import RunLog
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import JobError


def act_after(monkeypatch, module, name, number, action):
    """`action` follows call `number` of module.name, whose first arguments are returned as they come."""
    function, calls = getattr(module, name), []

    def watched(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(os.path.basename(args[0]))
        if len(calls) == number:
            action()
        return result

    monkeypatch.setattr(module, name, watched)
    return calls


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def shards(run, split):
    return sorted(run.path('codes', split).glob('shard-*.array_record'))


# Codes.


def test_only_missing_shards_are_written(run, monkeypatch):
    first, lost, last = shards(run, 'validation')
    before, content = [p.stat().mtime for p in (first, last)], lost.read_bytes()
    lost.unlink()
    written = act_after(monkeypatch, store, 'write_shard', -1, None)
    run_job(run, 'codes')  # although meta.json says that all was done
    assert written == [lost.name] and lost.read_bytes() == content
    assert [p.stat().mtime for p in (first, last)] == before
    lost.unlink()
    run.path('codes', 'validation', 'meta.json').unlink()
    run_job(run, 'codes')
    assert written == [lost.name] * 2 and run.codes('validation').meta.count == 9000


def test_an_interrupted_extraction_continues(run, monkeypatch):
    reference = {p.name: p.read_bytes() for split in ('train', 'validation') for p in shards(run, split)}
    run.path('codes').rmtree()
    written = act_after(monkeypatch, store, 'write_shard', 2, terminate)  # train has one shard, validation three
    with pytest.raises(Interrupted) as stop:
        run_job(run, 'codes')
    assert stop.value.code == 143 and len(written) == 2
    assert not run.path('codes', 'validation', 'meta.json').exists() and not run.path('codes', 'test').exists()
    with pytest.raises(JobError, match='--job=codes'):
        run_job(run, 'prior', 'top')
    (run.path('codes', 'validation') / (shards(run, 'validation')[0].name + '.unfinished-0')).write_bytes(b'torn')
    run_job(run, 'codes')
    assert len(written) == 5  # none twice
    assert {p.name: p.read_bytes() for split in ('train', 'validation') for p in shards(run, split)} == reference


def test_shards_of_another_size_are_not_mixed(run):
    run.config.codes.shard_size = 2048
    with pytest.raises(JobError, match=r'(?s)shard_size: 4096 there, 2048 now.*delete'):
        run_job(run, 'codes')


def test_a_damaged_shard_is_an_error_that_names_it(run):
    shard = shards(run, 'train')[0]
    shard.write_bytes(shard.read_bytes()[:1000])
    run.path('prior_top').rmtree()
    with pytest.raises(JobError, match=shard.name):
        run_job(run, 'prior', 'top')


# Samples.


def read_all(run, count):
    return samples.take(run.path('samples'), np.arange(count))


def assert_same_samples(found, expected):
    for name in ('arr_0', 'label', 'index', 'codes_0', 'codes_1'):
        np.testing.assert_array_equal(found[name], expected[name][: len(found[name])], err_msg=name)


def test_interrupted_sampling_continues_and_a_set_may_grow(run, finished, monkeypatch):
    run.path('samples').rmtree()
    written = act_after(monkeypatch, samples, 'write_npz', 1, terminate)
    with pytest.raises(Interrupted):
        run_job(run, 'sample')
    assert written == ['samples-00000000-00000016.npz']
    with pytest.raises(JobError, match='lacks 1 of 2 files'):
        read_all(run, 24)
    run_job(run, 'sample')
    assert written == ['samples-00000000-00000016.npz', 'samples-00000016-00000024.npz']
    assert_same_samples(read_all(run, 24), read_all(finished, 24))

    first = run.path('samples', written[0])
    before = first.stat().mtime
    run.config.sample.count = 40
    run_job(run, 'sample')
    assert written[2:] == ['samples-00000016-00000032.npz', 'samples-00000032-00000040.npz']
    assert first.stat().mtime == before
    assert_same_samples({k: v[:24] for k, v in read_all(run, 40).items()}, read_all(finished, 24))
    assert len(list(run.path('samples').glob('*.npz'))) == 3  # and no sample is there twice
    with pytest.raises(StaleInputError, match=r'(?s)the samples .*recorded.*now.*--job=reject'):
        run_job(run, 'evaluate')


def test_a_set_of_samples_never_shrinks(run):
    before = sorted(p.name for p in run.path('samples').iterdir())
    run.config.sample.count = 8
    with pytest.raises(
        JobError, match=r'(?s)set of 24 samples, more than sample.count=8.*count=24, or delete .*samples'
    ):
        run_job(run, 'sample')
    assert sorted(p.name for p in run.path('samples').iterdir()) == before


def test_growth_that_was_interrupted_leaves_no_sample_twice(run, monkeypatch):
    run.config.sample.count = 40
    act_after(monkeypatch, samples, 'write_npz', 1, terminate)
    with pytest.raises(Interrupted):
        run_job(run, 'sample')
    run.config.sample.count = 48
    run_job(run, 'sample')
    assert sorted(run.path('samples').glob('*.npz')) == samples.shard_paths(run.path('samples'))


def test_a_signal_during_the_last_file_is_not_swallowed(run, monkeypatch):
    run.path('samples').rmtree()
    act_after(monkeypatch, samples, 'write_npz', 2, terminate)
    with pytest.raises(Interrupted):
        run_job(run, 'sample')
    run_job(run, 'sample')
    assert run.path('samples', 'samples.png').exists()


def test_a_sample_depends_on_its_number_and_not_on_its_batch(run, finished):
    run.path('samples').rmtree()
    run.config.sample.update(count=8, batch_size=8)
    run_job(run, 'sample')
    assert_same_samples(read_all(run, 8), read_all(finished, 24))


def test_devices_that_run_no_program_together_take_turns(run, finished, monkeypatch):
    monkeypatch.setattr(parallel, '_run_one_program', lambda devices: False)
    used, put_batch = [], sharding.make_global_batch
    monkeypatch.setattr(parallel, 'put_batch', lambda batch: used.append(sharding.current_mesh()) or put_batch(batch))
    run.path('samples').rmtree()
    run.config.sample.update(batch_size=8)
    run_job(run, 'sample')
    assert_same_samples(read_all(run, 24), read_all(finished, 24))
    assert [list(mesh.devices.flat) for mesh in used] == [[device] for device in jax.devices()[:3]]

    used.clear()
    lost = shards(run, 'validation')[0]
    content = lost.read_bytes()
    lost.unlink()
    run_job(run, 'codes')
    assert lost.read_bytes() == content and len(set(used)) == 8


@pytest.mark.parametrize(
    'field, value, message',
    [
        ('seed', 5, 'seed: 0 there, 5 now'),
        ('batch_size', 8, 'batch_size: 16 there, 8 now'),
        ('labels', (1, 2), r'labels: \[\] there, \[1, 2\] now'),
        ('temperature.top', 0.5, r"temperature: .*'top': \S+} there, .*'top': 0.5} now"),
    ],
)
def test_samples_of_other_settings_are_not_mixed(run, field, value, message):
    section, _, name = f'sample.{field}'.rpartition('.')
    run.config[section][name] = value
    with pytest.raises(JobError, match=rf'(?s){message}.*delete .*samples'):
        run_job(run, 'sample')


# Training.


def test_training_goes_on_where_a_constant_rate_allows_it(run, monkeypatch):
    """More steps under way: until they are done the stage counts as untrained, as its weights may change any time."""
    run.config.classifier.training.update(decay='constant')
    run.path('classifier').rmtree()
    run_job(run, 'classifier')
    run.config.classifier.training.steps = 16
    write = RunLog.write

    def stop_at_12(log, step, prefix, metrics):
        write(log, step, prefix, metrics)
        if (step, prefix) == (12, 'validation'):
            terminate()

    monkeypatch.setattr(RunLog, 'write', stop_at_12)
    with pytest.raises(Interrupted):
        run_job(run, 'classifier')
    with pytest.raises(JobError, match='holds no finished training'):
        workdir.load_trained(run, 'classifier', 'classifier')
    monkeypatch.setattr(RunLog, 'write', write)
    run_job(run, 'classifier')
    record = workdir.load_trained(run, 'classifier', 'classifier').record
    assert record['steps'] == 16 and record['best_step'] <= 16
