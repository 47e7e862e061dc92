"""Damaged checkpoints and weights of a training: it continues from sound ones, and repeats steps to the bit."""

import pathlib
import shutil

import numpy as np
import pytest
from etils import epath

from tests.test_train import kept, toy_task, train_toy
from vqvae2_jax.io import checksums, record
from vqvae2_jax.io.logging import read_metrics
from vqvae2_jax.io.record import JobError, Record, SettingsChangedError
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.training import recovery
from vqvae2_jax.training.checkpoint import BestCheckpoint, Checkpoints, checkpoint_steps


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def largest(directory):
    files = (path for path in pathlib.Path(directory).rglob('*') if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


DAMAGE = {
    'a flipped bit': lambda directory: flip(largest(directory)),
    'a short file': lambda directory: largest(directory).write_bytes(b''),
    'a lost file': lambda directory: largest(directory).unlink(),
    'a lost record': lambda directory: (directory / 'record.json').unlink(),
    'a torn record': lambda directory: (directory / 'record.json').write_text('{'),
    'an empty directory': lambda directory: (shutil.rmtree(directory), directory.mkdir()),
}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A finished training of 8 steps with checkpoints at 6 and 8, whose best step is 7."""
    directory = tmp_path_factory.mktemp('whole')
    train_toy(directory, late_task())
    return directory


def late_task():
    return toy_task(distance=lambda w: abs(w - 7))


@pytest.fixture
def directory(whole, tmp_path):
    return epath.Path(shutil.copytree(whole, tmp_path / 'run'))


def continue_training(directory):
    recovery.recover(directory, 'toy')
    train_toy(directory, late_task())


def assert_same(directory, whole):
    assert kept(directory) == kept(whole)
    ours, theirs = (BestCheckpoint(path).load()['params']['w'] for path in (directory, whole))
    np.testing.assert_array_equal(ours, theirs)
    lines = [
        [{k: v for k, v in line.items() if 'time' not in k} for line in read_metrics(p)] for p in (directory, whole)
    ]
    assert [line['step'] for line in lines[0]] == [line['step'] for line in lines[1]]
    assert Checkpoints(directory).latest_step() == 8


def test_a_checkpoint_has_a_record_of_its_files_and_of_the_best_weights(directory):
    assert checkpoint_steps(directory / 'checkpoints') == [6, 8]
    for step, best in ((6, 6), (8, 7)):
        output = record.read(directory / 'checkpoints' / str(step))
        assert output.results['best']['step'] == best and output.find_damaged() == {}
        files = checksums.file_entries(output.directory)
        assert files.keys() - output.files.keys() <= {'record.json', '_CHECKPOINT_METADATA', 'commit_success.txt'}
        assert len(output.files) > 5
    names = {path.name for path in (directory / 'weights').iterdir()}
    assert {'6', '7', 'best.json'} <= names <= {'4', '6', '7', 'best.json'}  # 4 goes with the next checkpoint
    recovery.recover(directory, 'toy')
    assert checkpoint_steps(directory / 'checkpoints') == [6, 8]


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_newest_checkpoint_is_set_aside(directory, whole, damage, capsys):
    DAMAGE[damage](directory / 'checkpoints' / '8')
    continue_training(directory)
    out = capsys.readouterr().out
    assert f'{directory}/checkpoints/8' in out and f'It is set aside as {directory}/checkpoints/8.damaged' in out
    assert 'training continues from step 6: 2 steps are repeated' in out and 'toy: continuing from step 6' in out
    assert (directory / 'checkpoints' / '8.damaged').is_dir()
    assert_same(directory, whole)


@pytest.mark.parametrize('content', [b'', b'[]', b'{', bytes([255])])
def test_metadata_that_orbax_does_not_need_are_removed(directory, whole, content):
    for step in ('6', '8'):
        (directory / 'checkpoints' / step / '_CHECKPOINT_METADATA').write_bytes(content)
    continue_training(directory)
    assert_same(directory, whole)


def test_without_a_sound_checkpoint_the_choices_are_named(directory):
    for step in (6, 8):
        flip(largest(directory / 'checkpoints' / str(step)))
    for _ in range(2):  # nothing is renamed that would hide the damage from the next call
        with pytest.raises(JobError, match=f'No checkpoint is sound: .*, or delete {directory} to train'):
            recovery.recover(directory, 'toy')
    shutil.rmtree(directory)  # the advice
    recovery.recover(directory, 'toy')


WEIGHTS_DAMAGE = {
    'is damaged: its content has changed': lambda weights: flip(largest(weights / '7')),
    'is damaged: it is missing': lambda weights: shutil.rmtree(weights / '7'),
    'best.json is not that of checkpoint 8': lambda weights: checksums.write_sealed(
        weights / 'best.json', checksums.read_sealed(weights / 'best.json') | {'step': 5}
    ),
}


@pytest.mark.parametrize('message', WEIGHTS_DAMAGE)
def test_damaged_weights_are_trained_again_from_a_checkpoint_before_them(directory, whole, message, capsys):
    WEIGHTS_DAMAGE[message](directory / 'weights')
    continue_training(directory)
    out = capsys.readouterr().out
    sound = 'step' in message or 'not that' in message
    assert message in out and f'Continuing from step {8 if sound else 6}' in out
    if not sound:
        assert '2 steps are repeated' in out and (directory / 'abandoned' / '8').is_dir()
    assert_same(directory, whole)


@pytest.mark.parametrize('damage', ['{', '[]', '{"step": 8}', None])
def test_a_damaged_list_of_the_best_weights_is_written_again(directory, whole, damage, capsys):
    path = directory / 'weights' / 'best.json'
    before = path.read_bytes()
    path.write_text(damage) if damage else path.unlink()
    continue_training(directory)
    out = capsys.readouterr().out
    assert 'best.json is ' in out and 'Continuing from step 8; no step is repeated' in out
    assert path.read_bytes() == before
    assert_same(directory, whole)


def test_weights_older_than_every_checkpoint_cannot_be_trained_again(tmp_path):
    train_toy(tmp_path, toy_task())  # the best step is 3
    flip(largest(epath.Path(tmp_path) / 'weights' / '3'))
    with pytest.raises(JobError, match=r'weights/3/.* is damaged.*no sound checkpoint.*, or delete'):
        recovery.recover(epath.Path(tmp_path), 'toy')


def test_weights_of_a_lost_training_are_not_kept(directory):
    """Without record and checkpoints nobody knows whether they are of the same settings."""
    shutil.rmtree(directory / 'checkpoints')
    recovery.recover(directory, 'toy', has_record=True)  # a kill before the first checkpoint
    assert BestCheckpoint(directory).best()['step'] == 7
    recovery.recover(directory, 'toy', has_record=False)
    assert BestCheckpoint(directory).best() is None


@pytest.mark.parametrize('name', ['record.json', 'checkpoints/8/record.json', 'weights/best.json'])
def test_a_directory_in_place_of_a_file_is_damage(run, name, capsys):
    path = run.path('classifier', name)
    path.unlink()
    path.mkdir()
    if name == 'record.json':
        with pytest.raises(
            JobError, match='record.json cannot be read: Is a directory. Change its perm.*, or remove it'
        ):
            run_job(run, 'classifier')
        path.rmdir()  # the advice
    run_job(run, 'classifier')
    assert 'classifier' in capsys.readouterr().out


def test_a_kill_before_the_first_checkpoint_is_no_damage(tmp_path, capsys):
    train_toy(tmp_path, toy_task(), steps=1, save_every=9)
    shutil.rmtree(tmp_path / 'checkpoints')
    (tmp_path / 'weights' / 'best.json').unlink()
    recovery.recover(epath.Path(tmp_path), 'toy')
    assert not capsys.readouterr().out.count('damaged')


def test_a_lost_record_is_written_again_from_a_checkpoint(run, capsys):
    """The settings are those of the checkpoint, so that other ones are refused as before."""
    path = run.path('classifier', 'record.json')
    before = record.read(path.parent)
    for damage in (path.unlink, lambda: path.write_text('torn')):
        damage()
        run.config.classifier.training.learning_rate *= 2
        with pytest.raises(SettingsChangedError, match='classifier.training.learning_rate: recorded'):
            run_job(run, 'classifier')
        run.config.classifier.training.learning_rate /= 2
        run_job(run, 'classifier')
        assert 'Writing it again from checkpoint 8' in capsys.readouterr().out
        after = record.read(path.parent)
        assert (after.digest, after.results, after.state) == (before.digest, before.results, before.state)
        assert workdir.load_trained(run, 'classifier')


def test_damage_stops_readers_and_is_mended_by_the_training(run, finished, capsys):
    before = record.read(run.path('vqvae'))
    flip(largest(run.path('vqvae', 'weights', before.results['best_step'] and str(before.results['best_step']))))
    run.path('codes').rmtree()
    with pytest.raises(JobError, match=r'vqvae/weights/.* is damaged: .*run your command with --job=vqvae'):
        run_job(run, 'extract_codes')
    run_job(run, 'vqvae')
    assert 'steps are repeated' in capsys.readouterr().out
    assert record.read(run.path('vqvae')).digest == before.digest
    run_job(run, 'extract_codes')
    codes = [record.read(r.path('codes', 'train')) for r in (run, finished)]
    assert codes[0].files == codes[1].files and codes[0].digest == codes[1].digest


# --continue_from


def test_a_training_continues_from_an_earlier_checkpoint_with_other_settings(run, finished, capsys):
    training = run.config.classifier.training
    training.update(learning_rate=training.learning_rate / 2, clip_norm=1.0)
    with pytest.raises(
        SettingsChangedError, match=r'run your command with --job=classifier --continue_from=4\.'
    ) as error:
        run_job(run, 'classifier')
    assert 'learning_rate: recorded' in str(error.value) and 'clip_norm: recorded 0.0, now 1.0' in str(error.value)
    going_back = workdir.Run(run.config, run.workdir, continue_from=4)
    run_job(going_back, 'classifier')
    out = capsys.readouterr().out
    assert 'classifier: continuing from step 4' in out and 'clip_norm 0.0 -> 1.0 at step 4' in out
    assert run.path('classifier', 'abandoned', '8').is_dir()
    output = record.read(run.path('classifier'))
    assert [change[:2] for change in output.changes] == [
        [4, 'classifier.training.clip_norm'],
        [4, 'classifier.training.learning_rate'],
    ]
    assert output.state == record.DONE and output.settings['classifier.training.clip_norm'] == 1.0
    assert output.digest != record.read(finished.path('classifier')).digest
    run_job(going_back, 'classifier')  # the same command, again
    run_job(run, 'classifier')
    assert capsys.readouterr().out.count('classifier: done') == 2
    assert record.read(run.path('classifier')).changes == output.changes
    workdir.load_trained(run, 'classifier')
    assert 'was trained with changed settings: classifier.training.clip_norm 0.0 -> 1.0' in capsys.readouterr().out


def test_the_command_that_a_refusal_names_is_accepted(run):
    run.config.classifier.training.learning_rate /= 2
    run_job(workdir.Run(run.config, run.workdir, continue_from=4), 'classifier')
    assert record.read(run.path('classifier')).changes[0][0] == 4


@pytest.mark.parametrize(
    'step, change, job, message',
    [
        (8, {}, 'classifier', r'no field of classifier.training is changed.*classifier.training.learning_rate='),
        (5, {'adam_b2': 0.9}, 'classifier', r'--continue_from=5: .*classifier has checkpoints at the steps 4, 8'),
        (8, {'adam_b2': 0.9}, 'pipeline', '--continue_from=8 belongs to one training: give --job=vqvae'),
        (8, {'adam_b2': 0.9}, 'prior', '--job=prior --level=top'),
    ],
)
def test_steps_and_jobs_to_go_back_to(run, step, change, job, message):
    run.config.classifier.training.update(change)
    with pytest.raises(JobError, match=message):
        run_job(workdir.Run(run.config, run.workdir, continue_from=step), job)


def test_a_schedule_may_change_and_a_step_be_gone_back_to_twice(run):
    training, results = run.config.classifier.training, []
    for schedule, rate in (('constant', 1e-3), ('constant', 1e-4), ('cosine', 1e-4)):
        training.update(lr_schedule=schedule, learning_rate=rate)
        run_job(workdir.Run(run.config, run.workdir, continue_from=4), 'classifier')
        run_job(run, 'classifier')  # accepts the settings
        output = record.read(run.path('classifier'))
        assert output.state == record.DONE and output.settings['classifier.training.learning_rate'] == rate
        results.append(output.digest)
    assert len(set(results)) == 3
    assert sorted(p.name for p in run.path('classifier', 'abandoned').iterdir()) == ['8', '8-2', '8-3']


def test_only_settings_of_the_training_change_on_the_way(run):
    run.config.classifier.widths = (8, 8)
    run.config.classifier.training.learning_rate /= 2
    before = record.read(run.path('classifier'))
    with pytest.raises(SettingsChangedError, match='classifier.widths: recorded'):
        run_job(workdir.Run(run.config, run.workdir, continue_from=4), 'classifier')
    assert record.read(run.path('classifier')) == before  # nothing has changed
    assert not run.path('classifier', 'abandoned').exists()


def test_nothing_goes_back_where_nothing_is(run):
    run.path('classifier').rmtree()
    with pytest.raises(JobError, match='--continue_from=4: there is no training in'):
        run_job(workdir.Run(run.config, run.workdir, continue_from=4), 'classifier')


def test_a_damaged_checkpoint_is_not_gone_back_to(run):
    run.config.classifier.training.learning_rate /= 2
    flip(largest(run.path('classifier', 'checkpoints', '4')))
    with pytest.raises(
        JobError, match=r'--continue_from=4: .*checkpoints/4/.* is damaged.*choose another step of \[4, 8\]'
    ):
        run_job(workdir.Run(run.config, run.workdir, continue_from=4), 'classifier')
    assert isinstance(record.read(run.path('classifier')), Record)
