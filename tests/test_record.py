"""The record of an output directory: its states, its refusals with both sides, and directories of earlier versions."""

import errno
import hashlib
import json

import pytest

from vqvae2_jax.io import checksums, files, record
from vqvae2_jax.io.record import (
    DONE,
    MISSING,
    STALE,
    STARTED,
    DamagedError,
    JobError,
    SettingsChangedError,
    StaleInputError,
)
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
    (tmp_path / 'a.npz').write_bytes(b'one')
    output.add_files('a.npz', seconds=12.34)
    assert open_output(tmp_path).seconds == 12.3
    output.finish({'count': 24})
    found = record.read_done(tmp_path, 'sample')
    assert found.state == DONE and found.results == {'count': 24} and found.seconds == 12.3
    assert found.version == __version__ and found.job == 'sample' and found.inputs == INPUTS
    assert found.settings == {'seed': 0, 'labels': [1, 2], 'temperature': {'top': 1.0}}
    assert found.files == {'a.npz': [3, 'sha256:' + hashlib.sha256(b'one').hexdigest()]}
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


@pytest.mark.parametrize('change', [{'schema': 3}, {'colour': 'red'}, {'seconds': 1}, {'checksum': ''}, 'torn', '[]'])
def test_a_damaged_record_is_refused_by_readers_and_written_again_by_its_job(tmp_path, capsys, change):
    open_output(tmp_path).finish({'count': 24})
    path = tmp_path / record.FILE
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DamagedError, match=rf'{path} is damaged'):
        record.read(tmp_path)
    with pytest.raises(DamagedError, match=rf'{path} is damaged.*run your command with --job=sample'):
        record.read_done(tmp_path, 'sample')
    assert record.read_if_done(tmp_path) is None
    output = open_output(tmp_path)
    assert output.state == STALE and output.files == {} and output.results == {}
    assert f'{path} is damaged' in capsys.readouterr().out
    output.finish({'count': 24})
    assert record.read_done(tmp_path, 'sample').results == {'count': 24}


def test_a_record_that_is_not_utf_8_is_damaged(tmp_path):
    open_output(tmp_path).finish({})
    (tmp_path / record.FILE).write_bytes(b'\xff' + (tmp_path / record.FILE).read_bytes()[1:])
    with pytest.raises(DamagedError, match='is damaged'):
        record.read(tmp_path)


def test_a_record_of_another_schema_is_refused(tmp_path):
    fields = dict.fromkeys(record._FIELDS) | {'schema': 1}
    checksums.write_sealed(tmp_path / record.FILE, fields)
    with pytest.raises(JobError, match=f'{record.FILE} has other fields than version') as error:
        record.read(tmp_path)
    assert not isinstance(error.value, DamagedError)


def flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:1] + bytes([data[1] ^ 1]) + data[2:])


DAMAGE = {
    'content has changed': flip,
    'has 1 bytes instead of 3': lambda path: path.write_bytes(path.read_bytes()[:1]),
    'has 0 bytes': lambda path: path.write_bytes(b''),
    'is missing': lambda path: path.unlink(),
}


@pytest.mark.parametrize('reason', DAMAGE)
def test_damaged_files_are_refused_by_readers_and_dropped_by_their_job(tmp_path, capsys, reason):
    output = open_output(tmp_path, devices='1 x cpu')
    output.start()
    for name in ('a.npz', 'b/c.npz'):
        files.write_bytes(tmp_path / name, name[:3].encode())
    output.add_files('a.npz', 'b/c.npz')
    output.finish({'count': 2})
    before = record.read_done(tmp_path, 'sample')
    assert before.file('b/c.npz').read_bytes() == b'b/c' and before.devices == '1 x cpu'
    DAMAGE[reason](tmp_path / 'b/c.npz')
    assert before.file('a.npz') and before.find_damaged().keys() == {'b/c.npz'} == before.find_damaged_together().keys()
    with pytest.raises(
        DamagedError, match=f'{tmp_path}/b/c.npz is damaged: .*{reason}.*run your command with --job=sampl'
    ):
        before.file('b/c.npz')
    output = open_output(tmp_path, devices='8 x cpu')
    output.drop_damaged(output.find_damaged_together())
    assert output.state == STARTED and output.files.keys() == {'a.npz'}
    assert f'{tmp_path}/b/c.npz is damaged: it' in capsys.readouterr().out
    output.start()
    files.write_bytes(tmp_path / 'b/c.npz', b'b/c')
    output.add_files('b/c.npz')
    output.finish({'count': 2})
    assert output.digest == before.digest and not capsys.readouterr().out  # all that was made from it stays valid
    assert open_output(tmp_path).find_damaged() == {}


def test_a_file_that_the_disk_cannot_read_is_damaged(tmp_path, monkeypatch):
    output = open_output(tmp_path)
    (tmp_path / 'a.npz').write_bytes(b'one')
    output.add_files('a.npz')

    def fail(*_):
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(checksums, '_hash_file', fail)
    assert output.find_damaged() == {'a.npz': 'it cannot be read: Input/output error'}


def test_a_file_that_is_made_again_with_another_content_changes_the_digest(tmp_path, capsys):
    output = open_output(tmp_path, devices='1 x cpu')
    for name in ('a.npz', 'a.png'):
        (tmp_path / name).write_bytes(b'one')
    output.add_files('a.npz', 'a.png')
    output.finish({})
    before = output.digest
    for name, same in (('a.png', True), ('a.npz', False)):
        (tmp_path / name).unlink()
        output = open_output(tmp_path, devices='8 x cpu')
        output.drop_damaged(output.find_damaged())
        output.start()
        (tmp_path / name).write_bytes(b'two')
        output.add_files(name)
        output.finish({})
        assert (output.digest == before) == same  # pictures are read by people alone
    line = 'the damaged files were made on 8 x cpu, and again on 8 x cpu, with another content. All outputs'
    assert line in capsys.readouterr().out


def test_partial_files_of_dead_processes_are_removed(tmp_path):
    names = '.samples-1.npz.123.part', 'shard-00000.array_record.unfinished-0123abcd'
    for name in (*names, 'a.part', 'unfinished'):
        (tmp_path / name).touch()
    open_output(tmp_path).start()
    assert {path.name for path in tmp_path.iterdir()} == {'a.part', 'unfinished', record.FILE}


def test_all_kinds_of_job_errors_are_one_class():
    assert issubclass(StaleInputError, JobError) and issubclass(SettingsChangedError, JobError)
