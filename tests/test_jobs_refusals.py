"""A job whose upstream, images or settings changed refuses and says what to do; what the checks read for it."""

import pytest

from vqvae2_jax.data import images
from vqvae2_jax.evaluation import measure, report
from vqvae2_jax.io.files import StaleInputError, read_json, write_json
from vqvae2_jax.jobs import cas, evaluate, train
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import JobError
from vqvae2_jax.training.checkpoint import BestCheckpoint


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
        with pytest.raises(StaleInputError) as error:
            run_job(run, job)
        assert old in str(error.value) and 'f' * 64 in str(error.value), job


def test_new_samples_are_never_drawn_from_priors_of_another_stage_1(run):
    old = retrain(run, 'vqvae')
    run.path('samples').rmtree()
    with pytest.raises(StaleInputError, match=rf'(?s){old}.*{"f" * 64}.*Delete .*prior_bottom'):
        run_job(run, 'sample')


def test_a_new_prior_never_learns_the_codes_of_another_stage_1(run):
    old = retrain(run, 'vqvae')
    run.path('prior_top').rmtree()
    with pytest.raises(StaleInputError, match=rf'(?s)codes.*{old}.*{"f" * 64}.*--job=codes'):
        run_job(run, 'prior', 'top')


def test_changed_codes_are_refused_by_the_priors_and_the_report(run):
    path = run.path('codes', 'validation', 'meta.json')
    path.write_text(path.read_text().replace('9000', '8999'))
    for job in ('prior', 'evaluate'):
        with pytest.raises(StaleInputError, match=r'(?s)codes.*recorded.*now.*prior_'):
            run_job(run, job)


def test_new_scores_follow_from_new_samples(run, capsys):
    run.path('samples').rmtree()
    run.config.sample.seed = 5
    run_job(run, 'sample')
    with pytest.raises(StaleInputError, match='--job=reject'):
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
        ('codes', 'data.split_seed', 1, 'data.split_seed: 0 there, 1 now'),
        ('sample', 'data.split_seed', 1, 'data.split_seed: 0 there, 1 now'),
        ('reject', 'data.held_out', (0.5, 0.1), r'data.held_out: \[0.9, 0.06\] there, \[0.5, 0.1\] now'),
        ('evaluate', 'data.split_seed', 1, 'data.split_seed: 0 there, 1 now'),
        ('evaluate', 'data.held_out', (0.9, 0.05), r'data.held_out: \[0.9, 0.06\] there, \[0.9, 0.05\] now'),
        ('evaluate', 'data.name', 'cifar10', "data.name: 'fashion' there, 'cifar10' now"),
    ],
)
def test_changed_settings_are_refused_with_both_values(run, job, field, value, message):
    section, _, name = field.rpartition('.')
    (run.config[section] if section else run.config)[name] = value
    with pytest.raises(JobError, match=message):
        run_job(run, job)


@pytest.mark.parametrize(
    'directory, job',
    [
        ('vqvae', 'vqvae'),
        ('vqvae', 'codes'),
        ('vqvae', 'evaluate'),
        ('classifier', 'classifier'),
        ('classifier', 'evaluate'),
    ],
)
def test_a_stage_trained_on_other_images_is_refused(run, directory, job):
    for name in ('settings.json', 'trained.json'):
        record = read_json(run.path(directory, name))
        assert record['upstream']['images'] == run.images_digest()
        record['upstream']['images'] = 'f' * 64
        write_json(run.path(directory, name), record)
    with pytest.raises(StaleInputError, match=rf'(?s)images.*{"f" * 64}.*{run.images_digest()}'):
        run_job(run, job)


@pytest.mark.parametrize('job', ['codes', 'evaluate'])
def test_codes_of_other_images_are_refused(run, job):
    path = run.path('codes', 'test', 'started.json')
    started = read_json(path)
    now, started['images_digest'] = started['images_digest'], 'f' * 64
    assert now == run.images('test').digest
    write_json(path, started)
    with pytest.raises(StaleInputError, match=rf'(?s)images.*{"f" * 64}.*{now}.*delete .*codes/test'):
        run_job(run, job)


