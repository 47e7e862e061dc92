"""Stopped jobs continue, sets of samples grow, finished work is not done again; devices and batches change no file."""

import os
import signal

import jax
import numpy as np
import pytest

from vqvae2_jax.data import codes as store
from vqvae2_jax.data import sample_store
from vqvae2_jax.distributed.preemption import Interrupted
from vqvae2_jax.io import record
from vqvae2_jax.io.logging import MetricsLogger
from vqvae2_jax.io.record import JobError, SettingsChangedError, StaleInputError
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run


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
    digest = record.read_done(run.path('codes', 'validation'), 'extract_codes').digest
    lost.unlink()
    written = act_after(monkeypatch, store, 'write_shard', -1, None)
    run_job(run, 'extract_codes')  # although the record says that all was done
    assert written == [lost.name] and lost.read_bytes() == content
    assert [p.stat().mtime for p in (first, last)] == before
    lost.unlink()
    run.path('codes', 'validation', 'record.json').unlink()
    run_job(run, 'extract_codes')
    names = [path.name for path in shards(run, 'validation')]
    assert written == [lost.name, *names] and run.codes('validation').meta.count == 9000
    assert record.read_done(run.path('codes', 'validation'), 'extract_codes').digest == digest


def test_an_interrupted_extraction_continues(run, monkeypatch, capsys):
    reference = {p.name: p.read_bytes() for split in ('train', 'validation') for p in shards(run, split)}
    run.path('codes').rmtree()
    written = act_after(monkeypatch, store, 'write_shard', 2, terminate)  # train has one shard, validation three
    with pytest.raises(Interrupted) as stop:
        run_job(run, 'extract_codes')
    assert stop.value.code == 143 and len(written) == 2
    assert 'codes validation: 1 of 3 shards written; the same command continues' in capsys.readouterr().out
    assert record.read(run.path('codes', 'validation')).state == record.STARTED
    assert not run.path('codes', 'test').exists()
    with pytest.raises(JobError, match='--job=extract_codes'):
        run_job(run, 'prior', 'top')
    torn = run.path('codes', 'validation') / (shards(run, 'validation')[0].name + '.unfinished-01234567')
    torn.write_bytes(b'torn')
    run_job(run, 'extract_codes')
    assert len(written) == 5 and not torn.exists()  # none is written twice
    assert {p.name: p.read_bytes() for split in ('train', 'validation') for p in shards(run, split)} == reference


