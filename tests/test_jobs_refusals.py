"""A job refuses changed inputs, images or settings and says what to do; how much the checks read."""

import pytest

from vqvae2_jax.data import images
from vqvae2_jax.io import checksums, record
from vqvae2_jax.io.files import read_json
from vqvae2_jax.io.record import JobError, SettingsChangedError, StaleInputError
from vqvae2_jax.jobs import evaluate, feature_store, train
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.training.checkpoint import BestCheckpoint


def edit_record(run, *directory, **changes):
    """Changes fields of a record; returns it as it was."""
    path = run.path(*directory, record.FILE)
    fields = checksums.read_sealed(path)
    checksums.write_sealed(path, fields | changes)
    return fields


def retrain(run, directory):
    """As if a network had been trained again: other weights, hence another digest. Returns the old one."""
    return edit_record(run, directory, digest='f' * 64)['digest']


def replace_images(run, *directory):
    """As if an output had been made from other images. Returns the digest of the current ones."""
    fields = read_json(run.path(*directory, record.FILE))
    edit_record(run, *directory, inputs=fields['inputs'] | {'images': 'f' * 64})
    return fields['inputs']['images']


@pytest.mark.parametrize(
    'directory, jobs',
    [
        ('vqvae', ('extract_codes', 'prior', 'sample', 'evaluate')),
        ('prior_top', ('sample', 'evaluate')),
        ('classifier', ('evaluate',)),
    ],
)
def test_a_changed_input_is_refused_with_both_digests(run, directory, jobs):
    old = retrain(run, directory)
    for job in jobs:
        with pytest.raises(StaleInputError) as error:
            run_job(run, job)
        assert old in str(error.value) and 'f' * 64 in str(error.value), job


def test_new_samples_are_never_drawn_from_priors_of_another_stage_1(run):
    old = retrain(run, 'vqvae')
    run.path('samples', 'default').rmtree()
    with pytest.raises(StaleInputError, match=rf'(?s){old}.*{"f" * 64}.*delete .*prior_bottom'):
        run_job(run, 'sample')


def test_a_new_prior_never_learns_the_codes_of_another_stage_1(run):
    old = retrain(run, 'vqvae')
    run.path('prior_top').rmtree()
    with pytest.raises(StaleInputError, match=rf'(?s)codes.*{old}.*{"f" * 64}.*delete .*codes to extract them again'):
        run_job(run, 'prior', 'top')


def test_changed_codes_are_refused_by_the_priors_and_the_report(run):
    edit_record(run, 'codes', 'validation', digest='f' * 64)
    for job in ('prior', 'evaluate'):
        with pytest.raises(StaleInputError, match=r'(?s)prior_.*codes.*recorded.*now'):
            run_job(run, job)


def test_new_scores_follow_from_new_samples(run, capsys):
    run.path('samples', 'default').rmtree()
    run.config.sample.seed = 5
    run_job(run, 'sample')
    with pytest.raises(StaleInputError, match='--job=reject'):
        run_job(run, 'evaluate')
    run_job(run, 'reject')
    assert 'kept 14 of 24' in capsys.readouterr().out


@pytest.mark.parametrize(
    'job, field, value, message',
    [
        ('vqvae', 'vqvae.hidden_channels', 12, 'vqvae.hidden_channels: recorded 8, now 12'),
        ('vqvae', 'seed', 3, 'seed: recorded 0, now 3'),
        ('vqvae', 'vqvae.training.learning_rate', 0.5, 'learning_rate: recorded 0.001, now 0.5'),
        ('extract_codes', 'vqvae.codebook_size', 12, 'vqvae.codebook_size: recorded 16, now 12'),
        ('prior', 'prior.top.num_residual_blocks', 1, 'prior.top.num_residual_blocks: recorded 2, now 1'),
        ('sample', 'prior.bottom.hidden_channels', 4, 'prior.bottom.hidden_channels: recorded 8, now 4'),
        ('reject', 'classifier.widths', (8, 8), r'classifier.widths: recorded \[8, 16\], now \[8, 8\]'),
        ('evaluate', 'vqvae.codebook_dim', 4, 'vqvae.codebook_dim: recorded 8, now 4'),
        ('extract_codes', 'data.split_seed', 1, 'data.split_seed: recorded 0, now 1'),
        ('sample', 'data.split_seed', 1, 'data.split_seed: recorded 0, now 1'),
        ('reject', 'data.held_out', (0.5, 0.1), r'data.held_out: recorded \[0.9, 0.06\], now \[0.5, 0.1\]'),
        ('evaluate', 'data.split_seed', 1, 'data.split_seed: recorded 0, now 1'),
        ('evaluate', 'data.held_out', (0.9, 0.05), r'data.held_out: recorded \[0.9, 0.06\], now \[0.9, 0.05\]'),
        ('evaluate', 'data.name', 'cifar10', "data.name: recorded 'fashion', now 'cifar10'"),
    ],
)
def test_changed_settings_are_refused_with_both_values(run, job, field, value, message):
    section, _, name = field.rpartition('.')
    (run.config[section] if section else run.config)[name] = value
    with pytest.raises(SettingsChangedError, match=message):
        run_job(run, job)


@pytest.mark.parametrize(
    'directory, job',
    [
        ('vqvae', 'vqvae'),
        ('vqvae', 'extract_codes'),
        ('vqvae', 'evaluate'),
        ('classifier', 'classifier'),
        ('classifier', 'evaluate'),
    ],
)
def test_a_network_trained_on_other_images_is_refused(run, directory, job):
    now = replace_images(run, directory)
    assert now == run.images_digest()
    with pytest.raises(StaleInputError, match=rf'(?s)images.*{"f" * 64}.*{now}'):
        run_job(run, job)


