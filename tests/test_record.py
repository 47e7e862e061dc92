"""The record of an output directory: its states, its refusals with both sides, and directories of earlier versions."""

import json

import pytest

from vqvae2_jax.io import record
from vqvae2_jax.io.record import DONE, MISSING, STALE, STARTED, JobError, SettingsChangedError, StaleInputError
from vqvae2_jax.version import __version__

INPUTS, SETTINGS = {'vqvae': 'a' * 64}, {'seed': 0, 'labels': (1, 2), 'temperature': {'top': 1.0}}


def open_output(directory, inputs=INPUTS, settings=SETTINGS, **options):
    return record.open_output(directory, 'sample', inputs, settings, **options)


def test_states_from_missing_to_done(tmp_path):
    output = open_output(tmp_path)
    assert output.state == MISSING and not list(tmp_path.iterdir()) and record.read(tmp_path) is None
    output.start()
    assert open_output(tmp_path).state == STARTED
    with pytest.raises(JobError, match='is not finished: run your command with --job=sample'):
        record.read_done(tmp_path, 'sample')
    output.save_seconds(12.34)
    assert open_output(tmp_path).seconds == 12.3
    output.finish({'count': 24})
    found = record.read_done(tmp_path, 'sample')
    assert found.state == DONE and found.results == {'count': 24} and found.seconds == 12.3
    assert found.version == __version__ and found.job == 'sample' and found.inputs == INPUTS
    assert found.settings == {'seed': 0, 'labels': [1, 2], 'temperature': {'top': 1.0}}
    assert open_output(tmp_path).state == DONE  # tuples equal the lists of JSON


def test_nothing_is_not_finished(tmp_path):
    with pytest.raises(JobError, match=rf'{tmp_path} has nothing: run your command with --job=reject'):
        record.read_done(tmp_path, 'reject')


def test_the_digest_follows_from_inputs_settings_and_results(tmp_path):
    def digest(name, inputs=INPUTS, settings=SETTINGS, results=None, **options):
        output = open_output(tmp_path / name, inputs, settings)
        output.start()
        output.finish(results or {'count': 24}, **options)
        return record.read_done(tmp_path / name, 'sample').digest

    first = digest('a')
    assert len(first) == 64 and digest('b', seconds=5.0) == first  # neither the place nor the time
    others = [digest('c', {'vqvae': 'b' * 64}), digest('d', settings=SETTINGS | {'seed': 1})]
    others += [digest('e', results={'count': 25}), digest('f', digest='c' * 64)]
    assert len({first, *others}) == 5 and others[-1] == 'c' * 64


def test_a_restart_counts_as_unfinished(tmp_path):
    output = open_output(tmp_path)
    output.finish({'count': 24}, seconds=3.0)
    done, before = open_output(tmp_path), open_output(tmp_path)
    done.start()
    again = open_output(tmp_path)
    assert again.state == STARTED and again.results == {} and again.digest == '' and again.seconds == 3.0
    before.write()
    assert record.read_done(tmp_path, 'sample') == output


def test_a_changed_input_is_refused_with_both_digests(tmp_path):
    open_output(tmp_path).finish({})
    with pytest.raises(StaleInputError) as error:
        open_output(tmp_path, {'vqvae': 'b' * 64})
    assert 'input vqvae' in str(error.value) and f'delete {tmp_path}' in str(error.value)
    assert 'recorded ' + 'a' * 64 in str(error.value) and 'now      ' + 'b' * 64 in str(error.value)
    with pytest.raises(StaleInputError, match='(?s)input images.*recorded None'):
        open_output(tmp_path, INPUTS | {'images': 'b' * 64})
    with pytest.raises(StaleInputError, match='(?s)input vqvae.*now      None'):
        open_output(tmp_path, {})


def test_changed_settings_are_refused_with_both_values(tmp_path):
    open_output(tmp_path).start()
    with pytest.raises(SettingsChangedError) as error:
        open_output(tmp_path, settings=SETTINGS | {'seed': 5, 'labels': (), 'new': True})
    for line in ('seed: recorded 0, now 5', 'labels: recorded [1, 2], now []', 'new: recorded None, now True'):
        assert f'\n  {line}\n' in str(error.value)
    assert 'temperature' not in str(error.value) and f'delete {tmp_path}' in str(error.value)
    with pytest.raises(SettingsChangedError, match='do something else$'):
        open_output(tmp_path, settings={}, hint='do something else')


def test_an_output_may_be_replaced(tmp_path):
    open_output(tmp_path).finish({'count': 24}, seconds=3.0)
    assert open_output(tmp_path, replace=True).state == DONE
    for stale in (open_output(tmp_path, {}, replace=True), open_output(tmp_path, settings={}, replace=True)):
        assert stale.state == STALE and stale.results == {} and stale.seconds == 0 and stale.digest == ''
    assert record.read_done(tmp_path, 'sample').results == {'count': 24}  # until it is written again


@pytest.mark.parametrize('name', ['trained.json', 'meta.json', 'settings.json', 'started.json'])
def test_directories_of_version_0_2_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text('{}')
    for call in (record.read, open_output, lambda directory: record.read_done(directory, 'sample')):
        with pytest.raises(JobError, match=rf'{tmp_path} was written by a version before 0.3 \({name}.*CHANGELOG.md'):
            call(tmp_path)


@pytest.mark.parametrize('change', [{'schema': 2}, {'colour': 'red'}, 'torn', '[]'])
def test_a_damaged_record_is_refused(tmp_path, change):
    open_output(tmp_path).finish({})
    path = tmp_path / record.FILE
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(JobError, match=rf'{path} is damaged'):
        record.read(tmp_path)
    fields = record.Record(tmp_path, 'x', {}, {})
    fields.finish({})
    without = json.loads(path.read_text())
    del without['inputs']
    path.write_text(json.dumps(without))
    with pytest.raises(JobError, match='damaged'):
        record.read(tmp_path)


def test_all_kinds_of_job_errors_are_one_class():
    assert issubclass(StaleInputError, JobError) and issubclass(SettingsChangedError, JobError)