@pytest.mark.parametrize('devices, batch_size', [(1, 512), (2, 500), (8, 2001)])
def test_codes_depend_neither_on_the_devices_nor_on_the_batch_size(run, devices, batch_size, capsys):
    reference = {split: [p.read_bytes() for p in shards(run, split)] for split in ('train', 'validation', 'test')}
    run.path('codes').rmtree()
    run.config.codes.batch_size = batch_size
    run_job(Run(run.config, run.workdir, jax.devices()[:devices]), 'extract_codes')
    assert {split: [p.read_bytes() for p in shards(run, split)] for split in reference} == reference
    padded = -(-batch_size // devices) * devices
    assert f'codes.batch_size {batch_size}, padded to {padded}' in capsys.readouterr().out


def test_shards_of_another_size_are_not_mixed(run):
    run.config.codes.shard_size = 2048
    with pytest.raises(SettingsChangedError, match=r'(?s)shard_size: recorded 4096, now 2048.*delete'):
        run_job(run, 'extract_codes')


def test_a_damaged_shard_is_an_error_that_names_it(run):
    shard = shards(run, 'train')[0]
    shard.write_bytes(shard.read_bytes()[:1000])
    run.path('prior_top').rmtree()
    with pytest.raises(JobError, match=shard.name):
        run_job(run, 'prior', 'top')


# Samples.


def set_path(run):
    return run.path('samples', 'default')


def read_all(run, count, name='default'):
    return sample_store.take(run.path('samples', name), np.arange(count))


def shard_paths(run):
    return sample_store.shard_paths(sample_store.read_set(set_path(run)))


def assert_same_samples(found, expected):
    for name in ('arr_0', 'label', 'index', 'codes_0', 'codes_1'):
        np.testing.assert_array_equal(found[name], expected[name][: len(found[name])], err_msg=name)


def test_interrupted_sampling_continues_and_a_set_may_grow(run, finished, monkeypatch):
    set_path(run).rmtree()
    written = act_after(monkeypatch, sample_store, 'write_npz', 1, terminate)
    with pytest.raises(Interrupted):
        run_job(run, 'sample')
    assert written == ['samples-00000000-00000016.npz']
    with pytest.raises(JobError, match='is not finished: run your command with --job=sample'):
        read_all(run, 24)
    run_job(run, 'sample')
    assert written == ['samples-00000000-00000016.npz', 'samples-00000016-00000024.npz']
    assert_same_samples(read_all(run, 24), read_all(finished, 24))

    first = set_path(run) / written[0]
    before = first.stat().mtime
    run.config.sample.count = 40
    run_job(run, 'sample')
    assert written[2:] == ['samples-00000016-00000032.npz', 'samples-00000032-00000040.npz']
    assert first.stat().mtime == before
    assert_same_samples({k: v[:24] for k, v in read_all(run, 40).items()}, read_all(finished, 24))
    assert len(list(set_path(run).glob('*.npz'))) == 3  # and no sample is there twice
    with pytest.raises(StaleInputError, match='(?s)rejection/default.*samples.*recorded.*now.*--job=reject'):
        run_job(run, 'evaluate')


def test_a_set_of_samples_never_shrinks(run):
    before = sorted(p.name for p in set_path(run).iterdir())
    run.config.sample.count = 8
    with pytest.raises(
        JobError, match=r'(?s)set of 24 samples, more than sample.count=8.*count=24, or delete .*samples/default'
    ):
        run_job(run, 'sample')
    assert sorted(p.name for p in set_path(run).iterdir()) == before


def test_growth_that_was_interrupted_leaves_no_sample_twice(run, monkeypatch):
    run.config.sample.count = 40
    act_after(monkeypatch, sample_store, 'write_npz', 1, terminate)
    with pytest.raises(Interrupted):
        run_job(run, 'sample')
    run.config.sample.count = 48
    run_job(run, 'sample')
    assert sorted(set_path(run).glob('*.npz')) == shard_paths(run)


def test_a_signal_during_the_last_file_is_not_swallowed(run, monkeypatch):
    set_path(run).rmtree()
    act_after(monkeypatch, sample_store, 'write_npz', 2, terminate)
    with pytest.raises(Interrupted):
        run_job(run, 'sample')
    run_job(run, 'sample')
    assert (set_path(run) / 'samples.png').exists()


@pytest.mark.parametrize('devices, batch_size', [(1, 8), (2, 5), (8, 24)])
def test_files_of_samples_depend_neither_on_the_devices_nor_on_the_batch_size(run, finished, devices, batch_size):
    directory = set_path(run)
    names = sorted(path.name for path in directory.iterdir())
    directory.rmtree()
    run.config.sample.batch_size = batch_size
    run_job(Run(run.config, run.workdir, jax.devices()[:devices]), 'sample')
    assert sorted(path.name for path in directory.iterdir()) == names
    assert_same_samples(read_all(run, 24), read_all(finished, 24))
    of = [record.read_done(set_path(r), 'sample') for r in (run, finished)]
    assert of[0].digest == of[1].digest


def test_a_sample_depends_on_its_number_and_not_on_the_count(run, finished):
    set_path(run).rmtree()
    run.config.sample.update(count=8, shard_size=3)
    run_job(run, 'sample')
    assert len(shard_paths(run)) == 3
    assert_same_samples(read_all(run, 8), {k: v[:8] for k, v in read_all(finished, 24).items()})


@pytest.mark.parametrize(
    'field, value, message',
    [
        ('seed', 5, 'seed: recorded 0, now 5'),
        ('shard_size', 8, 'shard_size: recorded 16, now 8'),
        ('labels', (1, 2), r'labels: recorded \[\], now \[1, 2\]'),
        ('temperature.top', 0.5, r"temperature: recorded .*'top': \S+}, now .*'top': 0.5}"),
    ],
)
def test_samples_of_other_settings_are_not_mixed(run, field, value, message):
    section, _, name = f'sample.{field}'.rpartition('.')
    run.config[section][name] = value
    hint = 'Set --config.sample.name=OTHER to keep both.*delete .*samples/default'
    with pytest.raises(SettingsChangedError, match=rf'(?s){message}.*{hint}'):
        run_job(run, 'sample')


def test_sets_of_samples_lie_side_by_side(run, finished):
    run.config.sample.update(name='cold-0.5', count=8)
    run.config.sample.temperature.top = 0.5
    run_job(run, 'sample')
    cold = read_all(run, 8, 'cold-0.5')
    assert (cold['codes_1'] != read_all(finished, 24)['codes_1'][:8]).any()
    assert_same_samples(read_all(run, 24, 'default'), read_all(finished, 24))
    found = {name: record.read_done(run.path('samples', name), 'sample') for name in ('default', 'cold-0.5')}
    assert found['cold-0.5'].settings['temperature']['top'] == 0.5
    assert found['cold-0.5'].digest != found['default'].digest and found['default'].results == {'count': 24}


def test_a_lost_picture_is_made_again_without_new_samples(run, monkeypatch, capsys):
    written = act_after(monkeypatch, sample_store, 'write_npz', -1, None)
    before = record.read_done(set_path(run), 'sample')
    (set_path(run) / 'samples.png').unlink()
    run_job(run, 'sample')
    assert not written and (set_path(run) / 'samples.png').exists()
    assert record.read_done(set_path(run), 'sample') == before
    run_job(run, 'sample')
    assert 'sample: done (24 samples' in capsys.readouterr().out


# Training.


def test_training_goes_on_where_a_constant_rate_allows_it(run, monkeypatch):
    """Until the further steps are done the network counts as untrained, since its weights may change at any time."""
    run.config.classifier.training.update(lr_schedule='constant')
    run.path('classifier').rmtree()
    run_job(run, 'classifier')
    run.config.classifier.training.steps = 16
    write = MetricsLogger.write

    def stop_at_12(log, step, prefix, metrics):
        write(log, step, prefix, metrics)
        if (step, prefix) == (12, 'validation'):
            terminate()

    monkeypatch.setattr(MetricsLogger, 'write', stop_at_12)
    with pytest.raises(Interrupted):
        run_job(run, 'classifier')
    with pytest.raises(JobError, match='classifier is not finished: run your command with --job=classifier'):
        workdir.load_trained(run, 'classifier')
    monkeypatch.setattr(MetricsLogger, 'write', write)
    run_job(run, 'classifier')
    results = workdir.load_trained(run, 'classifier').record.results
    assert results['steps'] == 16 and results['best_step'] <= 16