@pytest.mark.parametrize('job', ['extract_codes', 'evaluate'])
def test_codes_of_other_images_are_refused(run, job):
    now = replace_images(run, 'codes', 'test')
    assert now == run.images('test').digest
    with pytest.raises(StaleInputError, match=rf'(?s)codes/test.*images.*{"f" * 64}.*{now}.*delete .*codes'):
        run_job(run, job)


def test_priors_notice_codes_of_other_images(run):
    edit_record(run, 'codes', 'train', digest='f' * 64)  # as the digest covers the inputs
    with pytest.raises(StaleInputError, match='codes'):
        run_job(run, 'prior', 'top')


@pytest.mark.parametrize('field', ['flip', 'crop'])
def test_augmentation_may_differ_once_trained(run, field):
    before = run.path('codes', 'test', 'record.json').stat().mtime
    run.config.data[field] = True
    run_job(run, 'extract_codes')
    assert run.path('codes', 'test', 'record.json').stat().mtime == before  # accepted as they are


def test_weights_of_another_versions_network_are_refused(run, monkeypatch):
    load = BestCheckpoint.load

    def renamed(weights):
        loaded = load(weights)
        if 'logits' in (params := loaded['params']):
            params['head'] = params.pop('logits')
        return loaded

    monkeypatch.setattr(BestCheckpoint, 'load', renamed)
    run_job(run, 'sample')  # done: the weights are not loaded
    run.config.sample.count += 1
    before = run.path('samples', 'default', 'record.json').read_text()
    with pytest.raises(JobError, match=r'(?s)prior_bottom.*version.*4 arrays.*params/head/bias.*now None.*Delete'):
        run_job(run, 'sample')
    assert run.path('samples', 'default', 'samples.png').exists()
    assert run.path('samples', 'default', 'record.json').read_text() == before


def test_a_record_tells_the_digest_without_the_weights(run, monkeypatch):
    monkeypatch.setattr(BestCheckpoint, 'load', None)
    evaluate.check_inputs(run, missing=())
    for job in ('prior', 'classifier', 'vqvae'):
        run_job(run, job)


@pytest.mark.parametrize(
    'missing, job, hint',
    [
        ('vqvae', 'extract_codes', 'run your command with --job=vqvae'),
        ('codes', 'prior', 'run your command with --job=extract_codes'),
        ('prior_bottom', 'sample', '--job=prior --level=bottom'),
        ('samples', 'reject', '--job=sample'),
        ('classifier', 'reject', '--job=classifier'),
    ],
)
def test_a_missing_input_names_the_job_that_makes_it(run, missing, job, hint):
    run.path(missing).rmtree()
    with pytest.raises(JobError, match=hint):
        run_job(run, job)


def test_the_report_tells_of_the_rejection_that_was_done(run):
    run.config.reject.keep_fraction = 0.9
    run_job(run, 'evaluate')
    assert read_json(run.path('report', 'report.json'))['sets']['default']['keep_fraction'] == 0.5


@pytest.mark.parametrize('job', ['vqvae', 'extract_codes', 'prior', 'classifier', 'sample', 'likelihood', 'evaluate'])
def test_workdirs_of_version_0_2_are_refused_by_name(run, job):
    for directory in ('vqvae', 'prior_top', 'prior_bottom', 'classifier'):
        run.path(directory, record.FILE).rename(run.path(directory, 'trained.json'))
    before = sorted(path.name for path in run.workdir.iterdir())
    with pytest.raises(JobError, match=r'was written by a version before 0.3 \(trained.json.*CHANGELOG.md'):
        run_job(run, job)
    assert sorted(path.name for path in run.workdir.iterdir()) == before


def test_unknown_levels_are_listed(run):
    with pytest.raises(JobError, match='--level=middle: the levels of this config are top, bottom'):
        run_job(run, 'prior', 'middle')
    with pytest.raises(JobError, match='--level belongs to --job=prior'):
        run_job(run, 'extract_codes', 'top')


# Reading.


def results_of(monkeypatch, owner, name):
    """Returns a list that all later results of owner.name are appended to."""
    function, results = getattr(owner, name), []

    def watched(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(owner, name, watched)
    return results


def test_evaluation_opens_each_split_once_and_ends_its_readers(run, monkeypatch):
    loads = results_of(monkeypatch, BestCheckpoint, 'load')
    opened = results_of(monkeypatch, images, 'open_images')
    readers = results_of(monkeypatch, feature_store, 'eval_batches')
    for name in ('evaluation', 'features', 'report'):
        run.path(name).rmtree()
    run_job(run, 'evaluate')
    assert len(opened) == 3
    assert len(loads) == 7  # stage 1, two priors, the classifier, and three of CAS
    assert readers and all(reader._reading is None for reader in readers)


def test_images_are_opened_again_when_the_config_changes(run):
    assert run.images('test') is run.images('test')
    before = run.images('test').digest
    run.config.data.split_seed = 1
    assert run.images('test').digest != before


def test_codes_are_read_without_worker_processes(run, monkeypatch):
    run.config.data.workers = 16
    run.path('prior_top').rmtree()
    monkeypatch.setattr(train, 'train', stop_with_data)
    with pytest.raises(StopIteration) as stop:
        run_job(run, 'prior', 'top')
    data = stop.value.value
    assert data.train._workers == 0 and data.val()._workers == 0
    run.path('vqvae').rmtree()
    with pytest.raises(StopIteration) as stop:
        run_job(run, 'vqvae')
    assert stop.value.value.train._workers == 16


def stop_with_data(task, config, data, *args, **kwargs):
    raise StopIteration(data)
