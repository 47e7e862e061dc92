"""The advice of messages is followed, and the job goes on."""

import os
import re
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.data import codes, sample_store
from vqvae2_jax.io import record
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import pipeline, remedies, train
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.training.finite import NonFiniteLoss

MEMORY = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 123456789 bytes.\n  a long table')


def edit_record(run, *directory, **changes):
    """Changes fields of a record."""
    output = record.read(run.path(*directory))
    for name, value in changes.items():
        setattr(output, name, value)
    output.write()


def retrain(run, directory):
    """As if a network had been trained again."""
    edit_record(run, directory, digest='f' * 64)


def replace_images(run, *directory):
    """As if an output had been made from other images."""
    inputs = record.read(run.path(*directory)).inputs
    edit_record(run, *directory, inputs=inputs | {'images': 'f' * 64})


class Accepted(Exception):
    """The training has begun."""


@pytest.fixture
def no_training(monkeypatch):
    """A training raises `Accepted`, or the exception that the test has set."""
    errors = []

    def begin(*args, **kwargs):
        raise errors.pop() if errors else Accepted

    monkeypatch.setattr(train, 'train', begin)
    return errors


def message_of(run, job, level=None, error=JobError):
    with pytest.raises(error) as raised:
        run_job(run, job, level)
    return str(raised.value)


def delete(run, message):
    """Deletes the directory below the workdir that a message says."""
    (path,) = set(re.findall(rf'[Dd]elete ({re.escape(str(run.workdir))}/\S*?)(?=,? |[,.]?$)', message))
    shutil.rmtree(path)
    return path


def set_fields(run, message):
    """Sets the first --config.<field>=<value> of a message."""
    path, value = re.search(r'--config\.([\w.]+)=([\w.]+)', message).groups()
    section, _, field = path.rpartition('.')
    fields = run.config[section]
    fields[field] = type(fields[field])(value == 'True' if isinstance(fields[field], bool) else value)
    return path


def accept(run, job, level=None):
    with pytest.raises(Accepted):
        run_job(run, job, level)


# Changed inputs and settings.


def set_rate(run):
    run.config.prior.top.training.learning_rate = 0.5


@pytest.mark.parametrize(
    'change, job, level, directory',
    [
        (lambda run: replace_images(run, 'vqvae'), 'vqvae', None, 'vqvae'),
        (lambda run: replace_images(run, 'vqvae'), 'extract_codes', None, 'vqvae'),
        (lambda run: replace_images(run, 'classifier'), 'classifier', None, 'classifier'),
        (lambda run: edit_record(run, 'codes', 'train', digest='f' * 64), 'prior', 'top', 'prior_top'),
        (lambda run: retrain(run, 'vqvae'), 'prior', 'top', 'codes'),
        (lambda run: retrain(run, 'vqvae'), 'sample', None, 'prior_bottom'),
        (set_rate, 'prior', 'top', 'prior_top'),
    ],
)
def test_what_is_stale_is_deleted_and_made_again(run, no_training, change, job, level, directory):
    change(run)
    deleted = delete(run, message_of(run, job, level))
    assert deleted == str(run.path(directory))
    maker, _, level = directory.partition('_')
    if maker == 'codes':
        run_job(run, 'extract_codes')
        assert run.codes('train').meta.count == 400
    else:
        if job == 'sample':  # and the codes, which its priors are of
            delete(run, message_of(run, 'prior', level))
            run_job(run, 'extract_codes')
        accept(run, maker, level or None)


def test_codes_and_samples_that_are_stale_are_made_again(run, finished):
    replace_images(run, 'codes', 'test')
    assert delete(run, message_of(run, 'extract_codes')) == str(run.path('codes', 'test'))
    run_job(run, 'extract_codes')
    run.config.sample.seed = 5
    message = message_of(run, 'sample')
    assert delete(run, message) == str(run.path('samples', 'default'))
    run_job(run, 'sample')
    assert record.read_done(run.path('samples', 'default'), 'sample').settings['seed'] == 5


