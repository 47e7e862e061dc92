"""Digests see everything that matters and nothing else; files are written completely or not at all."""

import hashlib
import json
import os
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from vqvae2_jax.io import files


def tree():
    return {
        'codebook': {'top': jnp.arange(6.0).reshape(2, 3), 'bottom': jnp.ones(4, jnp.bfloat16)},
        'step': np.int32(3),
    }


def test_digest_is_stable_across_order_and_container():
    original = tree()
    shuffled = {'step': original['step'], 'codebook': dict(reversed(original['codebook'].items()))}
    expected = files.digest_arrays(original)
    assert re.fullmatch('[0-9a-f]{64}', expected)
    assert files.digest_arrays(shuffled) == expected
    assert files.digest_arrays(jax.device_get(original)) == expected
    assert files.digest_arrays(flax.core.freeze(original)) == expected

    @flax.struct.dataclass
    class State:
        step: np.int32  # not in sorted order
        codebook: dict

    assert files.digest_arrays(State(**original)) == expected


def test_digest_by_hand():
    # Files on disk hold digests: a new definition would make every recorded one stale.
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    by_hand = hashlib.sha256(b'[["a", "b"], "int32", [2, 3]]\n' + array.tobytes()).hexdigest()
    assert files.digest_arrays({'a': {'b': array}}) == by_hand


def test_digest_ignores_memory_layout():
    array = np.arange(6.0).reshape(2, 3)
    assert files.digest_arrays([array]) == files.digest_arrays([np.asfortranarray(array)])


@pytest.mark.parametrize(
    'change',
    [
        lambda t: t['codebook'].update(top=t['codebook']['top'].at[1, 2].add(1e-6)),
        lambda t: t['codebook'].update(top=t['codebook']['top'].reshape(3, 2)),
        lambda t: t['codebook'].update(top=t['codebook']['top'].view(jnp.int32)),
        lambda t: t['codebook'].update(bottom=t['codebook']['bottom'].view(jnp.float16)),
        lambda t: t['codebook'].update(middle=t['codebook'].pop('top')),
        lambda t: t.update(top=t['codebook'].pop('top')),
        lambda t: t.update({'codebook/top': t['codebook'].pop('top')}),
        lambda t: t.pop('step'),
        lambda t: t.update(empty=np.zeros(0)),
    ],
)
def test_digest_sees_every_change(change):
    changed = tree()
    change(changed)
    assert files.digest_arrays(changed) != files.digest_arrays(tree())


def test_digest_refuses_what_is_not_numbers():
    with pytest.raises(TypeError, match="leaf 'a/b' is str"):
        files.digest_arrays({'a': {'b': 'text'}})


def test_digest_json_depends_on_content_only():
    assert files.digest_json({'a': 1, 'b': (1, 2)}) == files.digest_json({'b': [1, 2], 'a': 1})
    assert files.digest_json({'a': 1}) != files.digest_json({'a': 2})
    assert files.digest_json({'a': 1}) != files.digest_json({'a': '1'})


def test_json_round_trip(tmp_path):
    path = tmp_path / 'new' / 'meta.json'
    files.write_json(path, {'z': [1, 2.5, None, True], 'a': np.float64(0.5), 'n': np.int64(7), 't': (32, 32)})
    assert files.read_json(path) == {'z': [1, 2.5, None, True], 'a': 0.5, 'n': 7, 't': [32, 32]}
    assert list(json.loads(path.read_text())) == ['z', 'a', 'n', 't']
    assert path.read_text().count('\n') > 4
    assert os.listdir(path.parent) == ['meta.json']


@pytest.mark.parametrize(
    'value, error, match',
    [
        ({'fid': {'top': [1.0, float('nan')]}}, ValueError, r'r\.json\.fid\.top\[1\] is nan'),
        ({'fid': np.float32('inf')}, ValueError, r'r\.json\.fid is inf'),
        ({'per_class': {3: 0.5}}, TypeError, r'r\.json\.per_class has the key 3 \(int\)'),
        ({'codes': np.zeros(2)}, TypeError, r'r\.json\.codes is a ndarray'),
    ],
)
def test_write_json_refuses_and_leaves_the_old_file(tmp_path, value, error, match):
    path = tmp_path / 'r.json'
    files.write_json(path, {'good': 1})
    with pytest.raises(error, match=match):
        files.write_json(path, value)
    with pytest.raises(error):
        files.digest_json(value)
    assert files.read_json(path) == {'good': 1}


def test_a_write_that_is_killed_leaves_the_old_file(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / 'r.json')
    files.write_json(path, {'good': 1})

    def killed(self, data):
        with open(self, 'wb') as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), 'write_bytes', killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {'better': 2})
    assert files.read_json(path) == {'good': 1}


def test_read_json_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match='gone.json does not exist; run the job'):
        files.read_json(tmp_path / 'gone.json')
    (tmp_path / 'torn.json').write_text('{"a": 1, "b')
    with pytest.raises(ValueError, match='torn.json is not whole JSON .*line 1 column 10.*delete it'):
        files.read_json(tmp_path / 'torn.json')
