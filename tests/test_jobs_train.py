"""Training jobs and their records: done, continued, refused, and restored."""

import sys

import pytest

from tests.test_trackers import FakeWandB
from vqvae2_jax.io import files, record, trackers
from vqvae2_jax.io.logging import RUNTIME_FIELDS, read_metrics
from vqvae2_jax.io.record import JobError, SettingsChangedError, StaleInputError
from vqvae2_jax.jobs import train, workdir
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.planning import hardware
from vqvae2_jax.training.checkpoint import BestCheckpoint, CheckpointMismatch, Checkpoints


@pytest.fixture
def small(config, tmp_path):
    """A run whose classifier trains for four steps at a constant rate."""
    training = config.classifier.training
    training.update(steps=4, lr_schedule='constant', eval_every=2, save_every=4, log_every=2, eval_examples=16)
    return Run(config, tmp_path / 'run')


def read(run):
    return record.read(run.path('classifier'))


def test_a_finished_training_is_recorded_and_not_repeated(small, capsys):
    train.train_classifier(small)
    lines = capsys.readouterr().out.splitlines()
    start = next(line for line in lines if line.startswith('classifier: 8 x cpu in 1 process, mesh data=8 fsdp=1; '))
    assert start.endswith('; 400 training and 16 validation examples, batch size 16')
    found, best = read(small), BestCheckpoint(small.path('classifier'))
    assert found.state == record.DONE and found.inputs == {'images': small.images_digest()}
    assert found.digest == files.digest_arrays(best.load()) and found.seconds > 0
    assert found.results['steps'] == 4 and found.results['best_step'] == best.best()['step']
    assert found.results['val'] == best.best()['metrics'] and found.results['parameters'] > 1000
    assert f'{found.results["parameters"]:,} parameters' in start
    assert workdir.load_trained(small, 'classifier').digest == found.digest
    train.train_classifier(small)
    assert capsys.readouterr().out.startswith('classifier: done (best of 4 steps is ')


def test_more_steps_lose_the_done_state_before_the_weights_change(small, monkeypatch):
    train.train_classifier(small)
    small.config.classifier.training.steps = 6
    states = []

    def look(self, step, *_):
        states.append(read(small).state)
        return True

    monkeypatch.setattr(BestCheckpoint, 'save_if_best', look)
    train.train_classifier(small)
    assert states == [record.STARTED] and read(small).results['steps'] == 6


def test_a_checkpoint_that_does_not_fit_leaves_the_record_as_it_was(small, monkeypatch):
    train.train_classifier(small)
    before = read(small)
    small.config.classifier.training.steps = 8

    def refuse(*_):
        assert read(small).state == record.STARTED
        raise CheckpointMismatch('another network')

    monkeypatch.setattr(Checkpoints, 'restore', refuse)
    with pytest.raises(CheckpointMismatch):
        train.train_classifier(small)
    assert read(small) == before


def test_data_that_cannot_be_read_leave_the_record_as_it_was(small, monkeypatch):
    train.train_classifier(small)
    before = read(small)
    small.config.classifier.training.steps = 8

    def refuse(*_, **__):
        raise JobError('no images')

    monkeypatch.setattr(train, 'train_batches', refuse)
    with pytest.raises(JobError, match='no images'):
        train.train_classifier(small)
    assert read(small) == before


def test_a_training_continues_with_the_same_settings_and_inputs_alone(small, monkeypatch):
    train.train_classifier(small)
    small.config.classifier.training.learning_rate = 0.5
    with pytest.raises(SettingsChangedError, match=r'classifier.training.learning_rate: recorded \S+, now 0.5'):
        train.train_classifier(small)
    small.config.classifier.training.learning_rate = read(small).settings['classifier.training.learning_rate']
    small.config.classifier.training.log_every = 1  # says nothing about the weights
    train.train_classifier(small)
    monkeypatch.setattr(Run, 'images_digest', lambda run: 64 * '0')
    with pytest.raises(StaleInputError, match='(?s)another input images.*' + 64 * '0'):
        train.train_classifier(small)


def test_the_log_of_a_training_goes_to_the_tracker_once(small, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', wandb := FakeWandB())
    monkeypatch.setattr(trackers, 'find_spec', lambda name: None)
    small.config.tracker = 'wandb'
    with pytest.raises(JobError, match='pip install wandb'):
        train.train_classifier(small)
    assert read(small) is None
    monkeypatch.setattr(trackers, 'find_spec', lambda name: name)
    train.train_classifier(small)
    small.config.classifier.training.steps = 6
    train.train_classifier(small)
    (logged,) = wandb.runs.values()
    runtime = (*RUNTIME_FIELDS, 'step')
    lines = [
        (x['step'], k, v) for x in read_metrics(small.path('classifier')) for k, v in x.items() if k not in runtime
    ]
    assert sorted(logged) == sorted(lines) and len(lines) > 6
    assert (
        wandb.options['name'] == 'tiny/classifier' and wandb.options['config']['classifier.training.batch_size'] == 16
    )


def test_without_classes_there_is_no_classifier(small):
    small.config.data.num_classes = 0
    with pytest.raises(JobError, match='num_classes is 0: a classifier needs at least 2'):
        train.train_classifier(small)


def test_the_cost_of_a_step_is_counted_where_the_peak_is_known(small, monkeypatch):
    task, data = train.make_task(small, 'classifier'), train.image_data(small, 'classifier')
    parameters, nothing = train._count(task, data, 16, small.mesh)
    assert nothing == {} and parameters > 1000
    device = hardware.hardware_of(type('Device', (), {'device_kind': 'TPU v4'}))
    monkeypatch.setattr(hardware, 'hardware_of', lambda _: device)
    _, one = train._count(task, data, 16, small.mesh)
    _, two = train._count(task, data, 32, small.mesh)
    assert one['peak_flops'] == 8 * 275e12 and two['flops_per_step'] == pytest.approx(2 * one['flops_per_step'])
    assert one['flops_per_step'] > 3 * 2 * 16 * parameters  # every weight is used at several positions
    data.train.close()