def test_a_set_that_may_not_shrink_is_kept_with_the_count_of_the_message(run):
    run.config.sample.count = 8
    assert set_fields(run, message_of(run, 'sample')) == 'sample.count'
    run_job(run, 'sample')


def test_a_threshold_that_keeps_nothing_is_lowered_to_the_best_score(run):
    run.config.reject.threshold = 1.0
    best = re.search('the best one scores (.*)', message_of(run, 'reject'))[1]
    run.config.reject.threshold = float(best) * 0.999  # it is rounded
    run_job(run, 'reject')
    assert record.read_done(run.path('rejection', 'default'), 'reject').results['accepted'] >= 1


def test_another_workdir_takes_other_settings(run, no_training, tmp_path):
    set_rate(run)
    assert 'give another --workdir' in message_of(run, 'prior', 'top')
    shutil.copytree(run.workdir, tmp_path / 'other', ignore=shutil.ignore_patterns('prior_top'))
    accept(Run(run.config, epath.Path(tmp_path) / 'other'), 'prior', 'top')


@pytest.mark.parametrize('missing, job, level', [('codes', 'prior', 'top'), ('samples', 'reject', None)])
def test_the_job_that_makes_a_missing_input_is_run(run, no_training, missing, job, level):
    run.path(missing).rmtree()
    maker = re.search(r'run your command with --job=(\w+)', message_of(run, job, level))[1]
    run_job(run, maker)
    if job == 'prior':
        run.path('prior_top').rmtree()
        accept(run, job, level)
    else:
        run_job(run, job, level)
        assert record.read_done(run.path('rejection', 'default'), job).state == record.DONE


# Out of memory.


@pytest.mark.parametrize(
    'job, field',
    [
        ('extract_codes', 'codes.batch_size'),
        ('sample', 'sample.batch_size'),
        ('reject', 'evaluate.batch_size'),
        ('cas', 'codes.batch_size'),
        ('evaluate', 'evaluate.batch_size'),
        ('likelihood', 'evaluate.batch_size'),
        ('inpaint', 'inpaint.count'),
    ],
)
def test_out_of_memory_is_one_line_that_names_the_batch(run, monkeypatch, job, field):
    def fail(run):
        raise MEMORY

    monkeypatch.setitem(pipeline._PIPELINE if job in pipeline._PIPELINE else pipeline._OTHERS, job, fail)
    section, name = field.split('.')
    run.config[section][name] = 32
    message = message_of(run, job)
    assert message == (
        f'{job}: RESOURCE_EXHAUSTED: Out of memory allocating 123456789 bytes. Lower --config.{field}, which is 32, '
        'for example to 16; what is written is kept'
    )
    run.config[section][name] = 8  # as many as there are devices
    assert f'{field} is 8, which 8 devices cannot share further' in message_of(run, job)


@pytest.mark.parametrize('job, field', [('extract_codes', 'codes.batch_size'), ('sample', 'sample.batch_size')])
def test_after_running_out_of_memory_a_smaller_batch_continues_to_the_same_files(
    run, finished, monkeypatch, job, field
):
    directory, module, name = {
        'extract_codes': (('codes', 'validation'), codes, 'write_shard'),
        'sample': (('samples', 'default'), sample_store, 'write_npz'),
    }[job]
    run.path(directory[0]).rmtree()
    write, written = getattr(module, name), []

    def fail_at_the_second(*args):
        written.append(args[0])
        if len(written) == 2:
            raise MEMORY
        write(*args)

    monkeypatch.setattr(module, name, fail_at_the_second)
    section, batch_size = field.split('.')
    message = message_of(run, job)
    monkeypatch.setattr(module, name, write)
    before = os.stat(written[0]).st_mtime_ns
    run.config[section][batch_size] = int(re.search('for example to ([0-9]+)', message)[1])
    run_job(run, job)
    assert os.stat(written[0]).st_mtime_ns == before
    digests = [record.read_done(each.path(*directory), job).digest for each in (run, finished)]
    assert digests[0] == digests[1]
    if job == 'sample':
        found, expected = (sample_store.take(each.path(*directory), np.arange(24)) for each in (run, finished))
        np.testing.assert_array_equal(found['arr_0'], expected['arr_0'])