def test_priors_notice_codes_of_other_images(run):
    path = run.path('codes', 'train', 'started.json')
    write_json(path, read_json(path) | {'images_digest': 'f' * 64})
    with pytest.raises(StaleInputError, match='codes'):
        run_job(run, 'prior', 'top')


@pytest.mark.parametrize('field', ['flip', 'crop'])
def test_augmentation_may_differ_once_trained(run, field):
    before = run.path('codes', 'test', 'meta.json').stat().mtime
    run.config.data[field] = True
    run_job(run, 'codes')
    assert run.path('codes', 'test', 'meta.json').stat().mtime == before  # accepted as they are


def test_weights_of_another_versions_network_are_refused(run, monkeypatch):
    load = BestCheckpoint.load

    def renamed(weights):
        loaded = load(weights)
        if 'logits' in (params := loaded['params']):
            params['head'] = params.pop('logits')
        return loaded

    monkeypatch.setattr(BestCheckpoint, 'load', renamed)
    run_job(run, 'sample')  # done, whoever drew them
    run.config.sample.count += 1
    before = run.path('samples', 'meta.json').read_text()
    with pytest.raises(JobError, match=r'(?s)prior_bottom.*version.*4 arrays.*params/head/bias.*None now.*Delete'):
        run_job(run, 'sample')
    assert run.path('samples', 'samples.png').exists() and run.path('samples', 'meta.json').read_text() == before


def test_a_record_tells_the_digest_without_the_weights(run, monkeypatch):
    monkeypatch.setattr(BestCheckpoint, 'load', None)
    evaluate.check_upstreams(run)
    for job in ('prior', 'classifier', 'vqvae'):
        run_job(run, job)


@pytest.mark.parametrize(
    'missing, job, remedy',
    [
        ('vqvae', 'codes', 'add --job=vqvae to your command'),
        ('codes', 'prior', 'add --job=codes to your command'),
        ('prior_bottom', 'sample', '--job=prior --level=bottom'),
        ('samples', 'reject', '--job=sample'),
        ('classifier', 'reject', '--job=classifier'),
        ('rejection', 'evaluate', 'add --job=reject to your command'),
        ('samples', 'evaluate', '--job=sample'),
    ],
)
def test_what_is_missing_names_the_job_that_makes_it(run, missing, job, hint):
    run.path(missing).rmtree()
    with pytest.raises(JobError, match=hint):
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


# Reading.


def results_of(monkeypatch, owner, name):
    """What owner.name returns from now on, in a list."""
    function, results = getattr(owner, name), []

    def watched(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(owner, name, watched)
    return results


def test_evaluation_opens_each_split_once_and_ends_its_readers(run, monkeypatch):
    loads = results_of(monkeypatch, BestCheckpoint, 'load')
    opened = results_of(monkeypatch, images, 'open_images')
    readers = [results_of(monkeypatch, module, 'eval_batches') for module in (measure, cas, report)]
    for section in (run.config.vqvae, run.config.prior.top):
        section.training.batch_size = 6  # eight devices may have shared it by fsdp; here one process judges alone
    run_job(run, 'evaluate')
    assert len(opened) == 3
    assert len(loads) == 7  # stage 1, two priors, the judge; the three classifiers of CAS
    assert all(readers) and all(reader._reading is None for module in readers for reader in module)


def test_images_are_opened_anew_when_the_config_changes(run):
    assert run.images('test') is run.images('test')
    before = run.images('test').digest
    run.config.data.split_seed = 1
    assert run.images('test').digest != before


def test_codes_are_read_without_worker_processes(run, monkeypatch):
    run.config.data.workers = 16
    run.path('prior_top').rmtree()
    monkeypatch.setattr(train, 'fit', stop_with_data)
    with pytest.raises(StopIteration) as stop:
        run_job(run, 'prior', 'top')
    data = stop.value.value
    assert data.train._workers == 0 and data.held_out()._workers == 0
    run.path('vqvae').rmtree()
    with pytest.raises(StopIteration) as stop:
        run_job(run, 'vqvae')
    assert stop.value.value.train._workers == 16


def stop_with_data(stage, training, data, *args, **kwargs):
    raise StopIteration(data)
