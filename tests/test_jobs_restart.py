"""Stopped jobs continue; a job whose upstream or settings changed refuses and says what to do."""

import os
import signal

import numpy as np
import pytest

from vqvae2_jax.data import codes as store
from vqvae2_jax.io.interrupt import Interrupted
from vqvae2_jax.io.logging import RunLog
from vqvae2_jax.io.provenance import UpstreamChanged, read_json, write_json
from vqvae2_jax.jobs import samples, workdir
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
    with pytest.raises(UpstreamChanged, match=r'(?s)the samples .*recorded.*now.*--job=reject'):
        run_job(run, 'evaluate')


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


# Refusals.


def retrain(run, directory):
    """As if `directory` had been trained anew: other weights, hence another digest."""
    path = run.path(directory, 'trained.json')
    record = read_json(path)
    old, record['digest'] = record['digest'], 'f' * 64
    write_json(path, record)
    return old


@pytest.mark.parametrize(
    'directory, jobs',
    [
        ('vqvae', ('codes', 'prior', 'sample', 'evaluate')),
        ('prior_top', ('sample', 'evaluate')),
        ('classifier', ('evaluate',)),
    ],
)
def test_a_changed_upstream_is_refused_with_both_digests(run, directory, jobs):
    old = retrain(run, directory)
    for job in jobs:
        with pytest.raises(UpstreamChanged) as error:
            run_job(run, job)
        assert old in str(error.value) and 'f' * 64 in str(error.value), job


def test_new_samples_are_never_drawn_from_priors_of_another_stage_1(run):
    old = retrain(run, 'vqvae')
    run.path('samples').rmtree()
    with pytest.raises(UpstreamChanged, match=rf'(?s){old}.*{"f" * 64}.*Delete .*prior_bottom'):
        run_job(run, 'sample')


def test_a_new_prior_never_learns_the_codes_of_another_stage_1(run):
    old = retrain(run, 'vqvae')
    run.path('prior_top').rmtree()
    with pytest.raises(UpstreamChanged, match=rf'(?s)codes.*{old}.*{"f" * 64}.*--job=codes'):
        run_job(run, 'prior', 'top')


def test_changed_codes_are_refused_by_the_priors_and_the_report(run):
    path = run.path('codes', 'validation', 'meta.json')
    path.write_text(path.read_text().replace('9000', '8999'))
    for job in ('prior', 'evaluate'):
        with pytest.raises(UpstreamChanged, match=r'(?s)codes.*recorded.*now.*prior_'):
            run_job(run, job)


def test_new_scores_follow_from_new_samples(run, capsys):
    run.path('samples').rmtree()
    run.config.sample.seed = 5
    run_job(run, 'sample')
    with pytest.raises(UpstreamChanged, match='--job=reject'):
        run_job(run, 'evaluate')
    run_job(run, 'reject')
    assert 'kept 14 of 24' in capsys.readouterr().out


@pytest.mark.parametrize(
    'job, field, value, message',
    [
        ('vqvae', 'vqvae.hidden', 12, 'vqvae.hidden: 8 there, 12 now'),
        ('vqvae', 'seed', 3, 'seed: 0 there, 3 now'),
        ('vqvae', 'vqvae.training.learning_rate', 0.5, 'learning_rate: 0.001 there, 0.5 now'),
        ('codes', 'vqvae.codebook_size', 12, 'vqvae.codebook_size: 16 there, 12 now'),
        ('prior', 'prior.top.layers', 1, 'prior.top.layers: 2 there, 1 now'),
        ('sample', 'prior.bottom.hidden', 4, 'prior.bottom.hidden: 8 there, 4 now'),
        ('reject', 'classifier.widths', (8, 8), r'classifier.widths: \[8, 16\] there, \[8, 8\] now'),
        ('evaluate', 'vqvae.codebook_dim', 4, 'vqvae.codebook_dim: 8 there, 4 now'),
    ],
)
def test_changed_settings_are_refused_with_both_values(run, job, field, value, message):
    section, _, name = field.rpartition('.')
    (run.config[section] if section else run.config)[name] = value
    with pytest.raises(JobError, match=message):
        run_job(run, job)


@pytest.mark.parametrize(
    'missing, job, remedy',
    [
        ('vqvae', 'codes', '--job=vqvae'),
        ('codes', 'prior', '--job=codes'),
        ('prior_bottom', 'sample', '--job=prior --level=bottom'),
        ('samples', 'reject', '--job=sample'),
        ('classifier', 'reject', '--job=classifier'),
        ('rejection', 'evaluate', '--job=reject'),
        ('samples', 'evaluate', '--job=sample'),
    ],
)
def test_what_is_missing_names_the_job_that_makes_it(run, missing, job, remedy):
    run.path(missing).rmtree()
    with pytest.raises(JobError, match=remedy):
        run_job(run, job)


def test_the_report_tells_of_the_rejection_that_was_done(run):
    run.config.reject.keep = 0.9
    run_job(run, 'evaluate')
    assert read_json(run.path('report', 'report.json'))['samples']['kept'] == 0.5


def test_unknown_levels_are_listed(run):
    with pytest.raises(JobError, match='--level=middle: the levels of this config are top, bottom'):
        run_job(run, 'prior', 'middle')
    with pytest.raises(JobError, match='--level belongs to --job=prior'):
        run_job(run, 'codes', 'top')


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