@pytest.mark.parametrize(
    'error', [jax.errors.JaxRuntimeError('INTERNAL: RESOURCE_EXHAUSTED'), RuntimeError('RESOURCE_EXHAUSTED: no')]
)
def test_other_errors_of_a_job_keep_their_type(run, no_training, error):
    for context in (remedies.of_job(run, 'sample'), remedies.of_training(run, 'prior.top', run.path('prior_top'))):
        with pytest.raises(type(error), match=re.escape(str(error))), context:
            raise error


@pytest.mark.parametrize('section', ['vqvae', 'prior.top', 'classifier'])
def test_every_remedy_of_a_training_that_runs_out_of_memory_is_accepted(run, no_training, section):
    job, _, level = section.partition('.')
    fields = run.config[section].training
    fields.batch_size = 32 if section == 'vqvae' else 16
    run.path(section.replace('.', '_')).rmtree()
    no_training.append(MEMORY)
    message = message_of(run, job, level or None)
    advice = message.partition('To need less memory, ')[2].split(', or ')
    expected = {
        'vqvae': [],
        'prior.top': ['prior.top.training.grad_accum_steps', 'prior.top.remat'],
        'classifier': ['classifier.training.grad_accum_steps'],
    }[section]
    assert [set_fields(run, text) for text in advice[:-1]] == expected
    if expected:
        accept(run, job, level or None)  # its directory is continued
    assert advice[-1].endswith(f'--config.{section}.training.batch_size than {fields.batch_size}')
    delete(run, message)
    fields.batch_size //= 2
    fields.update(grad_accum_steps=1)
    accept(run, job, level or None)


# Divergence.


def diverged(*saved_steps):
    error = NonFiniteLoss('loss is nan at step 6')
    error.saved_steps = saved_steps
    return error


@pytest.mark.parametrize('section', ['vqvae', 'prior.top', 'classifier'])
def test_a_training_that_diverges_before_a_checkpoint_starts_anew_with_a_lower_rate(run, no_training, section):
    job, _, level = section.partition('.')
    run.path(section.replace('.', '_')).rmtree()
    no_training.append(diverged())
    message = message_of(run, job, level or None, NonFiniteLoss)
    assert 'loss is nan at step 6. No such state was saved, and the same command would diverge again: ' in message
    delete(run, message)
    before = run.config[section].training.learning_rate
    assert set_fields(run, message) == f'{section}.training.learning_rate'
    assert run.config[section].training.learning_rate == pytest.approx(before / 2, rel=0.01)
    validate_config(run.config)
    accept(run, job, level or None)


def test_a_training_that_diverges_later_continues_from_its_last_checkpoint(run, no_training):
    no_training.append(diverged(2, 4))
    run.config.prior.top.training.steps = 16  # so that it is not done
    run.config.prior.top.training.lr_schedule = 'constant'
    run.config.prior.top.training.clip_norm = 0.0
    run.path('prior_top').rmtree()
    message = message_of(run, 'prior', 'top', NonFiniteLoss)
    command = re.escape('run your command with --job=prior --level=top --continue_from=4 --config.prior.top.training.')
    remedy = rf'{command}learning_rate=\S+ or {re.escape("--config.prior.top.training.")}clip_norm=1.0, '
    assert re.search(remedy + 'or if that diverges too, with --continue_from=2, or delete ', message)
    delete(run, message)
    set_fields(run, message)
    accept(run, 'prior', 'top')


@pytest.mark.parametrize('field, value', [('learning_rate', 1e-4), ('clip_norm', 0.5)])
def test_a_finished_training_is_continued_with_the_field_of_the_advice(run, no_training, field, value):
    no_training.append(diverged(4))
    with pytest.raises(NonFiniteLoss) as error, remedies.of_training(run, 'prior.top', run.path('prior_top')):
        raise no_training.pop()
    step = int(re.search(r'--continue_from=([0-9]+) ', str(error.value))[1])
    run.config.prior.top.training[field] = value
    accept(Run(run.config, run.workdir, None, step), 'prior', 'top')
